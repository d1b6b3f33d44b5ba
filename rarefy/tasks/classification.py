"""Classification: each image is of one class; cross-entropy is minimised, and models are judged by top-1.

Images come from ``rarefy.data.images.ImageData``, which says what is done to them, and are read as class indices; the
metric is ``metrics/accuracy.py``. Where labels are rows (N, labels) of 0 and 1, several are true of an image at once:
then binary cross-entropy is minimised, and the metric is ``metrics/label_precision.py``. How a model's outputs are
read is in ``reading.py``.
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
import torch.nn.functional as F
from torch import Tensor

from rarefy.data.images import ImageData
from rarefy.data.items import Items
from rarefy.data.normalization import Values
from rarefy.data.targets import ClassIndices
from rarefy.errors import DataError
from rarefy.tasks import reading
from rarefy.tasks.answers import Answer, likeliest
from rarefy.tasks.metric import Metric, Outputs
from rarefy.tasks.metrics.accuracy import Accuracy
from rarefy.tasks.metrics.label_precision import LabelPrecision


@dataclass(frozen=True, eq=False, repr=False)
class Classification:
    """A data set to train on, one to judge on, and how images are prepared for the model.

    train, val: a source (see ``rarefy/data/sources.py``); either may be left out.
    size: side of the model's square input in pixels; None: the images' own, 224 for files of several sizes.
    channels: of the model's input: 1 or 3 of files; None: the arrays' own, 3 for files.
    class_count: number of classes, where it is not the number of folders or the largest label + 1.
    output: name of the model's output that is read, where it has several and none is called ``logits``.
    mean, std: one value a channel, or one for all.
    crop: fraction of the resized image that evaluation sees (files only); None: see ``rarefy/data/preparation.py``.
    augment: comma-separated ``crop``, ``crop=PIXELS``, ``flip``, ``scale=LEAST_AREA``, ``erase=PIXELS``; or "none".
    interpolation: nearest, bilinear or bicubic.
    workers: processes that decode files; 0: this one.
    strict: an unreadable image is an error, not left out; None: so it is, but in shards and Parquet files.

    Raises DataError where an option makes no sense, and, at first use of the data, for everything wrong with it.
    """

    train: object = None
    val: object = None
    size: int | None = None
    channels: int | None = None
    class_count: int | None = None
    mean: Values = None
    std: Values = None
    crop: float | None = None
    augment: str = "crop,flip"
    interpolation: str = "bilinear"
    workers: int = 0
    strict: bool | None = None
    output: str | None = None

    name = "classification"
    _ends_in: ClassVar[reading.Ending | None] = None  # of a task that is fitted to a model

    def __post_init__(self) -> None:
        count = self.class_count
        _ = self.data
        if count is not None and (not isinstance(count, int) or count < 1):
            raise DataError(f"classification: class_count={count!r} is not a positive whole number")

    def __repr__(self) -> str:
        return repr(self.data)

    # -- what a task is

    @functools.cached_property
    def data(self) -> ImageData:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options.pop("output")
        targets = ClassIndices(options.pop("class_count"))
        return ImageData(**options, targets=targets, task=self.name)

    def fitted(self, makers: Outputs, meta: Mapping[str, object] | None = None) -> Self:
        """The same task, that knows what such a model ends in."""
        ends_in = reading.ending(makers, self.output)
        self._told(ends_in)
        fitted = copy.copy(self)
        object.__setattr__(fitted, "_ends_in", ends_in)
        return fitted

    def logits(self, outputs: Outputs) -> Tensor:
        """What teacher and student are compared by: logits (N, classes).

        Where several labels are true at once (N labels, 2), of each label that it is false, and that it is true.
        """
        logits = self._read(outputs)
        return reading.logits_of(logits.reshape(-1, 1), "logits") if self.multilabel else logits

    def _read(self, outputs: Outputs, ends_in: reading.Ending | None = None) -> Tensor:
        """Logits (N, classes), or (N, labels). Raises OutputError for what are none, or not clearly one output."""
        known, values = ends_in or self._ends_in or "logits", reading.chosen(outputs, self.output)
        return reading.logits_of(values, known, pairs=not self.multilabel)

    def loss(self, outputs: Outputs, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy. targets: int64 (N,), or probabilities (N, classes).

        Where several labels are true at once the mean binary cross-entropy; targets: (N, labels) of 0 to 1. Raises
        DataError for what are no logits, and for a label that has no output.
        """
        _check_targets(self, targets, (logits := self._read(outputs)).shape[1])
        if self.multilabel:
            if logits.shape != targets.shape:
                raise DataError(f"{self!r}: the model has {logits.shape[1]} outputs for {targets.shape[1]} labels")
            smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smoothed.to(logits.dtype))
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def soft(self, targets: Tensor) -> Tensor:
        """Class indices (N,) as probabilities (N, classes) float32, which can be blended."""
        return F.one_hot(targets, max(self.classes, 2)).float() if targets.dim() == 1 else targets

    def metric(self) -> Metric:
        read = functools.partial(self._judged, reading.Guess())
        if self.multilabel:
            return LabelPrecision(self.class_names, read)
        return Accuracy(self.class_names, self.class_count, self.check, read)

    def answers(
        self, outputs: Outputs, sizes: Sequence[tuple[int, int]], names: Sequence[str] | None, least: float
    ) -> list[list[Answer]]:
        """Of each picture the five likeliest classes, however unlikely."""
        logits = self._judged(reading.Guess(), outputs).float()
        several = self._ends_in == "sigmoid" and reading.chosen(outputs, self.output).numel() > len(logits)
        return likeliest(logits.sigmoid() if several else logits.softmax(1), names)

    def _judged(self, guess: reading.Guess, outputs: Outputs) -> Tensor:
        """Logits; of a model that nobody fitted the task to, by how its answers look."""
        if self._ends_in is not None:
            return self._read(outputs)
        ends_in = guess.of(reading.logits_of(reading.chosen(outputs, self.output), "logits", pairs=False))
        self._told(ends_in)
        return self._read(outputs, ends_in)

    @functools.cached_property
    def _told(self) -> reading.Told:
        return reading.Told()

    def check(self, outputs: int | None) -> None:
        """Do the labels fit a model with that many outputs? Raises DataError if a label has no output.

        outputs: None of a model that answers otherwise than with one tensor (batch, N).
        """
        if outputs is None:
            raise DataError(
                "the model does not return one tensor (batch, classes); say which of its outputs is the classifier's "
                "(Classification(output=NAME)), or name the part that returns it with core= (--core)"
            )
        needed = self.classes if self.multilabel else self._highest_label + 1
        if needed > outputs and not (outputs == 1 and needed == 2):
            raise DataError(
                f"{self!r}: label {needed - 1} needs a model with at least {needed} outputs, "
                f"this one has {outputs}; pass a model for these classes{_from_one(self.data, outputs)}"
            )

    def describe(self) -> dict[str, object]:
        """What a manifest says of the task: JSON-able, without the data."""
        return _described(self)

    # -- the classes

    @functools.cached_property
    def classes(self) -> int:
        """How many: as given, or of the folders, or the largest label + 1. Raises DataError without labels."""
        if self.class_count is not None:
            return self.class_count
        names = self.class_names
        if self.multilabel:
            return self._label_count
        return len(names) if names is not None else self._highest_label + 1

    @functools.cached_property
    def _label_count(self) -> int:
        """Labels in a row, where several are true at once; 0: each image has one class."""
        for source in map(self.data.source, self.data.splits):
            if source.labels is not None:
                return source.labels.shape[1] if source.labels.dim() == 2 else 0
            if isinstance(source, Items) and source.store is None and len(source):
                label = source.item_or_none(0)[1]
                return len(label) if isinstance(label, np.ndarray) else 0
        return 0

    @property
    def multilabel(self) -> bool:
        """Are several labels true of an image at once?"""
        return self._label_count > 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the data has them."""
        names = [source.names for source in map(self.data.source, self.data.splits) if source.names is not None]
        return max(names, key=len) if names else None

    @functools.cached_property
    def _highest_label(self) -> int:
        highest = []
        for source in map(self.data.source, self.data.splits):
            if source.labels is not None:
                highest.append(int(source.labels.max()))
            elif isinstance(source, Items) and source.store is None:
                labels = (source.item_or_none(index)[1] for index in range(len(source)))
                highest.append(max((int(label) for label in labels if label is not None), default=-1))
        if max(highest, default=-1) < 0:
            raise DataError(
                f"{self!r}: has no labels, so the number of classes is unknown; pass labelled data, or class_count="
            )
        return max(highest)

    # What the data tells and yields, for who asks the task.
    input_shape = property(lambda self: (self._label_count, self.data.input_shape)[1])  # both of the first image
    length = property(lambda self: self.data.length)
    steps = property(lambda self: self.data.steps)
    labelled = property(lambda self: self.data.labelled)
    unreadable = property(lambda self: self.data.unreadable)
    fingerprint = property(lambda self: self.data.fingerprint)
    batches = property(lambda self: self.data.batches)
    rows = property(lambda self: self.data.rows)
    inputs = property(lambda self: self.data.inputs)
    normalize = property(lambda self: self.data.normalize)
    denormalize = property(lambda self: self.data.denormalize)


def _check_targets(task: Classification, targets: Tensor, outputs: int) -> None:
    """Raises DataError for a label that has no output; on a GPU not, where it would wait for the device."""
    if not task.multilabel and not targets.is_cuda and targets.numel():
        needed = int(targets.max()) + 1 if targets.dim() == 1 else targets.shape[1]
        if needed > outputs:
            task.check(outputs)


def _described(task: Classification) -> dict[str, object]:
    about = task.data.describe()
    splits = {str(split): about.pop(split) for split in task.data.splits}
    classes: dict[str, object] = {}
    with contextlib.suppress(DataError):  # unlabelled
        classes["classes"] = task.classes
        if task.class_names is not None:
            classes["class_names"] = list(task.class_names)
    return {"task": task.name, **about, **classes, **splits}


def _from_one(data: ImageData, outputs: int) -> str:
    """What an error adds where labels seem to count from 1."""
    known = [source.labels for source in map(data.source, data.splits) if source.labels is not None]
    from_one = known and all(0 < int(labels.min()) <= int(labels.max()) <= outputs for labels in known)
    return ", or count labels from 0 (labels - 1)" if from_one else ""
