"""compress(): the budget, the gates, the choice, what is saved and what is refused. Digits, a tiny net, the real runtime."""

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
from rarefy.compression import run as run_
from rarefy.compression.budget import Budget
from rarefy.compression.candidate import Candidate, Outcome
from rarefy.compression.compress import compress
from rarefy.distillation import distill
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize
from rarefy.tasks.classification import Classification
from rarefy.tasks.intervals import wilson
from rarefy.tasks.metrics.accuracy import doubts

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


def candidate(
    tmp_path: Path, index: int, name: str, *, drop: float = 0.0, speed: float = 1.0, size: int = 1000
) -> Candidate:
    folder = tmp_path / str(index)
    folder.mkdir()
    (folder / folder_.WEIGHTS).write_bytes(bytes(size))
    ratio = {"median": speed, "low": 0.98 * speed, "high": 1.02 * speed}
    found = {
        "name": name,
        "evaluation": {"value": 0.9 - drop, "drop": {"value": drop}},
        "speedup": {"original": ratio, "parent": ratio},
    }
    return Candidate(index, folder, found)


class Scripted(run_._Run):
    """A run whose steps make what the test says."""

    def _attempted(self, index: int, parent: Candidate) -> Candidate | str:
        made = self.made[index - 1]  # type: ignore[attr-defined]
        if isinstance(made, Candidate):
            made.found["speedup"][parent.name] = made.found["speedup"]["parent"]
        return made


def walked(
    tmp_path: Path, budget: Budget, verbs: list[str], *made: Candidate | str
) -> tuple[list[Outcome], Candidate, Candidate]:
    steps = [{"do": verb} for verb in verbs]
    run = Scripted(tmp_path, None, budget, steps, None, 0, None, (), True, False)
    run.original = candidate(tmp_path, 0, "original")
    run.made = made  # type: ignore[attr-defined]
    outcomes, last = run.walked()
    return outcomes, last, run.chosen(outcomes, last)


def test_pruning_is_judged_with_its_distillation(tmp_path: Path) -> None:
    pruned = candidate(tmp_path, 1, "p", drop=0.6, speed=1.5, size=500)
    taught = candidate(tmp_path, 2, "p + d", drop=0.004, speed=1.5, size=500)
    outcomes, last, chosen = walked(tmp_path, Budget(max_drop=0.005), ["prune", "distill"], pruned, taught)
    assert [one.kept for one in outcomes] == [True, True] and last is chosen is taught


def test_both_are_undone_if_the_drop_remains(tmp_path: Path) -> None:
    pruned = candidate(tmp_path, 1, "p", drop=0.6, speed=1.5, size=500)
    taught = candidate(tmp_path, 2, "p + d", drop=0.02, speed=1.5, size=500)
    integer = candidate(tmp_path, 3, "q", drop=0.001, speed=2.0, size=250)
    outcomes, last, chosen = walked(
        tmp_path, Budget(max_drop=0.005), ["prune", "distill", "quantize"], pruned, taught, integer
    )
    assert [one.kept for one in outcomes] == [False, False, True] and last is chosen is integer
    assert "2.00 points" in outcomes[0].why and "0.50 points" in outcomes[1].why


def test_a_slower_step_is_undone_and_noise_is_not_slower(tmp_path: Path) -> None:
    slow = candidate(tmp_path, 1, "q", speed=0.8, size=250)
    outcomes, last, _ = walked(tmp_path, Budget(), ["quantize"], slow)
    assert not outcomes[0].kept and "slower" in outcomes[0].why and last.index == 0
    noisy = dataclasses.replace(
        slow, found={**slow.found, "speedup": {"parent": {"median": 0.8, "low": 0.3, "high": 1.3}}}
    )
    (tmp_path / "more").mkdir()
    outcomes, _, _ = walked(tmp_path / "more", Budget(), ["quantize"], noisy)
    assert outcomes[0].kept


def test_neither_smaller_nor_faster_is_undone(tmp_path: Path) -> None:
    outcomes, _, _ = walked(tmp_path, Budget(), ["prune"], candidate(tmp_path, 1, "p", speed=1.05, size=999))
    assert not outcomes[0].kept and "neither" in outcomes[0].why


def test_a_distillation_that_teaches_nothing_is_undone(tmp_path: Path) -> None:
    outcomes, last, _ = walked(tmp_path, Budget(), ["distill"], candidate(tmp_path, 1, "d", drop=0.01))
    assert not outcomes[0].kept and last.index == 0


def test_a_step_that_fails_is_said_and_left_out(tmp_path: Path) -> None:
    outcomes, last, _ = walked(
        tmp_path, Budget(), ["prune", "quantize"], "nothing can be pruned", candidate(tmp_path, 2, "q", size=250)
    )
    assert outcomes[0].why == "nothing can be pruned" and not outcomes[0].kept and last.index == 2


def test_an_undone_model_that_meets_the_goals_is_the_result(tmp_path: Path) -> None:
    """Only size is asked for: the slower int8 model has it."""
    slow = candidate(tmp_path, 1, "q", speed=0.8, size=250)
    outcomes, last, chosen = walked(tmp_path, Budget(size=300), ["quantize"], slow)
    assert not outcomes[0].kept and last.index == 0 and chosen is slow


def test_accuracy_is_not_traded_for_speed_asked_in_vain(tmp_path: Path) -> None:
    wild = candidate(tmp_path, 1, "p", drop=0.3, speed=9.0, size=100)
    _, _, chosen = walked(tmp_path, Budget(max_drop=0.01, speedup=5.0), ["prune"], wild)
    assert chosen.index == 0


# ------------------------------------------------------------------ the whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, compress_.Result]:
    work = tmp_path_factory.mktemp("compress") / "work"
    return work, compress(
        trained(), digits(), budget=BUDGET, steps=QUICK, workdir=work, corruptions=["fog"], progress=False
    )


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
        "budget": Budget(), "steps": [{"do": "distill", "epochs": 2}], "workdir": tmp_path / "work", "corruptions": (), "progress": False
    }  # fmt: skip
    stored = run_._Run._stored

    def killed(run: Any, index: int, *given: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return stored(run, index, *given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run_._Run, "_stored", killed)
        compress(untrained(), digits(), **options)
    (step,) = compress(untrained(), digits(), **options).report["steps"]
    assert step["seconds"] >= step["facts"]["seconds"] > 0.1


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


@pytest.mark.parametrize(("budget", "kept", "said"), [
    (Budget(size=10), 0.6, "ask for a larger size"), (Budget(size=500), 0.6, "params=0.27"), (Budget(speedup=900), 0.6, "ask for less"), (Budget(speedup=4), 0.6, "macs=0.27")
])  # fmt: skip
def test_advice_can_be_followed(budget: Budget, kept: float, said: str) -> None:
    run = run_._Run(Path(), None, budget, [], None, 0, None, (), True, False)
    after = {
        "evaluation": {"drop": {"value": 0.0}},
        "speedup": {"original": {"median": 2.0}},
        "size_bytes": 1000,
        "macs": kept,
        "parameters": kept,
    }
    (goal,) = run._goals({"macs": 1, "parameters": 1}, after)
    assert not goal["met"] and said in goal["advice"]


def test_a_budget_that_is_none() -> None:
    with pytest.raises(InputError, match="is no Budget; pass rarefy.Budget"):
        compress(untrained(), digits(), budget={"speedup": 2})  # type: ignore[arg-type]


def test_no_validation_data() -> None:
    with pytest.raises(InputError, match="validation"):
        compress(untrained(), Classification(train="sklearn:digits", augment="none"), budget=Budget(), progress=False)
