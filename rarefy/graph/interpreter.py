"""The one way to run a graph: node by node, each value let go after its last reader.

``run`` computes a graph and shows its values; ``values`` is the same as an iterator, ``in_lockstep`` is two graphs side
by side. ``steps`` is the loop below them, for those who hold the live values themselves. A rule of one's own for what a
node yields (``instead``, ``compute``) is a function of the node and the live values, and falls back on ``call``.

``Resumable`` runs a graph up to a moving place over many batches, so that what lies behind the place can be changed
before it runs: layers are rounded in order, each on what the rounded layers before it yield. The values at the place
are stored for all batches where they fit into ``memory``; where they don't, the place they were last stored at is run
from again. So memory is bounded whatever the number of images, and the cost of that is time. Rounded values are stored
as codes, a quarter of the numbers' bytes, and decoded where they are read: of 128 images all of EfficientNet-Lite0's
fit into 250 MB, so that the network runs once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from rarefy.errors import InputError
from rarefy.graph.nodes import Value, argument, arguments, attribute
from rarefy.kernels.lstm import LSTM, mismatch
from rarefy.kernels.quantize import OPERATORS

Rule = Callable[[fx.Node, Mapping[fx.Node, Value]], Value]


def call(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
    """What a ``call_function`` node yields where its sources yield ``live``."""
    if node.target is LSTM:
        check_lstm(node, live)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), live.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def check_lstm(node: fx.Node, live: Mapping[fx.Node, Value]) -> None:
    """Raises InputError for an LSTM whose weights or states are not of the sizes that its input asks for."""
    reason = mismatch(fx.node.map_arg(arguments(node), live.__getitem__))
    if reason:
        where = node.meta.get("stack") or node.name
        raise InputError(f"{where}: {reason}; the graph can't be run on inputs of this shape")


def steps(
    graph: fx.GraphModule,
    nodes: Sequence[fx.Node],
    live: dict[fx.Node, Value],
    compute: Rule = call,
    keep: Collection[fx.Node] = (),
) -> Iterator[tuple[fx.Node, Value]]:
    """Each of ``nodes`` and its value, in that order, computed when it is asked for.

    graph: whose tensors ``get_attr`` nodes read.
    live: node -> value; begins as what is known, which is not computed, and changes as the nodes run: a value is in it
        from its own step to the end of its last reader's.
    compute: what the other nodes yield.
    keep: nodes whose values stay in ``live``.
    """
    left = Counter(source for node in nodes for source in node.all_input_nodes)
    for node in nodes:
        if node not in live:
            if node.op == "placeholder":
                raise TypeError(f"the graph's input {node.name!r} is not given")
            live[node] = attribute(graph, node) if node.op == "get_attr" else compute(node, live)
        yield node, live[node]
        for source in node.all_input_nodes:
            left[source] -= 1
            if not left[source] and source not in keep:
                live.pop(source, None)
        if node not in left and node not in keep:
            live.pop(node, None)


def needed(nodes: Sequence[fx.Node], ends: Iterable[fx.Node], known: Collection[fx.Node] = ()) -> list[fx.Node]:
    """Those of ``nodes``, in order, that must run for the values of ``ends``, where the values of ``known`` are."""
    wanted = set(ends)
    for node in reversed(nodes):
        if node in wanted and node not in known:
            wanted.update(node.all_input_nodes)
    return [node for node in nodes if node in wanted]


def run(
    graph: fx.GraphModule,
    inputs: Sequence[Value],
    *,
    see: Callable[[fx.Node, Value], object] | None = None,
    instead: Mapping[fx.Node, Value] | Rule | None = None,
    until: fx.Node | None = None,
) -> Value:
    """What the graph yields for ``inputs``. Gradients are the caller's: it is run as the module would be.

    see: is shown each node with its value, inputs and stored tensors too.
    instead: values put in place of computing, by node; only what is then still needed runs. Or a rule,
        ``instead(node, live)``, which yields the value of each node that calls a function (see ``call``).
    until: stop before that node, and return the values that are read from there on, by node. As ``instead`` of another
        run, whose ``inputs`` are then not read, they continue it.
    """
    nodes = list(graph.graph.nodes)
    before = nodes[: -1 if until is None else nodes.index(until)]
    inside = set(before)
    ends = [node for node in before if any(user not in inside for user in node.users)]
    live = _inputs(nodes, inputs)
    if isinstance(instead, Mapping):
        live |= instead
        before = needed(before, ends, live)
    compute = call if instead is None or isinstance(instead, Mapping) else instead
    for node, value in steps(graph, before, live, compute, set(ends)):
        if see is not None:
            see(node, value)
    if until is not None:
        return {node: live[node] for node in ends}
    return fx.node.map_arg(nodes[-1].args[0], live.__getitem__)


def values(graph: fx.GraphModule, inputs: Sequence[Value]) -> Iterator[tuple[fx.Node, Value]]:
    """Each node before the output and its value, in the order of the graph.

    No gradient is wanted, but ``no_grad`` must not span a ``yield``: it would hold for the caller, and end whenever the
    generator is collected, with the mode of when it began.
    """
    nodes = list(graph.graph.nodes)
    return steps(graph, nodes[:-1], _inputs(nodes, inputs), torch.no_grad()(call))


def in_lockstep(
    float_graph: fx.GraphModule, graph: fx.GraphModule, names: Iterable[str], inputs: tuple[Tensor, ...]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, float value, value) for each named node of both graphs, in order, running both side by side.

    ``graph`` runs a node only after what was yielded before it has been dealt with: a change made then (to a bias, say)
    is seen by the node's successors if it is applied to ``value`` in place.
    """
    wanted = set(names)
    twins = values(float_graph, inputs)
    for node, value in values(graph, inputs):
        if node.name in wanted:
            for twin, twin_value in twins:
                if twin.name == node.name:
                    yield node.name, twin_value, value
                    break


def laid_out(x: Tensor, device: torch.device) -> Tensor:
    """An input as the device likes it: a CPU channels last (depthwise convolutions then take a third of the time)."""
    x = x.to(device)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.device.type == "cpu" else x


def _inputs(nodes: Sequence[fx.Node], inputs: Sequence[Value]) -> dict[fx.Node, Value]:
    return dict(zip((node for node in nodes if node.op == "placeholder"), inputs, strict=False))


TOGETHER = 16  # batches of which what is stored lies side by side

_DECODE = OPERATORS[1]  # dequantize


class Resumable:
    """A graph run over ``batches`` up to a place that moves on.

    batches: inputs on any device; they are moved to ``device``, the graph's, when they are run.
    memory: bytes for values that are stored.
    """

    def __init__(
        self, graph: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], memory: float, device: torch.device
    ):
        self.graph, self.batches, self.memory, self.device = graph, batches, memory, device
        self.stored: list[dict[fx.Node, Value]] = [{} for _ in batches]
        self.at: fx.Node | None = (
            None  # the first node that has not run, where values are stored; None: the graph's first
        )

    def run(self, until: fx.Node, wanted: Sequence[fx.Node], keep: bool = True) -> Iterator[tuple[Value, ...]]:
        """For each batch, the values of ``wanted`` (they run before ``until``), once all before ``until`` has run.

        The place never moves back: an earlier ``until`` is where it is. What was stored of a batch goes as soon as it
        has run, so that the iterator is to be run to its last batch.

        keep: whether the place may move to ``until``: not where something before it is still to be changed.
        """
        nodes = list(self.graph.graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        begun = place[self.at] if self.at is not None else 0
        end = max(place[until], begun)
        last = _last_readers(nodes, place)
        arguments = {node: index for index, node in enumerate(node for node in nodes if node.op == "placeholder")}
        held = set(wanted)
        runnable = self._carrying(nodes, begun, end)
        constants: dict[fx.Node, Value] = {}
        pools: dict[fx.Node, Tensor] = {}
        for index, batch in enumerate(self.batches):
            values = dict(self.stored[index])
            for node in nodes[begun:end]:
                if node.op == "placeholder":
                    values[node] = laid_out(batch[arguments[node]], self.device)
                elif node in runnable:
                    values[node] = self._value(node, values, constants)
                    for source in _read(node):
                        if last[source] <= place[node] and source not in held:
                            values.pop(source, None)
            live = {
                node: value
                for node, value in values.items()
                if last[node] >= end and not (node.target is _DECODE and node.args[0] in values)
            }
            keep = keep and (index > 0 or _bytes(live) * len(self.batches) <= self.memory)
            if keep:
                self.stored[index] = self._packed(live, index, pools)
                self.at = nodes[end] if index == len(self.batches) - 1 else self.at
            yield tuple(self._value(node, values, constants) for node in wanted)

    def _packed(self, live: dict[fx.Node, Value], index: int, pools: dict[fx.Node, Tensor]) -> dict[fx.Node, Value]:
        """The same values, those of a few batches side by side in one piece of memory a node.

        What is stored must not lie scattered among what is let go, which a CPU's allocator then can't give back (150 of
        1,400 MB). pools: (TOGETHER, numbers of the largest batch) for each node.
        """
        packed = dict(live)
        for node, value in live.items():
            if not isinstance(value, Tensor) or value.device.type != "cpu" or value is self.stored[index].get(node):
                continue
            if node not in pools or index % TOGETHER == 0:
                largest = max(len(one[0]) for one in self.batches)
                pools[node] = value.new_empty(
                    TOGETHER, math.ceil(value.numel() * largest / len(self.batches[index][0]))
                )
            row = pools[node][index % TOGETHER]
            if value.numel() <= len(row):  # batches may be uneven
                strides = torch.empty_like(value, device="meta").stride()
                packed[node] = torch.as_strided(row, value.shape, strides, row.storage_offset()).copy_(value)
        return packed

    def _carrying(self, nodes: list[fx.Node], begun: int, end: int) -> set[fx.Node]:
        """Nodes whose values depend on the inputs; the others are constants, computed where they are read."""
        found = {node for node in nodes[:begun] if any(node in values for values in self.stored[:1])}
        found |= {node for node in nodes[:begun] if node.target is _DECODE and node.args[0] in found}
        found |= {node for node in nodes if node.op == "placeholder"}
        for node in nodes[begun:end]:
            if node.op == "call_function" and any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _value(self, node: fx.Node, values: dict[fx.Node, Value], constants: dict[fx.Node, Value]) -> Value:
        """constants: of this run, so that layers decode their weights once, as far as ``memory`` reaches."""
        known = values if node in values else constants
        if node in known:
            return known[node]
        if node.op == "get_attr":
            value = constants[node] = attribute(self.graph, node)
            return value
        with torch.no_grad():
            value = call(node, {source: self._value(source, values, constants) for source in node.all_input_nodes})
        if all(source.op == "get_attr" or source in constants for source in node.all_input_nodes):
            computed = {source: known for source, known in constants.items() if source.op != "get_attr"}
            if _bytes(computed | {node: value}) <= self.memory:
                constants[node] = value
        return value


def _last_readers(nodes: Sequence[fx.Node], place: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Place of the last node that reads each; of codes, also of what reads them decoded. -1: none."""
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    for node in nodes:
        if node.target is _DECODE:
            codes: fx.Node = argument(node, "q")
            last[codes] = max(last[codes], last[node])
    return last


def _read(node: fx.Node) -> list[fx.Node]:
    """What a node reads, and the codes that this was decoded from."""
    sources = node.all_input_nodes
    return [*sources, *(argument(source, "q") for source in sources if source.target is _DECODE)]


def _bytes(values: Mapping[fx.Node, Value]) -> int:
    return sum(value.nbytes for value in values.values() if isinstance(value, Tensor))
