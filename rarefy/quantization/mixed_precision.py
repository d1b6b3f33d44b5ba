"""Mixed precision: how many bits each layer's weights get, measured and then decided by an integer program.

    minimise  sum_l  e_l(b_l)     such that   sum_l  c_l(b_l) <= budget

e_l(b) is the squared error of the answers, in shares of their variance, when layer l alone is rounded to b bits: the
network behind the layer is run once for each layer and width, on a few images, with the layer's mean error taken out a
channel as bias correction will do. c_l(b) is what the width costs: bits of weights, products of bits (MACs x weight
bits x activation bits), or microseconds on the runtime (``layer_times``), which are the same for all whole numbers;
then the goal is corrected by what the network measures, in a few rounds. Float is one of the choices. The program is
solved exactly by HiGHS (scipy). What is assumed: errors of different layers add up, as small independent errors do
(HAWQ-V3, 2011.10680, has the same program, with second derivatives in place of measured errors).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from scipy import optimize, sparse
from torch import Tensor, fx

from rarefy import plugins
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError
from rarefy.graph.interpreter import call, run, steps
from rarefy.graph.layers import layer_name
from rarefy.graph.macs import layer_macs
from rarefy.graph.nodes import Value, argument, attribute
from rarefy.graph.signature import tensors
from rarefy.quantization import formats
from rarefy.quantization.layer_times import LayerTimes
from rarefy.quantization.observers import Calibration, channel_axis

FLOAT_BITS = 32
ROUNDS, NEAR = 3, 1.02  # of correcting a goal of latency, and how near it is to be
AVERAGE_BITS = 4.0  # where no budget is given
PREFIX = "mixed"


class Facts(TypedDict):
    """errors: of the answers, by layer and width; error: what is expected of the chosen ones together.

    bits: of each layer's weights; average_bits: of a weight. used: share of the budget.
    """

    errors: dict[str, dict[str, float]]
    bits: dict[str, int]
    average_bits: float
    used: float
    error: float


class Round(TypedDict):
    """Shares of the float network's time: what the program was asked for, and what it came to on the runtime."""

    goal: float
    share: float


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A budget, one of four; none: bits=4.

    bits: weights' average width, in bits. size: bytes of all weights. bitops: share of the products of 8 bits by 8.
    latency: share of the float network's time on the runtime.
    choices: widths, with slashes between. images: to measure errors on.
    """

    bits: float | None = None
    size: float | None = None
    bitops: float | None = None
    latency: float | None = None
    choices: str = "2/3/4/5/6/8/float"
    images: int = 8

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            raise InputError(f"mixed: {' and '.join(given)} are two budgets; give one")
        if any(not value > 0 for value in given.values()) or self.images < 1:
            raise InputError(f"mixed: {next(iter(given), 'images')} must be above 0")
        if not self.widths:
            raise InputError(f"mixed: choices={self.choices!r}: give widths with slashes between, such as 2/4/8/float")

    def _given(self) -> dict[str, float]:
        asked = {"bits": self.bits, "size": self.size, "bitops": self.bitops, "latency": self.latency}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def budget(self) -> tuple[str, float]:
        """Its name and how much of it."""
        return next(iter(self._given().items()), ("bits", AVERAGE_BITS))

    @property
    def widths(self) -> tuple[int, ...]:
        """In bits; float is FLOAT_BITS."""
        words = [word.strip() for word in self.choices.split("/") if word.strip()]
        if not all(word == "float" or (word.isdigit() and 2 <= int(word) <= 8) for word in words):
            return ()
        return tuple(sorted({FLOAT_BITS if word == "float" else int(word) for word in words}))


def parse(text: object) -> Mixed | None:
    """``"mixed:bits=4"`` -> what it asks for; None for any other number format."""
    if isinstance(text, Mixed) or not isinstance(text, str) or text.strip().partition(":")[0] != PREFIX:
        return text if isinstance(text, Mixed) else None
    found: Mixed = plugins.build(Mixed, text.strip().partition(":")[2], text)
    return found


def allocate(
    graph: fx.GraphModule,
    layers: Sequence[fx.Node],
    batch: tuple[Tensor, ...],
    mixed: Mixed,
    grid: formats.Grid,
    runtime: Runtime | str = "onnxruntime",
    ignore: Sequence[str] = (),
) -> tuple[formats.Assignment, Facts, list[Round]]:
    """The grid of each of ``layers`` (of a folded float graph); facts: errors, widths, and what of the budget is used;
    and the rounds in which a goal of latency was corrected.

    batch: images to measure errors on. grid: of activations.
    runtime, ignore: what time is measured on, and globs of what stays float there.
    """
    widths = mixed.widths
    by_node = sensitivities(graph, layers, batch, widths)
    errors = [by_node[node] for node in layers]
    name, asked = mixed.budget
    times = LayerTimes(graph, layers, batch, ignore, runtime, grid) if name == "latency" else None
    costs, unit = _costs(graph, layers, mixed, grid) if times is None else _times(times, widths)
    budget = asked * unit
    if (least := sum(map(min, costs)) / unit) > asked * (1 + 1e-12):
        raise InputError(
            f"mixed: {name}={asked:.6g} is out of reach: the cheapest choices take {name}={least:.6g}; "
            "ask for more, or allow fewer bits in choices"
        )
    chosen = program(errors, costs, budget)
    measured: list[Round] = []
    for _ in range(0 if times is None else ROUNDS):
        assert times is not None
        share = times.share([node for node, at in zip(layers, chosen, strict=True) if widths[at] == FLOAT_BITS])
        measured.append({"goal": budget / unit, "share": share})
        if share <= asked * NEAR:
            break
        budget *= asked / share
        chosen = program(errors, costs, budget)
    picked = {layer_name(node): widths[at] for node, at in zip(layers, chosen, strict=True)}
    grids = ((layer, None if width == FLOAT_BITS else formats.Grid(width, axis=0)) for layer, width in picked.items())
    counts = [_count(graph, node) for node in layers]
    facts: Facts = {
        "errors": {
            layer_name(node): dict(zip(map(str, widths), row, strict=True))
            for node, row in zip(layers, errors, strict=True)
        },
        "bits": picked,
        "average_bits": sum(count * widths[at] for count, at in zip(counts, chosen, strict=True)) / sum(counts),
        "used": sum(row[at] for row, at in zip(costs, chosen, strict=True)) / budget,
        "error": sum(row[at] for row, at in zip(errors, chosen, strict=True)),
    }
    return formats.Assignment(formats.Grid(8, axis=0), tuple(grids)), facts, measured


def _costs(
    graph: fx.GraphModule, layers: Sequence[fx.Node], mixed: Mixed, grid: formats.Grid
) -> tuple[list[list[float]], float]:
    """What each layer costs at each width, and what one of the budget stands for in that."""
    name, _ = mixed.budget
    if name == "bitops":
        macs = layer_macs(graph)
        costs = [
            [
                float(macs[node.name] * width * (FLOAT_BITS if width == FLOAT_BITS else grid.bits))
                for width in mixed.widths
            ]
            for node in layers
        ]
        return costs, float(64 * sum(macs[node.name] for node in layers))
    counts = [_count(graph, node) for node in layers]
    costs = [[float(count * width) for width in mixed.widths] for count in counts]
    return costs, 8.0 if name == "size" else float(sum(counts))


def _times(times: LayerTimes, widths: Sequence[int]) -> tuple[list[list[float]], float]:
    """The same of microseconds, a share being of those of the float network."""
    rows = zip(times.float_us, times.integer_us, strict=True)
    return [[whole if width == FLOAT_BITS else integer for width in widths] for whole, integer in rows], times.whole_us


def _count(graph: fx.GraphModule, layer: fx.Node) -> int:
    """Of its weights."""
    weight: Tensor = attribute(graph, argument(layer, "weight"))
    return weight.numel()


def program(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Which choice each layer takes: least total error within the budget.

    Raises InputError where not even the cheapest choices fit.
    """
    least = sum(map(min, costs))
    if least > budget * (1 + 1e-12):
        raise InputError(
            f"mixed: the budget is {budget:.6g}, the cheapest choices take {least:.6g}; raise it, "
            "or allow fewer bits in choices"
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
    """Error of the answers for each layer and width: |answers' - answers|^2 over the answers' variance over the
    samples."""
    nodes = list(graph.graph.nodes)
    live: dict[fx.Node, Value] = dict(zip((node for node in nodes if node.op == "placeholder"), batch, strict=True))
    errors: dict[fx.Node, dict[int, Tensor]] = {node: {} for node in layers}
    rule: Calibration = plugins.resolve("calibration", "mse")
    with torch.no_grad():
        exact = _answers(graph(*batch))
        spread = (exact - exact.mean(0)).square().sum().clamp_min(1e-30)
        for node, _ in steps(graph, nodes[:-1], live):
            for width in widths if node in errors else ():
                if width != FLOAT_BITS:
                    rounded = _rounded(node, live, formats.Grid(width, axis=0), rule)
                    answers = _answers(run(graph, (), instead={**live, node: rounded}))
                    errors[node][width] = (answers - exact).square().sum() / spread
    return {node: [float(errors[node].get(width, 0.0)) for width in widths] for node in layers}


def _rounded(layer: fx.Node, live: Mapping[fx.Node, Value], grid: formats.Grid, rule: Calibration) -> Tensor:
    """What the layer makes of rounded weights, its mean a channel as it was."""
    source = argument(layer, "weight")
    weight: Tensor = live[source].float()
    scale = rule.weight_scale(formats.rows(weight, grid), grid).float().clamp_min(1e-12)
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    output: Tensor = call(layer, {**live, source: grid.snap(weight / scale) * scale})
    moved = output - live[layer]
    axis = channel_axis(layer, moved)
    mean: Tensor = moved.mean([dim for dim in range(moved.dim()) if dim != axis], keepdim=True)
    return output - mean


def _answers(output: object) -> Tensor:
    """All outputs as (N, numbers)."""
    return torch.cat([leaf.reshape(leaf.shape[0], -1).double() for leaf in tensors(output)], 1)
