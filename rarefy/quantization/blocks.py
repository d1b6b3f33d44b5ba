"""Stretches of a graph whose layers are rounded together, as functions of their weights' numbers and their activations' scales.

Found in the graph, not by class names: between two values that all of the network's work passes through (``tapping.cuts``: ends of residual blocks are, values
inside are not) lie the layers of one block. A stretch of one layer, as in a network without residuals, is that layer alone; one of more than ``MOST``
layers (a dense block) is taken apart into its layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from rarefy.graph.features import cuts
from rarefy.graph.interpreter import Resumable
from rarefy.graph.nodes import attribute
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

    layers: in ``graph``, whose weights are still float. before: the first layer of the next block; None: there is none.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        twin: fx.GraphModule,
        layers: Sequence[fx.Node],
        before: fx.Node | None,
        marks: frozenset[str],
    ):
        self.graph, self.twin, self.layers = graph, twin, list(layers)
        self.twins = {node.name: node for node in twin.graph.nodes}
        nodes = list(graph.graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        self._depends = _on_inputs(nodes)
        self._constants: dict[fx.Node, Any] = {}
        stop = place[before] if before is not None else len(nodes) - 1
        self.end, self.twin_end = self._ends(nodes[:stop], marks)
        self.body = [node for node in nodes[place[layers[0]] : place[self.end] + 1] if node in self._depends]
        self.body = _needed(self.body, self.end)
        inside = set(self.body)
        self.entries = list(
            dict.fromkeys(
                s for node in self.body for s in node.all_input_nodes if s in self._depends and s not in inside
            )
        )
        self.twin_entries = [self._twin_of(node) for node in self.entries]
        self.scales = self._own_scales(nodes)
        self.counts: dict[fx.Node, int] = {}  # sizes that are read -> their part of each image
        self.leads = 0, 1  # which entry tells the number of images, and its rows an image

    def _ends(self, nodes: Sequence[fx.Node], marks: frozenset[str]) -> tuple[fx.Node, fx.Node]:
        """The last value made from all of the block's layers before the next block begins, one of ``marks`` if there is any, and its float twin."""
        reached: dict[fx.Node, int] = {}
        for node in nodes:
            parts = [reached[source] for source in node.all_input_nodes if source in reached]
            own = [1 << self.layers.index(node)] if node in self.layers else []
            if parts or own:
                reached[node] = 0
                for part in (*parts, *own):
                    reached[node] |= part
        everything = (1 << len(self.layers)) - 1
        found = [
            (node, twin)
            for node, bits in reached.items()
            if bits == everything and (twin := self._twin_of(node)) is not None
        ]
        return ([pair for pair in found if pair[1].name in marks] or found)[-1]

    def _twin_of(self, node: fx.Node) -> fx.Node | None:
        """The float value that ``node`` stands for: of a rounded value the one before rounding; None for what has no twin."""
        if node.target is OPERATORS.dequantize.default:
            source = node.args[0]
            if (
                not isinstance(source, fx.Node)
                or source.target is not OPERATORS.quantize.default
                or source.args[1] is not node.args[1]
            ):
                return None
            number: Any = source.args[0]  # of what carries a rounded value on, the carrier itself
            return self.twins.get(
                str(source.args[1].target).split(".")[1] if _first_of_its_grid(source) else number.name
            )  # type: ignore[union-attr]
        if node.target is OPERATORS.quantize.default or not node.users:
            return None
        return (
            None if any(user.target is OPERATORS.quantize.default for user in node.users) else self.twins.get(node.name)
        )

    def _own_scales(self, nodes: Sequence[fx.Node]) -> dict[str, fx.Node]:
        """Name of each activation scale that is first used here, and read as it was written -> its ``quantize``."""
        found: dict[str, fx.Node] = {}
        for node in self.body:
            if node.target is OPERATORS.quantize.default and _first_of_its_grid(node):
                scale: Any = node.args[1]
                if _as_number(node) and self.twins[scale.target.split(".")[1]].target is not aten.softmax.int:
                    found[scale.target] = node
        return found

    def gather(
        self, prefix: Resumable, float_prefix: Resumable, memory: float
    ) -> tuple[list[Any], list[Any], Tensor, int]:
        """Of as many images as fit into ``memory``: what the block reads in both graphs (numbers instead of tensors as they are), and what it makes in float;
        and how many images that is."""
        ours: list[Any] = []
        theirs: list[Any] = []
        made: list[Tensor] = []
        used = images = 0
        twin_entries = [twin for twin in self.twin_entries if twin is not None]
        until = self.layers[0]
        both = zip(
            prefix.run(until, self.entries),
            float_prefix.run(self.twin_end.next, (*twin_entries, self.twin_end)),
            strict=True,
        )
        for batch, (values, (*exact, end)) in zip(prefix.batches, both, strict=True):
            size = sum(
                value.numel() * value.element_size() for value in (*values, *exact, end) if isinstance(value, Tensor)
            )
            if made and used + size > memory:
                continue  # the iterators are to be run to their ends
            used, images = used + size, images + len(batch[0])
            if not ours:
                lead = next(index for index, value in enumerate(values) if isinstance(value, Tensor))
                self.leads = lead, len(values[lead]) // len(batch[0])
                self.counts = {
                    node: value // len(batch[0])
                    for node, value in zip(self.entries, values, strict=True)
                    if isinstance(value, int)
                }
            waiting = iter(exact)
            ours.append(values)
            theirs.append([next(waiting) if twin is not None else None for twin in self.twin_entries])
            made.append(end)
        count = len(self.twin_entries)
        return (
            [_joined([one[index] for one in ours]) for index in range(count)],
            [_joined([one[index] for one in theirs]) for index in range(count)],
            torch.cat(made),
            images,
        )

    def run(
        self,
        inputs: Sequence[Any],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        scales: Sequence[Tensor],
        mix: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The block's output. mix(rounded, exact): what stands for a rounded value."""
        values = dict(zip(self.entries, inputs, strict=True))
        lead, rows = self.leads
        values |= {node: count * (len(inputs[lead]) // rows) for node, count in self.counts.items()}
        last = {source: node for node in self.body for source in node.all_input_nodes}
        own = dict(zip(self.layers, zip(weights, biases, strict=True), strict=True))
        steps = dict(zip(self.scales, scales, strict=True))
        for node in self.body:
            if node.target is OPERATORS.quantize.default:
                values[node] = self._rounded(node, values, steps, mix)
            elif node.target is OPERATORS.dequantize.default and _stays(node) and _as_number(node.args[0]):
                values[node] = values[node.args[0]]  # type: ignore[index]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._value(source, values))
                if node in own:
                    args = (args[0], *own[node], *args[3:])
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for source in node.all_input_nodes:
                if last[source] is node and source is not self.end:
                    values.pop(source, None)
        return values[self.end]

    def _rounded(self, node: fx.Node, values: dict[fx.Node, Any], steps: dict[str, Tensor], mix: Any) -> Tensor:
        """The number of ``quantize``, or its codes where they are read on another grid."""
        source, scale, zero, axis, qmin, qmax, dtype = cast(Any, node.args)
        x, step, middle = self._value(source, values), self._value(scale, values), self._value(zero, values)
        if not _as_number(node):
            return node.target(x, step, middle, axis, qmin, qmax, dtype)  # type: ignore[operator, no-any-return]
        name: str = scale.target
        rounded = fake_quantize(x, steps.get(name, step), middle, axis, qmin, qmax)
        if mix is None:
            return rounded
        value = self.twins[name.split(".")[1]]
        if value.name != source.name and value.args and getattr(value.args[0], "name", None) == source.name:  # type: ignore[union-attr]
            x = value.target(x, *value.args[1:], **value.kwargs)  # type: ignore[operator]  # a clip that the end of the grid does
        mixed: Tensor = mix(rounded, x)
        return mixed

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        if node not in self._constants:
            if node.op == "get_attr":
                return attribute(self.graph, node).detach()
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._value(source, values))
            with torch.no_grad():
                self._constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._constants[node]


def batch_of(values: Sequence[Any], chosen: Tensor, images: int) -> list[Any]:
    """Of each value the part of the ``chosen`` images; several rows an image (windows) stay together."""

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if len(value) == images:
            return value[chosen.to(value.device)]
        return value.unflatten(0, (images, -1))[chosen.to(value.device)].flatten(0, 1)

    return [part(value) for value in values]


def _first_of_its_grid(node: fx.Node) -> bool:
    """Is this ``quantize`` the one of the value itself, not of what carries it on?"""
    scale: Any = node.args[1]
    return (
        next(
            user
            for other in node.graph.nodes
            if other.target == scale.target
            for user in other.users
            if user.target is OPERATORS.quantize.default
        )
        is node
    )


def _stays(node: fx.Node) -> bool:
    """A ``dequantize`` on the grid its codes were made on."""
    source = node.args[0] if node.target is OPERATORS.dequantize.default else None
    return (
        isinstance(source, fx.Node)
        and source.target is OPERATORS.quantize.default
        and source.args[1].target == node.args[1].target
    )  # type: ignore[union-attr]


def _as_number(node: Any) -> bool:
    """Is a ``quantize`` read as the number that was rounded and nothing else?"""
    return all(_stays(user) for user in node.users)


def _on_inputs(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (
            node.op == "call_function" and any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _needed(nodes: Sequence[fx.Node], end: fx.Node) -> list[fx.Node]:
    wanted = {end}
    for node in reversed(nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in nodes if node in wanted]


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]
