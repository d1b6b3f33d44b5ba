from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import LEAST, Budget, Step
from rarefy.compression.candidate import Candidate, Outcome
from rarefy.compression.environment import examine
from rarefy.compression.facts import _curves, _layers, _points, _step_facts
from rarefy.compression.steps import FLOAT_ONLY, QUANTISED, VERBS
from rarefy.deployment import latency
from rarefy.deployment.latency import CLEARLY
from rarefy.errors import CheckFailed, FormatError, InputError
from rarefy.evaluation import measure
from rarefy.evaluation.certify import certify
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph.shapes import output_shapes
from rarefy.kernels import is_quantised
from rarefy.reports import report as report_module
from rarefy.tasks.metrics.accuracy import doubts

CORRUPTED_IMAGES = 1000
PARITY_IMAGES = 256
BATCH = 64  # of evaluation
SMALLER = 0.99
RUN, FINAL = "run.json", "final.json"


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
            raise InputError(
                f"workdir={self.folder}: can't be written ({error.strerror}); name a folder that can"
            ) from error
        if present and RUN not in present and not all(name.startswith(f".{RUN}") for name in present):
            raise InputError(
                f"workdir={self.folder}: is in use for something else ({min(present)} lies there); name another folder"
            )
        for left in self.folder.glob(".*"):  # of a run that was killed while writing
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        mine = self._identity(original)
        if RUN in present:
            theirs = _read(self.folder / RUN)
            other = [name for name in mine if theirs.get(name) != mine[name]]
            if other and all(
                name in (RUN, "0-original") or name.startswith(".") for name in present
            ):  # no step was done: nothing is lost
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
        splits = [split for split in ("train", "val") if getattr(self.task, split, None) is not None]
        identity = {
            "model": folder_.content_of(original).hash,
            "data": {split: self.task.fingerprint(split) for split in splits},
            "task": {
                key: value for key, value in self.task.describe().items() if key not in splits
            },  # those name places, not content
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
        return Candidate(index, folder, folder_.read_manifest(folder)["found"])

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
        begun -= max(
            0.0, timing.get("seconds", 0.0) - (time.monotonic() - begun)
        )  # of a training that went on after a kill, all of it
        made = {
            "step": step["do"],
            "options": options,
            "facts": {**facts, **timing},
            "curve": record["facts"].get("curve"),
        }
        return self._stored(index, name, _untimed(graph).to("cpu").eval(), parent, made, begun)

    def _stored(
        self,
        index: int,
        name: str,
        graph: fx.GraphModule,
        parent: Candidate | None,
        made: dict[str, Any],
        begun: float | None = None,
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
            times = latency.timed({**others, name: file}, self._example(1), runtime=self.runtime)[name]
            found |= {"latency_ms": times["latency_ms"], "speedup": times["speedup"]}
            folder_.save(graph, place, manifest={"found": found}, files={self.model: file})
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
        files = {"graph.json": winner.folder / folder_.GRAPH, "weights.safetensors": winner.folder / folder_.WEIGHTS}
        hashes = {
            "original": folder_.content_hash(self.original.folder),
            "teacher": folder_.content_hash(self.original.folder),
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
                "data": {
                    split: self.task.describe()[split] for split in ("train", "val") if split in self.task.describe()
                },
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
        _write(path, json.loads(report_module.as_json(report)))
        return _read(path)

    def _compared(self, winner: Candidate) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Original and result, measured side by side: the exported files, on the same images, in the same rounds."""
        files = {"original": self.original.folder / self.model, "result": winner.folder / self.model}
        first, second = (self.runtime.open(file) for file in files.values())
        whole = self.task.length("val") <= CORRUPTED_IMAGES
        options: dict[str, Any] = {
            "reference": first,
            "batch_size": BATCH,
            "seed": self.seed,
            "progress": self.progress,
        }
        judged = evaluate(second, self.task, corruptions=self.corruptions if whole else (), **options).to_json()
        reference = judged.pop("reference")
        if not whole and self.corruptions:
            sampled = evaluate(
                second, self.task, corruptions=self.corruptions, limit=CORRUPTED_IMAGES, **options
            ).to_json()
            judged["robustness"], reference["robustness"] = sampled["robustness"], sampled["reference"]["robustness"]
        example = self._example(1)
        times = latency.timed(files, example, runtime=self.runtime)
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
        readers = [
            one
            for one in map(latency.with_threads, others)
            if one.suffix == self.runtime.suffix and find_spec(one.package)
        ]
        facts = certify(
            winner.graph(),
            file,
            runtime=self.runtime,
            also=readers,
            inputs=self._example(PARITY_IMAGES),
            progress=self.progress,
        )
        found = facts["runtimes"]
        certificate: dict[str, Any] = {**found.pop(own), "sha256": facts["sha256"], "also": found}
        return certificate

    def _goals(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
        drop, speedup, size = (
            after["evaluation"]["drop"]["value"],
            after["speedup"]["original"]["median"],
            after["size_bytes"],
        )
        asked = self.budget
        goals = []
        if asked.max_drop is not None:
            advice = "distil for more epochs, or prune less"
            goals.append(
                {
                    "name": "max_drop",
                    "asked": asked.max_drop,
                    "reached": drop,
                    "met": drop <= asked.max_drop,
                    "advice": advice,
                }
            )
        if asked.speedup is not None:
            share = 0.9 * after["macs"] / before["macs"] * speedup / asked.speedup
            advice = f"prune to fewer MACs (macs={share:.2f}) and distil for more epochs"
            if share < LEAST:
                advice = "ask for less, or start from a faster architecture (distill with student=): pruning alone does not get there"
            goals.append(
                {
                    "name": "speedup",
                    "asked": asked.speedup,
                    "reached": speedup,
                    "met": speedup >= asked.speedup,
                    "advice": advice,
                }
            )
        if asked.size is not None:
            share = min(1.0, 0.9 * after["parameters"] / before["parameters"] * asked.size / size)
            advice = f"prune to fewer parameters (params={share:.2f}) and distil for more epochs, or quantise to fewer bits (weights=int4)"
            if share < LEAST:
                advice = "ask for a larger size, or start from a smaller architecture (distill with student=): pruning alone does not get there"
            goals.append(
                {"name": "size", "asked": asked.size, "reached": size, "met": size <= asked.size, "advice": advice}
            )
        return goals

    def _warnings(self, found: Mapping[str, Any]) -> list[str]:
        """found: the original's evaluation."""
        outputs = output_shapes(self.original.graph())[0][0]
        said = doubts(found["value"], tuple(found["interval"]), found["samples"], outputs, self.task.classes)
        return [f"the original: {warning}" for warning in said]

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"compress: {text}", file=sys.stderr, flush=True)


def _untimed(graph: fx.GraphModule) -> fx.GraphModule:
    """Without the seconds that its history tells: what is saved must not depend on a clock."""
    graph.meta["history"] = [
        {
            **record,
            "facts": {key: value for key, value in record.get("facts", {}).items() if key not in ("timing", "seconds")},
        }
        for record in graph.meta.get("history", [])
    ]
    return graph


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
