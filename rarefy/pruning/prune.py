"""prune(): a smaller network with the channels that matter most.

    couple ─▶ score (criteria/*) ─▶ choose (this file) ─▶ cut (surgery.py) ─▶ check (twin.py)

A class is a set of slices that leave together (``coupling.py``). Classes are grouped into **families** by the first layer that makes them;
``ranking`` says how scores of different families compare:

* ``global``      by the damage done to the network: a family that loses the share r of its importance is damaged by ``n r^2``, n the outputs of
                  layers that its classes are (a residual stream is made by many), and the class that does least damage leaves first;
* ``loss``        the same with the sum of the family's scores for n, for scores that are changes of the loss (hessian:group=true,
                  taylor:form=fisher) and so compare between layers as they are;
* ``local``       every family keeps the same fraction;
* ``isomorphic``  families whose coupled operators are alike are ranked together, by the damage of ``global``, and each such set keeps the
                  same fraction (arXiv 2407.04616).

The best-ranked classes are kept, as many as the target allows: found by bisection, because what a class costs depends on all others. The
cost is exact: the MACs of a layer are a product of widths, and the widths are sums over the classes that are alive. The result is the
largest prefix of the ranking, each family rounded down to ``round_to``, that is within the target; so it misses it by less than a step.

In every tensor the best ``floor`` of the classes are safe, and at least one, so no layer disappears.
The square is why no layer becomes a bottleneck: errors of a layer's lost channels add up. Scores divided by their family's mean, as DepGraph ranks them, cut the
residual stream first, and lost 10 points more in ``bench/pruning_accuracy.py``.
Given up: the ranking knows nothing of cost (a channel that saves little is ranked as one that saves much). ``speedup=`` does: there the same ranking
says which channels of a family go first, and ``latency.py`` how many of each family, by time measured on the runtime.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph.capture import as_graph
from rarefy.graph.nodes import is_graph, share_copy
from rarefy.pruning.groups.equivalence import check as self_check
from rarefy.pruning.groups.groups import couple
from rarefy.pruning.groups.slicing import cut
from rarefy.pruning.ranking import (
    RANKINGS,
    TILE,
    Criterion,
    Selection,
    _channels,
    _check_scores,
    _for_speed,
    _order,
    _target,
    choose,
)
from rarefy.pruning.records import packed
from rarefy.pruning.repair import repair as mended
from rarefy.pruning.schedule import Setting
from rarefy.pruning.selection.best import Best
from rarefy.system.memory import release


def prune(
    model: nn.Module,
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    keep: float | None = None,
    macs: float | int | None = None,
    params: float | int | None = None,
    speedup: float | None = None,
    criterion: Any = "magnitude",
    ranking: str = "global",
    round_to: int = 1,
    floor: float = 0.1,
    ignore: Sequence[str] = (),
    heads: str = "dims",
    select: Any = "best",
    schedule: Any = "oneshot",
    task: Any = None,
    seed: int = 0,
    check: bool = True,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    repair: bool = False,
    runtime: Any = "onnxruntime",
    threads: int | None = None,
    batch: int = 1,
) -> fx.GraphModule:
    """A new graph with fewer channels; ``model`` is left as it is.

    model: a graph, or a module with ``inputs`` (an example batch) to capture it.
    keep: fraction of prunable channels to keep;  macs, params: what may remain, a fraction up to 1.0 of the original or (int) a number.
    speedup: how many times as fast as the original the result runs, measured on ``runtime`` (``rarefy/pruning/latency_search.py``). Exactly one of the four.
    criterion: what a channel is worth (``rarefy/pruning/criteria``), an object or text such as "taylor:batches=50".
    ranking: "global", "loss" (of hessian:group=true: the best here, where there is data), "local" or "isomorphic".
    round_to: each family of channels is cut to a multiple of this; one narrower than this stays whole. With speedup at least 8, unless given.
    floor: fraction of the channels of any layer that stays in any case.
    ignore: globs on dotted names of parameters or modules whose outputs all stay.
    heads: attention loses the same "dims" of each head, or "whole" heads.
    select: how scores decide (``rarefy/pruning/selection``): "best", or "sample:temperature=0.5" to draw by them.
    schedule: all at once, or with training (``rarefy/compression/schedules``): "oneshot", "iterative:rounds=5", "group_sparse:epochs=10".
    task, seed: for criteria that need data or chance, and schedules that train.
    device, checkpoint, progress: of such a schedule's training, as ``distill`` takes them; a killed run goes on from the checkpoint.
    check: compare with the masked original (in float64) and refuse to return anything that differs.
    repair: then mend weights and batch norm on 512 training images of ``task``, without labels or training (``repairing.py``).
    runtime, threads, batch: what speedup is measured on, as in ``measure``; threads None: one.

    The record in ``meta["history"]`` says what was asked and reached, channels before and after, and what could not be pruned and why.
    Raises InputError for a target that is malformed or out of reach; SelfCheckFailed if the check fails.
    """
    target = _target(keep, macs, params, speedup)
    how = plugins.resolve("schedules", schedule)
    if ranking not in RANKINGS:
        raise InputError(f"ranking={ranking!r} is not one of {', '.join(RANKINGS)}")
    if not (isinstance(round_to, int) and round_to >= 1):
        raise InputError(f"round_to={round_to!r} must be a whole number from 1")
    if not (isinstance(floor, (int, float)) and 0 <= floor <= 1):
        raise InputError(f"floor={floor!r} must lie between 0 and 1")
    if repair and task is None:
        raise InputError(
            "repair=True needs images: pass task= (--data), or call rarefy.pruning.repair.repair() with batches of your own"
        )
    if not (isinstance(seed, int) and seed >= 0):
        raise InputError(f"seed={seed!r} must be a whole number from 0")
    if not (
        isinstance(ignore, str) or (isinstance(ignore, Sequence) and all(isinstance(glob, str) for glob in ignore))
    ):
        raise InputError(f"ignore={ignore!r} must be a list of globs, such as ['head.*']")
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    once = functools.partial(
        _at_once,
        criterion=plugins.resolve("criteria", criterion),
        ranking=ranking,
        round_to=round_to,
        floor=floor,
        ignore=ignore,
        heads=heads,
        selection=plugins.resolve("selection", select),
        task=task,
        seed=seed,
        check=check,
        repair=repair,
        where={"runtime": runtime, "threads": threads, "batch": batch},
    )
    graph = model if is_graph(model) else as_graph(model, inputs)
    setting = Setting(task, seed, ignore, heads, device, checkpoint, progress)
    done: fx.GraphModule = how.run(graph, once, target.asked, setting)
    return done


def _at_once(
    graph: fx.GraphModule,
    *,
    keep: float | None = None,
    macs: float | int | None = None,
    params: float | int | None = None,
    speedup: float | None = None,
    criterion: Criterion,
    ranking: str,
    round_to: int,
    floor: float,
    ignore: Sequence[str],
    heads: str,
    selection: Selection,
    task: Any,
    seed: int,
    check: bool,
    repair: bool,
    where: Mapping[str, Any],
    was: Mapping[str, int] = types.MappingProxyType({}),
) -> fx.GraphModule:
    """``prune`` without a schedule; its choices resolved.

    where: what speedup is measured on.  was: outputs that layers had before earlier prunings, of which ``floor`` is a share.
    """
    target = _target(keep, macs, params, speedup)
    full = share_copy(graph).eval() if any(module.training for module in graph.modules()) else graph
    release()  # what an earlier run freed
    coupling = couple(full, ignore, heads)
    full = coupling.graph
    if coupling.count == 1:
        why = (
            "; ".join(f"{name}: {reason}" for name, reason in list(coupling.frozen.items())[:3])
            or "it has no layer with channels"
        )
        raise InputError(f"nothing can be pruned ({why})")
    scores = criterion.scores(full, coupling, task, seed)
    _check_scores(coupling, scores, plugins.describe(criterion))
    measured: dict[str, Any] = {}
    if target.kind == "speedup":
        round_to = TILE if round_to == 1 else round_to
        ranked = _order(coupling, scores, ranking, round_to, floor, selection, seed, was)
        plan, measured["latency"] = _for_speed(
            coupling, ranked, lambda alive: cut(coupling, alive).eval(), target.value, seed=seed, **where
        )
    else:
        plan = choose(
            coupling,
            scores,
            target,
            ranking=ranking,
            round_to=round_to,
            floor=floor,
            select=selection,
            seed=seed,
            was=was,
        )
    release()
    small = cut(coupling, plan.alive)
    release()
    difference = self_check(coupling, small, plan.alive, seed) if check else None
    small.train(graph.training)
    options = {
        **target.asked,
        "criterion": plugins.describe(criterion),
        "ranking": ranking,
        "round_to": round_to,
        "floor": floor,
        "ignore": list(ignore),
        **({} if heads == "dims" else {"heads": heads}),
        "seed": seed,
        **({} if selection == Best() else {"select": plugins.describe(selection)}),
        "repair": repair,
        **({name: measured["latency"][name] for name in ("runtime", "threads", "batch")} if measured else {}),
    }
    facts = {
        "asked": target.asked,
        **measured,
        "reached": plan.reached,
        "macs": plan.macs,
        "params": plan.params,
        "channels": _channels(coupling, plan.alive),
        "kept": {
            row.names[0]: packed(mask)
            for row in coupling.rows
            if row.produces and not bool((mask := plan.alive[row.classes]).all())
        },
        "frozen": coupling.frozen,
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
    small.meta.setdefault("history", []).append({"step": "prune", "options": options, "facts": facts})
    if repair:
        small = mended(small, graph, task, seed=seed)
        facts["repair"] = small.meta["history"].pop()["facts"]  # one record a verb
    return small
