"""The demo: a small network learns scikit-learn's 1,797 handwritten digits, is compressed, measured and signed.

Everything it needs comes with the packages, so it runs without a network. ``rarefy.demo:model`` is the network as a
source for the command line::

    rarefy demo -o demo-out
    rarefy evaluate demo-out/small --reference demo-out/original --data sklearn:digits
    rarefy verify demo-out/small --key demo-out/demo.key.pub
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rarefy.demo import Demo

DATA = "sklearn:digits"


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


def demo(seed: int = 0) -> Demo:
    """What is shown; the seed is of the first weights."""
    from rarefy.demo import Demo
    from rarefy.tasks.classification import Classification

    torch.manual_seed(seed)
    return Demo(
        task=Classification(train=DATA, val=DATA, augment="crop=1"),
        model=model(),
        source="rarefy.demo:model",
        title="rarefy.demo:model on sklearn:digits",
        training={"epochs": 8, "batch_size": 64, "lr": 0.1},
        steps=(
            {"do": "prune", "macs": 0.35, "round_to": 8},
            {"do": "distill", "epochs": 8, "batch_size": 64, "lr": 0.05},
            {"do": "quantize"},
        ),
    )
