"""Where channels are read: what the criteria that look at data have in common.

A channel matters through the operators that sum over it: convolutions, linear layers, products, means over channels.
Each such place is a **read**, (reader, source, layer): the node, the activation it takes, and the labels that end in
it. An operator that passes its channels on (depthwise convolution, batch norm, addition, pooling over the plane) is
none.

A mask m of ones, one number a sample and position, multiplied into every read, has the gradient dL/dm: how the loss of
that sample changes as the channel leaves, exactly the sum of W * dL/dW over the weights that read it, without a
weight's gradient for each sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rarefy.errors import DataError, InputError
from rarefy.graph.interpreter import call, run
from rarefy.graph.macs import MACS
from rarefy.graph.nodes import Value, device_of, operator_name
from rarefy.pruning.groups.groups import Coupling
from rarefy.pruning.groups.labels import axes_of, values_in
from rarefy.tasks.metric import Outputs, Targets
from rarefy.tasks.task import Task

_SUMS = {
    *MACS, "mean", "sum", "nanmean", "nansum", "amax", "amin", "max", "min", "median", "mode", "aminmax", "quantile",
    "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "logsumexp", "cosine_similarity",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Read:
    """reader takes source; axis: of the source; classes: (size,) the class of each position, 0 where it stays."""

    reader: fx.Node
    source: fx.Node
    axis: int
    classes: Tensor

    def along(self, value: Tensor, rank: int) -> Tensor:
        """(N, size) -> shaped to multiply the source of that rank."""
        return value.reshape([len(value), *(-1 if axis == self.axis else 1 for axis in range(1, rank))])


def reads(coupling: Coupling) -> list[Read]:
    """Every place where an operator sums over channels that could leave, in execution order."""
    found = []
    for node in coupling.graph.graph.nodes:
        if operator_name(node) not in _SUMS:
            continue
        passed = _classes_of(coupling, node)
        for source in node.all_input_nodes:
            if source.op == "get_attr" or isinstance(coupling.values[source], list):
                continue
            for layer in (layer for value in values_in(coupling.values[source]) for layer in value.layers):
                axes = axes_of(layer)
                classes = layer.reshape(-1)
                ends = (classes > 0) & ~torch.isin(classes, passed)
                if len(axes) == 1 and axes[0] > 0 and bool(ends.any()):
                    found.append(Read(node, source, axes[0], torch.where(ends, classes, 0)))
    return found


def _classes_of(coupling: Coupling, node: fx.Node) -> Tensor:
    layers = [layer.reshape(-1) for value in values_in(coupling.values[node]) for layer in value.layers]
    classes: Tensor = torch.cat([torch.zeros(1, dtype=torch.int64), *layers]).unique()
    return classes


def run_seen(
    graph: fx.GraphModule, places: Sequence[Read], inputs: Tensor, see: Callable[[Read, Tensor], Tensor]
) -> Value:
    """What the graph yields where each reader gets what ``see(read, activation)`` makes of what it takes."""
    by_reader: dict[fx.Node, list[Read]] = {}
    for place in places:
        by_reader.setdefault(place.reader, []).append(place)

    def rule(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
        taken = {source: live[source] for source in node.all_input_nodes}
        for place in by_reader.get(node, ()):
            taken[place.source] = see(place, taken[place.source])
        return call(node, taken)

    return run(graph, (inputs,), instead=rule)


def needed(task: Task | None, name: str) -> Task:
    """The task. Raises InputError without one."""
    if task is None:
        raise InputError(f"criterion {name!r} needs data: pass task= (--data), or use criterion='magnitude'")
    return task


def batches_of(
    task: Task | None, graph: fx.GraphModule, name: str, batches: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Targets]]:
    """(inputs, targets) of the training split, shuffled by the seed.

    Raises InputError without a task, DataError without data.
    """
    seen = 0
    shuffled = needed(task, name).data.batches("train", batch_size, shuffle_seed=seed, device=device_of(graph))
    for inputs, targets in itertools.islice(shuffled, batches):
        yield inputs, targets
        seen += 1
    if not seen:
        raise DataError(f"criterion {name!r}: the training split of the task is empty")


def sensitivities(
    graph: fx.GraphModule, places: list[Read], count: int, inputs: Tensor, loss: Callable[[Outputs], Tensor]
) -> Tensor:
    """(N, count) float64: for each sample and class, d loss / d mask, summed over all reads of the class.

    It is eq. 4 to 6 of arXiv 2108.00708.

    loss: from the network's output to a scalar, the *sum* over samples, so that a sample's gradient is its own.
    """
    masks: list[Tensor] = []
    order: list[Read] = []

    def see(place: Read, activation: Tensor) -> Tensor:
        mask = activation.new_ones(len(activation), activation.shape[place.axis], requires_grad=True)
        masks.append(mask)
        order.append(place)
        return activation * place.along(mask, activation.dim())

    frozen = {name: value.requires_grad for name, value in graph.named_parameters()}
    try:
        graph.requires_grad_(False)
        with torch.enable_grad():
            value = loss(run_seen(graph, places, inputs, see))
        gradients = torch.autograd.grad(value, masks, allow_unused=True, materialize_grads=True)
    finally:
        for name, parameter in graph.named_parameters():
            parameter.requires_grad_(frozen[name])
    total = torch.zeros(len(inputs), count, dtype=torch.float64)
    for place, gradient in zip(order, gradients, strict=True):
        total.index_add_(1, place.classes, gradient.double().cpu())
    return total


def check_reads(places: list[Read], coupling: Coupling, name: str) -> list[Read]:
    """``places``, if they cover every class. Raises InputError, naming a layer that no operator reads."""
    seen = torch.zeros(coupling.count, dtype=torch.bool)
    seen[0] = True
    for place in places:
        seen[place.classes] = True
    missing = next((row.names[0] for row in coupling.rows if not bool(seen[row.classes].all())), None)
    if missing is not None:
        raise InputError(
            f"criterion {name!r}: no layer reads the channels of {missing}; list it in ignore, or use "
            "criterion='magnitude'"
        )
    return places
