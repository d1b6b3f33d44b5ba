"""``tar:PATH``: shards of ``key.jpg`` with ``key.cls``, as webdataset lays them out (``rarefy/data/shards.py``).

A folder of them, ``train-{000..099}.tar``, or ``train-*.tar``.
"""

from __future__ import annotations

from rarefy.data.items import Source, Split, of_store
from rarefy.data.shards import Shards, files_of


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    files, divided = files_of(text, rest, split, ".tar")
    return of_store(text, Shards(text, files)), divided
