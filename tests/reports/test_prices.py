"""What a load costs, what figures do not show, reports side by side, and a report in a notebook."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rarefy.errors import InputError
from rarefy.reports import prices, report, shown, view


def told(**more: Any) -> dict[str, Any]:
    evaluation = {
        "metric": "top1",
        "label": "top-1",
        "unit": "%",
        "value": 0.95,
        "interval": [0.92, 0.97],
        "samples": 359,
    }
    worst = {"index": 3, "name": "<cat>", "value": 0.4, "samples": 12}
    before: dict[str, Any] = {"evaluation": {**evaluation, "worst_class": {**worst, "value": 0.9}}, "latency_ms": 10.0}
    after: dict[str, Any] = {"evaluation": {**evaluation, "value": 0.94, "worst_class": worst}}
    before["throughput"] = {"batch": 4, "per_second": 50.0, "threads": 1}
    after["throughput"] = {"batch": 16, "per_second": 200.0, "threads": 1}
    after["latency_ms"] = {"median": 4.0, "disturbed": True}
    return {"title": "net", "before": before, "after": after, **more}


def test_a_load_takes_cores_power_and_money() -> None:
    load = prices.Prices(
        requests_per_second=100, load=0.5, watts_per_core=10, euros_per_kwh=0.5, euros_per_core_hour=0.1
    )
    found = load.for_load(40.0)
    assert found.cores == math.ceil(100 / (0.5 * 40)) == 5 and found.servers == 1
    assert found.kwh == pytest.approx(10 * 2.5 * 730 / 1000)
    assert found.money == pytest.approx(found.kwh * 0.5 + 5 * 730 * 0.1)
    assert found.kwh_a_million == pytest.approx(10 / 40 * 1e6 / 3.6e6)
    assert load.for_load(40.0, threads=4).cores == 20
    assert load.millijoules(5.0, 2) == 100.0


def test_the_report_tells_costs_risks_and_who_made_it() -> None:
    facts = told(about={"author": "<b>Team</b>", "license": "MIT"}, provenance={"created": "2026-11-30T10:00:00"})
    page = view.view(facts)
    assert page["costs"] is not None and [row[1:] for row in page["costs"]["rows"]][1] == ("4", "1")
    assert "8 W a busy core" in page["costs"]["remark"]
    risks = " ".join(page["risks"])
    for word in (
        "359 images only",
        "was not measured",
        "<cat>, is right on 40 %",
        "12 images only",
        "Other programs ran",
    ):
        assert word in risks
    assert page["signed_by"] == "by <b>Team</b> · 2026-11-30 · licence: MIT"
    html = report.html(facts)
    assert "<b>Team" not in html and "What it costs to run" in html and "<cat>" not in html
    busy = view.view({**facts, "prices": {"requests_per_second": 1000}})["costs"]
    assert busy is not None and busy["rows"][1][2] == "9"
    assert view.view({"title": "nothing"})["risks"] == [] and view.view({"title": "nothing"})["costs"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[price]\na = 1", "have [prices] and [about]"),
        ("[prices]\nwatts = 1", "no such price"),
        ("[prices]\nload = 2", "a share up to 1"),
        ("[prices]\nload = 0", "above 0"),
        ("[prices]\nwatts_per_core = -1", "above 0"),
        ('[prices]\nwatts_per_core = "many"', "above 0"),
        ("prices = 3", "is no table"),
        ("[about]\nauthor = 3", "author and license"),
        ("[prices]\ncurrency = 3", "short name"),
    ],
)
def test_a_table_that_is_none_names_the_key(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        prices.read(file)
    assert said in str(refused.value)


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        prices.read(tmp_path / "none.toml")


def test_reports_side_by_side_say_what_does_not_compare() -> None:
    one = told(provenance={"hashes": {"data.val": "a"}, "environment": {"cpu": {"name": "x"}}})
    other = told(provenance={"hashes": {"data.val": "b"}, "environment": {"cpu": {"name": "x"}}})
    found = shown.compared({"<one>": one, "other": other})
    assert found.columns == ["<one>", "other"] and found.rows[0][0] == "top-1 accuracy"
    assert len(found.warnings) == 1 and "different images" in found.warnings[0]
    assert "<one>" not in shown.html(found)


def test_a_report_in_a_notebook(tmp_path: Path) -> None:
    points = [
        {"name": "<a>", "value": 0.9, "interval": [0.88, 0.92], "latency_ms": 2.0, "chosen": True},
        {"name": "b", "value": 0.8, "interval": [0.7, 0.85], "latency_ms": 3.0},
    ]
    assert "<table>" in shown.table(told()) and "top-1 accuracy" in shown.table(told())
    picture = shown.frontier(told(frontier=points))
    assert picture._repr_svg_().startswith("<svg") and "<a>" not in picture.svg and 'opacity="0.45"' in picture.svg
    assert picture.save(tmp_path / "front.svg").read_text() == picture.svg
    with pytest.raises(InputError, match=".svg"):
        picture.save(tmp_path / "front.png")
    with pytest.raises(InputError, match="fewer than two points"):
        shown.frontier(told())
