"""The last measurement beside what the gate has seen: once more where they contradict each other, and told then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rarefy.compression import comparison, facts
from rarefy.compression.gates import ORIGINAL
from rarefy.deployment import latency


def ratio(median: float, half: float = 0.05) -> latency.Quartiles:
    return {"low": median - half, "median": median, "high": median + half}


def timed(*medians: float, disturbed: bool = False) -> Any:
    """Stands for ``latency.timed``: one speed-up after the other."""
    left = list(medians)

    def measure(files: Any, example: Any, runtime: Any) -> Any:
        told = {"repeats": 9, "rounds": 60, "disturbed": disturbed}
        return {"result": {"latency_ms": told, "speedup": {ORIGINAL: ratio(left.pop(0))}}}

    measure.left = left  # type: ignore[attr-defined]
    return measure


@pytest.mark.parametrize(
    ("gate", "medians", "disturbed", "words", "unused"),
    [
        (1.5, (1.48, 9.0), False, [], 1),
        (1.5, (1.1, 1.49), False, [], 0),
        (1.5, (1.1, 1.12), False, ["1.50x (1.45 to 1.55) when the step was judged, and 1.12x (1.07 to 1.17)"], 0),
        (1.5, (1.5,), True, ["only 9 of 60 rounds could be trusted"], 0),
        (None, (3.0,), False, [], 0),
    ],
    ids=["agree", "agree the second time", "apart", "disturbed", "the original"],
)
def test_the_last_measurement_is_held_against_the_gates(
    gate: float | None, medians: tuple[float, ...], disturbed: bool, words: list[str], unused: int, monkeypatch: Any
) -> None:
    measure = timed(*medians, disturbed=disturbed)
    monkeypatch.setattr(latency, "timed", measure)
    result: Any = SimpleNamespace(index=0 if gate is None else 2, record={"speedup": {ORIGINAL: ratio(gate or 1.0)}})
    run: Any = SimpleNamespace(runtime=None)
    times, doubts = comparison._timed(run, {"result": Path("x")}, torch.zeros(1), result)
    assert len(measure.left) == unused
    assert len(doubts) == len(words) and all(word in told for word, told in zip(words, doubts, strict=True))
    assert times["result"]["speedup"][ORIGINAL]["median"] == medians[len(medians) - unused - 1]


def test_a_candidates_disturbed_measurement_is_told() -> None:
    told: Any = {"repeats": 9, "rounds": 60, "disturbed": True}
    assert "9 of 60" in facts._doubt(SimpleNamespace(record={"latency_ms": told}))  # type: ignore[arg-type]
    assert facts._doubt(SimpleNamespace(record={"latency_ms": {"repeats": 9}})) == ""  # type: ignore[arg-type]


class Judged(SimpleNamespace):
    """Stands for what ``evaluate`` returns: it says what it was asked."""

    def to_json(self) -> dict[str, Any]:
        limit, corruptions = self.options.get("limit"), self.options["corruptions"]
        told = {"robustness": dict.fromkeys(corruptions, limit or "all"), "samples": limit or "all"}
        return {**told, "side": "result", "reference": {**told, "side": "original"}}


@pytest.mark.parametrize(("length", "limits"), [(1000, [None]), (1001, [None, 1000])])
@pytest.mark.parametrize("corruptions", [(), ("fog",)])
def test_robustness_is_judged_on_a_thousand_images_at_most(
    length: int, limits: list[int | None], corruptions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def evaluate(model: object, task: object, **options: Any) -> Judged:
        assert model == "result" and options["reference"] == "original"
        asked.append(options)
        return Judged(options=options)

    monkeypatch.setattr(comparison, "evaluate", evaluate)
    data = SimpleNamespace(length=lambda split: {"val": length, "train": 9}[split])
    run: Any = SimpleNamespace(task=SimpleNamespace(data=data), seed=5, progress=False, corruptions=corruptions)
    before, after = comparison._evaluations(run, "original", "result")  # type: ignore[arg-type]
    assert [one.get("limit") for one in asked] == (limits if corruptions else [None])
    assert [bool(one["corruptions"]) for one in asked] == [bool(corruptions) and one == limits[-1] for one in limits][
        : len(asked)
    ]
    assert all((one["seed"], one["progress"]) == (5, False) for one in asked)
    told: Any = (before, after)
    assert [one["side"] for one in told] == ["original", "result"] and "reference" not in after
    wanted = dict.fromkeys(corruptions, limits[-1] or "all")
    assert [one["robustness"] for one in told] == [wanted, wanted] and {one["samples"] for one in told} == {"all"}


def test_robustness_of_a_sample_is_each_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"robustness": {"fog": 1}, "reference": {"robustness": {"fog": 2}}}
    monkeypatch.setattr(comparison, "evaluate", lambda *_, **__: SimpleNamespace(to_json=lambda: {**told}))
    data = SimpleNamespace(length=lambda split: 2000)
    run: Any = SimpleNamespace(task=SimpleNamespace(data=data), seed=0, progress=False, corruptions=("fog",))
    before, after = comparison._evaluations(run, None, None)  # type: ignore[arg-type]
    assert (before["robustness"], after["robustness"]) == ({"fog": 2}, {"fog": 1})


def test_parity_is_proven_in_every_runtime_that_reads_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def reader(name: str, suffix: str = ".onnx", runs: bool = True, package: str = "json") -> Any:
        capabilities = SimpleNamespace(runs=runs)
        return SimpleNamespace(name=name, suffix=suffix, capabilities=capabilities, package=package)

    runtimes = {
        "mine": reader("mine"), "other": reader("other"), "xml": reader("xml", suffix=".xml"),
        "written": reader("written", runs=False), "absent": reader("absent", package="no_such_package_here"),
    }  # fmt: skip
    asked: list[Any] = []

    def certify(graph: object, file: Path, **options: Any) -> dict[str, Any]:
        asked.append((graph, file, options))
        answers = {"mine:threads=2": {"passed": True}, "other": {"passed": False}}
        return {"sha256": "5a", "runtimes": answers}

    monkeypatch.setattr(comparison, "certify", certify)
    monkeypatch.setattr(comparison.plugins, "describe", lambda runtime: "mine:threads=2")
    monkeypatch.setattr(comparison.plugins, "available", lambda kind: list(runtimes) if kind == "runtimes" else [])
    monkeypatch.setattr(latency, "with_threads", runtimes.__getitem__)
    run: Any = SimpleNamespace(runtime=runtimes["mine"], images=lambda count: f"{count} images", progress=False)
    result: Any = SimpleNamespace(graph="graph")
    parity = comparison._certified(run, result, Path("x.onnx"))
    assert parity == {"passed": True, "sha256": "5a", "also": {"other": {"passed": False}}}
    ((graph, file, options),) = asked
    assert (graph, file, options["inputs"]) == ("graph", Path("x.onnx"), "256 images")
    assert options["runtime"] is runtimes["mine"] and options["also"] == [runtimes["other"]]


@pytest.mark.parametrize("index", [0, 3])
def test_both_files_are_opened_and_pictures_shown_where_there_is_a_result(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = SimpleNamespace(name="first", folder=Path("a"), index=0, graph="g")
    result: Any = SimpleNamespace(name="last", folder=Path("b"), index=index, graph="h")
    opened: list[Path] = []
    runtime = SimpleNamespace(open=lambda file: opened.append(file) or file)
    run: Any = SimpleNamespace(model_file="m.onnx", runtime=runtime, images=lambda count: f"{count} image", task="task")
    monkeypatch.setattr(comparison, "_evaluations", lambda run, one, other: (f"of {one}", f"of {other}"))
    monkeypatch.setattr(comparison, "_timed", lambda *_: ({"original": "slow", "result": "fast"}, ["a doubt"]))
    monkeypatch.setattr(comparison, "_certified", lambda run, candidate, file: f"parity of {candidate.name} {file}")
    monkeypatch.setattr(comparison, "_side", lambda run, candidate, *told: (candidate.name, *told))
    monkeypatch.setattr(comparison, "fitted", lambda task, graph: f"{task} for {graph}")
    monkeypatch.setattr(comparison, "changed", lambda sessions, task: [(sorted(sessions), task)])
    found: Any = comparison.compare(run, original, result)
    assert opened == [Path("a/m.onnx"), Path("b/m.onnx")]
    assert found.before == ("first", Path("a/m.onnx"), "1 image", "slow", "of a/m.onnx")
    assert found.after == ("last", Path("b/m.onnx"), "1 image", "fast", "of b/m.onnx")
    assert found.parity == "parity of last b/m.onnx" and found.doubts == ["a doubt"]
    assert found.pictures == ([(["original", "result"], "task for g")] if index else [])
