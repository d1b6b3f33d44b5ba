"""Records of what was done to a graph."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.history import append, last, records, since


def test_records_are_in_order_and_found_from_the_newest() -> None:
    graph = capture(nn.Linear(4, 2), torch.randn(2, 4))
    assert records(graph) == [] and last(graph) is None and last(graph, "prune") is None
    append(graph, "prune", {"keep": 0.5}, {"params": 3})
    append(graph, "distill", {}, {"loss": 1.0})
    append(graph, "prune", {"keep": 0.25}, {"params": 2})
    assert [record["step"] for record in records(graph)] == ["prune", "distill", "prune"]
    assert graph.meta["history"][0] == {"step": "prune", "options": {"keep": 0.5}, "facts": {"params": 3}}
    assert last(graph, "prune") == last(graph) == records(graph)[2]
    assert last(graph, "distill", "quantize") == records(graph)[1]
    assert last(graph, "quantize") is None


def test_since_yields_what_a_graph_has_beyond_the_one_it_was_made_of() -> None:
    model = nn.Linear(4, 2)
    before = capture(model, torch.randn(2, 4))
    append(before, "prune", {}, {})
    after = copy.copy(before)
    after.meta = dict(before.meta)
    append(after, "mask", {}, {"zeros": 1})
    assert [record["step"] for record in since(after, before)] == ["mask"]
    assert [record["step"] for record in records(before)] == ["prune"]  # its list is its own
    assert since(before, before) == []
    assert [record["step"] for record in since(after, model)] == ["prune", "mask"]


def test_a_record_without_a_step_is_of_no_step() -> None:
    graph = capture(nn.Linear(4, 2), torch.randn(2, 4))
    graph.meta["history"] = [{"facts": {}}]
    assert last(graph, "prune") is None and last(graph) == {"facts": {}}
