"""Three detectors with weights for COCO, as they are fed, read and judged: FastestDet (built here, with its authors'
weights), YOLOX-Nano and NanoDet-m (ONNX files).

On the first 128 images of COCO val2017, in float: FastestDet AP 19.1, YOLOX-Nano 34.2, NanoDet-m 25.2.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import batched_nms

from bench import real_data
from rarefy.errors import DataError, MissingDependency

Array = np.ndarray
Boxes = tuple[Array, Array, Array]  # (n, 4) left, top, right, bottom in pixels of the picture; (n,) scores, classes
MOST = 300  # boxes of one picture
LEAST_SCORE, CANDIDATES = 0.001, 3000


def coco_val() -> tuple[list[str], dict[str, object]]:
    """128 pictures and COCO's own description of what is to be seen on them."""
    folder = real_data.data_folder() / "coco_val128"
    if not (folder / "instances.json").is_file():
        raise DataError(f"{folder}: has no instances.json; RAREFY_DATA must hold the whole data set")
    truth = json.loads((folder / "instances.json").read_text())
    return [str(folder / "images" / one["file_name"]) for one in truth["images"]], truth


# ---- pictures, as each of them is fed: (3, side, side) float32, BGR


def bgr(path: str) -> Array:
    with Image.open(path) as picture:
        return np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])


def resized(picture: Array, height: int, width: int) -> Array:
    """Plain bilinear: four neighbours, without antialiasing. uint8 in and out, as OpenCV does it."""
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
    return planes.round().clamp(0, 255).permute(1, 2, 0).numpy()


def fastestdet_input(path: str) -> Array:
    return resized(bgr(path), 352, 352).transpose(2, 0, 1) / np.float32(255)


def nanodet_input(path: str) -> Array:
    mean, std = np.float32([103.53, 116.28, 123.675]), np.float32([57.375, 57.12, 58.395])
    return ((resized(bgr(path), 320, 320) - mean) / std).transpose(2, 0, 1)


def yolox_ratio(height: int, width: int) -> float:
    return min(416 / height, 416 / width)


def yolox_input(path: str) -> Array:
    picture = bgr(path)
    ratio = yolox_ratio(*picture.shape[:2])
    height, width = (int(side * ratio) for side in picture.shape[:2])
    canvas = np.full((416, 416, 3), 114, np.float32)
    canvas[:height, :width] = resized(picture, height, width)
    return canvas.transpose(2, 0, 1)


# ---- answers of one picture, as boxes


def suppressed(boxes: Array, scores: Array, classes: Array, threshold: float) -> Boxes:
    """Non-maximum suppression, each class by itself."""
    places = np.flatnonzero(scores > LEAST_SCORE)
    places = places[np.argsort(-scores[places], kind="stable")][:CANDIDATES]
    boxes, scores, classes = boxes[places], scores[places], classes[places]
    given = (torch.from_numpy(np.ascontiguousarray(one)) for one in (np.float32(boxes), np.float32(scores), classes))
    best = batched_nms(*given, threshold)[:MOST].numpy()
    return boxes[best], scores[best], classes[best]


def every_class(boxes: Array, scores: Array, threshold: float) -> Boxes:
    """scores: (n, classes); a place may hold several classes."""
    place, one = np.nonzero(scores > LEAST_SCORE)
    return suppressed(boxes[place], scores[place, one], one, threshold)


def fastestdet_boxes(outputs: Sequence[Array], height: int, width: int) -> Boxes:
    objectness, box, classes = (part.reshape(len(part), -1).T for part in np.split(outputs[0], [1, 5]))
    side = outputs[0].shape[-1]
    y, x = np.divmod(np.arange(side * side), side)
    sigmoid = lambda value: 1 / (1 + np.exp(-value.astype(np.float64)))
    cx, cy = (np.tanh(box[:, 0]) + x) / side, (np.tanh(box[:, 1]) + y) / side
    w, h = sigmoid(box[:, 2]), sigmoid(box[:, 3])
    corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1) * np.array([width, height, width, height])
    scores = np.clip(objectness[:, 0], 0, None) ** 0.6 * np.clip(classes.max(1), 0, None) ** 0.4
    return suppressed(corners, scores, classes.argmax(1), 0.45)


@functools.cache
def yolox_grid() -> tuple[Array, Array]:
    places, strides = [], []
    for stride in (8, 16, 32):
        side = 416 // stride
        y, x = np.divmod(np.arange(side * side), side)
        places.append(np.stack([x, y], 1))
        strides.append(np.full((side * side, 1), stride))
    return np.concatenate(places), np.concatenate(strides)


def yolox_boxes(outputs: Sequence[Array], height: int, width: int) -> Boxes:
    answer = outputs[0].astype(np.float64)
    places, strides = yolox_grid()
    centre, size = (answer[:, :2] + places) * strides, np.exp(np.clip(answer[:, 2:4], None, 20)) * strides
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1) / yolox_ratio(height, width)
    return every_class(boxes, answer[:, 4:5] * answer[:, 5:], 0.65)


def nanodet_boxes(outputs: Sequence[Array], height: int, width: int) -> Boxes:
    """outputs: classes of strides 8, 16, 32, then distances of these."""
    boxes, scores = [], []
    for stride, classes, bins in zip((8, 16, 32), outputs[:3], outputs[3:], strict=True):
        side = 320 // stride
        y, x = np.divmod(np.arange(side * side), side)
        centres = np.stack([x, y], 1) * stride + stride / 2
        likely = np.exp(bins.reshape(-1, 4, 8) - bins.reshape(-1, 4, 8).max(-1, keepdims=True))
        far = (likely / likely.sum(-1, keepdims=True)) @ np.arange(8) * stride
        boxes.append(np.concatenate([centres - far[:, :2], centres + far[:, 2:]], 1))
        scores.append(classes)
    scale = np.array([width, height, width, height]) / 320
    return every_class(np.clip(np.concatenate(boxes), 0, 320) * scale, np.concatenate(scores), 0.6)


def average_precision(outputs: Sequence[Array], boxes_of: Callable[[Sequence[Array], int, int], Boxes]) -> float:
    """COCO's AP, in percent, on as many of the pictures as there are answers. outputs: (N, ...) each."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDependency("pycocotools", "bench") from error
    truth = coco_val()[1]
    pictures, names = truth["images"][: len(outputs[0])], sorted(one["id"] for one in truth["categories"])
    found = []
    for index, picture in enumerate(pictures):
        for box, score, one in zip(
            *boxes_of([part[index] for part in outputs], picture["height"], picture["width"]), strict=True
        ):
            corner, size = box[:2], box[2:] - box[:2]
            found.append(
                {
                    "image_id": picture["id"],
                    "category_id": names[int(one)],
                    "bbox": [float(value) for value in (*corner, *size)],
                    "score": float(score),
                }
            )
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        judged = COCOeval(coco, coco.loadRes(found), "bbox")
        judged.params.imgIds = [picture["id"] for picture in pictures]
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return 100 * float(judged.stats[0])


# ---- FastestDet: input (N, 3, 352, 352), output (N, 85, 22, 22): objectness, 4 box values, 80 classes


def _convolution(width_in: int, width: int, kernel: int = 1, stride: int = 1, *, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width)]


class ShuffleBlock(nn.Module):
    """Stride 1: even channels straight through, odd ones through the branch. Stride 2: all through both."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.stride, inner = stride, width // 2
        self.branch_main = nn.Sequential(
            *_convolution(width_in, inner),
            nn.ReLU(),
            *_convolution(inner, inner, 3, stride, groups=inner),
            *_convolution(inner, width - width_in if stride == 2 else inner),
            nn.ReLU(),
        )
        if stride == 2:
            self.branch_proj = nn.Sequential(
                *_convolution(width_in, width_in, 3, 2, groups=width_in), *_convolution(width_in, width_in), nn.ReLU()
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        batch, channels, height, width = x.shape
        pairs = x.reshape(batch, channels // 2, 2, height, width).transpose(1, 2)
        return torch.cat([pairs[:, 0], self.branch_main(pairs[:, 1])], 1)


class ShuffleBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_convolution(3, 24, 3, 2), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width_in = 24
        for stage, (blocks, width) in enumerate([(4, 48), (8, 96), (4, 192)], 2):
            first = ShuffleBlock(width_in, width, 2)
            others = [ShuffleBlock(width // 2, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"stage{stage}", nn.Sequential(first, *others))
            width_in = width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.maxpool(self.first_conv(x))
        p1 = self.stage2(x)
        p2 = self.stage3(p1)
        return p1, p2, self.stage4(p2)


class Conv1x1(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv1x1 = nn.Sequential(*_convolution(width_in, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x)


class Branch(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        depthwise = _convolution(width_in, width_in, 5, groups=width_in)
        self.conv5x5 = nn.Sequential(*depthwise, nn.ReLU(), *_convolution(width_in, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5x5(x)


class PyramidPooling(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.Conv1x1 = Conv1x1(width_in, width)
        for count in (1, 2, 3):
            layers = [(*_convolution(width, width, 5, groups=width), nn.ReLU()) for _ in range(count)]
            setattr(self, f"S{count}", nn.Sequential(*(layer for group in layers for layer in group)))
        self.output = nn.Sequential(*_convolution(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


class Head(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.conv1x1 = Conv1x1(width, width)
        self.obj_layers, self.reg_layers, self.cls_layers = Branch(width, 1), Branch(width, 4), Branch(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1x1(x)
        parts = [self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(1)]
        return torch.cat(parts, 1)


class FastestDet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = ShuffleBackbone()
        self.SPP = PyramidPooling(336, 96)
        self.detect_head = Head(96, 80)
        self.avg_pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        p1, p2, p3 = self.backbone(x)
        p = torch.cat([self.avg_pool(p1), p2, F.interpolate(p3, scale_factor=2.0, mode="nearest")], 1)
        return self.detect_head(self.SPP(p))


def fastestdet() -> FastestDet:
    """With its authors' weights for COCO, in eval mode."""
    model = FastestDet()
    model.load_state_dict(load_file(detector_file("fastestdet_coco.safetensors")))
    return model.eval()


def detector_file(name: str) -> Path:
    file = real_data.data_folder() / "detectors" / name
    if not file.is_file():
        raise DataError(f"{file}: no such file; RAREFY_DATA must hold the whole data set")
    return file
