"""compress(): prune, distil and quantise under one budget, with a gate after each step.

**Steps** are those of the recipe, else the usual ones: ``prune`` (to the MACs that the wanted speed-up leaves, once quantization has given its
share), ``distill`` (the original teaches), ``quantize``. Each starts from the last model that was kept.

**Gates.** After each step the model is exported, and the exported file is judged: top-1 on the validation images, paired with the original's, and
latency in one interleaved run with the original and the model the step started from. A step is undone if it does not pay:

* prune, mask, quantize: clearly slower than before; or neither smaller (by 1 %) nor clearly faster. *Clearly*: by 10 %, in three of four rounds. A difference
  inside the noise never decides, so that two runs decide alike.
* distill: top-1 did not rise. With ``student="depth:keep=0.5"`` (rarefy/compression/students) it puts another network, made of the original, in place of what was
  there before, and is judged like prune.
* all: the drop is above ``max_drop``. What is followed by a distillation is judged together with it, since that is what repairs it;
  then both are undone.

**The result** is the last model kept, unless it clearly misses a goal of speed or size that another candidate meets, an undone one perhaps: then the
smallest of those. It is within ``max_drop`` in any case (the original always is): accuracy is never traded for speed that was asked in vain. It
is always saved; what is missed is said.

**Resuming.** In the working folder each finished step is a saved model with its measurements, put in place by one rename; training keeps its own
checkpoint beside them. A run that was killed anywhere goes on from there, and decides by what was measured before the kill. Another model, data, budget
or recipe is refused, once a step was done. ``graph.json``, ``weights.safetensors`` and ``model.onnx`` hold no time of any clock: a resumed run, and a second run with the same seed on
the same machine, ends with the same bytes, as long as the gates decide alike (a step that is 10 % slower or faster lies at a threshold; the report gives each verdict with its
numbers). ``manifest.json`` and the report hold measurements, and differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Budget, Step, usual_steps
from rarefy.compression.run import _Run, _untimed
from rarefy.compression.steps import FLOAT_ONLY, QUANTISED, _check_steps
from rarefy.deployment import latency
from rarefy.errors import InputError
from rarefy.evaluation import measure
from rarefy.evaluation.corruptions import fits
from rarefy.graph.capture import as_graph
from rarefy.kernels import is_quantised
from rarefy.reports import report as report_module

CORRUPTIONS = ("gaussian_noise", "impulse_noise", "gaussian_blur", "brightness", "contrast", "jpeg", "fog", "pixelate")
CORRUPTION_KINDS = 6  # the first so many of these that the images' channels allow


@dataclass(frozen=True)
class Result:
    """What ``compress`` found.

    graph: the model. report: the facts (schema: ``rarefy/reports/report.py``); ``report["goals"]`` says what was met. model: the exported file, which
    goes with this object unless a workdir was named.
    """

    graph: fx.GraphModule
    report: dict[str, Any]
    model: Path
    manifest: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def met(self) -> bool:
        """Were all goals reached?"""
        return all(goal["met"] for goal in self.report["goals"])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """The folder of ``artifact.save``, with ``model.onnx`` (or what the runtime calls its files), ``report.html`` and ``report.json``."""
        files: dict[str, bytes | Path] = {
            self.model.name: self.model,
            "report.html": report_module.html(self.report).encode(),
            "report.json": report_module.as_json(self.report).encode(),
        }
        return folder_.save(self.graph, folder, manifest=self.manifest, files=files)


def compress(
    model: nn.Module,
    task: Any,
    *,
    budget: Budget,
    inputs: Tensor | Sequence[Tensor] | None = None,
    steps: Sequence[Step] | None = None,
    runtime: Any = "onnxruntime",
    workdir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    title: str = "",
    recipe: str = "",
    corruptions: Sequence[str] | None = None,
    progress: bool = True,
) -> Result:
    """The smallest and fastest model found that keeps the budget; the docstring of this module says how.

    model: a graph or a module. inputs: an example batch to capture it; None: zeros of the task's shape. task: data with a val split.
    steps: ``[{"do": "prune", "macs": 0.5}, {"do": "distill", "epochs": 3}, {"do": "quantize"}]``, options as the verbs take them; None: the usual.
    runtime: where it will run, ``"onnxruntime:threads=4"``; one thread unless said. workdir: where a killed run goes on; None: it starts anew.
    device: for training. title, recipe: what the report calls it. corruptions: for robustness, () for none; None: six.

    A missed goal is no error: see ``Result.met``. Raises InputError for what can't be done, or for a workdir of another run.
    """
    if not isinstance(budget, Budget):
        raise InputError(f"compress: budget={budget!r} is no Budget; pass rarefy.Budget(max_drop=0.005, speedup=2)")
    given = inputs if inputs is not None else torch.zeros(2, *task.input_shape)
    if getattr(task, "val", None) is None:
        raise InputError("compress: the task has no validation data, without which no drop can be measured; pass val=")
    original = _untimed(as_graph(model, given)).eval()
    chosen = latency.with_threads(runtime)
    listed = [
        dict(step)
        for step in (steps if steps is not None else usual_steps(budget, measure.weight_bytes(original), task))
    ]
    _check_steps(listed)
    if is_quantised(original) and any(step["do"] in FLOAT_ONLY for step in listed):
        raise InputError(f"compress: the model {QUANTISED}; give its float original, or steps that only distil")
    folder = Path(workdir if workdir is not None else tempfile.mkdtemp(prefix="rarefy-"))
    with contextlib.ExitStack() as failed:
        if workdir is None:
            failed.callback(shutil.rmtree, folder, ignore_errors=True)
        result = _compressed(
            original,
            task,
            budget,
            listed,
            chosen,
            folder,
            seed,
            device,
            title,
            recipe,
            corruptions,
            steps is None,
            progress,
        )
        failed.pop_all()
    if workdir is None:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _compressed(
    original: fx.GraphModule,
    task: Any,
    budget: Budget,
    listed: list[dict[str, Any]],
    chosen: Any,
    folder: Path,
    seed: int,
    device: str | torch.device | None,
    title: str,
    recipe: str,
    corruptions: Sequence[str] | None,
    optional: bool,
    progress: bool,
) -> Result:
    run = _Run(
        folder=folder,
        task=task,
        budget=budget,
        steps=listed,
        runtime=chosen,
        seed=seed,
        device=None if device is None else str(device),
        corruptions=_corruptions(corruptions, task),
        optional=optional,
        progress=progress,
    )
    with run.opened(original):
        report = run.finished(title, recipe)
    winner = run.candidate_of(report["provenance"]["chosen"])
    manifest = {
        "recipe": recipe,
        "steps": listed,
        "seed": seed,
        "budget": dataclasses.asdict(budget),
        "task": task.describe(),
        "runtime": plugins.describe(chosen),
        "hashes": report["provenance"]["hashes"],
        "environment": report["provenance"]["environment"],
        "measurements": {name: report[name] for name in ("goals", "before", "after", "parity")},
    }
    return Result(winner.graph(), report, winner.folder / run.model, manifest)


def _corruptions(asked: Sequence[str] | None, task: Any) -> tuple[str, ...]:
    if asked is not None:
        return tuple(asked)
    return tuple(name for name in CORRUPTIONS if fits(name, task.input_shape[0]))[:CORRUPTION_KINDS]
