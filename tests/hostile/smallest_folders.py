"""Folders of the smallest form that break one promise each: {promise: (change, words of the refusal)}."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from bad_folders import HUGE, seal, small_graph

from rarefy.artifact import folder as folder_
from rarefy.artifact.coding import text

Change = Callable[[Path], None]
SMALLEST: dict[str, tuple[Change, str]] = {}


def kind(name: str, words: str, change: Change, graph: Callable[[], Any] = small_graph) -> None:
    assert name not in SMALLEST

    def broken(folder: Path) -> None:
        folder_.save(graph(), folder, store="smallest")
        change(folder)
        seal(folder)

    SMALLEST[name] = (broken, words)


def in_graph(
    name: str, words: str, change: Callable[[dict[str, Any]], Any], graph: Callable[[], Any] = small_graph
) -> None:
    def broken(folder: Path) -> None:
        value = json.loads(text.unfolded((folder / "graph.json").read_bytes(), ""))
        change(value)
        (folder / "graph.json").write_bytes(text.folded(json.dumps(value).encode()))

    kind(name, words, broken, graph)


def in_text(name: str, words: str, change: Callable[[bytes], bytes]) -> None:
    """graph.json as its bytes."""
    kind(name, words, lambda folder: _rewrite(folder / "graph.json", change))


def in_weights(
    name: str,
    words: str,
    change: Callable[[dict[str, bytes], dict[str, Any]], Any],
    graph: Callable[[], Any] = small_graph,
) -> None:
    """The two parts, and what the header is to say otherwise."""

    def broken(folder: Path) -> None:
        path = folder / "weights.safetensors"
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        parts = {one: rest[slice(*header[one]["data_offsets"])] for one in ("coded", "plain")}
        other: dict[str, Any] = {}
        change(parts, other)
        position, told = 0, {}
        for one, data in parts.items():
            told[one] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [position, position + len(data)]}
            told[one] |= other.get(one, {})
            position += len(data)
        encoded = json.dumps(told).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(parts.values()))

    kind(name, words, broken, graph)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _entry(graph: dict[str, Any], name: str, **said: Any) -> None:
    graph["tensors"][name].update(said)


# ------------------------------------------------------------------------------------------------------------ the text

in_graph("the_store_is_one_of_three", "meta.store is 'tiny'", lambda graph: graph["meta"].update(store="tiny"))
in_graph("the_store_is_a_word", "meta.store is ['smallest']", lambda graph: graph["meta"].update(store=["smallest"]))
in_graph("the_schema_is_that_of_the_store", "and is stored as that of 2", lambda graph: graph.update(schema=1))
in_graph("the_store_is_that_of_the_schema", "and is stored as that of 1", lambda graph: graph["meta"].pop("store"))
kind(
    "the_manifest_has_the_schema_of_the_graph",
    "has the schema 1, graph.json 2",
    lambda folder: _rewrite(folder / "manifest.json", lambda data: data.replace(b'"schema": 2', b'"schema": 1')),
)
in_text("the_text_is_whole", "not a whole zstandard frame", lambda data: data[:-5])
in_text("nothing_follows_the_text", "not a whole zstandard frame", lambda data: data + b"\0")
in_text("the_text_is_no_bomb", "the zstandard frame claims 100000000 bytes", lambda _: text.folded(bytes(10**8)))
in_text(
    "the_text_says_its_size",
    "the zstandard frame claims",
    lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(text.unfolded(data, "")),
)

# --------------------------------------------------------------------------------------------------------- the tensors

for _name, _said in {
    "coded_floats": {"stored": "coded", "bits": 8},
    "another_form": {"stored": "zstd", "bits": 8},
    "a_form_that_is_no_word": {"stored": ["coded"]},
    "a_codebook_without_values": {"stored": "codebook"},
    "a_codebook_of_nothing": {"stored": "codebook", "values": 0},
    "a_codebook_of_too_many": {"stored": "codebook", "values": 257},
    "a_codebook_of_a_half": {"stored": "codebook", "values": 1.5},
    "more_that_are_there_than_places": {"stored": "sparse", "values": 10**6},
    "widths_of_nothing": {"bits": 4},
    "both": {"stored": "codebook", "bits": 4, "values": 2},
}.items():
    in_graph(
        f"no_tensor_is_stored_as_{_name}", "is stored as", lambda graph, s=_said: _entry(graph, "conv.weight", **s)
    )
in_graph(
    "no_tensor_is_larger_than_the_bytes_say",
    "symbols in 3571 bytes",
    lambda graph: _entry(graph, "conv.weight", shape=[HUGE], stored="codebook", values=1),
)
in_graph(
    "the_plain_part_is_that_of_the_shapes", "graph.json wants", lambda graph: _entry(graph, "conv.bias", shape=[5])
)
in_weights("there_is_no_third_part", "is not one of graph.json", lambda parts, _: parts.update(more=b"x"))
in_weights("the_coded_part_is_there", "tensor 'coded' is missing", lambda parts, _: parts.pop("coded"))
in_weights("the_plain_part_is_there", "tensor 'plain' is missing", lambda parts, _: parts.pop("plain"))
in_weights(
    "the_coded_part_has_one_axis",
    "graph.json wants one axis",
    lambda parts, other: other.update(coded={"shape": [1, len(parts["coded"])]}),
)
in_weights(
    "the_coded_part_is_of_bytes", "graph.json wants U8", lambda parts, other: other.update(coded={"dtype": "I8"})
)
in_weights("the_plain_part_is_whole", "graph.json wants", lambda parts, _: parts.update(plain=parts["plain"][:-1]))


def coded(name: str, words: str, change: Callable[[bytes], bytes]) -> None:
    in_weights(name, words, lambda parts, _: parts.update(coded=change(parts["coded"])))


def _ids(data: bytes) -> int:
    """Where the tensors' tables are named."""
    from rarefy.artifact.coding import rans

    return 1 + rans.read_tables(np.frombuffer(data, np.uint8)[1:], data[0])[1]


TABLED = 6  # tensors of small_graph that name a table: one byte each, then come the states


def _with(data: bytes, place: int, value: int) -> bytes:
    return data[:place] + bytes([value]) + data[place + 1 :]


coded("the_coded_part_has_bytes", "symbols in 0 bytes", lambda _: b"")
coded("tables_are_whole", "frequencies of table 0 are", lambda data: _with(data, 2, data[2] ^ 1))
coded("tables_are_as_many_as_said", "frequencies of table", lambda data: _with(data, 0, 255))
coded("tables_are_there", "name tables of", lambda data: _with(data, _ids(data), 200))
coded("tables_are_of_the_right_size", "its table", lambda data: _with(data, _ids(data), 0))
coded("symbols_are_whole", "symbols", lambda data: data[:-2])
coded("nothing_follows_the_symbols", "do not end where they should", lambda data: data + b"\0\0")
coded("symbols_end_as_they_began", "symbols", lambda data: _with(data, len(data) - 2, data[-2] ^ 1))


coded(
    "states_are_in_their_range",
    "a state of the entropy coder lies below 65536",
    lambda data: data[: _ids(data) + TABLED] + bytes(4) + data[_ids(data) + TABLED + 4 :],
)


def plain(name: str, words: str, place: slice, content: bytes, graph: Callable[[], Any] = small_graph) -> None:
    def changed(parts: dict[str, bytes], _: object) -> None:
        data = bytearray(parts["plain"])
        data[place] = content
        parts["plain"] = bytes(data)

    in_weights(name, words, changed, graph)


def thin_graph() -> Any:
    """``few`` is stored without its zeros, behind 448 bytes of others."""
    graph = small_graph()
    graph.few.data = torch.where(torch.arange(600) % 10 == 3, torch.arange(600) + 0.5, 0.0)
    return graph


FEW = slice(448, 452)  # of it the first value
plain("the_values_of_a_codebook_rise", "the values of its codebook do not rise", FEW, b"\xff\xff\xff\xff")
plain("the_values_of_a_codebook_differ", "the values of its codebook do not rise", slice(448, 464), bytes(16))
plain("no_zero_is_stored", "of its weights are there", FEW, bytes(4), thin_graph)
in_graph(
    "as_many_are_stored_as_are_there",
    "of its weights are there",
    lambda graph: (
        _entry(graph, "few", values=graph["tensors"]["few"]["values"] + 1),
        graph["tensors"]["linear.bias"].update(shape=[4]),
    ),
    thin_graph,
)
