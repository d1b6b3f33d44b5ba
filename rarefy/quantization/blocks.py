"""Stretches of a graph whose layers are rounded together, as functions of their weights' numbers and activations'
scales.

Found in the graph, not by class names: between two values that all of the network's work passes through
(``graph.features.cuts``: ends of residual blocks are, values inside are not) lie the layers of one block. A stretch of
one layer, as in a network without residuals, is that layer alone; one of more than ``MOST`` layers (a dense block) is
taken apart into its layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from rarefy.graph.features import cuts
from rarefy.graph.interpreter import Resumable, call, needed, steps
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import Value, argument
from rarefy.kernels import qparams
from rarefy.kernels.quantize import fake_quantize

MOST = 16  # layers of a block

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy


def together(graph: fx.GraphModule, layers: Sequence[fx.Node]) -> tuple[list[list[fx.Node]], frozenset[str]]:
    """``layers`` of the float graph, in order, as blocks; names of the values between them."""
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    taps = [tap.node for tap in cuts(graph)]
    marks = [place[node] for node in taps]
    found: list[list[fx.Node]] = []
    for _, inside in itertools.groupby(layers, lambda node: sum(mark < place[node] for mark in marks)):
        block = list(inside)
        found += [block] if len(block) <= MOST else [[node] for node in block]
    return found, frozenset(node.name for node in taps)


class Stretch:
    """What lies between a block's first layer and its end, in the quantised graph and in its float twin.

    entries, twin_entries: what the block reads of the blocks before, in both graphs; None: there is no such float
    value. scales: names of the activation scales that can be learned here, in order.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        twin: fx.GraphModule,
        layers: Sequence[fx.Node],
        after: fx.Node | None,
        marks: frozenset[str],
    ) -> None:
        """layers: in ``graph``, whose weights are still float. after: the first layer of the next block; None: there is
        none. marks: names of values between blocks."""
        self.graph, self.layers = graph, list(layers)
        self.twins = {node.name: node for node in twin.graph.nodes}
        nodes = list(graph.graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        self._first = _first_on_each_grid(nodes)
        self.end, self.twin_end = self._ends(nodes[: len(nodes) - 1 if after is None else place[after]], marks)
        varies = _on_inputs(nodes)
        between = nodes[place[layers[0]] : place[self.end] + 1]
        self.body = needed([node for node in between if node in varies], [self.end])
        inside = set(self.body)
        read = dict.fromkeys(source for node in self.body for source in node.all_input_nodes if source not in inside)
        self.entries = [node for node in read if node in varies]
        self.twin_entries = [self._twin_of(node) for node in self.entries]
        self._constants: dict[fx.Node, Value] = {}
        constants = [node for node in read if node not in varies]
        with torch.no_grad():
            for _ in steps(graph, needed(nodes, constants), self._constants, keep=set(constants)):
                pass
        self._numbers = {
            node
            for node in self.body
            if node.target is OPERATORS.quantize.default
            and all(_as_number(node, user) for user in node.users if user in inside)
        }
        self.scales = [
            scale_name(node)
            for node in self.body
            if node in self._numbers
            and self._is_first(node)
            and self.twins[qparams(node).value].target is not aten.softmax.int
        ]
        self.counts: dict[fx.Node, int] = {}  # sizes that are read -> their part of each image
        self.leads = 0, 1  # which entry tells the number of images, and its rows an image

    def _ends(self, nodes: Sequence[fx.Node], marks: frozenset[str]) -> tuple[fx.Node, fx.Node]:
        """The last value made from all of the block's layers before the next block begins, one of ``marks`` if there is
        any, and its float twin. Behind codes that are moved as such, through which no gradient passes, only if need be.
        """
        everything = (1 << len(self.layers)) - 1
        for whole in (False, True):
            reached: dict[fx.Node, int] = {}
            for node in nodes:
                bits = 1 << self.layers.index(node) if node in self.layers else 0
                for source in node.all_input_nodes:
                    if whole or source.target is not OPERATORS.quantize.default or _as_number(source, node):
                        bits |= reached.get(source, 0)
                if bits:
                    reached[node] = bits
            twins = {node: self._twin_of(node) for node, bits in reached.items() if bits == everything}
            found = [(node, twin) for node, twin in twins.items() if twin is not None]
            if found:
                break
        return ([pair for pair in found if pair[1].name in marks] or found)[-1]

    def _is_first(self, node: fx.Node) -> bool:
        """Is this ``quantize`` the one of the value itself, not of what carries it on?"""
        return self._first[scale_name(node)] is node

    def _twin_of(self, node: fx.Node) -> fx.Node | None:
        """The float value that ``node`` stands for: of a rounded value the one before rounding; None for what has no
        twin."""
        if is_decoded(node):
            source = node.all_input_nodes[0]
            if source.target is not OPERATORS.quantize.default or qparams(source).scale is not argument(node, "scale"):
                return None
            carrier = source.all_input_nodes[0]  # of what carries a rounded value on, the carrier itself
            return self.twins.get(qparams(source).value if self._is_first(source) else carrier.name)
        rounded = any(user.target is OPERATORS.quantize.default for user in node.users)
        if node.target is OPERATORS.quantize.default or not node.users or rounded:
            return None
        return self.twins.get(node.name)

    def gather(
        self, prefix: Resumable, float_prefix: Resumable, memory: float
    ) -> tuple[list[Value], list[Value], Tensor, int]:
        """Of as many images as fit into ``memory`` bytes: what the block reads in both graphs (numbers instead of
        tensors as they are), and what it makes in float; and how many images that is."""
        ours: list[Sequence[Value]] = []
        theirs: list[Sequence[Value]] = []
        outputs: list[Tensor] = []
        used = images = 0
        twin_entries = [twin for twin in self.twin_entries if twin is not None]
        both = zip(
            prefix.run(self.layers[0], self.entries),
            float_prefix.run(self.twin_end.next, (*twin_entries, self.twin_end)),
            strict=True,
        )
        for batch, (values, (*exact, end)) in zip(prefix.batches, both, strict=True):
            size = sum(one.numel() * one.element_size() for one in (*values, *exact, end) if isinstance(one, Tensor))
            if outputs and used + size > memory:
                continue  # the iterators are to be run to their ends
            used, images = used + size, images + len(batch[0])
            if not ours:
                lead = next(index for index, value in enumerate(values) if isinstance(value, Tensor))
                self.leads = lead, len(values[lead]) // len(batch[0])
                sizes = zip(self.entries, values, strict=True)
                self.counts = {node: value // len(batch[0]) for node, value in sizes if isinstance(value, int)}
            waiting = iter(exact)
            ours.append(values)
            theirs.append([next(waiting) if twin is not None else None for twin in self.twin_entries])
            outputs.append(end)
        return list(map(_joined, zip(*ours))), list(map(_joined, zip(*theirs))), torch.cat(outputs), images

    def run(
        self,
        inputs: Sequence[Value],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        scales: Sequence[Tensor],
        mix: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The block's output. mix(rounded, exact): what stands for a rounded value."""
        lead, rows = self.leads
        live = self._constants | dict(zip(self.entries, inputs, strict=True))
        live |= {node: count * (len(inputs[lead]) // rows) for node, count in self.counts.items()}
        for layer, weight, bias in zip(self.layers, weights, biases, strict=True):
            live |= {argument(layer, "weight"): weight, argument(layer, "bias"): bias}
        by_name = dict(zip(self.scales, scales, strict=True))

        def compute(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
            if node in self._numbers:
                return self._rounded(node, live, by_name, mix)
            source = node.all_input_nodes[0]
            return live[source] if source in self._numbers and is_decoded(node) else call(node, live)

        for _ in steps(self.graph, self.body, live, compute, (self.end,)):
            pass
        output: Tensor = live[self.end]
        return output

    def _rounded(
        self,
        node: fx.Node,
        live: Mapping[fx.Node, Value],
        scales: Mapping[str, Tensor],
        mix: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor:
        """The number of ``quantize``, in place of its codes."""
        source, grid = node.all_input_nodes[0], qparams(node)
        x, zero_point = live[source], live[grid.zero_point]
        scale = scales.get(scale_name(node), live[grid.scale])
        rounded = fake_quantize(x, scale, zero_point, argument(node, "axis"), grid.qmin, grid.qmax)
        if mix is None:
            return rounded
        value = self.twins[grid.value]
        if value.name != source.name and value.all_input_nodes and value.all_input_nodes[0].name == source.name:
            x = call(value, {value.all_input_nodes[0]: x})  # a clip that the end of the grid does
        return mix(rounded, x)


def batch_of(values: Sequence[Value], chosen: Tensor, images: int) -> list[Value]:
    """Of each value the part of the ``chosen`` images; several rows an image (windows) stay together."""

    def part(value: Value) -> Value:
        if not isinstance(value, Tensor):
            return value
        if len(value) == images:
            return value[chosen.to(value.device)]
        return value.unflatten(0, (images, -1))[chosen.to(value.device)].flatten(0, 1)

    return [part(value) for value in values]


def scale_name(node: fx.Node) -> str:
    """Name of the tensor whose scale a ``quantize`` makes codes on: the same for all that carry a value."""
    return str(qparams(node).scale.target)


def _first_on_each_grid(nodes: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """Name of a scale -> the ``quantize`` of the value itself, not of what carries it on."""
    found: dict[str, fx.Node] = {}
    for node in nodes:
        for user in node.users if node.op == "get_attr" else ():
            if user.target is OPERATORS.quantize.default and qparams(user).scale is node:
                found.setdefault(str(node.target), user)
    return found


def _as_number(node: fx.Node, user: fx.Node) -> bool:
    """Does ``user`` read the codes of a ``quantize`` as the number that was rounded, on the same grid?"""
    return is_decoded(user) and argument(user, "scale").target == scale_name(node)


def _on_inputs(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (
            node.op == "call_function" and any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _joined(values: Sequence[Value]) -> Value:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]
