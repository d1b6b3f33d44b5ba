"""LiteRT (TensorFlow Lite) on the CPU: the .tflite file that Android, iOS, boards and browsers run.

The file is written by a table of our own (``rarefy.deployment.tflite``), with the graph's own scales and codes: int8,
weights by channel, biases of 32 bits, which LiteRT hands to XNNPACK. Unsigned codes are written 128 lower, on the same
grid. No converter is asked, so that nothing of TensorFlow, JAX or litert-torch is needed: ``ai-edge-litert`` alone,
20 MB, brings the format's tables and the runtime.

XNNPACK scales sums in float32 and rounds half to even, as the simulation does; sums of two grids in fixed point, by
which parity runs the graph (``kernels.elementwise.add_in_fixed_point``). A layer whose sums nothing rounds keeps its
weights as codes in the file, which are decoded once, when it is opened. What LiteRT has no operator for (sorting, sizes
that depend on values, convolutions of lines and volumes) is refused by the layer's name.

The file is for one batch size (``batch``); ``Session`` runs larger batches piece by piece. Parity reads the codes of
each value out of the file itself, with further outputs.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.deployment import parity
from rarefy.deployment.runtime import (
    CARRIERS,
    PLANAR,
    Capabilities,
    Inputs,
    Kernel,
    Parity,
    Runtime,
    check_threads,
    in_batches,
)
from rarefy.deployment.tflite import file
from rarefy.errors import FormatError, InputError, first_line
from rarefy.graph.fold import fold
from rarefy.graph.lowering import to_integers, to_numbers
from rarefy.graph.nodes import argument
from rarefy.kernels import is_quantised
from rarefy.kernels.elementwise import add_in_fixed_point
from rarefy.system.dependencies import needs

aten = torch.ops.aten

JOINS = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default})

ROUNDINGS = {torch.ops.rarefy.add.default: add_in_fixed_point}  # XNNPACK's

Foreign = Any  # an object of LiteRT's


@dataclasses.dataclass(frozen=True)
class LiteRT:
    """LiteRT (TensorFlow Lite), CPU. threads: 0 is one a core. batch: inputs of one run of the file.

    For Android, and wherever a .tflite file is asked for; layers with weights, sums, gates and pooling are integers.
    """

    threads: int = 0
    batch: int = 1

    suffix = ".tflite"
    decoded = False
    package = "ai_edge_litert"
    capabilities = Capabilities(layers=PLANAR, joins=JOINS, carriers=CARRIERS, float_result=frozenset())

    def __post_init__(self) -> None:
        check_threads("litert", self.threads)
        if self.batch < 1:
            raise InputError(f"litert: batch={self.batch} must be at least 1")

    @property
    def weight_bits(self) -> int:
        """Its int8 products are added in 32 bits on every processor."""
        return 8

    @property
    def floats(self) -> tuple[LiteRT, ...]:
        """Ways to run a float network."""
        return (self,)

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as a .tflite file. Raises InputError for an operator LiteRT has no form of."""
        return file.write(to_numbers(graph) if is_quantised(graph) else fold(graph), path, self.batch)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, ready to run."""
        return Session(path, self.threads)

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, run by ``on`` (None: this runtime)."""
        reader = on if isinstance(on, LiteRT) else self
        integer = to_integers(to_numbers(graph) if is_quantised(graph) else fold(graph))
        codes = parity.coded(integer)
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            beside = Path(folder) / "codes.tflite"
            found = file.tapped(path, list(codes), beside)
            session = Session(beside, reader.threads)

            def read(*part: Tensor) -> parity.Reading:
                answers = session.outputs(*part)
                count = len(answers) - len(found)
                values = {
                    name: file.as_ours(value, last, argument(codes[name], "dtype"))
                    for (name, last), value in zip(found.items(), answers[count:], strict=True)
                }
                return answers[:count], values

            return parity.against(integer, list(found), read, inputs, batch, ROUNDINGS)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """None: LiteRT's Python library has no profiler."""
        raise InputError("litert: LiteRT's Python library tells no times of kernels; use onnxruntime or openvino")


class Session:
    """An opened file; ``outputs`` takes tensors (N, ...), run in pieces of the file's batch."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 0):
        self.path, self.threads = path, threads or os.cpu_count() or 1
        library = needs("ai_edge_litert.interpreter", file.EXTRA)
        if Path(path).read_bytes()[4:8] != file.IDENTIFIER:
            raise FormatError(f"{path}: LiteRT can't open it (no TensorFlow Lite file)")
        try:
            self.interpreter: Foreign = library.Interpreter(model_path=os.fspath(path), num_threads=self.threads)
            self.interpreter.allocate_tensors()
        except Exception as error:
            raise FormatError(f"{path}: LiteRT can't open it ({first_line(error)})") from error
        self.taken = self.interpreter.get_input_details()
        self.given = self.interpreter.get_output_details()
        self.batch = int(self.taken[0]["shape"][0])

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the file. Raises InputError for inputs that it can't be run on."""
        return in_batches(self._run, [one.detach().cpu() for one in inputs], self.batch)

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        try:
            for about, one in zip(self.taken, inputs, strict=True):
                self.interpreter.set_tensor(about["index"], one.contiguous().numpy())
            self.interpreter.invoke()
        except Exception as error:
            shapes = " and ".join(str(list(one.shape)) for one in inputs)
            raise InputError(
                f"{self.path}: LiteRT can't run it on inputs of {shapes} ({first_line(error)}); "
                "give inputs of the shapes that it was captured with"
            ) from error
        return [torch.from_numpy(self.interpreter.get_tensor(about["index"])) for about in self.given]
