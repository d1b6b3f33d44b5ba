"""Block reconstruction: which layers are rounded together, the stretch of a graph as a function, what it is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import PreNorm, TwoUnits
from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.fold import fold
from rarefy.graph.layers import layer_name, weighted
from rarefy.quantization import blocks
from rarefy.quantization.quantize import quantize
from rarefy.quantization.rounding_pass import Rounded

BRECQ = "brecq:steps=100,lr=0.03"


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def images(seed: int, count: int = 6) -> list[torch.Tensor]:
    """Smooth, so that layers read correlated values."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.functional.interpolate(torch.randn(16, 3, 4, 4, generator=generator), size=(12, 12), mode="bilinear")
        for _ in range(count)
    ]


def graph_of(model: nn.Module) -> Any:
    return capture(model.eval(), torch.zeros(2, 3, 12, 12))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (TwoUnits, [["stem"], ["one.first", "one.second"], ["two.first", "two.second"], ["head"]]),
        (PreNorm, [["patch"], ["wide", "narrow"], ["head"]]),
        (plain, [["0"], ["2"], ["6"]]),
    ],
)
def test_layers_between_two_cuts_go_together(make: Any, expected: list[list[str]]) -> None:
    graph = fold(graph_of(make()))
    found, _ = blocks.together(graph, [node for node in graph.graph.nodes if weighted(node)])
    assert [[layer_name(node) for node in block] for block in found] == expected


class Spy:
    """Rounds to nearest, and keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def reconstruct(self, block: Any, generator: torch.Generator) -> Any:
        codes = [grid.snap(w / step) for w, step, grid in zip(block.weights, block.steps, block.grids)]
        numbers = [code * step for code, step in zip(codes, block.steps)]
        exact = block.run(block.float_inputs, block.weights, block.biases, block.scales, lambda rounded, exact: exact)
        self.seen.append((block, block.run(block.inputs, numbers, block.biases, block.scales, None), exact))
        return Rounded(codes, block.steps, block.biases, block.scales)


@pytest.mark.parametrize("make", [TwoUnits, plain])
def test_a_stretch_unrounded_is_the_float_block_and_rounded_what_the_network_computes(make: Any) -> None:
    torch.manual_seed(0)
    graph, spy = graph_of(make()), Spy()
    small = quantize(graph, batches=images(0), rounding=spy, calibration="mse", correct_bias=False, progress=False)
    nearest = quantize(
        graph, batches=images(0), rounding="nearest", calibration="mse", correct_bias=False, progress=False
    )
    assert all(torch.equal(value, nearest.state_dict()[name]) for name, value in small.state_dict().items())
    assert len(spy.seen) > 2
    for block, _, exact in spy.seen:
        assert not block.shifts and block.images == 96 and all(value is not None for value in block.float_inputs)
        assert torch.allclose(exact, block.outputs, atol=1e-5)
    for (_, rounded, _), (after, _, _) in zip(spy.seen, spy.seen[1:]):  # but for the bias, which is not rounded yet
        read = after.inputs[0]
        assert rounded.shape == read.shape and float(((rounded - read).abs() > 1e-6).float().mean()) < 0.01


@pytest.mark.parametrize("make", [TwoUnits, PreNorm, plain])
@pytest.mark.parametrize(("weights", "activations"), [("int3", "uint8"), ("int4", "uint4")])
def test_answers_come_nearer_on_images_it_has_not_seen_and_the_same_for_a_seed(
    make: Any, weights: str, activations: str
) -> None:
    torch.manual_seed(0)
    graph, held_out = graph_of(make()), torch.cat(images(1))
    wanted = graph(held_out).detach()

    def error(rounding: str, seed: int = 0) -> tuple[float, Any]:
        small = quantize(
            graph,
            batches=images(0),
            weights=weights,
            activations=activations,
            rounding=rounding,
            seed=seed,
            progress=False,
        )
        return float((small(held_out) - wanted).square().mean()), small.state_dict()

    (ours, first), (nearest, _) = error(BRECQ), error("nearest")
    assert ours < 0.95 * nearest
    if make is plain and weights == "int3":
        again, other = error(BRECQ)[1], error(BRECQ, seed=1)[1]
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        assert any(not torch.equal(value, other[name]) for name, value in first.items())


class Viewing(TwoUnits):
    """The number of images is written into a view inside the last block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(self.stem(x).relu()).mean((2, 3))
        return self.head(y.view(x.shape[0], -1).relu())


def test_a_size_that_hangs_on_the_batch_is_that_of_the_images_at_hand() -> None:
    torch.manual_seed(0)
    graph, spy = graph_of(Viewing()), Spy()
    quantize(graph, batches=images(0), rounding=spy, calibration="mse", correct_bias=False, progress=False)
    assert any(isinstance(value, int) for block, *_ in spy.seen for value in block.inputs)
    for block, _, exact in spy.seen:
        few = torch.arange(5)
        part = block.run(
            block.part(block.inputs if None in block.float_inputs else block.float_inputs, few, block.images),
            block.weights, block.biases, block.scales, lambda rounded, exact: exact,
        )  # fmt: skip
        assert len(part) == 5


class PaddedPooling(TwoUnits):
    """The stem's codes are padded with the lowest and pooled, and no gradient passes that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(self.stem(x).relu(), (0, 1, 0, 1), value=-torch.inf)
        return self.head(self.two(self.one(nn.functional.max_pool2d(x, 3, 2))).mean((2, 3)))


def test_a_block_ends_before_codes_that_are_moved_as_such() -> None:
    torch.manual_seed(0)
    graph, held_out = graph_of(PaddedPooling()), torch.cat(images(1))
    ours, nearest = (
        quantize(graph, batches=images(0), weights="int3", rounding=rounding, progress=False)(held_out)
        for rounding in (BRECQ, "nearest")
    )
    wanted = graph(held_out).detach()
    assert (ours - wanted).square().mean() < 0.95 * (nearest - wanted).square().mean()


def test_a_block_is_never_worse_than_nearest_on_its_images() -> None:
    torch.manual_seed(0)
    graph = graph_of(TwoUnits())
    wild = quantize(
        graph,
        batches=images(0),
        weights="int3",
        rounding="brecq:steps=3,lr=50,strength=0",
        correct_bias=False,
        progress=False,
    )
    nearest = quantize(graph, batches=images(0), weights="int3", rounding="nearest", correct_bias=False, progress=False)
    wanted = graph(torch.cat(images(0)))
    assert (wild(torch.cat(images(0))) - wanted).square().mean() <= 1.1 * (
        nearest(torch.cat(images(0))) - wanted
    ).square().mean()
