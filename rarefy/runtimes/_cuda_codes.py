"""Codes as CUDA's kernels keep them: int8, unsigned ones beyond 127 less 128; pictures with channels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from rarefy.graph.nodes import Value, argument, arguments, attribute
from rarefy.kernels import makes_codes, qparams
from rarefy.kernels.cuda.convolution import pooling

aten = torch.ops.aten
# Move codes and read nothing else.
MOVERS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
        aten.squeeze.dim, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default, aten.slice.Tensor,
        aten.select.int, aten.max_pool2d.default,
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """Makes ``yields`` of ``reads``. where: "int8", or "float" of an island."""

    yields: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    run: Callable[..., Sequence[Value]]
    where: str = "int8"


class Codes:
    """What is known of the codes of ``graph``, its layers integer."""

    def __init__(self, graph: fx.GraphModule):
        self.graph = graph

    def number(self, node: fx.Node) -> float:
        """The one number of a stored tensor."""
        return float(attribute(self.graph, node))

    def kept(self, node: fx.Node) -> tuple[int, torch.dtype] | None:
        """Shift and type of codes; None of what is none."""
        if makes_codes(node):
            grid, dtype = qparams(node), argument(node, "dtype")
            if dtype not in (torch.int8, torch.uint8) or attribute(self.graph, grid.scale).dim():
                return None
            return (128 if dtype == torch.uint8 and grid.qmax > 127 else 0), dtype
        if node.op == "get_attr":
            dtype = attribute(self.graph, node).dtype
            return ((128 if dtype == torch.uint8 else 0), dtype) if dtype in (torch.int8, torch.uint8) else None
        moves = node.target in MOVERS or node.target is aten.pad.default
        return self.kept(node.args[0]) if moves and isinstance(node.args[0], fx.Node) else None

    def grid(self, node: fx.Node) -> dict[str, float | int]:
        """Scale, zero, qmin, qmax of what ``node`` yields, as codes are kept."""
        grid, kept = qparams(node), self.kept(node)
        assert kept is not None
        zero, shift = int(self.number(grid.zero_point)), kept[0]
        return {
            "scale": self.number(grid.scale),
            "zero": zero - shift,
            "qmin": int(grid.qmin) - shift,
            "qmax": int(grid.qmax) - shift,
        }


def constant_pad(node: fx.Node) -> tuple[int, int, int, int] | None:
    """Left, right, top, bottom of a padding with a constant, none of it negative; None for any other."""
    pad = list(argument(node, "pad"))
    good = len(pad) in (2, 4) and all(isinstance(one, int) and one >= 0 for one in pad)
    if not good or argument(node, "mode") not in (None, "constant"):
        return None
    left, right, top, bottom = [*pad, 0, 0][:4]
    return left, right, top, bottom


def lined(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h, w, c) side by side in memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def planes(x: Tensor) -> Tensor:
    """(n, h, w, c) -> (n, c, h, w), as it lies."""
    return x.permute(0, 3, 1, 2)


def carried(node: fx.Node, x: Tensor) -> Tensor:
    """What a mover makes of codes."""
    if node.target is not aten.max_pool2d.default:
        target: Value = aten.reshape.default if node.target is aten.view.default else node.target
        moved: Tensor = target(x, *node.args[1:], **node.kwargs)
        return moved
    _, kernel, stride, padding, dilation, ceil = arguments(node).values()
    size = F.max_pool2d(x.new_empty(x.shape, dtype=torch.float32, device="meta"), kernel, stride or kernel,
                        padding or 0, dilation or 1, bool(ceil)).shape[2:]  # fmt: skip
    return planes(
        pooling.max_pool(
            lined(x), pair(kernel), pair(stride or kernel), pair(padding or 0), pair(dilation or 1), (size[0], size[1])
        )
    )


def pair(value: Value) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    first, second = values * 2 if len(values) == 1 else values
    return int(first), int(second)
