"""Evaluation: what ``evaluate`` says of a model, in the words of the task's metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rarefy.tasks.metric import Better, Difference, Metric, bare, shown_change

Robustness = Mapping[str, Mapping[int, float]]  # {corruption: {severity: the metric's value}}


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found. Shares are fractions of 1.

    value, interval: the metric and its 95 % interval. samples: images it rests on. metric: its name ("top1"); label: as
    people write it;
    unit: "%" for shares; better: "higher" or "lower". text: all of the metric in a line.
    details: what else the metric tells; each is an attribute too, such as ``top5`` and ``worst_class`` of a classifier.
    agreement, drop: against the reference, or None; drop is {"value", "interval", ...}, positive where the model is
    worse; of a classifier "lost" and "gained" are the numbers of images only the reference and only the model gets
    right, "worst_class" the class that lost most.
    robustness: {corruption: {severity: value}}. reference: the reference's own evaluation on the same images, or None.
    warnings: what makes the numbers worthless, such as a model without its weights.
    """

    value: float
    interval: tuple[float, float]
    samples: int
    metric: str
    label: str
    unit: str
    better: Better
    text: str
    details: Mapping[str, object] = field(default_factory=dict)
    agreement: float | None = None
    drop: dict[str, Any] | None = None
    robustness: Robustness = field(default_factory=dict)
    reference: Evaluation | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """A detail of the metric."""
        details = self.__dict__.get("details", {})
        if name not in details:
            raise AttributeError(f"an evaluation by {self.__dict__.get('metric')} has no {name!r}")
        return details[name]

    def to_json(self) -> dict[str, Any]:
        """JSON-able: tuples become lists, severities text; the metric's details stand among the other keys."""
        return {
            "metric": self.metric,
            "label": self.label,
            "unit": self.unit,
            "better": self.better,
            "value": self.value,
            "interval": list(self.interval),
            "samples": self.samples,
            **self.details,
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
        lines = [self.text]
        if self.drop is not None:
            lines.append(_drop_text(self.drop, self.agreement, self.unit))
        return "\n".join((*lines, *(f"warning: {warning}" for warning in self.warnings)))


def evaluation_of(
    metric: Metric,
    *,
    whole: bool,
    seconds: float,
    robustness: Robustness,
    difference: Difference | None = None,
    reference: Evaluation | None = None,
) -> Evaluation:
    """What the metric says. whole: were these all images of the split?"""
    return Evaluation(
        value=metric.value(),
        interval=metric.interval(),
        samples=metric.samples,
        metric=metric.name,
        label=metric.label,
        unit=metric.unit,
        better=metric.better,
        text=metric.text(),
        details=metric.details(),
        agreement=None if difference is None else difference.agreement,
        drop=None if difference is None else difference.to_json(),
        robustness=robustness,
        reference=reference,
        seconds=seconds,
        warnings=metric.warnings(whole),
    )


def _drop_text(drop: Mapping[str, Any], agreement: float | None, unit: str) -> str:
    low, high = (shown_change(bound, bare(unit)).removesuffix(" points") for bound in drop["interval"])
    counts = [f"{drop[name]} {name}" for name in ("lost", "gained") if name in drop]
    around = "; ".join([f"{low} to {high}", *([", ".join(counts)] if counts else [])])
    text = f"drop {shown_change(drop['value'], unit)} ({around})"
    return text if agreement is None else f"{text}, agreement {agreement:.2%}"
