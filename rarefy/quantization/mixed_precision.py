"""Mixed precision: how many bits each layer's weights get, measured and then decided by an integer program.

    minimise  sum_l  e_l(b_l)     such that   sum_l  c_l(b_l) <= budget

e_l(b) is the squared error of the answers, in shares of their variance, when layer l alone is rounded to b bits: the network behind the layer is run
once for each layer and width, on a few images, with the layer's mean error taken out a channel as bias correction will do. c_l(b) is what the width
costs: bits of weights, products of bits (MACs x weight bits x activation bits), or microseconds on the runtime (``rarefy.quantization.layer_times``), which are the same for all whole
numbers; then the goal is corrected by what the network measures, in a few rounds. Float is one of the choices. The program is solved exactly by
HiGHS (scipy). What is assumed: errors of different layers add up, as small independent errors do (HAWQ-V3, 2011.10680, has the same program, with
second derivatives in place of measured errors).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import optimize, sparse
from torch import Tensor, fx

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph.layers import layer_name
from rarefy.graph.macs import layer_macs
from rarefy.graph.nodes import attribute
from rarefy.quantization import formats
from rarefy.quantization.layer_times import LayerTimes

FLOAT_BITS = 32
ROUNDS, NEAR = 3, 1.02  # of correcting a goal of latency, and how near it is to be
BUDGETS = ("bits", "size", "bitops", "latency")
AVERAGE_BITS = 4.0  # where no budget is given
PREFIX = "mixed"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """bits: weights' average width, in bits. size: bytes of all weights. bitops: share of the products of 8 bits by 8. latency: share of the float network's time
    on the runtime. One of the four; none: bits=4. choices: widths, with slashes between; images: to measure errors on."""

    bits: float | None = None
    size: float | None = None
    bitops: float | None = None
    latency: float | None = None
    choices: str = "2/3/4/5/6/8/float"
    images: int = 8

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"mixed: {' and '.join(given)} are two budgets; give one")
        if any(not getattr(self, name) > 0 for name in given) or self.images < 1:
            raise InputError(f"mixed: {given[0] if given else 'images'} must be above 0")
        if not self.widths:
            raise InputError(f"mixed: choices={self.choices!r}: give widths with slashes between, such as 2/4/8/float")

    @property
    def widths(self) -> tuple[int, ...]:
        """In bits; float is FLOAT_BITS."""
        words = [word.strip() for word in self.choices.split("/") if word.strip()]
        if not all(word == "float" or (word.isdigit() and 2 <= int(word) <= 8) for word in words):
            return ()
        return tuple(sorted({FLOAT_BITS if word == "float" else int(word) for word in words}))


def parse(text: Any) -> Mixed | None:
    """``"mixed:bits=4"`` -> what it asks for; None for any other number format."""
    if isinstance(text, Mixed) or not isinstance(text, str) or text.strip().partition(":")[0] != PREFIX:
        return text if isinstance(text, Mixed) else None
    return plugins.build(Mixed, text.strip().partition(":")[2], text)  # type: ignore[no-any-return]


def allocate(
    graph: fx.GraphModule,
    layers: Sequence[fx.Node],
    batch: tuple[Tensor, ...],
    mixed: Mixed,
    grid: formats.Grid,
    runtime: Any = "onnxruntime",
    ignore: Sequence[str] = (),
) -> tuple[formats.Assignment, dict[str, Any]]:
    """The grid of each of ``layers`` (of a folded float graph), and facts: errors, widths, the budget and what of it is used.

    grid: of activations. runtime, ignore: what time is measured on, and what stays float there.
    """
    widths = mixed.widths
    errors = sensitivities(graph, layers, batch, widths)
    numbers = {node: attribute(graph, node.args[1]).numel() for node in layers}
    costs: dict[fx.Node, list[float]]
    measured: list[dict[str, float]] = []
    name = next((name for name in BUDGETS if getattr(mixed, name) is not None), "bits")
    asked: float = getattr(mixed, name) or AVERAGE_BITS
    if name == "latency":
        times = LayerTimes(graph, layers, batch, ignore, runtime, grid)
        costs = {
            node: [whole if width == FLOAT_BITS else integer for width in widths]
            for node, whole, integer in zip(layers, times.float_us, times.integer_us, strict=True)
        }
        unit = times.whole_us
    elif name == "bitops":
        macs = layer_macs(graph)
        costs = {
            node: [macs[node.name] * width * (FLOAT_BITS if width == FLOAT_BITS else grid.bits) for width in widths]
            for node in layers
        }
        unit = float(64 * sum(macs[node.name] for node in layers))
    else:
        costs = {node: [float(numbers[node] * width) for width in widths] for node in layers}
        unit = 8.0 if name == "size" else float(sum(numbers.values()))
    budget = asked * unit
    if (least := sum(map(min, costs.values())) / unit) > asked * (1 + 1e-12):
        raise InputError(
            f"mixed: {name}={asked:.6g} is out of reach: the cheapest choices take {name}={least:.6g}; ask for more, or allow fewer bits in choices"
        )
    chosen = program([errors[node] for node in layers], [costs[node] for node in layers], budget)
    for _ in range(ROUNDS if mixed.latency is not None else 0):
        share = times.share([node for node, index in zip(layers, chosen, strict=True) if widths[index] == FLOAT_BITS])
        measured.append({"goal": budget / times.whole_us, "share": share})
        if share <= mixed.latency * NEAR:  # type: ignore[operator]
            break
        budget *= mixed.latency / share  # type: ignore[operator]
        chosen = program([errors[node] for node in layers], [costs[node] for node in layers], budget)
    picked = {node: widths[index] for node, index in zip(layers, chosen, strict=True)}
    rules = tuple(
        (layer_name(node), None if width == FLOAT_BITS else formats.Grid(width, axis=0))
        for node, width in picked.items()
    )
    facts = {
        "errors": {layer_name(node): dict(zip(map(str, widths), errors[node], strict=True)) for node in layers},
        "bits": {layer_name(node): width for node, width in picked.items()},
        "average_bits": sum(numbers[node] * width for node, width in picked.items()) / sum(numbers.values()),
        "used": sum(costs[node][index] for node, index in zip(layers, chosen, strict=True)) / budget,
        "error": sum(errors[node][index] for node, index in zip(layers, chosen, strict=True)),
        **({"measured": measured} if measured else {}),
    }
    return formats.Assignment(formats.Grid(8, axis=0), rules), facts


def program(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Which choice each layer takes: least total error within the budget. Raises InputError where not even the cheapest choices fit."""
    least = sum(map(min, costs))
    if least > budget * (1 + 1e-12):
        raise InputError(
            f"mixed: the budget is {budget:.6g}, the cheapest choices take {least:.6g}; raise it, or allow fewer bits in choices"
        )
    counts = [len(row) for row in errors]
    one_each = sparse.block_diag([sparse.coo_array(np.ones((1, count))) for count in counts])
    cost = np.concatenate([np.asarray(row, float) for row in costs]) / budget
    loss = np.concatenate([np.asarray(row, float) for row in errors])
    found = optimize.milp(
        loss / max(loss.max(), 1e-300),
        integrality=np.ones(len(loss)),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(cost[None], -np.inf, 1)],
        options={"mip_rel_gap": 1e-6, "time_limit": 30},
    )
    if found.x is None:
        raise InputError(f"mixed: the integer program was not solved ({found.message}); change the budget a little")
    ends = np.cumsum(counts)
    return [int(found.x[end - count : end].argmax()) for end, count in zip(ends, counts, strict=True)]


def sensitivities(
    graph: fx.GraphModule, layers: Sequence[fx.Node], batch: tuple[Tensor, ...], widths: Sequence[int]
) -> dict[fx.Node, list[float]]:
    """Error of the answers for each layer and width: |answers' - answers|^2 over the answers' variance over the samples."""
    nodes = list(graph.graph.nodes)
    last = {node: max((nodes.index(user) for user in node.users), default=-1) for node in nodes}
    values: dict[fx.Node, Any] = {}
    arguments = iter(batch)
    kept: dict[fx.Node, dict[int, Tensor]] = {}
    wanted = set(layers)
    rule = plugins.resolve("calibration", "mse")
    with torch.no_grad():
        exact = _answers(graph(*batch))
        spread = (exact - exact.mean(0)).square().sum().clamp_min(1e-30)
        for index, node in enumerate(nodes):
            if node.op == "output":
                break
            values[node] = next(arguments) if node.op == "placeholder" else _value(graph, node, values)
            if node in wanted:
                kept[node] = {}
                for width in widths:
                    if width != FLOAT_BITS:
                        rounded = _rounded_layer(graph, node, values, width, rule)
                        answers = _finish(graph, nodes[index + 1 :], {**values, node: rounded}, last, index + 1)
                        kept[node][width] = (answers - exact).square().sum() / spread
            for source in node.all_input_nodes:
                if last[source] <= index:
                    values.pop(source, None)
    return {node: [float(kept[node].get(width, 0.0)) for width in widths] for node in layers}


def _rounded_layer(
    graph: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any], width: int, rule: Any
) -> Tensor:
    """What the layer makes of rounded weights, its mean a channel as it was."""
    source: Any = node.args[1]
    weight, grid = values[source].float(), formats.Grid(width, axis=0)
    scale = (
        rule.weight_scale(formats.rows(weight, grid), grid).float().clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))
    )
    made: Tensor = _value(graph, node, {**values, source: grid.snap(weight / scale) * scale})
    moved = made - values[node]
    axis = moved.dim() - 1 if node.target is torch.ops.aten.linear.default else 1
    return made - moved.mean([dim for dim in range(moved.dim()) if dim != axis], keepdim=True)


def _finish(
    graph: fx.GraphModule, rest: Sequence[fx.Node], values: dict[fx.Node, Any], last: Mapping[fx.Node, int], start: int
) -> Tensor:
    """The answers from what there is; values go after their last reader."""
    for index, node in enumerate(rest, start):
        if node.op == "output":
            return _answers(fx.node.map_arg(node.args[0], lambda source: values[source]))
        if node not in values:
            values[node] = _value(graph, node, values)
        for source in node.all_input_nodes:
            if last[source] <= index:
                values.pop(source, None)
    raise AssertionError("a graph ends in its output")


def _value(graph: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute(graph, node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _answers(output: Any) -> Tensor:
    """All outputs as (N, numbers)."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.reshape(leaf.shape[0], -1).double() for leaf in leaves], 1)
