"""compress(): what is done, saved, read again and refused. Digits, a tiny net, the real runtime."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits
from torch import fx

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.compression import compress as compress_
from rarefy.compression import steps
from rarefy.compression.budget import Budget
from rarefy.compression.compress import compress
from rarefy.compression.run import Folder
from rarefy.distillation import distill
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize
from rarefy.reports import report
from rarefy.tasks.classification import Classification
from rarefy.tasks.intervals import wilson
from rarefy.tasks.metrics.accuracy import doubts

QUICK = [{"do": "prune", "macs": 0.6, "round_to": 8}, {"do": "distill", "epochs": 2, "batch_size": 64}]
BUDGET = Budget(max_drop=0.2, size=10**6)


def untrained(width: int = 16) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(demo.model(width=width), torch.zeros(2, 1, 8, 8))


@functools.cache
def trained() -> fx.GraphModule:
    return distill.train(untrained(), digits(), epochs=2, batch_size=64, lr=0.1, progress=False)


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
    assert [one for one in facts["warnings"] if "other processes" not in one] == []
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
    (work.parent / "prices.toml").write_text('[prices]\nwatts_per_core = 20\n[about]\nauthor = "A team"\n')
    asked = {"prices": work.parent / "prices.toml", "workdir": work, "corruptions": ["fog"], "progress": False}
    priced = compress(trained(), digits(), budget=BUDGET, steps=QUICK, **asked)
    assert {**priced.report, "prices": {}, "about": {}} == {**result.report, "prices": {}, "about": {}}
    assert "20 W a busy core" in report.html(priced.report) and "by A team" in report.html(priced.report)
    with pytest.raises(InputError, match="no such file"):
        compress(trained(), digits(), budget=BUDGET, steps=QUICK, **{**asked, "prices": work.parent / "none.toml"})


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


def test_a_budget_that_is_none() -> None:
    with pytest.raises(InputError, match="is no Budget; pass rarefy.Budget"):
        compress(untrained(), digits(), budget={"speedup": 2})  # type: ignore[arg-type]


def test_no_validation_data() -> None:
    with pytest.raises(InputError, match="validation"):
        compress(untrained(), Classification(train="sklearn:digits", augment="none"), budget=Budget(), progress=False)


def test_loggers_are_told_each_step_s_model_and_each_training(tmp_path: Path) -> None:
    told: list[tuple[int, set[str]]] = []
    opened: list[str] = []

    class Mine:
        def open(self, run: str, first: int, about: object) -> Mine:
            opened.append(run)
            return self

        def add(self, step: int, values: dict[str, float]) -> None: ...

        def close(self) -> None: ...

    given = {"steps": [{"do": "distill", "epochs": 1, "batch_size": 256}], "corruptions": [], "progress": False}
    torch.manual_seed(0)
    compress(
        demo.model(width=4), digits(), budget=Budget(max_drop=0.9), workdir=tmp_path / "w", **given,
        logs=[lambda step, values: told.append((step, set(values))), Mine()],
    )  # fmt: skip
    kinds = [(step, "drop" in values) for step, values in told]
    assert kinds == [(0, True), (5, False), (1, True)]  # the original, the training's end, the step's model
    assert told[2][1] == {"value", "drop", "size_bytes", "latency_ms", "speedup"}
    assert opened == ["compress", "compress/1-distill"]
    with pytest.raises(InputError, match="unknown option 'logs'"):  # a recipe sends nothing anywhere
        compress(demo.model(width=4), digits(), budget=Budget(), steps=[{"do": "distill", "logs": "mlflow"}])
