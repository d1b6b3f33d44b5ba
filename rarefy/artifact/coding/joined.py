"""The smallest form of a folder's tensors: two runs of bytes, of each tensor what takes the fewest.

    coded    symbols at their entropy (``rans.py``)
    plain    what follows from no table: floats and rare numbers as they are, tensor after tensor

Entries of a file of their own cost 90 bytes each, and a network's scales, biases and zero points are many and short: in
a ResNet-56 of 2-bit weights a tenth of the file. So there are two entries, and graph.json says in which way each tensor
lies in them:

    nothing                        plain, as safetensors holds it
    packed, bits                   plain, codes without gaps (``packing.py``)
    coded, bits                    coded, a symbol a code: its lowest bits
    codebook, values               plain, its different values, rising as whole numbers; coded, for each element which
    sparse, values                 plain, its elements that are not zero, in order; coded, for each whether it is one

A codebook is what ``cluster`` leaves (Deep Compression, 1510.00149), and any tensor with few values: norms of ones,
counters, masks. Sparse positions cost their entropy, 0.47 bits at 90 % zeros.

Frequencies are shared: tensors of like entropy lie beside each other, and neighbours get one table as long as it saves
more bytes than it costs (``_grouped``): a table of 8-bit codes takes 300 bytes, a convolution of a small network 2,000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.artifact.coding import packing, rans
from rarefy.artifact.coding.rans import Bytes, Numbers
from rarefy.errors import FormatError, InputError
from rarefy.system.strict_json import Json, expect, is_size, said

PARTS = ("coded", "plain")
CODED = ("coded", "codebook", "sparse")  # tensors that have symbols
MOST_TABLES = 255
FORMS = {None: set(), "packed": {"bits"}, "coded": {"bits"}, "codebook": {"values"}, "sparse": {"values"}}

Entry = dict[str, Json]
_SAMPLE = 4096  # elements that tell whether a tensor has few values


class _Segment(NamedTuple):
    """Symbols below ``size``. plain: bytes beside them. instead: bytes, and what is said of them, if they do not pay.

    said: of the tensor, how it is stored.
    """

    symbols: Bytes
    size: int
    said: Entry
    plain: bytes
    instead: bytes
    said_instead: Entry


# ---------------------------------------------------------------------------------------------------------------- write


def joined(values: Mapping[str, Tensor], bits: Mapping[str, int], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The two runs of bytes of ``values``; says in ``entries`` how each tensor lies in them.

    bits: of codes, by name. Raises FormatError for codes of more bits.
    """
    segments: dict[str, _Segment] = {}
    plain: dict[str, bytes] = {}
    for name in sorted(values):
        words = _words(values[name])
        segment = _segment(name, values[name], words, bits.get(name)) if words.size else None
        if segment is None:
            plain[name] = words.tobytes()
        else:
            segments[name] = segment
    chosen, tables = _grouped(segments)
    for name, segment in segments.items():
        pays = name in chosen
        plain[name] = segment.plain if pays else segment.instead
        entries[name].update(segment.said if pays else segment.said_instead)
    kept = [segments[name] for name in segments if name in chosen]
    symbols = np.concatenate([np.empty(0, np.uint8), *(one.symbols for one in kept)])
    ids = bytes(chosen[name] for name in segments if name in chosen)
    stream = rans.encode(symbols, [len(one.symbols) for one in kept], list(ids), tables)
    coded = bytes([len(tables)]) + rans.written_tables(tables) + ids + stream
    found = {"coded": coded, "plain": b"".join(plain[name] for name in sorted(plain))}
    return {
        name: torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else _NONE for name, part in found.items()
    }


_NONE = torch.empty(0, dtype=torch.uint8)


def _segment(name: str, value: Tensor, words: NDArray[np.unsignedinteger], bits: int | None) -> _Segment | None:
    """How a tensor is best stored; None: as it is."""
    if value.dtype in (torch.int8, torch.uint8):
        width = bits or 8
        try:
            packed = packing.pack(value, width).numpy().tobytes()
        except InputError as error:
            raise FormatError(f"{name}: {error}") from error
        instead: Entry = {"stored": "packed", "bits": width} if width < 8 else {}
        symbols = words.view(np.uint8) & np.uint8(2**width - 1)
        return _Segment(symbols, 2**width, {"stored": "coded", "bits": width}, b"", packed, instead)
    whole = words.tobytes()
    best, least = None, float(len(whole))
    zeros = words == 0
    share = float(zeros.mean())
    if 0 < share < 1 and words.itemsize > 1:
        there = words[~zeros].tobytes()
        least = len(there) + _entropy(np.array([share, 1 - share])) * words.size / 8 + 4
        best = _Segment(
            (~zeros).view(np.uint8), 2, {"stored": "sparse", "values": int((~zeros).sum())}, there, whole, {}
        )
    if np.unique(words[:_SAMPLE]).size <= 256:
        book, places, counts = np.unique(words, return_inverse=True, return_counts=True)
        size = book.nbytes + len(book) + _entropy(counts / words.size) * words.size / 8
        if len(book) <= 256 and size < least:
            said_ = {"stored": "codebook", "values": len(book)}
            return _Segment(places.astype(np.uint8), len(book), said_, book.tobytes(), whole, {})
    return best if least < len(whole) else None


def _grouped(segments: Mapping[str, _Segment]) -> tuple[dict[str, int], list[Numbers]]:
    """The table of each tensor that is smaller with one, and the tables."""
    order: list[tuple[int, float, str]] = []
    counts: dict[str, Numbers] = {}
    for name, one in segments.items():
        counts[name] = np.bincount(one.symbols, minlength=one.size)
        order.append((one.size, _entropy(counts[name] / len(one.symbols)), name))
    groups: list[tuple[list[str], Numbers]] = [([name], counts[name]) for _, _, name in sorted(order)]
    costs = [_cost(total) for _, total in groups]
    saved = [_saving(groups, costs, index) for index in range(len(groups) - 1)]
    while saved and (max(saved) > 0 or (len(groups) > MOST_TABLES and max(saved) > -math.inf)):
        index = int(np.argmax(saved))
        groups[index : index + 2] = [(groups[index][0] + groups[index + 1][0], groups[index][1] + groups[index + 1][1])]
        costs[index : index + 2] = [_cost(groups[index][1])]
        del saved[index]
        for near in (index - 1, index):
            if 0 <= near < len(saved):
                saved[near] = _saving(groups, costs, near)
    chosen: dict[str, int] = {}
    tables: list[Numbers] = []
    for (names, total), cost in zip(groups, costs, strict=True):
        less = sum(len(segments[name].instead) - len(segments[name].plain) for name in names)
        if cost < less and len(tables) < MOST_TABLES:
            chosen |= dict.fromkeys(names, len(tables))
            tables.append(rans.frequencies(total))
    return chosen, tables


def _saving(groups: list[tuple[list[str], Numbers]], costs: list[float], index: int) -> float:
    """Bytes that one table in place of two saves; none can serve symbols of other ranges."""
    one, other = groups[index][1], groups[index + 1][1]
    return costs[index] + costs[index + 1] - _cost(one + other) if len(one) == len(other) else -math.inf


def _cost(counts: Numbers) -> float:
    """Bytes of that table, and of the symbols that are coded by it, about."""
    total = int(counts.sum())
    return _entropy(counts / total) * total / 8 + 1 + len(counts) + int((counts * 32 > total).sum())


def _entropy(shares: NDArray[np.float64]) -> float:
    """Bits a symbol."""
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _words(value: Tensor) -> NDArray[np.unsignedinteger]:
    """The elements in row-major order, as whole numbers of their bits."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{flat.element_size()}") if flat.numel() else np.empty(0, np.uint8)


# ----------------------------------------------------------------------------------------------------------------- read


def check_entry(entry: Entry, dtype: torch.dtype, at: str) -> None:
    """Is it stored in a way of this page? Raises FormatError."""
    stored, bits, count = entry.get("stored"), entry.get("bits"), math.prod(entry["shape"])
    known = (stored is None or isinstance(stored, str)) and stored in FORMS
    good = known and FORMS[stored] == entry.keys() & {"bits", "values"}
    if "bits" in entry:
        good = good and type(bits) is int and bits in packing.WIDTHS and dtype in (torch.int8, torch.uint8)
    if "values" in entry:
        most = min(count, 256) if stored == "codebook" else count
        good = good and is_size(entry["values"]) and 0 < entry["values"] <= most
    expect(good and (count > 0 or stored is None), at, f"is stored as {said(stored)} of {said(bits)} bits")


def symbol_count(entries: Mapping[str, Entry]) -> int:
    """Of all tensors together: what ``coded`` holds."""
    return sum(math.prod(entry["shape"]) for entry in entries.values() if entry.get("stored") in CODED)


def plain_bytes(entry: Entry, dtype: torch.dtype) -> int:
    """Bytes of a tensor in ``plain``."""
    stored = entry.get("stored")
    if stored == "packed":
        return packing.packed_size(math.prod(entry["shape"]), entry["bits"])
    return 0 if stored == "coded" else entry.get("values", math.prod(entry["shape"])) * dtype.itemsize


def separated(
    coded: Bytes, plain: Bytes, entries: Mapping[str, Entry], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """The tensors that ``joined`` was given. ``plain`` has as many bytes as ``plain_bytes`` says of them together.

    Raises FormatError for bytes that ``joined`` does not write.
    """
    segments = {name: _size(entries[name]) for name in sorted(entries) if _size(entries[name])}
    lengths = [math.prod(entries[name]["shape"]) for name in segments]
    if not len(coded):
        raise FormatError("the coded part has no bytes")
    tables, position = rans.read_tables(coded[1:], int(coded[0]))
    ids = coded[1 + position : 1 + position + len(segments)]
    if len(ids) < len(segments) or bool((ids >= len(tables)).any()):
        raise FormatError(f"{len(segments)} tensors name tables of {len(tables)}, and one that is not there")
    for (name, size), table in zip(segments.items(), ids, strict=True):
        if len(tables[table]) != size:
            raise FormatError(f"tensor {said(name)} has {size} symbols, its table {len(tables[table])}")
    symbols = rans.decode(coded[1 + position + len(segments) :], lengths, ids.tolist(), tables)
    found: dict[str, Tensor] = {}
    at = begun = 0
    for name in sorted(entries):
        end = at + plain_bytes(entries[name], dtypes[name])
        count = math.prod(entries[name]["shape"]) if name in segments else 0
        found[name] = _tensor(entries[name], dtypes[name], plain[at:end], symbols[begun : begun + count], name)
        at, begun = end, begun + count
    return found


def _size(entry: Entry) -> int:
    """How many symbols a tensor may have; 0: it has none."""
    sizes = {"coded": 2 ** entry.get("bits", 0), "codebook": entry.get("values", 0), "sparse": 2}
    return int(sizes.get(str(entry.get("stored")), 0))


def _tensor(entry: Entry, dtype: torch.dtype, plain: Bytes, symbols: Bytes, name: str) -> Tensor:
    stored, shape = entry.get("stored"), entry["shape"]
    if stored == "packed":
        return packing.unpack(torch.from_numpy(plain.copy()), entry["bits"], shape, dtype)
    if stored == "coded":
        codes = torch.from_numpy(symbols.copy())
        if dtype == torch.int8:  # shifted up and down again, so that the sign bit fills the rest
            codes = (codes << (8 - entry["bits"])).view(torch.int8) >> (8 - entry["bits"])
        return codes.reshape(shape)
    values = plain.copy().view(f"<u{dtype.itemsize}")
    if stored == "codebook":
        if bool((values[1:] <= values[:-1]).any()):
            raise FormatError(f"tensor {said(name)}: the values of its codebook do not rise")
        values = values[symbols]
    elif stored == "sparse":
        if int(symbols.sum()) != len(values) or not bool(values.all()):
            raise FormatError(
                f"tensor {said(name)}: {int(symbols.sum())} of its weights are there, {len(values)} stored"
            )
        whole = np.zeros(len(symbols), values.dtype)
        whole[symbols != 0] = values
        values = whole
    return torch.from_numpy(values.view(np.uint8)).view(dtype).reshape(shape)
