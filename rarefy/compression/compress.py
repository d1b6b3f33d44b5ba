"""compress(): prune, distil and quantise under one budget, with a gate after each step.

**Steps** are those of the recipe, else the usual ones: ``prune`` (to the MACs that the wanted speed-up leaves, once
quantization has given its share), ``distill`` (the original teaches), ``quantize``. Each starts from the last model
that was kept.

**Gates.** After each step the model is exported, and the exported file is judged: the task's metric on the validation
images, paired with the original's, and latency in one interleaved run with the original and the model the step started
from. A step that does not pay is undone; ``gates`` says when, and which model is the result. The result is always
saved; what is missed is said.

**Resuming.** In the working folder (``run``) each finished step is a saved model with its measurements, put in place by
one rename; training keeps its own checkpoint beside them. A run that was killed anywhere goes on from there, and
decides by what was measured before the kill. Another model, data, budget or recipe is refused, once a step was done.
``graph.json``, ``weights.safetensors`` and ``model.onnx`` hold no time of any clock: a resumed run, and a second run
with the same seed on the same machine, ends with the same bytes, as long as the gates decide alike (a step that is 10 %
slower or faster lies at a threshold; the report gives each verdict with its numbers). ``manifest.json`` and the report
hold measurements, and differ.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression import facts, gates
from rarefy.compression.budget import Budget, Step, usual_steps
from rarefy.compression.candidate import RUN, Candidate
from rarefy.compression.comparison import compare
from rarefy.compression.run import FINAL, Folder, Run, read_json, without_clocks, write_json
from rarefy.compression.steps import FLOAT_ONLY, QUANTISED, check_steps
from rarefy.deployment import description, latency
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError
from rarefy.evaluation import card, measure
from rarefy.evaluation.corruptions import fits
from rarefy.graph.nodes import is_graph, share_copy
from rarefy.kernels import is_quantised
from rarefy.models import fitting
from rarefy.reports import prices as prices_
from rarefy.reports import report as report_module
from rarefy.reports import shown
from rarefy.reports.facts import Facts, status
from rarefy.system.logs import Logging, Logs
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task, settled

CORRUPTIONS = ("gaussian_noise", "impulse_noise", "gaussian_blur", "brightness", "contrast", "jpeg", "fog", "pixelate")
CORRUPTION_KINDS = 6  # the first so many of these that the images' channels allow


@dataclass(frozen=True)
class Result:
    """What ``compress`` found.

    graph: the model.
    report: the facts (``rarefy/reports/facts.py``); ``report["goals"]`` says what was met, and what is not shown by so
        many images.
    model: the exported file, which goes with this object unless a workdir was named.
    manifest: what ``save`` writes beside the model: recipe, seed, hashes, measurements.
    """

    graph: fx.GraphModule
    report: Facts
    model: Path
    manifest: Mapping[str, object] = field(repr=False, default_factory=dict)

    @property
    def met(self) -> bool:
        """Was no goal missed? One that the images do not show is not missed; ``report["verdict"]`` tells it."""
        return all(status(goal) != "missed" for goal in self.report["goals"])

    def __str__(self) -> str:
        """The verdict, and before and after."""
        return report_module.summary(self.report).rstrip()

    def _repr_html_(self) -> str:
        """For a notebook: the same as a table."""
        return shown.table(self.report)

    def plot(self) -> shown.Picture:
        """All that was found, as a notebook draws it; ``plot().save("front.svg")`` writes it."""
        return shown.frontier(self.report)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """The folder of ``artifact.save``, with the exported file, ``report.html`` and ``report.json``.

        And ``README.md``, and ``predict.py``, where the file takes pictures.
        """
        files: dict[str, bytes | Path] = {
            self.model.name: self.model,
            "report.html": report_module.html(self.report).encode(),
            "report.json": report_module.as_json(self.report).encode(),
        }
        program = description.program_for(self.graph, self.model.name)
        if program is not None and self.model.suffix == ".onnx":
            files[description.PROGRAM] = program.encode()
        files[card.README] = card.text(self.graph, self.report, files).encode()
        return folder_.save(self.graph, folder, manifest=self.manifest, files=files)


def compress(
    model: nn.Module,
    task: Task,
    *,
    budget: Budget,
    inputs: Tensor | Sequence[Tensor] | None = None,
    steps: Sequence[Step] | None = None,
    runtime: str | Runtime = "onnxruntime",
    workdir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    store: str | None = None,
    title: str = "",
    recipe: str = "",
    corruptions: Sequence[str] | None = None,
    logs: Logging = None,
    prices: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """The smallest and fastest model found that keeps the budget; the docstring of this module says how.

    model: a graph or a module. task: data with a val split, a loss and a metric. budget: what must be reached.
    inputs: an example batch to capture the model; None: zeros of the task's shape.
    steps: ``[{"do": "prune", "macs": 0.5}, {"do": "distill", "epochs": 3}, {"do": "quantize"}]``, options as the verbs
        take them; None: the usual.
    runtime: where it will run, ``"onnxruntime:threads=4"``; one thread unless said.
    workdir: where a killed run goes on; None: it starts anew.
    device: for training. store: of the result, and of what its size is; as ``artifact.folder.save`` takes it.
    title, recipe: what the report calls it, and the recipe that it shows.
    corruptions: for robustness, () for none; None: six.
    logs: who is told the numbers of each training while it runs, and of each step's model; as ``distill`` takes them.
    prices: a TOML file by which the report reckons costs, and who made the model (``reports/prices.py``).

    A missed goal is no error: see ``Result.met``. Raises InputError for what can't be done, or for the workdir of
    another run.
    """
    _check(budget, task)
    if inputs is None and not is_graph(model):  # size and channels that nobody gave, as the model takes them
        task = fitting.fit_module(model, task)
    task = settled(task, model)
    example = inputs if inputs is not None else torch.zeros(2, *task.data.input_shape)
    original = _stored(description.remember(without_clocks(capture(model, example)).eval(), task), store)
    listed = steps if steps is not None else usual_steps(budget, measure.weight_bytes(original), task)
    run = Run(
        task=task,
        budget=budget,
        steps=[dict(step) for step in listed],
        runtime=latency.with_threads(runtime),
        seed=seed,
        device=None if device is None else str(device),
        corruptions=tuple(corruptions if corruptions is not None else usual_corruptions(task)),
        optional=steps is None,
        progress=progress,
        logs=plugins.several("loggers", logs),
        priced=prices_.told(prices),
    )
    _check_steps(run, original)
    if workdir is None:
        return _in_a_folder_of_its_own(run, original, title, recipe)
    return _compressed(Folder(Path(workdir), run), original, title, recipe)


def _check(budget: object, task: Task) -> None:
    if not isinstance(budget, Budget):
        raise InputError(f"compress: budget={budget!r} is no Budget; pass rarefy.Budget(max_drop=0.005, speedup=2)")
    if task.data.val is None:
        raise InputError("compress: the task has no validation data, without which no drop can be measured; pass val=")


def _check_steps(run: Run, original: fx.GraphModule) -> None:
    check_steps(run.steps)
    if is_quantised(original) and any(step["do"] in FLOAT_ONLY for step in run.steps):
        raise InputError(f"compress: the model {QUANTISED}; give its float original, or steps that only distil")


def _stored(graph: fx.GraphModule, store: str | None) -> fx.GraphModule:
    """The same weights in a graph that is saved in that way, as is all that is made of it."""
    if store is None:
        return graph
    found = share_copy(graph)
    found.meta["store"] = folder_.store_of(graph, store)
    return found


def _in_a_folder_of_its_own(run: Run, original: fx.GraphModule, title: str, recipe: str) -> Result:
    """The folder goes with the result."""
    path = Path(tempfile.mkdtemp(prefix="rarefy-"))
    try:
        result = _compressed(Folder(path, run), original, title, recipe)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    weakref.finalize(result, shutil.rmtree, path, ignore_errors=True)
    return result


def usual_corruptions(task: Task) -> list[str]:
    channels = task.data.input_shape[0]
    return [name for name in CORRUPTIONS if fits(name, channels)][:CORRUPTION_KINDS]


def _compressed(folder: Folder, graph: fx.GraphModule, title: str, recipe: str) -> Result:
    """graph: the original."""
    with folder.locked():
        return _finished(folder, graph, title, recipe)


def _finished(folder: Folder, graph: fx.GraphModule, title: str, recipe: str) -> Result:
    """In the working folder, which is this run's alone meanwhile."""
    run = folder.run
    folder.claim(graph)
    candidates, walk = walked(folder, folder.original(graph))
    return concluded(folder, run, candidates, walk, title, recipe)


def concluded(
    folder: Folder, run: Run, candidates: Mapping[int, Candidate], walk: gates.Walk, title: str, recipe: str
) -> Result:
    """The result beside the original, measured once and told. run: the folder's, perhaps with a budget to judge by."""
    final = folder.path / FINAL
    if not final.exists():
        chosen = gates.chosen([one.measurement for one in candidates.values()], walk.accepted, folder.run.budget)
        result = candidates[chosen.index]
        run.say(f"final evaluation of {result.name}")
        comparison = compare(run, candidates[0], result)
        fingerprints = cast(dict[str, str], read_json(folder.path / RUN)["data"])
        told = facts.of(run, title, recipe, candidates, walk.outcomes, result, comparison, fingerprints)
        write_json(final, json.loads(report_module.as_json(told)))
    report = cast(Facts, {**read_json(final), **run.priced})
    result = candidates[cast(int, report["provenance"]["chosen"])]
    manifest = {
        "recipe": recipe,
        "steps": run.steps,
        "seed": run.seed,
        "budget": dataclasses.asdict(run.budget),
        "task": run.task.describe(),
        "runtime": plugins.describe(run.runtime),
        "hashes": report["provenance"]["hashes"],
        "environment": report["provenance"]["environment"],
        "measurements": {
            "goals": report["goals"],
            "before": report["before"],
            "after": report["after"],
            "parity": report["parity"],
        },
    }
    return Result(result.graph, report, result.folder / run.model_file, manifest)


def walked(folder: Folder, original: Candidate) -> tuple[dict[int, Candidate], gates.Walk]:
    """All steps done, each from where the gates lead: original and steps' models by index, and the verdicts."""
    run, metric = folder.run, folder.run.task.metric()
    candidates, results = {0: original}, list[gates.Measurement | str]()
    logs = Logs(run.logs, "compress", 0, {"budget": dataclasses.asdict(run.budget), "steps": run.steps})
    _tell(logs, original)
    walk = gates.walk(original.measurement, run.steps, results, run.budget, metric)
    for index in range(1, len(run.steps) + 1):
        attempt = folder.attempt(index, candidates[walk.current.index], original)
        if isinstance(attempt, Candidate):
            candidates[index] = attempt
            _tell(logs, attempt)
        results.append(attempt.measurement if isinstance(attempt, Candidate) else attempt)
        walk = gates.walk(original.measurement, run.steps, results, run.budget, metric)
        if not gates.is_repaired(run.steps, index - 1):
            last = walk.outcomes[-1]
            run.say(f"{'kept' if last.kept else 'undone'}: {last.step['do']}: {last.why}")
    logs.close()
    return candidates, walk


def _tell(logs: Logs, model: Candidate) -> None:
    """A point a step's model; 0 is the original."""
    found, timed = model.measurement, model.record.get("latency_ms")
    faster = found.speedup.get(gates.ORIGINAL)
    logs.add(
        found.index,
        value=found.value,
        drop=found.drop,
        size_bytes=found.size,
        latency_ms=None if timed is None else timed["median"],
        speedup=None if faster is None else faster.median,
    )
