"""One trial: a run of ``compress`` on its recipe, its model then timed beside the original, on the host that counts.

*Making* (any worker): widths are refined, the smallest trained network that they can be cut from is taken for a start,
and ``compress`` walks the steps in the trial's folder, without a clock. *Timing* (the named host): the file takes turns
with the original's. *Saving* (the same host, for points that nobody beats): all is measured as ``compress`` measures a
result, certified, told, and put into ``points/``.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Budget, Step
from rarefy.compression.candidate import Candidate
from rarefy.compression.compress import concluded, walked
from rarefy.compression.gates import ORIGINAL
from rarefy.compression.run import FIRST, Folder, Run
from rarefy.compression.search.first import refined
from rarefy.compression.search.front import POINTS, Clock, Point, Quartiles
from rarefy.compression.search.journal import Trial
from rarefy.compression.search.plans import cost_of
from rarefy.compression.search.profile import Network, Profile
from rarefy.compression.search.space import Genome, Lengths, recipe
from rarefy.deployment import latency
from rarefy.deployment.runtime import Runtime
from rarefy.errors import CheckFailed, InputError
from rarefy.graph import history
from rarefy.graph.macs import count_macs
from rarefy.kernels import is_quantised
from rarefy.reports.facts import Facts
from rarefy.reports.facts import Point as Mark
from rarefy.tasks.task import Task

WORK, BASE, IMAGES = "work", "base", 64
ROUNDS = 60  # of the first timing; what is saved is timed again, for four seconds


@dataclass(frozen=True)
class Setting:
    """What all trials of a folder have in common.

    graph: the original. refine: are widths refined by level switches? corruptions: of what is saved. also: runtimes
    that trials are timed on beside the first. priced: ``prices`` and ``about`` of the reports.
    """

    folder: Path
    graph: fx.GraphModule
    task: Task
    budget: Budget
    runtime: Runtime
    lengths: Lengths
    seed: int
    device: str | None
    title: str
    refine: bool
    corruptions: tuple[str, ...]
    progress: bool
    also: tuple[Runtime, ...] = ()
    priced: Mapping[str, object] = field(default_factory=dict)

    def run(self, steps: Sequence[Step], seed: int, start: Path | None = None) -> Run:
        return Run(
            task=self.task,
            budget=Budget(),
            steps=steps,
            runtime=self.runtime,
            seed=seed,
            device=self.device,
            progress=False,
            start=start,
            timed=False,
            optional=False,
        )

    def place(self, number: int) -> Path:
        return self.folder / WORK / f"{number:04d}"

    def original(self) -> Candidate:
        """Saved and judged once, for all trials."""
        base = Folder(self.folder / BASE, self.run([], self.seed))
        if not base.place(0).exists():
            base.claim(self.graph)
        return base.original(self.graph)

    def network(self) -> Network:
        images = torch.cat(list(self.task.data.inputs("train", IMAGES, IMAGES, seed=self.seed)))
        return Network(self.graph, images)


def make(
    setting: Setting, profile: Profile, network: Network, trial: Trial, trials: Sequence[Trial]
) -> tuple[Genome, dict[str, object]]:
    """The trial's choice as it was carried out, and what came of it. Raises what its steps raise."""
    begun, worked = time.monotonic(), time.process_time()
    genome, start = _begun(setting, profile, network, trial, trials)
    parent = None if start is None else start.genome
    taught = parent is not None and parent.rung > 0
    steps = recipe(profile.families, genome, setting.lengths, parent, taught)
    begin = None if start is None else setting.folder / str(start.told["float"])
    run = setting.run(steps, trial.number + 1000 * setting.seed, begin)
    folder = Folder(setting.place(trial.number), run)
    folder.claim(setting.graph)
    candidates, walk = walked(folder, folder.adopted(setting.original()))
    failed = next((one.why for one in walk.outcomes if one.result is None), None)
    if failed is not None:
        raise InputError(failed)
    result = candidates[walk.accepted.index]
    floats = [
        one for one in candidates.values() if one.index and not is_quantised(one.graph) and one.index <= result.index
    ]
    whole = result.record["evaluation"]
    record = history.last(result.graph, "quantize")
    bits = ((record["facts"].get("allocation") or {}).get("bits") or {}) if record is not None else {}
    float_cost = profile.cost(genome.levels)
    if genome.student is not None and floats:
        float_cost = count_macs(floats[-1].graph) / max(1, count_macs(setting.graph))
    drop = whole["drop"] or {}
    return genome, {
        "name": _named(genome, profile, result.name),
        "value": whole["value"],
        "interval": list(whole["interval"]),
        "drop": result.measurement.drop,
        **({"drop_interval": list(drop["interval"])} if drop.get("interval") else {}),
        "size": result.measurement.size,
        "cost": cost_of(float_cost, genome),
        "result": str(result.folder.relative_to(setting.folder)),
        "float": _float_of(setting, floats, begin),
        "bits": genome.switched or bits,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - worked,
        "recipe": [dict(step) for step in steps],
    }


def _begun(
    setting: Setting, profile: Profile, network: Network, trial: Trial, trials: Sequence[Trial]
) -> tuple[Genome, Trial | None]:
    """The widths refined, and the trial whose model is the start; None: the original's."""
    genome, finished = trial.genome, {one.number: one for one in trials if one.number < trial.first and one.told}
    if genome.parent is not None:
        return genome, finished.get(genome.parent)
    if setting.refine and genome.student is None and genome.levels != profile.whole and not genome.switched:
        known = any(one.genome.levels == genome.levels for one in finished.values())  # refined before
        if not known:
            genome = dataclasses.replace(genome, levels=refined(profile, network, genome.levels, trial.number))
    able = [
        one
        for one in finished.values()
        if one.genome.rung > 0
        and one.genome.student is None
        and all(theirs >= ours for theirs, ours in zip(one.genome.levels, genome.levels, strict=True))
    ]
    if genome.student is not None or not able or not setting.refine:
        return genome, None
    start = min(able, key=lambda one: (profile.cost(one.genome.levels), -one.genome.rung, float(str(one.told["drop"]))))
    return dataclasses.replace(genome, parent=start.number), start


def _float_of(setting: Setting, floats: Sequence[Candidate], begin: Path | None) -> str:
    """The model that a later trial may begin with."""
    place = floats[-1].folder if floats else begin if begin is not None else setting.folder / BASE / FIRST
    return str(place.relative_to(setting.folder))


def _named(genome: Genome, profile: Profile, steps: str) -> str:
    """For people: how much is left, of what, and how it was trained."""
    cut = genome.student or f"{100 * profile.cost(genome.levels):.0f}%"
    bits = "float" if genome.bits is None else f"{genome.bits:g} bits" if not genome.switched else "switched bits"
    return f"{cut}, {bits}, {('repaired', 'fast', 'patient')[genome.rung]}" if steps else cut


def timed(setting: Setting, trial: Trial) -> dict[str, object]:
    """Its file and the original's, taking turns."""
    name = f"model{setting.runtime.suffix}"
    files = {ORIGINAL: setting.folder / BASE / FIRST / name, "trial": setting.folder / str(trial.told["result"]) / name}
    example = torch.cat(list(setting.task.data.inputs("val", 1, 1, seed=setting.seed)))
    times = latency.timed(files, example, runtime=setting.runtime, repeats=ROUNDS)
    elsewhere = {plugins.describe(one): _timed_on(setting, trial, one, example) for one in setting.also}
    return {**_clock(times), **({"elsewhere": elsewhere} if elsewhere else {})}


def _clock(times: Mapping[str, latency.Timed]) -> dict[str, object]:
    found = times["trial"]
    return {
        "original_ms": times[ORIGINAL]["latency_ms"]["median"],
        "latency_ms": dict(found["latency_ms"]),
        "speedup": dict(found["speedup"][ORIGINAL]),
    }


def _timed_on(setting: Setting, trial: Trial, runtime: Runtime, example: Tensor) -> dict[str, object]:
    """The same on another runtime, whose files are made for that; or why it can't run them."""
    places = {ORIGINAL: setting.folder / BASE / FIRST, "trial": setting.folder / str(trial.told["result"])}
    with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
        files = {name: Path(temporary) / f"{name}{runtime.suffix}" for name in places}
        try:
            for name, place in places.items():
                runtime.export(folder_.load(place), files[name])
            return _clock(latency.timed(files, example, runtime=runtime, repeats=ROUNDS))
        except (InputError, CheckFailed) as error:
            return {"why": str(error)}


def points(trials: Sequence[Trial]) -> list[Point]:
    """What the front shows of those that were timed.

    A machine's speed drifts between trials, so what counts is the ratio to the original, which took turns with each:
    the
    latency is the original's, the median over the trials, over that ratio.
    """
    done = [one for one in trials if one.state == "done"]
    clocks = {one.number: _clocks(one) for one in done}
    names = {name for told in clocks.values() for name in told}
    base = {
        name: float(np.median([float(str(one[name]["original_ms"])) for one in clocks.values() if name in one]))
        for name in names
    }
    return [
        _point(one, {name: _against(base[name], told) for name, told in clocks[one.number].items()}) for one in done
    ]


def _clocks(trial: Trial) -> dict[str, Mapping[str, object]]:
    """What was timed, by runtime; "" is the first."""
    further = cast(Mapping[str, Mapping[str, object]], trial.timing.get("elsewhere", {}))
    return {"": trial.timing, **{name: one for name, one in further.items() if "original_ms" in one}}


def _against(base_ms: float, timing: Mapping[str, object]) -> Clock:
    ratio = _quartiles(cast(dict[str, object], timing["speedup"]))
    spread = Quartiles(median=base_ms / ratio["median"], low=base_ms / ratio["high"], high=base_ms / ratio["low"])
    clock = cast(dict[str, object], timing["latency_ms"])
    return Clock(latency_ms=spread, speedup=ratio, disturbed=bool(clock.get("disturbed")))


def _point(trial: Trial, clocks: Mapping[str, Clock]) -> Point:
    told, first = cast(dict[str, object], dict(trial.told)), clocks[""]
    found = Point(
        number=trial.number,
        name=str(told["name"]),
        value=cast(float, told["value"]),
        interval=cast(list[float], told["interval"]),
        drop=cast(float, told["drop"]),
        latency_ms=first["latency_ms"],
        speedup=first["speedup"],
        disturbed=first["disturbed"],
        size_bytes=cast(int, told["size"]),
        seconds=cast(float, told["seconds"]),
        recipe=_text(cast(list[Step], told["recipe"])),
        beaten=False,
        folder="",
    )
    if further := {name: one for name, one in clocks.items() if name}:
        found["elsewhere"] = further
    if "drop_interval" in told:
        found["drop_interval"] = cast(list[float], told["drop_interval"])
    return found


def _quartiles(told: Mapping[str, object]) -> Quartiles:
    median, low, high = (float(str(told[name])) for name in ("median", "low", "high"))
    return Quartiles(median=median, low=low, high=high)


def _text(steps: Sequence[Step]) -> str:
    return "; ".join(
        " ".join([str(step["do"]), *(f"{name}={value}" for name, value in step.items() if name != "do")])
        for step in steps
    )


def save(setting: Setting, profile: Profile, trial: Trial, trials: Sequence[Trial], marks: Sequence[Mark]) -> Facts:
    """The point's folder, measured as ``compress`` measures a result; returns its facts."""
    start = next((one for one in trials if one.number == trial.genome.parent), None)
    begin = None if start is None else setting.folder / str(start.told["float"])
    run = setting.run(cast(list[Step], trial.told["recipe"]), trial.number + 1000 * setting.seed, begin)
    folder = Folder(setting.place(trial.number), run)
    candidates, walk = walked(folder, folder.adopted(setting.original()))
    judged = dataclasses.replace(run, budget=setting.budget, corruptions=setting.corruptions, priced=setting.priced)
    title = f"{setting.title or 'a compressed model'}, #{trial.number} of a search"
    recipe_text = "\n".join(_text([step]) for step in cast(list[Step], trial.told["recipe"]))
    found = concluded(folder, judged, candidates, walk, title, recipe_text)
    front = [{**mark, "chosen": mark["name"] == f"#{trial.number}"} for mark in marks]
    told = cast(Facts, {**found.report, "frontier": front})
    target = setting.folder / POINTS / f"{trial.number:04d}"
    target.parent.mkdir(exist_ok=True)
    dataclasses.replace(found, report=told).save(target)
    return told
