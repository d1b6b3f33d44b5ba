"""evaluate(): how good a classifier is, how sure that is, and how much worse than its reference.

One pass over the data: a batch is decoded once and every model runs on it, so all numbers are of the same images.

**Top-1** with its 95 % Wilson interval (Wilson, JASA 1927), z = 1.96::

    centre (p + z^2/2n) / (1 + z^2/n),   half (z / (1 + z^2/n)) sqrt(p (1-p)/n + z^2/4n^2)

**Drop** against the reference is paired. With b images only the reference gets right and c only the model, drop = (b - c) / n: positive is
worse. Its interval is Bonett and Price's (J. Educ. Behav. Stat. 37, 2012), recommended by Fagerland et al. (Stat. Med. 33, 2014): Wald's after
one image is added to b and to c, so it stays honest where no image is judged differently (then +-2.8/n)::

    b' = (b+1)/(n+2),  c' = (c+1)/(n+2):   b' - c'  +-  z sqrt((b' + c' - (b' - c')^2) / (n+2))

**Calibration error**: ECE over 15 equal bins of confidence (Guo et al., arXiv 1706.04599), sum_bins (n_bin/n) |accuracy - confidence|.
**Top-5** of min(5, outputs). **Worst class**: lowest top-1 among the classes with at least one image (of equals the one with most images), with
its number of images beside it. **Agreement**: share of images to which model and reference give the same answer. **Robustness**: top-1 under
corruptions (``tasks/corruptions.py``) at severities 1, 3, 5.

Equal logits: the lowest index is the answer, so a model that says nothing is not counted right by chance. An image whose outputs hold NaN or
infinity counts as wrong, in top-1, top-5 and agreement alike, takes no part in the calibration error, and is counted in ``nonfinite``: a broken model
gets a low score and a visible reason, so that a gate can refuse it, and not an exception in the middle of a run.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.errors import DataError, InputError
from rarefy.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, fits
from rarefy.graph.capture import device_of
from rarefy.system.progress import track

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_ECE_BINS = 15

Model = nn.Module | Callable[[Tensor], Tensor]


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
            "robustness": {name: {str(severity): value for severity, value in of.items()} for name, of in self.robustness.items()},
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


def evaluate(
    model: Model,
    task: Any,
    *,
    reference: Model | None = None,
    split: str = "val",
    batch_size: int = 64,
    limit: int | None = None,
    corruptions: Sequence[str] | Literal["all"] = (),
    severities: Sequence[int] = (1, 3, 5),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Judge ``model`` on ``task``, and against ``reference`` where one is given.

    model, reference: modules, or callables from (N, C, H, W) float32 to logits (N, classes), such as a runtime's session. Modules are run in eval mode and
    left as they were; where ``device`` is not the module's, a copy is moved. device: None is the model's own; callables get their inputs there, or on the
    CPU where none is given.
    corruptions: names, or "all" that the images' channels allow; they depend on the seed and the batch size. limit: so many images only.
    Raises DataError where model and data do not fit, InputError for unknown corruptions.
    """
    began = time.perf_counter()
    names = _names(corruptions, severities, task)
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(_runner(one, device)) for one in (model, reference) if one is not None]
        tallies = [_Tally() for _ in runners]
        home = torch.device(device) if device is not None else runners[0].device
        batches = task.batches(split, batch_size, limit=limit, device=home)
        total = task.steps(split, batch_size, limit=limit)
        with torch.no_grad():
            for step, (inputs, targets) in enumerate(track(batches, total, f"evaluate {split}", progress)):
                images = task.denormalize(inputs) if names else inputs
                for runner, tally in zip(runners, tallies, strict=True):
                    tally.add(runner(inputs), targets, task)
                for name, severity in ((name, severity) for name in names for severity in severities):
                    changed = task.normalize(corrupt(images, name, severity, _seed(seed, step, name, severity)))
                    for runner, tally in zip(runners, tallies, strict=True):
                        right = _correct(runner(changed), targets)
                        of = tally.corrupted.setdefault(name, {})
                        of[severity] = of.get(severity, 0) + int(right.sum())
    seconds = time.perf_counter() - began
    about = (task.class_names, limit is None)
    if not tallies[0].right:
        raise DataError(f"{task!r}: no image of {split} could be read, so there is nothing to evaluate; repair the data")
    if reference is None:
        return tallies[0].evaluation(seconds, *about)
    of_model, of_reference = tallies
    return of_model.evaluation(seconds, *about, of_reference)


def doubts(value: float, interval: tuple[float, float], samples: int, outputs: int, classes: int) -> tuple[str, ...]:
    """Does the model know anything of these classes? What speaks against it. value, interval: top-1."""
    found = []
    if interval[0] <= 1 / classes:
        found.append(
            f"no better than chance (top-1 {value:.2%} of {samples} images, {classes} classes): "
            "were its weights given, and are its outputs in the order of the data's classes?"
        )
    if outputs != classes:
        found.append(f"{outputs} outputs, the data has {classes} classes: label i is compared with output i; is that their order?")
    return tuple(found)


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """95 % interval of a share, exactly 0 or 1 at its ends."""
    share, spread = successes / samples, Z95**2 / samples
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == samples else min(1.0, centre + half))


def paired_drop(lost: int, gained: int, samples: int) -> tuple[float, tuple[float, float]]:
    """Drop and its 95 % interval: ``lost`` images only the reference gets right, ``gained`` only the model, of ``samples``."""
    b, c = (lost + 1) / (samples + 2), (gained + 1) / (samples + 2)
    half = Z95 * math.sqrt((b + c - (b - c) ** 2) / (samples + 2))
    return (lost - gained) / samples, (max(-1.0, b - c - half), min(1.0, b - c + half))


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

    def evaluation(self, seconds: float, class_names: Sequence[str] | None, every: bool, reference: _Tally | None = None) -> Evaluation:
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
            robustness={name: {severity: count / samples for severity, count in of.items()} for name, of in self.corrupted.items()},
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


class _Runner:
    """A model as a function from a batch anywhere to logits, with errors in a line."""

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device

    def __call__(self, inputs: Tensor) -> Tensor:
        who = type(self.model).__name__
        try:
            outputs = self.model(inputs.to(self.device))
        except torch.OutOfMemoryError as error:
            raise InputError(f"{who}: {self.device} is out of memory at batch size {len(inputs)}; pass a smaller one") from error
        except (RuntimeError, ValueError, TypeError) as error:
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
            raise DataError(
                f"{who}: can't be run on inputs of shape {tuple(inputs.shape)} ({why}); does the task's size or channels fit the model?"
            ) from error
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[0] != len(inputs):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise DataError(f"{who}: returns {got} for {len(inputs)} images; a classifier returns logits ({len(inputs)}, classes)")
        return outputs.float()


@contextlib.contextmanager
def _runner(model: Model, device: torch.device | str | None) -> Iterator[_Runner]:
    """The model ready to run in eval mode; afterwards each of its modules is as it was."""
    if not isinstance(model, nn.Module):
        yield _Runner(model, torch.device(device or "cpu"))
        return
    own = device_of(model)
    home = own if device is None else torch.device(device)
    if home.type != own.type or (home.index is not None and home.index != own.index):
        yield _Runner(copy.deepcopy(model).to(home).eval(), home)
        return
    was_training = [(module, module.training) for module in model.modules()]
    try:
        yield _Runner(model.eval(), own)
    finally:
        for module, training in was_training:
            module.training = training


def _names(corruptions: Sequence[str] | str, severities: Sequence[int], task: Any) -> list[str]:
    if corruptions == "all":
        return [name for name in CORRUPTIONS if fits(name, task.input_shape[0])]
    names = [corruptions] if isinstance(corruptions, str) else list(corruptions)
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(f"corruption: unknown name {name!r}; have all, {', '.join(CORRUPTIONS)}")
        if not fits(name, task.input_shape[0]):
            raise InputError(f"{name}: is not defined for images of {task.input_shape[0]} channels; leave it out, or say all")
    if names and not set(severities) <= set(SEVERITIES):
        raise InputError(f"severities={list(severities)}: have 1 to 5")
    return names


def _seed(seed: int, step: int, name: str, severity: int) -> int:
    entropy = [seed % 2**63, step, severity, *name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
