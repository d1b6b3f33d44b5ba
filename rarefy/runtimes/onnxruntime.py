"""ONNX Runtime on the CPU: ONNX files with QuantizeLinear/DequantizeLinear pairs, which it fuses into integer kernels.

What the capability table rests on (measured on an AVX-512 VNNI CPU): unsigned activations with signed weights are the fast grid (signed/signed
is as slow as float); convolution, linear, add, multiply, concatenate, average pooling and sigmoid have integer kernels (QLinearConv, QGemm,
QLinearAdd, ...); max pooling and reshapes move codes. HardSwish and HardSigmoid have none, so that the gate is written as an integer
addition that saturates (``rarefy.quantization.quantize``), and a mean over the plane must be GlobalAveragePool (ReduceMean has none).

Width: its integer convolution handles 16 output channels at a time and the rest one by one, so that fewer than 16 cost more than 16 (3x3,
16 channels in, 32x32: 37 us for 8 out, 25 us for 16), and so does a depthwise one (3x3, 56x56: 476 us for 72 channels, 193 for 80; 5x5, 28x28: 323 for 120, 160 for
128). Such layers, and all that their channels go through up to the convolutions that mix them, are written with zero filters up to the next 16, and what
reads them with zero weights for these: the same answers.

Weights alone in 4 bits or fewer: linear layers are written as DequantizeLinear of INT4 or UINT4 in blocks, which it melts into MatMulNBits; it has no such
kernel for convolutions, which keep int8 codes and are decoded. By itself it then rounds activations to int8 a block; ``Session`` asks for float products.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.deployment import parity
from rarefy.deployment.channel_padding import _MOVING, _is_integer, _widened
from rarefy.deployment.latency import quiet_medians, repeated
from rarefy.deployment.onnx import file
from rarefy.deployment.runtime import CARRIERS, JOINS, Capabilities, Kernel, Parity, Runtime, exact_weight_bits
from rarefy.errors import FormatError
from rarefy.graph.lowering import to_numbers
from rarefy.system.dependencies import needs

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, CPU. threads: of one operator; 0 is one a core. vnni: of the processor it is for; none is this one."""

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
        return file.write(_widened(to_numbers(graph)), path, four_bits=True)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, ready to run."""
        return Session(path, self.threads)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Tensor, seconds: float = 1.5) -> list[Kernel]:
        """The kernels of one run, in order, each with its median over the quiet runs of ``seconds``."""
        with tempfile.TemporaryDirectory() as folder:
            session = Session(path, self.threads, profile=Path(folder) / "profile")
            runs = len(repeated(lambda: session(inputs), seconds))
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
        inputs: Tensor,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, run by ``on`` (None: this runtime); see ``rarefy.deployment.parity``."""
        reader = self if on is None else on
        return parity.compare(_widened(to_numbers(graph)), path, inputs, reader.open, batch, reader.decoded)

    def integer_islands(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What ONNX Runtime made of the file: integer kernels by type, and float operators fed by and feeding integers (there should be none)."""
        onnx = needs("onnx")
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            Session(path, 1, optimized=optimized)
            graph = onnx.load(os.fspath(optimized)).graph
        maker = {name: node for node in graph.node for name in node.output}
        readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        islands = [
            f"{node.op_type} {node.name}"
            for node in graph.node
            if node.op_type not in _MOVING
            and not _is_integer(node)
            and any(maker.get(name) is not None and maker[name].op_type == "DequantizeLinear" for name in node.input)
            and any(reader.op_type == "QuantizeLinear" for name in node.output for reader in readers.get(name, ()))
        ]
        kernels: dict[str, int] = {}
        for node in graph.node:
            if _is_integer(node):
                kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
        return {"integer": kernels, "float_islands": islands, "all": sorted({node.op_type for node in graph.node})}


class Session:
    """An opened file: called with a CPU tensor (N, ...), it returns the model's first output as a tensor. ``threads``, ``name`` (of the input)."""

    def __init__(
        self, path: str | os.PathLike[str], threads: int = 0, optimized: Path | None = None, profile: Path | None = None
    ):
        runtime = needs("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # else its idle threads take the cores of what runs next
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", "1"
        )  # float32: what the graph computes
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
        try:
            self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FormatError(f"{path}: ONNX Runtime can't open it ({str(error).splitlines()[0][:200]})") from error
        self.threads = threads or os.cpu_count() or 1
        self.name = self.session.get_inputs()[0].name

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """All outputs of the file."""
        return [
            torch.from_numpy(value)
            for value in self.session.run(None, {self.name: inputs.detach().cpu().contiguous().numpy()})
        ]
