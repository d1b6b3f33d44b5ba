"""Detection: boxes around the things on a picture, each of a class; models are judged by COCO's average precision.

Pictures and boxes come from ``coco:IMAGES?annotations=FILE``, ``yolo:data.yaml``, ``voc:FOLDER``, or a dataset of
(image, {"boxes": (m, 4), "labels": (m,)}). How pictures are fed, how outputs become boxes, and the loss are the
model's family's (``detector.py``), which is found by the model itself; the metric is ``metrics/box_precision.py``.
Targets are boxes in pixels of the input, (N, M, 8), see ``rarefy/data/boxes/boxes.py``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from rarefy import plugins
from rarefy.data.boxes import scenes
from rarefy.data.boxes.augmentation import Variation, variation
from rarefy.data.boxes.decoding import BoxShaping
from rarefy.data.boxes.placement import Feed, placement
from rarefy.data.boxes.targets import BoxTargets
from rarefy.data.images import ImageData, share_opened
from rarefy.data.items import Items
from rarefy.data.normalization import Values, check_values
from rarefy.errors import DataError, InputError
from rarefy.tasks import places
from rarefy.tasks.answers import Answer, around
from rarefy.tasks.detector import Detector, detector_of, found, proposes
from rarefy.tasks.metric import Metric, Outputs
from rarefy.tasks.metrics.box_precision import BoxPrecision

_PROPOSAL = ("proposal",)  # the one class of what a second look is to be taken at


@dataclass(frozen=True, eq=False, repr=False)
class Detection:
    """A data set to train on, one to judge on, and how pictures are fed to the model.

    train, val: a source (see ``rarefy/data/sources.py``); either may be left out.
    size: side of the model's square input in pixels; None: as the model is fed.
    mean, std: a value a channel in the model's order, of pixels from 0 to 1; None: the model's.
    augment: comma-separated ``flip``, ``scale=LEAST``, ``crop``, ``photometric``, ``mosaic``, ``mosaic=SHARE``; or
        "none" (``rarefy/data/boxes/augmentation.py``).
    workers: processes that decode files; 0: this one.
    strict: whatever is wrong with pictures or annotations is an error; False: what can be left out or mended is, and
        is counted; None: wrong boxes are mended and counted, and pictures that are not there or can't be read are an
        error.
    detector: the family of the model (``rarefy list detectors``); None: found by the model.

    Raises DataError where an option makes no sense, and, at first use of the data, for everything wrong with it.
    """

    train: object = None
    val: object = None
    size: int | None = None
    mean: Values = None
    std: Values = None
    augment: str = "flip,scale=0.5"
    workers: int = 0
    strict: bool | None = None
    detector: object = None

    name = "detection"
    teaching: ClassVar[str] = "quality + pkd"
    _family: ClassVar[Detector | None] = None  # of a task that is fitted to a model

    def __post_init__(self) -> None:
        check_values(self.mean, self.std, self.name)
        _ = self.data

    def __repr__(self) -> str:
        return repr(self.data)

    @functools.cached_property
    def data(self) -> ImageData:
        family = self._named
        known = None if family is None or proposes(family) else family.classes
        return ImageData(
            train=self.train, val=self.val, size=self.size, workers=self.workers, strict=self.strict,
            targets=BoxTargets(classes=known), task=self.name, shaping=self._shaping,
        )  # fmt: skip

    @property
    def _shaping(self) -> BoxShaping:
        varied = variation(self.augment, self.name) if self.augment else Variation()
        return BoxShaping(None if self._named is None else self._feed(self._named), varied)

    def _feed(self, family: Detector) -> Feed:
        feed = family.feed
        own: dict[str, object] = {} if self.size is None else {"size": (self.size, self.size)}
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                own[name] = tuple(np.broadcast_to(np.asarray(values, np.float64), 3).tolist())
        return dataclasses.replace(feed, **own)  # type: ignore[arg-type]

    @functools.cached_property
    def _named(self) -> Detector | None:
        """The family that the options name."""
        family: Detector | None = None if self.detector is None else plugins.resolve("detectors", self.detector)
        return family

    @property
    def family(self) -> Detector:
        """That of the model. Raises InputError where nobody knows it."""
        family = self._family or self._named
        if family is None:
            raise InputError(
                "detection: the model is of no family that is known "
                f"({', '.join(plugins.available('detectors'))}); name the one it is like: detector=NAME (--detector)"
            )
        return family

    def settled(self, model: nn.Module) -> Self:
        """The same task, its pictures fed as the model's family says, where nobody said otherwise."""
        if self.detector is not None:
            return self
        family = detector_of(model) or found(model)
        if family is None:
            return self
        settled = dataclasses.replace(self, detector=plugins.describe(family))
        share_opened(self.data, settled.data)
        return settled

    def fitted(self, makers: Outputs, meta: Mapping[str, object]) -> Self:
        """The same task, that knows the family of one model. meta: what its graph says of itself."""
        said = meta.get("detector")
        if said is None or said == self.detector:
            return self
        family: Detector = plugins.resolve("detectors", said)
        if self._named is not None and (self.mean, self.std) == (None, None):
            ours, theirs = self._named.feed, family.feed
            if (ours.channels, ours.mean, ours.std) != (theirs.channels, theirs.mean, theirs.std):
                raise InputError(
                    f"detection: a model of {said} is fed otherwise than one of {plugins.describe(self._named)} "
                    "(mean, std or order of channels), so they can't be given the same inputs; take two of one family"
                )
        fitted = copy.copy(self) if self.detector is not None else dataclasses.replace(self, detector=said)
        object.__setattr__(fitted, "_family", family)
        return fitted

    def boxes(self, outputs: Outputs) -> Tensor:
        """What the model found, (N, M, 6), in pixels of the input."""
        return self.family.boxes(outputs, self._size)

    def answers(
        self, outputs: Outputs, sizes: Sequence[tuple[int, int]], names: Sequence[str] | None, least: float
    ) -> list[list[Answer]]:
        """Of each picture its boxes, the surest first, in its own pixels. sizes: (H, W) of the pictures."""
        feed = self.data.shaping.feed if isinstance(self.data.shaping, BoxShaping) else self.family.feed
        rows = self.boxes(outputs).cpu()
        for one, size in zip(rows, sizes, strict=True):
            corners = placement(size, feed).back(one[:, :4]).clamp_min(0)
            one[:, :4] = torch.minimum(corners, corners.new_tensor([size[1], size[0]] * 2))
        return [around(one, _PROPOSAL if proposes(self.family) else names, least) for one in rows]

    def logits(self, outputs: Outputs) -> Tensor:
        """What a loss on logits compares, (N x places, classes)."""
        return self.family.logits(outputs)

    def compared(self, ours: Outputs, theirs: Outputs, guide: Detection) -> dict[str, tuple[Tensor, Tensor]]:
        """Scores, boxes and distances of student and teacher, as ``Comparing`` says. Raises InputError."""
        pair = [places.answers(one.family, said, one._size) for one, said in ((self, ours), (guide, theirs))]
        return places.compared(self.family, *pair)

    def loss(self, outputs: Outputs, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The family's, mean over the batch. targets: (N, M, 8). Raises InputError for smoothed labels."""
        if label_smoothing:
            raise InputError("detection: labels of boxes are not smoothed; pass label_smoothing=0")
        return self.family.loss(outputs, targets, self._size)

    def soft(self, targets: Tensor) -> Tensor:
        raise InputError(
            "detection: boxes of two pictures can't be blended; pass mixup=0 and cutmix=0, and augment=flip,mosaic "
            "(--augment) for pictures put together"
        )

    def metric(self) -> Metric:
        if proposes(self.family):
            return BoxPrecision(_PROPOSAL, self.boxes, classless=True)
        return BoxPrecision(self.class_names, self.boxes, self._doubts())

    def check(self, outputs: int | None) -> None:
        """Are there boxes of a class that the model does not know? Raises DataError."""
        family, names = self.family, self.class_names
        highest = _highest_class(self.data)
        if highest >= family.classes and not proposes(family):
            known = f"{names[highest]!r} " if names is not None else ""
            raise DataError(
                f"{self!r}: has boxes of class {known}({highest}, counted from 0), the model knows {family.classes} "
                "classes; pass a model for these classes"
            )

    def describe(self) -> dict[str, object]:
        """What a manifest says of the task: JSON-able, without the data."""
        about = self.data.describe()
        splits = {str(split): about.pop(split) for split in self.data.splits}
        classes: dict[str, object] = {}
        with contextlib.suppress(InputError):
            classes = {"detector": plugins.describe(self.family), "classes": self.family.classes}
        if self.class_names is not None:
            classes["class_names"] = list(self.class_names)
        return {"task": self.name, **about, **classes, **splits}

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the data has them."""
        sources = map(self.data.source, self.data.splits)
        names = [
            one for source in sources if isinstance(source, Items) for one in (source.names, _names(source)) if one
        ]
        return max(names, key=len) if names else None

    @property
    def _size(self) -> tuple[int, int]:
        shaping = self.data.shaping
        return self.family.feed.size if shaping is None else (shaping.shape[1], shaping.shape[2])

    def _doubts(self) -> tuple[str, ...]:
        names, classes = self.class_names, self.family.classes
        if names is None or len(names) == classes:
            return ()
        return (
            f"the model knows {classes} classes, the data has {len(names)}: class i of the data is compared with class "
            "i of the model; is that their order?",
        )

    # What the data tells and yields, for who asks the task.
    input_shape = property(lambda self: self.data.input_shape)
    length = property(lambda self: self.data.length)
    batches = property(lambda self: self.data.batches)


def _highest_class(data: ImageData) -> int:
    """Of the boxes, where they are known without decoding; else -1."""
    sources = [source for source in map(data.source, data.splits) if isinstance(source, Items)]
    tables = [source.items.rows for source in sources if isinstance(source.items, scenes.Scenes)]
    return max((int(rows[:, scenes.CLASS].max(initial=-1)) for rows in tables), default=-1)


def _names(source: Items) -> tuple[str, ...] | None:
    return source.targets.names if isinstance(source.targets, BoxTargets) else None
