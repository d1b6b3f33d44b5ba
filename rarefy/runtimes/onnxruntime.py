"""ONNX Runtime on the CPU: ONNX files with QuantizeLinear/DequantizeLinear pairs, which it fuses into integer kernels.

What the capability table rests on (measured on an AVX-512 VNNI CPU): unsigned activations with signed weights are the
fast grid (signed/signed is as slow as float); convolution, linear, add, multiply, concatenate, average pooling and
sigmoid have integer kernels (QLinearConv, QGemm, QLinearAdd, ...); max pooling and reshapes move codes. HardSwish and
HardSigmoid have none, so that the gate is written as an integer addition that saturates
(``rarefy.quantization.quantize``), and a mean over the plane must be GlobalAveragePool (ReduceMean has none).

Width: its integer convolution handles 16 output channels at a time and the rest one by one, so that fewer than 16 cost
more than 16 (3x3, 16 channels in, 32x32: 37 us for 8 out, 25 us for 16), and so does a depthwise one (3x3, 56x56: 476
us for 72 channels, 193 for 80; 5x5, 28x28: 323 for 120, 160 for 128). Such layers are written with zero filters up to
the next 16 (``rarefy.deployment.channel_padding``).

Weights alone in 4 bits or fewer: linear layers are written as DequantizeLinear of INT4 or UINT4 in blocks, which it
melts into MatMulNBits; it has no such kernel for convolutions, which keep int8 codes and are decoded. By itself it then
rounds activations to int8 a block; ``Session`` asks for float products.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, fx

from rarefy.deployment import parity
from rarefy.deployment.channel_padding import pad_channels
from rarefy.deployment.latency import quiet_medians, repeated
from rarefy.deployment.onnx import file
from rarefy.deployment.runtime import (
    CARRIERS,
    JOINS,
    Capabilities,
    Inputs,
    Kernel,
    Parity,
    Runtime,
    check_threads,
    exact_weight_bits,
    several,
)
from rarefy.errors import FormatError, InputError, first_line
from rarefy.graph.lowering import to_numbers
from rarefy.system.dependencies import needs

aten = torch.ops.aten

# Operators of an optimised file that only move or convert values.
MOVING = {
    "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split",
    "Gather", "MaxPool", "Shape", "Flatten", "Identity", "Cast", "Pad", "ReorderInput", "ReorderOutput", "Expand",
    "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QMoE", "QAttention")  # how integer kernels' names begin


@dataclasses.dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, CPU. threads: of one operator; 0 is one a core. vnni: of the processor it is for; none is this one.

    The one to start with: its files are read nearly everywhere. On Intel's processors ``openvino`` may be faster.
    """

    threads: int = 0
    vnni: bool | None = None

    suffix = ".onnx"
    decoded = False
    package = "onnxruntime"
    capabilities = Capabilities(
        joins=JOINS | {aten.sigmoid.default, aten.hardsigmoid.default},
        carriers=CARRIERS | {aten.index_select.default},
        float_result=frozenset({aten.linear.default}),
        has_kernel_times=True,
    )

    def __post_init__(self) -> None:
        check_threads("onnxruntime", self.threads)

    @property
    def weight_bits(self) -> int:
        """The most bits of a weight whose products add up exactly."""
        return exact_weight_bits(self.vnni)

    @property
    def floats(self) -> tuple[OnnxRuntime, ...]:
        """Ways to run a float network."""
        return (self,)

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as an ONNX file. Raises InputError for an operator ONNX has no form of."""
        return file.write(pad_channels(to_numbers(graph)), path, four_bits=True, contrib=True)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, ready to run."""
        return Session(path, self.threads)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """The kernels of one run, in order, each with its median over the quiet runs of ``seconds``."""
        with tempfile.TemporaryDirectory() as folder:
            session = Session(path, self.threads, profile=Path(folder) / "profile")
            runs = len(repeated(lambda: session(*several(inputs)), seconds))
            events = json.loads(Path(session.session.end_profiling()).read_bytes())
        suffix = "_kernel_time"
        kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)]
        kernels.sort(key=lambda event: event["ts"])
        count = len(kernels) // runs
        by_run = [kernels[start : start + count] for start in range(0, len(kernels), count)]
        times = quiet_medians([[event["dur"] for event in run] for run in by_run])
        profile, seen = [], collections.Counter[str]()
        for event, us in zip(by_run[-1], times, strict=True):
            about = event["args"]
            tensors = (*about["input_type_shape"], *about["output_type_shape"])
            name = event["name"].removesuffix(suffix).partition("_token_")[0]
            seen[name] += 1
            shapes = [shape for tensor in tensors for shape in tensor.values()]
            profile.append(Kernel(f"{name}#{seen[name]}", str(about["op_name"]), shapes, us))
        return profile

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, run by ``on`` (None: this runtime)."""
        return parity.compare(pad_channels(to_numbers(graph)), path, inputs, on or self, batch)

    def integer_islands(self, path: str | os.PathLike[str]) -> dict[str, object]:
        """What ONNX Runtime made of the file.

        integer: its integer kernels by type. float_islands: float operators fed by and feeding integers (there should
        be none). all: the types of all its kernels.
        """
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            Session(path, 1, optimized=optimized)
            nodes = needs("onnx").load(os.fspath(optimized)).graph.node
        decoded = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
        encoded = {name for node in nodes if node.op_type == "QuantizeLinear" for name in node.input}
        integer = [node.op_type for node in nodes if node.op_type.startswith(INTEGER)]
        islands = [
            f"{node.op_type} {node.name}"
            for node in nodes
            if node.op_type not in MOVING and not node.op_type.startswith(INTEGER)
            if decoded.intersection(node.input) and encoded.intersection(node.output)
        ]
        types = sorted({node.op_type for node in nodes})
        return {"integer": dict(collections.Counter(integer)), "float_islands": islands, "all": types}


class Session:
    """An opened file; ``outputs`` takes tensors (N, ...)."""

    def __init__(
        self, path: str | os.PathLike[str], threads: int = 0, optimized: Path | None = None, profile: Path | None = None
    ):
        runtime = needs("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # else its idle threads take the cores of what runs next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # float32: what the graph computes
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
        try:
            self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FormatError(f"{path}: ONNX Runtime can't open it ({first_line(error)})") from error
        self.threads = threads or os.cpu_count() or 1
        self.path = path
        self.names = [one.name for one in self.session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the file. Raises InputError for inputs that it can't be run on."""
        given = [one.detach().cpu().contiguous().numpy() for one in inputs]
        try:
            answers = self.session.run(None, dict(zip(self.names, given, strict=True)))
        except Exception as error:
            shapes = " and ".join(str(list(one.shape)) for one in inputs)
            raise InputError(
                f"{self.path}: ONNX Runtime can't run it on inputs of {shapes} ({first_line(error)}); "
                "give inputs of the shapes that it was captured with"
            ) from error
        return [torch.from_numpy(value) for value in answers]
