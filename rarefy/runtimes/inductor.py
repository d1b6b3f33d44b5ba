"""PyTorch's own compiler, torch.compile with Inductor, on the CPU and on CUDA.

The file is the saved model itself: graph.json, weights.safetensors and manifest.json (``rarefy.artifact.folder``) in
one ZIP, uncompressed and without a clock's time; a folder that rarefy saved is read as well. It holds no machine code
and no pickle: whoever opens it compiles it, once for each shape of its inputs (10 to 50 s a network), for the processor
at hand, and a C++ compiler has to be there.

In integers on the CPU: layers are oneDNN's int8 convolutions and linear layers (``onednn.qconv_pointwise``,
``qlinear_pointwise``), which Inductor calls by themselves, weights packed and biases in numbers, rounding to the next
codes within the kernel; sums, gates, activations and pooling become C++ loops that decode, compute and round at once. A
sum is scaled in another order than in the simulation, so that a code in some ten thousand is the next one. On CUDA,
which has no such layers, rarefy's exact integer operators are compiled: the simulation's answers, no faster than float.

The last few shapes stay compiled. The kernels of a compiled network have neither names that last nor shapes, so
``kernel_times`` times what multiplies, operator by operator, uncompiled; what Inductor melts together counts nothing
there, and the search corrects the sum by the whole network's time. Peak memory (``rarefy.evaluation.measure``) is that
of a process which compiles, too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import os
import tempfile
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

import rarefy.kernels
from rarefy.artifact import folder as folder_
from rarefy.deployment import parity
from rarefy.deployment.latency import quiet_medians, repeated
from rarefy.deployment.runtime import (
    ACTIVATIONS,
    PLANAR,
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
from rarefy.graph import macs
from rarefy.graph.fold import fold
from rarefy.graph.interpreter import call, run
from rarefy.graph.lowering import LAYERS, to_integers, to_numbers
from rarefy.graph.nodes import Value, argument, arguments, attribute, finish, operator_name, set_attribute, share_copy
from rarefy.kernels import library

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy
KEPT = 3  # shapes a session stays compiled for

Shapes = tuple[tuple[int, ...], ...]
Rule = Callable[[fx.GraphModule, fx.Node], fx.Node]
_MEMBERS = (folder_.MANIFEST, folder_.GRAPH, folder_.WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Inductor:
    """torch.compile. threads: 0 is one a core. device: cpu or cuda. vnni: of the processor it is for; none is this one.

    For programs that have PyTorch anyway, and a C++ compiler: nothing else is needed, but it compiles for each shape.
    """

    threads: int = 0
    device: str = "cpu"
    vnni: bool | None = None

    suffix = ".zip"
    decoded = False
    package = "torch"
    capabilities = Capabilities(layers=PLANAR, float_result=PLANAR, posts=ACTIVATIONS, has_kernel_times=True)

    def __post_init__(self) -> None:
        check_threads("inductor", self.threads)
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise InputError(f"inductor: device={self.device!r}: choose cpu or cuda")

    @property
    def weight_bits(self) -> int:
        """The most bits of a weight whose products add up exactly."""
        return exact_weight_bits(self.vnni) if self.device == "cpu" else 8

    @property
    def floats(self) -> tuple[Inductor, ...]:
        """Ways to run a float network."""
        return (self,)

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as one file. Raises InputError for a graph that can't be saved."""
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            saved = folder_.save(graph, Path(folder) / "model")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
                for name in _MEMBERS:
                    file.writestr(zipfile.ZipInfo(name), (saved / name).read_bytes())
        return Path(path)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, or a folder that rarefy saved, ready to be compiled for what it is called with."""
        return Session(path, self.threads, self.device)

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, compiled by ``on`` (None: this runtime)."""
        reader = on if isinstance(on, Inductor) else self
        integer = to_integers(to_numbers(graph))
        stored = parity.coded(to_integers(to_numbers(opened(path))))
        shared = [name for name in parity.coded(integer) if name in stored]
        session = Session(path, reader.threads, reader.device, taps=shared)

        def read(*part: Tensor) -> parity.Reading:
            outputs = session.outputs(*part)
            count = len(outputs) - len(shared)
            return outputs[:count], dict(zip(shared, outputs[count:], strict=True))

        return parity.against(integer, shared, read, inputs, batch)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """What multiplies in one run, in order, each with its median over the quiet runs of ``seconds``."""
        session = Session(path, self.threads, self.device)
        given = [one.to(session.device) for one in several(inputs)]
        with torch.no_grad(), _threads(session.threads):
            runs = repeated(lambda: _timed(session.graph, given), seconds)
        times = quiet_medians([[kernel.us for kernel in kernels] for kernels in runs])
        return [kernel._replace(us=us) for kernel, us in zip(runs[-1], times, strict=True)]


class Session:
    """An opened file, compiled for each shape that it is called with; ``outputs`` takes tensors (N, ...).

    taps: names of rounded values whose codes are outputs, too.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, device: str = "cpu", taps: Sequence[str] = ()):
        if device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"inductor: device={device}: torch finds no GPU; leave it at cpu")
        self.path, self.device = path, torch.device(device)
        self.threads = threads or os.cpu_count() or 1
        self.graph = _compilable(opened(path), taps, exact=device != "cpu").to(self.device)
        self.programs: collections.OrderedDict[Shapes, Callable[..., Value]] = collections.OrderedDict()

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the network."""
        given = [one.detach().to(self.device) for one in inputs]
        with torch.no_grad(), _threads(self.threads):
            answers = self._program(given)(*given)
        return [value.cpu() for value in tree_leaves(answers)]

    def _program(self, given: Sequence[Tensor]) -> Callable[..., Value]:
        """Compiled for the shapes of ``given``."""
        shape = tuple(tuple(one.shape) for one in given)
        if shape not in self.programs:
            program = torch.compile(share_copy(self.graph), dynamic=False, fullgraph=True)
            config = importlib.import_module("torch._inductor.config")
            # the weights are constants: packed once, as the kernels want them
            with warnings.catch_warnings(), config.patch(freezing=True):
                warnings.simplefilter("ignore")
                try:
                    program(*given)
                except Exception as error:
                    raise InputError(f"{self.path}: Inductor can't compile it ({_reason(error)})") from error
            self.programs[shape] = program
            if len(self.programs) > KEPT:
                self.programs.popitem(last=False)
        self.programs.move_to_end(shape)
        return self.programs[shape]


def opened(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Raises FormatError for what ``export`` has not written; nothing of the file is believed before it is checked."""
    if Path(path).is_dir():
        return folder_.load(path)
    try:
        with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            members = file.infolist()
            plain = all(
                one.compress_type == zipfile.ZIP_STORED and one.file_size == one.compress_size for one in members
            )
            if sorted(one.filename for one in members) != sorted(_MEMBERS) or not plain:
                raise FormatError(
                    f"{path}: rarefy can't open it (not the three files, uncompressed, that export writes)"
                )
            for name in _MEMBERS:
                (Path(folder) / name).write_bytes(file.read(name))
            return folder_.load(folder)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise FormatError(f"{path}: rarefy can't open it ({error})") from error


def _compilable(graph: fx.GraphModule, taps: Sequence[str], exact: bool) -> fx.GraphModule:
    """A copy for inference, in operators that Inductor sees through or has kernels of.

    taps: values whose codes are answers. exact: rarefy's own operators.
    """
    integer = rarefy.kernels.is_quantised(graph)
    graph = to_integers(to_numbers(graph)) if integer else fold(graph)
    if taps:
        codes = parity.coded(graph)
        (last,) = (node for node in graph.graph.nodes if node.op == "output")
        last.args = ([last.args[0], *(codes[name] for name in taps)],)
    for node in list(graph.graph.nodes):
        if node.target not in rarefy.kernels.OPERATORS or not node.users:
            continue
        if all(source.op == "get_attr" for source in node.all_input_nodes):
            stored = {source: attribute(graph, source) for source in node.all_input_nodes}
            plain = _constant(graph, node, call(node, stored))
        else:
            rule = RULES.get(node.target, _written)
            with graph.graph.inserting_before(node):
                plain = _written(graph, node) if exact else rule(graph, node)
        plain.meta = dict(node.meta)
        node.replace_all_uses_with(plain)
    return finish(graph).eval()


def _constant(graph: fx.GraphModule, node: fx.Node, value: Tensor, name: str = "value") -> fx.Node:
    set_attribute(graph, f"{node.name}_{name}", value)
    with graph.graph.inserting_before(node):
        return graph.graph.get_attr(f"{node.name}_{name}")


def _written(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The function that an operator of ours was made of, which a compiler sees through."""
    return graph.graph.call_function(library.FUNCTIONS[node.target], node.args)


def _grid(graph: fx.GraphModule, scale: fx.Node, zero: fx.Node) -> tuple[float, int]:
    return float(attribute(graph, scale)), int(attribute(graph, zero))


def _quantize(graph: fx.GraphModule, node: fx.Node, numbers: fx.Node) -> fx.Node:
    """``numbers`` rounded to the codes that the node makes."""
    scale, zero, qmin, qmax, _ = rarefy.kernels.qparams(node)
    limits = (qmin, qmax, argument(node, "dtype"))
    rounding = _decomposed().quantize_per_tensor.default
    return graph.graph.call_function(rounding, (numbers, *_grid(graph, scale, zero), *limits))


def _dequantize(graph: fx.GraphModule, node: fx.Node, codes: str, scale: str, zero: str) -> fx.Node:
    """The numbers of an argument of the node; ``scale`` and ``zero`` name its grid."""
    value, scales, zeros = (argument(node, name) for name in (codes, scale, zero))
    dtype = attribute(graph, zeros).dtype
    limits = (torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)
    decoding = _decomposed().dequantize_per_tensor.default
    return graph.graph.call_function(decoding, (value, *_grid(graph, scales, zeros), *limits))


def _layer(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """oneDNN's layer.

    It takes x, its grid, the packed weight, its scales and zeros, the bias in numbers, sizes, the grid of the result,
    and that nothing comes after it.
    """
    add = graph.graph.call_function
    g = arguments(node)
    convolves = "stride" in g
    sizes = [g[name] for name in ("stride", "padding", "dilation", "groups")] if convolves else []
    grid, steps = _grid(graph, g["x_scale"], g["x_zero_point"]), attribute(graph, g["weight_scale"])
    numbers = attribute(graph, g["bias"]).double() * (attribute(graph, g["x_scale"]).double() * steps.double())
    bias = _constant(graph, node, numbers.float(), "bias")
    zeros = _constant(graph, node, torch.zeros(steps.shape, dtype=torch.int32), "zeros")
    onednn = torch.ops.onednn
    if convolves:
        packed = add(onednn.qconv_prepack.default, (g["weight"], g["weight_scale"], *grid, *sizes, None))
        target = onednn.qconv_pointwise.default
    else:
        packed = add(onednn.qlinear_prepack.default, (g["weight"], None))
        target = onednn.qlinear_pointwise.default
    rounds = rarefy.kernels.makes_codes(node)
    out = (*_grid(graph, g["scale"], g["zero_point"]), g["dtype"]) if rounds else (1.0, 0, torch.float32)
    layer = add(target, (g["x"], *grid, packed, g["weight_scale"], zeros, bias, *sizes, *out, "none", [], ""))
    if rounds and (g["qmin"], g["qmax"]) != (torch.iinfo(g["dtype"]).min, torch.iinfo(g["dtype"]).max):
        layer = add(aten.clamp.default, (layer, g["qmin"], g["qmax"]))
    return layer


def _operands(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(_dequantize(graph, node, side, f"{side}_scale", f"{side}_zero_point") for side in "ab")


def _join(target: OpOverload) -> Rule:
    """Decoded, added or multiplied, and rounded: one loop."""
    return lambda graph, node: _quantize(graph, node, graph.graph.call_function(target, _operands(graph, node)))


# What a packed weight looks like to a compiler; PyTorch itself does not say. Of a linear layer it is (in, out).
for _name, _shape in (
    ("qconv_prepack", torch.empty_like),
    ("qlinear_prepack", lambda weight: weight.new_empty(weight.shape[::-1])),
):
    with contextlib.suppress(RuntimeError, AttributeError):  # said already, or a PyTorch without oneDNN
        torch.library.register_fake(f"onednn::{_name}", lambda weight, *_, shape=_shape: shape(weight))

RULES: dict[object, Rule] = {
    **dict.fromkeys(LAYERS, _layer),
    OPERATORS.add.default: _join(aten.add.Tensor),
    OPERATORS.mul.default: _join(aten.mul.Tensor),
    OPERATORS.quantize.default: lambda graph, node: _quantize(graph, node, argument(node, "x")),
    OPERATORS.dequantize.default: lambda graph, node: _dequantize(graph, node, "q", "scale", "zero_point"),
    OPERATORS.matmul.default: (
        lambda graph, node: graph.graph.call_function(aten.matmul.default, _operands(graph, node))
    ),
}


def _decomposed() -> types.ModuleType:
    """Operators of rounding that Inductor makes part of its loops; it registers them itself."""
    importlib.import_module("torch._inductor.decomposition")
    return torch.ops.quantized_decomposed


def _timed(graph: fx.GraphModule, given: Sequence[Tensor]) -> list[Kernel]:
    """One run: what multiplies, in order, with its time."""
    kernels: list[Kernel] = []

    def timed(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
        name = operator_name(node)
        if name not in macs.MACS:
            return call(node, live)
        reads = [live[source] for source in node.all_input_nodes]
        _wait(reads[0])
        begun = time.perf_counter()
        value = call(node, live)
        _wait(value)
        us = 1e6 * (time.perf_counter() - begun)
        kernels.append(Kernel(node.name, name, [list(one.shape) for one in (*reads, value)], us))
        return value

    run(graph, given, instead=timed)
    return kernels


def _wait(value: Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize(value.device)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """PyTorch's threads are the process's: they are what they were, afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reason(error: Exception) -> str:
    if "C++ compiler" in str(error) or "InvalidCxxCompiler" in str(error):
        return "no C++ compiler found; install g++ or clang, or name one in CXX"
    return first_line(error)
