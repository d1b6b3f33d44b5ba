"""The steps of a recipe: each verb with what the run hands to it, and the options that are left to the recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from rarefy.compression.budget import Step
from rarefy.deployment.runtime import Runtime
from rarefy.distillation.distill import distill
from rarefy.errors import InputError
from rarefy.pruning.mask import mask
from rarefy.pruning.prune import prune
from rarefy.quantization.clustering.cluster import cluster
from rarefy.quantization.quantize import quantize
from rarefy.system.logs import Callback, Logger
from rarefy.system.options import options_of
from rarefy.tasks.task import Task

QUANTISED = "is quantised already"
FLOAT_ONLY = ("prune", "mask", "cluster", "quantize")  # steps that a quantised model can't take

# What the run hands to a verb, and a step therefore does not.
GIVEN = frozenset(
    {"model", "teacher", "task", "seed", "device", "checkpoint", "runtime", "progress", "penalty", "logs"}
)
# What the run hands to a verb too, unless the step says something else.
REPLACED = frozenset({"student"})


@dataclass(frozen=True)
class Context:
    """What a run hands to each of its steps, beside the model.

    teachers: the original first, with their weights. checkpoint: a folder that a training may use, to go on after a
    kill.
    device: where training and calibration run; None: where the verb likes. logs: who is told a training's numbers.
    """

    task: Task
    teachers: Sequence[tuple[float, fx.GraphModule]]
    runtime: Runtime
    seed: int
    device: str | None
    checkpoint: Path
    progress: bool
    logs: Sequence[Logger | Callback] = ()


Options = Mapping[str, Any]  # keywords of a verb, as the recipe gives them


def _prune(graph: fx.GraphModule, context: Context, options: Options) -> fx.GraphModule:
    return prune(
        _on(context.device, graph),
        task=context.task,
        seed=context.seed,
        device=context.device,
        checkpoint=context.checkpoint,
        progress=context.progress,
        **options,
    )


def _mask(graph: fx.GraphModule, context: Context, options: Options) -> fx.GraphModule:
    return mask(_on(context.device, graph), task=context.task, seed=context.seed, **options)


def _cluster(graph: fx.GraphModule, context: Context, options: Options) -> fx.GraphModule:
    return cluster(_on(context.device, graph), task=context.task, **options)


def _distill(graph: fx.GraphModule, context: Context, options: Options) -> fx.GraphModule:
    return distill(
        options.get("student", graph),
        context.teachers if len(context.teachers) > 1 else context.teachers[0][1],
        context.task,
        device=context.device,
        checkpoint=context.checkpoint,
        progress=context.progress,
        seed=context.seed,
        logs=context.logs,
        **{name: value for name, value in options.items() if name != "student"},
    )


def _quantize(graph: fx.GraphModule, context: Context, options: Options) -> fx.GraphModule:
    return quantize(
        graph,
        context.task,
        runtime=context.runtime,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        **options,
    )


def _on(device: str | None, graph: fx.GraphModule) -> fx.GraphModule:
    return graph if device in (None, "cpu") else copy.deepcopy(graph).to(device)


class Verb(NamedTuple):
    """function: whose options a step takes. run: calls it with them and with what the run hands to it."""

    function: Callable[..., fx.GraphModule]
    run: Callable[[fx.GraphModule, Context, Options], fx.GraphModule]


VERBS = {
    "prune": Verb(prune, _prune),
    "mask": Verb(mask, _mask),
    "cluster": Verb(cluster, _cluster),
    "distill": Verb(distill, _distill),
    "quantize": Verb(quantize, _quantize),
}


def check_steps(steps: Sequence[Step]) -> None:
    """Told before the first hour of work, not after it: raises InputError for what is no step or no option of one."""
    if not steps:
        raise InputError("compress: no step is left; give at least one, such as {'do': 'quantize'}")
    for number, step in enumerate(steps, 1):
        verb = step.get("do")
        if verb not in VERBS:
            raise InputError(f"step {number}: do={verb!r} is no step; have {', '.join(VERBS)}")
        known = options_of(VERBS[str(verb)].function).keys() - GIVEN
        unknown = sorted(step.keys() - known - {"do"})
        if unknown:
            raise InputError(f"step {number} ({verb}): unknown option {unknown[0]!r}; have {', '.join(sorted(known))}")
