"""Every way to be bad is refused in one line, before memory is taken, and fast."""

import json
import os
import re
import resource
import shutil
import time
from pathlib import Path

import hypothesis
import pytest
import torch
from bad_folders import CHANGES, KINDS, WORDS, good_folder, seal, small_graph
from bounds import bounded, ended
from hypothesis import strategies as st
from more_folders import MORE
from smallest_folders import SMALLEST

from rarefy.artifact import folder as folder_
from rarefy.artifact import graph_json, snapshot
from rarefy.errors import FormatError

MEMORY = 400 * 2**20
SECONDS = 10


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_folder(tmp_path_factory.mktemp("hostile") / "good")


def test_the_good_folder_is_good(good):
    graph = small_graph()
    with bounded(MEMORY, SECONDS):
        loaded = folder_.load(good)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(graph(x), loaded(x))
    entries = json.loads((good / "graph.json").read_text())["tensors"]
    assert entries["four"]["stored"] == "packed" and entries["eight"]["stored"] == "zstd"
    assert entries["few"]["stored"] == "sparse"


ALL = {**KINDS, **MORE, **SMALLEST}
REACHED: set[str] = set()  # names of refusals


@pytest.mark.parametrize("promise", ALL)
def test_a_broken_promise_is_refused(promise, good, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    change, words = ALL[promise]
    change(folder)
    start = time.perf_counter()
    with pytest.raises(FormatError) as refusal, bounded(MEMORY, SECONDS):
        folder_.load(folder)
    assert time.perf_counter() - start < SECONDS
    text = str(refusal.value)
    assert words in text
    assert "\n" not in text and str(folder) in text and len(text) < 1000
    assert text.isprintable()
    name = text.rpartition(" [")[2].rstrip("]")
    assert name in snapshot.REFUSALS, text
    REACHED.add(name)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.parametrize(("more", "words"), [(-10, ""), (60_000, "nodes is no list of at most")])
def test_the_largest_graph_loads_in_time_and_memory(more, words, good, tmp_path):
    """Or what is larger is refused, in as little."""
    folder = tmp_path / "large"
    shutil.copytree(good, folder)
    value = json.loads((folder / "graph.json").read_text())
    *nodes, output = value["nodes"]
    last = nodes[-1]["name"]
    for place in range(graph_json.MOST_NODES - len(nodes) + more):
        args = [{"node": last}, {"node": nodes[-1]["name"]}]
        nodes.append({"op": "call_function", "name": f"n{place}", "target": "aten.maximum.default", "args": args})
    output["args"] = [{"node": nodes[-1]["name"]}]
    (folder / "graph.json").write_text(json.dumps({**value, "nodes": [*nodes, output]}))
    seal(folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            folder_.load(folder)
            code = int(bool(words))
        except FormatError as error:
            code = int(not words or words not in str(error))
        finally:
            os._exit(code)
    status, used = ended(child, 120)
    grown = 1024 * (used.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert status == 0 and used.ru_utime + used.ru_stime < 5 and grown < 512 * 2**20, used
    print(f"{len(nodes):,} nodes: {used.ru_utime + used.ru_stime:.1f} s, {grown / 2**20:.0f} MB")


def test_there_are_enough_kinds():
    assert len(ALL) >= 300 and KINDS.keys() == WORDS.keys() == CHANGES.keys()


# Reached by files of their own: signatures and certificates (test_signing), reports and ONNX files (test_snapshot,
# test_bytes), and what no folder can be made to reach on every machine.
ELSEWHERE = (
    "signature-",
    "signed-",
    "certificate-",
    "report-",
    "onnx-",
    "folder-",
    "content",
    "served-",
    "weights-ends",
    "graph-program",
)


def test_each_refusal_has_a_kind():
    """Runs last: what the kinds above were refused with."""
    if len(REACHED) < 10:
        pytest.skip("the kinds did not run in this process")
    missed = sorted({name for name in snapshot.REFUSALS if not name.startswith(ELSEWHERE)} - REACHED)
    assert not missed


def test_the_page_has_the_same_names():
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    listed = re.findall(r"^\| `([a-z-]+)` \|", page.partition("## Refusals")[2], re.MULTILINE)
    assert listed == list(snapshot.REFUSALS)


@hypothesis.given(data=st.data())
@hypothesis.settings(
    deadline=None, max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_value_in_place_of_another_loads_or_is_refused(good, tmp_path, data):
    """One value of graph.json, drawn anywhere in it, is replaced by any other."""
    value = json.loads((good / "graph.json").read_text())
    holder, key = value, data.draw(st.sampled_from(sorted(value)))
    while isinstance(holder[key], (dict, list)) and holder[key] and data.draw(st.integers(0, 9)):
        holder = holder[key]
        key = data.draw(
            st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.integers(0, len(holder) - 1)
        )
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5)
    )
    names = st.sampled_from(
        ["x", "conv2d", "relu", "conv.weight", "four", "float32", "int8", "aten.relu.default", "operator.getitem"]
    )
    keys = st.sampled_from(
        ["node", "tuple", "slice", "dict", "float", "dtype", "device", "$float", "same_as", "stored"]
    ) | st.text(max_size=3)
    holder[key] = data.draw(
        st.recursive(
            scalars | names, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=2)
        )
    )
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    (folder / "graph.json").write_text(json.dumps(value))
    seal(folder)
    try:
        folder_.load(folder)
    except FormatError as error:
        assert str(error).isprintable()


@hypothesis.given(
    position=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    name=st.sampled_from(["graph.json", "weights.safetensors"]),
)
@hypothesis.settings(
    deadline=None, max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_byte_in_place_of_another_loads_or_is_refused(good, tmp_path, position, byte, name):
    folder = tmp_path / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    changed = bytearray((good / name).read_bytes())
    changed[position % min(len(changed), 4000)] = byte
    (folder / name).write_bytes(changed)
    seal(folder)
    try:
        folder_.load(folder)
    except FormatError as error:
        assert str(error).isprintable()
