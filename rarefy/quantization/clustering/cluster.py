"""cluster(): the weights of a layer share few values, which training then learns (Deep Compression, 1510.00149).

    k-means (kmeans.py) ─▶ each weight becomes the nearest of k values ─▶ ``distill``: the k values learn

With k values a weight is one of k, log2 k bits, or its entropy, and k floats a layer: no more is in a smallest folder.
The graph stays as it is, in floats: every runtime reads it, and none runs it faster; ``quantize`` makes a model faster,
its codes lie at equal distances.

The names of such weights stand in ``meta["shared"]``. While they learn, the weights of one value stay equal: each
gets the mean of their gradients (``rarefy/distillation/optimizer.py``). Zeros of a masked weight are a value of their
own, and stay zero.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from rarefy.deployment.description import graph_for, remember
from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.fold import fold as folded
from rarefy.graph.layers import check_globs, names, weighted
from rarefy.graph.nodes import Value, argument
from rarefy.quantization.clustering.kmeans import nearest, shared_values
from rarefy.quantization.options import ClusterOptions
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task, settled

NOTE = "shared values: smaller with --store smallest, no faster on any runtime"


def cluster(
    model: nn.Module,
    *,
    values: int = 16,
    fold: bool = True,
    ignore: Sequence[str] = (),
    inputs: Tensor | Sequence[Tensor] | None = None,
    task: Task | None = None,
) -> fx.GraphModule:
    """A new graph in which each layer's weight has few different values; ``model`` is left as it is.

    model: a graph, or a module, captured from ``inputs`` (an example batch) or else from images as the task's.
    values: of a layer at most, 2 to 256; the zero of a masked weight is one of them.
    fold: batch norm first goes into the weights before it, as deployment has it; False: it stays, and its four floats a
        channel are stored.
    ignore: globs on names of layers to leave as they are.

    The record in the history says of each layer how many values it has, their entropy in bits a weight, and what is
    lost, as signal-to-noise in dB. Raises InputError for a number of values out of its bounds, for a glob that matches
    no layer, and for a model without float weights, or with weights that are NaN or infinite.
    """
    task = settled(task, model)
    options = ClusterOptions(values, fold, ignore)
    graph = remember(capture(graph_for(model, inputs, task)), task)
    training = graph.training
    if fold:
        graph = folded(graph)
    check_globs(graph, ignore=options.globs)
    weights = _weights(graph, options.globs)
    sparse = {*graph.meta.get("sparse", [])}
    layers = {name: _shared(name, weight, values, name in sparse) for name, weight in weights.items()}
    graph.meta["shared"] = sorted({*graph.meta.get("shared", []), *weights})
    total = sum(weight.numel() for weight in weights.values())
    bits = sum(layers[name]["bits"] * weight.numel() for name, weight in weights.items()) / total
    facts = {"weights": total, "bits": bits, "note": NOTE, "layers": list(layers.values())}
    history.append(graph, "cluster", dataclasses.asdict(options), facts)
    return graph.train(training)


def _weights(graph: fx.GraphModule, ignore: Sequence[str]) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers by name, each once."""
    found: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    for node in graph.graph.nodes:
        name = str(argument(node, "weight").target) if weighted(node) else ""
        left_alone = any(fnmatch.fnmatchcase(one, glob) for one in names(node) for glob in ignore)
        if name in parameters and parameters[name].is_floating_point() and not left_alone:
            if id(parameters[name]) not in known:
                found[name] = parameters[name]
            known.add(id(parameters[name]))
    if not found:
        raise InputError(
            "cluster: the model has no convolution and no linear layer with a float weight that may be changed; "
            "cluster before quantize, or ignore less"
        )
    return found


def _shared(name: str, weight: nn.Parameter, values: int, sparse: bool) -> dict[str, Value]:
    """The weight takes few values, where it lies; what the record says of it."""
    before = weight.detach().double()
    if not bool(before.isfinite().all()):
        raise InputError(f"{name}: has weights that are NaN or infinite; load sound weights")
    rest = before != 0 if sparse else torch.ones_like(before, dtype=torch.bool)
    after = torch.zeros_like(before)
    if bool(rest.any()):
        book = shared_values(before[rest], values - int(sparse)).to(weight.device)
        after[rest] = book[nearest(before[rest], book).to(weight.device)]
    with torch.no_grad():
        weight.copy_(after)
    counts = weight.detach().unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    lost, power = float((before - after).square().sum()), float(before.square().sum())
    return {
        "name": name.removesuffix(".weight"),
        "values": len(counts),
        "bits": abs(float(-(share * share.log2()).sum())),
        "sqnr_db": 10 * math.log10(power / lost) if lost and power else None,
    }
