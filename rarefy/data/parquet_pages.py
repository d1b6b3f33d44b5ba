"""Where a Parquet file's pages lie and what they unfold to, read before Arrow unpacks one.

A file says of itself how large it is, and a page of zeros unfolds a thousandfold. Its description is in Thrift's
compact protocol; asked for it, pyarrow aborts the process where the file contradicts itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rarefy.errors import DataError
from rarefy.system import files

MOST_IN_A_GROUP = 2**30
# Bytes that a column of a row group may unfold to: so many, and so many for each stored one; and with what a dictionary
# repeats.
UNFOLDED, FOLD, REPEATED = 2**27, 4, 2**28
A_HEADER, A_FOOTER = 2**20, 2**24  # bytes of a page's header and of the file's description, at most
DEEPEST = 32  # structs and lists in each other

Struct = dict[int, object]  # field -> value, of one that Thrift wrote


def check_pages(file: str, about: Struct, group: int, column: str) -> int:
    """Bytes of the column's dictionary, 0 where it has none. Raises DataError for pages that unfold too far.

    about: the row group, as the file describes it.
    """
    dictionary, chunks = 0, about.get(1)
    for chunk in chunks if isinstance(chunks, list) else ():
        told = chunk.get(3) if isinstance(chunk, dict) else None
        path = told.get(3) if isinstance(told, dict) else None
        if not isinstance(told, dict) or not isinstance(path, list) or path[:1] != [column.encode()]:
            continue
        begin = min(place for place in (whole(told, 9), whole(told, 11)) if place > 0 or place == whole(told, 9))
        end = begin + whole(told, 7)
        if not 0 <= begin <= end <= os.path.getsize(file):
            raise DataError(f"{file}: row group {group} lies outside of the file; restore it")
        try:
            pages = list(_pages(file, begin, end))
        except (IndexError, ValueError, OSError) as error:
            raise DataError(f"{file}: row group {group} has no pages that can be read; restore the file") from error
        unfolded = sum(one for _, one in pages)
        if unfolded > min(MOST_IN_A_GROUP, max(UNFOLDED, FOLD * (end - begin))):
            raise DataError(
                f"{file}: row group {group} unfolds from {end - begin:,} bytes to {unfolded:,}; "
                "write the file with row_group_size=100 or so"
            )
        dictionary += sum(one for kind, one in pages if kind == 2)
    return dictionary


def _pages(file: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(kind, unpacked bytes) of each page between two places; raises IndexError or ValueError for what are none."""
    with files.opened(file, kind=DataError) as source:
        while begin < end:
            source.seek(begin)
            told, length = _struct(source.read(min(A_HEADER, end - begin)), 0)
            kind, unfolded, stored = (whole(told, field, -1) for field in (1, 2, 3))
            if kind < 0 or unfolded < 0 or stored < 0:
                raise ValueError("no page")
            yield kind, unfolded
            begin += length + stored


def footer(file: str) -> Struct:
    with files.opened(file, kind=DataError) as source:
        size = source.seek(0, os.SEEK_END)
        source.seek(size - 8)
        length = int.from_bytes(source.read(4), "little")
        if not 0 < length <= min(size - 8, A_FOOTER):
            raise ValueError("no footer")
        source.seek(size - 8 - length)
        return _struct(source.read(length), 0)[0]


def _struct(data: bytes, place: int, depth: int = 0) -> tuple[Struct, int]:
    """A struct's fields by number, and where it ends. Raises IndexError or ValueError for what is none."""
    found: Struct = {}
    last = 0
    while True:
        byte = data[place]
        place, kind = place + 1, byte & 0x0F
        if kind == 0:
            return found, place
        if byte >> 4:
            last += byte >> 4
        else:
            last, place = _number(data, place)
        if kind > 2:  # else a flag, which is its kind
            found[last], place = _value(data, place, kind, depth + 1)


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[object, int]:
    if depth > DEEPEST:
        raise ValueError("too deep")
    match kind:
        case 1 | 2 | 3:
            return data[place], place + 1
        case 4 | 5 | 6:
            return _number(data, place)
        case 7:
            return None, place + 8
        case 8:
            length, place = _varint(data, place)
            return data[place : place + length], place + length
        case 9 | 10:
            head = data[place]
            size, place = (head >> 4, place + 1) if head < 0xF0 else _varint(data, place + 1)
            values = []
            for _ in range(size):  # of which each takes a byte at least
                value, place = _value(data, place, head & 0x0F, depth + 1)
                values.append(value)
            return values, place
        case 12:
            return _struct(data, place, depth + 1)
    raise ValueError("a kind that Parquet has not")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[place]
        place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("a number without end")


def _number(data: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def whole(told: Struct, field: int, missing: int = 0) -> int:
    value = told.get(field, missing)
    return value if isinstance(value, int) else missing
