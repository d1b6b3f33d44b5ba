from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from rarefy.distillation.distill import distill, train
from rarefy.errors import InputError
from rarefy.pruning.schedule import Setting


def trained(
    name: str,
    graph: fx.GraphModule,
    teacher: fx.GraphModule,
    loss: str,
    setting: Setting,
    *,
    part: str,
    penalty: Any = None,
    **options: Any,
) -> fx.GraphModule:
    """``graph``, trained by schedule ``name``: taught by ``teacher`` with that loss, or, where the loss is "none", by the labels.

    part: the folder below the checkpoint. options: fields of ``Training``. Raises InputError without training data.
    """
    check_data(name, setting)
    common: dict[str, Any] = {
        "device": setting.device,
        "checkpoint": None if setting.checkpoint is None else Path(setting.checkpoint) / part,
        "progress": setting.progress,
        "penalty": penalty,
        "seed": setting.seed,
        "validate_every": 0,
        **options,
        "batch_size": min(options["batch_size"], setting.task.length("train")),
    }
    if loss == "none":
        return train(graph, setting.task, **common)
    return distill(graph, teacher, setting.task, loss=loss, **common)


def check_data(name: str, setting: Setting) -> None:
    """Raises InputError without training data."""
    if setting.task is None or setting.task.train is None:
        raise InputError(
            f"schedule {name!r} trains, so it needs data: pass task= (--data) with a train split, or use schedule='oneshot'"
        )


def check_training(schedule: Any) -> None:
    """Are ``epochs``, ``batch_size``, ``lr`` and ``loss`` of a schedule such as training takes? Raises ValueError."""
    if schedule.epochs < 1 or schedule.batch_size < 1:
        raise ValueError(f"epochs={schedule.epochs} and batch_size={schedule.batch_size} must be at least 1")
    if not 0 < schedule.lr < float("inf"):
        raise ValueError(f"lr={schedule.lr} must be positive")


def last(graph: fx.GraphModule, *steps: str) -> dict[str, Any]:
    """The last record of one of ``steps`` in the graph's history."""
    found: dict[str, Any] = next(record for record in reversed(graph.meta["history"]) if record["step"] in steps)
    return found


def joined(
    before: fx.GraphModule, after: fx.GraphModule, schedule: str, trainings: Sequence[Mapping[str, Any]], facts: Any
) -> fx.GraphModule:
    """``after`` with one record of pruning in place of those that the schedule left since ``before``, and what came behind the last of them.

    trainings: facts of the trainings. facts: go before those of the last pruning.
    """
    history = after.meta["history"]
    known = len(before.meta.get("history", []))
    place = max(index for index, record in enumerate(history) if record["step"] == "prune")
    final, behind = history[place], history[place + 1 :]
    points = [point for one in trainings for point in one["curve"]]
    curve = [{**point, "epoch": index} for index, point in enumerate(points, 1)]
    timing = {"seconds": sum(one["timing"]["seconds"] for one in trainings)}
    told = {**final["facts"], **facts, "curve": curve, "timing": timing}
    after.meta["history"] = [
        *history[:known],
        {"step": "prune", "options": {**final["options"], "schedule": schedule}, "facts": told},
        *behind,
    ]
    return after
