"""prune(): a smaller network with the channels that matter most.

    couple ─▶ score (criteria/*) ─▶ rank, choose (ranking.py) ─▶ cut (groups/slicing.py) ─▶ check
    (self_check/equivalence.py)

A class is a set of slices that leave together (``groups/groups.py``). A ranking says which class leaves first, and how
many leave hangs on the target: for keep, macs and params the largest prefix that is within it, for speedup widths by
time measured on the runtime (``latency_search.py``).

Given up: the ranking knows nothing of cost (a channel that saves little is ranked as one that saves much); ``speedup=``
does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.deployment.description import graph_for, remember
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.nodes import share_copy
from rarefy.pruning.cost import stays
from rarefy.pruning.groups.groups import Coupling, couple
from rarefy.pruning.groups.slicing import cut
from rarefy.pruning.latency_search import TILE, for_speed
from rarefy.pruning.options import Amount, Options, Target
from rarefy.pruning.ranking import EVERY, Criterion, Plan, Selection, choose, rank
from rarefy.pruning.records import packed
from rarefy.pruning.repair import repair as repaired
from rarefy.pruning.schedule import Schedule, Setting
from rarefy.pruning.self_check.equivalence import Difference
from rarefy.pruning.self_check.equivalence import check as self_check
from rarefy.reports.pruned import warning
from rarefy.system.memory import release
from rarefy.tasks.task import Task, settled


def prune(
    model: nn.Module,
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    keep: float | Mapping[str, float] | None = None,
    macs: float | int | None = None,
    params: float | int | None = None,
    speedup: float | None = None,
    criterion: Criterion | str = "magnitude",
    ranking: str = "global",
    round_to: int = 1,
    floor: float = 0.1,
    ignore: Sequence[str] = (),
    heads: str = "dims",
    select: Selection | str = "best",
    schedule: Schedule | str = "oneshot",
    task: Task | None = None,
    seed: int = 0,
    check: bool = True,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    repair: bool = False,
    runtime: Runtime | str = "onnxruntime",
    threads: int | None = None,
    batch: int = 1,
) -> fx.GraphModule:
    """A new graph with fewer channels; ``model`` is left as it is.

    model: a graph, or a module, captured from ``inputs`` (an example batch) or else from images as the task's.
    keep, macs, params: what may remain of prunable channels, MACs, parameters: a fraction up to 1.0, or (int) a number.
        keep also by layer, ``{"stem.*": 0.5, "layer1.0.conv1": 0.25}``: the last glob that matches holds, others stay.
    speedup: how many times as fast as the original the result runs on ``runtime``, measured. Exactly one of the four.
    criterion: what a channel is worth (``criteria/``), an object or text such as "taylor:batches=50".
    ranking: "global", "loss" (of hessian:group=true: the best here, where there is data), "local" or "isomorphic".
    round_to: families of channels are cut to a multiple, narrower ones stay whole; with speedup 8, unless given.
    floor: fraction of the channels of any layer that stays in any case.
    ignore: globs on dotted names of parameters or modules whose outputs all stay.
    heads: attention loses the same "dims" of each head, or "whole" heads.
    select: how scores decide (``selection/``): "best", or "sample:temperature=0.5" to draw by them.
    schedule: "oneshot", or with training, such as "iterative:rounds=5" (``rarefy/compression/schedules``).
    task, seed: for criteria that need data or chance, and schedules that train.
    check: compare with the masked original (in float64) and refuse to return anything that differs.
    device, checkpoint, progress: of a schedule's training, as ``distill`` takes them; a killed run goes on from there.
    repair: then mend it on 512 training images of ``task``, without labels or training (``repair.py``).
    runtime, threads, batch: what speedup is measured on, as in ``measure``; threads None: one.

    The record in the history says what was asked and reached, channels before and after, and what could not leave and
    why; where less than a fifth of what should leave did, the logger "rarefy" warns.
    Raises InputError for a target that is malformed or out of reach; SelfCheckFailed if the check fails.
    """
    task = settled(task, model)
    options = Options(
        keep=keep, macs=macs, params=params, speedup=speedup, criterion=criterion, ranking=ranking, round_to=round_to,
        floor=floor, ignore=ignore, heads=heads, select=select, schedule=schedule, task=task, seed=seed, check=check,
        device=device, checkpoint=checkpoint, progress=progress, repair=repair, runtime=runtime,
        threads=threads, batch=batch,
    )  # fmt: skip
    return _warned(remember(_scheduled(graph_for(model, inputs, task), options), task))


def _warned(small: fx.GraphModule) -> fx.GraphModule:
    """Told where much less left than was asked."""
    record = history.last(small, "prune")
    if record is not None and (told := warning(record["facts"])):
        logging.getLogger("rarefy").warning("prune: %s", told)
    return small


def _scheduled(graph: fx.GraphModule, options: Options) -> fx.GraphModule:
    def once(graph: fx.GraphModule, *, was: Mapping[str, int] = EVERY, **asked: Amount) -> fx.GraphModule:
        ((kind, value),) = asked.items()
        return _at_once(graph, Target(kind, value), options, was)

    schedule: Schedule = plugins.resolve("schedules", options.schedule)
    training = (options.device, options.checkpoint, options.progress)
    setting = Setting(options.task, options.seed, options.globs, options.heads, *training)
    return schedule.run(graph, once, options.target.asked, setting)


def _at_once(graph: fx.GraphModule, target: Target, options: Options, was: Mapping[str, int]) -> fx.GraphModule:
    """``prune`` without a schedule; was: outputs that layers had first, of which ``floor`` is a share."""
    full = share_copy(graph).eval() if any(module.training for module in graph.modules()) else graph
    release()  # what an earlier run freed
    coupling = couple(full, options.globs, options.heads)
    if coupling.count == 1:
        frozen = [f"{name}: {reason}" for name, reason in list(coupling.frozen.items())[:3]]
        raise InputError(f"nothing can be pruned ({'; '.join(frozen) or 'it has no layer with channels'})")
    criterion: Criterion = plugins.resolve("criteria", options.criterion)
    scores = criterion.scores(coupling.graph, coupling, options.task, options.seed)
    _check_scores(coupling, scores, plugins.describe(criterion))
    timed = target.kind == "speedup"
    round_to = TILE if timed and options.round_to == 1 else options.round_to
    select: Selection = plugins.resolve("selection", options.select)
    rule, floor, seed = options.ranking, options.floor, options.seed
    ranking = rank(coupling, scores, rule=rule, round_to=round_to, floor=floor, select=select, seed=seed, was=was)
    latency: dict[str, object] = {}
    if timed:
        plan, latency = for_speed(
            ranking, lambda alive: cut(coupling, alive).eval(), target.number, options.measured, seed
        )
    else:
        plan = choose(ranking, target)
    release()
    small = cut(coupling, plan.alive)
    release()
    difference = self_check(coupling, small, plan.alive, seed) if options.check else None
    small.train(graph.training)
    asked = _asked(target, options, round_to, latency)
    history.append(small, "prune", asked, _facts(coupling, plan, target, latency, difference))
    if options.repair and options.task is not None:
        small = repaired(small, graph, options.task, seed=seed)
        *before, pruning, repairing = history.records(small)
        facts = {**pruning["facts"], "repair": repairing["facts"]}
        small.meta["history"] = [*before, {**pruning, "facts": facts}]  # one record a verb
    return small


def _asked(target: Target, options: Options, round_to: int, latency: Mapping[str, object]) -> dict[str, object]:
    """The options of the record."""
    kinds = {"criteria": options.criterion, "selection": options.select}
    criterion, select = (plugins.describe(plugins.resolve(kind, choice)) for kind, choice in kinds.items())
    return {
        **target.asked,
        "criterion": criterion,
        "ranking": options.ranking,
        "round_to": round_to,
        "floor": options.floor,
        "ignore": list(options.globs),
        **({} if options.heads == "dims" else {"heads": options.heads}),
        "seed": options.seed,
        **({} if select == "best" else {"select": select}),
        "repair": options.repair,
        **{name: latency[name] for name in ("runtime", "threads", "batch") if latency},
    }


def _facts(
    coupling: Coupling, plan: Plan, target: Target, latency: Mapping[str, object], difference: Difference | None
) -> dict[str, object]:
    layers = {row.names[0]: plan.alive[row.classes] for row in coupling.rows if row.produces}
    return {
        "asked": target.asked,
        **({"latency": latency} if latency else {}),
        "reached": plan.reached,
        "macs": plan.macs,
        "params": plan.params,
        "channels": {name: [len(alive), int(alive.sum())] for name, alive in layers.items()},
        "kept": {name: packed(alive) for name, alive in layers.items() if not bool(alive.all())},
        "frozen": coupling.frozen,
        "could_not_leave": stays(coupling),
        "unknown_operators": coupling.unknown,
        "kept_whole": plan.whole,
        "self_check": None
        if difference is None
        else {
            "largest_relative_difference": difference.largest,
            "nodes": difference.nodes,
            "statistics_on_kept": difference.statistics,
        },
    }


def _check_scores(coupling: Coupling, scores: Tensor, criterion: str) -> None:
    if scores.shape != (coupling.count,):
        raise InputError(
            f"criterion {criterion}: returned scores of shape {tuple(scores.shape)}, must be ({coupling.count},), one "
            "a class"
        )
    bad = ~torch.isfinite(scores)
    bad[0] = False
    if bool(bad.any()):
        broken = [name for name, parameter in coupling.graph.named_parameters() if not bool(parameter.isfinite().all())]
        row = next(row for row in coupling.rows if bool(bad[row.classes].any()))
        why = (
            f"{broken[0]} is not finite, load sound weights"
            if broken
            else f"the first at {row.names[0]}, though the weights are finite"
        )
        raise InputError(f"criterion {criterion}: {int(bad.sum())} scores are NaN or infinite; {why}")
