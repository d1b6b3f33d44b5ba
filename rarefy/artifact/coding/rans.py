"""Symbols in as many bits as their entropy: range ANS (Duda, 1311.2540), a table of frequencies for each kind.

A state x holds all that was written. A symbol that takes f of 4096 shares, the c-th on, makes it grow by 4096 / f,

    x <- (x div f) 4096 + c + x mod f         and back:  x <- f (x div 4096) + x mod 4096 - c

where x mod 4096 says which symbol it is. States stay in [2^16, 2^32): before one would leave, its lower 16 bits are
written. Within 0.1 % of the entropy by the tables, where Huffman's codes, of whole bits, lose up to 1 bit a symbol
(zeros of a pruned layer: 0.5 bits in place of 1).

Symbols are coded in columns, symbol i in column i mod L by a state of its own, L = ceil(n / 4096): numpy works on a row
at once, and there are 4096 rows at most, whatever the size. A column costs 4 bytes, 0.008 bits a symbol.
Written is, little-endian:

    L states of 4 bytes, then words of 2 bytes in the order in which they are read: row by row, in it column by column;
    where that is less than a 256th of the symbols, zeros up to there: few bytes can't ask for gigabytes

A reader starts from the states and ends with each of them at 2^16 and with all words read, or the bytes are refused: so
each sequence of symbols has one form. Given up: adapting to what came before, which would need a loop over symbols.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rarefy.errors import FormatError

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

SHARES = 4096  # of a table in all
ROWS = 4096  # at most
LARGEST_RATIO = 256  # symbols a byte may stand for
_LOW = 1 << 16  # of a state


def frequencies(counts: Numbers) -> Numbers:
    """Shares of 4096 by how often each symbol occurs, at least one for each that does."""
    total = int(counts.sum())
    shares: Numbers = np.maximum(counts * SHARES // max(total, 1), counts > 0)
    if not total:
        shares[0] = SHARES
    for _ in range(abs(SHARES - int(shares.sum()))):  # at most as many as there are symbols
        up = int(shares.sum()) < SHARES
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = counts * np.log2((shares + 1) / shares) if up else counts * np.log2(shares / (shares - 1))
        gain = np.where(shares > (0 if up else 1), gain, -np.inf if up else np.inf)
        shares[int(gain.argmax() if up else gain.argmin())] += 1 if up else -1
    return shares


def encode(symbols: Bytes, lengths: Sequence[int], chosen: Sequence[int], tables: Sequence[Numbers]) -> bytes:
    """``symbols`` (n,), of which the first ``lengths[0]`` have the frequencies ``tables[chosen[0]]``, and so on."""
    count, columns = len(symbols), _columns(len(symbols))
    shares, firsts = _stacked(tables)
    table = np.repeat(np.asarray(chosen, np.uint8), lengths)
    states = np.full(columns, _LOW)
    written: list[NDArray[np.uint16]] = []
    for start in range(0, count, columns or 1)[::-1]:
        place = (table[start : start + columns].astype(np.int64) << 8) + symbols[start : start + columns]
        share, x = shares[place], states[: len(place)]
        over = (x >= share << 20).nonzero()[0]
        written.append(x[over].astype(np.uint16))
        x[over] >>= 16
        whole = x // share
        x[:] = (whole << 12) + (x - whole * share) + firsts[place]
    words = np.concatenate([*reversed(written), np.empty(0, np.uint16)]).astype("<u2")
    found = states.astype("<u4").tobytes() + words.tobytes()
    return found.ljust(-(-count // LARGEST_RATIO), b"\0")


def decode(data: Bytes, lengths: Sequence[int], chosen: Sequence[int], tables: Sequence[Numbers]) -> Bytes:
    """The symbols that ``encode`` was given. Their number is compared with the bytes before memory is taken.

    Beside them it takes a byte a symbol, a copy of ``data``, and 32 kB a table.
    Raises FormatError for bytes that ``encode`` does not write.
    """
    count = sum(lengths)
    columns = _columns(count)
    if count > LARGEST_RATIO * len(data) or len(data) < 4 * columns:
        raise FormatError(f"{count} symbols in {len(data)} bytes: more than {LARGEST_RATIO} to 1, or cut off")
    states = data[: 4 * columns].copy().view("<u4").astype(np.int64)
    rest = data[4 * columns :]
    words = rest[: len(rest) // 2 * 2].copy().view("<u2")
    if bool((states < _LOW).any()):
        raise FormatError("a state of the entropy coder lies below 65536")
    meaning = _meanings(tables)
    table = np.repeat(np.asarray(chosen, np.uint8), lengths)
    symbols, position = np.empty(count, np.uint8), 0
    for start in range(0, count, columns or 1):
        here = table[start : start + columns].astype(np.int64)
        x = states[: len(here)]
        found = meaning[(here << 12) + (x & SHARES - 1)]
        symbols[start : start + columns] = found & 255
        x[:] = (found >> 8 & 8191) * (x >> 12) + (found >> 21)
        under = (x < _LOW).nonzero()[0]
        more = words[position : position + len(under)]
        if len(more) < len(under):
            raise FormatError(f"{count} entropy-coded symbols are cut off")
        x[under] = x[under] << 16 | more
        position += len(under)
    used = 4 * columns + 2 * position
    if bool((states != _LOW).any()) or len(data) != max(used, -(-count // LARGEST_RATIO)) or bool(data[used:].any()):
        raise FormatError(f"{count} entropy-coded symbols do not end where they should")
    return symbols


def written_tables(tables: Sequence[Numbers]) -> bytes:
    """Each as one byte, symbols less one, and a share a symbol: 7 bits a byte, the lowest last, a 1 in front where more
    follow."""
    found = bytearray()
    for table in tables:
        found.append(len(table) - 1)
        high, low = table >> 7, table & 127
        pairs = np.stack((high | 128, low), 1).astype(np.uint8)
        found += pairs[np.stack((high > 0, np.ones(len(table), bool)), 1)].tobytes()
    return bytes(found)


def read_tables(data: Bytes, count: int) -> tuple[list[Numbers], int]:
    """So many tables, and the bytes that they take. Raises FormatError for what ``written_tables`` does not write."""
    tables: list[Numbers] = []
    position = 0
    for number in range(count):
        size = int(data[position]) + 1 if position < len(data) else 0
        part = data[position + 1 : position + 1 + 2 * size].astype(np.int64)
        ends = np.flatnonzero(part < 128)[:size]
        widths = np.diff(ends, prepend=-1)
        if not size or len(ends) < size or int(widths.max()) > 2:
            raise FormatError(f"the frequencies of table {number} are cut off")
        high = np.where(widths == 2, part[np.maximum(ends - 1, 0)] & 127, 0)
        table = high << 7 | part[ends]
        if int(table.sum()) != SHARES or bool((high[widths == 2] == 0).any()):
            raise FormatError(f"the frequencies of table {number} are {int(table.sum())} in all, not {SHARES}")
        tables.append(table)
        position += 2 + int(ends[-1])
    return tables, position


def _columns(count: int) -> int:
    return -(-count // ROWS)


def _stacked(tables: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """(tables x 256): shares, and where they begin."""
    shares = np.zeros((len(tables), 256), np.int64)
    for row, table in zip(shares, tables, strict=True):
        row[: len(table)] = table
    return shares.reshape(-1), (np.cumsum(shares, 1) - shares).reshape(-1)


def _meanings(tables: Sequence[Numbers]) -> Numbers:
    """(tables x 4096): of x mod 4096 the symbol, in bits 0 to 7, its share, in 8 to 20, and x mod 4096 - c above."""
    found = np.empty((len(tables), SHARES), np.int64)
    for row, table in zip(found, tables, strict=True):
        symbol = np.repeat(np.arange(len(table)), table)
        row[:] = symbol | table[symbol] << 8 | (np.arange(SHARES) - (np.cumsum(table) - table)[symbol]) << 21
    return found.reshape(-1)
