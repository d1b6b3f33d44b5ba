"""PyTorch's own compiler, torch.compile with Inductor, on the CPU and on CUDA.

The file is the saved model itself: graph.json, weights.safetensors and manifest.json (``rarefy.artifact.folder``) in one ZIP, uncompressed and without a clock's time; a
folder that rarefy saved is read as well. It holds no machine code and no pickle: whoever opens it compiles it, once for each shape of its inputs (10 to 50 s a
network), for the processor at hand, and a C++ compiler has to be there.

In integers on the CPU: layers are oneDNN's int8 convolutions and linear layers (``onednn.qconv_pointwise``, ``qlinear_pointwise``), which Inductor calls by
themselves, weights packed and biases in numbers, rounding to the next codes within the kernel; sums, gates, activations and pooling become C++ loops that
decode, compute and round at once. A sum is scaled in another order than in the simulation, so that a code in some ten thousand is the next one. On CUDA, which
has no such layers, rarefy's exact integer operators are compiled: the simulation's answers, no faster than float.

The last few shapes stay compiled. The kernels of a compiled network have neither names that last nor shapes, so ``kernel_times`` times what multiplies,
operator by operator, uncompiled; what Inductor melts together counts nothing there, and the search corrects the sum by the whole network's time. Peak memory
(``rarefy.evaluation.measure``) is that of a process which compiles, too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import os
import pkgutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import rarefy.kernels
from rarefy.artifact import folder as folder_
from rarefy.deployment import parity
from rarefy.deployment.latency import quiet_medians, repeated
from rarefy.deployment.runtime import ACTIVATIONS, Capabilities, Kernel, Parity, Runtime, exact_weight_bits
from rarefy.errors import FormatError, InputError
from rarefy.graph import macs, nodes
from rarefy.graph.fold import fold
from rarefy.graph.lowering import LAYERS, to_integers, to_numbers
from rarefy.graph.nodes import attribute, finish, set_attribute, share_copy

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy
KEPT = 3  # shapes a session stays compiled for
_MEMBERS = (folder_.MANIFEST, folder_.GRAPH, folder_.WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Inductor:
    """torch.compile. threads: 0 is one a core. device: cpu or cuda. vnni: of the processor it is for; none is this one."""

    threads: int = 0
    device: str = "cpu"
    vnni: bool | None = None

    suffix = ".zip"
    decoded = False
    package = "torch"
    capabilities = Capabilities(posts=ACTIVATIONS, has_kernel_times=True)

    def __post_init__(self) -> None:
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
        inputs: Tensor,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to, compiled; see ``rarefy.deployment.parity``."""
        reader = on if isinstance(on, Inductor) else self
        own = to_integers(to_numbers(graph))
        stored = parity.coded(to_integers(to_numbers(_opened(path))))
        shared = [name for name in parity.coded(own) if name in stored]
        session = Session(path, reader.threads, reader.device, taps=shared)

        def run(part: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
            found = session.outputs(part)
            count = len(found) - len(shared)
            return found[:count], dict(zip(shared, found[count:], strict=True))

        return parity.against(own, shared, run, inputs, batch)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Tensor, seconds: float = 1.5) -> list[Kernel]:
        """What multiplies in one run, in order, each with its median over the quiet runs of ``seconds``."""
        session = Session(path, self.threads, self.device)
        x = inputs.to(session.device)

        def run() -> list[Kernel]:
            timed = _Timed(session.graph)
            timed.run(x)
            return timed.kernels

        with torch.no_grad(), _threads(session.threads):
            runs = repeated(run, seconds)
        times = quiet_medians([[kernel.us for kernel in kernels] for kernels in runs])
        return [kernel._replace(us=us) for kernel, us in zip(runs[-1], times, strict=True)]


class Session:
    """An opened file: called with a tensor (N, ...), it returns the model's first output, on the CPU. ``threads``, ``name`` (of the input).

    taps: names of rounded values whose codes are outputs, too.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, device: str = "cpu", taps: Sequence[str] = ()):
        if device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"inductor: device={device}: torch finds no GPU; leave it at cpu")
        self.path, self.device = path, torch.device(device)
        self.threads = threads or os.cpu_count() or 1
        self.graph = _compilable(_opened(path), taps, exact=device != "cpu").to(self.device)
        self.name = next(node.name for node in self.graph.graph.nodes if node.op == "placeholder")
        self.programs: collections.OrderedDict[tuple[int, ...], Any] = collections.OrderedDict()

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """All outputs of the network."""
        x = inputs.detach().to(self.device)
        with torch.no_grad(), _threads(self.threads):
            found = self._program(x)(x)
        return [value.cpu() for value in torch.utils._pytree.tree_leaves(found)]

    def _program(self, x: Tensor) -> Any:
        """Compiled for the shape of ``x``."""
        shape = tuple(x.shape)
        if shape not in self.programs:
            program = torch.compile(share_copy(self.graph), dynamic=False, fullgraph=True)
            config = importlib.import_module("torch._inductor.config")
            with (
                warnings.catch_warnings(),
                config.patch(freezing=True),
            ):  # the weights are constants: packed once, as the kernels want them
                warnings.simplefilter("ignore")
                try:
                    program(x)
                except Exception as error:
                    raise InputError(f"{self.path}: Inductor can't compile it ({_told(error)})") from error
            self.programs[shape] = program
            if len(self.programs) > KEPT:
                self.programs.popitem(last=False)
        self.programs.move_to_end(shape)
        return self.programs[shape]


def _opened(path: str | os.PathLike[str]) -> fx.GraphModule:
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
    """A copy for inference, in operators that Inductor sees through or has kernels of. exact: rarefy's own. taps: values whose codes are answers."""
    integer = rarefy.kernels.is_quantised(graph)
    graph = to_integers(to_numbers(graph)) if integer else fold(graph)
    if taps:
        found = parity.coded(graph)
        (last,) = (node for node in graph.graph.nodes if node.op == "output")
        last.args = ([last.args[0], *(found[name] for name in taps)],)
    for node in list(graph.graph.nodes):
        rule = None if exact else _RULES.get(node.target)
        if node.target not in rarefy.kernels.OPERATORS or not node.users:
            continue
        if all(source.op == "get_attr" for source in node.all_input_nodes):
            made = _constant(graph, node, node.target(*fx.map_arg(node.args, lambda source: attribute(graph, source))))
        else:
            with graph.graph.inserting_before(node):
                made = rule(graph, node) if rule else graph.graph.call_function(_WRITTEN[node.target], node.args)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    return finish(graph).eval()


def _constant(graph: fx.GraphModule, node: fx.Node, value: Tensor, name: str = "value") -> fx.Node:
    set_attribute(graph, f"{node.name}_{name}", value)
    with graph.graph.inserting_before(node):
        return graph.graph.get_attr(f"{node.name}_{name}")


def _grid(graph: fx.GraphModule, scale: Any, zero: Any) -> tuple[float, int]:
    return float(attribute(graph, scale)), int(attribute(graph, zero))


def _quantize(graph: fx.GraphModule, node: fx.Node, value: Any, scale: Any, zero: Any, *limits: Any) -> fx.Node:
    return graph.graph.call_function(
        _decomposed().quantize_per_tensor.default, (value, *_grid(graph, scale, zero), *limits)
    )


def _dequantize(graph: fx.GraphModule, codes: Any, scale: Any, zero: Any) -> fx.Node:
    dtype = attribute(graph, zero).dtype
    bounds = torch.iinfo(dtype)
    grid = _grid(graph, scale, zero)
    return graph.graph.call_function(
        _decomposed().dequantize_per_tensor.default, (codes, *grid, bounds.min, bounds.max, dtype)
    )


def _layer(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """oneDNN's layer: x, its grid, the packed weight, its scales and zeros, the bias in numbers, sizes, the grid of the result, nothing after it."""
    x, weight, bias, scale, zero, weight_scale, *rest = node.args
    convolves = node.target in (OPERATORS.conv2d.default, OPERATORS.conv2d_codes.default)
    sizes, result = (rest[:4], rest[4:]) if convolves else ([], rest)
    grid, steps = _grid(graph, scale, zero), attribute(graph, weight_scale)
    numbers = attribute(graph, bias).double() * (attribute(graph, scale).double() * steps.double())
    added = _constant(graph, node, numbers.float(), "bias")
    zeros = _constant(graph, node, torch.zeros(steps.shape, dtype=torch.int32), "zeros")
    own = torch.ops.onednn
    call = graph.graph.call_function
    if convolves:
        packed = call(own.qconv_prepack.default, (weight, weight_scale, *grid, *sizes, None))
    else:
        packed = call(own.qlinear_prepack.default, (weight, None))
    out = (*_grid(graph, *result[:2]), result[4]) if result else (1.0, 0, torch.float32)
    target = own.qconv_pointwise.default if convolves else own.qlinear_pointwise.default
    made = call(target, (x, *grid, packed, weight_scale, zeros, added, *sizes, *out, "none", [], ""))
    if result and (result[2], result[3]) != (torch.iinfo(result[4]).min, torch.iinfo(result[4]).max):
        made = call(aten.clamp.default, (made, result[2], result[3]))
    return made


def _joined(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Decoded, added or multiplied, and rounded: one loop."""
    target = aten.add.Tensor if node.target is OPERATORS.add.default else aten.mul.Tensor
    numbers = graph.graph.call_function(target, tuple(_dequantize(graph, *node.args[at : at + 3]) for at in (0, 3)))
    return _quantize(graph, node, numbers, *node.args[6:])


# What a packed weight looks like to a compiler; PyTorch itself does not say. Of a linear layer it is (in, out).
for _name, _shape in (
    ("qconv_prepack", torch.empty_like),
    ("qlinear_prepack", lambda weight: weight.new_empty(weight.shape[::-1])),
):
    with contextlib.suppress(RuntimeError, AttributeError):  # said already, or a PyTorch without oneDNN
        torch.library.register_fake(f"onednn::{_name}", lambda weight, *_, shape=_shape: shape(weight))

_RULES: dict[Any, Any] = {
    **dict.fromkeys(LAYERS, _layer),
    OPERATORS.add.default: _joined,
    OPERATORS.mul.default: _joined,
    OPERATORS.quantize.default: lambda graph, node: _quantize(graph, node, *node.args[:3], *node.args[4:7]),
    OPERATORS.dequantize.default: lambda graph, node: _dequantize(graph, *node.args[:3]),
    OPERATORS.matmul.default: lambda graph, node: graph.graph.call_function(
        aten.matmul.default,
        (_dequantize(graph, node.args[0], *node.args[2:4]), _dequantize(graph, node.args[1], *node.args[4:6])),
    ),
}


def _decomposed() -> Any:
    """Operators of rounding that Inductor makes part of its loops; it registers them itself."""
    importlib.import_module("torch._inductor.decomposition")
    return torch.ops.quantized_decomposed


def _python(operator: Any) -> Any:
    """The function that an operator of ours was made of, which a compiler sees through."""
    modules = (
        importlib.import_module(f"rarefy.kernels.{one.name}") for one in pkgutil.iter_modules(rarefy.kernels.__path__)
    )
    return next(vars(module)[operator._opname] for module in modules if operator in getattr(module, "OPERATORS", ()))


_WRITTEN = {operator: _python(operator) for operator in rarefy.kernels.OPERATORS}


class _Timed(fx.Interpreter):
    """Runs a graph and takes the time of each node that multiplies: ``kernels``, in order."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.kernels: list[Kernel] = []

    def run_node(self, node: fx.Node) -> Any:
        name = nodes.operator_name(node)
        if name not in macs.MACS:
            return super().run_node(node)
        reads = [self.env[source] for source in node.all_input_nodes]
        _wait(reads[0])
        begun = time.perf_counter()
        value = super().run_node(node)
        _wait(value)
        us = 1e6 * (time.perf_counter() - begun)
        self.kernels.append(Kernel(node.name, name, [list(one.shape) for one in (*reads, value)], us))
        return value


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


def _told(error: Exception) -> str:
    text = str(error)
    if "C++ compiler" in text or "InvalidCxxCompiler" in text:
        return "no C++ compiler found; install g++ or clang, or name one in CXX"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
