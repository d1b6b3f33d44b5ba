"""search(): the best models for any budget, on any number of workers.

::

    FOLDER/search.json      what the search belongs to, and how long it is to go on
           profile.json     the table of costs, and the sensitivities
           trials.journal   the trials (Optuna)
           base/ work/      the original, and a working folder of ``compress`` for each trial
           front.json       the points; report.html shows them
           points/0007/     saved and verified, each of those that nobody beats

``search`` is a worker itself, and so is ``rarefy worker FOLDER``: workers come and go, and one that is killed loses
what
its running trial's running step had done, no more. The same seed and number of trials give the same trials, whoever
carries them out, as long as they are given the same table of costs (it is kept in the user's cache, as the latency
table
of ``prune`` is).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Budget
from rarefy.compression.compress import usual_corruptions
from rarefy.compression.run import FIRST, Run, read_json, write_json
from rarefy.compression.search.front import Front
from rarefy.compression.search.journal import alone, host, needs_optuna
from rarefy.compression.search.space import Lengths
from rarefy.compression.search.trial import BASE, Setting
from rarefy.compression.search.worker import SETTINGS, WAIT, Event, Worker
from rarefy.deployment import description, latency
from rarefy.deployment.runtime import Runtime
from rarefy.errors import FormatError, InputError, first_line
from rarefy.graph.nodes import is_graph
from rarefy.kernels import is_quantised
from rarefy.models import fitting
from rarefy.reports import prices as prices_
from rarefy.system.logs import Logging
from rarefy.system.strict_json import expect
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task, settled

EPOCHS, FASTER = 20, 5  # of the patient training; the fast one has so many times fewer
MOST_TRIALS = 10_000
RECIPE = "recipe.toml"


def search(
    model: nn.Module,
    task: Task,
    *,
    folder: str | os.PathLike[str],
    trials: int | None = None,
    minutes: float | None = None,
    budget: Budget | None = None,
    inputs: Tensor | Sequence[Tensor] | None = None,
    runtime: str | Runtime = "onnxruntime",
    also: Sequence[str | Runtime] = (),
    epochs: int = EPOCHS,
    storage: str | None = None,
    strategy: str = "evolution",
    seed: int = 0,
    device: str | torch.device | None = None,
    title: str = "",
    recipe: str = "",
    corruptions: Sequence[str] | None = None,
    on_event: Event | None = None,
    logs: Logging = None,
    prices: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Front:
    """The front of the networks that a search finds, each point a saved, verified folder.

    model, task, inputs, runtime, device, title, corruptions, prices: as ``compress`` takes them.
    folder: of the search; called again with the same arguments, it goes on, and another process that calls it joins in.
    trials, minutes: how long: so many trials in all, or so many minutes of work, summed over the workers. One of them.
    also: further runtimes, on which each trial is timed, too. Models are made for the first, which the plans look at;
        a point is beaten by one that is as fast on all.
    budget: what the points are judged by; all are kept. epochs: of the patient training; the fast one has a fifth.
    storage: where trials are written, ``postgresql://...`` or ``grpc://host:port``; None: a journal in the folder.
    strategy: ``evolution``; or ``tpe`` (Optuna's alone) or ``random``, over the same space, to compare with.
    recipe: the recipe's text, by which ``rarefy worker`` finds model and data again.
    logs: who is told each trial's numbers, as ``distill`` takes them.
    on_event: called with "trial" or "saved", and a point. Raises InputError, also for a folder of another search.
    """
    needs_optuna()
    loggers = plugins.several("loggers", logs)
    _check(trials, minutes, epochs, strategy, task)
    graph, task = _captured(model, task, inputs)
    setting = Setting(
        folder=Path(folder),
        graph=graph,
        task=task,
        budget=budget or Budget(),
        runtime=latency.with_threads(runtime),
        also=_further(latency.with_threads(runtime), also),
        lengths=_lengths(task, epochs),
        seed=seed,
        device=None if device is None else str(device),
        title=title,
        refine=strategy == "evolution",
        corruptions=tuple(corruptions if corruptions is not None else usual_corruptions(task)),
        progress=progress,
        priced=prices_.told(prices),
    )
    known = _claim(setting, trials, minutes, strategy, storage, recipe)
    return Worker(dataclasses.replace(setting, priced=known), on_event, loggers).work()


def _captured(model: nn.Module, task: Task, inputs: Tensor | Sequence[Tensor] | None) -> tuple[fx.GraphModule, Task]:
    """The original, and the task with the model's size where nobody gave one. Raises InputError."""
    if inputs is None and not is_graph(model):
        task = fitting.fit_module(model, task)
    task = settled(task, model)
    example = inputs if inputs is not None else torch.zeros(2, *task.data.input_shape)
    graph = description.remember(capture(model, example).eval(), task)
    if is_quantised(graph):
        raise InputError("search: the model is quantised already; give its float original")
    return graph, task


def _further(runtime: Runtime, also: Sequence[str | Runtime]) -> tuple[Runtime, ...]:
    """Those beside the first. Raises InputError for one that is named twice, or runs nothing here."""
    found = tuple(latency.with_threads(one) for one in also)
    names = [plugins.describe(one) for one in (runtime, *found)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"search: {twice} is named twice; --also is for further runtimes")
    mute = next((one for one in found if not one.capabilities.runs), None)
    if mute is not None:
        raise InputError(f"search: {plugins.describe(mute)} runs no file on this machine; leave it out of --also")
    return found


def _lengths(task: Task, epochs: int) -> Lengths:
    labels = {} if task.data.labelled("train") else {"hard_weight": 0.0}
    return Lengths(max(1, epochs // FASTER), epochs, min(128, task.data.length("train")), **labels)


def _check(trials: int | None, minutes: float | None, epochs: int, strategy: str, task: Task) -> None:
    if (trials is None) == (minutes is None):
        raise InputError("search: give trials= or minutes=, one of them")
    if trials is not None and not 1 <= trials <= MOST_TRIALS:
        raise InputError(f"search: trials={trials} is not between 1 and {MOST_TRIALS:,}")
    if minutes is not None and not 0 < minutes < 1e6:
        raise InputError(f"search: minutes={minutes} is no time; give a number above 0")
    if epochs < 1:
        raise InputError(f"search: epochs={epochs} is less than 1")
    if strategy not in ("evolution", "tpe", "random"):
        raise InputError(f"search: strategy={strategy!r} is none; have evolution, tpe, random")
    if task.data.val is None or task.data.train is None:
        raise InputError("search: the task needs training and validation images; pass train= and val=")


def _claim(
    setting: Setting, trials: int | None, minutes: float | None, strategy: str, storage: str | None, recipe: str
) -> Mapping[str, object]:
    """The folder is this search's: made, or found; its prices. Raises InputError where it is another's."""
    path = setting.folder
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); name a folder that can") from error
    file = path / SETTINGS
    with alone(path / "plans"):
        ours = {
            **{name: value for name, value in _identity(setting).items() if name != "recipe"},
            "lengths": dataclasses.asdict(setting.lengths),
            "further runtimes": [plugins.describe(one) for one in setting.also],
            "strategy": strategy,
            "storage": storage,
        }
        if file.exists():
            theirs = read_json(file)
            differing = [name for name in ours if theirs.get(name) != ours[name]]
            if differing:
                raise InputError(
                    f"{path}: holds a search with another {' and '.join(differing)}; name another folder, or go on "
                    "with what it was started with"
                )
        elif any(one.name not in ("plans", ".lock") for one in path.iterdir()):
            raise InputError(f"{path}: is in use for something else; name another folder")
        known = read_json(file) if file.exists() else {"host": host(), "title": setting.title}
        kept = {name: known[name] for name in ("host", "title")}
        if recipe and not (path / RECIPE).exists():
            (path / RECIPE).write_text(recipe, encoding="utf-8")
        priced = setting.priced or _priced(known)
        write_json(file, {**ours, **kept, "trials": trials, "minutes": minutes, "priced": priced})
    return priced


def _priced(told: Mapping[str, object]) -> Mapping[str, object]:
    """Prices and author that a search's folder names. Raises InputError for what are none."""
    found = told.get("priced") or {}
    if not isinstance(found, Mapping):
        raise FormatError("its prices are no table")
    prices_.of(found, "its prices")
    return found


def _identity(setting: Setting) -> dict[str, object]:
    run = Run(setting.task, setting.budget, [], setting.runtime, setting.seed, setting.device, setting.corruptions)
    return run.identity(setting.graph)


def resumed(folder: str | os.PathLike[str], task: Task, progress: bool = True) -> Worker:
    """A worker for a search that was begun elsewhere: all but the task lies in its folder. Raises InputError."""
    path = Path(folder)
    told, _ = settings(path), path / BASE / FIRST
    begun = time.monotonic()
    while not (path / BASE / FIRST).exists():
        if time.monotonic() - begun > 600:
            raise InputError(f"{path}: its original is not there yet; start the search on {told['host']} first")
        time.sleep(WAIT)
    graph: fx.GraphModule = folder_.load(path / BASE / FIRST)
    try:
        setting = _setting(path, told, graph, task, progress)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path / SETTINGS}: is none that a search wrote ({first_line(error)}); begin in another folder"
        ) from error
    ours = _identity(setting)
    differing = [name for name in ("model", "data", "task") if ours[name] != told[name]]
    if differing:
        raise InputError(
            f"{path}: the {' and '.join(differing)} found here is another than the search's; mount the same data"
        )
    return Worker(setting)


def _setting(path: Path, told: Mapping[str, object], graph: fx.GraphModule, task: Task, progress: bool) -> Setting:
    lengths, asked = cast(dict[str, Any], told["lengths"]), cast(dict[str, Any], told["budget"])
    return Setting(
        folder=path,
        graph=graph,
        task=settled(task, graph),
        budget=Budget(**asked),
        runtime=plugins.resolve("runtimes", str(told["runtime"])),
        lengths=Lengths(**lengths),
        seed=cast(int, told["seed"]),
        device=cast(str | None, told["device"]),
        title=str(told["title"]),
        refine=told["strategy"] == "evolution",
        corruptions=tuple(cast(list[str], told["corruptions"])),
        progress=progress,
        also=tuple(plugins.resolve("runtimes", str(one)) for one in cast(list[str], told.get("further runtimes", []))),
        priced=_priced(told),
    )


def settings(path: Path) -> dict[str, object]:
    """What the search's folder says of it. Raises InputError where there is none."""
    if not (path / SETTINGS).exists():
        raise InputError(f"{path}: holds no search; begin one with `rarefy compress ... --search 60min -o {path}`")
    told = read_json(path / SETTINGS)
    texts = [told.get(name) for name in ("host", "strategy", "runtime")] + [
        ("" if told.get("storage") is None else told["storage"])
    ]
    good = all(isinstance(one, str) for one in texts) and {"trials", "minutes", "seed"} <= told.keys()
    expect(good, path / SETTINGS, "is none that a search wrote; begin in another folder")
    return told
