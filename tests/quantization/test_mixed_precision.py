"""Mixed precision: the program is exact, the errors rank layers, and the widths beat one width for all at the same
size."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import IdleLayer

from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.fold import fold
from rarefy.graph.layers import weighted
from rarefy.quantization.layer_times import layer_times
from rarefy.quantization.mixed_precision import Mixed, parse, program
from rarefy.quantization.quantize import quantize


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_program_finds_what_trying_everything_finds(seed: int, layers: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(layers, 3, generator=generator).sort(1, descending=True).values.tolist()
    costs = torch.rand(layers, 3, generator=generator).sort(1).values.tolist()
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + share * (most - least) + 1e-6
    chosen = program(errors, costs, budget)
    total = sum(row[index] for row, index in zip(errors, chosen))
    assert sum(row[index] for row, index in zip(costs, chosen)) <= budget * (1 + 1e-6)
    best = min(
        sum(row[index] for row, index in zip(errors, picked))
        for picked in itertools.product(range(3), repeat=layers)
        if sum(row[index] for row, index in zip(costs, picked)) <= budget
    )
    assert total <= best * (1 + 1e-5) + 1e-6


def test_text_and_wrong_requests() -> None:
    assert (
        parse("mixed") == Mixed()
        and parse("mixed:bits=3,choices=2/4/float").widths == (2, 4, 32)
        and parse("int4") is None
    )
    for wrong in ("mixed:bits=3,size=10", "mixed:choices=9", "mixed:bits=0", "mixed:depth=3"):
        with pytest.raises(InputError):
            parse(wrong)
    with pytest.raises(InputError, match="cheapest"):
        program([[1.0]], [[2.0]], 1.0)


@pytest.mark.parametrize("asked", ["bits=1.5", "size=20", "bitops=0.01"])
def test_a_budget_out_of_reach_is_told_in_its_own_unit(asked: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 12, 12)]
    model = capture(IdleLayer().eval(), batches[0])
    name, _, value = asked.partition("=")
    with pytest.raises(
        InputError, match=f"mixed: {name}={value} is out of reach: the cheapest choices take {name}="
    ) as caught:
        quantize(model, batches=batches, weights=f"mixed:{asked}", progress=False)
    least = float(str(caught.value).split(f"take {name}=")[1].split(";")[0])
    quantize(model, batches=batches, weights=f"mixed:{name}={least * 1.0001}", progress=False)


@pytest.mark.parametrize(("budget", "idle"), [("bits=4", 2), ("size=1500", 3), ("bitops=0.5", 3)])
def test_mixed_beats_uniform_at_the_same_cost(budget: str, idle: int) -> None:
    torch.manual_seed(0)
    model = IdleLayer().eval()
    batches = [torch.randn(16, 3, 12, 12) * torch.rand(16, 1, 1, 1) * 4 for _ in range(3)]
    graph = capture(model, batches[0])
    x = torch.cat(batches)
    mixed, again = (
        quantize(graph, batches=iter(batches), weights=f"mixed:{budget},choices=2/3/4/6/8", progress=False)
        for _ in range(2)
    )
    uniform = quantize(graph, batches=batches, weights="int4", progress=False)
    facts = mixed.meta["history"][-1]["facts"]["allocation"]
    assert facts["used"] <= 1 + 1e-6 and facts["bits"]["idle"] == idle and facts["bits"]["first"] > 4
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in mixed.state_dict().items())
    wanted = graph(x)
    assert (mixed(x) - wanted).square().sum() < 0.5 * (uniform(x) - wanted).square().sum()
    assert mixed.meta["bits"]["idle.weight_codes"] == idle
    replayed = quantize(graph, batches=batches, weights=mixed.meta["history"][-1]["options"]["weights"], progress=False)
    assert all(torch.equal(value, replayed.state_dict()[name]) for name, value in mixed.state_dict().items())


def test_float_is_a_choice_and_values_have_grids_of_their_own() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 12, 12)]
    graph = capture(IdleLayer().eval(), batches[0])
    small = quantize(graph, batches=batches, weights="mixed:bits=12,choices=2/float", progress=False)
    facts = small.meta["history"][-1]["facts"]
    assert "first" in facts["float"] and facts["allocation"]["bits"]["first"] == 32
    small = quantize(graph, batches=batches, weights="int4", activations="uint4;first=uint8", progress=False)
    widths = {layer["name"]: layer["activation_bits"] for layer in small.meta["history"][-1]["facts"]["layers"]}
    assert widths == {"first": 8, "idle": 4, "last": 4}


def test_latency_of_kernels_goes_to_layers_by_what_they_read_and_make_and_else_by_order() -> None:
    graph = fold(capture(IdleLayer().eval(), torch.zeros(2, 3, 8, 8)))
    layers = [node for node in graph.graph.nodes if weighted(node)]
    sizes = [(192, 1024), (1024, 1024), (16, 10)]
    image, wide, pooled = [1, 3, 8, 8], [1, 16, 8, 8], [1, 16]
    first, idle, last = (
        ("a", "Conv", [image, wide], 5.0),
        ("b", "QLinearConv", [wide, wide], 7.0),
        ("e", "Gemm", [pooled, [1, 10]], 3.0),
    )
    around = (
        ("q", "QuantizeLinear", [image, image], 1.0),
        ("c", "Add", [wide, wide, wide], 2.0),
        ("d", "MatMul", [pooled, [16, 4], [1, 4]], 4.0),
    )
    run = [around[0], first, idle, around[1], around[2], last]
    assert layer_times(run, sizes, layers) == [6.0, 13.0, 3.0]  # the product of no layer counts with the one before it
    padded = [around[0], first, ("b", "QLinearConv", [[1, 32, 8, 8], [1, 32, 8, 8]], 7.0), around[1], last]
    assert layer_times(padded, sizes, layers) == [6.0, 9.0, 3.0]
    with pytest.raises(InputError, match="idle"):
        layer_times([first, last], sizes, layers)


def test_a_latency_is_measured_and_one_out_of_reach_is_refused() -> None:
    torch.manual_seed(0)
    graph, batches = capture(IdleLayer().eval(), torch.zeros(2, 3, 32, 32)), [torch.randn(8, 3, 32, 32)]
    try:
        small = quantize(graph, batches=batches, weights="mixed:latency=100,choices=4/8", progress=False)
    except InputError as busy:
        if "no measurement could be trusted" in str(busy):
            pytest.skip(str(busy))
        raise
    facts = small.meta["history"][-1]["facts"]
    assert set(facts["allocation"]["bits"].values()) == {8} and [
        one["share"] > 0 for one in facts["timing"]["latency"]
    ] == [True]
    with pytest.raises(InputError, match="out of reach"):
        quantize(graph, batches=batches, weights="mixed:latency=0.0001", progress=False)
