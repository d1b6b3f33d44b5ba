"""Detector: what a family of detectors has in common, so that the task and the steps need not know any.

A detector is a **core**, which is one graph of tensors in and out (backbone, neck and head) and is what is pruned,
distilled and quantised, and what stays around it as it is: how pictures are fed, how outputs become boxes (anchors,
decoding, non-maximum suppression), and the loss. A family is a file of ``detectors/``: a frozen dataclass whose fields
(numbers, words, tuples of them) are all that it must know to read the core's outputs, so it is also a line of text,
``"yolox:classes=80"``, which the graph keeps as ``graph.meta["detector"]`` and a saved folder its manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, Self

from torch import Tensor, nn

from rarefy.tasks.metric import Outputs

Resize = Literal["stretch", "letterbox"]


@dataclass(frozen=True)
class Feed:
    """How a picture becomes a core's input.

    size: (H, W) of the input. resize: "stretch" to it, or "letterbox": as large as fits, the sides kept in proportion,
    the rest filled with ``fill`` (0 to 255). centred: the picture in the middle; else at the top left. channels: their
    order. mean, std: of channels in that order, of values 0 to 1. antialias: of the resizing.
    """

    size: tuple[int, int]
    resize: Resize = "stretch"
    fill: float = 0.0
    centred: bool = False
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    antialias: bool = True


class Detector(Protocol):
    """A family, with what is to be known of one of its models."""

    @property
    def classes(self) -> int:
        """How many classes a box can be of; a background is none."""
        ...

    @property
    def feed(self) -> Feed: ...

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The family of a user's module, or of a graph (of an ONNX file) by its outputs; None where it is another."""
        ...

    def core(self, model: nn.Module) -> nn.Module:
        """What is captured of a user's module: inputs (N, 3, H, W), as ``feed`` makes them, to the outputs."""
        ...

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        """A copy of the user's module, called as it is, with another core (same outputs) in it."""
        ...

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        """What was found, (N, M, 6), as ``rarefy/data/boxes/boxes.py`` says. size: (H, W) of the input.

        NaN and infinity are no box. Raises OutputError for outputs that are not the family's.
        """
        ...

    def logits(self, outputs: Outputs) -> Tensor:
        """What a loss on logits compares: (N x places, classes) as softmax takes them, or pairs of a sigmoid's."""
        ...

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        """Mean over the batch, to be minimised. targets: (N, M, 8). size: (H, W) of the input."""
        ...
