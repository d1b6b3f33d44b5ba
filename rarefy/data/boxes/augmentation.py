"""Variation: another picture of the same things in every epoch, and the boxes with it; torchvision's transforms.v2.

====================  ================================================================================================
``flip``              half of the pictures, mirrored
``scale=LEAST``       seen from nearer or farther: by a factor between LEAST and 1/LEAST, evenly in its logarithm;
                      the window lies at random, the rest is filled as a letterbox is
``crop``              a part in which some box overlaps enough (SSD's, arXiv 1512.02325; ``RandomIoUCrop``)
``photometric``       contrast, brightness, saturation, hue (SSD's; ``RandomPhotometricDistort``)
``mosaic=SHARE``      that share of the inputs is put together from four pictures around a random point
                      (arXiv 2004.10934)
====================  ================================================================================================

Everything is drawn from what the decoder hands over, which follows from (seed, epoch, picture); torch's global state is
as it was afterwards. A box of which less than a tenth is left, or no pixel of the input, is none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rarefy.data.boxes.boxes import AREA, BOTTOM, area
from rarefy.data.boxes.placement import Feed, filled, placed
from rarefy.errors import DataError
from rarefy.system.dependencies import needs

SEEN = 0.1  # of a box: less is none
Fill = float | tuple[float, float, float]
Window = tuple[int, int, int, int]  # left, top, width, height
Another = Callable[[np.random.Generator], tuple[Tensor, Tensor]]  # a picture of the same source, and its boxes


class Geometry(NamedTuple):
    """What is done to one picture. window: of it, after the flip; None: all of it."""

    flip: bool = False
    window: Window | None = None


class Colours(NamedTuple):
    """numbers: factors of brightness and contrast, whether contrast comes before hue, factor of saturation, shift of
    hue. order: of the channels.
    """

    numbers: tuple[float, float, float, float, float]
    order: tuple[int, int, int]


@dataclass(frozen=True)
class Variation:
    """What is done, and the text that said it."""

    text: str = "none"
    flip: bool = False
    scale: float = 1.0
    crop: bool = False
    photometric: bool = False
    mosaic: float = 0.0

    @property
    def still(self) -> bool:
        """Is a picture the same in every epoch?"""
        return not (self.flip or self.crop or self.photometric or self.mosaic) and self.scale == 1

    def __call__(
        self, picture: Tensor, boxes: Tensor, feed: Feed, draw: np.random.Generator, another: Another
    ) -> tuple[Tensor, Tensor]:
        """picture: (3, h, w), uint8 or float in [0, 1]; boxes: (m, 7) in its pixels. The same of the picture made."""
        if self.still:
            return picture, boxes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draw.integers(2**63)))
            if self.mosaic and draw.random() < self.mosaic:
                others = [another(draw) for _ in range(3)]
                parts = [self._one(*one, feed, draw) for one in ((picture, boxes), *others)]
                return _mosaic(parts, feed, draw)
            return self._one(picture, boxes, feed, draw)

    def coloured(self, inputs: Tensor, draw: np.random.Generator) -> Tensor:
        """An input (3, H, W), not yet normalised, in other colours: last, as inputs have fewer pixels than pictures."""
        if not self.photometric:
            return inputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draw.integers(2**63)))
            coloured: Tensor = _v2().RandomPhotometricDistort()(inputs)
            return coloured

    def geometry(self, size: tuple[int, int], draw: np.random.Generator) -> Geometry:
        """For a picture of that (H, W)."""
        flip = self.flip and draw.random() < 0.5
        return Geometry(flip, _window(size, self.scale, draw) if self.scale < 1 else None)

    def colours(self, draw: np.random.Generator) -> Colours | None:
        """What ``coloured`` does to an input, in numbers."""
        if not self.photometric:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draw.integers(2**63)))
            drawn = _v2().RandomPhotometricDistort().make_params([torch.zeros(3, 1, 1)])
        brightness, contrast, saturation = (
            1.0 if drawn[f"{name}_factor"] is None else float(drawn[f"{name}_factor"])
            for name in ("brightness", "contrast", "saturation")
        )
        order = drawn["channel_permutation"]
        first, second, third = (0, 1, 2) if order is None else order.tolist()
        numbers = brightness, contrast, float(drawn["contrast_before"]), saturation, float(drawn["hue_factor"] or 0.0)
        return Colours(numbers, (first, second, third))

    def _one(self, picture: Tensor, boxes: Tensor, feed: Feed, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        flip, window = self.geometry((picture.shape[1], picture.shape[2]), draw)
        if flip:
            picture, boxes = _through(_v2().functional.horizontal_flip, picture, boxes)
        if window is not None:
            picture, boxes = _cut(picture, boxes, window, feed.fill)
        if self.crop and len(boxes):
            picture, boxes = _cropped(picture, boxes)
        return picture, boxes


def variation(text: str, who: str) -> Variation:
    """``"flip,scale=0.5"`` as values. Raises DataError, which begins with ``who``, for anything else than it knows."""
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        try:
            if key in ("flip", "crop", "photometric") and not equals:
                values[key] = True
            elif key == "mosaic":
                values[key] = float(value) if equals else 0.5
            elif key == "scale" and equals:
                values[key] = float(value)
            elif part != "none":
                raise ValueError
        except ValueError as error:
            raise DataError(
                f"{who}: augment={text!r}: {part!r} is not flip, scale=LEAST, crop, photometric, mosaic, mosaic=SHARE "
                "or none"
            ) from error
    if not 0.05 <= values.get("scale", 1.0) <= 1 or not 0 <= values.get("mosaic", 0.0) <= 1:
        raise DataError(f"{who}: augment={text!r}: scale is a factor of 0.05 to 1, mosaic a share of 0 to 1")
    made = Variation(text, **values)
    if not made.still:
        _v2()
    return made


@functools.cache
def _v2() -> Any:
    return needs("torchvision.transforms.v2", "vision")


def _through(function: Callable[..., Any], picture: Tensor, boxes: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Picture and boxes, as torchvision's transform makes them."""
    tv_tensors = needs("torchvision.tv_tensors", "vision")
    size = (picture.shape[1], picture.shape[2])
    corners = tv_tensors.BoundingBoxes(boxes[:, : BOTTOM + 1], format="XYXY", canvas_size=size)
    made, corners = function(picture, **options), function(corners, **options)
    boxes = boxes.clone()
    boxes[:, : BOTTOM + 1] = corners.as_subclass(torch.Tensor)
    return made, boxes


def _window(size: tuple[int, int], least: float, draw: np.random.Generator) -> Window:
    """Left, top, width, height of what is seen of a picture (H, W), perhaps more than it."""
    factor = math.exp(draw.uniform(math.log(least), -math.log(least)))
    height, width = (max(1, round(side / factor)) for side in size)
    left, top = (round(draw.random() * (own - seen)) for own, seen in ((size[1], width), (size[0], height)))
    return left, top, width, height


def _cut(picture: Tensor, boxes: Tensor, window: Window, fill: Fill) -> tuple[Tensor, Tensor]:
    """What the window (left, top, width, height) shows; outside of the picture it is filled."""
    left, top, width, height = window
    made = filled(picture, (height, width), fill)
    first_x, first_y = max(0, left), max(0, top)
    seen = picture[:, first_y : max(first_y, top + height), first_x : max(first_x, left + width)]
    made[:, first_y - top :, first_x - left :][:, : seen.shape[1], : seen.shape[2]] = seen
    shifted = boxes.clone()
    shifted[:, : BOTTOM + 1] -= boxes.new_tensor([left, top, left, top])
    return made, _seen(shifted, width, height)


def _seen(boxes: Tensor, width: float, height: float) -> Tensor:
    """Boxes cut at the edges; those of which too little is left are none."""
    whole = area(boxes)
    boxes[:, : BOTTOM + 1] = torch.minimum(
        boxes[:, : BOTTOM + 1].clamp_min(0), boxes.new_tensor([width, height, width, height])
    )
    left = area(boxes)
    boxes[:, AREA] = left
    sides = boxes[:, 2:4] - boxes[:, :2]
    return boxes[(left >= SEEN * whole) & (sides >= 1).all(1)]


def _cropped(picture: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """torchvision's crop that keeps a box, by torch's random state."""
    tv_tensors = needs("torchvision.tv_tensors", "vision")
    size = (picture.shape[1], picture.shape[2])
    corners = tv_tensors.BoundingBoxes(boxes[:, : BOTTOM + 1], format="XYXY", canvas_size=size)
    found = _v2().RandomIoUCrop().make_params([picture, corners])
    if "is_within_crop_area" not in found:
        return picture, boxes
    window = tuple(int(found[name]) for name in ("left", "top", "width", "height"))
    inside = boxes[found["is_within_crop_area"]]
    return _cut(picture, inside, (window[0], window[1], window[2], window[3]), 0.0)


def _mosaic(parts: list[tuple[Tensor, Tensor]], feed: Feed, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Four pictures, each as an input of its own, of which a window fills its corner."""
    height, width = feed.size
    middle_x, middle_y = (int(side * draw.uniform(0.3, 0.7)) for side in (width, height))
    corners = [
        (0, 0, middle_x, middle_y),
        (middle_x, 0, width - middle_x, middle_y),
        (0, middle_y, middle_x, height - middle_y),
        (middle_x, middle_y, width - middle_x, height - middle_y),
    ]
    canvas: Tensor | None = None
    found = []
    for (left, top, wide, high), (picture, boxes) in zip(corners, parts, strict=True):
        whole, where = placed(picture, feed)
        boxes = boxes.clone()
        boxes[:, : BOTTOM + 1] = where.boxes(boxes[:, : BOTTOM + 1])
        first = round(draw.random() * (width - wide)), round(draw.random() * (height - high))
        part, boxes = _cut(whole, boxes, (*first, wide, high), feed.fill)
        boxes[:, : BOTTOM + 1] += boxes.new_tensor([left, top, left, top])
        found.append(boxes)
        canvas = whole.new_empty(whole.shape[0], height, width) if canvas is None else canvas
        canvas[:, top : top + high, left : left + wide] = part.to(canvas.dtype)
    assert canvas is not None
    return canvas, torch.cat(found)
