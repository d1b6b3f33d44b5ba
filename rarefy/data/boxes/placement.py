"""Placement: a picture becomes a detector's input, and its boxes go along.

**Stretched**: resized to the input, each side by itself. **Letterboxed**: as large as fits, the sides kept in
proportion, the rest filled. ratio = min(H/h, W/w); at the top left as YOLOX does it (sides cut to whole pixels), in the
middle as Ultralytics does it (sides rounded, the odd pixel at the right and the bottom). Boxes are scaled by the ratio
itself and not by the whole pixels, as those tools scale their answers back.

Bilinear; without ``antialias`` by the four neighbours alone, as OpenCV resizes. Pixels stay uint8 where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["stretch", "letterbox"]


@dataclass(frozen=True)
class Feed:
    """How a picture becomes a core's input.

    size: (H, W) of the input. resize: "stretch" to it, or "letterbox": as large as fits, the sides kept in proportion,
    the rest filled with ``fill`` (0 to 255; one value, or red, green, blue). centred: the picture in the middle; else
    at the top left. channels: their order. mean, std: of channels in that order, of values 0 to 1. antialias: of the
    resizing.
    """

    size: tuple[int, int]
    resize: Resize = "stretch"
    fill: float | tuple[float, float, float] = 0.0
    centred: bool = False
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    antialias: bool = True


class Placement(NamedTuple):
    """Where a picture lies in the input. across, down: input pixels for a pixel of the picture.

    left, top, width, height: of the picture in the input, in its pixels.
    """

    across: float
    down: float
    left: int
    top: int
    width: int
    height: int

    def boxes(self, boxes: Tensor) -> Tensor:
        """(..., 4) from the picture's pixels to the input's."""
        return boxes * boxes.new_tensor(self._scale) + boxes.new_tensor(self._shift)

    def back(self, boxes: Tensor) -> Tensor:
        """(..., 4) from the input's pixels to the picture's."""
        return (boxes - boxes.new_tensor(self._shift)) / boxes.new_tensor(self._scale)

    @property
    def factor(self) -> float:
        """Pixels of the picture that a pixel of the input stands for."""
        return 1 / (self.across * self.down)

    @property
    def _scale(self) -> tuple[float, ...]:
        return (self.across, self.down) * 2

    @property
    def _shift(self) -> tuple[int, ...]:
        return (self.left, self.top) * 2


def placement(own: tuple[int, int], feed: Feed) -> Placement:
    """own: (H, W) of the picture."""
    height, width = feed.size
    if feed.resize == "stretch":
        return Placement(width / own[1], height / own[0], 0, 0, width, height)
    ratio = min(height / own[0], width / own[1])
    if not feed.centred:
        return Placement(ratio, ratio, 0, 0, max(1, int(own[1] * ratio)), max(1, int(own[0] * ratio)))
    inner = max(1, round(own[1] * ratio)), max(1, round(own[0] * ratio))
    left, top = (round((outer - one) / 2 - 0.1) for outer, one in zip((width, height), inner, strict=True))
    return Placement(ratio, ratio, left, top, *inner)


def placed(picture: Tensor, feed: Feed) -> tuple[Tensor, Placement]:
    """(C, h, w) uint8, or float in [0, 1] -> (C, H, W) of the same type, and where it lies."""
    where = placement((picture.shape[1], picture.shape[2]), feed)
    small = picture
    if picture.shape[1:] != (where.height, where.width):
        small = F.interpolate(
            picture[None].float(),
            (where.height, where.width),
            mode="bilinear",
            align_corners=False,
            antialias=feed.antialias,
        )[0]
        small = small.round().clamp(0, 255).to(torch.uint8) if picture.dtype == torch.uint8 else small
    if (where.height, where.width) == feed.size:
        return small, where
    canvas = filled(picture, feed.size, feed.fill)
    canvas[:, where.top : where.top + where.height, where.left : where.left + where.width] = small
    return canvas, where


def filled(like: Tensor, size: tuple[int, int], fill: float | tuple[float, float, float]) -> Tensor:
    """(C, H, W) of one colour, for pictures like that one. fill: 0 to 255."""
    scale = 1 if like.dtype == torch.uint8 else 255
    colour = torch.tensor(fill, dtype=torch.float32).reshape(-1, 1, 1) / scale
    colour = colour.round() if like.dtype == torch.uint8 else colour
    return colour.to(like.dtype).expand(like.shape[0], *size).clone()
