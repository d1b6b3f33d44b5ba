from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rarefy.evaluation.intervals import paired_drop, wilson

_ECE_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found. All shares are fractions of 1.

    value, interval: top-1 and its 95 % interval. samples: images it rests on. worst_class: {"index", "name", "value", "samples"}.
    agreement, drop: against the reference, or None; drop is {"value", "interval", "lost", "gained", "worst_class"}: lost and gained are the numbers
    of images only the reference and only the model gets right, worst_class the class that lost most.
    robustness: {corruption: {severity: top-1}}. nonfinite: images whose outputs hold NaN or infinity.
    reference: the reference's own evaluation on the same images, or None. warnings: what makes the numbers worthless, such as a model without its weights.
    """

    value: float
    interval: tuple[float, float]
    samples: int
    top5: float
    worst_class: dict[str, Any]
    calibration_error: float
    nonfinite: int = 0
    agreement: float | None = None
    drop: dict[str, Any] | None = None
    robustness: dict[str, dict[int, float]] = field(default_factory=dict)
    reference: Evaluation | None = None
    seconds: float = 0.0
    metric: str = "top1"
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-able: tuples become lists, severities text."""
        return {
            "metric": self.metric,
            "value": self.value,
            "interval": list(self.interval),
            "samples": self.samples,
            "top5": self.top5,
            "worst_class": self.worst_class,
            "calibration_error": self.calibration_error,
            "nonfinite": self.nonfinite,
            "agreement": self.agreement,
            "drop": self.drop,
            "robustness": {
                name: {str(severity): value for severity, value in of.items()} for name, of in self.robustness.items()
            },
            "reference": None if self.reference is None else self.reference.to_json(),
            "seconds": self.seconds,
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }

    def __str__(self) -> str:
        low, high = self.interval
        worst = self.worst_class
        name = worst["name"] if worst["name"] is not None else worst["index"]
        line = (
            f"top-1 {self.value:.2%} ({low:.2%} to {high:.2%}, {self.samples} images), top-5 {self.top5:.2%}, "
            f"worst class {name} {worst['value']:.1%} of {worst['samples']}, calibration error {self.calibration_error:.3f}"
        )
        if self.nonfinite:
            line += f", {self.nonfinite} images with NaN or infinity, counted as wrong"
        if self.drop is not None:
            low, high = self.drop["interval"]
            line += (
                f"\ndrop {100 * self.drop['value']:.2f} points ({100 * low:.2f} to {100 * high:.2f}; {self.drop['lost']} lost, {self.drop['gained']} gained), "
                f"agreement {self.agreement:.2%}"
            )
        return "\n".join((line, *(f"warning: {warning}" for warning in self.warnings)))


def doubts(value: float, interval: tuple[float, float], samples: int, outputs: int, classes: int) -> tuple[str, ...]:
    """Does the model know anything of these classes? What speaks against it. value, interval: top-1."""
    found = []
    if interval[0] <= 1 / classes:
        found.append(
            f"no better than chance (top-1 {value:.2%} of {samples} images, {classes} classes): "
            "were its weights given, and are its outputs in the order of the data's classes?"
        )
    if outputs != classes:
        found.append(
            f"{outputs} outputs, the data has {classes} classes: label i is compared with output i; is that their order?"
        )
    return tuple(found)


class _Tally:
    """What is kept of each image: a few bytes, whatever the number of classes."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.answers: list[Tensor] = []  # -1 where the outputs are not finite
        self.right: list[Tensor] = []
        self.right5: list[Tensor] = []
        self.confidence: list[Tensor] = []  # NaN where the outputs are not finite
        self.corrupted: dict[str, dict[int, int]] = {}
        self.outputs = 0

    def add(self, outputs: Tensor, targets: Tensor, task: Any) -> None:
        targets, self.outputs = targets.to(outputs.device), outputs.shape[1]
        if int(targets.max()) >= outputs.shape[1]:
            task.check(outputs.shape[1])
        finite = torch.isfinite(outputs).all(1)
        answers = outputs.argmax(1)  # the first of equals
        own = outputs.gather(1, targets.unsqueeze(1))
        index = torch.arange(outputs.shape[1], device=outputs.device)
        before = (outputs > own) | ((outputs == own) & (index < targets.unsqueeze(1)))
        self.targets.append(targets.cpu())
        self.answers.append(torch.where(finite, answers, -1).cpu())
        self.right.append((finite & (answers == targets)).cpu())
        self.right5.append((finite & (before.sum(1) < 5)).cpu())
        self.confidence.append(torch.where(finite, outputs.softmax(1).amax(1), math.nan).cpu())

    def evaluation(
        self, seconds: float, class_names: Sequence[str] | None, every: bool, reference: _Tally | None = None
    ) -> Evaluation:
        """every: are these all images of the split, so that their labels tell the number of classes?"""
        targets, answers, right = torch.cat(self.targets), torch.cat(self.answers), torch.cat(self.right)
        confidence = torch.cat(self.confidence)
        samples, correct = len(right), int(right.sum())
        agreement, drop, judged = None, None, None
        if reference is not None:
            theirs, their_answers = torch.cat(reference.right), torch.cat(reference.answers)
            lost, gained = int((theirs & ~right).sum()), int((right & ~theirs).sum())
            dropped, around = paired_drop(lost, gained, samples)
            agreement = float(((answers == their_answers) & (answers >= 0)).double().mean())
            change = right.double() - theirs.double()
            drop = {
                "value": dropped,
                "interval": list(around),
                "lost": lost,
                "gained": gained,
                "worst_class": _lowest(change, targets, class_names, sign=-1),
            }
            judged = reference.evaluation(seconds, class_names, every)
        value, interval = correct / samples, wilson(correct, samples)
        classes = len(class_names) if class_names is not None else int(targets.max()) + 1 if every else None
        return Evaluation(
            value=value,
            interval=interval,
            samples=samples,
            top5=float(torch.cat(self.right5).double().mean()),
            worst_class=_lowest(right.double(), targets, class_names),
            calibration_error=calibration_error(confidence, right),
            nonfinite=int((answers < 0).sum()),
            agreement=agreement,
            drop=drop,
            robustness={
                name: {severity: count / samples for severity, count in of.items()}
                for name, of in self.corrupted.items()
            },
            reference=judged,
            seconds=seconds,
            warnings=() if classes is None else doubts(value, interval, samples, self.outputs, classes),
        )


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """ECE, 15 bins (k/15, (k+1)/15]. confidence: (N,) in [0, 1], NaN is left out; right: (N,) bool."""
    kept = ~confidence.isnan()
    confidence, right = confidence[kept].double(), right[kept].double()
    if len(right) == 0:
        return 1.0
    bins = ((confidence * _ECE_BINS).ceil().long() - 1).clamp(0, _ECE_BINS - 1)
    gap = torch.zeros(_ECE_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return float(gap.abs().sum() / len(right))


def _lowest(score: Tensor, targets: Tensor, class_names: Sequence[str] | None, sign: int = 1) -> dict[str, Any]:
    """The class whose mean score is lowest; of equals the one with most images, then the first."""
    counts = torch.bincount(targets)
    means = torch.bincount(targets, weights=score) / counts.clamp(min=1)
    means[counts == 0] = math.inf
    equals = means <= means.min() + 1e-12
    index = int(torch.where(equals, counts, 0).argmax())
    name = class_names[index] if class_names is not None and index < len(class_names) else None
    return {"index": index, "name": name, "value": sign * float(means[index]) + 0.0, "samples": int(counts[index])}


def _correct(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.isfinite(outputs).all(1) & (outputs.argmax(1) == targets.to(outputs.device))
