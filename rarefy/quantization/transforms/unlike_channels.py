"""What makes one scale a tensor serve channels of unlike size: told by a few images, judged on a few others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import Images
from rarefy.quantization.placement import Placement
from rarefy.quantization.transforms import outlier_channels, split_channels
from rarefy.quantization.transforms.equalize import equalize

EACH = 16  # images, and as many that judge
BOLD = 8  # images in all, below which no channel is equalised across a clip


def equalized(
    graph: fx.GraphModule, images: Images, values: Mapping[fx.Node, Grid], layers: Mapping[fx.Node, Grid]
) -> tuple[int, int]:
    """How many streams of ``graph`` were equalised, in place, and how many dead channels carry another.

    values: those that will be rounded, and the grid; layers: those whose weights will be.
    """
    few, others = _halves(images)
    if not others:
        return 0, 0
    doubled = split_channels.double(graph, few, values, layers)
    # what doubling has spread out is not to be squeezed again, and few images do not show what a clip would cut
    bold = not doubled and sum(len(batch[0]) for batch in (*few, *others)) >= BOLD
    return equalize(graph, few, values, layers, others, across_clips=bold), doubled


def relieved(
    graph: fx.GraphModule,
    images: Images,
    placement: Placement,
    values: Mapping[fx.Node, Grid],
    layers: Mapping[fx.Node, Grid],
) -> int:
    """How many values have a product in front of their rounding, or a norm that does its work."""
    few, others = _halves(images)
    return outlier_channels.relieve(graph, few, placement, values, layers, others) if others else 0


def _halves(images: Images) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Images that tell how large channels get, and others that judge it; one image judges nothing."""
    batch = images.first(2 * EACH)
    few, others = (list(images.pieces([tuple(x[half::2] for x in batch)])) for half in (0, 1))
    return few, others if len(batch[0]) > 1 else []
