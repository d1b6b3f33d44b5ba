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
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact import folder as folder_module
from rarefy.distillation.distill import distill
from rarefy.errors import CheckFailed, FormatError, InputError
from rarefy.evaluation import measure
from rarefy.evaluation.certify import certify
from rarefy.evaluation.corruptions import fits
from rarefy.evaluation.evaluate import doubts, evaluate
from rarefy.graph.capture import as_graph, output_shapes
from rarefy.graph.macs import layer_macs
from rarefy.kernels import is_quantised
from rarefy.pruning.mask import mask
from rarefy.pruning.prune import prune
from rarefy.quantization.quantize import quantize
from rarefy.reports import report as report_
from rarefy.system.cpu import examine

Step = Mapping[str, Any]

CORRUPTIONS = ("gaussian_noise", "impulse_noise", "gaussian_blur", "brightness", "contrast", "jpeg", "fog", "pixelate")
CORRUPTION_KINDS = 6  # the first so many of these that the images' channels allow
CORRUPTED_IMAGES = 1000
PARITY_IMAGES = 256
BATCH = 64  # of evaluation
CLEARLY = 1.1  # a ratio of latencies that is more than noise
SMALLER = 0.99
QUANTIZED_GAIN = 1.5  # what the usual recipe expects of int8: kernels differ, so less than the 2 to 4 that is common
LEAST = 0.02  # share of the MACs or parameters below which pruning is no advice
SAFETY = 1.2  # latency falls more slowly than MACs
RUN, FINAL = "run.json", "final.json"


@dataclass(frozen=True)
class Budget:
    """What must be reached; None does not matter.

    max_drop: top-1 that may be lost, as a share (0.005 is half a point). speedup: how many times faster on the runtime.
    size: largest size of the weights on disk, bytes.
    """

    max_drop: float | None = None
    speedup: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise InputError(f"budget: max_drop={self.max_drop} is not a share from 0 up to 1; half a point is 0.005")
        if self.speedup is not None and not 1 <= self.speedup < 1000:
            raise InputError(f"budget: speedup={self.speedup} is not a ratio from 1 up to 1000; twice as fast is 2")
        if self.size is not None and not self.size >= 1:
            raise InputError(f"budget: size={self.size} is not a number of bytes; 500 kB are 500_000")


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
            "report.html": report_.html(self.report).encode(),
            "report.json": report_.as_json(self.report).encode(),
        }
        return folder_module.save(self.graph, folder, manifest=self.manifest, files=files)


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
    chosen = measure.with_threads(runtime)
    listed = [dict(step) for step in (steps if steps is not None else usual_steps(budget, measure.weight_bytes(original), task))]
    _check_steps(listed)
    if is_quantised(original) and any(step["do"] in FLOAT_ONLY for step in listed):
        raise InputError(f"compress: the model {QUANTISED}; give its float original, or steps that only distil")
    folder = Path(workdir if workdir is not None else tempfile.mkdtemp(prefix="rarefy-"))
    with contextlib.ExitStack() as failed:
        if workdir is None:
            failed.callback(shutil.rmtree, folder, ignore_errors=True)
        result = _compressed(
            original, task, budget, listed, chosen, folder, seed, device, title, recipe, corruptions, steps is None, progress
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


def usual_steps(budget: Budget, size_bytes: int, task: Any) -> list[dict[str, Any]]:
    """The recipe where none is given. size_bytes: of the original's weights."""
    share = QUANTIZED_GAIN / (SAFETY * budget.speedup) if budget.speedup is not None else 0.5
    target = "macs"
    if budget.size is not None:
        stored = 0.9 * 4 * budget.size / size_bytes  # what may remain, once a weight takes a byte, and scales and biases a tenth
        if stored < share:
            target, share = "params", stored
    steps: list[dict[str, Any]] = []
    if share < 0.9:
        steps += [
            {"do": "prune", target: round(max(0.1, share), 3), "round_to": 8},
            {
                "do": "distill",
                "epochs": 10,
                "batch_size": min(128, task.length("train")),
                **({} if task.labelled("train") else {"hard_weight": 0.0}),
            },
        ]
    return [*steps, {"do": "quantize"}]


@dataclass(frozen=True)
class Candidate:
    """A model found on the way, as it lies in the working folder. ``found``: what was measured of it."""

    index: int
    folder: Path
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.found["name"])

    @property
    def value(self) -> float:
        return float(self.found["evaluation"]["value"])

    @property
    def drop(self) -> float:
        return float((self.found["evaluation"]["drop"] or {"value": 0.0})["value"])

    @property
    def speedup(self) -> float:
        """Against the original."""
        return float(self.found["speedup"]["original"]["median"])

    @cached_property
    def size(self) -> int:
        return (self.folder / folder_module.WEIGHTS).stat().st_size

    def graph(self) -> fx.GraphModule:
        return folder_module.load(self.folder)


@dataclass
class Outcome:
    """What the gate said of a step. ``candidate`` is None where the step could not be done."""

    step: Step
    candidate: Candidate | None
    kept: bool
    why: str


@dataclass
class _Run:
    folder: Path
    task: Any
    budget: Budget
    steps: list[dict[str, Any]]
    runtime: Any
    seed: int
    device: str | None
    corruptions: tuple[str, ...]
    optional: bool  # a step that can't be done is left out
    progress: bool
    original: Candidate = field(init=False)

    # -- the working folder

    @property
    def model(self) -> str:
        """Name of the file that the runtime runs, in each folder."""
        return f"model{self.runtime.suffix}"

    @contextlib.contextmanager
    def opened(self, original: fx.GraphModule) -> Iterator[None]:
        """The folder claimed for this run; the original saved and judged."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            present = {path.name for path in self.folder.iterdir()}
        except OSError as error:
            raise InputError(f"workdir={self.folder}: can't be written ({error.strerror}); name a folder that can") from error
        if present and RUN not in present and not all(name.startswith(f".{RUN}") for name in present):
            raise InputError(f"workdir={self.folder}: is in use for something else ({min(present)} lies there); name another folder")
        for left in self.folder.glob(".*"):  # of a run that was killed while writing
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        mine = self._identity(original)
        if RUN in present:
            theirs = _read(self.folder / RUN)
            other = [name for name in mine if theirs.get(name) != mine[name]]
            if other and all(name in (RUN, "0-original") or name.startswith(".") for name in present):  # no step was done: nothing is lost
                shutil.rmtree(self.folder / "0-original", ignore_errors=True)
                _write(self.folder / RUN, mine)
            elif other:
                raise InputError(
                    f"workdir={self.folder}: holds an unfinished run with another {' and '.join(other)}; "
                    "delete it to start anew, name another folder, or go on with what it was started with"
                )
        else:
            _write(self.folder / RUN, mine)
        self.original = self._stored(0, "original", original, None, {"step": "original"})
        yield

    def _identity(self, original: fx.GraphModule) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            content = folder_module.content_hash(folder_module.save(original, Path(folder) / "original"))
        splits = [split for split in ("train", "val") if getattr(self.task, split, None) is not None]
        identity = {
            "model": content,
            "data": {split: self.task.fingerprint(split) for split in splits},
            "task": {key: value for key, value in self.task.describe().items() if key not in splits},  # those name places, not content
            "budget": dataclasses.asdict(self.budget),
            "recipe": self.steps,
            "runtime": plugins.describe(self.runtime),
            "seed": self.seed,
            "device": self.device,
            "corruptions": list(self.corruptions),
        }
        known: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        return known

    def candidate_of(self, index: int) -> Candidate:
        folder = self._place(index)
        return Candidate(index, folder, folder_module.read_manifest(folder)["found"])

    def _place(self, index: int) -> Path:
        return self.folder / (f"{index}-{self.steps[index - 1]['do']}" if index else "0-original")

    # -- a step, and what is measured of it

    def _attempted(self, index: int, parent: Candidate) -> Candidate | str:
        """The candidate that step ``index`` makes of ``parent``, or why there is none. Done before: read, not done again."""
        step, place = self.steps[index - 1], self._place(index)
        failure = place.with_name(place.name + ".failed.json")
        if failure.exists():
            return str(_read(failure)["why"])
        name = step["do"] if parent.index == 0 else f"{parent.name} + {step['do']}"
        if place.exists():
            return self.candidate_of(index)
        self._say(f"step {index} of {len(self.steps)}: {step['do']}")
        begun = time.monotonic()
        options = {key: value for key, value in step.items() if key != "do"}
        start = parent.graph()
        if step["do"] in FLOAT_ONLY and is_quantised(start):  # a second choice, for where the first is undone
            return f"the model {QUANTISED}"
        try:
            graph = VERBS[step["do"]](self, start, options, place.with_name(place.name + ".training"))
        except (InputError, CheckFailed) as error:
            if isinstance(error, InputError) and not self.optional:
                raise
            _write(failure, {"why": str(error)})
            return str(error)
        record = graph.meta["history"][-1]
        timing = record["facts"].get("timing") or {}
        facts = {key: value for key, value in record["facts"].items() if isinstance(value, (int, float, str, bool))}
        begun -= max(0.0, timing.get("seconds", 0.0) - (time.monotonic() - begun))  # of a training that went on after a kill, all of it
        made = {"step": step["do"], "options": options, "facts": {**facts, **timing}, "curve": record["facts"].get("curve")}
        return self._stored(index, name, _untimed(graph).to("cpu").eval(), parent, made, begun)

    def _stored(
        self, index: int, name: str, graph: fx.GraphModule, parent: Candidate | None, made: dict[str, Any], begun: float | None = None
    ) -> Candidate:
        """Export, judge, measure, and put it all in place at once."""
        place = self._place(index)
        if place.exists():
            return self.candidate_of(index)
        spent = time.monotonic() - begun if begun is not None else 0.0
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            file = Path(folder) / self.model
            self.runtime.export(graph, file)
            session = self.runtime.open(file)
            self._say(f"judging {name}")
            judged = evaluate(
                session,
                self.task,
                reference=self.runtime.open(self.original.folder / self.model) if parent is not None else None,
                batch_size=BATCH,
                progress=self.progress,
            )
            found = {**made, "name": name, "seconds": spent, "evaluation": {**judged.to_json(), "reference": None}}
            others = {} if parent is None else {one.name: one.folder / self.model for one in (self.original, parent)}
            times = measure.timed({**others, name: file}, self._example(1), runtime=self.runtime)[name]
            found |= {"latency_ms": times["latency_ms"], "speedup": times["speedup"]}
            folder_module.save(graph, place, manifest={"found": found}, files={self.model: file})
        return self.candidate_of(index)

    def _example(self, count: int) -> Tensor:
        return torch.cat(list(self.task.inputs("val", count, BATCH, seed=self.seed)))

    # -- gates

    def walked(self) -> tuple[list[Outcome], Candidate]:
        """All steps, each with what its gate said, and the last model kept. Pure in what is stored, but for the steps still to do."""
        outcomes: list[Outcome] = []
        accepted = current = self.original
        open_since = 0  # outcomes from here on wait for the verdict on accuracy
        for index in range(1, len(self.steps) + 1):
            step = self.steps[index - 1]
            made = self._attempted(index, current)
            if isinstance(made, str):
                outcomes.append(Outcome(step, None, False, made))
            else:
                kept, why = self._pays(step, current, made)
                outcomes.append(Outcome(step, made, kept, why))
                current = made if kept else current
            if index < len(self.steps) and self.steps[index]["do"] == "distill" and "student" not in self.steps[index]:
                continue
            most = self.budget.max_drop
            if most is not None and current.drop > most:
                for outcome in outcomes[open_since:]:
                    if outcome.kept:
                        outcome.kept = False
                        outcome.why = f"{current.name} loses {_points(current.drop)}, more than {_points(most)}"
                current = accepted
            accepted, open_since = current, len(outcomes)
            for outcome in outcomes[-1:]:
                self._say(f"{'kept' if outcome.kept else 'undone'}: {outcome.step['do']}: {outcome.why}")
        return outcomes, accepted

    def _pays(self, step: Step, before: Candidate, after: Candidate) -> tuple[bool, str]:
        if step["do"] == "distill" and "student" not in step:
            change = f"top-1 {before.value:.2%} before, {after.value:.2%} after"
            return after.value > before.value, change
        ratio = after.found["speedup"][before.name]
        said = f"{ratio['median']:.2f}x as fast ({ratio['low']:.2f} to {ratio['high']:.2f}), {before.size / after.size:.2f}x smaller"
        if ratio["high"] < 1 / CLEARLY:
            return False, f"it is slower: {said}"
        if after.size > SMALLER * before.size and ratio["low"] < CLEARLY:
            return False, f"neither faster nor smaller: {said}"
        return True, said

    def chosen(self, outcomes: Sequence[Outcome], last: Candidate) -> Candidate:
        """The result; the rule stands in the module's docstring."""
        candidates = [self.original, *(one.candidate for one in outcomes if one.candidate is not None)]
        allowed = [one for one in candidates if self.budget.max_drop is None or one.drop <= self.budget.max_drop]
        met = [one for one in allowed if self._short(one) == 0]
        if self._short(last) < math.log(CLEARLY) or not met:
            return last
        return min(met, key=lambda one: (one.size, -one.index))

    def _short(self, candidate: Candidate) -> float:
        """How far it is from the goals of speed and size."""
        short = 0.0
        if self.budget.speedup is not None:
            short += max(0.0, math.log(self.budget.speedup / candidate.speedup))
        if self.budget.size is not None:
            short += max(0.0, math.log(candidate.size / self.budget.size))
        return short

    # -- the end

    def finished(self, title: str, recipe: str) -> dict[str, Any]:
        """The report's facts."""
        outcomes, last = self.walked()
        path = self.folder / FINAL
        if path.exists():
            return _read(path)
        winner = self.chosen(outcomes, last)
        self._say(f"final evaluation of {winner.name}")
        before, after, parity = self._compared(winner)
        files = {"graph.json": winner.folder / folder_module.GRAPH, "weights.safetensors": winner.folder / folder_module.WEIGHTS}
        hashes = {
            "original": folder_module.content_hash(self.original.folder),
            "teacher": folder_module.content_hash(self.original.folder),
            **{f"data.{split}": digest for split, digest in _read(self.folder / RUN)["data"].items()},
            **{
                name: hashlib.sha256(file.read_bytes()).hexdigest()
                for name, file in {**files, self.model: winner.folder / self.model}.items()
            },
        }
        machine = examine()
        report = {
            "title": title or "a compressed model",
            "goals": self._goals(before, after),
            "warnings": self._warnings(before["evaluation"]),
            "before": {"name": "original", **before},
            "after": {"name": winner.name, **after},
            "steps": [_step_facts(one) for one in outcomes],
            "frontier": [
                {
                    "name": one.name,
                    "value": one.value,
                    "interval": one.found["evaluation"]["interval"],
                    "latency_ms": one.found["latency_ms"]["median"],
                    "size_bytes": one.size,
                    "chosen": one.index == winner.index,
                }
                for one in [self.original, *(one.candidate for one in outcomes if one.candidate is not None)]
            ],
            "layers": _layers(self.original.graph(), winner.graph()),
            "curves": [chart for one in outcomes if one.candidate is not None for chart in _curves(one.candidate)],
            "parity": parity,
            "provenance": {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seed": self.seed,
                "chosen": winner.index,
                "runtime": plugins.describe(self.runtime),
                "budget": {name: value for name, value in dataclasses.asdict(self.budget).items() if value is not None},
                "data": {split: self.task.describe()[split] for split in ("train", "val") if split in self.task.describe()},
                "hashes": hashes,
                "environment": {
                    **{name: machine[name] for name in ("python", "system", "runtimes")},
                    "cpu": {name: machine["cpu"][name] for name in ("name", "usable_cores")},
                    "torch": machine["torch"]["version"],
                    "gpus": [gpu["name"] for gpu in machine["gpus"]],
                },
                "recipe": recipe,
            },
        }
        _write(path, json.loads(report_.as_json(report)))
        return _read(path)

    def _compared(self, winner: Candidate) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Original and result, measured side by side: the exported files, on the same images, in the same rounds."""
        files = {"original": self.original.folder / self.model, "result": winner.folder / self.model}
        first, second = (self.runtime.open(file) for file in files.values())
        whole = self.task.length("val") <= CORRUPTED_IMAGES
        options: dict[str, Any] = {"reference": first, "batch_size": BATCH, "seed": self.seed, "progress": self.progress}
        judged = evaluate(second, self.task, corruptions=self.corruptions if whole else (), **options).to_json()
        reference = judged.pop("reference")
        if not whole and self.corruptions:
            sampled = evaluate(second, self.task, corruptions=self.corruptions, limit=CORRUPTED_IMAGES, **options).to_json()
            judged["robustness"], reference["robustness"] = sampled["robustness"], sampled["reference"]["robustness"]
        example = self._example(1)
        times = measure.timed(files, example, runtime=self.runtime)
        parity = self._certified(winner, files["result"])
        sides = []
        for name, candidate, evaluation in (("original", self.original, reference), ("result", winner, judged)):
            sides.append(
                {
                    **measure.costs(candidate.graph()),
                    "size_bytes": candidate.size,
                    "peak_memory_bytes": measure.peak_memory(files[name], example, runtime=self.runtime),
                    **times[name],
                    "evaluation": evaluation,
                }
            )
        return sides[0], sides[1], parity

    def _certified(self, winner: Candidate, file: Path) -> dict[str, Any]:
        """Parity in the run's runtime, and in each other one that is installed and reads its files."""
        own = plugins.describe(self.runtime)
        others = [name for name in plugins.available("runtimes") if name != own.partition(":")[0]]
        readers = [one for one in map(measure.with_threads, others) if one.suffix == self.runtime.suffix and find_spec(one.package)]
        facts = certify(
            winner.graph(), file, runtime=self.runtime, also=readers, inputs=self._example(PARITY_IMAGES), progress=self.progress
        )
        found = facts["runtimes"]
        certificate: dict[str, Any] = {**found.pop(own), "sha256": facts["sha256"], "also": found}
        return certificate

    def _goals(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
        drop, speedup, size = after["evaluation"]["drop"]["value"], after["speedup"]["original"]["median"], after["size_bytes"]
        asked = self.budget
        goals = []
        if asked.max_drop is not None:
            advice = "distil for more epochs, or prune less"
            goals.append({"name": "max_drop", "asked": asked.max_drop, "reached": drop, "met": drop <= asked.max_drop, "advice": advice})
        if asked.speedup is not None:
            share = 0.9 * after["macs"] / before["macs"] * speedup / asked.speedup
            advice = f"prune to fewer MACs (macs={share:.2f}) and distil for more epochs"
            if share < LEAST:
                advice = "ask for less, or start from a faster architecture (distill with student=): pruning alone does not get there"
            goals.append({"name": "speedup", "asked": asked.speedup, "reached": speedup, "met": speedup >= asked.speedup, "advice": advice})
        if asked.size is not None:
            share = min(1.0, 0.9 * after["parameters"] / before["parameters"] * asked.size / size)
            advice = f"prune to fewer parameters (params={share:.2f}) and distil for more epochs, or quantise to fewer bits (weights=int4)"
            if share < LEAST:
                advice = (
                    "ask for a larger size, or start from a smaller architecture (distill with student=): pruning alone does not get there"
                )
            goals.append({"name": "size", "asked": asked.size, "reached": size, "met": size <= asked.size, "advice": advice})
        return goals

    def _warnings(self, found: Mapping[str, Any]) -> list[str]:
        """found: the original's evaluation."""
        outputs = output_shapes(self.original.graph())[0][0]
        said = doubts(found["value"], tuple(found["interval"]), found["samples"], outputs, self.task.classes)
        return [f"the original: {warning}" for warning in said]

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"compress: {text}", file=sys.stderr, flush=True)


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
    student, options = options.get("student", graph), {name: value for name, value in options.items() if name != "student"}
    return distill(
        student, run.original.graph(), run.task, device=run.device, checkpoint=checkpoint, progress=run.progress, seed=run.seed, **options
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
        functions: dict[str, Callable[..., Any]] = {"prune": prune, "mask": mask, "distill": distill, "quantize": quantize}
        parameters = inspect.signature(functions[verb]).parameters
        known = {name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD} - set(_GIVEN)
        unknown = sorted(step.keys() - known - {"do"})
        if unknown and (len(known) == len(parameters) - len(_GIVEN & parameters.keys()) or unknown[0] in _GIVEN):
            raise InputError(f"step {number} ({verb}): unknown option {unknown[0]!r}; have {', '.join(sorted(known))}")


def _corruptions(asked: Sequence[str] | None, task: Any) -> tuple[str, ...]:
    if asked is not None:
        return tuple(asked)
    return tuple(name for name in CORRUPTIONS if fits(name, task.input_shape[0]))[:CORRUPTION_KINDS]


def _untimed(graph: fx.GraphModule) -> fx.GraphModule:
    """Without the seconds that its history tells: what is saved must not depend on a clock."""
    graph.meta["history"] = [
        {**record, "facts": {key: value for key, value in record.get("facts", {}).items() if key not in ("timing", "seconds")}}
        for record in graph.meta.get("history", [])
    ]
    return graph


# ------------------------------------------------------------------ what the report shows


def _step_facts(outcome: Outcome) -> dict[str, Any]:
    step = {"step": outcome.step["do"], "options": {key: value for key, value in outcome.step.items() if key != "do"}}
    told = {**step, "kept": outcome.kept, "why": outcome.why}
    if outcome.candidate is None:
        return told
    found = outcome.candidate.found
    return {
        **told,
        "facts": {key: value for key, value in found["facts"].items() if value is not None},
        "seconds": found["seconds"],
        "value": outcome.candidate.value,
        "latency_ms": found["latency_ms"]["median"],
        "size_bytes": outcome.candidate.size,
    }


def _curves(candidate: Candidate) -> list[dict[str, Any]]:
    curve = candidate.found.get("curve") or []
    if not curve:
        return []
    epochs = [point["epoch"] for point in curve]
    charts = [{"title": f"{candidate.name}: loss", "x": "epoch", "y": "loss", "key": "loss", "scale": 1.0}]
    charts += [{"title": f"{candidate.name}: validation", "x": "epoch", "y": "top-1, %", "key": "val", "scale": 100.0}]
    return [
        {
            "title": one["title"],
            "x": one["x"],
            "y": one["y"],
            "series": [
                {
                    "name": one["key"],
                    "x": [epoch for epoch, point in zip(epochs, curve, strict=True) if point[one["key"]] is not None],
                    "y": [one["scale"] * point[one["key"]] for point in curve if point[one["key"]] is not None],
                }
            ],
        }
        for one in charts
    ]


def _layers(before: fx.GraphModule, after: fx.GraphModule) -> list[dict[str, Any]]:
    """Each layer with a weight: channels and MACs on both sides, and how it was quantised."""
    was, now = _weighted(before), _weighted(after)
    history = [record["facts"] for record in after.meta.get("history", []) if record["step"] == "quantize"]
    rounded = {layer.get("weight", layer["name"]): layer for layer in (history[-1]["layers"] if history else [])}
    reasons = dict(history[-1].get("reasons") or ()) if history else {}
    rows = []
    for name, (channels, macs) in was.items():
        row: dict[str, Any] = {"name": name.removesuffix(".weight"), "channels_before": channels, "macs_before": macs}
        if name in now:
            row |= {"channels_after": now[name][0], "macs_after": now[name][1], "bits": 32, "activation_bits": 32}
        facts = rounded.get(name) or rounded.get(row["name"])
        if facts is not None:
            row |= {key: facts[key] for key in ("bits", "activation_bits", "error", "sqnr_db") if facts.get(key) is not None}
        elif row["name"] in reasons:
            row["why"] = reasons[row["name"]]
        rows.append(row)
    return rows


def _weighted(graph: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """{name of the weight: (output channels, MACs)}."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found: dict[str, tuple[int, int]] = {}
    for name, macs in layer_macs(graph).items():
        source = nodes[name].args[1] if len(nodes[name].args) > 1 else None
        while isinstance(source, fx.Node) and source.op == "call_function" and source.args:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            target = str(source.target)
            weight: Any = graph.get_parameter(target) if target in dict(graph.named_parameters()) else graph.get_buffer(target)
            found[target.removesuffix(measure.CODES)] = (weight.shape[0], macs)
    return found


def _points(share: float) -> str:
    return f"{100 * share:.2f} points"


# ------------------------------------------------------------------ JSON put in place whole


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: can't be read ({error}); delete the working folder to start anew") from error
    return value
