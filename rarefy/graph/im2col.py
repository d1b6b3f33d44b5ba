"""What a convolution or linear layer multiplies, as a matrix: its unfolded form, at a few places of each image.

    y[g, :, place] = W[g] x[g, :, place]

x: (N, groups, K, places), K = channels / groups x kernel; W: (groups, outputs, K).

Neighbouring places say nearly the same, so that a few drawn at random, the same ones in every image of a batch, stand
for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rarefy.graph.nodes import Value, argument

aten = torch.ops.aten

PLACES = 64  # of an image, at most: 256 took twice as long on ResNet-56 and were no better for least squares


def groups_of(node: fx.Node) -> int:
    return 1 if node.target is aten.linear.default else int(argument(node, "groups"))


def plane(node: fx.Node, source: Tensor, shape: Sequence[int]) -> list[int]:
    """Sizes of the places of a layer's output that reads ``source`` with a weight of ``shape``."""
    if node.target is aten.linear.default:
        return list(source.shape[1:-1]) or [1]
    stride, dilation, ends = _window(node, shape)
    return [
        (size + sum(end) - d * (k - 1) - 1) // s + 1
        for size, end, d, k, s in zip(source.shape[2:], ends, dilation, shape[2:], stride, strict=True)
    ]


def draw(plane: Sequence[int], generator: torch.Generator, device: torch.device, most: int = PLACES) -> Tensor:
    """At most ``most`` places of the plane, int64, in order."""
    count = math.prod(plane)
    chosen = torch.randperm(count, generator=generator)[:most].sort().values if count > most else torch.arange(count)
    return chosen.to(device)


def unfold(node: fx.Node, source: Tensor, shape: Sequence[int], groups: int, place: Tensor) -> Tensor:
    """(N, groups, K, places): what the layer multiplies of ``source``, read with a weight of ``shape``."""
    count = len(source)
    if node.target is aten.linear.default:
        return source.reshape(count, -1, source.shape[-1]).mT.index_select(-1, place).unsqueeze(1)
    stride, dilation, ends = _window(node, shape)
    index: list[Tensor] = []  # of each axis, (places, *kernel)
    inside = torch.ones((), dtype=torch.bool, device=source.device)
    for axis, at in enumerate(torch.unravel_index(place, plane(node, source, shape))):
        taps = torch.arange(shape[2 + axis], device=source.device) * dilation[axis]
        taps = taps.view([-1 if dim == axis else 1 for dim in range(len(shape) - 2)])
        reached = at.view(-1, *[1] * (len(shape) - 2)) * stride[axis] - ends[axis][0] + taps
        inside = inside & (reached >= 0) & (reached < source.shape[2 + axis])
        index.append(reached.clamp(0, source.shape[2 + axis] - 1))
    at = torch.zeros((), dtype=torch.int64, device=source.device)
    for size, reached in zip(source.shape[2:], index, strict=True):
        at = at * size + reached
    rows = source.movedim(1, -1).flatten(1, -2)  # whole pixels are taken, as they lie there on a CPU
    windows = rows.index_select(1, at.flatten()).view(count, *at.shape, -1)  # (N, places, *kernel, channels)
    windows.mul_(inside.unsqueeze(-1))
    return windows.movedim((-1, 1), (1, -1)).reshape(count, groups, -1, len(place))


def _windows(node: fx.Node, source: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, channels, *places, *kernel), a view of the padded ``source``."""
    sizes = plane(node, source, shape)
    stride, dilation, ends = _window(node, shape)
    padded = F.pad(source, [end for pair in reversed(ends) for end in pair]).contiguous()
    batch, channel, *steps = padded.stride()
    places = [s * step for s, step in zip(stride, steps, strict=True)]
    taps = [d * step for d, step in zip(dilation, steps, strict=True)]
    return padded.as_strided((*padded.shape[:2], *sizes, *shape[2:]), (batch, channel, *places, *taps))


def outputs(node: fx.Node, output: Tensor, groups: int, place: Tensor) -> Tensor:
    """(N, groups, outputs, places) of ``output``, which the layer yields."""
    if node.target is aten.linear.default:
        return output.reshape(len(output), -1, output.shape[-1]).mT.index_select(-1, place).unsqueeze(1)
    return output.flatten(2).index_select(-1, place).reshape(len(output), groups, -1, len(place))


class Mean:
    """Mean of a layer's unfolded input over images and places, streaming.

    Images are added up first, so that windows are only cut out once.
    """

    def __init__(self, node: fx.Node, shape: Sequence[int]) -> None:
        self.node, self.shape, self.count = node, shape, 0
        # Each place is read once: places are added up as well.
        self.pointwise = node.target is aten.linear.default or _pointwise(node, shape)
        self.sum: Tensor | None = None

    def add(self, source: Tensor) -> None:
        """source: what the layer reads, of one batch."""
        # Channels last, as they lie there on a CPU; a product is faster than a sum.
        last = source if self.node.target is aten.linear.default else source.movedim(1, -1)
        rows = last.float().reshape(-1, last.shape[-1]) if self.pointwise else last.float().flatten(1)
        before = rows.new_zeros(1, rows.shape[1]) if self.sum is None else self.sum.view(1, -1)
        total = torch.addmm(before, rows.new_ones(1, len(rows)), rows)
        self.sum = total.view(rows.shape[1:] if self.pointwise else last.shape[1:])
        self.count += len(rows)

    def value(self, groups: int) -> Tensor:
        """(groups, K, 1), float64"""
        assert self.sum is not None
        mean = self.sum.double() / self.count
        if not self.pointwise:
            windows = _windows(self.node, mean.movedim(-1, 0).unsqueeze(0), self.shape)[0]
            mean = windows.mean(list(range(1, len(self.shape) - 1)))
        return mean.reshape(groups, -1, 1)


def _pointwise(node: fx.Node, shape: Sequence[int]) -> bool:
    stride, _, ends = _window(node, shape)
    return all(size == 1 for size in (*shape[2:], *stride)) and all(end == (0, 0) for end in ends)


def _window(node: fx.Node, shape: Sequence[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Stride, dilation, and the padding at both ends, for each spatial axis."""
    spatial, kernel = len(shape) - 2, shape[2:]
    stride, dilation = (_each(argument(node, name), spatial) for name in ("stride", "dilation"))
    padding = argument(node, "padding")
    if padding == "same":  # the odd one at the end
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return stride, dilation, [(both // 2, both - both // 2) for both in total]
    return stride, dilation, [(p, p) for p in _each(0 if padding == "valid" else padding, spatial)]


def _each(value: Value, count: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values
