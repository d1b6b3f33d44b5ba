"""The report: self-contained, escaped, complete where it is told, silent where it is not."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import FormatError, InputError
from rarefy.reports import charts, report, units, view
from rarefy.reports import facts as facts_

VOID = {"meta", "br", "line", "circle", "polyline"}
HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&{{7*7}}"


class Page(HTMLParser):
    """Tags in order, checked to be closed as they were opened; text by section."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def evaluation(value: float, **more: Any) -> dict[str, Any]:
    return {
        "metric": "top1",
        "value": value,
        "interval": [value - 0.01, value + 0.01],
        "samples": 1234,
        "top5": 0.99,
        "worst_class": {"index": 3, "name": "cat", "value": value - 0.1, "samples": 100},
        "calibration_error": 0.021,
        "robustness": {
            "fog": {"1": value - 0.05, "3": value - 0.1},
            "jpeg_compression": {"1": value - 0.02, "3": value - 0.04},
        },
        **more,
    }


def facts() -> dict[str, Any]:
    latency = {"median": 4.2, "low": 4.0, "high": 4.4, "batch": 1, "threads": 2, "runtime": "onnxruntime"}
    return {
        "title": "net on pictures",
        "goals": [
            {"name": "max_drop", "asked": 0.005, "reached": 0.0061, "met": False, "advice": "train for longer"},
            {"name": "speedup", "asked": 3, "reached": 3.5, "met": True},
        ],
        "before": {
            "name": "net",
            "evaluation": evaluation(0.93),
            "parameters": 1000,
            "macs": 50000,
            "size_bytes": 4000,
            "latency_ms": latency,
            "peak_memory_bytes": 8000000,
        },
        "after": {
            "name": "small net",
            "evaluation": evaluation(0.9239, agreement=0.97, drop={"value": 0.0061, "interval": [0.002, 0.0102]}),
            "parameters": 400,
            "macs": 25000,
            "size_bytes": 500,
            "latency_ms": {**latency, "median": 1.2},
            "peak_memory_bytes": 4000000,
        },
        "frontier": [
            {"name": "original", "value": 0.93, "interval": [0.92, 0.94], "latency_ms": 4.2},
            {"name": "pruned", "value": 0.9, "interval": [0.89, 0.91], "latency_ms": 4.5},
            {"name": "quantized", "value": 0.9239, "interval": [0.91, 0.93], "latency_ms": 1.2, "chosen": True},
        ],
        "layers": [
            {
                "name": "conv1",
                "channels_before": 16,
                "channels_after": 9,
                "bits": 8,
                "activation_bits": 8,
                "error": 1e-3,
                "macs_before": 9,
                "macs_after": 5,
                "bytes": 40,
            },
            {"name": "fc", "channels_before": 10, "channels_after": 10, "bits": 32},
        ],
        "steps": [
            {
                "step": "prune",
                "options": {"macs": 0.5},
                "facts": {"groups": 7},
                "seconds": 3.2,
                "kept": True,
                "value": 0.9,
                "latency_ms": 4.5,
                "size_bytes": 900,
            },
            {
                "step": "quantize",
                "options": {},
                "facts": {},
                "seconds": 80,
                "kept": False,
                "why": "it was slower than float",
            },
        ],
        "curves": [
            {
                "title": "loss of training",
                "x": "epoch",
                "y": "loss",
                "series": [{"name": "loss", "x": [1, 2, 3], "y": [3.0, 2.0, 1.5]}],
            }
        ],
        "parity": {
            "agreement": 0.999,
            "samples": 500,
            "largest_difference": 0.01,
            "ulp": 2,
            "first_diverging_layer": None,
            "passed": True,
            "layers": [{"name": "conv1", "difference": 0.0}],
        },
        "provenance": {
            "seed": 7,
            "commands": ["rarefy compress x"],
            "recipe": 'model = "x"',
            "hashes": {"teacher": "abc"},
            "environment": {"torch": "2.14", "cpu": {"name": "fast"}},
        },
    }


def hostile(value: Any, key: str = "") -> Any:
    """Each text of the facts, and each key that is a name, made hostile."""
    if isinstance(value, dict):
        free = key in ("options", "facts", "hashes", "environment", "robustness", "provenance")
        return {
            (f"{name}{HOSTILE}" if free and name not in ("commands", "recipe") else name): hostile(item, name)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_page_is_self_contained_and_well_formed() -> None:
    page = Page(report.html(facts()))
    assert not {"script", "link", "iframe", "img", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert not [
        name
        for _, attributes in page.tags
        for name in attributes
        if name.startswith("on") or name in ("src", "href", "action")
    ]
    assert (
        "http://" not in report.html(facts())
        and "https://" not in report.html(facts())
        and "url(" not in report.html(facts())
    )
    policies = [
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_page_says_all_it_was_told() -> None:
    text = Page(report.html(facts())).text
    for said in (
        "1 of 2 goals missed",
        "train for longer",
        "93.00 % (92.00 to 94.00, 1,234 images)",
        "−0.61 points",
        "−1.02 to −0.20",
        "3.5× faster",
        "8× smaller",
        "2× fewer",
        "2.5× fewer",
        "4.2 ms (4 to 4.4, batch 1, 2 threads, onnxruntime)",
        "97.00 %",
        "(cat, 100 images)",
        "2.10 %",
        "it was slower than float",
        "1 min 20 s",
        "9 of 16",
        "30.0 dB",
        "loss of training",
        "last 1.5",
        "99.90 % of 500 inputs",
        "first layer that differs none",
        "rarefy compress x",
        "cpu.name fast",
        "abc",
        "jpeg compression",
        "Words used here",
    ):
        assert said in text, said


def test_everything_is_escaped() -> None:
    clean, bad = Page(report.html(facts())), Page(report.html(hostile(facts())))
    # Equal tags with equal attributes: hostile text added no element and no attribute, and is shown as text.
    assert [tag for tag, _ in clean.tags] == [tag for tag, _ in bad.tags]
    assert [sorted(attributes) for _, attributes in clean.tags] == [sorted(attributes) for _, attributes in bad.tags]
    assert "alert(1)" in bad.text and "{{7*7}}" in bad.text and "49" not in bad.text.replace("{{7*7}}", "")


def test_what_is_not_told_is_left_out() -> None:
    everything = Page(report.html(facts())).text
    empty = Page(report.html({})).text
    headings = [
        "Goals",
        "Before and after",
        "Cost",
        "All that was found",
        "What was done",
        "Layer by layer",
        "Training",
        "Robustness",
        "Parity",
        "Where it comes from",
    ]
    for heading in headings:
        assert heading in everything
        assert heading not in empty.replace("Words used here", "").split("accuracy The share")[0]
    for name in facts():
        one = {name: facts()[name]}
        Page(report.html(one))
        without = {key: value for key, value in facts().items() if key != name}
        Page(report.html(without))
        report.summary(one)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_none_is_not_shown(number: float | None) -> None:
    def emptied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: emptied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [emptied(item) for item in value]
        return number if isinstance(value, float) else value

    text = Page(report.html(emptied(facts()))).text
    for sign in ("nan", "inf ", "None"):
        assert sign not in text.split("Words used here")[0], sign
    json.loads(report.as_json(emptied(facts())), parse_constant=pytest.fail)


def test_json_is_the_facts() -> None:
    assert json.loads(report.as_json(facts())) == facts()


def test_report_writes_both_files_and_replaces_them_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.report(facts(), tmp_path / "deep" / "report.html")
    first = path.read_text(encoding="utf-8")
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == facts()
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        report.report({"title": "other"}, path)
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == first


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in the facts."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


@pytest.mark.parametrize("odd", [3, "odd", [1], {"odd": 1}, None, True])
def test_what_has_another_form_is_shown_or_refused_by_its_place(odd: Any) -> None:
    refused = set()
    for path in places(facts()):
        told = facts()
        place = functools.reduce(lambda value, key: value[key], path[:-1], told)
        place[path[-1]] = odd
        try:
            report.summary(told)
        except FormatError as error:
            refused.add(str(error).split(":")[0])
    if odd == 3:
        assert {"before", "goals", "goals[0]", "after.evaluation.drop", "layers", "curves[0].series"} <= refused
        assert "before.name" not in refused and "title" not in refused
    with pytest.raises(FormatError, match=r"goals\[1\]: 'no goal' is no table"):
        report.html({"goals": [{}, "no goal"]})


def test_the_metric_is_called_what_the_facts_call_it() -> None:
    """A mean absolute error in years: lower is better, no share, and nothing of classes."""
    told = facts()
    for name, value in (("before", 2.5), ("after", 2.0)):
        told[name]["evaluation"] = {
            "metric": "mae", "label": "mean absolute error", "unit": "years", "better": "lower", "value": value,
            "interval": [value - 0.25, value + 0.25], "samples": 99, "robustness": {"fog": {"1": 2 * value}},
        }  # fmt: skip
    told["after"]["evaluation"]["drop"] = {"value": -0.5, "interval": [-0.75, -0.25]}
    told["goals"][0] |= {"unit": "years", "asked": 0.5, "reached": -0.5, "met": True}
    for point, value in zip(told["frontier"], (2.5, 4.0, 2.0), strict=True):
        point |= {"value": value, "interval": [value - 0.25, value + 0.25]}
    page = report.html(told)
    text = Page(page).text
    for said in (
        "mean absolute error",
        "2.5 years (2.25 to 2.75, 99 images)",
        "−0.5 years",
        "−0.75 to −0.25",
        "at most 0.5 years",
        "same answer",
        "mean absolute error on images made worse",
        "4 years",
        "drop of the mean absolute error",
    ):
        assert said in text, said
    assert "top-1" not in page and "points" not in text.split("Words used here")[0]
    row = view.view(told)["comparison"][0]
    assert (row["label"], row["good"]) == ("mean absolute error", True)
    marks = {mark["name"]: mark for mark in view.view(told)["frontier"]["marks"]}
    assert marks["pruned"]["beaten"] and not marks["quantized"]["beaten"] and marks["original"]["beaten"]
    told["after"]["evaluation"].pop("drop")
    assert view.view(told)["comparison"][0]["change"] == "−0.5 years"
    told["before"], told["after"] = told["after"], told["before"]
    row = view.view(told)["comparison"][0]
    assert (row["change"], row["good"]) == ("+0.5 years", False)


def test_report_is_an_html_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.html"):
        report.report({}, tmp_path / "report.pdf")


def test_facts_are_not_changed() -> None:
    before = facts()
    kept = copy.deepcopy(before)
    report.html(before)
    report.summary(before)
    assert before == kept


def test_same_facts_same_page() -> None:
    assert report.html(facts()) == report.html(facts())


def test_the_table_and_the_goal_tell_one_speed() -> None:
    """The median of ratios, not the ratio of medians: at a goal of 2x one may be above and the other below."""
    for told in ({"median": 2.01, "low": 1.9, "high": 2.1}, {"original": {"median": 2.01}, "result": {"median": 1.0}}):
        both = {"before": {"latency_ms": {"median": 10.0}}, "after": {"latency_ms": {"median": 5.1}, "speedup": told}}
        assert [row["change"] for row in view.view(both)["comparison"] if row["label"] == "latency"] == ["2.01× faster"]


def test_verdict_follows_the_goals() -> None:
    told = facts()
    assert view.view(told)["verdict"]["light"] == "bad"
    assert view.view(told)["verdict"]["advice"] == ["train for longer"]
    for goal in told["goals"]:
        goal["met"] = True
    assert view.view(told)["verdict"]["light"] == "good"
    told["warnings"] = ["the original knows <nothing>"]
    assert view.view(told)["verdict"]["light"] == "neutral"
    assert "the original knows &lt;nothing&gt;" in report.html(
        told
    ) and "warning: the original knows <nothing>" in report.summary(told)
    assert view.view(told)["verdict"]["sentence"].startswith("Both goals were met.")
    told["goals"] = []
    assert view.view(told)["verdict"]["light"] == "neutral"
    told["verdict"] = {"status": "missed", "sentence": "It was not to be."}
    assert view.view(told)["verdict"]["sentence"] == "It was not to be."


def test_summary_names_verdict_table_and_what_was_undone() -> None:
    text = report.summary(facts())
    assert text.splitlines()[0].startswith("1 of 2 goals missed")
    assert "try: train for longer" in text
    assert any(line.startswith("latency") and line.endswith("3.5× faster") for line in text.splitlines())
    assert "undone: quantize: it was slower than float" in text


def test_a_graphs_history_as_facts() -> None:
    history = [
        {
            "step": "prune",
            "options": {"macs": 0.5, "seed": 0},
            "facts": {"channels": {"conv.weight": [16, 8], "fc.weight": [10, 10]}},
        },
        {
            "step": "distill",
            "options": {"clip": 0.0},
            "facts": {
                "curve": [{"epoch": 1, "loss": 2.0, "val": 0.5}, {"epoch": 2, "loss": 1.0, "val": 0.75}],
                "timing": {"seconds": 9},
            },
        },
        {"step": "prune", "options": {}, "facts": {"channels": {"conv.weight": [8, 6]}}},
        {
            "step": "quantize",
            "options": {},
            "facts": {"layers": [{"name": "conv", "bits": 8, "activation_bits": 8, "error": 1e-3, "input": "x"}]},
        },
    ]
    told = facts_.told_by(history)
    assert told["layers"] == [
        {"name": "conv", "channels_before": 16, "channels_after": 6, "bits": 8, "activation_bits": 8, "error": 1e-3},
        {"name": "fc", "channels_before": 10, "channels_after": 10},
    ]
    assert [step["step"] for step in told["steps"]] == ["prune", "distill", "prune", "quantize"] and told["steps"][1][
        "seconds"
    ] == 9
    assert [curve["series"][0]["y"] for curve in told["curves"]] == [[2.0, 1.0], [50.0, 75.0]]
    text = Page(report.html(told)).text
    assert "6 of 16" in text and "macs=0.5" in text and "clip" not in text and "seed" not in text


@pytest.mark.parametrize(
    "share, words",
    [(0.0312, "3.12 % of the training was spent waiting for data: loading data was not"), (0.5, "50 % of")],
)
def test_a_training_tells_how_long_it_waited_for_data(share: float, words: str) -> None:
    """As a graph's history holds it, and as compress() does; nothing is said where it was not measured."""
    curve = [{"epoch": 1, "loss": 2.0, "val": 0.5}]
    for facts in ({"curve": curve, "timing": {"seconds": 9, "data_share": share}}, {"data_share": share}):
        text = Page(report.html({"steps": [{"step": "distill", "options": {}, "facts": facts}]})).text
        assert words in text and ("more workers would shorten it" in text) == (share > 0.2)
    for facts in ({}, {"data_share": None}, {"timing": None}):
        assert "waiting for data" not in Page(report.html({"steps": [{"step": "prune", "facts": facts}]})).text


def test_a_worse_result_is_called_worse() -> None:
    told = facts()
    told["before"], told["after"] = told["after"], told["before"]
    changes = {row["label"]: (row["change"], row["good"]) for row in view.view(told)["comparison"]}
    assert changes["latency"] == ("3.5× slower", False)
    assert changes["size"] == ("8× larger", False)


def test_a_faster_and_better_candidate_makes_the_other_pale() -> None:
    marks = {mark["name"]: mark for mark in view.view(facts())["frontier"]["marks"]}
    assert marks["pruned"]["beaten"] and not marks["original"]["beaten"] and not marks["quantized"]["beaten"]
    assert marks["quantized"]["chosen"]
    assert marks["quantized"]["x"] < marks["original"]["x"]
    assert marks["original"]["y"] < marks["quantized"]["y"]  # higher accuracy stands higher
    assert marks["original"]["high"] < marks["original"]["y"] < marks["original"]["low"]


def test_names_of_candidates_do_not_cover_each_other_or_leave_the_figure() -> None:
    names = ["original", "prune", "prune + distill", "prune + distill + quantize", "quantize"]
    close = [
        {"name": name, "value": 0.98 + 0.001 * index, "latency_ms": 1 + 0.01 * index}
        for index, name in enumerate(names)
    ]
    marks = view.view({"frontier": [*close, {"name": "slow", "value": 0.9, "latency_ms": 9}]})["frontier"]["marks"]
    boxes = [
        charts._around(mark["label"]["x"], mark["label"]["y"], charts._LETTER * len(mark["name"])) for mark in marks
    ]
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= charts._WIDTH and top >= 0 and bottom <= charts._HEIGHT
        for other in boxes[:index]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_advice_is_for_goals_that_were_missed() -> None:
    told = facts()
    told["goals"] = [{"name": "speedup", "asked": 2, "reached": 3, "met": True, "advice": "prune more"}]
    assert "prune more" not in Page(report.html(told)).text


def test_page_of_a_deep_network_stays_small() -> None:
    told = facts()
    told["layers"] = [{**told["layers"][0], "name": f"stage{index}.conv"} for index in range(300)]
    told["curves"][0]["series"][0] = {
        "name": "loss",
        "x": list(range(100_000)),
        "y": [1.0 / (1 + index) for index in range(100_000)],
    }
    assert len(report.html(told).encode()) < 400_000


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_span_the_data_in_equal_round_steps(low: float, span: float) -> None:
    high = low + span
    ticks = charts._ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert 2 <= len(ticks) <= 12
    if high > low and span > slack:
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack
        steps = [right - left for left, right in itertools.pairwise(ticks)]
        assert min(steps) > 0 and max(steps) - min(steps) <= slack


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=2000), st.integers(1, 400))
def test_thinning_keeps_ends_and_mean(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    thin = charts._thinned(points, most)
    assert len(thin) <= max(most, 1)
    assert thin[-1][0] == points[-1][0]
    if len(values) % most == 0:  # equal stretches: the mean of means is the mean
        assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.size, 0, "0 B"),
        (units.size, 999, "999 B"),
        (units.size, 214_000, "214 kB"),
        (units.size, 3_500_000, "3.5 MB"),
        (units.count, 126_550_000, "127 M"),
        (units.count, 12, "12"),
        (units.seconds, 3.21, "3.21 s"),
        (units.seconds, 1520, "25 min 20 s"),
        (units.seconds, 7300, "2 h 1 min"),
        (units.short, 1234567.0, "1.23e+06"),
        (units.short, 4.0, "4"),
        (units.short, 0.123456, "0.123"),
        (units.signed, -0.612, "−0.61"),
        (units.signed, 0.4, "+0.40"),
        (units.signed, 0.001, "0.00"),
    ],
)
def test_numbers_as_text(function: Any, value: float, text: str) -> None:
    assert function(value) == text


def test_of_many_points_the_beaten_go_without_their_names_and_all_are_listed() -> None:
    points = [
        {"name": f"#{index}", "value": 0.9, "latency_ms": 1.0 + index, "beaten": index != 1, "chosen": False}
        for index in range(charts.CROWDED + 1)
    ]
    listed = {"columns": ["point", "run"], "rows": [["#1", "work/<b>"]], "note": "of one search"}
    marks = view.view({"frontier": points})["frontier"]["marks"]
    assert [mark["name"] for mark in marks if mark["label"]] == ["#1"]  # told, though #0 is as good and faster
    assert {mark["name"] for mark in marks} == {point["name"] for point in points}
    assert all(mark["label"] for mark in view.view({"frontier": points[:3]})["frontier"]["marks"])
    page = report.html({"frontier": points, "listed": listed})
    assert "Every model" in page and "work/&lt;b&gt;" in page and "of one search" in page
    assert "Every model" not in report.html({"frontier": points})
    for bad in ({"columns": ["a"], "rows": [[1, 2]]}, {"columns": "a", "rows": []}, {"rows": [1]}):
        with pytest.raises(FormatError, match="listed"):
            view.view({"listed": bad})
