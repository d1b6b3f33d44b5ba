"""Parity: do the graph in PyTorch and the file in its runtime give the same answers, and where do they first differ?

Each value that the model rounds is read out of the runtime and compared in codes. The simulation goes on from the
runtime's codes after each of them, so that a difference is that of one layer, and not of all before it. Boxes that were
found are compared as such (``pictures.same_boxes``); of their scores the largest difference is told.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from rarefy.artifact.operators.trial import samples_within
from rarefy.data.boxes.boxes import SCORE
from rarefy.deployment.description import is_whole
from rarefy.deployment.onnx.writer import Message
from rarefy.deployment.pictures import same_boxes
from rarefy.deployment.runtime import Difference, Inputs, Parity, Runtime, Session, several
from rarefy.errors import FormatError
from rarefy.graph.interpreter import Rule, call, run
from rarefy.graph.lowering import LAYERS, to_integers
from rarefy.graph.nodes import Value, argument
from rarefy.graph.signature import tensors
from rarefy.kernels import makes_codes, qparams, value_of
from rarefy.system.dependencies import needs

LEAST_AGREEMENT = 0.995
APART = 0.01  # 20 dB

# Answers to a batch, and the codes of rounded values by their name.
Reading = tuple[list[Tensor], dict[str, Tensor]]

# How a runtime rounds, where it does so by another sequence than the simulation: operator -> function of its arguments.
Roundings = Mapping[OpOverload, Callable[..., Tensor]]


def compare(
    written: fx.GraphModule,
    path: str | os.PathLike[str],
    inputs: Inputs,
    reader: Runtime,
    batch: int = 32,
    tapped: Callable[[Sequence[str]], Session] | None = None,
    roundings: Roundings | None = None,
) -> Parity:
    """Parity of a graph and the ONNX file that it was written to.

    written: with its layers as numbers (``to_numbers``).
    inputs: (N, ...) each, of which ``batch`` are run at once.
    reader: the runtime that reads the file; one that says ``decoded`` is asked for the numbers that codes stand for.
    tapped: opens what the file has become with the named tensors as further outputs; None: the file itself is opened.
    roundings: as in ``against``.
    """
    onnx = needs("onnx")
    model = onnx.load(os.fspath(path))
    tensors = _values_in(model, "DequantizeLinear" if reader.decoded else "QuantizeLinear")
    graph = to_integers(written)
    codes = coded(graph)
    shared = [name for name in codes if name in tensors]
    grids = _grids_in(model, {tensors[name] for name in shared})
    names = [tensors[name] for name in shared]
    session = opened_with(model, names, path, reader) if tapped is None else tapped(names)

    def read(*part: Tensor) -> Reading:
        outputs = session.outputs(*part)
        count = len(outputs) - len(shared)
        values = dict(zip(shared, outputs[count:], strict=True))
        if reader.decoded:
            for name, value in values.items():
                scale, zero = grids[tensors[name]]
                values[name] = torch.round(value / scale + zero).to(argument(codes[name], "dtype"))
        return outputs[:count], values

    return against(graph, shared, read, inputs, batch, roundings)


def opened_with(model: Message, names: Sequence[str], path: str | os.PathLike[str], reader: Runtime) -> Session:
    """The model, opened with the named tensors as further outputs; ``path`` is what errors call it."""
    for name in names:
        model.graph.output.append(needs("onnx").helper.make_empty_tensor_value_info(name))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tapped.onnx"
        file.write_bytes(model.SerializeToString())
        try:
            return reader.open(file)
        except FormatError as error:
            raise FormatError(str(error).replace(str(file), os.fspath(path))) from error


def coded(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Name of each rounded value -> the first node of ``graph`` (its layers integer) that makes its codes, in order."""
    first: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        if makes_codes(node):
            first.setdefault(qparams(node).value, node)
    return first


def against(
    graph: fx.GraphModule,
    shared: Sequence[str],
    read: Callable[..., Reading],
    inputs: Inputs,
    batch: int = 32,
    roundings: Roundings | None = None,
) -> Parity:
    """Parity of a graph (its layers integer) and a runtime.

    shared: names of the rounded values that both have. read: the runtime's answers to a batch, and their codes.
    inputs: (N, ...) each, of which ``batch`` are run at once. roundings: the runtime's own, by which the graph is run;
        how often it then answers as it does by itself is told, too (``evaluated``).
    """
    given = several(inputs)
    samples = len(given[0])
    batch = samples_within(graph, min(batch, samples))
    codes = coded(graph)
    tally = {name: Tally() for name in shared}
    compute = _rule(roundings or {})
    own = any(node.target in (roundings or {}) for node in graph.graph.nodes)
    same, evaluated, largest, finds = 0, 0, 0.0, is_whole(graph)
    for part in zip(*(one.split(batch) for one in given), strict=True):
        theirs, values = read(*part)
        with torch.no_grad():
            ours = tensors(run(graph, part, instead=compute) if own else graph(*part))
            _follow(graph, part, {codes[name]: value for name, value in values.items()}, tally, compute)
            evaluated += _count(tensors(graph(*part)), theirs, len(part[0]), finds) if own else 0
        same += _count(ours, theirs, len(part[0]), finds)
        pairs = list(zip(ours, theirs, strict=True))
        if finds:
            pairs = [(one[..., SCORE], other[..., SCORE]) for one, other in pairs]
        largest = max(largest, *(_apart(one, other) for one, other in pairs))
    layers: list[Difference] = [
        {"name": _layer(node), "value": name, "difference": tally[name].largest, "share": tally[name].share}
        for name, node in codes.items()
        if name in tally and tally[name].batches
    ]
    first = next((layer["name"] for layer in layers if layer["difference"] > 1), None)
    unread = [name for name in shared if not tally[name].batches]
    parity: Parity = {
        "agreement": same / samples,
        "samples": samples,
        "largest_difference": largest,
        "ulp": max((layer["difference"] for layer in layers), default=0),
        "first_diverging_layer": first,
        "layers": layers,
        "passed": same / samples >= LEAST_AGREEMENT and first is None,
    }
    if unread:
        parity["unread"] = unread
    if own:
        parity["evaluated"] = evaluated / samples
    return parity


@dataclasses.dataclass
class Tally:
    """Of the codes of one value: the largest difference, how many differ, how many there were, in how many batches."""

    largest: int = 0
    differing: int = 0
    codes: int = 0
    batches: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Codes of one batch."""
        difference = (ours.to(torch.int32) - theirs.to(torch.int32)).abs()
        self.largest = max(self.largest, int(difference.max()))
        self.differing += int((difference > 0).sum())
        self.codes += difference.numel()
        self.batches += 1

    @property
    def share(self) -> float:
        """Of the codes that differ."""
        return self.differing / max(self.codes, 1)


def _rule(roundings: Roundings) -> Rule:
    """What a node yields, where ``roundings`` stand for operators."""

    def computed(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
        own = roundings.get(node.target)  # type: ignore[call-overload]
        return call(node, live) if own is None else own(*fx.node.map_arg(node.args, live.__getitem__))

    return computed


def _follow(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    theirs: Mapping[fx.Node, Tensor],
    tally: Mapping[str, Tally],
    compute: Rule,
) -> None:
    """Run the graph, but go on from the runtime's codes after each rounded value: a difference is one layer's own."""

    def compared(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
        ours = compute(node, live)
        codes = theirs.get(node)
        if codes is None or codes.shape != ours.shape:
            return ours
        tally[qparams(node).value].add(ours, codes)
        return torch.empty_like(ours).copy_(codes)  # laid out as the graph's own, which a view may hang on

    run(graph, inputs, instead=compared)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0


def _count(ours: Sequence[Tensor], theirs: Sequence[Tensor], samples: int, finds: bool) -> int:
    """Of the samples of a batch those whose answers agree. finds: they are boxes."""
    if finds:
        return int(same_boxes(ours[0], theirs[0]).sum())
    pairs = zip(ours, theirs, strict=True)
    return int(torch.stack([_agreeing(one, other, len(ours) > 1, samples) for one, other in pairs]).all(0).sum())


def _agreeing(ours: Tensor, theirs: Tensor, close: bool, samples: int) -> Tensor:
    """(samples,) bool. Of what has no batch first (the states of a recurrent layer) all samples agree, or none does."""
    if ours.dim() and len(ours) == samples:
        return _agree(ours, theirs, close)
    return _agree(ours.reshape(1, -1), theirs.reshape(1, -1), True).expand(samples)


def _agree(ours: Tensor, theirs: Tensor, close: bool) -> Tensor:
    """(N,) bool. close: of (N, classes) too, not only the most likely one must be the same."""
    if ours.dim() < 2 or ours[0].numel() == 1:
        ours, theirs = ours.reshape(-1).double(), theirs.reshape(-1).double()
        return (ours - theirs).abs() <= APART * ours.abs().clamp_min(ours.abs().mean())
    same = ours.argmax(1) == theirs.argmax(1) if ours.dim() == 2 else torch.ones(len(ours), dtype=torch.bool)
    if ours.dim() == 2 and not close:
        return same
    ours, theirs = ours.flatten(1).double(), theirs.flatten(1).double()
    floor = torch.finfo(torch.float32).eps * ours.square().mean(1)
    return same & ((ours - theirs).square().mean(1) <= APART * ours.var(1, correction=0) + floor)


def _layer(node: fx.Node) -> str:
    """The module that made what ``node`` rounds; where a function did, the layer it follows."""
    name = qparams(node).value
    while node.op == "call_function":
        if node.target in LAYERS:
            return str(argument(node, "weight").target).rpartition(".")[0] or name
        if node.meta.get("stack"):
            return str(node.meta["stack"])
        sources = [source for source in node.all_input_nodes if source.op == "call_function"]
        if len(sources) != 1:
            break
        node = sources[0]
    return name


def _values_in(model: Message, kind: str) -> dict[str, str]:
    """Name of each rounded value -> the first tensor that a node of ``kind`` makes with its scale.

    Codes once they are clipped, where the grid ends before the type.
    """
    clipped = {
        node.input[0]: node.output[0]
        for node in model.graph.node
        if node.op_type == "Clip" and kind == "QuantizeLinear"
    }
    tensors: dict[str, str] = {}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == kind and node.input[1].startswith("quantization.") and node.input[0] not in constants:
            tensors.setdefault(value_of(node.input[1]), clipped.get(node.output[0], node.output[0]))
    return tensors


def _grids_in(model: Message, decoded: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Scale and zero point of each tensor in ``decoded``, which a DequantizeLinear yields.

    They may be finer than those of its codes' making.
    """
    to_array = needs("onnx").numpy_helper.to_array
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    grids = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in decoded:
            scale, *zero = (torch.tensor(to_array(stored[name])) for name in node.input[1:])
            grids[node.output[0]] = scale, zero[0].float() if zero else torch.zeros(())
    return grids
