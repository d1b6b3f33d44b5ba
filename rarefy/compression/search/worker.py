"""A worker of a search: it carries out the trials of a folder until none is left, beside others that do the same."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression.run import read_json, write_json
from rarefy.compression.search import front as front_
from rarefy.compression.search import plans
from rarefy.compression.search import trial as trial_
from rarefy.compression.search.front import Front, Point
from rarefy.compression.search.journal import Journal, Trial, alone, claimed, host
from rarefy.compression.search.profile import Network, Profile, measure
from rarefy.compression.search.space import BITS, RUNGS, Genome
from rarefy.compression.search.table import listed, marks
from rarefy.compression.search.trial import Setting
from rarefy.errors import CheckFailed, FormatError, InputError, first_line
from rarefy.reports import report as report_
from rarefy.system.logs import Callback, Logger, Logs
from rarefy.system.progress import say

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SETTINGS, PROFILE = "search.json", "profile.json"
WAIT = 0.3  # seconds, for other workers

Event = Callable[[str, Mapping[str, object]], None]


@dataclass
class Worker:
    """Carries out the trials of a folder until there is none left, beside others that do."""

    setting: Setting
    on_event: Event | None = None
    loggers: Sequence[Logger | Callback] = ()

    def __post_init__(self) -> None:
        told = read_json(self.setting.folder / SETTINGS)
        self.measures = told["host"] == host()
        self.host, self.strategy = str(told["host"]), str(told["strategy"])
        url = cast(str | None, told["storage"])
        self.journal = Journal(self.setting.folder, url, self.setting.seed, self.strategy)
        self._network: Network | None = None
        self._told_waiting = False

    def work(self) -> Front:
        """Raises InputError where the host that measures has not begun."""
        profile, about = self._profile(), {"strategy": self.strategy, "seed": self.setting.seed}
        done = [one.number for one in self.journal.trials() if one.state == "done"]
        self.logs = Logs(self.loggers, "search", max(done, default=-1) + 1, about)
        while not self._is_over(trials := self.journal.trials()):
            if not self._one(profile, trials) and not self._planned(profile):
                self._wait(trials)
        if self.measures:
            self._conclude(profile)
        self.logs.close()
        return front_.read(self.setting.folder)

    @property
    def network(self) -> Network:
        if self._network is None:
            self._network = self.setting.network()
        return self._network

    def _say(self, text: str) -> None:
        if self.setting.progress:
            say(f"search: {text}")

    def _profile(self) -> Profile:
        """Measured by the named host, once."""
        file = self.setting.folder / PROFILE
        while not file.exists():
            if not self.measures:
                self._wait([])
                continue
            with alone(self.setting.folder / "plans"):
                if not file.exists():
                    self._say("what widths cost, and what they do to the answers")
                    self.setting.original()
                    found = measure(self.network, self.setting.runtime, self.setting.seed, self.setting.progress)
                    write_json(file, found.to_json())
        told = read_json(file)
        try:
            return Profile.from_json(told)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{file}: is none that a search wrote ({first_line(error)}); delete it") from error

    def _goal(self) -> tuple[int | None, float | None]:
        told = read_json(self.setting.folder / SETTINGS)  # anew: it may have been extended
        return cast(int | None, told["trials"]), cast(float | None, told["minutes"])

    def _is_over(self, trials: Sequence[Trial]) -> bool:
        most, minutes = self._goal()
        if any(one.state in ("open", "made") for one in trials):
            return False
        if most is not None:
            return len(trials) >= most or self._is_exhausted(trials)
        spent = sum(float(str(one.told.get("seconds", 0.0))) for one in trials)
        return bool(trials) and (spent >= 60 * cast(float, minutes) or self._is_exhausted(trials))

    def _is_exhausted(self, trials: Sequence[Trial]) -> bool:
        return (self.setting.folder / "plans" / "exhausted").exists() and bool(trials)

    def _wait(self, trials: Sequence[Trial]) -> None:
        made = any(one.state == "made" for one in trials)
        if not self.measures and (made or not trials) and not self._told_waiting:
            self._told_waiting = True
            self._say(f"waits for {self.host}, which measures; start `rarefy worker {self.setting.folder}` there")
        time.sleep(WAIT)

    # ------------------------------------------------------------------------------------------------------ a trial

    def _one(self, profile: Profile, trials: Sequence[Trial]) -> bool:
        """Carry out one trial that nobody does; False: there is none."""
        for trial in trials:
            able = trial.state == "open" or (trial.state == "made" and self.measures)
            if not able:
                continue
            with claimed(self.setting.place(trial.number)) as ours:
                if not ours:
                    continue
                now = self.journal.trials()
                current = next(one for one in now if one.number == trial.number)
                if current.state == "open":
                    self._make(profile, current, now)
                elif current.state == "made" and self.measures:
                    self._time(current)
                else:
                    continue  # another did it meanwhile
                return True
        return False

    def _make(self, profile: Profile, trial: Trial, trials: Sequence[Trial]) -> None:
        try:
            genome, told = trial_.make(self.setting, profile, self.network, trial, trials)
        except (InputError, CheckFailed) as error:
            self._say(f"trial {trial.number} can't be: {error}")
            self.journal.failed(trial.number, str(error))
            return
        self.journal.made(trial.number, genome, told)
        if self.measures:
            self._time(next(one for one in self.journal.trials() if one.number == trial.number))

    def _time(self, trial: Trial) -> None:
        timing, told = trial_.timed(self.setting, trial), trial.told
        drop, cost, size = (float(str(told[name])) for name in ("drop", "cost", "size"))
        most = self.setting.budget.max_drop
        self.journal.done(trial.number, timing, (drop, cost, size), None if most is None else drop - most)
        point = self._tell_front()[trial.number]
        self._say(
            f"trial {trial.number}: {point['name']}: {point['latency_ms']['median']:.3f} ms "
            f"({point['speedup']['median']:.2f}x), {point['size_bytes']:,} bytes, {point['value']:.4f}"
        )
        self.logs.add(trial.number, **front_.numbers(point))
        if self.on_event is not None:
            self.on_event("trial", dict(point))

    # -------------------------------------------------------------------------------------------------------- plans

    def _planned(self, profile: Profile) -> bool:
        """Plan the next generation, if the last is done; False: others are at work."""
        most, _ = self._goal()
        with alone(self.setting.folder / "plans"):
            trials = self.journal.trials()
            if any(one.state in ("open", "made") for one in trials) or self._is_over(trials):
                return False
            size = plans.size_of_generation(most)
            count = size if most is None else min(size, most - len(trials))
            space = _space(profile, self.strategy, self.setting.task.data.labelled("train"))
            if self.strategy != "evolution":  # Optuna alone chooses, structure and all
                self.journal.ask_plain(count, space, lambda params: _of_params(profile, params))
                return True
            if not trials:
                fixed: dict[str, float | str] = {"lr": 0.05, "criterion": "magnitude"}
                self.journal.ask(plans.first(profile, count), space, {k: v for k, v in fixed.items() if k in space})
                return True
            left = count + size if most is None else most - len(trials)
            seed = 1000 * self.setting.seed + len(trials)
            planned = plans.following(profile, _done(trials), [one.genome for one in trials], count, left, seed)
            if not planned:
                (self.setting.folder / "plans" / "exhausted").touch()
            self.journal.ask(planned, space, {})
            return bool(planned)

    # -------------------------------------------------------------------------------------------------------- front

    def _tell_front(self) -> dict[int, Point]:
        """``front.json``, as of now."""
        with alone(self.setting.folder / "front"):
            points = front_.mark(trial_.points(self.journal.trials()))
            for one in points:
                saved = self.setting.folder / front_.POINTS / f"{one['number']:04d}"
                if saved.exists():
                    manifest = folder_.read_manifest(saved)
                    after = cast(dict[str, Any], manifest["measurements"])["after"]
                    one["folder"] = f"{front_.POINTS}/{one['number']:04d}"
                    one["memory_bytes"] = after.get("peak_memory_bytes")
            metric = self.setting.task.metric()
            about = {
                "host": self.host,
                "runtime": plugins.describe(self.setting.runtime),
                "threads": self.setting.runtime.threads,
                "metric": metric.label,
                "unit": metric.unit,
                "budget": dataclasses.asdict(self.setting.budget),
                "samples": self.setting.task.data.length("val"),
                "title": self.setting.title,
                **({"prices": told} if (told := self.setting.priced.get("prices")) else {}),
            }
            write_json(self.setting.folder / front_.FILE, {"points": [dict(one) for one in points], "about": about})
        return {one["number"]: one for one in points}

    def _conclude(self, profile: Profile) -> None:
        """Save and verify what nobody beats, and write the report of all."""
        with alone(self.setting.folder / "saving", seconds=1e6):
            trials = self.journal.trials()
            points = self._tell_front()
            if not points:
                why = next((one.why for one in trials if one.why), "none was carried out")
                raise InputError(f"{self.setting.folder}: no trial came to an end ({why}); mend that, and begin anew")
            for one in [one for one in points.values() if not one["beaten"] and not one["folder"]]:
                self._say(f"measuring and saving #{one['number']}: {one['name']}")
                trial = next(each for each in trials if each.number == one["number"])
                trial_.save(self.setting, profile, trial, trials, marks(list(points.values())))
                if self.on_event is not None:
                    self.on_event("saved", dict(one))
            points = self._tell_front()
            found = front_.read(self.setting.folder)
            report_.report(facts_of(found, self.setting), self.setting.folder / "report.html")


def _done(trials: Sequence[Trial]) -> list[plans.Done]:
    return [
        plans.Done(
            one.number,
            one.genome,
            float(str(one.told["drop"])),
            float(str(one.told["cost"])),
            float(str(one.told["size"])),
            cast(dict[str, int], one.told["bits"]),
        )
        for one in trials
        if one.state == "done"
    ]


def _space(profile: Profile, strategy: str, labelled: bool) -> dict[str, BaseDistribution]:
    """What Optuna chooses: plain parameters; all, where it is alone."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    criteria = ["magnitude", "taylor:batches=8"] if labelled else ["magnitude"]
    space: dict[str, BaseDistribution] = {
        "lr": FloatDistribution(0.02, 0.1, log=True),
        "criterion": CategoricalDistribution(criteria),
    }
    if strategy != "evolution":
        for index, one in enumerate(profile.families):
            space[f"level.{index}"] = IntDistribution(0, len(one.widths) - 1)
        space["bits"] = CategoricalDistribution([*BITS, None])
        space["rung"] = IntDistribution(0, RUNGS - 1)
    return space


def _of_params(profile: Profile, params: Mapping[str, Any]) -> Genome:
    levels = tuple(int(params[f"level.{index}"]) for index in range(len(profile.families)))
    return Genome(levels, params["bits"], rung=int(params["rung"]))


def facts_of(found: Front, setting: Setting) -> dict[str, object]:
    """Of the page that shows all points."""
    metric = setting.task.metric()
    evaluation = {"metric": metric.name, "label": metric.label, "unit": metric.unit, "better": metric.better}
    return {
        "title": f"{setting.title or 'a search'}: the front",
        "frontier": marks(found.points),
        "listed": listed(found),
        "after": {"name": "the front", "evaluation": evaluation},
        "provenance": {key: value for key, value in found.about.items() if value not in (None, "")},
        **setting.priced,
    }
