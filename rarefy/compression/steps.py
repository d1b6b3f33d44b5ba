from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from rarefy.compression.budget import Step
from rarefy.distillation.distill import distill
from rarefy.errors import InputError
from rarefy.pruning.mask import mask
from rarefy.pruning.prune import prune
from rarefy.quantization.quantize import quantize

if TYPE_CHECKING:
    from rarefy.compression.run import _Run


# ------------------------------------------------------------------ the verbs, with what the run hands them


def _prune(run: _Run, graph: fx.GraphModule, options: dict[str, Any], checkpoint: Path) -> fx.GraphModule:
    return prune(
        graph.to(run.device or "cpu"),
        task=run.task,
        seed=run.seed,
        device=run.device,
        checkpoint=checkpoint,
        progress=run.progress,
        **options,
    )


def _mask(run: _Run, graph: fx.GraphModule, options: dict[str, Any], checkpoint: Path) -> fx.GraphModule:
    return mask(graph.to(run.device or "cpu"), task=run.task, seed=run.seed, **options)


def _distill(run: _Run, graph: fx.GraphModule, options: dict[str, Any], checkpoint: Path) -> fx.GraphModule:
    student, options = (
        options.get("student", graph),
        {name: value for name, value in options.items() if name != "student"},
    )
    return distill(
        student,
        run.original.graph(),
        run.task,
        device=run.device,
        checkpoint=checkpoint,
        progress=run.progress,
        seed=run.seed,
        **options,
    )


def _quantize(run: _Run, graph: fx.GraphModule, options: dict[str, Any], checkpoint: Path) -> fx.GraphModule:
    return quantize(graph, run.task, runtime=run.runtime, seed=run.seed, progress=run.progress, **options)


VERBS: dict[str, Callable[[_Run, fx.GraphModule, dict[str, Any], Path], fx.GraphModule]] = {
    "prune": _prune,
    "mask": _mask,
    "distill": _distill,
    "quantize": _quantize,
}
FLOAT_ONLY = ("prune", "mask", "quantize")
QUANTISED = "is quantised already"
_GIVEN = ("model", "teacher", "task", "seed", "device", "checkpoint", "runtime", "progress", "penalty")


def _check_steps(steps: Sequence[Step]) -> None:
    """Told before the first hour of work, not after it."""
    if not steps:
        raise InputError("compress: no step is left; give at least one, such as {'do': 'quantize'}")
    for number, step in enumerate(steps, 1):
        verb = step.get("do")
        if verb not in VERBS:
            raise InputError(f"step {number}: do={verb!r} is no step; have {', '.join(VERBS)}")
        functions: dict[str, Callable[..., Any]] = {
            "prune": prune,
            "mask": mask,
            "distill": distill,
            "quantize": quantize,
        }
        parameters = inspect.signature(functions[verb]).parameters
        known = {name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD} - set(_GIVEN)
        unknown = sorted(step.keys() - known - {"do"})
        if unknown and (len(known) == len(parameters) - len(_GIVEN & parameters.keys()) or unknown[0] in _GIVEN):
            raise InputError(f"step {number} ({verb}): unknown option {unknown[0]!r}; have {', '.join(sorted(known))}")
