"""graph.json, which repeats itself: as text, or, where the folder is to be small, as a zstandard frame of the text."""

from __future__ import annotations

import zstandard

from rarefy.errors import FormatError
from rarefy.system.strict_json import MOST_BYTES

MAGIC = b"\x28\xb5\x2f\xfd"  # which no JSON text begins with
LEVEL = 19


def folded(text: bytes) -> bytes:
    """The frame of a text of at most ``MOST_BYTES``, which is what a reader takes."""
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(text)


def unfolded(data: bytes, where: str) -> bytes:
    """The text. What the frame claims is checked before any memory is taken. Raises FormatError."""
    if not data.startswith(MAGIC):
        return data
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if not 0 < size <= MOST_BYTES:
            raise FormatError(f"{where}: the zstandard frame claims {size} bytes, a text has {MOST_BYTES} at most")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{where}: not a whole zstandard frame ({error})") from error
