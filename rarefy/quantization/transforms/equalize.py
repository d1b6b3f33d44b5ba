"""equalize(): channels of an activation brought to one range where that is exact, so that one scale a tensor serves all
of them.

After 1906.04721, but along whole streams: values that only operators without a mind for a positive factor a channel lie
between (ReLU, PReLU, addition, pooling). Where layers alone make them and layers alone read them, channel c of all that
is made is divided and of all that reads it multiplied by s_c. Linear bottlenecks with what is added around them
(MobileNetV2, EfficientNet-Lite) are such streams, and so are a residual network's between two reductions; hardswish
ends one. ReLU6 is ReLU for a channel that stays below 6: such channels are scaled with room to 6, and no others.

With one scale an output channel the layers that make a stream round as before. What changes is the noise of the rounded
values x, and of the weights that read them:

    sum over readers, relative to the variance of what each makes:
        sum_x step(x)^2 / 12  sum_c s_c^2 |W_c|^2   +   sum_o step(W_o)^2 / 12  sum_c E x_c^2 / s_c^2

where step(x) goes by the widest channel after division and step(W_o) by the largest weight after multiplication. For
one x and the first term alone s_c = max|x_c| is best. Tried are s_c = max|x_c|^a / |W_c|^(1 - a) for a few a, and none;
a stream keeps what makes least noise by this estimate. (Ranges of weights, which the paper makes meet, matter where a
weight tensor has one scale: here they cost EfficientNet-Lite 0.2 to 0.4 dB.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from rarefy.graph.im2col import groups_of
from rarefy.graph.interpreter import laid_out, run
from rarefy.graph.layers import padding_of, weighted
from rarefy.graph.nodes import Value, argument, attribute
from rarefy.graph.shapes import shapes
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import channel_axis
from rarefy.quantization.placement import clip_bounds
from rarefy.quantization.transforms.channel_scales import is_scaling

aten = torch.ops.aten

SHARES = (1.0, 0.75, 0.5, 0.25)  # a above
LEAST = 0.01  # share of the noise that is won, or nothing is changed
FLAT = -6.0  # of SiLU and GELU: what is below makes 0.015 at most
WIDEST = 1e3  # a factor's bound, either way
ROOM = 4.0  # times the largest number seen of a channel is where a clip may come to lie: a rare one is larger
NARROWEST = 0.25  # a factor's bound there
_CLIPS = {aten.relu6.default, aten.hardtanh.default, aten.clamp.default}
_SLOPES = {aten.leaky_relu.default, aten.prelu.default}  # one below zero and one above: no mind for a factor
_CARRY = {
    aten.relu.default, aten.add.Tensor, aten.pad.default, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default, aten.flatten.using_ints,
}  # fmt: skip


@dataclasses.dataclass
class Stream:
    """values: in order. makers: layers that yield one of them; readers: layers that read one. axis: of the channels."""

    values: list[fx.Node]
    makers: list[fx.Node]
    readers: list[fx.Node]
    axis: int


def equalize(
    graph: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    rounded: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
    held_out: Iterable[tuple[Tensor, ...]] = (),
    across_clips: bool = True,
) -> int:
    """Equalise ``graph`` (folded, for inference) in place; returns how many streams were.

    batches: inputs that tell how large channels get. rounded: values that will be, and the grid; layers: those whose
    weights will be. held_out: inputs that judge what the others say (a channel that seemed dead on those may be alive);
    none: the same. across_clips: False leaves streams with ReLU6 as they are.
    """
    found = [
        stream
        for stream in streams(graph)
        if not layers.keys().isdisjoint(stream.readers) and not rounded.keys().isdisjoint(stream.values)
        if across_clips or all(_top(value) is None for value in stream.values)
    ]
    axes = {value: stream.axis for stream in found for value in (*stream.values, *stream.readers)}
    seen = sizes(graph, axes, batches) if found else {}
    judging = (sizes(graph, axes, held_out) if found else {}) or seen
    return sum(_equalize(graph, stream, seen, judging, rounded, layers) for stream in found)


def streams(graph: fx.GraphModule) -> list[Stream]:
    """All of ``graph``, in order."""
    found, taken = [], set[fx.Node]()
    known = shapes(graph)
    for node in graph.graph.nodes:
        if weighted(node) and node not in taken:
            stream = _stream(graph, node, known)
            if stream is not None:
                found.append(stream)
                taken |= set(stream.values)
    return found


def _stream(graph: fx.GraphModule, first: fx.Node, known: Mapping[fx.Node, Value]) -> Stream | None:
    """What ``first`` is a maker of; None where something else makes or reads a value of it."""
    axis, channels = channel_axis(first, known[first]), weight_of(graph, first).shape[0]
    values, waiting, readers = set[fx.Node](), [first], set[fx.Node]()
    while waiting:
        value = waiting.pop()
        if value in values:
            continue
        values.add(value)
        sources = [] if weighted(value) else value.all_input_nodes
        if weighted(value):
            if channel_axis(value, known[value]) != axis or not owns(graph, value):
                return None
        elif not _carries(value, known, axis):
            return None
        for user in value.users:
            if not weighted(user):
                waiting.append(user)
            elif (
                user.all_input_nodes[0] is value
                and channel_axis(user, known[user]) == axis
                and owns(graph, user)
                and channels_of(graph, user) == channels
            ):
                readers.add(user)
            else:
                return None
        waiting += sources
    ordered = [node for node in graph.graph.nodes if node in values or node in readers]
    return Stream(
        [node for node in ordered if node in values],
        [node for node in ordered if node in values and weighted(node)],
        [node for node in ordered if node in readers],
        axis,
    )


def _carries(node: fx.Node, known: Mapping[fx.Node, Value], axis: int) -> bool:
    """Does f(x / s) = f(x) / s hold, a channel?"""
    if node.op != "call_function":
        return False
    if _top(node) is not None or (node.target in _SLOPES and not node.kwargs):
        return True
    if node.target not in _CARRY or node.kwargs:
        return False
    if node.target is aten.pad.default and padding_of(node) != 0:
        return False
    shape, sources = known[node].shape, [known[source].shape for source in node.all_input_nodes]
    if node.target in (aten.relu.default, aten.add.Tensor):
        return len(node.args) == len([arg for arg in node.args if isinstance(arg, fx.Node)]) and all(
            other == shape for other in sources
        )
    return axis == 1 and sources[0][:2] == shape[:2]


def _top(node: fx.Node) -> float | None:
    """Where a clip to 0 and above ends; None for what is none."""
    if node.op != "call_function" or node.target not in _CLIPS:
        return None
    low, high = clip_bounds(node)
    return high if low == 0 and 0 < high < math.inf else None


def owns(graph: fx.GraphModule, layer: fx.Node) -> bool:
    """Does nothing else read its weight and bias?"""
    stored = [source.target for source in _stored(layer)]
    readers = [len(node.users) for node in graph.graph.nodes if node.op == "get_attr" and node.target in stored]
    return sum(readers) == len(stored)


def weight_of(graph: fx.GraphModule, layer: fx.Node) -> Tensor:
    """(out, in / groups, ...)"""
    weight: Tensor = attribute(graph, argument(layer, "weight"))
    return weight.detach()


def _stored(layer: fx.Node) -> list[fx.Node]:
    """What reads its weight and its bias."""
    return [source for name in ("weight", "bias") if (source := argument(layer, name)) is not None]


def channels_of(graph: fx.GraphModule, layer: fx.Node) -> int:
    """Input channels, where each is read on its own (no groups but depthwise); 0 otherwise."""
    weight, groups = weight_of(graph, layer), groups_of(layer)
    if groups == 1:
        return weight.shape[1]
    return groups if weight.shape[0] == groups and weight.shape[1] == 1 else 0


@dataclasses.dataclass
class Size:
    """Of a value's channels: extremes and mean square, each (channels,) float64; of its numbers around their channel's
    mean: the variance, summed over channels."""

    lo: Tensor
    hi: Tensor
    sums: Tensor
    squares: Tensor
    count: int

    @classmethod
    def of(cls, value: Tensor, axis: int) -> Size:
        rows = value.detach().float().movedim(axis, -1).flatten(0, -2)
        lo, hi = torch.aminmax(rows, dim=0)
        return cls(lo.double(), hi.double(), rows.sum(0).double(), rows.square().sum(0).double(), len(rows))

    def merged(self, other: Size) -> Size:
        lo, hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        return Size(lo, hi, self.sums + other.sums, self.squares + other.squares, self.count + other.count)

    @property
    def power(self) -> Tensor:
        return self.squares / self.count

    @property
    def variance(self) -> float:
        return float((self.power - (self.sums / self.count).square()).sum())


def sizes(
    graph: fx.GraphModule, axes: Mapping[fx.Node, int], batches: Iterable[tuple[Tensor, ...]]
) -> dict[fx.Node, Size]:
    """Of values. axes: of each the axis of its channels."""
    found: dict[fx.Node, Size] = {}

    def see(node: fx.Node, value: Tensor) -> None:
        if node in axes:
            size = Size.of(value, axes[node])
            found[node] = found[node].merged(size) if node in found else size

    with torch.no_grad():
        for batch in batches:
            run(graph, [laid_out(value, value.device) for value in batch], see=see)
    return found


def _equalize(
    graph: fx.GraphModule,
    stream: Stream,
    seen: Mapping[fx.Node, Size],
    sizes: Mapping[fx.Node, Size],
    rounded: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
) -> bool:
    factor = best_factor(graph, stream, seen, sizes, rounded, layers)
    if factor is None:
        return False
    for maker in stream.makers:
        divide(graph, _stored(maker), factor)
    multiply(graph, stream.readers, factor)
    return True


def divide(graph: fx.GraphModule, stored: Iterable[fx.Node], factor: Tensor) -> None:
    """Rows of weights and biases, in place. factor: (channels,)"""
    with torch.no_grad():
        for source in stored:
            tensor = attribute(graph, source)
            tensor.copy_(tensor.double() / factor.view(-1, *[1] * (tensor.dim() - 1)))


def multiply(graph: fx.GraphModule, readers: Iterable[fx.Node], factor: Tensor) -> None:
    """What the layers' weights multiply channels with, in place. factor: (channels,)"""
    with torch.no_grad():
        for reader in readers:
            tensor = attribute(graph, argument(reader, "weight"))
            tensor.copy_(tensor.double() * _along(factor, tensor, groups_of(reader) == 1))


def best_factor(
    graph: fx.GraphModule,
    stream: Stream,
    seen: Mapping[fx.Node, Size],
    sizes: Mapping[fx.Node, Size],
    rounded: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
    least: float = LEAST,
) -> Tensor | None:
    """What to divide each channel by, (channels,) float64; None where less than ``least`` of the noise is won.

    seen, sizes: of two halves of the images. Factors that come from one half are judged on the other, both ways; what
    wins on both is made of all.
    """
    if any(is_scaling(reader) for reader in stream.readers):  # SiLU and GELU of less are nothing
        seen, sizes = (
            {value: dataclasses.replace(size, lo=size.lo.clamp_min(FLAT)) for value, size in one.items()}
            for one in (seen, sizes)
        )
    values = [value for value in stream.values if value in rounded]
    readers = [(reader, weight_of(graph, reader).double(), groups_of(reader) == 1) for reader in stream.readers]
    columns = torch.stack([_columns(weight, dense).square().mean(1) for _, weight, dense in readers]).sum(0).sqrt()

    def factor(halves: Sequence[Mapping[fx.Node, Size]], share: float) -> Tensor | None:
        largest = torch.stack(
            [torch.maximum(one[value].hi, -one[value].lo) for value in values for one in halves]
        ).amax(0)
        usable = (largest > 0) & (columns > 0) & largest.isfinite() & columns.isfinite()
        if not bool(usable.any()):
            return None
        s = torch.where(usable, largest, 1.0) ** share / torch.where(usable, columns, 1.0) ** (1 - share)
        s = torch.where(usable, s / s[usable].log().mean().exp(), 1.0).clamp(1 / WIDEST, WIDEST)
        return _below_tops(stream, s, largest, usable, (seen, sizes))

    def noise(s: Tensor, half: Mapping[fx.Node, Size]) -> float:
        return _noise(s, half, stream, readers, rounded, layers)

    pairs = [(seen, sizes)] if sizes is seen else [(seen, sizes), (sizes, seen)]
    before = [noise(torch.ones_like(columns), judging) for _, judging in pairs]
    least_left, best = 1 - least, None
    for share in SHARES:
        tried = [(factor([fitting], share), judging) for fitting, judging in pairs]
        left = [
            noise(s, judging) / max(was, 1e-300)
            for (s, judging), was in zip(tried, before, strict=True)
            if s is not None
        ]
        if len(left) == len(pairs) and max(left) < least_left:
            least_left, best = max(left), share
    return None if best is None else factor([seen, sizes], best)


def _noise(
    s: Tensor,
    half: Mapping[fx.Node, Size],
    stream: Stream,
    readers: Sequence[tuple[fx.Node, Tensor, bool]],
    rounded: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
) -> float:
    """By the estimate above, of channels divided by ``s``. readers: each with its weight, and whether it is dense."""
    behind = _behind(stream)
    steps = {
        value: ((half[value].hi / s).amax().clamp_min(0) - (half[value].lo / s).amin().clamp_max(0))
        / rounded[value].levels
        for value in stream.values
        if value in rounded
    }
    total = 0.0
    for reader, weight, dense in readers:
        wide = weight * _along(s, weight, dense)
        made = sum(float(step.square()) for value, step in steps.items() if reader in behind[value])
        made *= float(wide.square().sum())
        if reader in layers and dense:
            square = (half[reader.all_input_nodes[0]].power / s.square()).sum() * weight[0, 0].numel()
            made += float((wide.flatten(1).abs().amax(1) / layers[reader].qmax).square().sum() * square)
        total += made / max(half[reader].variance, 1e-30)
    return total


def _below_tops(
    stream: Stream, s: Tensor, largest: Tensor, usable: Tensor, seen: Sequence[Mapping[fx.Node, Size]]
) -> Tensor:
    """Factors that no clip of the stream notices: none of a channel that it cuts, and room for the others.

    The widest channel stays as wide as it is.
    """
    tops = [(value, top) for value in stream.values if (top := _top(value)) is not None]
    if not tops:
        return s
    s = s * (largest / s)[usable].amax() / largest[usable].amax()
    shares = torch.stack([one[value].hi / top for value, top in tops for one in seen]).amax(0)  # 1: it is cut
    s = torch.where(shares < 1, torch.maximum(s, (ROOM * shares).clamp_min(NARROWEST)), 1.0)
    return torch.where(usable, s, 1.0)


def _columns(weight: Tensor, dense: bool) -> Tensor:
    """(channels, all that is multiplied with one)"""
    return (weight.transpose(0, 1) if dense else weight).flatten(1)


def _along(s: Tensor, weight: Tensor, dense: bool) -> Tensor:
    """(channels,) so that it broadcasts along what a weight reads."""
    return s.view([-1 if axis == int(dense) else 1 for axis in range(weight.dim())])


def _behind(stream: Stream) -> dict[fx.Node, set[fx.Node]]:
    """Of each value the readers that its noise comes to."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for value in reversed(stream.values):
        found[value] = {user for user in value.users if user in stream.readers}
        for user in value.users:
            found[value] |= found.get(user, set()) if not weighted(user) else set()
    return found
