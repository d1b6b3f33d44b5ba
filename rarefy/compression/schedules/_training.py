"""What schedules that train share: one training by the one loop, and one record of all they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import fx

from rarefy.distillation.options import Penalty, Training
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.nodes import Value
from rarefy.pruning.schedule import Setting
from rarefy.tasks.task import Task

Facts = Mapping[str, Value]


class Options(TypedDict, total=False):
    """Of a training: fields of ``rarefy.distillation.options.Training``."""

    epochs: int
    steps: int | None
    lr: float
    clip: float
    freeze: float
    live_norm: str


class Common(TypedDict):
    """What distill and train both take."""

    training: Training
    device: str | torch.device | None
    checkpoint: Path | None
    progress: bool


def trained(
    name: str,
    graph: fx.GraphModule,
    teacher: fx.GraphModule,
    loss: str,
    setting: Setting,
    options: Options,
    *,
    batch_size: int,
    part: str,
    penalty: Penalty | None = None,
) -> fx.GraphModule:
    """``graph``, trained for a schedule by that loss from ``teacher``; where the loss is "none", from labels alone.

    name: of the schedule. batch_size: no more than there are images. part: the folder below the checkpoint.

    Raises InputError without training data.
    """
    from rarefy.distillation.distill import distill, train  # once asked for: the list of schedules needs no loop

    task = task_of(name, setting)
    size = min(batch_size, task.data.length("train"))
    training = Training(seed=setting.seed, validate_every=0, batch_size=size, **options)
    checkpoint = None if setting.checkpoint is None else Path(setting.checkpoint) / part
    common = Common(training=training, device=setting.device, checkpoint=checkpoint, progress=setting.progress)
    if loss == "none":
        return train(graph, task, penalty=penalty, **common)
    return distill(graph, teacher, task, loss=loss, penalty=penalty, **common)


def task_of(name: str, setting: Setting) -> Task:
    """The task to train on. Raises InputError without training data."""
    if setting.task is None or setting.task.data.train is None:
        raise InputError(
            f"schedule {name!r} trains, so it needs data: pass task= (--data) with a train split, "
            "or use schedule='oneshot'"
        )
    return setting.task


def check_training(epochs: int, batch_size: int, lr: float) -> None:
    """Are these such as training takes? Raises ValueError."""
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be at least 1")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr={lr} must be positive")


def facts_of(graph: fx.GraphModule, *steps: str) -> Facts:
    """What the last record of one of ``steps`` in the graph's history says was reached."""
    record = history.last(graph, *steps)
    assert record is not None  # the step before this line left it
    return record["facts"]


def joined(
    before: fx.GraphModule,
    after: fx.GraphModule,
    schedule: str,
    trainings: Sequence[Facts],
    facts: Facts,
    options: Facts | None = None,
) -> fx.GraphModule:
    """``after`` with one record in place of all that a schedule left since ``before`` up to its last pruning.

    schedule: as text. trainings: facts of its trainings.
    facts: go before those of the last pruning. options: in place of those of the last pruning.
    """
    since = history.since(after, before)
    place = max(index for index, record in enumerate(since) if record["step"] == "prune")
    final, behind = since[place], since[place + 1 :]
    points = [point for one in trainings for point in one["curve"]]
    curve = [{**point, "epoch": index} for index, point in enumerate(points, 1)]
    timing = {"seconds": sum(one["timing"]["seconds"] for one in trainings)}
    record = history.Record(
        step="prune",
        options={**(final["options"] if options is None else options), "schedule": schedule},
        facts={**final["facts"], **facts, "curve": curve, "timing": timing},
    )
    after.meta["history"] = [*history.records(before), record, *behind]
    return after
