"""What a search decides before anything is trained: widths, level switches, generations, the front and its picks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rarefy import demo
from rarefy.compression import recipe as recipe_
from rarefy.compression.search import first, front, plans, table
from rarefy.compression.search.profile import Network, Profile, measure
from rarefy.compression.search.space import BITS, Family, Genome, Lengths, recipe
from rarefy.errors import FormatError, InputError
from rarefy.graph.capture import capture
from rarefy.graph.macs import count_macs
from rarefy.pruning.prune import prune

LENGTHS = Lengths(1, 5, 64)
WIDTHS = (2, 4, 6, 8)


def profile(errors: list[list[float]] | None = None, count: int = 3) -> Profile:
    """A chain of ``count`` families: the cost is the sum of products of neighbours' widths."""
    families = tuple(Family(f"layer{index}", WIDTHS) for index in range(count))
    form = np.zeros((count + 1, count + 1))
    for index in range(count - 1):
        form[index, index + 1] = 1.0
    form[0, -1], form[-1, -1] = 1.0, 4.0
    parts = tuple(
        np.array([[width if index == axis else 0 for axis in range(count)] for width in WIDTHS])
        for index in range(count)
    )
    rows = errors or [[3.0, 1.5, 0.5, 0.0]] * count
    return Profile(families, tuple(map(tuple, rows)), "us", np.ones(count), form, parts, np.zeros(count))


def done(number: int, drop: float, cost: float, rung: int = 0, **more: Any) -> plans.Done:
    levels = more.pop("levels", (number % 4, (number // 4) % 4, 3))
    return plans.Done(number, Genome(levels, rung=rung, **more), drop, cost, 1000.0, {})


def test_the_integer_program_takes_what_hurts_least_within_the_tables_cost() -> None:
    cheap_last = profile([[9.0, 6.0, 3.0, 0.0], [9.0, 6.0, 3.0, 0.0], [0.3, 0.2, 0.1, 0.0]])
    assert first.planned(cheap_last, 1.0) == cheap_last.whole
    for cost in (0.9, 0.6, 0.3):
        levels = first.planned(cheap_last, cost)
        assert cheap_last.cost(levels) <= cost
    levels = first.planned(cheap_last, 0.6)
    assert levels[2] < min(levels[:2])  # the last family costs the answers nothing
    assert first.planned(cheap_last, 0.0) == (0, 0, 0)  # out of reach: the narrowest there is


def test_a_level_switch_keeps_the_cost_and_moves_something() -> None:
    known, random = profile(), np.random.default_rng(0)
    for _ in range(50):
        child = first.switched(known, (1, 2, 1), known.cost((1, 2, 1)), random)
        assert known.cost(child) <= known.cost((1, 2, 1)) + 1e-12
        assert all(0 <= level < 4 for level in child)
    assert len({first.switched(known, (1, 2, 1), known.cost((1, 2, 1)), random) for _ in range(50)}) > 2


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    graph = capture(demo.model(width=16), torch.zeros(2, 1, 8, 8)).eval()
    return Network(graph, torch.rand(16, 1, 8, 8))


class NoClock:
    """A runtime that does not tell its kernels' times."""

    class capabilities:
        has_kernel_times = False


def test_without_a_clock_the_cost_is_that_of_the_macs(network: Network) -> None:
    found = measure(network, NoClock(), 0, progress=False)  # type: ignore[arg-type]
    assert found.unit == "MACs" and [one.name for one in found.families] == [
        "stem.0",
        "first.0",
        "second.0",
        "fourth.0",
    ]
    for levels in ([1, 2, 3, 4], [0, 0, 0, 0], [7, 3, 5, 1]):
        small = network.at([one.widths[level] for one, level in zip(found.families, levels, strict=True)])
        assert found.cost(levels) == pytest.approx(count_macs(small) / count_macs(network.coupling.graph), rel=1e-6)
    assert all(row[-1] == 0.0 and row[0] > 0 for row in found.errors)
    again = Profile.from_json(found.to_json())
    assert again.cost([1, 2, 3, 4]) == found.cost([1, 2, 3, 4]) and again.families == found.families


def test_refined_widths_are_no_worse_and_cost_no_more(network: Network) -> None:
    found = measure(network, NoClock(), 0, progress=False)  # type: ignore[arg-type]
    levels = first.planned(found, 0.4)
    better = first.refined(found, network, levels, seed=1)
    widths = [[one.widths[level] for one, level in zip(found.families, some, strict=True)] for some in (levels, better)]
    errors = [network.error(some, 16) for some in widths]
    assert errors[1] <= errors[0] and found.cost(better) <= first.cap_of(found, levels)
    assert better == first.refined(found, network, levels, seed=1)


def test_a_recipe_of_a_genome_is_one_that_compress_takes(network: Network) -> None:
    families = network.families
    full = tuple(len(one.widths) - 1 for one in families)
    genomes = [
        Genome((1, 2, 3, 4)),
        Genome((1, 2, 3, 4), rung=1, bits=None, params={"lr": 0.03, "criterion": "magnitude"}),
        Genome(full, bits=4.0),
        Genome(full, student="depth:keep=0.75", rung=2),
        Genome(full, switched={"first.0": 5, "head": 8}),
        Genome(full, bits=None),
    ]
    for genome in genomes:
        steps = recipe(families, genome, LENGTHS)
        assert [recipe_.step(one)["do"] for one in steps]
        assert Genome.from_json(genome.to_json()) == genome
    parent = Genome((5, 5, 5, 5), rung=1)
    child = recipe(families, Genome((1, 2, 3, 4), rung=1), LENGTHS, parent, taught=True)
    assert [one["do"] for one in child] == ["prune", "distill", "quantize"]
    assert all(share < 1 for share in child[0]["keep"].values())  # type: ignore[attr-defined]
    promoted = recipe(families, dataclasses.replace(parent, rung=2), LENGTHS, parent, taught=True)
    assert promoted[0] == {"do": "prune", "keep": 1.0} and promoted[1]["epochs"] == LENGTHS.patient
    with pytest.raises(FormatError, match="no choice"):
        Genome.from_json({"levels": [1], "unknown": 2})


def test_prune_takes_shares_by_layer(network: Network) -> None:
    small = prune(network.coupling.graph, keep={"*": 0.5, "stem.0": 0.25})
    channels = small.meta["history"][-1]["facts"]["channels"]
    assert channels["stem.0.weight"] == [16, 4] and channels["first.0.weight"] == [16, 8]
    with pytest.raises(InputError, match="matches no layer"):
        prune(network.coupling.graph, keep={"nowhere": 0.5})
    with pytest.raises(InputError, match="only keep= takes shares"):
        prune(network.coupling.graph, macs={"stem.0": 0.5})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one share"):
        prune(network.coupling.graph, keep={"stem.0": 0.5}, schedule="iterative:rounds=2")


def test_the_first_generation_spans_what_can_be_reached() -> None:
    known = profile()
    genomes = plans.first(known, 6)
    costs = [known.cost(one.levels) for one in genomes]
    assert genomes[0].levels == known.whole and len({one.structure for one in genomes}) == len(genomes)
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.3 < 0.7 < costs[1] <= 0.9


def test_promotions_are_of_the_best_and_never_twice() -> None:
    tried = [
        done(index, drop, cost) for index, (drop, cost) in enumerate([(0.1, 0.5), (0.3, 0.2), (0.5, 0.6), (0.05, 0.9)])
    ]
    found = plans.promotions(tried, [one.genome for one in tried])
    assert {one.parent for one in found[:2]} <= {0, 1, 3} and found[-1].parent == 2  # beaten, so last
    assert all(one.rung == 1 for one in found)
    again = plans.promotions(tried, [*(one.genome for one in tried), found[0]])
    assert found[0] not in again and len(again) == 3
    top = plans.promotions([done(0, 0.1, 0.5, rung=2)], [])
    assert top == []  # there is no rung above


def test_a_plan_hangs_on_the_seed_alone_and_the_last_one_trains() -> None:
    known = profile()
    tried = [done(index, 0.5 / (index + 1), 0.1 * (index + 1)) for index in range(6)]
    genomes = [one.genome for one in tried]
    plan = plans.following(known, tried, genomes, 6, 30, seed=5)
    assert plan == plans.following(known, tried, genomes, 6, 30, seed=5)
    assert plan != plans.following(known, tried, genomes, 6, 30, seed=6)
    assert {one.rung for one in plan} == {0, 1} and any(one.student for one in plan)
    last = plans.following(known, tried, genomes, 2, 2, seed=5)
    assert len(last) == 2 and all(one.rung == 1 for one in last)
    assert len({(one.structure, one.rung) for one in [*plan, *genomes]}) == len(plan) + len(genomes)


def test_bits_are_switched_between_layers() -> None:
    parent = plans.Done(3, Genome((3, 3, 3), bits=6.0), 0.0, 0.5, 900.0, {"a": 5, "b": 8, "c": 4})
    found = [plans._other_bits(parent, parent.genome, np.random.default_rng(seed)) for seed in range(20)]
    moved = [one.switched for one in found if one.switched]
    assert moved and all(sum(bits.values()) == 17 for bits in moved)  # one up, one down
    assert {one.bits for one in found if not one.switched} <= {*BITS, None} - {6.0}


# --------------------------------------------------------------------------------------------------------------- front


def point(number: int, drop: float, ms: float, size: int) -> front.Point:
    spread = front.Quartiles(median=ms, low=0.9 * ms, high=1.1 * ms)
    return front.Point(
        number=number,
        name=f"point {number}",
        value=0.9 - drop,
        interval=[0.85 - drop, 0.95 - drop],
        drop=drop,
        latency_ms=spread,
        speedup=front.Quartiles(median=10 / ms, low=9 / ms, high=11 / ms),
        disturbed=False,
        size_bytes=size,
        seconds=1.0,
        recipe="quantize",
        beaten=False,
        folder="",
    )


POINTS = [
    point(0, 0.0, 9.0, 4_000_000),
    point(1, 0.004, 4.0, 1_500_000),
    point(2, 0.03, 2.0, 700_000),
    point(3, 0.05, 4.5, 2_000_000),
    point(4, 0.004, 4.0, 1_500_000),
]


def test_the_beaten_are_marked_and_of_two_alike_one_stays() -> None:
    marked = front.mark(POINTS)
    assert [one["number"] for one in marked] == [2, 1, 4, 3, 0]
    assert {one["number"] for one in marked if one["beaten"]} == {3, 4}


@pytest.mark.parametrize(
    ("wish", "number"),
    [("5ms", 1), ("5000us", 1), ("3 ms", 2), ("drop=0.5%", 1), ("drop=0.03", 2),
     ("1MB", 2), ("2MB", 1), ("5x", 2), ("#0", 0), ("2", 2)],
)  # fmt: skip
def test_a_wish_picks_a_point(wish: str, number: int) -> None:
    best = [one for one in front.mark(POINTS) if not one["beaten"]]
    assert front.picked(best, wish)["number"] == number


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("1ms", "the fastest takes 2.000 ms"),
        ("100x", "the fastest is 5.00x"),
        ("1kB", "the smallest has 700,000 bytes"),
        ("#3", "have #2, #1, #0"),
        ("soon", "is no wish; write 5ms"),
        ("drop=150%", "not between 0 and 100"),
        ("0ms", "is no wish"),
        ("1.2.3ms", "is no wish"),
    ],
)
def test_a_wish_that_cannot_be_says_how_near_it_comes(wish: str, said: str) -> None:
    best = [one for one in front.mark(POINTS) if not one["beaten"]]
    with pytest.raises(InputError, match=said):
        front.picked(best, wish)


def timed(one: front.Point, ms: float) -> front.Point:
    """The same, timed on another runtime, too."""
    spread = front.Quartiles(median=ms, low=0.9 * ms, high=1.1 * ms)
    ratio = front.Quartiles(median=10 / ms, low=9 / ms, high=11 / ms)
    return {**one, "elsewhere": {"openvino:threads=1": front.Clock(latency_ms=spread, speedup=ratio, disturbed=False)}}


def test_a_point_that_is_the_fastest_on_one_runtime_stays_and_is_picked_there() -> None:
    points = [timed(POINTS[1], 6.0), timed(POINTS[3], 3.0), timed(POINTS[4], 8.0), POINTS[0]]
    marked = front.mark(points)
    assert {one["number"] for one in marked if one["beaten"]} == {4}  # 3 is beaten on the first runtime alone
    assert next(one for one in front.mark([*points[:2], POINTS[4]]) if one["number"] == 4)[
        "beaten"
    ]  # it can't run there
    best = [one for one in marked if not one["beaten"]]
    assert front.picked(best, "5ms@openvino")["number"] == 3
    assert front.picked(best, "1.5x@openvino:threads=1")["number"] == 1 and front.picked(best, "5ms")["number"] == 1
    for wish, said in (("1ms@openvino", "the fastest takes 3.000 ms"), ("5ms@litert", "have openvino:threads=1")):
        with pytest.raises(InputError, match=said):
            front.picked(best, wish)
    with pytest.raises(InputError, match="one runtime alone"):
        front.picked(POINTS, "5ms@openvino")


def test_the_front_s_table_has_a_column_a_runtime_and_the_user_s_prices(tmp_path: Path) -> None:
    about = {"host": "here", "runtime": "onnxruntime", "threads": 1, "metric": "top-1", "unit": "%", "samples": 10}
    points = front.mark([timed(POINTS[1], 6.0), POINTS[0]])
    usual = table.table(front.Front(tmp_path, points, about), points)
    assert usual.columns[-1] == "EUR a month, est." and "on openvino:threads=1, ms" in usual.columns
    cells = [dict(zip(usual.columns, row, strict=True)) for row in usual.rows]
    assert [one["on openvino:threads=1, ms"] for one in cells] == ["6 (5.4 to 6.6)", "can't run"]
    asked = {"prices": {"watts_per_core": 16.0, "currency": "CHF"}}
    dear = table.table(front.Front(tmp_path, points, {**about, **asked}), points)
    assert dear.columns[-1] == "CHF a month, est." and "16 W" in dear.note
    assert (cells[0]["energy, est."], dear.rows[0][-2]) == ("32 mJ", "64 mJ")  # 4 ms at 8 and at 16 W


def test_a_drop_out_of_reach_tells_the_least() -> None:
    with pytest.raises(InputError, match="least drop found is 3.00%"):
        front.picked([POINTS[2]], "drop=1%")


def test_hypervolume_of_known_areas() -> None:
    assert front.hypervolume([], (1, 1)) == 0
    assert front.hypervolume([(0.5, 0.5)], (1, 1)) == pytest.approx(0.25)
    assert front.hypervolume([(0.5, 0.5), (0.25, 0.75), (0.6, 0.6)], (1, 1)) == pytest.approx(0.25 + 0.25 * 0.25)
    assert front.hypervolume([(2.0, 0.1)], (1, 1)) == 0


def test_a_folder_without_a_front_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no front yet"):
        front.read(tmp_path)
