"""Rounding rules that look at what a layer reads: their guarantees, on layers small enough to compare with the formula,
and in a network."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import UnfoldedForms

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.formats import Grid
from rarefy.quantization.quantize import quantize
from rarefy.quantization.rounding._quadratic import Moments, Quadratic, inverse_factor
from rarefy.quantization.rounding.brecq import _batch
from rarefy.quantization.rounding.descent import SHRINKS
from rarefy.quantization.rounding.gptq import rounded
from rarefy.quantization.rounding_pass import Layer, OfLayers, Sample

OF_LAYERS = [name for name in plugins.available("rounding") if isinstance(plugins.resolve("rounding", name), OfLayers)]
FEW = {"adaround": "adaround:steps=400,lr=0.03", "narrow": "narrow:inputs=40"}


def a_layer(
    seed: int = 0, groups: int = 1, outputs: int = 6, inputs: int = 20, bits: int = 4, drift: float = 0.0, **options
) -> Layer:
    """Correlated, one-sided inputs, as behind a ReLU; drift: how far the float model's inputs are from the rounded
    layers'."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, axis=0)
    weight = torch.randn(groups, outputs, inputs, generator=generator)
    mixed = torch.randn(groups, inputs, inputs, generator=generator) * torch.linspace(1, 0, inputs) ** 2
    batches = []
    for _ in range(3):
        x = (mixed @ torch.randn(groups, inputs, 100, generator=generator)).relu()
        other = x + drift * torch.randn(x.shape, generator=generator)
        batches.append(Sample(x, other, weight @ other))

    def samples() -> Iterator[Sample]:
        return iter(batches)

    return Layer("layer", weight, weight.abs().amax(2, keepdim=True) / grid.qmax, grid, samples, **options)


def squared_error(layer: Layer, codes: torch.Tensor) -> torch.Tensor:
    """(groups, outputs), by the definition, of the float layer's output."""
    errors = torch.cat([sample.float_outputs - (codes * layer.scale) @ sample.inputs for sample in layer.samples()], 2)
    return ((errors - errors.mean(2, keepdim=True)) if layer.centered else errors).square().mean(2)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("groups", [1, 5])
def test_the_quadratic_form_is_the_mean_squared_error(groups: int, centered: bool) -> None:
    layer = a_layer(groups=groups, drift=0.3, centered=centered)
    moments = Moments.of(layer, "float_outputs")
    error = Quadratic(moments.gram, moments.cross)
    codes = [layer.nearest(layer.weight * factor, layer.scale) for factor in (1.0, 0.7)]
    difference = error.loss(codes[0] * layer.scale) - error.loss(codes[1] * layer.scale)
    assert torch.allclose(
        difference, squared_error(layer, codes[0]) - squared_error(layer, codes[1]), rtol=1e-3, atol=1e-3
    )
    factor = inverse_factor(moments.gram)
    damped = moments.gram + 0.01 * moments.gram.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) * torch.eye(20)
    assert torch.allclose((factor.mT @ factor) @ damped, torch.eye(20).expand_as(damped), atol=1e-2)


@pytest.mark.parametrize("name", OF_LAYERS)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    centered=st.booleans(),
    groups=st.sampled_from([1, 3]),
)
@settings(max_examples=8, deadline=None)
def test_no_output_has_more_error_than_nearest_gives(
    name: str, seed: int, bits: int, centered: bool, groups: int
) -> None:
    """GPTQ on its own Hessian, where float inputs are the rounded ones; all of them there."""
    layer = a_layer(seed, groups, bits=bits, centered=centered)
    codes = plugins.resolve("rounding", FEW.get(name, name)).layer_codes(layer, torch.Generator())
    assert codes.shape == layer.weight.shape and torch.equal(codes, codes.round())
    assert codes.min() >= layer.grid.qmin and codes.max() <= layer.grid.qmax
    nearest = squared_error(layer, layer.nearest(layer.weight, layer.scale))
    assert (squared_error(layer, codes) <= nearest * 1.001 + 1e-5).all()


@pytest.mark.parametrize("name", OF_LAYERS)
def test_each_rule_is_much_better_than_nearest_on_correlated_inputs(name: str) -> None:
    layer = a_layer(3, outputs=32, inputs=40, centered=True)
    codes = plugins.resolve("rounding", FEW.get(name, name)).layer_codes(layer, torch.Generator())
    nearest = squared_error(layer, layer.nearest(layer.weight, layer.scale)).sum()
    assert squared_error(layer, codes).sum() < 0.65 * nearest


@pytest.mark.parametrize("name", [name for name in OF_LAYERS if plugins.resolve("rounding", name).reads])
def test_rules_that_see_the_float_model_mend_earlier_errors(name: str) -> None:
    layer = a_layer(4, outputs=32, inputs=40, bits=8, drift=0.5)
    gptq, rule = (
        plugins.resolve("rounding", one).layer_codes(layer, torch.Generator()) for one in ("gptq", FEW.get(name, name))
    )
    assert squared_error(layer, rule).sum() < squared_error(layer, gptq).sum()


def test_gptq_is_the_paper_s_loop() -> None:
    """Blocks change nothing; and without them it is the update written out with the inverse Hessian itself."""
    layer = a_layer(5, outputs=3, inputs=12)
    gram = Moments.of(layer).gram
    error = Quadratic(
        gram, torch.full_like(layer.weight, torch.nan)
    )  # never better: what the loop made is not replaced by nearest
    error.better = lambda one, other: one  # type: ignore[method-assign]
    by_block = [rounded(layer, error, None, block, False) for block in (1, 5, 128)]
    assert torch.equal(by_block[0], by_block[1]) and torch.equal(by_block[0], by_block[2])
    damped = (gram[0] + 0.01 * gram[0].diagonal().mean() * torch.eye(12)).double()
    weight, made = layer.weight[0].double(), torch.zeros(3, 12, dtype=torch.double)
    left = list(range(12))
    for j in range(12):
        inverse = torch.linalg.inv(damped[j:, j:])
        made[:, j] = layer.nearest(weight[:, j], layer.scale[0, :, 0].double()) * layer.scale[0, :, 0].double()
        change = (weight[:, j] - made[:, j]) / inverse[0, 0]
        weight[:, left[j:]] -= change[:, None] * inverse[0]
    assert torch.allclose(by_block[0][0].double() * layer.scale[0].double(), made, atol=1e-5)


def test_gptaq_without_drift_is_gptq_and_a_dead_input_breaks_neither() -> None:
    layer = a_layer(6, drift=0.0)
    gptq, gptaq = (
        plugins.resolve("rounding", name).layer_codes(layer, torch.Generator()) for name in ("gptq", "gptaq")
    )
    assert torch.equal(gptq, gptaq)
    for name, constant in itertools.product(OF_LAYERS, (0.0, 1.0)):
        batches = [
            sample._replace(inputs=sample.inputs.clone(), float_inputs=sample.float_inputs.clone())
            for sample in layer.samples()
        ]
        for sample in batches:
            sample.inputs[:, 3] = sample.float_inputs[:, 3] = constant
        dead = Layer("dead", layer.weight, layer.scale, layer.grid, lambda given=batches: iter(given), True)
        codes = plugins.resolve("rounding", FEW.get(name, name)).layer_codes(dead, torch.Generator())
        assert (
            torch.isfinite(codes).all()
            and ((codes[..., 3] - layer.weight[..., 3] / layer.scale[..., 0]).abs() <= 1.001).all()
        )


@pytest.mark.parametrize("centered", [False, True])
def test_one_image_in_four_judges_whatever_the_batches(centered: bool) -> None:
    torch.manual_seed(0)
    images, places = 11, 3
    x, y = torch.randn(2, 5, images * places) + 1, torch.randn(2, 4, images * places)
    layer = Layer("layer", torch.zeros(2, 4, 5), torch.ones(2, 1, 1), Grid(4, axis=0), lambda: iter(()), centered)

    def over(ends: list[int], chosen: list[int] | None = None) -> Layer:
        columns = [torch.arange(places) + places * image for image in (range(images) if chosen is None else chosen)]
        own = [torch.cat(part) for part in (columns[a:b] for a, b in itertools.pairwise(ends)) if part]
        return dataclasses.replace(
            layer, samples=lambda: iter([Sample(x[:, :, part], None, y[:, :, part], places) for part in own])
        )

    judges = [3, 7]
    for ends in ([0, 11], [0, 1, 3, 4, 9, 11]):
        found = Moments.halves(over(ends), "float_outputs", 4)
        for moments, chosen in zip(
            found, ([image for image in range(images) if image not in judges], judges, None), strict=True
        ):
            wanted = Moments.of(over([0, images], chosen), "float_outputs")
            assert moments.count == wanted.count
            assert torch.allclose(moments.gram, wanted.gram, atol=1e-5) and torch.allclose(
                moments.cross, wanted.cross, atol=1e-5
            )


def test_descent_does_not_fit_what_few_images_have_by_chance() -> None:
    """64 inputs, 80 images: what all of the descent gains on these it loses on others."""
    wins = 0
    for seed in range(6):
        few, many = (_drawn(seed, count) for count in (80, 4000))
        chosen, fitted = (
            plugins.resolve("rounding", one).layer_codes(few, torch.Generator())
            for one in ("descent", "descent:shrink=0,share=1")
        )
        assert squared_error(few, fitted).sum() < squared_error(few, chosen).sum()
        wins += bool(squared_error(many, chosen).sum() < 0.95 * squared_error(many, fitted).sum())
    assert wins >= 5


def test_descent_shrinks_as_far_as_the_images_that_judge_want() -> None:
    """Of thousands of images little is chance, of 80 much is; neither ends at the first that is tried."""
    for count, chosen in ((4000, {0.0, 0.05}), (80, {0.4, 0.6})):
        layer = _drawn(0, count)
        ours = plugins.resolve("rounding", "descent:share=1").layer_codes(layer, torch.Generator())
        same = [
            shrink
            for shrink in SHRINKS
            if torch.equal(
                ours,
                plugins.resolve("rounding", f"descent:share=1,shrink={shrink}").layer_codes(layer, torch.Generator()),
            )
        ]
        assert same and set(same) <= chosen, (count, same)


def _drawn(seed: int, count: int) -> Layer:
    """The same layer and the same kind of inputs for a seed, ``count`` images of one place."""
    generator = torch.Generator().manual_seed(seed)
    weight, mixed = torch.randn(1, 24, 64, generator=generator), torch.randn(1, 64, 64, generator=generator)
    x = (mixed @ torch.randn(1, 64, count, generator=generator.manual_seed(seed + count)) / 8).relu()
    other = x + 0.3 * torch.randn(x.shape, generator=generator)
    grid = Grid(4, axis=0)
    return Layer(
        "layer",
        weight,
        weight.abs().amax(2, keepdim=True) / grid.qmax,
        grid,
        lambda: iter([Sample(x, other, weight @ other)]),
    )


def test_narrow_is_gptq_up_to_so_many_inputs_and_nearest_above() -> None:
    layer, rule = a_layer(7, outputs=16, inputs=20), "narrow:inputs={}".format
    few, many, gptq = (
        plugins.resolve("rounding", name).layer_codes(layer, torch.Generator()) for name in (rule(20), rule(19), "gptq")
    )
    nearest = layer.nearest(layer.weight, layer.scale)
    assert torch.equal(few, gptq) and torch.equal(many, nearest) and not torch.equal(gptq, nearest)
    assert torch.equal(
        plugins.resolve("rounding", "narrow").codes(layer.weight / layer.scale, layer.grid, torch.Generator()), nearest
    )


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_network_answers_better_than_with_nearest_and_the_same_each_time(name: str) -> None:
    torch.manual_seed(0)
    graph = capture(UnfoldedForms().eval(), torch.randn(2, 3, 16, 16))
    batches = [torch.randn(16, 3, 16, 16) for _ in range(6)]
    wanted = graph(torch.cat(batches)).detach()

    def error(rounding: str) -> tuple[float, dict[str, torch.Tensor]]:
        small = quantize(graph, batches=batches, weights="int3", rounding=rounding, progress=False)
        assert small.meta["history"][-1]["facts"]["images_of_rounding"] == 96
        assert small.meta["history"][-1]["options"]["rounding"] == rounding
        return float((small(torch.cat(batches)) - wanted).square().mean()), small.state_dict()

    text = FEW.get(name, name)
    (ours, first), (_, second), (nearest, _) = error(text), error(text), error("nearest")
    assert ours < 0.95 * nearest
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gptq:block=0", "gptq: block=0 must be at least 1"),
        ("gptaq:block=0", "gptaq: block=0 must be at least 1"),
        ("gptaq:share=2", "share=2.0 from 0 to 1"),
        ("gptaq:share=-0.1", "share=-0.1 from 0 to 1"),
        ("adaround:steps=0", "adaround: steps=0, .* give positive numbers"),
        ("adaround:lr=0", "adaround: .*lr=0.0, .* give positive numbers"),
        ("adaround:strength=-1", "adaround: .*strength=-1.0: give positive numbers"),
        ("descent:sweeps=0", "descent: sweeps=0 must be at least 1"),
        ("descent:shrink=2", "descent: shrink=2.0 must be from 0 to 1"),
        ("descent:share=-1", "descent: share=-1.0 must be from 0 to 1"),
        ("narrow:inputs=0", "narrow: inputs=0 must be at least 1"),
        ("brecq:steps=0", "brecq: steps=0, .* give positive numbers"),
        ("brecq:batch=0", "brecq: .*batch=0, .* give positive numbers"),
        ("brecq:lr=0", "brecq: .* lr=0.0, .* give positive numbers"),
        ("brecq:scale_lr=-1", "brecq: .*scale_lr=-1.0, .* give positive numbers"),
        ("brecq:strength=-1", "brecq: .*strength=-1.0: give positive numbers"),
        ("brecq:drop=1", "drop=1.0: a probability below 1"),
        ("brecq:drop=-0.5", "drop=-0.5: a probability below 1"),
    ],
)
def test_options_out_of_range_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plugins.resolve("rounding", text)


DEFAULTS: dict[str, dict[str, object]] = {
    "gptq": {"block": 128, "order": True},
    "gptaq": {"share": 0.25, "block": 128, "order": True},
    "adaround": {"steps": 1000, "lr": 0.01, "strength": 1.0},
    "descent": {"sweeps": 3, "shrink": None, "share": None},
    "narrow": {"inputs": 32},
    "brecq": {"steps": 1000, "batch": 32, "lr": 0.01, "scale_lr": 0.001, "drop": 0.5, "strength": 4.0},
    "nearest": {},
    "stochastic": {},
}


def test_defaults() -> None:
    found = {name: dataclasses.asdict(plugins.resolve("rounding", name)) for name in plugins.available("rounding")}
    assert found == DEFAULTS


def test_what_a_block_reads_in_float_is_mixed_in_where_it_is_a_value_of_both() -> None:
    """A number is no tensor, and what the float block does not have stays as the rounded one reads it."""
    rounded_, exact = torch.zeros(2), torch.ones(2)

    class Reads:
        inputs, float_inputs, outputs, images = [rounded_, 3, rounded_], [exact, 4, None], exact, 2

        def part(self, values: list[object], chosen: torch.Tensor, images: int) -> list[object]:
            return values

    chosen = torch.arange(2)
    inputs, answers = _batch(Reads(), chosen, lambda x, y: y)  # type: ignore[arg-type]
    assert inputs[0] is exact and inputs[1] == 3 and inputs[2] is rounded_ and answers is exact
    assert _batch(Reads(), chosen, None)[0] == [rounded_, 3, rounded_]  # type: ignore[arg-type]
