"""The demo: a small network learns scikit-learn's 1,797 handwritten digits, is compressed, measured and signed.

Everything it needs comes with the packages, so it runs without a network. ``rarefy.demo:model`` is the network as a
source for the command line::

    rarefy demo -o demo-out
    rarefy evaluate demo-out/small --reference demo-out/original --data sklearn:digits
    rarefy verify demo-out/small --key demo-out/demo.key.pub
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rarefy.reports.facts import Facts

DATA = "sklearn:digits"
Options = Mapping[str, Any]  # keywords of a verb
TRAINING: Options = {"epochs": 8, "batch_size": 64, "lr": 0.1}
BUDGET: Options = {"max_drop": 0.005, "speedup": 1.5}
SMALLER = 8  # times, on disk
STEPS: tuple[Options, ...] = (
    {"do": "prune", "macs": 0.35, "round_to": 8},
    {"do": "distill", "epochs": 8, "batch_size": 64, "lr": 0.05},
    {"do": "quantize"},
)


class Net(nn.Module):
    """Five convolutions, one of them residual, for images of (1, 8, 8)."""

    def __init__(self, classes: int = 10, width: int = 64):
        super().__init__()
        self.stem = _block(1, width)
        self.first = _block(width, width)
        self.second = _block(width, 2 * width)
        self.third = _block(2 * width, 2 * width)
        self.fourth = _block(2 * width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.first(self.stem(images)))
        x = self.second(x)
        x = self.pool(x + self.third(x))
        logits: Tensor = self.head(self.fourth(x).mean((2, 3)))
        return logits


def model(classes: int = 10, width: int = 64) -> Net:
    """The demo's network, untrained."""
    return Net(classes, width)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def demonstrate(folder: str | os.PathLike[str], seed: int = 0) -> Facts:
    """Train, compress, save, sign; returns the report's facts.

    folder: where ``original/``, ``small/`` and a pair of keys are left.
    """
    from rarefy.artifact import folder as folder_
    from rarefy.artifact import signing
    from rarefy.compression import budget, compress
    from rarefy.distillation import distill
    from rarefy.evaluation import measure
    from rarefy.graph import capture
    from rarefy.tasks.classification import Classification

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    task = Classification(train=DATA, val=DATA, augment="crop=1")
    torch.manual_seed(seed)
    untrained = capture.capture(model(), torch.zeros(2, *task.data.input_shape))
    original = distill.train(untrained, task, **TRAINING, seed=seed, checkpoint=place / "train.work")
    folder_.save(original, place / "original", manifest={"model": "rarefy.demo:model", "task": task.describe()})
    result = compress.compress(
        original,
        task,
        budget=budget.Budget(**BUDGET, size=measure.weight_bytes(original) // SMALLER),
        steps=STEPS,
        workdir=place / "compress.work",
        seed=seed,
        title="rarefy.demo:model on sklearn:digits",
    )
    result.save(place / "small")
    key = place / "demo.key"
    if not key.exists():
        signing.keygen(key)
    signing.sign(place / "small", key)
    for work in ("train.work", "compress.work"):
        shutil.rmtree(place / work, ignore_errors=True)
    return result.report
