"""Whatever a stranger calls a class, a layer, a step or a model, it is text in a report, a README and a comparison."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import ConvNormLinear
from test_report import facts

from rarefy.errors import RarefyError
from rarefy.evaluation import card
from rarefy.graph.capture import capture
from rarefy.reports import report, shown

MARKS = [
    "<img src=x onerror=alert(1)>",
    "</title></style><script>alert(1)</script>",
    "\"><svg onload='alert(1)'>",
    "{{ 7*7 }}{% raw %}",
    "![x](https://evil.example/x.png)",
    "[free](javascript:alert(1))",
    "a | b\n\n# c\n\n<b>",
    "\x1b[2J\u202e\u2066",
    "`x`***",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every text."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def with_mark(value: Any, path: tuple[Any, ...], mark: str) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = mark
    return changed


def is_plain_html(page: str) -> bool:
    """A report has no images and no script of its own, and its drawings do nothing."""
    return not any(one in page for one in ("<img", "<script", "<svg onload", "</title></style>", "\x1b", "\u202e"))


def is_plain_markdown(page: str) -> bool:
    lines = page.splitlines()
    return not (
        "<img" in page.replace("\\<", "") or "<script" in page.replace("\\<", "") or "<svg" in page.replace("\\<", "")
        or "](javascript" in page.replace("\\]", "") or "](https://evil" in page.replace("\\]", "")
        or "# c" in lines or "<b>" in lines or "\x1b" in page or "\u202e" in page
    )  # fmt: skip


def compared(one: dict[str, Any], other: dict[str, Any]) -> str:
    return shown.html(shown.compared({"a": one, "b": other}))


@pytest.mark.parametrize("mark", ["".join(MARKS[:7]), "".join(MARKS[7:])])
def test_every_text_of_a_report_is_text_on_its_pages(mark: str) -> None:
    told, read = facts(), 0
    graph = capture(ConvNormLinear(), torch.zeros(2, 1, 5, 5))
    for path in places(told):
        changed = with_mark(told, path, mark)
        makers: list[tuple[Callable[[], str], Callable[[str], bool]]] = [
            (functools.partial(report.html, changed), is_plain_html),
            (functools.partial(compared, changed, told), is_plain_html),
            (functools.partial(card.text, graph, changed), is_plain_markdown),
        ]
        for make, plain in makers:
            try:
                page = make()
            except RarefyError:
                continue
            read += 1
            assert plain(page), f"{path}: {mark!r}"
    assert read > 20


@pytest.mark.parametrize("mark", MARKS)
def test_what_a_graph_says_is_text_in_its_readme(mark: str) -> None:
    graph = capture(ConvNormLinear(), torch.zeros(2, 1, 5, 5))
    graph.meta["task"] = {"task": mark, "class_names": [mark, "b"]}
    graph.meta["history"] = [{"step": mark, "options": {mark: mark}, "facts": {mark: mark}}]
    page = card.text(graph, None, [])
    assert is_plain_markdown(page), page
    assert page.count("\n---\n") == 1, "one head of YAML, and no more of it"


def test_names_of_a_comparison_are_text() -> None:
    for mark in MARKS:
        page = shown.html(shown.compared({mark: facts(), "b": facts()}))
        assert is_plain_html(page), mark
