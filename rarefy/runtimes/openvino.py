"""OpenVINO on the CPU: the same ONNX file, its Q/DQ pairs becoming oneDNN's integer primitives.

A model is compiled for the shape it is first called with (a batch left open costs speed), and once more for each other
shape, the last few of which are kept. ``precision`` is the type of what is not integer: ``bf16`` halves the time of a
float network on a processor that has it, so that "never slower" is judged against both.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.deployment import description, parity
from rarefy.deployment.latency import quiet_medians, repeated
from rarefy.deployment.onnx import file
from rarefy.deployment.runtime import (
    ACTIVATIONS,
    CARRIERS,
    Capabilities,
    Inputs,
    Kernel,
    Parity,
    Runtime,
    check_threads,
    exact_weight_bits,
    several,
)
from rarefy.errors import FormatError, InputError
from rarefy.graph.lowering import is_decoded, to_numbers
from rarefy.graph.nodes import argument, attribute, finish, set_argument
from rarefy.kernels.elementwise import add_by_numbers
from rarefy.kernels.int_linear import convolution_by_numbers, linear_by_numbers
from rarefy.system.dependencies import needs

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy
ROUNDINGS: parity.Roundings = {
    **{getattr(OPERATORS, f"conv{axes}d_codes").default: convolution_by_numbers for axes in (1, 2, 3)},
    OPERATORS.linear_codes.default: linear_by_numbers,
    OPERATORS.add.default: add_by_numbers,
}
KEPT = 3  # shapes a session stays compiled for

Foreign = Any  # an object of OpenVINO's


@dataclasses.dataclass(frozen=True)
class OpenVINO:
    """OpenVINO, CPU. threads: 0 is one a core. precision: of what is not integer, f32 or bf16. vnni: of the processor
    it is for; none is this one.

    For Intel's processors, where it may be faster than ``onnxruntime``: gates and activations melt into its layers, and
    attention can be integer.
    """

    threads: int = 0
    precision: str = "f32"
    vnni: bool | None = None

    suffix = ".onnx"
    decoded = True  # a code that is read out takes the layer apart that made it
    package = "openvino"
    capabilities = Capabilities(
        posts=ACTIVATIONS, products=frozenset({aten.matmul.default}), has_kernel_times=True, suffixes=(".xml",)
    )

    def __post_init__(self) -> None:
        check_threads("openvino", self.threads)
        if self.precision not in ("f32", "bf16"):
            raise InputError(f"openvino: precision={self.precision!r}: choose f32 or bf16")

    @property
    def weight_bits(self) -> int:
        """The most bits of a weight whose products add up exactly."""
        return exact_weight_bits(self.vnni)

    @property
    def floats(self) -> tuple[OpenVINO, ...]:
        """Ways to run a float network; bf16 on a processor without it is slower, and loses by that."""
        return tuple(dataclasses.replace(self, precision=precision) for precision in ("f32", "bf16"))

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as an ONNX file, or, where the name ends in .xml, as OpenVINO's own format.

        Raises InputError for an operator ONNX has no form of.
        """
        if Path(path).suffix != ".xml":
            return file.write(_written(graph), path, zero_points=False)
        with _as_onnx(graph) as written:
            model = _core().read_model(written)
            for place, node in enumerate(model.get_ordered_ops()):
                if node.get_friendly_name() == node.get_name():  # a number that counts the process's nodes
                    node.set_friendly_name(f"{node.get_type_name()}.{place}")
            model.set_rt_info(description.text_of(graph), description.KEY)
            needs("openvino").save_model(model, path, compress_to_fp16=False)
        return Path(path)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, ready to run."""
        return Session(path, self.threads, self.precision)

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, run by ``on`` (None: this runtime)."""
        if Path(path).suffix != ".xml":
            return parity.compare(_written(graph), path, inputs, on or self, batch, roundings=ROUNDINGS)

        def tapped(names: Sequence[str]) -> Session:
            return Session(path, self.threads, self.precision, taps=names)

        with _as_onnx(graph) as written:
            return parity.compare(_written(graph), written, inputs, self, batch, tapped, ROUNDINGS)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """The kernels of one run, in order, each with its median over the quiet runs of ``seconds``."""
        given = several(inputs)
        request = Session(path, self.threads, self.precision, profile=True).request(*given)
        arrays = [one.numpy() for one in given]

        def run() -> dict[str, float]:
            request.infer(arrays, share_inputs=True, share_outputs=True)
            return {info.node_name: info.real_time.total_seconds() * 1e6 for info in request.get_profiling_info()}

        runs = repeated(run, seconds)
        nodes = _executed(request.get_compiled_model())
        times = quiet_medians([[us.get(node.get_friendly_name(), 0.0) for node in nodes] for us in runs])
        return [
            Kernel(
                node.get_friendly_name(),
                str(node.get_rt_info()["layerType"].astype(str)),
                [list(port.get_shape()) for port in (*node.inputs(), *node.outputs())],
                us,
            )
            for node, us in zip(nodes, times, strict=True)
        ]

    def integer_islands(self, path: str | os.PathLike[str], inputs: Tensor) -> dict[str, dict[str, int]]:
        """What OpenVINO made of the file: integer primitives by type, the float ones, and conversions between them."""
        compiled = Session(path, self.threads, self.precision).request(inputs).get_compiled_model()
        integer, other = collections.Counter[str](), collections.Counter[str]()
        for node in _executed(compiled):
            about = node.get_rt_info()
            precision, kind = (about[key].astype(str) for key in ("runtimePrecision", "layerType"))
            (integer if precision in ("u8", "i8") else other)[kind] += 1
        return {"integer": dict(integer), "float": dict(other)}


@contextlib.contextmanager
def _as_onnx(graph: fx.GraphModule) -> Iterator[Path]:
    """The ONNX file that OpenVINO's own format is made of."""
    with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
        yield file.write(_written(graph), Path(folder) / "model.onnx", zero_points=False)


def _written(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with its layers as numbers, in which what is read on the grid it is already on is not rounded again."""
    graph = to_numbers(graph)
    for node in list(graph.graph.nodes):
        if not is_decoded(node) or argument(node, "q").target is not OPERATORS.quantize.default:
            continue
        moved = source = argument(argument(node, "q"), "x")
        while source.target in CARRIERS or source.target is operator.getitem:
            source = source.args[0]
        if source is not moved and is_decoded(source) and _same_grid(graph, source, node):
            node.replace_all_uses_with(moved)
    for target in _REDUCTIONS:
        for node in graph.graph.find_nodes(op="call_function", target=target):
            _squeeze_behind(graph, node)
    return finish(graph)


_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


def _squeeze_behind(graph: fx.GraphModule, node: fx.Node) -> None:
    """A reduction keeps its axes, and loses them in an operator of its own. In place.

    OpenVINO takes products and sums by channel, and the rounding behind them, for a part of a reduction, and where that
    lost an axis, for those of another axis: codes far off.
    """
    axes = argument(node, "dim")
    if argument(node, "keepdim") or not axes:
        return
    set_argument(node, "keepdim", True)
    with graph.graph.inserting_after(node):
        squeezed = graph.graph.call_function(aten.squeeze.dims, (node, list(axes)))
    squeezed.meta = dict(node.meta)
    node.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)


def _same_grid(graph: fx.GraphModule, one: fx.Node, other: fx.Node) -> bool:
    return all(
        torch.equal(attribute(graph, argument(one, name)), attribute(graph, argument(other, name)))
        for name in ("scale", "zero_point")
    )


class Session:
    """An opened file, compiled for each shape that it is called with; ``outputs`` takes tensors (N, ...).

    taps: names of tensors that are outputs, too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int = 0,
        precision: str = "f32",
        profile: bool = False,
        taps: Sequence[str] = (),
    ):
        self.core = _core()
        self.threads = threads or os.cpu_count() or 1
        self.options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "PERF_COUNT": profile,
        }
        try:
            self.model = self.core.read_model(os.fspath(path))
        except Exception as error:
            raise FormatError(f"{path}: OpenVINO can't open it ({_reason(error)})") from error
        self.order = list(range(len(self.model.outputs)))
        for name in taps:
            self.model.add_outputs(name)  # none, if it is one already
        self.order += [_place_of(name, self.model) for name in taps]
        self.path = path
        self.requests: collections.OrderedDict[tuple[tuple[int, ...], ...], Foreign] = collections.OrderedDict()

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the file."""
        request = self.request(*inputs)
        request.infer(
            [one.detach().cpu().contiguous().numpy() for one in inputs], share_inputs=True, share_outputs=True
        )
        found = request.output_tensors
        return [torch.from_numpy(found[place].data.copy()) for place in self.order]

    def request(self, *inputs: Tensor) -> Foreign:
        """Compiled for the shapes of ``inputs``."""
        shapes = tuple(tuple(one.shape) for one in inputs)
        if shapes not in self.requests:
            model = self.model.clone()
            try:
                model.reshape({place: list(shape) for place, shape in enumerate(shapes)})
                self.requests[shapes] = self.core.compile_model(model, "CPU", self.options).create_infer_request()
            except Exception as error:
                told = " and ".join(str(list(shape)) for shape in shapes)
                raise FormatError(
                    f"{self.path}: OpenVINO can't run it on inputs of {told} ({_reason(error)})"
                ) from error
            if len(self.requests) > KEPT:
                self.requests.popitem(last=False)
        self.requests.move_to_end(shapes)
        return self.requests[shapes]


def _place_of(name: str, model: Foreign) -> int:
    return next(place for place, output in enumerate(model.outputs) if name in output.get_names())


@cache
def _core() -> Foreign:
    """One for the whole process.

    Each puts a stack for signal handlers in place, and at its end puts back the one that was there before: of two freed
    in the order they were made, the second puts back the first one's, which is unmapped, and the next signal that
    Python handles (a child's end, Ctrl-C) kills the process.
    """
    return needs("openvino", "openvino").Core()


def _executed(compiled: Foreign) -> list[Foreign]:
    """Nodes of the compiled model in the order they run, those that do no work left out."""
    return [
        node
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) not in ("Input", "Output", "Const", "Result")
    ]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    return (lines or [type(error).__name__])[0][:200]
