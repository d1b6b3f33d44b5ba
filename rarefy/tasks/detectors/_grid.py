"""Detectors that say something at every place of a few grids: where these are, and what a distance or a width means.

A grid of stride s over an input (H, W) has ceil(H / s) rows and ceil(W / s) columns, row by row; the grids follow one
another by their strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.errors import CaptureError
from rarefy.graph import signature
from rarefy.tasks.metric import OutputError, Outputs

LARGEST = 20.0  # exponent of a width: 5e8 strides, and no infinity
MOST_CLASSES, MOST_PIXELS, MOST_PLACES = 100_000, 16_384, 4_000_000
Size = tuple[int, int]


def check_options(classes: int, size: Sequence[int], strides: Sequence[int]) -> None:
    """Raises ValueError for what no detector has: a file may say anything."""
    if not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes={classes} is not 1 to {MOST_CLASSES}")
    if len(size) != 2 or not all(1 <= side <= MOST_PIXELS for side in size):
        raise ValueError(f"size={tuple(size)} is no height and width of 1 to {MOST_PIXELS} pixels")
    if not 1 <= len(strides) <= 16 or not all(1 <= stride <= MOST_PIXELS for stride in strides):
        raise ValueError(f"strides={tuple(strides)} are not 1 to 16 numbers of pixels")
    if count((size[0], size[1]), strides) > MOST_PLACES:
        raise ValueError(f"size={tuple(size)} and strides={tuple(strides)} make more than {MOST_PLACES:,} places")


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("overlap", "least"), (0.0, 1.0)),
    **dict.fromkeys(("most", "candidates"), (1, 100_000)),
    **dict.fromkeys(("offset", "radius"), (0.0, 100.0)),
}


def check_numbers(family: object) -> None:
    """Raises ValueError for an option of a family that is out of its range."""
    for name, (least, most) in _RANGES.items():
        value = getattr(family, name, least)
        if not least <= value <= most:
            raise ValueError(f"{name}={value} is not {least:g} to {most:g}")


def check_grids(grids: Sequence[Sequence[int]], anchors: Sequence[int]) -> None:
    """Raises ValueError for more places than any detector has, or other numbers of grids. anchors: of a place, each."""
    good = len(grids) == len(anchors) <= 16 and all(len(one) == 2 and min(one) >= 1 for one in grids)
    if not good or sum(one[0] * one[1] * count for one, count in zip(grids, anchors, strict=False)) > MOST_PLACES:
        raise ValueError(f"grids {tuple(map(tuple, grids))} with {tuple(anchors)} boxes a place are no detector's")


def grids(size: Size, strides: Sequence[int]) -> list[Size]:
    """(rows, columns) of each."""
    height, width = size
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def count(size: Size, strides: Sequence[int]) -> int:
    """Of places."""
    return sum(rows * columns for rows, columns in grids(size, strides))


def places(size: Size, strides: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Top left corner (places, 2) of each, x and y in pixels of the input, and its stride (places, 1)."""
    corners, steps = [], []
    for stride, (rows, columns) in zip(strides, grids(size, strides), strict=True):
        y, x = torch.meshgrid(
            torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
        )
        corners.append(torch.stack([x, y], -1).flatten(0, 1).float() * stride)
        steps.append(torch.full((rows * columns, 1), float(stride), device=like.device))
    return torch.cat(corners), torch.cat(steps)


def corners(centre: Tensor, sides: Tensor) -> Tensor:
    """Boxes (..., 4) of centres and sides (..., 2)."""
    return torch.cat([centre - sides / 2, centre + sides / 2], -1)


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """Boxes (..., 4) cut off at the edges of the input."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def from_distances(centre: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4) of centres (..., 2) and what is between these and left, top, right and bottom, in pixels."""
    return torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], -1)


def expectation(bins: Tensor, sides: int = 4) -> Tensor:
    """Distances (..., 4) of logits (..., 4 * bins): the mean of 0, 1, 2, ... (generalised focal loss, 2006.04388)."""
    logits: Tensor = bins.unflatten(-1, (sides, -1))  # type: ignore[no-untyped-call]
    return logits.softmax(-1) @ torch.arange(logits.shape[-1], device=bins.device, dtype=bins.dtype)


def tensors(outputs: Outputs, family: str, wanted: int) -> list[Tensor]:
    """The outputs in order, float32. Raises OutputError for another number of them."""
    try:
        found = [value for _, value in signature.leaves(signature.plain(outputs)) if isinstance(value, Tensor)]
    except CaptureError:
        found = []
    if len(found) != wanted:
        raise OutputError(f"returns {len(found)} tensors; {family} returns {wanted}: say which family it is of")
    return [value.float() for value in found]


def check(value: Tensor, shape: Sequence[int], family: str) -> Tensor:
    """The tensor (N, *shape). Raises OutputError for another shape."""
    if tuple(value.shape[1:]) != tuple(shape):
        expected = ", ".join(["N", *map(str, shape)])
        raise OutputError(
            f"returns {tuple(value.shape)}; {family} of these options and this input size returns ({expected}): "
            "say which family it is of, with its options"
        )
    return value
