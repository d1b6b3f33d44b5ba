"""The demo of detection: circles, squares and triangles are drawn on noise, found, and found again in a third of the
time.

Pictures are drawn when they are asked for, each by its number alone. ``rarefy.demo.shapes:model`` and
``rarefy.demo.shapes:pictures`` are sources for the command line::

    rarefy demo --task detection -o demo-out
    rarefy evaluate demo-out/small --reference demo-out/original --task detection --data rarefy.demo.shapes:pictures
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

if TYPE_CHECKING:
    from rarefy.demo import Demo

DATA = "rarefy.demo.shapes:pictures"
NAMES = ("circle", "square", "triangle")
SIDE, TRAINED_ON, JUDGED_ON = 96, 1200, 300


class Pictures:
    """(picture (H, W, 3) uint8, {"boxes": (m, 4), "labels": (m,)}) by number."""

    def __init__(self, count: int, first: int):
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = np.random.default_rng(self.first + index)
        noise = draw.normal(0, 12, (SIDE, SIDE, 3)) + draw.uniform(60, 190, 3)
        image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(int(draw.integers(1, 5))):
            side = int(draw.integers(14, 40))
            left, top = (int(place) for place in draw.integers(0, SIDE - side, 2))
            box = (left, top, left + side, top + side)
            if any(_near(box, other) for other in boxes):
                continue
            label, colour = int(draw.integers(3)), tuple(int(value) for value in draw.integers(0, 256, 3))
            _draw(pen, label, box, colour)
            boxes.append(box)
            labels.append(label)
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return np.asarray(image), {"boxes": found, "labels": torch.tensor(labels, dtype=torch.int64)}


def pictures(split: str = "train") -> Pictures:
    """Those of a split."""
    return Pictures(TRAINED_ON, 0) if split == "train" else Pictures(JUDGED_ON, 1_000_000)


def _near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) - 2 and min(one[3], other[3]) > max(one[1], other[1]) - 2


def _draw(pen: ImageDraw.ImageDraw, label: int, box: tuple[int, int, int, int], colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if label == 0:
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif label == 1:
        pen.rectangle((left, top, right, bottom), fill=colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Finder(nn.Module):
    """A detector of one box a place of two grids (strides 8 and 16), with a head as YOLOX has it (2107.08430)."""

    def __init__(self, classes: int = len(NAMES), width: int = 32):
        super().__init__()
        self.stem = nn.Sequential(_block(3, width // 2, 2), _block(width // 2, width, 2), _block(width, width))
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width)),
                nn.Sequential(_block(2 * width, 3 * width, 2), _block(3 * width, 3 * width)),
            ]
        )
        self.necks = nn.ModuleList([_block(times * width, 2 * width) for times in (2, 3)])
        self.heads = nn.ModuleList([_Head(2 * width, classes) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x, levels = self.stem(x), []
        for stage, neck, head in zip(self.stages, self.necks, self.heads, strict=True):
            x = stage(x)
            levels.append(head(neck(x)).flatten(2))
        return torch.cat(levels, 2).permute(0, 2, 1)


class _Head(nn.Module):
    """(N, channels, H, W) -> (N, 4 + 1 + classes, H, W)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.place, self.kind = _block(channels, channels), _block(channels, channels)
        self.box, self.sure = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 1, 1)
        self.classes = nn.Conv2d(channels, classes, 1)
        for layer in (self.sure, self.classes):  # at first hardly anything is seen
            assert layer.bias is not None
            nn.init.constant_(layer.bias, -4.6)

    def forward(self, x: Tensor) -> Tensor:
        place, kind = self.place(x), self.kind(x)
        return torch.cat([self.box(place), self.sure(place).sigmoid(), self.classes(kind).sigmoid()], 1)


def model(classes: int = len(NAMES), width: int = 32) -> Finder:
    """The demo's detector, untrained."""
    return Finder(classes, width)


def demo(seed: int = 0) -> Demo:
    """What is shown; the seed is of the first weights."""
    from rarefy import plugins
    from rarefy.demo import Demo
    from rarefy.tasks.detection import Detection

    torch.manual_seed(seed)
    family = plugins.resolve("detectors", f"yolox:classes={len(NAMES)},size={SIDE}/{SIDE},strides=8/16")
    return Demo(
        task=Detection(train=DATA, val=DATA, augment="flip", detector=family),
        model=model(),
        source="rarefy.demo.shapes:model",
        title="rarefy.demo.shapes:model on drawn shapes",
        training={"epochs": 12, "batch_size": 32, "lr": 0.02},
        steps=(
            {"do": "prune", "macs": 0.4, "round_to": 8},
            {"do": "distill", "epochs": 8, "batch_size": 32, "lr": 0.01},
            {"do": "quantize"},
        ),
        budget={"max_drop": 0.02, "speedup": 1.5},
        smaller=6,
    )
