"""search(): the front of a few trials, gone on with, refused where it is another's, and worked at by several processes.

Digits, a tiny network; the cost is that of the MACs, so that a busy machine plans as a quiet one does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from digits import digits

from rarefy import demo
from rarefy.artifact import folder as folder_
from rarefy.compression.budget import Budget
from rarefy.compression.search import front as front_
from rarefy.compression.search import profile
from rarefy.compression.search.search import resumed, search
from rarefy.errors import InputError
from rarefy.graph.capture import capture


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_table", lambda network, *_: (profile.macs_table(network), "MACs"))


def untrained(width: int = 8) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return capture(demo.model(width=width), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "give trials= or minutes="),
        ({"trials": 3, "minutes": 2.0}, "one of them"),
        ({"trials": 0}, "not between 1"),
        ({"minutes": float("nan")}, "is no time"),
        ({"trials": 2, "epochs": 0}, "less than 1"),
        ({"trials": 2, "strategy": "luck"}, "have evolution, tpe, random"),
    ],
)
def test_what_is_no_search_is_told_before_anything_is_done(asked: dict[str, float], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        search(untrained(), digits(), folder=tmp_path / "s", progress=False, **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_search_finds_saves_goes_on_and_is_no_others(tmp_path: Path) -> None:
    events: list[str] = []
    (tmp_path / "prices.toml").write_text('[prices]\nwatts_per_core = 20\n[about]\nauthor = "A team"\n')
    given = {
        "also": ["openvino"],
        "prices": tmp_path / "prices.toml",
        "epochs": 2,
        "corruptions": [],
        "budget": Budget(max_drop=0.5),
        "progress": False,
    }
    found = search(
        untrained(), digits(), folder=tmp_path / "s", trials=4, on_event=lambda what, _: events.append(what), **given
    )  # type: ignore[arg-type]
    assert len(found.points) == 4 and events.count("trial") == 4 and events.count("saved") == len(found.best)
    for one in found.best:
        graph = folder_.load(tmp_path / "s" / one["folder"])
        assert graph(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        told = json.loads((tmp_path / "s" / one["folder"] / "report.json").read_text())
        assert [mark["name"] for mark in told["frontier"] if mark["chosen"]] == [f"#{one['number']}"]
        assert [goal["name"] for goal in told["goals"]] == ["max_drop"]
        assert told["prices"]["watts_per_core"] == 20 and told["about"]["author"] == "A team"
    assert all(one["elsewhere"].keys() == {"openvino:threads=1"} for one in found.points)
    assert found.pick("1s@openvino")["drop"] == found.pick("1s")["drop"]
    assert found.about["prices"]["watts_per_core"] == 20 and "by A team" in (tmp_path / "s/report.html").read_text()
    assert (tmp_path / "s" / "report.html").exists() and not any(one["folder"] for one in found.points if one["beaten"])
    more = search(untrained(), digits(), folder=tmp_path / "s", trials=6, **given)  # type: ignore[arg-type]
    assert len(more.points) == 6 and [one["name"] for one in more.points if one["number"] < 4]
    with pytest.raises(InputError, match="another further runtimes"):
        fewer = {**given, "also": []}
        search(untrained(), digits(), folder=tmp_path / "s", trials=6, **fewer)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="another model"):
        search(untrained(12), digits(), folder=tmp_path / "s", trials=6, **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is in use for something else"):
        search(untrained(), digits(), folder=tmp_path / "s" / "points", trials=6, **given)  # type: ignore[arg-type]
    assert resumed(tmp_path / "s", digits(), progress=False).work().points == front_.read(tmp_path / "s").points
    (tmp_path / "s" / "front.json").write_text((tmp_path / "s" / "front.json").read_text().replace("8 bits", "9 bits"))
    with pytest.raises(InputError, match="was changed"):
        front_.read(tmp_path / "s")
