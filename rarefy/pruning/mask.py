"""mask(): single weights become zero and stay so: a sparse network of the same shape.

    score (saliency/*) ─▶ choose: so many of each set, or the best N of every M ─▶ zero

A sparsity of 0.5 takes half of all weights of a set (``scope``: all layers, a layer, an output), "2:4" leaves 2 of each
4 that follow each other along the inputs, at the same output and place of the kernel (arXiv 2104.08378); the last,
shorter block keeps 2 at most too. Only weights of convolutions and linear layers count; biases and norms stay dense.

What it is good for, and what not: ``save`` stores one bit for a zero, so the folder is smaller; NVIDIA's tensor cores
(Ampere on) run 2:4 faster with their own kernels. ONNX Runtime's and PyTorch's dense kernels multiply by zeros as by
any number: nothing gets faster. ``prune`` is what makes a model faster.

The names of the masked weights stand in ``meta["sparse"]``; wherever one of them is zero, training leaves it zero
(``rarefy/distillation``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.deployment.description import graph_for, remember
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.nodes import argument, operator_name
from rarefy.kernels.low_bit.masks import N_OF_M_MASK, THRESHOLD_MASK
from rarefy.pruning.options import MaskOptions, Pattern
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task, settled


class Saliency(Protocol):
    @property
    def scope(self) -> str: ...
    def scores(
        self, graph: fx.GraphModule, weights: Mapping[str, Sequence[fx.Node]], task: Task | None, seed: int
    ) -> dict[str, Tensor]: ...


# operator -> axis of the weight along which it is summed; the other of the first two axes makes the outputs
INPUT_AXIS = {
    "linear": 1,
    **{f"conv{rank}d": 1 for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": 0 for rank in (1, 2, 3)},
}
NOTE = "sparse weights: smaller on disk, no faster on onnxruntime"


def mask(
    model: nn.Module,
    *,
    sparsity: float | str,
    criterion: Saliency | str = "magnitude",
    scope: str | None = None,
    ignore: Sequence[str] = (),
    inputs: Tensor | Sequence[Tensor] | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> fx.GraphModule:
    """A new graph with zeros among its weights; ``model`` is left as it is.

    model: a graph, or a module, captured from ``inputs`` (an example batch) or else from images as the task's.
    sparsity: share of the weights that become zero, 0.5; or "N:M", 2:4, of each M along the inputs N stay.
    criterion: what a weight is worth (``saliency/``), an object or text such as "wanda:images=64".
    scope: where a share is taken: "global", "layer" or "output"; None: as the criterion's authors do. N:M has none.
    ignore: globs on dotted names of weights or modules to leave dense.
    task, seed: for criteria that look at data.

    The record in the history says how many zeros there are, and in which layers. Weights that were zero come first.
    Raises InputError for a sparsity that is none, or a model without weights to mask.
    """
    task = settled(task, model)
    options = MaskOptions(sparsity, criterion, scope, ignore, task, seed)
    rule: Saliency = plugins.resolve("saliency", criterion)
    graph = remember(capture(graph_for(model, inputs, task)), task)
    training = graph.training
    graph.eval()
    found = weights_of(graph, options.globs)
    nodes = {name: nodes for name, (_, nodes) in found.items()}
    scores = {name: score.float() for name, score in rule.scores(graph, nodes, task, seed).items()}
    _check_scores(graph, found, scores, plugins.describe(rule))
    axes = {name: axis for name, (axis, _) in found.items()}
    pattern = options.pattern
    within = None if pattern.n else scope or rule.scope
    kept = _blocks(scores, axes, pattern) if within is None else _shares(scores, axes, pattern.share, within)
    with torch.no_grad():
        for name, alive in kept.items():
            weight = graph.get_parameter(name)
            weight.copy_(torch.where(alive, weight, 0.0))
    graph.meta["sparse"] = sorted({*graph.meta.get("sparse", []), *kept})
    asked = {
        "sparsity": str(pattern),
        "criterion": plugins.describe(rule),
        "scope": within,
        "ignore": list(options.globs),
        "seed": seed,
    }
    history.append(graph, "mask", asked, _facts(graph, kept))
    return graph.train(training)


def _facts(graph: fx.GraphModule, kept: Iterable[str]) -> dict[str, object]:
    weights = {name: graph.get_parameter(name) for name in kept}
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {
        "sparsity": sum(zeros.values()) / total,
        "weights": total,
        "nonzero": total - sum(zeros.values()),
        "note": NOTE,
        "layers": [
            {"name": name.removesuffix(".weight"), "sparsity": zeros[name] / weight.numel()}
            for name, weight in weights.items()
        ],
    }


def weights_of(graph: fx.GraphModule, ignore: Sequence[str] = ()) -> dict[str, tuple[int, list[fx.Node]]]:
    """The weights that can be masked: name -> (the axis along which they are summed, the nodes that multiply by it)."""
    parameters = {name: one for name, one in graph.named_parameters(remove_duplicate=False) if one.is_floating_point()}
    first = {id(one): name for name, one in reversed(parameters.items())}
    found: dict[str, tuple[int, list[fx.Node]]] = {}
    for node in graph.graph.nodes:
        source = argument(node, "weight") if operator_name(node) in INPUT_AXIS else None
        if isinstance(source, fx.Node) and source.op == "get_attr" and str(source.target) in parameters:
            name = first[id(parameters[str(source.target)])]
            found.setdefault(name, (INPUT_AXIS[operator_name(node)], []))[1].append(node)
    for glob in ignore:
        named = [name for name in found if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"{glob}.*")]
        if not named:
            raise InputError(
                f"ignore={glob!r} matches no weight of a layer; names look like {next(iter(found), 'nothing')}"
            )
        for name in named:
            del found[name]
    if not found:
        raise InputError(
            "nothing can be masked: the model has no convolution and no linear layer with a float weight (mask before "
            "quantize)"
        )
    return found


# ------------------------------------------------------------------------------------------------------------- choice


def _shares(scores: dict[str, Tensor], axes: dict[str, int], share: float, scope: str) -> dict[str, Tensor]:
    """name -> which weights stay, bool: of each set the best, as many as round(share * its size) leaves.

    The first of equals stays.
    """
    if scope == "global":
        whole = _best(torch.cat([score.reshape(-1) for score in scores.values()])[None], share)[0]
        parts = whole.split([score.numel() for score in scores.values()])
        return {name: part.reshape_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
    if scope == "layer":
        return {name: _best(score.reshape(1, -1), share).reshape_as(score) for name, score in scores.items()}
    found = {}
    for name, score in scores.items():
        rows = score.movedim(1 - axes[name], 0)
        found[name] = _best(rows.reshape(len(rows), -1), share).reshape_as(rows).movedim(0, 1 - axes[name])
    return found


def _best(rows: Tensor, share: float) -> Tensor:
    """(sets, size) bool: what is larger than the last that stays, and of its equals the first."""
    count = rows.shape[1] - round(share * rows.shape[1])
    if not count:
        return torch.zeros_like(rows, dtype=torch.bool)
    last = rows.kthvalue(rows.shape[1] - count + 1, dim=1, keepdim=True).values
    if len(rows) == 1:
        larger: Tensor = THRESHOLD_MASK(rows, float(last), signed=True)
    else:
        larger = rows > last
    equal = rows == last
    return larger | (equal & (equal.cumsum(1) <= count - larger.sum(1, keepdim=True)))


def _blocks(scores: dict[str, Tensor], axes: dict[str, int], pattern: Pattern) -> dict[str, Tensor]:
    """name -> which weights stay, bool: the best n of each m that follow each other along the inputs."""
    return {
        name: N_OF_M_MASK(score.movedim(axes[name], -1), pattern.n, pattern.m, signed=True).movedim(-1, axes[name])
        for name, score in scores.items()
    }


def _check_scores(graph: fx.GraphModule, found: Iterable[str], scores: Mapping[str, Tensor], criterion: str) -> None:
    for name in found:
        shape = tuple(graph.get_parameter(name).shape)
        if name not in scores or tuple(scores[name].shape) != shape:
            raise InputError(f"criterion {criterion}: returned no scores of shape {shape} for {name}")
        if not bool(scores[name].isfinite().all()):
            raise InputError(
                f"criterion {criterion}: scores of {name} are NaN or infinite; load sound weights, or look at the data"
            )
