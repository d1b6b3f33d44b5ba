"""``parquet:PATH``: files of a Hugging Face dataset of images, named as shards are (``rarefy/data/formats/_parquet.py``).

``?image=NAME&label=NAME`` where the columns are not plain.
"""

from __future__ import annotations

from urllib.parse import parse_qsl

from rarefy.data.formats._parquet import Parquet
from rarefy.data.items import Source, Split, of_store
from rarefy.data.shards import files_of
from rarefy.errors import DataError


def read(text: str, rest: str, split: Split) -> tuple[Source, bool]:
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(options.keys() - {"image", "label"})
    if unknown:
        raise DataError(f"{text}: unknown option {unknown[0]!r}; have image and label, the names of the columns")
    files, divided = files_of(text, path, split, ".parquet")
    return of_store(text, Parquet(text, files, **options)), divided
