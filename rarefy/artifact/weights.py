"""weights.safetensors: tensors as they are, as codes without gaps or entropy-coded, or without zeros; and back.

There are three ways to write it (``words.STORES``): readable (an entry a tensor, smaller where that is simple),
fastest (codes packed as kernels read them, nothing to decode), smallest (two entries, ``coding/joined.py``).

Nothing in a file is believed: its header covers it exactly, and every size is compared with graph.json and with the
bytes that are there before memory is taken.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from rarefy.artifact import graph_json
from rarefy.artifact.coding import joined, packing
from rarefy.artifact.coding.rans import LARGEST_RATIO
from rarefy.artifact.graph_json import BY_NAME, DTYPES, Entry, is_shape
from rarefy.errors import FormatError, InputError
from rarefy.system import strict_json
from rarefy.system.memory import afford
from rarefy.system.strict_json import Json, expect, is_size, located, said


def described(graph: fx.GraphModule, store: str) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """What graph.json says of each tensor, and the tensors of weights.safetensors.

    store: one of ``words.STORES``. Raises FormatError for a tensor without a form.
    """
    found = {
        **dict(graph.named_parameters(remove_duplicate=False)),
        **dict(graph.named_buffers(remove_duplicate=False)),
    }
    bits = {name: width for name, width in graph.meta.get("bits", {}).items() if name in found}
    sparse = {id(found[name]) for name in graph.meta.get("sparse", []) if name in found}
    entries: dict[str, Entry] = {}
    stored: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name in sorted(found):
        value = found[name]
        entry = entries[name] = graph_json.tensor_entry(graph, name, value)
        if first.setdefault(id(value), name) != name:
            entries[name] = {"kind": entry["kind"], "same_as": first[id(value)]}
            continue
        if value.dtype not in DTYPES or value.layout != torch.strided:
            raise FormatError(
                f"{name}: a tensor of {value.dtype} ({value.layout}) has no place in safetensors; convert it first"
            )
        small = store == "readable" and id(value) in sparse and value.is_floating_point()
        small = small and packing.sparse_size(value) < value.nbytes
        if small:
            entry["stored"] = "sparse"
            stored[name] = packing.sparse_pack(value)
        elif store == "smallest":
            stored[name] = value
        else:
            stored[name] = _stored(name, value, bits.get(name), entry, entropy=store == "readable")
    return entries, joined.joined(stored, bits, entries) if store == "smallest" else stored


def _stored(name: str, value: Tensor, bits: int | None, entry: Entry, entropy: bool) -> Tensor:
    """The tensor as safetensors holds it; says in ``entry`` how, where it is not as it is."""
    plain = value.detach().to(device="cpu", memory_format=torch.contiguous_format, copy=True)
    if bits is None and (
        not entropy or value.dtype not in (torch.int8, torch.uint8) or isinstance(value, nn.Parameter)
    ):
        return plain
    try:
        packed = packing.pack(plain, 8 if bits is None else bits)
        coded = packing.entropy_encode(plain, 8 if bits is None else bits) if entropy else None
    except InputError as error:
        raise FormatError(f"{name}: {error}") from error
    if coded is not None and coded.numel() < packed.numel():
        entry["stored"], entry["bits"] = "zstd", 8 if bits is None else bits
        return coded
    if bits is None or bits == 8:
        return plain
    entry["stored"], entry["bits"] = "packed", bits
    return packed


def read(
    file: BufferedReader, size: int, description: Mapping[str, Json], path: Path, check: Callable[[str], None]
) -> dict[str, Tensor]:
    """The tensors, each in memory of its own, after its place and size were compared with the header and graph.json.

    The file is read once, from its first byte to its last, so that what is hashed is what is decoded.

    size: of the file, in bytes. description: graph.json. path: for messages. check: is called with the sha256 of what
    was read, before any of it is decoded. Raises FormatError, and what ``check`` raises.
    """
    digest = hashlib.sha256()
    header = _read_header(file, size, path, digest)
    entries = {name: entry for name, entry in description["tensors"].items() if "same_as" not in entry}
    small = description["meta"].get("store") == "smallest"
    parts = _parts(entries, header, str(path)) if small else entries
    for name in parts.keys() ^ header.keys():
        raise FormatError(f"{path}: tensor {said(name)} is {'missing' if name in parts else 'not one of graph.json'}")
    wanted = {name: _place(f"{path}: tensor {said(name)}", entry, header[name]) for name, entry in parts.items()}
    beside = 0
    if small:  # what it is read into, symbols and which table each has, and the bytes twice
        whole = sum(math.prod(one["shape"]) * BY_NAME[one["dtype"]].itemsize for one in entries.values())
        beside = whole + 2 * joined.symbol_count(entries) + size
    # A file of holes takes no disk, and many symbols may stand in few bytes.
    afford(size + beside, str(path), "load it on a machine with more, or end other programs")
    found: dict[str, Tensor] = {}
    for name in sorted(wanted, key=lambda name: header[name]["data_offsets"]):
        dtype, shape = wanted[name]
        raw = found[name] = torch.empty(shape, dtype=dtype)
        if raw.numel():
            part = raw.reshape(-1).view(torch.uint8).numpy().data
            expect(file.readinto(part) == raw.nbytes, f"{path}: tensor {said(name)}", "ends too early")
            digest.update(part)
    check(digest.hexdigest())
    if small:
        coded, plain = (found[name].numpy() for name in joined.PARTS)
        dtypes = {name: BY_NAME[entry["dtype"]] for name, entry in entries.items()}
        found = located(str(path), joined.separated, coded, plain, entries, dtypes)
    # Decoded in place of what was read, one by one: memory holds the larger of the two, and one tensor.
    return {name: _unstored(f"{path}: tensor {said(name)}", entries[name], found.pop(name), small) for name in entries}


def _parts(entries: Mapping[str, Entry], header: Mapping[str, Entry], at: str) -> dict[str, Entry]:
    """The two entries of the smallest form, in graph.json's words."""
    plain = sum(joined.plain_bytes(entry, BY_NAME[entry["dtype"]]) for entry in entries.values())
    coded = header["coded"]["shape"] if "coded" in header else [0]
    expect(len(coded) == 1, at, f"tensor 'coded' has the shape {said(coded)}, graph.json wants one axis")
    symbols = joined.symbol_count(entries)
    expect(
        "coded" not in header or symbols <= LARGEST_RATIO * coded[0], at, f"holds {symbols} symbols in {coded[0]} bytes"
    )
    return {name: {"dtype": "uint8", "shape": [count]} for name, count in zip(joined.PARTS, (coded[0], plain))}


def _read_header(file: BufferedReader, size: int, path: Path, digest: hashlib._Hash) -> dict[str, Entry]:
    """The header of a safetensors file, whose offsets cover the rest of the file exactly; the file is at that rest."""
    file.seek(0)
    begin = file.read(8)
    length = int.from_bytes(begin, "little")
    good = size >= 8 and length <= min(size - 8, strict_json.MOST_BYTES)
    expect(good, path, f"is no safetensors file (a header of {length} bytes in {size})")
    text = file.read(length)
    digest.update(begin)
    digest.update(text)
    header = strict_json.parse(text, path)
    header.pop("__metadata__", None)
    position = 0
    for name, entry in header.items():
        at = f"{path}: tensor {said(name)}"
        expect(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, at, "has other keys")
        offsets = entry["data_offsets"]
        good = isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))
        expect(good, at, f"has the offsets {said(offsets)}")
        expect(is_shape(entry["shape"]), at, f"has the shape {said(entry['shape'])}")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        good = begin == position <= end <= size - 8 - length
        at = f"{path}: tensor {said(name)}"
        expect(good, at, f"has the offsets {begin} to {end}, after {position} of {size - 8 - length}")
        position = end
    expect(position == size - 8 - length, path, f"holds {size - 8 - length} bytes, its tensors {position}")
    return header


def _place(at: str, entry: Entry, header: Entry) -> tuple[torch.dtype, list[int]]:
    """dtype and shape in which the tensor is stored, compared with graph.json and with the bytes that are there."""
    dtype, shape = BY_NAME[entry["dtype"]], entry["shape"]
    if "stored" in entry:
        count = header["shape"][0] if header["shape"] else 0
        if entry["stored"] == "sparse":
            least = packing.packed_size(math.prod(shape), 1)
            expect(count >= least, at, f"has {count} bytes, the bits of its shape alone take {least}")
        if entry["stored"] == "packed":
            count = packing.packed_size(math.prod(shape), entry["bits"])
        dtype, shape = torch.uint8, [count]
    expect(header["dtype"] == DTYPES[dtype], at, f"is {said(header['dtype'])}, graph.json wants {DTYPES[dtype]}")
    expect(header["shape"] == shape, at, f"has the shape {said(header['shape'])}, graph.json wants {said(shape)}")
    begin, end = header["data_offsets"]
    needed = math.prod(shape) * dtype.itemsize
    expect(end - begin == needed, at, f"has {end - begin} bytes, its shape takes {needed}")
    return dtype, shape


def _unstored(at: str, entry: Entry, raw: Tensor, decoded: bool) -> Tensor:
    dtype, shape = BY_NAME[entry["dtype"]], entry["shape"]
    if decoded:
        pass
    elif entry.get("stored") == "sparse":
        raw = located(at, packing.sparse_unpack, raw, shape, dtype)
    elif "stored" in entry:
        decode = packing.unpack if entry["stored"] == "packed" else packing.entropy_decode
        raw = located(at, decode, raw, entry["bits"], shape, dtype)
    if dtype == torch.bool and raw.numel():
        expect(int(raw.view(torch.uint8).max()) <= 1, at, "of bool holds a byte that is neither 0 nor 1")
    return raw.contiguous(memory_format=torch.channels_last) if "channels_last" in entry else raw


def stand_ins(graph: nn.Module) -> dict[str, Tensor]:
    """Stand-ins without memory, to build a graph that only has to be checked."""
    every = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    return {name: torch.empty_like(value.detach(), device="meta") for name, value in every}
