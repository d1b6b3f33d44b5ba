"""BoxShaping: pictures with boxes as a detector's inputs, and their targets in the pixels of these.

A picture is turned as its EXIF says, unless its annotations state the size that it has unturned; where they state yet
another size they are of another picture, and this one is as unreadable as a broken file. Boxes are cut at its edges,
and those of no area left out, which is told with the picture where it was not when the annotations were read (of
datasets in Python, and where a file does not say how large its pictures are). Then it is varied (``augmentation.py``)
and placed (``placement.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rarefy.data.boxes.augmentation import Variation
from rarefy.data.boxes.boxes import AREA, BOTTOM, CLASS, FACTOR, IGNORED, TARGET_COLUMNS, padded
from rarefy.data.boxes.placement import Feed, placed
from rarefy.data.boxes.resident import Resident, resident
from rarefy.data.boxes.scenes import Faults, mended
from rarefy.data.boxes.targets import rows_of
from rarefy.data.decoding import Decoded, Decoding, Key, Made, decoded_item, opened
from rarefy.data.items import Items, Picture
from rarefy.data.normalization import Normalization
from rarefy.data.targets import Target
from rarefy.errors import DataError

_WIDTH = 7  # and height: of a row of ``scenes.py``


@dataclass(frozen=True)
class BoxShaping:
    """given: what the detector takes; None: nobody knows yet. variation: of training pictures."""

    given: Feed | None
    variation: Variation

    @property
    def feed(self) -> Feed:
        if self.given is None:
            raise DataError(
                "detection: of which family the model is does not show; say what it takes (size=, "
                "--image-size) so that its outputs are seen, or name the family: detector=NAME (--detector), see "
                "`rarefy list detectors`"
            )
        return self.given

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, *self.feed.size)

    @property
    def still(self) -> bool:
        return self.variation.still

    @functools.cached_property
    def normalization(self) -> Normalization:
        return Normalization(self.feed.mean, self.feed.std, self.feed.channels == "bgr")

    def decoder(self, source: Items) -> Decoding:
        return BoxDecoder(source, self.feed, self.variation)

    def resident(self, source: Items, device: torch.device, most: float) -> Resident | None:
        return resident(BoxDecoder(source, self.feed, self.variation), device, most)

    def describe(self) -> dict[str, object]:
        feed = self.feed
        return {
            "resize": feed.resize,
            "fill": list(feed.fill) if isinstance(feed.fill, tuple) else feed.fill,
            "centred": feed.centred,
            "antialias": feed.antialias,
            "channels": feed.channels,
            "mean": list(feed.mean),
            "std": list(feed.std),
            "augment": self.variation.text,
        }


@dataclass(frozen=True)
class BoxDecoder:
    """Items as inputs (3, H, W), uint8 or float in [0, 1], and rows (m + 1, 8), the last of which says no box."""

    source: Items
    feed: Feed
    variation: Variation

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Decoded:
        return decoded_item(self.source, key, self._decoded)

    def stacked(self, labels: Sequence[Target]) -> Tensor:
        """(N, M, 8), M being 1, 2, 4, 8, ...: few shapes, as each is compiled for."""
        rows = [torch.from_numpy(one) for one in labels if isinstance(one, np.ndarray)]
        most = max((len(one) - 1 for one in rows), default=1)
        batch = padded([one[:-1] for one in rows], TARGET_COLUMNS, 1 << max(0, most - 1).bit_length())
        batch[..., FACTOR] = torch.stack([one[-1, FACTOR] for one in rows])[:, None]
        return batch

    def picture(self, image: Picture, target: Target | None) -> tuple[Tensor, Tensor]:
        """As it is: (3, h, w), and its boxes (m, 7) in its own pixels."""
        return self._read(image, target, Faults())

    def _read(self, image: Picture, target: Target | None, faults: Faults) -> tuple[Tensor, Tensor]:
        rows = rows_of(target)
        stated = _stated(rows)
        found = opened(image, self.source.where, 3, functools.partial(_turned, stated=stated))
        pixels = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found).transpose(2, 0, 1).copy())
        height, width = pixels.shape[1:]
        if stated not in (None, (1, 1), (width, height)):
            raise ValueError(f"is {width}x{height}, and its annotations are of {stated[0]}x{stated[1]}")
        return pixels, _own(rows, width, height, faults)

    def _decoded(self, image: Picture, label: Target | None, draw: np.random.Generator | None) -> Made:
        faults = Faults()
        pixels, boxes = self._read(image, label, faults)
        if draw is not None:
            pixels, boxes = self.variation(pixels, boxes, self.feed, draw, self._another)
        inputs, where = placed(pixels, self.feed)
        inputs = inputs if draw is None else self.variation.coloured(inputs, draw)
        if label is None:
            return Made(inputs)
        targets = torch.zeros(len(boxes) + 1, TARGET_COLUMNS)
        targets[:-1, : AREA + 1] = boxes
        targets[:-1, : BOTTOM + 1] = where.boxes(boxes[:, : BOTTOM + 1])
        targets[:, FACTOR], targets[-1, CLASS] = where.factor, -1
        return Made(inputs, targets.numpy(), faults.counts or None)

    def _another(self, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A picture of the source at random; one that can't be read is grey, and told when its own turn comes."""
        try:
            return self.picture(*self.source.item(int(draw.integers(len(self.source)))))
        except Exception:
            return torch.full((3, *self.feed.size), 114, dtype=torch.uint8), torch.zeros(0, AREA + 1)


def _stated(rows: np.ndarray) -> tuple[int, int] | None:
    """(width, height) that the annotations are of; (1, 1) of shares; None where they do not say."""
    if not len(rows) or not rows[0, _WIDTH:].all():
        return None
    width, height = rows[0, _WIDTH:].tolist()
    return round(width), round(height)


def _turned(image: Image.Image, stated: tuple[int, int] | None) -> Image.Image:
    """As its EXIF says, unless its annotations were made without."""
    turned = ImageOps.exif_transpose(image)
    return image if stated == image.size and stated != turned.size else turned


def _own(rows: np.ndarray, width: int, height: int, faults: Faults) -> Tensor:
    """(m, 7) in the picture's pixels, within it: what has no area there is none, and counted."""
    if not len(rows):
        return torch.zeros(0, AREA + 1)
    shares = _stated(rows) == (1, 1)
    known = np.array(rows, np.float64)
    known[:, _WIDTH:] = (1, 1) if shares else (width, height)
    known, good = mended(known, lambda wrong: "", faults)
    boxes = torch.from_numpy(known[good, :_WIDTH].astype(np.float32))
    if shares:
        boxes[:, : BOTTOM + 1] *= torch.tensor([width, height] * 2, dtype=torch.float32)
    size = boxes[:, 2:4] - boxes[:, :2]
    stated = boxes[:, AREA] > 0  # not of NaN
    boxes[:, AREA] = torch.where(stated, boxes[:, AREA], size.prod(1))
    boxes[:, IGNORED] = (boxes[:, IGNORED] > 0).float()
    return boxes[(size > 0).all(1)]
