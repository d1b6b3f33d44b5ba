"""Resident: pictures decoded once, which a GPU varies and places itself, a whole batch at a time.

Decoding, cutting and colouring on the CPU take about 10 ms a picture, longer than a small detector's step on a GPU
takes for all of its batch. Here the pictures lie on the device as uint8, and an input is two products of matrices:

    input = fill + rows · (picture - fill) · columnsᵀ

``rows`` (H, h) and ``columns`` (W, w) hold what flip, window, resize and letterbox do together along one side:
bilinear interpolation, with ``antialias`` by a triangle as wide as a pixel of the input, as ``F.interpolate`` has it.
Random numbers are drawn as ``BoxDecoder`` draws them, of (seed, epoch, picture), so an input is the same as its but
for rounding. What is given up: memory, so this is done only where all pictures, each padded to the largest, take no
more than a quarter of what is free; and ``crop`` and ``mosaic``, which stay with the decoder.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rarefy.data.augmentation import sent
from rarefy.data.boxes.augmentation import SEEN, Colours, Fill, Geometry, Variation
from rarefy.data.boxes.boxes import AREA, BOTTOM, CLASS, FACTOR, NONE, TARGET_COLUMNS, area
from rarefy.data.boxes.placement import Feed, placement
from rarefy.data.boxes.scenes import Scenes
from rarefy.data.items import Items, Picture
from rarefy.data.targets import Target

_GREY = (0.2989, 0.587, 0.114)


class Reader(Protocol):
    """``BoxDecoder``, as far as it is needed here."""

    @property
    def source(self) -> Items: ...

    @property
    def feed(self) -> Feed: ...

    @property
    def variation(self) -> Variation: ...

    def picture(self, image: Picture, target: Target | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Resident:
    """pixels: (n, 3, h, w) uint8, each picture at the top left. boxes: (n, m, 7), rows of no box being of class -1.

    sizes: (h, w) of each picture.
    """

    pixels: Tensor
    boxes: Tensor
    sizes: list[tuple[int, int]]
    feed: Feed
    variation: Variation

    def batch(self, chunk: Tensor, seeds: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Inputs (N, 3, H, W) uint8 and targets (N, m, 8) of the pictures ``chunk`` (N,) in one epoch."""
        device, drawn = self.pixels.device, [self._drawn(index, seeds) for index in chunk.tolist()]
        places = sent(chunk, device)
        numbers = sent(torch.tensor([one.numbers for one in drawn], dtype=torch.float32), device)
        taps = max(3, *(one.taps for one in drawn))
        inputs = self._placed(self.pixels[places], numbers, taps)
        colours = [one.colours for one in drawn if one.colours is not None]
        if colours:
            inputs = coloured(inputs, colours)
        return inputs.round().clamp(0, 255).to(torch.uint8), self._targets(self.boxes[places], numbers)

    def _drawn(self, index: int, seeds: tuple[int, int]) -> _Drawn:
        size, feed = self.sizes[index], self.feed
        draw = np.random.default_rng([seed % 2**63 for seed in (*seeds, index)])
        geometry = Geometry()
        if not self.variation.still:
            draw.integers(2**63)  # the seed of what torch draws, of which nothing is used here
            geometry = self.variation.geometry(size, draw)
        colours = self.variation.colours(draw)
        left, top, width, height = geometry.window or (0, 0, size[1], size[0])
        where = placement((height, width), feed)
        numbers = (
            float(geometry.flip), size[1], size[0], left, top, width, height,
            where.left, where.top, where.width, where.height, where.across, where.down,
        )  # fmt: skip
        wide = max(1.0, width / where.width, height / where.height) if feed.antialias else 1.0
        return _Drawn(numbers, 2 * int(np.ceil(wide)) + 1, colours)

    def _placed(self, pictures: Tensor, numbers: Tensor, taps: int) -> Tensor:
        """(N, 3, H, W) float32, 0 to 255."""
        flip, width, height, left, top, seen_x, seen_y, at_x, at_y, out_x, out_y, _, _ = numbers.unbind(1)
        high, wide = self.feed.size
        none, smooth = torch.zeros_like(flip), self.feed.antialias
        rows = weights(high, pictures.shape[2], (height, top, seen_y, at_y, out_y, none), taps, smooth)
        columns = weights(wide, pictures.shape[3], (width, left, seen_x, at_x, out_x, flip), taps, smooth)
        fill = _filled(self.feed.fill, pictures.device)
        return fill + rows[:, None] @ (pictures.float() - fill) @ columns[:, None].transpose(2, 3)

    def _targets(self, boxes: Tensor, numbers: Tensor) -> Tensor:
        """(N, m, 8): what is left of boxes (N, m, 7), in pixels of the input."""
        flip, width, _, left, top, seen_x, seen_y, at_x, at_y, _, _, across, down = numbers[:, :, None].unbind(1)
        x, y = boxes[..., [0, 2]], boxes[..., [1, 3]]
        x = torch.where(flip[..., None] > 0, (width[..., None] - x).flip(-1), x) - left[..., None]
        y = y - top[..., None]
        whole = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
        limit = torch.stack([seen_x, seen_y, seen_x, seen_y], -1)
        cut = torch.minimum(whole.clamp_min(0), limit)
        left_over, sides = area(cut), cut[..., 2:4] - cut[..., :2]
        stays = boxes[..., CLASS] >= 0
        targets = boxes.new_zeros(*boxes.shape[:2], TARGET_COLUMNS)
        targets[..., CLASS : AREA + 1] = boxes[..., CLASS : AREA + 1]
        if self.variation.scale < 1:
            stays = stays & (left_over >= SEEN * area(whole)) & (sides >= 1).all(-1)
            targets[..., AREA] = left_over
        scale, shift = torch.stack([across, down] * 2, -1), torch.stack([at_x, at_y] * 2, -1)
        targets[..., : BOTTOM + 1] = torch.where(stays[..., None], cut * scale + shift, 0.0)
        targets[..., CLASS] = torch.where(stays, targets[..., CLASS], NONE)
        targets[..., FACTOR] = 1 / (across * down)
        return targets


@dataclass(frozen=True)
class _Drawn:
    """numbers: flip, width and height of the picture; left, top, width and height of the window; the same of where it
    lies in the input; pixels of the input for one of the window, across and down. taps: pixels that an interpolated one
    may look at, along a side.
    """

    numbers: tuple[float, ...]
    taps: int
    colours: Colours | None


def resident(reader: Reader, device: torch.device, most: float) -> Resident | None:
    """The source's pictures on the device; None where they are no files, take more than ``most`` bytes there, can't
    all be read, or are varied in ways that the decoder alone knows.
    """
    source, variation = reader.source, reader.variation
    if not isinstance(source.items, Scenes) or variation.crop or variation.mosaic or not len(source):
        return None
    read = _Reading(reader)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        first = read(0)
        if first is None or first[0].nbytes * len(source) > most:
            return None
        found = []
        taken = 0
        for one in pool.map(read, range(len(source))):
            taken += one[0].nbytes if one is not None else 0
            if one is None or taken > most:
                pool.shutdown(wait=False, cancel_futures=True)
                return None
            found.append(one)
    sizes = [(pixels.shape[1], pixels.shape[2]) for pixels, _ in found]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    if 3 * height * width * len(source) > most:
        return None
    pixels = torch.zeros(len(source), 3, height, width, dtype=torch.uint8, device=device)
    boxes = torch.zeros(len(source), max(1, *(len(rows) for _, rows in found)), AREA + 1)
    boxes[..., CLASS] = NONE
    for place, (picture, rows) in enumerate(found):
        pixels[place, :, : picture.shape[1], : picture.shape[2]] = picture.to(device)
        boxes[place, : len(rows)] = rows
    return Resident(pixels, boxes.to(device), sizes, reader.feed, variation)


@dataclass(frozen=True)
class _Reading:
    reader: Reader

    def __call__(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Picture (3, h, w) uint8 and its boxes (m, 7); None of one that is to be told of, or holds floats."""
        try:
            pixels, boxes = self.reader.picture(*self.reader.source.item(index))
        except Exception:
            return None
        return (pixels, boxes) if pixels.dtype == torch.uint8 else None


def weights(size: int, pixels: int, along: tuple[Tensor, ...], taps: int, antialias: bool) -> Tensor:
    """(N, size, pixels): what each pixel of the input takes of each of the picture, along one side.

    along: (N,) each: the picture's side; where the window begins in it, and its side; where that lies in the input, and
    its side there; 1 where the picture is flipped. taps: pixels that may count.
    """
    own, first, seen, at, out, flip = (one[:, None] for one in along)
    place = torch.arange(size, device=own.device)[None] - at  # (N, size)
    scale = seen / out
    centre = scale * (place + 0.5)
    wide = scale.clamp_min(1) if antialias else torch.ones_like(scale)
    if not antialias:
        centre = torch.minimum(centre.clamp_min(0.5), seen - 0.5)
    near = (centre - wide).floor()[..., None] + torch.arange(taps, device=own.device)  # pixels of the window
    total = (1 - (near + 0.5 - centre[..., None]).abs() / wide[..., None]).clamp_min(0)
    total = (total * ((near >= 0) & (near < seen[..., None]))).sum(-1)
    picture = torch.arange(pixels, device=own.device)[None]  # (1, pixels)
    seen_at = torch.where(flip > 0, own - 1 - picture, picture) - first  # (N, pixels): in the window
    inside = (picture < own) & (seen_at >= 0) & (seen_at < seen)
    share = (1 - (seen_at[:, None] + 0.5 - centre[..., None]).abs() / wide[..., None]).clamp_min(0)
    shown = ((place >= 0) & (place < out))[..., None] & inside[:, None]
    return share * shown / total.clamp_min(1e-6)[..., None]


def coloured(inputs: Tensor, colours: list[Colours]) -> Tensor:
    """(N, 3, H, W), 0 to 255, in other colours: ``RandomPhotometricDistort`` of a batch, each picture its own."""
    device = inputs.device
    numbers = sent(torch.tensor([one.numbers for one in colours], dtype=torch.float32), device)
    brightness, contrast, early, saturation, hue = numbers[:, :, None, None, None].unbind(1)
    order = sent(torch.tensor([one.order for one in colours]), device)
    made = (inputs.round().clamp(0, 255) * brightness).clamp(0, 255)
    made = _contrasted(made, torch.where(early > 0, contrast, 1.0))
    made = (saturation * made + (1 - saturation) * _grey(made)).clamp(0, 255)
    made = _contrasted(_turned(made, hue), torch.where(early > 0, 1.0, contrast))
    return made.gather(1, order[:, :, None, None].expand_as(made))


def _grey(pictures: Tensor) -> Tensor:
    red, green, blue = (share * pictures[:, place : place + 1] for place, share in enumerate(_GREY))
    return red + green + blue


def _contrasted(pictures: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(pictures).mean((1, 2, 3), keepdim=True)
    return (factor * pictures + (1 - factor) * mean).clamp(0, 255)


def _turned(pictures: Tensor, hue: Tensor) -> Tensor:
    """Hues shifted by so much of the circle, by HSV: channel n of (h, s, v) is v - v·s·clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6h) mod 6 and n = 5, 3, 1.
    """
    most, place = pictures.max(1, keepdim=True)
    spread = most - pictures.amin(1, keepdim=True)
    red, green, blue = pictures.split(1, 1)
    apart = torch.stack([green - blue, blue - red, red - green]).gather(0, place[None])[0]
    sixths = torch.where(spread > 0, apart / spread.clamp_min(1e-6) + 2 * place, 0.0) + 6 * hue
    channels = [(number + sixths).remainder(6) for number in (5, 3, 1)]
    return torch.cat([most - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in channels], 1)


def _filled(fill: Fill, device: torch.device) -> Tensor:
    """(1, 3 or 1, 1, 1), rounded as a canvas of uint8 is."""
    values = fill if isinstance(fill, tuple) else (fill,)
    return sent(torch.tensor(values, dtype=torch.float32).round().reshape(1, -1, 1, 1), device)
