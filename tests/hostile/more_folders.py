"""More folders that break one promise each: {promise: (change, words of the refusal)}, most of them made by rows."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_folders import seal

Change = Callable[[Path], None]
MORE: dict[str, tuple[Change, str]] = {}
FILES = ("graph.json", "weights.safetensors", "manifest.json")


def kind(name: str, words: str, change: Change) -> None:
    assert name not in MORE
    MORE[name] = (change, words)


# ----------------------------------------------------------------------------------------------------- kinds of entries


def a_link(path: Path) -> None:
    path.rename(path.parent.parent / f"moved-{path.name}")
    path.symlink_to(path.parent.parent / f"moved-{path.name}")


def a_link_inside(path: Path) -> None:
    path.rename(path.with_name(f"other-{path.name}"))
    path.symlink_to(f"other-{path.name}")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def a_link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


ENTRIES = {
    a_link: "is a symbolic link",
    a_link_inside: "is a symbolic link",
    a_link_to_itself: "is a symbolic link",
    a_link_to_nothing: "is a symbolic link",
    a_link_to_a_device: "is a symbolic link",
    a_pipe: "is a device or pipe",
    a_folder: "is a folder",
    a_socket: "is a device or pipe",
}
for _file in FILES:
    for _make, _words in ENTRIES.items():
        kind(f"{_file}_is_no_{_make.__name__}", f"{_file}: {_words}", lambda folder, f=_file, m=_make: m(folder / f))


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


for _file in FILES[:2]:
    for _make in (_emptied, _cut, _longer, _flipped):
        kind(
            f"{_file}_is_not{_make.__name__}",
            f"{_file}: differs from what manifest.json lists",
            lambda folder, f=_file, m=_make: m(folder / f),
        )
kind("manifest_is_not_emptied", "is not JSON", lambda folder: _emptied(folder / "manifest.json"))
kind("graph_is_there", "is listed in manifest.json and missing", lambda folder: (folder / "graph.json").unlink())


# ------------------------------------------------------------------------------------------------ what else lies there


def _listed(folder: Path, **entries: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] |= entries
    path.write_text(json.dumps(manifest))


UNLISTED = (
    "x",
    ".x",
    ".git",
    "model.onnx",
    "report.json",
    "predict.py",
    "graph.json~",
    "GRAPH.JSON",
    "model.sig.bak",
    "a b",
    "ä",
)
for _name in UNLISTED:
    kind(
        f"nothing_else_lies_there: {_name}",
        f"holds {_name!r}, which manifest.json does not list",
        lambda folder, n=_name: (folder / n).write_bytes(b""),
    )
kind(
    "names_are_plain",
    "holds 'a\\nb', which manifest.json does not list",
    lambda folder: (folder / "a\nb").write_bytes(b""),
)
for _make in (a_pipe, a_folder, a_socket):
    kind(f"nothing_else_is_{_make.__name__}", f"x: {ENTRIES[_make]}", lambda folder, m=_make: m(folder / "x"))
kind("no_link_leads_out", "x: is a symbolic link", lambda folder: (folder / "x").symlink_to("/etc/passwd"))
kind("no_link_leads_up", "x: is a symbolic link", lambda folder: (folder / "x").symlink_to(".."))


def _many(folder: Path) -> None:
    for index in range(200):
        (folder / f"x{index}").touch()


kind("files_are_few", "holds more than 100 files", _many)
GOOD = {"sha256": "0" * 64, "size": 0}
kind("listed_files_are_there", "x: is listed in manifest.json and missing", lambda folder: _listed(folder, x=GOOD))
for _name in (
    "/x",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    ".x",
    "x" * 200,
    "model.sig",
    "manifest.json",
    "MANIFEST.json",
    "x\n",
    "-x",
    "ä",
):
    kind(
        f"manifest_names_are_names: {_name[:20]!r}",
        "the entry of file",
        lambda folder, n=_name: _listed(folder, **{n: GOOD}),
    )
BAD = {
    "none": None,
    "a_list": [],
    "a_text": "x",
    "nothing": {},
    "one_key": {"sha256": "0" * 64},
    "three_keys": {**GOOD, "link": "x"},
    "a_true_size": {**GOOD, "size": True},
    "a_half_size": {**GOOD, "size": 0.5},
    "a_large_size": {**GOOD, "size": 2**60},
    "a_text_size": {**GOOD, "size": "0"},
    "a_short_hash": {**GOOD, "sha256": "0" * 63},
    "a_capital_hash": {**GOOD, "sha256": "A" * 64},
    "a_number_hash": {**GOOD, "sha256": 0},
}
for _name, _value in BAD.items():
    kind(
        f"manifest_entries_are_no_{_name}",
        "the entry of file 'x' is not a name with size and sha256",
        lambda folder, v=_value: _listed(folder, x=v),
    )


# ----------------------------------------------------------------------------------------- values of graph.json, meta


def _graph(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / "graph.json").read_text())
    change(value)
    (folder / "graph.json").write_text(json.dumps(value))
    seal(folder)


def in_meta(name: str, words: str, **entries: Any) -> None:
    kind(name, words, lambda folder: _graph(folder, lambda value: value["meta"].update(entries)))


for _name, _value in {"a_number": 1, "an_object": {}, "a_text": "four", "none": None}.items():
    in_meta(f"meta_sparse_is_no_{_name}", "meta.sparse is not a list", sparse=_value)
    in_meta(f"meta_shared_is_no_{_name}", "meta.shared is not a list", shared=_value)
for _name, _value in {"unknown": "x", "a_number": 1, "a_list": [], "none": None}.items():
    in_meta(f"meta_sparse_names_nothing_{_name}", "meta.sparse has", sparse=[_value])
    in_meta(f"meta_shared_names_nothing_{_name}", "meta.shared has", shared=[_value])
for _name, _value in {"a_list": [], "a_number": 4, "none": None}.items():
    in_meta(f"meta_bits_is_no_{_name}", "meta.bits is not an object", bits=_value)
for _name, _value in {"zero": 0, "one": 1, "nine": 9, "half": 4.5, "true": True, "text": "4", "none": None}.items():
    in_meta(f"meta_bits_are_no_{_name}", "meta.bits gives 'four' the width", bits={"four": _value})
in_meta("meta_bits_are_of_tensors", "meta.bits gives 'other' the width", bits={"other": 4})
for _name, _value in {"a_list": [], "a_number": 1, "a_table": {}}.items():
    in_meta(f"meta_core_is_no_{_name}", "meta.core is", core=_value)
for _name, _value in {
    "a_list": [],
    "a_number": 1,
    "empty": "",
    "none_of_ours": "mask_rcnn",
    "a_function": "os:system",
    "a_module": "evil.module:Run",
    "a_path": "../evil",
    "of_wild_options": "yolox:run=1",
    "long": "yolox:" + "x" * 5000,
}.items():
    in_meta(f"meta_detector_is_not_{_name}", "meta.detector is", detector=_value)
for _name, _value in {"a_table": {}, "none": None, "a_list_of_lists": [[]], "a_list_of_text": ["x"]}.items():
    in_meta(f"meta_history_is_no_{_name}", "meta.history is not a list of records", history=_value)
ENTRY = {"shape": [3, 8, 8], "dtype": "float32"}
for _name, _value in {"a_table": {}, "none": None}.items():
    in_meta(f"meta_inputs_are_no_{_name}", "meta.inputs is not a list", inputs=_value)
for _name, _value in {
    "of_no_shape": {"dtype": "float32"},
    "of_no_dtype": {"shape": [1]},
    "of_a_negative_size": {**ENTRY, "shape": [-1]},
    "of_an_unknown_dtype": {**ENTRY, "dtype": "object"},
    "of_a_listed_dtype": {**ENTRY, "dtype": ["float32"]},
    "none": None,
}.items():
    in_meta(f"an_input_is_not_{_name}", "meta.inputs has the entry", inputs=[_value])
for _name, _value in {"wide": [2**20, 2**20], "deep": [1] * 20}.items():
    in_meta(f"an_input_is_not_{_name}", "is too large", inputs=[{**ENTRY, "shape": _value}])
for _name, _value in {
    "turned": [1, 0],
    "one": [1],
    "three": [1, 2, 3],
    "text": "01",
    "halves": [0.5, 1],
    "wide": [0, 2**63],
}.items():
    in_meta(f"a_range_is_not_{_name}", "an input has the range", inputs=[{**ENTRY, "range": _value}])
for _name, _value in {
    "a_list": [],
    "half": {"inputs": []},
    "no_identifiers": {"inputs": ["a b"], "outputs": []},
    "twice": {"inputs": ["x"], "outputs": ["y", "y"]},
    "too_many": {"inputs": ["x", "y"], "outputs": []},
    "numbers": {"inputs": [1], "outputs": []},
}.items():
    in_meta(f"meta_names_are_not_{_name}", "meta.names is", names=_value)
for _name, _value in {
    "a_table": {},
    "short": [],
    "of_other_rank": [[None]],
    "zero": [[0, None, None]],
    "text": [["1", None, None]],
}.items():
    in_meta(f"meta_sizes_are_not_{_name}", "meta.sizes is", sizes=_value)


def in_nodes(name: str, words: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    kind(name, words, lambda folder: _graph(folder, lambda value: change(value["nodes"])))


for _key, _words in (("args", "args is not a list"), ("kwargs", "kwargs is not a dict")):
    for _name, _value in {"a_text": "x", "a_number": 1, "true": True}.items():
        in_nodes(f"{_key}_are_no_{_name}", _words, lambda nodes, k=_key, v=_value: nodes[-2].update({k: v}))
in_nodes("an_output_has_no_keywords", "has keyword arguments", lambda nodes: nodes[-1].update(kwargs={"x": 1}))
in_nodes("an_output_has_no_name_of_its_target", "does 'output'", lambda nodes: nodes[-1].update(target="x"))
in_nodes("a_placeholder_has_no_arguments", "has arguments", lambda nodes: nodes[0].update(args=[1]))
for _name in ("self", "torch", "if", "1x", "a-b", "", "__x", "x" * 300):
    in_nodes(f"a_node_is_not_called: {_name[:9]!r}", "has the name" if _name in ("self", "torch") else "can't be named",
             lambda nodes, n=_name: nodes[-2].update(name=n))  # fmt: skip
for _name, _value in {"surrogate": "\ud800", "null": "\0"}.items():
    kind(
        f"a_stack_is_no_{_name}",
        "half of a surrogate pair" if _name == "surrogate" else "stack is not a name",
        lambda folder, v=_value: _graph(folder, lambda value: value["nodes"][-2].update(stack=v)),
    )
