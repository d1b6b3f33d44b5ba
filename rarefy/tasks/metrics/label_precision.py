"""Mean average precision of labels, several of which may be true of an image; beside it, accuracy label by label.

**Average precision** of a label: images in the order of its score, the mean over its true images of the precision down
to each, those of equal score taken together: the area under the curve of precision by recall, not interpolated.
**Mean** over the labels that are true of at least one image. Its 95 % interval, and that of the paired drop, are the
percentiles of 200 resamplings of the images (Efron 1979), by a fixed seed. **Accuracy**: share of pairs of image and
label where the sign of the logit is right. An image whose outputs hold NaN or infinity counts as lowest in all labels,
and as wrong in each, and is counted in ``nonfinite``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.tasks.metric import Better, Difference, Metric, OutputError, Outputs

_DRAWS = 200


class LabelPrecision(Metric):
    """Mean average precision of logits (N, labels) against 0 and 1 (N, labels).

    names: of the labels, where they have any. read: outputs of the model -> logits (N, labels).
    """

    name = "map"
    label = "mean average precision"
    unit = "%"
    better: Better = "higher"

    def __init__(self, names: Sequence[str] | None = None, read: Callable[[Outputs], Tensor] = lambda outputs: outputs):
        self.names, self.read = names, read
        self._logits: list[Tensor] = []  # (n, labels) float32, NaN where the outputs are not finite
        self._targets: list[Tensor] = []  # (n, labels) bool

    @property
    def samples(self) -> int:
        return sum(map(len, self._targets))

    def add(self, outputs: Outputs, targets: Tensor) -> None:
        logits = self.read(outputs).float().cpu()
        if logits.shape != targets.shape:
            raise OutputError(f"returns shape {tuple(logits.shape)} for labels of shape {tuple(targets.shape)}")
        finite = torch.isfinite(logits).all(1, keepdim=True)
        self._logits.append(torch.where(finite, logits, math.nan))
        self._targets.append(targets.cpu() > 0.5)

    def value(self) -> float:
        return _mean(*self._all)

    def interval(self) -> tuple[float, float]:
        return _ends(self._resampled())

    def paired(self, reference: LabelPrecision) -> Difference:
        ends = _ends(reference._resampled() - self._resampled())
        ours, theirs = self._right, reference._right
        lost, gained = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
        return Difference(
            reference.value() - self.value(), ends, agreement=float((ours == theirs).double().mean()),
            details={"labels_lost": lost, "labels_gained": gained},
        )  # fmt: skip

    def details(self) -> dict[str, object]:
        return {
            "label_accuracy": float(self._right.double().mean()),
            "worst_class": self._worst(),
            "nonfinite": self._nonfinite(),
        }

    def warnings(self, whole: bool) -> tuple[str, ...]:
        targets = torch.cat(self._targets)
        chance = float(targets.double().mean(0)[targets.any(0)].mean()) if bool(targets.any()) else 0.0
        if self.interval()[0] > chance:
            return ()
        return (
            f"no better than chance ({self.label} {self.value():.2%}, by chance {chance:.2%}): "
            "were its weights given, and are its outputs in the order of the labels?",
        )

    def text(self) -> str:
        line = f"{super().text()}, label accuracy {float(self._right.double().mean()):.2%}"
        broken = self._nonfinite()
        return f"{line}, {broken} images with NaN or infinity, counted as wrong" if broken else line

    @property
    def _all(self) -> tuple[Tensor, Tensor]:
        """Scores and targets, both (N, labels)."""
        return torch.cat(self._logits).nan_to_num(nan=-math.inf), torch.cat(self._targets)

    @property
    def _right(self) -> Tensor:
        logits = torch.cat(self._logits)
        return ((logits > 0) == torch.cat(self._targets)) & ~logits.isnan()

    def _resampled(self) -> Tensor:
        scores, targets = self._all
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(scores), (_DRAWS, len(scores)), generator=generator)
        return torch.tensor([_mean(scores[draw], targets[draw]) for draw in draws], dtype=torch.float64)

    def _worst(self) -> dict[str, Any] | None:
        """The label of lowest average precision, of those that are true of an image."""
        precision = average_precision(*self._all)
        if not bool(precision.isfinite().any()):
            return None
        index = int(precision.nan_to_num(nan=math.inf).argmin())
        name = self.names[index] if self.names is not None and index < len(self.names) else None
        images = int(torch.cat(self._targets)[:, index].sum())
        return {"index": index, "name": name, "value": float(precision[index]), "samples": images}

    def _nonfinite(self) -> int:
        return int(torch.cat(self._logits).isnan().all(1).sum())


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """(labels,) float64, NaN where a label is true of no image. scores: (N, labels); targets: (N, labels) bool."""
    scores, order = scores.sort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order).double()
    ranks = torch.arange(1, len(hits) + 1, dtype=torch.int64).unsqueeze(1)
    last = torch.ones_like(scores, dtype=torch.bool)
    last[:-1] = scores[:-1] != scores[1:]
    end = torch.where(last, ranks, len(hits)).flip(0).cummin(0).values.flip(0)  # rank of the last of equal score
    precision = hits.cumsum(0).gather(0, end - 1) / end
    return (precision * hits).sum(0) / hits.sum(0)


def _mean(scores: Tensor, targets: Tensor) -> float:
    found = average_precision(scores, targets)
    found = found[~found.isnan()]
    return float(found.mean()) if len(found) else 0.0


def _ends(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
