"""Task and Data: what "as good" means, as the steps, the evaluation and the reports know it.

A task says what a model is to learn: which images (``data``), what is minimised (``loss``) and by what number models
are judged (``metric``). How outputs and targets are read, nobody else knows. ``classification.py`` is one; a task on
images whose targets are numbers is a class of a few lines around ``rarefy.data.images.ImageData``
(tests/tasks/test_other_tasks.py has two).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, fx, nn

from rarefy.data.items import Split
from rarefy.graph.nodes import is_graph
from rarefy.graph.signature import last_operators
from rarefy.tasks.metric import Metric, Outputs, Targets

Given = TypeVar("Given")


class Data(Protocol):
    """Images to learn from ("train") and to judge on ("val"), and what is known of each, as ``ImageData`` is."""

    @property
    def train(self) -> object:
        """What the training images come from; None: there are none."""
        ...

    @property
    def val(self) -> object: ...

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what ``batches`` yields."""
        ...

    def length(self, split: Split) -> int:
        """Number of images of the split."""
        ...

    def steps(self, split: Split, batch_size: int, *, limit: int | None = None, augment: bool = False) -> int:
        """How many batches an epoch has."""
        ...

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        augment: bool = False,
        epoch: int = 0,
        start: int = 0,
        device: torch.device | str = "cpu",
        labelled: bool = True,
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Yield (inputs (N, C, H, W) float32, normalised; targets), by (shuffle_seed, epoch, step) alone."""
        ...

    def images(
        self, split: Split, batch_size: int, *, limit: int | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Yield (images (N, C, H, W) float32 in [0, 1], targets) as for evaluation, before normalisation."""
        ...

    def normalize(self, images: Tensor) -> Tensor:
        """Images as ``images`` yields them, as the model takes them."""
        ...

    def rows(
        self, split: Split, batch_size: int, *, shuffle_seed: int | None = None, epoch: int = 0
    ) -> Sequence[Tensor] | None:
        """Which images each training batch holds; None where an image is another picture in every epoch."""
        ...

    def inputs(
        self, split: Split, count: int, batch_size: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """``count`` images chosen by the seed, prepared as for evaluation, in batches. Needs no targets."""
        ...

    def labelled(self, split: Split) -> bool:
        """Are there targets?"""
        ...

    def fingerprint(self, split: Split) -> str:
        """SHA-256 of the split's images and targets, as hex."""
        ...

    def describe(self) -> dict[str, object]:
        """What a manifest says of the data: JSON-able; of a split that is there, under its name."""
        ...

    def unreadable(self, split: Split) -> dict[str, object]:
        """What was left out so far: ``count`` and ``first``; empty if nothing was."""
        ...


class Task(Protocol):
    """Data, a loss, and a metric."""

    @property
    def name(self) -> str: ...

    @property
    def data(self) -> Data: ...

    def loss(self, outputs: Outputs, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """Mean over the batch, to be minimised. targets: as the data yields them, or as ``soft`` makes them."""
        ...

    def soft(self, targets: Targets) -> Tensor:
        """Targets as numbers (N, ...) float32, so that those of two images can be blended (mixup)."""
        numbers: Tensor = targets.float()
        return numbers

    def metric(self) -> Metric:
        """A new metric, that has seen nothing."""
        ...

    def check(self, outputs: int | None) -> None:
        """Does a model with outputs (N, ``outputs``) fit? None: with others. Raises DataError if it can't."""

    def describe(self) -> dict[str, object]:
        """What a manifest says of the task: JSON-able, ``{"task": name, ...}`` and what the data says."""
        return {"task": self.name, **self.data.describe()}


@runtime_checkable
class Reader(Protocol):
    """A task that reads outputs of several kinds: one of several by name, logits or probabilities."""

    def fitted(self, makers: Outputs, meta: Mapping[str, object]) -> Task:
        """The task for one model. makers: its outputs, with the name of the operator that makes each in its place.

        ("softmax", "linear"; "" where nobody knows.) meta: what its graph says of itself; nothing, where it is none.
        """
        ...

    def logits(self, outputs: Outputs) -> Tensor:
        """What of the outputs a loss on logits compares: (N, classes)."""
        ...


@runtime_checkable
class Settling(Protocol):
    """A task whose images go into the model as the model's kind says, where the task leaves that open."""

    def settled(self, model: nn.Module) -> Task: ...


def settled(task: Given, model: object) -> Given:
    """The task whose images a module takes: who hands the data on to the steps asks for this first."""
    if not isinstance(task, Settling) or not isinstance(model, nn.Module):
        return task
    return cast(Given, task.settled(model))


def fitted(task: Task, model: object, makers: Outputs | None = None) -> Task:
    """The task for a model: who runs one through a loss or a metric asks for this first.

    makers: as ``Reader.fitted`` takes them, where the model is no graph, which says it itself.
    """
    if not isinstance(task, Reader):
        return task
    graph = model if isinstance(model, fx.GraphModule) and is_graph(model) else None
    if makers is None:
        makers = "" if graph is None else last_operators(graph)
    return task.fitted(makers, {} if graph is None else graph.meta)


def logits(task: Task, outputs: Outputs) -> Outputs:
    """What of a model's outputs a loss on logits compares; all of them, where the task reads them in one way."""
    return task.logits(outputs) if isinstance(task, Reader) else outputs


@runtime_checkable
class Comparing(Protocol):
    """A task whose models answer at many places, of which few count, so that it says itself what is to be compared."""

    @property
    def teaching(self) -> str:
        """The distillation loss where nobody names one (``rarefy/distillation/losses``)."""
        ...

    def compared(self, ours: Outputs, theirs: Outputs, guide: Self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Name -> (student's, teacher's), place by place.

        "scores": (N, places, classes), probabilities. "boxes": (N, places, 4), corners relative to the input.
        "distances": (N, places, sides, bins), logits. What answers do not have is left out. guide: the teacher's task.
        """
        ...


def teaching(task: Task | None) -> str:
    """The distillation loss of a task where nobody names one."""
    return task.teaching if isinstance(task, Comparing) else "lskd"


def compared(task: Task, ours: Outputs, theirs: Outputs, guide: Task) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What a loss on answers compares (``Comparing``): of logits (N, classes) their probabilities, at one place."""
    if isinstance(task, Comparing) and isinstance(guide, Comparing):
        return task.compared(ours, theirs, guide)
    pair = logits(task, ours), logits(guide, theirs)
    if not all(isinstance(one, Tensor) and one.dim() == 2 for one in pair):
        return {}
    student, teacher = (one.softmax(-1)[:, None] for one in pair)
    return {"scores": (student, teacher)}
