"""Classification: each image is of one class; cross-entropy is minimised, and models are judged by top-1.

Images come from ``rarefy.data.images.ImageData``, which says what is done to them, and are read as class indices; the
metric is ``metrics/accuracy.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rarefy.data.images import ImageData
from rarefy.data.items import Items
from rarefy.data.normalization import Values
from rarefy.data.targets import ClassIndices
from rarefy.errors import DataError
from rarefy.tasks.metric import Outputs
from rarefy.tasks.metrics.accuracy import Accuracy


@dataclass(frozen=True, eq=False, repr=False)
class Classification:
    """A data set to train on, one to judge on, and how images are prepared for the model.

    train, val: a source (see ``rarefy/data/sources.py``); either may be left out.
    size: side of the model's square input in pixels; None: the images' own, 224 for files of several sizes.
    channels: of the model's input: 1 or 3 of files; None: the arrays' own, 3 for files.
    class_count: number of classes, where it is not the number of folders or the largest label + 1.
    mean, std: one value a channel, or one for all.
    crop: fraction of the resized image that evaluation sees (files only); None: 0.875, but for files that are all of
        one size, and small enough to be cropped to ``size`` as they are, or smaller.
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

    name = "classification"

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
        targets = ClassIndices(options.pop("class_count"))
        return ImageData(**options, targets=targets, task=self.name)

    def loss(self, outputs: Outputs, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy. outputs: logits (N, classes); targets: int64 (N,), or probabilities (N, classes).

        Raises DataError for what are no logits.
        """
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise DataError(
                f"classification: the model returns {got}; a classifier returns logits (N, classes): "
                "name the part that does with core="
            )
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)

    def soft(self, targets: Tensor) -> Tensor:
        """Class indices (N,) as probabilities (N, classes) float32, which can be blended."""
        return F.one_hot(targets, self.classes).float() if targets.dim() == 1 else targets

    def metric(self) -> Accuracy:
        return Accuracy(self.class_names, self.class_count, self.check)

    def check(self, outputs: int | None) -> None:
        """Do the labels fit a model with that many outputs? Raises DataError if a label has no output.

        outputs: None of a model that answers otherwise than with one tensor (batch, N).
        """
        if outputs is None:
            raise DataError(
                "the model does not return one tensor (batch, classes); name the part that does with core= (--core)"
            )
        highest = self._highest_label
        if highest >= outputs:
            raise DataError(
                f"{self!r}: label {highest} needs a model with at least {highest + 1} outputs, "
                f"this one has {outputs}; pass a model for these classes"
            )

    def describe(self) -> dict[str, object]:
        """What a manifest says of the task: JSON-able, without the data."""
        about = self.data.describe()
        splits = {str(split): about.pop(split) for split in self.data.splits}
        classes: dict[str, object] = {}
        with contextlib.suppress(DataError):  # unlabelled
            classes["classes"] = self.classes
            if self.class_names is not None:
                classes["class_names"] = list(self.class_names)
        return {"task": self.name, **about, **classes, **splits}

    # -- the classes

    @functools.cached_property
    def classes(self) -> int:
        """How many: as given, or of the folders, or the largest label + 1. Raises DataError without labels."""
        if self.class_count is not None:
            return self.class_count
        names = self.class_names
        return len(names) if names is not None else self._highest_label + 1

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
    input_shape = property(lambda self: self.data.input_shape)
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
