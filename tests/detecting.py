"""Detectors of the tests, each the smallest that ends as its family does, on a pyramid of a few channels."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def step(width_in: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


class Pyramid(nn.Module):
    """(N, 3, H, W) -> maps of strides 8, 16, 32, each with what the next one says added to it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(step(3, width, 2), step(width, width, 2))
        self.stages = nn.ModuleList([step(width, width, 2), step(width, 2 * width, 2), step(2 * width, 3 * width, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(times * width, width, 1) for times in (1, 2, 3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage, lateral in zip(self.stages, self.lateral):
            x = stage(x)
            maps.append(lateral(x))
        for above, below in ((2, 1), (1, 0)):
            maps[below] = maps[below] + F.interpolate(maps[above], scale_factor=2.0, mode="nearest")
        return maps


class Levels(nn.Module):
    """A pyramid, and of each of its maps a branch of a few channels to each of ``ends``."""

    def __init__(self, ends: list[int], width: int = 8):
        super().__init__()
        self.pyramid = Pyramid(width)
        self.branches = nn.ModuleList(
            nn.ModuleList(nn.Sequential(step(width, width), nn.Conv2d(width, end, 1)) for end in ends) for _ in range(3)
        )

    def levels(self, x: Tensor) -> list[list[Tensor]]:
        return [[one(level) for one in branch] for level, branch in zip(self.pyramid(x), self.branches)]


class GridHead(Levels):
    """As YOLOX exports: (N, places, 5 + classes)."""

    def __init__(self, classes: int = 3, width: int = 8):
        super().__init__([4, 1, classes], width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [torch.cat([a, b.sigmoid(), c.sigmoid()], 1) for a, b, c in self.levels(x)]
        return torch.cat([one.flatten(2) for one in maps], 2).permute(0, 2, 1)


class BinHead(Levels):
    """As NanoDet exports: classes of three strides, then distances of these; or all in one."""

    def __init__(self, classes: int = 3, bins: int = 8, joined: bool = False, width: int = 8):
        super().__init__([classes, 4 * bins], width)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        pairs = [(a.sigmoid().flatten(2), b.flatten(2)) for a, b in self.levels(x)]
        if self.joined:
            return torch.cat([torch.cat(pair, 1) for pair in pairs], 2).permute(0, 2, 1)
        return tuple(pair[part].permute(0, 2, 1) for part in (0, 1) for pair in pairs)


class SoftmaxHead(nn.Module):
    """As FastestDet: (N, 5 + classes, rows, columns) of one stride."""

    def __init__(self, classes: int = 3, width: int = 8):
        super().__init__()
        self.pyramid = Pyramid(width)
        self.branches = nn.ModuleList(
            nn.Sequential(step(width, width), nn.Conv2d(width, end, 1), nn.BatchNorm2d(end)) for end in (1, 4, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        level = self.pyramid(x)[1]
        found, box, kind = (branch(level) for branch in self.branches)
        return torch.cat([found.sigmoid(), box, kind.softmax(1)], 1)


class Backbone(nn.Module):
    """A pyramid as torchvision's detectors take it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.out_channels = width
        self.pyramid = Pyramid(width)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(place), level) for place, level in enumerate(self.pyramid(x)))


def torchvision_detector(name: str, classes: int = 3) -> nn.Module:
    """Of torchvision's class: labels 1 to ``classes``, heads that say something, pictures of 96 to 128 pixels."""
    tv = torchvision.models.detection
    sizes = {"min_size": 96, "max_size": 128}
    three = (((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    anchors = tv.anchor_utils.AnchorGenerator
    if name == "ssd":
        boxes = tv.anchor_utils.DefaultBoxGenerator([[2], [2, 3], [2]], steps=[8, 16, 32])
        head = tv.ssd.SSDHead([8] * 3, boxes.num_anchors_per_location(), classes + 1)
        model = tv.ssd.SSD(Backbone(), boxes, (96, 64), classes + 1, head=head)
    elif name == "retinanet":
        model = tv.RetinaNet(Backbone(), classes + 1, anchor_generator=anchors(*three), **sizes)
    elif name == "fcos":
        generator = anchors(((8,), (16,), (32,)), ((1.0,),) * 3)
        model = tv.FCOS(Backbone(64), classes + 1, anchor_generator=generator, **sizes)
    else:
        crops = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 3, 2)
        model = tv.FasterRCNN(
            Backbone(), rpn_anchor_generator=anchors(*three), box_roi_pool=crops,
            box_head=tv.faster_rcnn.TwoMLPHead(8 * 9, 16),
            box_predictor=tv.faster_rcnn.FastRCNNPredictor(16, classes + 1), **sizes,
        )  # fmt: skip
    for part, value in model.named_parameters():
        if "head" in part and value.dim() == 4:
            nn.init.kaiming_normal_(value)
        elif part.endswith("cls_logits.bias"):
            nn.init.zeros_(value)
    return model.eval()
