"""Average precision of found boxes, as COCO defines it: its 12 figures, an interval, and differences on the same
pictures.

**Average precision** of a class at a threshold: its found boxes in all pictures by falling score; precision at recall
r is the highest of all prefixes that find at least r of the boxes; the mean of it at r = 0, 0.01, ..., 1. **AP** is the
mean over thresholds of 0.5 to 0.95 and over the classes that are to be found somewhere, so a class that is not is not
counted. Beside it AP50, AP75, AP of small (up to 32 x 32 pixels of the picture), medium and large (above 96 x 96)
boxes, and AR, the recall reached with 1, 10 and 100 boxes of a picture and class. What is right ``box_matching.py``
says. (Lin et al., arXiv 1405.0312; equal to pycocotools and faster-coco-eval.)

**Interval**: of 95 %, by 200 resamplings of the pictures (Efron 1979) from a fixed seed: boxes are matched once, and a
resampling gives each picture a weight. Of a **difference** likewise, both models with the same weights. **Worst
class**: of the lowest AP, ``samples`` being the pictures that show it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.data.boxes.boxes import CLASS
from rarefy.tasks.metric import Better, Difference, Metric, Outputs
from rarefy.tasks.metrics.box_matching import SIZES, THRESHOLDS, Array, Matches, matched

_DRAWS = 200
_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST_VALUES = 2**24  # of weights of found boxes in memory
_NEXT_TO_NOTHING = 0.01
_SAMPLED = {"ar1": 1, "ar10": 10, "ar100": 100}


class BoxPrecision(Metric):
    """Average precision of boxes (N, M, 6) against targets (N, K, 8), see ``rarefy/data/boxes/boxes.py``.

    names: of the classes, where they have any. read: outputs of the model -> boxes (N, M, 6). doubts: what is known to
    make the number worthless, a line each. classless: what is to be found counts as of class 0, whatever it is.
    """

    name = "ap"
    label = "AP"
    unit = "%"
    better: Better = "higher"

    def __init__(
        self,
        names: Sequence[str] | None = None,
        read: Callable[[Outputs], Tensor] = lambda outputs: outputs,
        doubts: tuple[str, ...] = (),
        classless: bool = False,
    ):
        self.names, self.read, self.doubts, self.classless = names, read, doubts, classless
        self._pictures = 0
        self._matches: list[Matches] = []
        self._judged: tuple[int, _Judged] | None = None

    @property
    def samples(self) -> int:
        return self._pictures

    def add(self, outputs: Outputs, targets: Tensor) -> None:
        if self.classless:
            targets = targets.clone()
            targets[..., CLASS] = targets[..., CLASS].clamp_max(0)
        one = matched(self.read(outputs), targets)
        truth = one.truth + np.array([self._pictures, 0])
        self._matches.append(one._replace(picture=one.picture + self._pictures, truth=truth))
        self._pictures += len(targets)

    def value(self) -> float:
        return self._all.figures()["ap"] or 0.0

    def interval(self) -> tuple[float, float]:
        return _ends(self._all.draws)

    def paired(self, reference: BoxPrecision) -> Difference:
        ends = _ends(reference._all.draws - self._all.draws)
        ours, theirs = self._all.of_classes, reference._all.of_classes
        details: dict[str, object] = {}
        lost = {kind: theirs[kind] - ours.get(kind, 0.0) for kind in theirs}
        if lost:
            kind = max(lost, key=lambda one: (lost[one], -one))
            details["worst_class"] = self._class(kind, lost[kind])
        return Difference(reference.value() - self.value(), ends, details=details)

    def details(self) -> dict[str, object]:
        by_class = [self._class(kind, value) for kind, value in sorted(self._all.of_classes.items())]
        figures = {name: value for name, value in self._all.figures().items() if name != "ap"}
        return {**figures, "worst_class": self._worst(), "classes": by_class}

    def warnings(self, whole: bool) -> tuple[str, ...]:
        if not len(self._all.matches.truth):
            return ("no picture has a box to be found, so AP says nothing; give pictures with boxes",)
        if self.value() >= _NEXT_TO_NOTHING:
            return self.doubts
        return (
            *self.doubts,
            f"finds next to nothing (AP {self.value():.2%} of {self.samples} images): were its weights given, is it "
            "fed as it was trained, and are its classes in the order of the data's?",
        )

    def text(self) -> str:
        figures, worst = self._all.figures(), self._worst()
        sizes = ", ".join(
            f"{name} {figures[f'ap_{name}']:.2%}" for name in SIZES if figures.get(f"ap_{name}") is not None
        )
        line = f"{super().text()}, AP50 {figures['ap50'] or 0:.2%}, AP75 {figures['ap75'] or 0:.2%}"
        line = f"{line}, {sizes}" if sizes else line
        if worst is None:
            return line
        name = worst["name"] if worst["name"] is not None else worst["index"]
        return f"{line}, worst class {name} {worst['value']:.1%} of {worst['samples']} images"

    @property
    def _all(self) -> _Judged:
        if self._judged is None or self._judged[0] != self._pictures:
            self._judged = self._pictures, _Judged(_joined(self._matches), self._pictures)
        return self._judged[1]

    def _worst(self) -> dict[str, Any] | None:
        found = self._all.of_classes
        if not found:
            return None
        kind = min(found, key=lambda one: (found[one], -self._all.pictures_of(one), one))
        return self._class(kind, found[kind])

    def _class(self, kind: int, value: float) -> dict[str, Any]:
        name = self.names[kind] if self.names is not None and kind < len(self.names) else None
        return {"index": kind, "name": name, "value": value, "samples": self._all.pictures_of(kind)}


class _Judged:
    """What the matches of all pictures say."""

    def __init__(self, matches: Matches, pictures: int):
        order = np.lexsort((matches.rank, matches.picture, -matches.score, matches.kind))
        self.matches = matches._replace(
            **{name: getattr(matches, name)[order] for name in ("picture", "kind", "rank", "score", "right", "ignored")}
        )
        self.pictures = pictures
        self.kinds = np.unique(matches.truth[:, 1][matches.counted.any(1)]).tolist()

    @functools.cached_property
    def table(self) -> Array:
        """(classes, sizes, thresholds) average precision, NaN where nothing is to be found."""
        weights = np.ones((1, self.pictures))
        found = [[self._precision(kind, size, weights)[:, 0] for size in range(len(SIZES))] for kind in self.kinds]
        return np.array(found).reshape(len(self.kinds), len(SIZES), len(THRESHOLDS))

    @functools.cached_property
    def of_classes(self) -> dict[int, float]:
        """AP of each class that is to be found."""
        means = self.table[:, 0].mean(1)
        return {kind: float(value) for kind, value in zip(self.kinds, means, strict=True) if not math.isnan(value)}

    @functools.cached_property
    def draws(self) -> Array:
        """(200,) AP of the pictures drawn again."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self.pictures, (_DRAWS, self.pictures), generator=generator)
        weights = torch.zeros(_DRAWS, self.pictures).scatter_add_(1, drawn, torch.ones(1, 1).expand_as(drawn)).numpy()
        total, count = np.zeros(_DRAWS), np.zeros(_DRAWS)
        for kind in self.kinds:
            step = max(1, _MOST_VALUES // max(1, len(self._rows(kind)[0])))
            parts = [self._precision(kind, 0, weights[at : at + step]) for at in range(0, _DRAWS, step)]
            found = np.concatenate(parts, 1).mean(0)
            total, count = total + np.nan_to_num(found), count + ~np.isnan(found)
        return total / np.maximum(count, 1)

    @functools.cache  # noqa: B019 (lives as long as the metric does)
    def figures(self) -> dict[str, float | None]:
        """COCO's, by name; None where there is nothing of the kind."""
        sizes = list(SIZES)
        found: dict[str, float | None] = {"ap": _mean(self.table[:, 0])}
        found |= {"ap50": _mean(self.table[:, 0, 0]), "ap75": _mean(self.table[:, 0, 5])}
        found |= {f"ap_{name}": _mean(self.table[:, sizes.index(name)]) for name in sizes[1:]}
        found |= {name: _mean(self._recalls(0, most)) for name, most in _SAMPLED.items()}
        return found | {f"ar_{name}": _mean(self._recalls(sizes.index(name), 100)) for name in sizes[1:]}

    def pictures_of(self, kind: int) -> int:
        """How many show something of the class."""
        return len(np.unique(self._wanted(kind, 0)))

    def _rows(self, kind: int) -> tuple[Array, ...]:
        """Picture, rank, right and ignored of the class's found boxes, by falling score."""
        first, last = np.searchsorted(self.matches.kind, [kind, kind + 1])
        one = self.matches
        return tuple(table[first:last] for table in (one.picture, one.rank, one.right, one.ignored))

    def _wanted(self, kind: int, size: int) -> Array:
        """Pictures of the boxes that are to be found."""
        one = self.matches
        pictures: Array = one.truth[(one.truth[:, 1] == kind) & one.counted[:, size], 0]
        return pictures

    def _precision(self, kind: int, size: int, weights: Array) -> Array:
        """(thresholds, draws) average precision. weights: (draws, pictures).

        Precision need be known where recall grows, at boxes that are right: what lies between lowers it.
        """
        picture, _, right, ignored = self._rows(kind)
        wanted = weights[:, self._wanted(kind, size)].sum(1, dtype=np.float64)
        found = np.zeros((len(THRESHOLDS), len(weights)))
        found[:, wanted == 0] = math.nan
        bits = right[:, size]
        until = int(np.flatnonzero(bits)[-1]) + 1 if bits.any() else 0
        own = weights[:, picture[:until]]
        seen = own.cumsum(1, dtype=np.float64)
        for threshold in range(len(THRESHOLDS)):
            places = np.flatnonzero((bits[:until] >> threshold) & 1)
            if not len(places):
                continue
            passed = np.flatnonzero((ignored[:until, size] >> threshold) & 1)
            before = np.zeros((len(weights), len(passed) + 1))
            before[:, 1:] = own[:, passed].cumsum(1, dtype=np.float64)
            judged = seen[:, places] - before[:, np.searchsorted(passed, places)]
            good = own[:, places].cumsum(1, dtype=np.float64)
            precision = good / np.maximum(judged, 1e-12)
            highest = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            recall = good / np.maximum(wanted, 1e-12)[:, None]
            reached = np.searchsorted(_RECALLS, recall.ravel(), side="right").reshape(recall.shape)
            average = (highest * np.diff(reached, axis=1, prepend=0)).sum(1) / len(_RECALLS)
            found[threshold, wanted > 0] = average[wanted > 0]
        return found

    def _recalls(self, size: int, most: int) -> Array:
        """(classes, thresholds), NaN where nothing is to be found."""
        found = np.full((len(self.kinds), len(THRESHOLDS)), math.nan)
        for place, kind in enumerate(self.kinds):
            _, rank, right, _ = self._rows(kind)
            wanted = len(self._wanted(kind, size))
            if wanted:
                bits = right[rank < most, size][:, None] >> np.arange(len(THRESHOLDS))
                found[place] = (bits & 1).sum(0) / wanted
        return found


def _joined(matches: Sequence[Matches]) -> Matches:
    return Matches(*(np.concatenate(parts) for parts in zip(*matches, strict=True)))


def _mean(values: Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _ends(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high
