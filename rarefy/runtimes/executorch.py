"""ExecuTorch with XNNPACK: the .pte file that phones and boards with ARM or x86 processors run.

The graph is exported with its own scales as ``quantized_decomposed`` pairs, which XNNPACK's partitioner melts into
integer kernels (``qs8``: signed codes, weights by channel). Unsigned codes are written 128 lower, on the same grid. A
layer whose sums nothing rounds has no integer kernel there, and is written with its weights as floats: a model
that was quantised for ``executorch`` has none. XNNPACK scales sums in float32 and rounds half to even, as the
simulation does, but multiplies by 1 / scale where that divides, so that a code in some ten thousand is the next one.

The file is for one batch size (``batch``), as ExecuTorch plans memory ahead; ``Session`` runs larger batches piece by
piece. Its method ``rarefy`` gives the JSON that says what the model is for (``rarefy.deployment.description``).

Parity. XNNPACK's part of a file can't be opened up, so the codes of layers are read from a second file, made in the
same way from the same graph, which gives them as numbers, too; what shows that it stands for the first is that every
layer's weights and bias are found in that one, byte by byte. The answers compared are the file's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.deployment import description, parity
from rarefy.deployment.runtime import (
    CARRIERS,
    LAYERS,
    Capabilities,
    Inputs,
    Kernel,
    Parity,
    Runtime,
    check_threads,
    in_batches,
)
from rarefy.errors import FormatError, InputError, first_line
from rarefy.graph.fold import fold, fold_constants
from rarefy.graph.lowering import is_decoded, to_integers, to_numbers
from rarefy.graph.nodes import Value, argument, attribute, example_inputs, finish, set_attribute
from rarefy.kernels import is_quantised, qparams
from rarefy.kernels.elementwise import add_in_fixed_point
from rarefy.system.dependencies import needs
from rarefy.system.quiet import quiet

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy

EXTRA = "executorch"
SIGNED = 128  # what unsigned codes are lowered by
LOGGERS = ("executorch", "root", "torch.export", "torch.utils._pytree", "torchao")
MOVED = frozenset({aten.permute.default, aten.transpose.int})
MOST_AXES = 4  # that XNNPACK transposes
# that compute codes of codes on several grids
JOINS = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default})

ROUNDINGS = {OPERATORS.add.default: add_in_fixed_point}  # XNNPACK's

Foreign = Any  # an object of ExecuTorch's


@dataclasses.dataclass(frozen=True)
class ExecuTorch:
    """ExecuTorch with XNNPACK. threads: of the whole process; 0 is one a core. batch: inputs of one run of the file.

    For phones and small boards: a C++ program of a few megabytes runs the file. Not every operator is XNNPACK's; what
    is not runs slowly, but runs.
    """

    threads: int = 0
    batch: int = 1

    suffix = ".pte"
    decoded = True
    package = "executorch"
    capabilities = Capabilities(
        layers=LAYERS - {aten.conv3d.default, aten.conv3d.padding},
        joins=JOINS,
        carriers=CARRIERS,
        float_result=frozenset(),
    )

    def __post_init__(self) -> None:
        check_threads("executorch", self.threads)
        if self.batch < 1:
            raise InputError(f"executorch: batch={self.batch} must be at least 1")

    @property
    def weight_bits(self) -> int:
        """Its int8 products are added in 32 bits on every processor."""
        return 8

    @property
    def floats(self) -> tuple[ExecuTorch, ...]:
        """Ways to run a float network."""
        return (self,)

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as one .pte file. Raises InputError for a graph that can't be written."""
        Path(path).write_bytes(_file(_lowered(graph), self.batch, description.text_of(graph)))
        Session(path, self.threads)
        return Path(path)

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
        reader = on if isinstance(on, ExecuTorch) else self
        integer = to_integers(to_numbers(graph) if is_quantised(graph) else fold(graph))
        session = Session(path, reader.threads)
        codes = parity.coded(integer)
        lowered = _lowered(graph, taps=tuple(codes))
        foreign = _not_in(Path(path).read_bytes(), lowered)
        shared = [] if foreign else list(codes)
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            tapped = None
            if shared:
                beside = Path(folder) / "codes.pte"
                beside.write_bytes(_file(lowered, session.batch, ""))
                tapped = Session(beside, reader.threads)

            def read(*part: Tensor) -> parity.Reading:
                values = [] if tapped is None else tapped.outputs(*part)[-len(shared) :]
                pairs = zip(shared, values, strict=True)
                return session.outputs(*part), {name: _codes(value, codes[name], integer) for name, value in pairs}

            found = parity.against(integer, shared, read, inputs, batch, ROUNDINGS)
        return {**found, "passed": False, "first_diverging_layer": foreign} if foreign else found

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """None: the wheel's library is built without its profiler."""
        raise InputError("executorch: the wheel of ExecuTorch tells no times of kernels; use onnxruntime or openvino")


class Session:
    """An opened file; ``outputs`` takes tensors (N, ...), run in pieces of the file's batch.

    ExecuTorch's threads are the process's, and a loaded method holds on to them: where another session has asked for
    another number since, the threads are made anew, and the method is loaded again.
    """

    pool = 0  # counts how often the process's threads were made

    def __init__(self, path: str | os.PathLike[str], threads: int = 0):
        self.path, self.threads = path, threads or os.cpu_count() or 1
        self.made = -1
        with _silent():
            self.library = needs("executorch.extension.pybindings.portable_lib", EXTRA)
        self._load()
        self.batch = int(self.method.method_meta().input_tensor_meta(0).sizes()[0])

    def _load(self) -> None:
        if self.library._threadpool_get_thread_count() != self.threads:
            self.library._unsafe_reset_threadpool(self.threads)
            Session.pool += 1
        if self.made != Session.pool:
            try:
                self.program: Foreign = self.library._load_program(os.fspath(self.path))
                self.method: Foreign = self.program.load_method("forward")
            except Exception as error:
                raise FormatError(f"{self.path}: ExecuTorch can't open it ({first_line(error)})") from error
            self.made = Session.pool

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the file. Raises InputError for inputs that it can't be run on."""
        self._load()
        return in_batches(self._run, [one.detach().cpu().contiguous() for one in inputs], self.batch)

    def _run(self, *inputs: Tensor) -> list[Tensor]:
        try:
            answers = self.method(inputs)
        except Exception as error:
            shapes = " and ".join(str(list(one.shape)) for one in inputs)
            raise InputError(
                f"{self.path}: ExecuTorch can't run it on inputs of {shapes} ({first_line(error)}); "
                "give inputs of the shapes that it was captured with"
            ) from error
        return list(answers)


def _file(graph: fx.GraphModule, batch: int, told: str) -> bytes:
    """The .pte file of a lowered graph. told: what its method ``rarefy`` gives."""
    with _silent():
        exir = needs("executorch.exir", EXTRA)
        xnnpack = needs("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA)
        needs("executorch.kernels.quantized", EXTRA)  # how what is not XNNPACK's reads codes
        configs = needs("executorch.backends.xnnpack.partition.config", EXTRA).ALL_PARTITIONER_CONFIGS
        config = exir.EdgeCompileConfig(_check_ir_validity=False)
        try:
            program = torch.export.export(graph, example_inputs(graph, batch=batch))
            if _moves_many_axes(program):
                configs = [one for one in configs if "Permute" not in one.__name__]
            edge = exir.to_edge_transform_and_lower(
                program,
                partitioner=[xnnpack.XnnpackPartitioner(configs=configs)],
                compile_config=config,
                constant_methods={description.KEY: told} if told else None,
            )
            return bytes(edge.to_executorch().buffer)
        except Exception as error:
            raise InputError(
                f"the graph can't be written for ExecuTorch: {first_line(error)}; "
                "leave that layer out with core=, or choose another runtime"
            ) from error


def _moves_many_axes(program: torch.export.ExportedProgram) -> bool:
    return any(node.target in MOVED and node.meta["val"].dim() > MOST_AXES for node in program.graph.nodes)


def _lowered(graph: fx.GraphModule, taps: Sequence[str] = ()) -> fx.GraphModule:
    """A copy in ATen's operators and ``quantized_decomposed``'s. taps: values whose codes are further outputs."""
    needs("torch._inductor.decomposition")  # registers them
    graph = to_numbers(graph) if is_quantised(graph) else fold(graph)
    graph = fold_constants(graph)
    first: dict[str, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.target is OPERATORS.quantize.default:
            first.setdefault(qparams(node).value, new := _quantize(graph, node))
        elif is_decoded(node):
            new = _dequantize(graph, node)
        else:
            continue
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    for node in list(finish(graph).graph.nodes):  # less what nothing reads any more
        if node.target in LAYERS:
            _settle(graph, node)
    if taps:
        (last,) = graph.graph.find_nodes(op="output")
        with graph.graph.inserting_before(last):
            numbers = [
                graph.graph.call_function(_decomposed("dequantize_per_tensor"), (first[name], *first[name].args[1:]))
                for name in taps
            ]
        last.args = ([last.args[0], *numbers],)
    return finish(graph).eval()


def _decomposed(name: str) -> Value:
    return getattr(torch.ops.quantized_decomposed, name).default


def _quantize(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    scale, zero, low, high, _ = qparams(node)
    if argument(node, "axis") is not None or attribute(graph, scale).dim():
        raise InputError(f"{node.name}: activations with several scales; choose another runtime")
    down = SIGNED if argument(node, "dtype") == torch.uint8 else 0
    grid = (float(attribute(graph, scale)), int(attribute(graph, zero)) - down, low - down, high - down, torch.int8)
    with graph.graph.inserting_before(node):
        return graph.graph.call_function(_decomposed("quantize_per_tensor"), (argument(node, "x"), *grid))


def _dequantize(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Codes of activations and of weights stay codes; a bias, and a constant that is no weight, becomes numbers."""
    codes, scale, zero, axis = (argument(node, name) for name in ("q", "scale", "zero_point", "axis"))
    step, offset = attribute(graph, scale), attribute(graph, zero)
    with graph.graph.inserting_before(node):
        if codes.op != "get_attr":
            down = SIGNED if offset.dtype == torch.uint8 else 0
            grid = (float(step), int(offset) - down, -128, 127, torch.int8)
            return graph.graph.call_function(_decomposed("dequantize_per_tensor"), (codes, *grid))
        stored = attribute(graph, codes)
        if stored.dtype != torch.int8 or axis != 0 or step.dim() != 1 or offset.any():
            return _constant(graph, f"{codes.target}_numbers", _numbers(graph, node))
        zeros = _constant(graph, f"{codes.target}_zeros", torch.zeros(step.shape, dtype=torch.int64))
        along = (scale, zeros, 0, -127, 127, torch.int8)
        return graph.graph.call_function(_decomposed("dequantize_per_channel"), (codes, *along))


def _numbers(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    values: list[Value] = [attribute(graph, one) if isinstance(one, fx.Node) else one for one in node.args]
    if isinstance(values[0], Tensor) and values[0].dtype == torch.int32:  # a bias: its codes may have 31 bits
        values[1] = values[1].double()
    numbers: Tensor = node.target(*values)  # type: ignore[operator]
    return numbers.float()


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    set_attribute(graph, name, value)
    return graph.graph.get_attr(name)


def _settle(graph: fx.GraphModule, layer: fx.Node) -> None:
    """A layer in one of the two forms that XNNPACK has: codes in and out, or floats with a float weight."""
    entry, weight = argument(layer, "input"), argument(layer, "weight")
    if weight.target is not _decomposed("dequantize_per_channel"):
        return
    rounding, decoding = _decomposed("quantize_per_tensor"), _decomposed("dequantize_per_tensor")
    if len(layer.users) == 1 and next(iter(layer.users)).target == rounding:
        if entry.target is aten.pad.default and entry.args[0].target == decoding:  # zeros are on the grid of the rest
            grid = entry.args[0].args[1:]
            with graph.graph.inserting_before(layer):
                codes = graph.graph.call_function(rounding, (entry, *grid))
                again = graph.graph.call_function(decoding, (codes, *grid))
            layer.replace_input_with(entry, again)
            entry = again
        if entry.target == decoding:
            return
    codes, scale, *_ = weight.args
    with graph.graph.inserting_before(layer):
        steps = attribute(graph, scale)
        numbers = attribute(graph, codes) * steps.reshape(-1, *[1] * (attribute(graph, codes).dim() - 1))
        layer.replace_input_with(weight, _constant(graph, f"{codes.target}_numbers", numbers))


def _codes(numbers: Tensor, node: fx.Node, graph: fx.GraphModule) -> Tensor:
    """Of what a file decoded, on the grid of the node."""
    scale, zero, *_ = qparams(node)
    codes: Tensor = torch.round(numbers / attribute(graph, scale)) + attribute(graph, zero)
    dtype: torch.dtype = argument(node, "dtype")
    return codes.to(dtype)


def _not_in(file: bytes, lowered: fx.GraphModule) -> str | None:
    """The first layer whose weight or bias is not among the file's constants, which it names by their SHA-256."""
    for node in lowered.graph.nodes:
        if node.target not in LAYERS:
            continue
        for forms in _stored_forms(lowered, node):
            if not any(hashlib.sha256(form.numpy().tobytes()).hexdigest().encode() in file for form in forms):
                return str(node.meta.get("stack") or node.name)
    return None


def _stored_forms(graph: fx.GraphModule, layer: fx.Node) -> Iterator[list[Tensor]]:
    """How XNNPACK may keep the weight, and the bias, of a layer in codes."""
    weight, bias, entry = (argument(layer, name) for name in ("weight", "bias", "input"))
    if weight.target is not _decomposed("dequantize_per_channel"):
        return
    codes, steps = attribute(graph, weight.args[0]), attribute(graph, weight.args[1])
    moved = [codes, codes.unsqueeze(2)] if codes.dim() < 4 else [codes.permute(0, 2, 3, 1), codes.permute(1, 2, 3, 0)]
    yield [form.contiguous() for form in moved]
    if bias is not None:
        scale = steps * entry.args[1]
        zeros = torch.zeros(steps.shape, dtype=torch.int64)
        limits = torch.iinfo(torch.int32)
        grid = (scale, zeros, 0, limits.min, limits.max, torch.int32)
        yield [_decomposed("quantize_per_channel")(attribute(graph, bias), *grid)]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What ExecuTorch and its packages say while they work is not for the user."""
    with quiet(*LOGGERS), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
