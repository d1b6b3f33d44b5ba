"""Accuracy of a classifier: top-1, and beside it top-5, the worst class and the calibration error.

**Top-1** with its 95 % Wilson interval, and the paired drop against a reference (``rarefy/tasks/intervals.py``).
**Top-5** of min(5, outputs). **Worst class**: lowest top-1 among the classes with at least one image (of equals the one
with most images), with its number of images beside it. **Calibration error**: ECE over 15 equal bins of confidence (Guo
et al., arXiv 1706.04599), sum_bins (n_bin/n) |accuracy - confidence|. **Agreement**: share of images to which model and
reference give the same answer.

Equal logits: the lowest index is the answer, so a model that says nothing is not counted right by chance. An image
whose outputs hold NaN or infinity counts as wrong, in top-1, top-5 and agreement alike, takes no part in the
calibration error, and is counted in ``nonfinite``: a broken model gets a low score and a visible reason, so that a gate
can refuse it, and not an exception in the middle of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from rarefy.tasks.intervals import paired_drop, wilson
from rarefy.tasks.metric import Better, Difference, Metric, OutputError, Outputs

_ECE_BINS = 15


class Class(TypedDict):
    """One class: its mean score (top-1, or what it lost) over ``samples`` images."""

    index: int
    name: str | None
    value: float
    samples: int


class Accuracy(Metric):
    """Top-1 of logits (N, classes) against class indices (N,).

    names: of the classes, where they have any. classes: how many the data has; None: as the labels tell.
    check: raises DataError, with the data's name, for a model of too few outputs.
    read: outputs of the model -> logits (N, classes).
    """

    name = "top1"
    label = "top-1"
    unit = "%"
    better: Better = "higher"

    def __init__(
        self,
        names: Sequence[str] | None = None,
        classes: int | None = None,
        check: Callable[[int], None] = lambda outputs: None,
        read: Callable[[Outputs], Tensor] = lambda outputs: outputs,
    ):
        self.names, self.classes, self.check, self.read = names, classes, check, read
        self.outputs = 0
        # Of each image a few bytes are kept, whatever the number of classes.
        self._targets: list[Tensor] = []
        self._answers: list[Tensor] = []  # -1 where the outputs are not finite
        self._right5: list[Tensor] = []
        self._confidence: list[Tensor] = []  # NaN where the outputs are not finite

    @property
    def samples(self) -> int:
        return sum(map(len, self._targets))

    def add(self, outputs: Outputs, targets: Tensor) -> None:
        outputs = self.read(outputs)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[0] != len(targets):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise OutputError(
                f"returns {got} for {len(targets)} images; a classifier returns logits ({len(targets)}, classes)"
            )
        outputs, targets = outputs.float(), targets.to(outputs.device)
        self.outputs = outputs.shape[1]
        if int(targets.max()) >= self.outputs:
            self.check(self.outputs)
            raise OutputError(f"returns {self.outputs} outputs; label {int(targets.max())} needs one of its own")
        finite = torch.isfinite(outputs).all(1)
        answers = outputs.argmax(1)  # the first of equals
        logit = outputs.gather(1, targets.unsqueeze(1))
        index = torch.arange(self.outputs, device=outputs.device)
        before = (outputs > logit) | ((outputs == logit) & (index < targets.unsqueeze(1)))
        self._targets.append(targets.cpu())
        self._answers.append(torch.where(finite, answers, -1).cpu())
        self._right5.append((finite & (before.sum(1) < 5)).cpu())
        self._confidence.append(torch.where(finite, outputs.softmax(1).amax(1), math.nan).cpu())

    @property
    def answers(self) -> Tensor:
        """(N,) int64: the class that the model says of each image, -1 where it says none."""
        return torch.cat(self._answers)

    @property
    def right(self) -> Tensor:
        """(N,) bool."""
        return self.answers == torch.cat(self._targets)

    def value(self) -> float:
        return int(self.right.sum()) / self.samples

    def interval(self) -> tuple[float, float]:
        return wilson(int(self.right.sum()), self.samples)

    def details(self) -> dict[str, object]:
        return {
            "top5": self._top5(),
            "worst_class": self._worst(),
            "calibration_error": self._calibration_error(),
            "nonfinite": self._nonfinite(),
        }

    def paired(self, reference: Accuracy) -> Difference:
        right, theirs = self.right, reference.right
        lost, gained = int((theirs & ~right).sum()), int((right & ~theirs).sum())
        value, interval = paired_drop(lost, gained, self.samples)
        answers = self.answers
        agreement = float(((answers == reference.answers) & (answers >= 0)).double().mean())
        change = right.double() - theirs.double()
        worst = _lowest(change, torch.cat(self._targets), self.names, sign=-1)
        return Difference(value, interval, lost, gained, agreement, {"worst_class": worst})

    def warnings(self, whole: bool) -> tuple[str, ...]:
        classes = self.classes if self.classes is not None else None if self.names is None else len(self.names)
        if classes is None and whole:
            classes = int(torch.cat(self._targets).max()) + 1
        if classes is None:
            return ()
        return doubts(self.value(), self.interval(), self.samples, self.outputs, classes)

    def text(self) -> str:
        low, high = self.interval()
        worst = self._worst()
        name = worst["name"] if worst["name"] is not None else worst["index"]
        line = (
            f"top-1 {self.value():.2%} ({low:.2%} to {high:.2%}, {self.samples} images), top-5 {self._top5():.2%}, "
            f"worst class {name} {worst['value']:.1%} of {worst['samples']}, "
            f"calibration error {self._calibration_error():.3f}"
        )
        broken = self._nonfinite()
        return f"{line}, {broken} images with NaN or infinity, counted as wrong" if broken else line

    def _top5(self) -> float:
        return float(torch.cat(self._right5).double().mean())

    def _worst(self) -> Class:
        return _lowest(self.right.double(), torch.cat(self._targets), self.names)

    def _calibration_error(self) -> float:
        return calibration_error(torch.cat(self._confidence), self.right)

    def _nonfinite(self) -> int:
        return int((self.answers < 0).sum())


def doubts(value: float, interval: tuple[float, float], samples: int, outputs: int, classes: int) -> tuple[str, ...]:
    """Does the model know anything of these classes? What speaks against it. value, interval: top-1."""
    warnings = []
    if interval[0] <= 1 / classes:
        warnings.append(
            f"no better than chance (top-1 {value:.2%} of {samples} images, {classes} classes): "
            "were its weights given, and are its outputs in the order of the data's classes?"
        )
    if outputs != classes:
        warnings.append(
            f"{outputs} outputs, the data has {classes} classes: label i is compared with output i; "
            "is that their order?"
        )
    return tuple(warnings)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """ECE, 15 bins (k/15, (k+1)/15]. confidence: (N,) in [0, 1], NaN is left out; right: (N,) bool."""
    finite = ~confidence.isnan()
    confidence, right = confidence[finite].double(), right[finite].double()
    if len(right) == 0:
        return 1.0
    bins = ((confidence * _ECE_BINS).ceil().long() - 1).clamp(0, _ECE_BINS - 1)
    gap = torch.zeros(_ECE_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return float(gap.abs().sum() / len(right))


def _lowest(score: Tensor, targets: Tensor, names: Sequence[str] | None, sign: int = 1) -> Class:
    """The class whose mean score is lowest; of equals the one with most images, then the first."""
    counts = torch.bincount(targets)
    means = torch.bincount(targets, weights=score) / counts.clamp(min=1)
    means[counts == 0] = math.inf
    equals = means <= means.min() + 1e-12
    index = int(torch.where(equals, counts, 0).argmax())
    name = names[index] if names is not None and index < len(names) else None
    return {"index": index, "name": name, "value": sign * float(means[index]) + 0.0, "samples": int(counts[index])}
