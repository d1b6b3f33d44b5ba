"""compress(): the budget, the gates, the choice, what is saved and what is refused. Digits, a tiny net, the real
runtime."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.compression import budget as budget_
from rarefy.compression import compress as compress_
from rarefy.compression import gates, steps
from rarefy.compression.budget import Budget, goals
from rarefy.compression.compress import compress
from rarefy.compression.gates import Measurement, Outcome, Ratio
from rarefy.compression.run import Folder
from rarefy.distillation import distill
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize
from rarefy.tasks.classification import Classification
from rarefy.tasks.intervals import wilson
from rarefy.tasks.metric import Metric
from rarefy.tasks.metrics.accuracy import Accuracy, doubts

QUICK = [{"do": "prune", "macs": 0.6, "round_to": 8}, {"do": "distill", "epochs": 2, "batch_size": 64}]
BUDGET = Budget(max_drop=0.2, size=10**6)


def digits() -> Classification:
    return Classification(train="sklearn:digits", val="sklearn:digits", augment="none")


def untrained(width: int = 16) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(demo.model(width=width), torch.zeros(2, 1, 8, 8))


@functools.cache
def trained() -> fx.GraphModule:
    return distill.train(untrained(), digits(), epochs=2, batch_size=64, lr=0.1, progress=False)


# ------------------------------------------------------------------ budget and recipe


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_drop": -0.1},
        {"max_drop": 1.0},
        {"speedup": 0.5},
        {"speedup": float("nan")},
        {"size": 0},
        {"max_drop": float("nan")},
    ],
)
def test_a_budget_that_contradicts_itself(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Budget(**wrong)


def test_the_usual_recipe_follows_the_budget() -> None:
    task = digits()
    plain = budget_.usual_steps(Budget(), 10**6, task)
    assert [step["do"] for step in plain] == ["prune", "distill", "quantize"] and plain[0]["macs"] == 0.5
    fast, faster = (budget_.usual_steps(Budget(speedup=ratio), 10**6, task)[0]["macs"] for ratio in (2.0, 4.0))
    assert fast == pytest.approx(2 * faster, abs=0.002)
    assert [step["do"] for step in budget_.usual_steps(Budget(speedup=1.1), 10**6, task)] == ["quantize"]
    assert budget_.usual_steps(Budget(size=10**5), 10**6, task)[0]["params"] == pytest.approx(
        0.36
    )  # int8 alone is a quarter


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "no step"),
        ([{"do": "shrink"}], "shrink"),
        ([{"do": "prune", "mac": 0.5}], "'mac'"),
        ([{"do": "distill", "teacher": 1}], "'teacher'"),
        ([{"do": "quantize", "bits": 4}], "'bits'"),
    ],
)
def test_wrong_steps_are_told_before_anything_is_done(steps: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        compress(untrained(), digits(), budget=Budget(), steps=steps, workdir=tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()


# ------------------------------------------------------------------ gates and choice, on measurements made up


def measured(
    index: int, name: str, *, drop: float = 0.0, speed: float = 1.0, size: int = 1000, spread: float = 0.02
) -> Measurement:
    """As fast against the original as against what it was made of."""
    ratio = Ratio(speed, (1 - spread) * speed, (1 + spread) * speed)
    return Measurement(index, name, 0.9 - drop, drop, size, dict.fromkeys(("original", "p", "p + d", "q"), ratio))


def walked(
    budget: Budget, verbs: list[str], *results: Measurement | str, metric: Metric | None = None
) -> tuple[tuple[Outcome, ...], Measurement, Measurement]:
    """What the gates say of each step, the last model kept, and the result."""
    steps = [{"do": verb} for verb in verbs]
    original = measured(0, "original")
    walk = gates.walk(original, steps, results, budget, metric or Accuracy())
    candidates = [original, *(one for one in results if isinstance(one, Measurement))]
    return walk.outcomes, walk.accepted, gates.chosen(candidates, walk.accepted, budget)


def test_pruning_is_judged_with_its_distillation() -> None:
    pruned = measured(1, "p", drop=0.6, speed=1.5, size=500)
    taught = measured(2, "p + d", drop=0.004, speed=1.5, size=500)
    outcomes, last, chosen = walked(Budget(max_drop=0.005), ["prune", "distill"], pruned, taught)
    assert [one.kept for one in outcomes] == [True, True] and last is chosen is taught


def test_until_its_distillation_is_done_a_pruning_waits_for_the_verdict_on_the_drop() -> None:
    pruned, original = measured(1, "p", drop=0.6, speed=1.5, size=500), measured(0, "original")
    steps = [{"do": "prune"}, {"do": "distill"}]
    walk = gates.walk(original, steps, [pruned], Budget(max_drop=0.005), Accuracy())
    assert walk.current is pruned and walk.accepted is original and walk.outcomes[0].kept


def test_both_are_undone_if_the_drop_remains() -> None:
    pruned = measured(1, "p", drop=0.6, speed=1.5, size=500)
    taught = measured(2, "p + d", drop=0.02, speed=1.5, size=500)
    integer = measured(3, "q", drop=0.001, speed=2.0, size=250)
    outcomes, last, chosen = walked(Budget(max_drop=0.005), ["prune", "distill", "quantize"], pruned, taught, integer)
    assert [one.kept for one in outcomes] == [False, False, True] and last is chosen is integer
    assert "2.00 points" in outcomes[0].why and "0.50 points" in outcomes[1].why


def test_a_slower_step_is_undone_and_noise_is_not_slower() -> None:
    outcomes, last, _ = walked(Budget(), ["quantize"], measured(1, "q", speed=0.8, size=250))
    assert not outcomes[0].kept and "slower" in outcomes[0].why and last.index == 0
    outcomes, _, _ = walked(Budget(), ["quantize"], measured(1, "q", speed=0.8, size=250, spread=0.6))
    assert outcomes[0].kept


def test_neither_smaller_nor_faster_is_undone() -> None:
    outcomes, _, _ = walked(Budget(), ["prune"], measured(1, "p", speed=1.05, size=999))
    assert not outcomes[0].kept and "neither" in outcomes[0].why


def test_a_distillation_that_teaches_nothing_is_undone() -> None:
    outcomes, last, _ = walked(Budget(), ["distill"], measured(1, "d", drop=0.01))
    assert not outcomes[0].kept and last.index == 0
    assert outcomes[0].why == "top-1 90.00% before, 89.00% after"
    outcomes, _, _ = walked(Budget(), ["distill"], measured(1, "d"))
    assert not outcomes[0].kept, "the same is not better"


class Error(Accuracy):
    """Of two the lower is better."""

    label, unit, better = "error", "years", "lower"


def test_what_is_better_is_for_the_metric_to_say() -> None:
    lower, higher = measured(1, "d", drop=-0.25), measured(1, "d", drop=0.25)
    for metric, kept, undone in ((Accuracy(), lower, higher), (Error(), higher, lower)):
        assert walked(Budget(), ["distill"], kept, metric=metric)[0][0].kept
        assert not walked(Budget(), ["distill"], undone, metric=metric)[0][0].kept
    outcomes, _, _ = walked(Budget(max_drop=0.125), ["prune"], measured(1, "p", drop=0.25, size=9), metric=Error())
    assert outcomes[0].why == "p loses 0.25 years, more than 0.125 years"
    outcomes, _, _ = walked(Budget(), ["distill"], measured(1, "d", drop=0.25), metric=Error())
    assert outcomes[0].why == "error 0.9 years before, 0.65 years after"


def test_a_step_that_fails_is_said_and_left_out() -> None:
    outcomes, last, _ = walked(Budget(), ["prune", "quantize"], "nothing can be pruned", measured(2, "q", size=250))
    assert outcomes[0].why == "nothing can be pruned" and not outcomes[0].kept and last.index == 2


def test_an_undone_model_that_meets_the_goals_is_the_result() -> None:
    """Only size is asked for: the slower int8 model has it."""
    slow = measured(1, "q", speed=0.8, size=250)
    outcomes, last, chosen = walked(Budget(size=300), ["quantize"], slow)
    assert not outcomes[0].kept and last.index == 0 and chosen is slow


def test_accuracy_is_not_traded_for_speed_asked_in_vain() -> None:
    wild = measured(1, "p", drop=0.3, speed=9.0, size=100)
    _, _, chosen = walked(Budget(max_drop=0.01, speedup=5.0), ["prune"], wild)
    assert chosen.index == 0


def test_goals_that_are_met_exactly_are_met() -> None:
    exact = measured(1, "p", drop=0.0, speed=2.0, size=500)
    budget = Budget(max_drop=0.0, speedup=2.0, size=500)
    outcomes, last, chosen = walked(budget, ["prune"], exact)
    assert outcomes[0].kept and last is chosen is exact and gates.shortfall(exact, budget) == 0
    told = goals(budget, drop=0.0, speedup=2.0, size=500, macs=0.5, parameters=0.5)
    assert [goal["name"] for goal in told if goal["met"]] == ["max_drop", "speedup", "size"]
    told = goals(budget, drop=1e-9, speedup=2 - 1e-9, size=501, macs=0.5, parameters=0.5)
    assert not any(goal["met"] for goal in told)
    slow = dataclasses.replace(exact, index=2, speedup={"original": Ratio(0.8, 0.78, 0.82)})
    assert gates.chosen([slow, exact], slow, budget) is exact, "a goal met exactly counts as met"


def test_of_those_that_meet_the_goals_the_smallest_is_chosen_and_of_equals_the_last() -> None:
    budget, last = Budget(size=300), measured(0, "original")
    made = [measured(1, "p", size=300), measured(2, "q", size=200), measured(3, "r", size=200)]
    assert gates.chosen([last, *made], last, budget) is made[2]
    nearly = measured(0, "original", size=329)
    assert gates.chosen([nearly, *made], nearly, budget) is nearly, "a goal missed by less than 10 % is no reason"


def test_a_goal_in_another_unit_says_it() -> None:
    reached = {"drop": 0.3, "speedup": 1.0, "size": 1, "macs": 1.0, "parameters": 1.0}
    (goal,) = goals(Budget(max_drop=0.5), **reached, unit="years")
    assert goal["unit"] == "years" and goal["met"]
    assert "unit" not in goals(Budget(max_drop=0.5), **reached)[0]


# ------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, compress_.Result]:
    """Its candidates are loaded once each, and the steps leave them as they are."""
    work = tmp_path_factory.mktemp("compress") / "work"
    loaded: dict[Path, fx.GraphModule] = {}
    load = folder_.load

    def loaded_once(folder: Path) -> fx.GraphModule:
        assert folder not in loaded
        loaded[folder] = load(folder)
        return loaded[folder]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folder_, "load", loaded_once)
        result = compress(
            trained(), digits(), budget=BUDGET, steps=QUICK, workdir=work, corruptions=["fog"], progress=False
        )
    assert {folder.name for folder in loaded} == {"0-original", "1-prune", "2-distill"}
    for folder, graph in loaded.items():
        assert folder_.content_of(graph).hash == folder_.content_hash(folder), folder
    return work, result


def test_the_report_tells_what_was_done(whole: tuple[Path, compress_.Result]) -> None:
    _, result = whole
    facts = result.report
    assert facts["warnings"] == []
    assert result.met and [goal["name"] for goal in facts["goals"]] == ["max_drop", "size"]
    assert [step["step"] for step in facts["steps"]] == ["prune", "distill"] and all(
        step["kept"] for step in facts["steps"]
    )
    assert facts["after"]["macs"] < 0.61 * facts["before"]["macs"]
    assert facts["after"]["evaluation"]["samples"] == facts["before"]["evaluation"]["samples"] == digits().length("val")
    assert facts["after"]["evaluation"]["robustness"]["fog"].keys() == {"1", "3", "5"}
    assert [point["name"] for point in facts["frontier"] if point["chosen"]] == ["prune + distill"]
    assert facts["parity"]["samples"] >= 256 and facts["parity"]["agreement"] > 0.99
    widths = {layer["name"]: (layer["channels_before"], layer["channels_after"]) for layer in facts["layers"]}
    assert widths["first.0"][0] == 16 and any(after < before for before, after in widths.values())
    assert len(facts["curves"][0]["series"][0]["x"]) == 2


def test_what_is_saved_loads_and_tells_no_time(whole: tuple[Path, compress_.Result], tmp_path: Path) -> None:
    _, result = whole
    folder = result.save(tmp_path / "small")
    assert {"model.onnx", "report.html", "report.json"} <= {path.name for path in folder.iterdir()}
    graph, inputs = folder_.load(folder), torch.rand(3, 1, 8, 8)
    assert torch.equal(graph(inputs), result.graph(inputs))
    assert not {"timing", "seconds"} & set(json.dumps(graph.meta["history"]).replace('"', " ").split())
    manifest = folder_.read_manifest(folder)
    assert manifest["hashes"]["data.val"] == digits().fingerprint("val")


def test_a_finished_run_is_returned_at_once(whole: tuple[Path, compress_.Result]) -> None:
    work, result = whole
    again = compress(trained(), digits(), budget=BUDGET, steps=QUICK, workdir=work, corruptions=["fog"], progress=False)
    assert again.report == result.report


@pytest.mark.parametrize("change", ["budget", "recipe", "seed", "model"])
def test_another_run_is_refused(whole: tuple[Path, compress_.Result], change: str) -> None:
    work, _ = whole
    options: dict[str, Any] = {"budget": BUDGET, "steps": QUICK, "seed": 0, "corruptions": ["fog"]}
    options |= {"budget": {"budget": Budget()}, "recipe": {"steps": QUICK[:1]}, "seed": {"seed": 1}}.get(change, {})
    model = untrained() if change == "model" else trained()
    with pytest.raises(InputError, match=rf"another {change}.*delete it"):
        compress(model, digits(), workdir=work, progress=False, **options)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        compress(untrained(), digits(), budget=Budget(), steps=QUICK, workdir=tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_second_quantization_is_for_where_the_first_is_undone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"corruptions": (), "progress": False}
    steps = [{"do": "quantize", "weights": "int4"}, {"do": "quantize"}]
    kept = compress(trained(), digits(), budget=Budget(), steps=steps, **options)
    first, second = kept.report["steps"]  # whether 4 bits are kept is for the machine's timing to say
    assert ((second["kept"], second["why"]) == (False, "the model is quantised already")) == first["kept"]
    small = quantize(trained(), digits(), images=16, progress=False)
    with pytest.raises(InputError, match="is quantised already; give its float original, or steps that only distil"):
        compress(small, digits(), budget=Budget(), **options)


def test_a_resumed_training_takes_the_time_of_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "budget": Budget(),
        "steps": [{"do": "distill", "epochs": 2}],
        "workdir": tmp_path / "work",
        "corruptions": (),
        "progress": False,
    }
    put = Folder._put

    def killed(folder: Folder, index: int, *given: Any) -> None:
        if index:
            raise KeyboardInterrupt
        put(folder, index, *given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Folder, "_put", killed)
        compress(untrained(), digits(), **options)
    (step,) = compress(untrained(), digits(), **options).report["steps"]
    assert step["seconds"] >= step["facts"]["seconds"] > 0.1


def test_a_step_that_failed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run reads why, and goes on; only the usual steps may fail."""
    calls = []

    def fails(graph: fx.GraphModule, context: steps.Context, options: steps.Options) -> fx.GraphModule:
        calls.append(options)
        raise InputError("nothing can be pruned (by this test)")

    for verb in steps.VERBS:
        monkeypatch.setitem(steps.VERBS, verb, steps.VERBS[verb]._replace(run=fails))
    options: dict[str, Any] = {
        "budget": Budget(speedup=1.1), "workdir": tmp_path / "work", "corruptions": (), "progress": False
    }  # fmt: skip
    first = compress(untrained(8), digits(), **options)
    assert [(step["kept"], step["why"]) for step in first.report["steps"]] == [
        (False, "nothing can be pruned (by this test)")
    ]
    assert len(calls) == 1 and (tmp_path / "work" / "1-quantize.failed.json").exists()
    (tmp_path / "work" / "final.json").unlink()
    again = compress(untrained(8), digits(), **options)
    assert len(calls) == 1 and again.report["steps"] == first.report["steps"]
    with pytest.raises(InputError, match="by this test"):
        compress(untrained(8), digits(), steps=[{"do": "quantize"}], **{**options, "workdir": None})


def test_a_run_that_did_no_step_yet_makes_way(tmp_path: Path) -> None:
    """A step of a wrong value is refused when its turn comes; mended, it runs in the same folder."""
    options: dict[str, Any] = {"budget": Budget(), "workdir": tmp_path / "work", "corruptions": (), "progress": False}
    with pytest.raises(InputError, match="macs=2.5"):
        compress(untrained(), digits(), steps=[{"do": "prune", "macs": 2.5}], **options)
    assert (tmp_path / "work" / "0-original").is_dir()
    other = compress(untrained(8), digits(), steps=[{"do": "prune", "macs": 0.5}], **options)
    assert other.report["before"]["parameters"] == sum(parameter.numel() for parameter in untrained(8).parameters())
    assert [step["step"] for step in other.report["steps"]] == ["prune"] and (tmp_path / "work" / "1-prune").is_dir()


def test_an_original_that_knows_nothing_is_told() -> None:
    interval = wilson(12, 100)
    assert doubts(0.9, wilson(90, 100), 100, 10, 10) == ()
    assert (
        len(found := doubts(0.12, interval, 100, 10, 10)) == 1
        and "no better than chance" in found[0]
        and "weights" in found[0]
    )
    assert (
        len(found := doubts(0.9, wilson(90, 100), 100, 10, 12)) == 1
        and "10 outputs, the data has 12 classes" in found[0]
    )
    options: dict[str, Any] = {
        "steps": [{"do": "prune", "macs": 0.5}],
        "budget": Budget(),
        "corruptions": (),
        "progress": False,
    }
    assert any(
        warning.startswith("the original: no better than chance")
        for warning in compress(untrained(), digits(), **options).report["warnings"]
    )


@pytest.mark.parametrize(
    ("budget", "kept", "said"),
    [
        (Budget(size=10), 0.6, "ask for a larger size"),
        (Budget(size=500), 0.6, "params=0.27"),
        (Budget(speedup=900), 0.6, "ask for less"),
        (Budget(speedup=4), 0.6, "macs=0.27"),
    ],
)
def test_advice_can_be_followed(budget: Budget, kept: float, said: str) -> None:
    (goal,) = goals(budget, drop=0.0, speedup=2.0, size=1000, macs=kept, parameters=kept)
    assert not goal["met"] and said in goal["advice"]


def test_a_budget_that_is_none() -> None:
    with pytest.raises(InputError, match="is no Budget; pass rarefy.Budget"):
        compress(untrained(), digits(), budget={"speedup": 2})  # type: ignore[arg-type]


def test_no_validation_data() -> None:
    with pytest.raises(InputError, match="validation"):
        compress(untrained(), Classification(train="sklearn:digits", augment="none"), budget=Budget(), progress=False)
