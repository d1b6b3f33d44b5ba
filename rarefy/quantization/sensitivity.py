"""What noise on a value costs at the outputs, to first order, so that ranges can be chosen by that.

A range is a trade: the wider, the larger the step that everything is rounded to; the narrower, the more is clipped. How
much either matters hangs on what comes behind. A value that the next ReLU6 cuts anyway is clipped for nothing, and one
that decides the answer must not be; the squared error in place (``mse``) knows neither. With g the gradient of the
answers, an error d of a value moves them by sum(g d), and

    E |J d|^2  =  E_v (sum(g_v d))^2      for g_v of the answers' product with random signs v (Hutchinson, 1990)

which one pass backwards gives for all values of the graph at once. Errors of rounding are independent of each other and
uniform in a step, so that they cost step^2 / 12 sum(g^2). Those of clipping at h are not, and are summed as they are,
with their signs, within each image: (sum over x > h of g (h - x))^2. For all h at once that takes cumulative sums of g
and g x over the values in order. (The Fisher information as weight of quantization's errors: 2102.05426, 2111.12293.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rarefy.graph.interpreter import call, laid_out, run
from rarefy.graph.nodes import Value
from rarefy.quantization.placement import TURNS

if TYPE_CHECKING:
    from rarefy.quantization.observers import Histogram

aten = torch.ops.aten

SHARES = 64  # ends of ranges that are tried, a side
CLIPPED = 0.005  # share of a value's numbers that a range may leave out on a side


@dataclasses.dataclass
class Side:
    """What clipping at each of SHARES ends from ``end``, the extreme, to ``inner`` costs.

    sums, moments: (samples, SHARES) of g and g x beyond each end, for each image.
    """

    end: float
    inner: float
    sums: list[Tensor]
    moments: list[Tensor]

    def ends(self) -> Tensor:
        """(SHARES,) float64, the extreme first."""
        return torch.linspace(self.end, self.inner, SHARES, dtype=torch.float64)

    def costs(self) -> Tensor:
        """(samples, SHARES) float64, on the CPU: what the answers move by."""
        return self.ends() * torch.cat(self.sums).cpu() - torch.cat(self.moments).cpu()

    def add(self, x: Tensor, g: Tensor, samples: int) -> None:
        """x, g: (samples, numbers) float32, or of all samples together (1, numbers)."""
        if self.end == self.inner:
            nothing = x.new_zeros(samples, SHARES, dtype=torch.float64)
            self.sums.append(nothing)
            self.moments.append(nothing)
            return
        beyond = (x > self.inner if self.end > self.inner else x < self.inner).view(-1).nonzero()[:, 0]
        row, far, weight = beyond // x.shape[1], x.view(-1)[beyond].double(), g.view(-1)[beyond].double()
        place = ((self.end - far) * ((SHARES - 1) / (self.end - self.inner))).ceil().long().clamp(0, SHARES - 1)
        where = row * SHARES + place
        for kept, numbers in ((self.sums, weight), (self.moments, weight * far)):
            binned = numbers.new_zeros(len(x) * SHARES).index_add_(0, where, numbers)
            kept.append(_shared(binned.view(len(x), SHARES).cumsum(1), samples))


@dataclasses.dataclass
class Cost:
    """Of noise on one value, as a share of the answers' power.

    powers: (samples,) for each batch, of g^2 where the value is not 0, which every grid has. low, high: clipping.
    undone: whether held-out images said no to the range that was chosen.
    """

    low: Side
    high: Side
    powers: list[Tensor]
    undone: bool = False

    @property
    def power(self) -> float:
        """What noise of variance 1 costs."""
        return float(torch.cat(self.powers).mean())


def sensitivities(
    graph: fx.GraphModule,
    seen: Mapping[fx.Node, Histogram],
    batches: Iterable[Sequence[Tensor]],
    generator: torch.Generator,
) -> dict[fx.Node, Cost]:
    """What noise on each value costs, on these images. seen: how large each value gets. generator: of the signs."""
    found = {node: Cost(*sides(histogram), []) for node, histogram in seen.items()}
    parts = unlike(graph)
    for batch in batches:
        values, answers = _run(graph, found, parts, batch)
        with torch.enable_grad():
            total = sum((_product(answer, generator) for answer in answers), start=torch.zeros(()))
        if not isinstance(total, Tensor) or not total.requires_grad:
            continue
        grads = torch.autograd.grad(total, list(values.values()), allow_unused=True)
        with torch.no_grad():
            for (node, value), grad in zip(values.items(), grads, strict=True):
                if grad is not None:
                    _add(found[node], value.detach(), grad, len(batch[0]))
    return {node: cost for node, cost in found.items() if cost.powers}


def sides(histogram: Histogram) -> tuple[Side, Side]:
    """Low and high, from the extremes to where ``CLIPPED`` of the numbers that are not 0 lie outside."""
    counts, centers = histogram.counts, histogram.centers
    found = []
    for sign, end in ((-1.0, min(histogram.minimum, 0.0)), (1.0, max(histogram.maximum, 0.0))):
        far = counts * (centers * sign > 0)
        order = far.flip(0) if sign > 0 else far
        places = centers.flip(0) if sign > 0 else centers
        beyond = order.cumsum(0) <= CLIPPED * far.sum()
        inner = float(places[min(int(beyond.sum()), len(places) - 1)]) if end else 0.0
        found.append(Side(end, max(inner, 0.05 * end) if sign > 0 else min(inner, 0.05 * end), [], []))
    low, high = found
    return low, high


def unlike(graph: fx.GraphModule) -> list[fx.Node]:
    """The answers, and of those that lie side by side in one tensor (boxes and scores) each by itself."""
    (output,) = graph.graph.find_nodes(op="output")
    waiting, found = [node for node in pytree.tree_leaves(output.args[0]) if isinstance(node, fx.Node)], []
    while waiting:
        node = waiting.pop()
        if node.target in TURNS or node.target in (aten.cat.default, aten.stack.default):
            waiting += node.all_input_nodes
        elif node not in found:
            found.append(node)
    return found


def _run(
    graph: fx.GraphModule, wanted: Collection[fx.Node], answers: Collection[fx.Node], batch: Sequence[Tensor]
) -> tuple[dict[fx.Node, Tensor], list[Tensor]]:
    """Values that gradients reach, and the answers."""
    seen: dict[fx.Node, Tensor] = {}
    made: list[Tensor] = []

    def see(node: fx.Node, value: Value) -> None:
        if node in answers and isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
            made.append(value)

    def watched(node: fx.Node, value: Value) -> Value:
        if node in wanted and isinstance(value, Tensor) and value.is_floating_point():
            seen[node] = value if value.requires_grad else value.detach().requires_grad_()
            return seen[node]
        return value

    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.enable_grad():
        inputs = [watched(node, laid_out(x, x.device)) for node, x in zip(placeholders, batch, strict=True)]
        run(graph, inputs, see=see, instead=lambda node, live: watched(node, call(node, live)))
    return seen, made


def _product(answer: Tensor, generator: torch.Generator) -> Tensor:
    """() of an answer with random signs, image by image as a share of what the images' answers are."""
    size = answer.detach().square().sum().div(max(len(answer), 1) if answer.dim() else 1).sqrt().clamp_min(1e-30)
    signs = torch.randint(0, 2, answer.shape, generator=generator).to(answer) * 2 - 1
    return (answer * signs).sum() / size


def _add(cost: Cost, x: Tensor, g: Tensor, samples: int) -> None:
    """Image by image: windows of an image are a part of it. Of values that are not laid out so, images share alike."""
    rows = samples if x.dim() and len(x) % samples == 0 else 1
    x, g = _rows(x, rows), _rows(g.contiguous(memory_format=_layout(x)), rows)
    exact = x == 0  # on every grid
    power = torch.linalg.vector_norm(g.masked_fill(exact, 0.0), dim=1).double().square()
    cost.powers.append(_shared(power, samples))
    cost.low.add(x, g, samples)
    cost.high.add(x, g, samples)


def _shared(rows: Tensor, samples: int) -> Tensor:
    """(samples, ...) of as many rows, or of one, which is the sum of all."""
    return rows if len(rows) == samples else rows.expand(samples, *rows.shape[1:]) / samples


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _rows(x: Tensor, rows: int) -> Tensor:
    """(rows, numbers) float32 in the order they lie in memory, without a copy where they lie side by side."""
    x = x.contiguous(memory_format=_layout(x)).float()
    return x.as_strided((rows, x.numel() // rows), (x.numel() // rows, 1), x.storage_offset())
