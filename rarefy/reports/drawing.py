"""Drawing: a picture with what models say of it, one beside the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from PIL import Image, ImageDraw, ImageFont

_COLOURS = (  # of Okabe and Ito, which people with any colour vision tell apart; black text is read on all of them
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (153, 153, 153),
)  # fmt: skip
_LARGEST = 1600  # longer side of a drawn picture, in pixels
_GAP = 8
_MOST_SHOWN, _MOST_ENCODED = 8, 400_000  # pictures of a report, and characters of one
_JPEG = re.compile(r"/9j/[A-Za-z0-9+/]+={0,2}")  # base64 of what begins as a JPEG does

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Mark(NamedTuple):
    """text: what is said. kind: of what colour. corners: left, top, right, bottom; None: it is said of all of it."""

    text: str
    kind: int
    corners: tuple[float, float, float, float] | None = None


class Pictured(TypedDict, total=False):
    """A judged picture in a report's facts, with what original and result say of it, side by side.

    number: its place among the judged, from 0. change: how far apart the answers are (``evaluation/changed.py``).
    jpeg: base64.
    """

    number: int
    change: float
    jpeg: str


class PictureView(TypedDict):
    """The same as a page shows it."""

    name: str
    change: str
    source: str


def picture_views(pictures: Sequence[Pictured]) -> list[PictureView]:
    """Those that are JPEGs of a bounded size: the facts may be of a file that anybody wrote."""
    return [
        PictureView(
            name=f"picture {one['number'] + 1:,} of the judged" if "number" in one else "picture",
            change=f"{one['change']:.2f}" if "change" in one else "",
            source=f"data:image/jpeg;base64,{one['jpeg']}",
        )
        for one in pictures[:_MOST_SHOWN]
        if len(one["jpeg"]) <= _MOST_ENCODED and _JPEG.fullmatch(one["jpeg"])
    ]


def drawn(picture: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """A copy in colour, of at most 1,600 pixels a side, with a frame around each box and a line for each other mark.

    marks: the surest first, which lie on top.
    """
    scale = min(1.0, _LARGEST / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    made = picture.convert("RGB").resize(size) if scale < 1 else picture.convert("RGB")
    draw, font = ImageDraw.Draw(made), _font(made.size)
    width = max(2, min(made.size) // 200)
    for mark in reversed([mark for mark in marks if mark.corners is not None]):
        assert mark.corners is not None
        colour = _COLOURS[mark.kind % len(_COLOURS)]
        left, top, right, bottom = (value * scale for value in mark.corners)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
        _label(draw, (left, top), mark.text, colour, font, made.size)
    line = 0.0
    for mark in marks:
        if mark.corners is None:
            line += _label(draw, (0, line), mark.text, (255, 255, 255), font, made.size, below=True)
    return made


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """In a row, each with its title above it; a single one has none."""
    if len(pictures) == 1:
        return pictures[0]
    font = _font(pictures[0].size)
    head = 2 * _GAP + _height(font)
    width = sum(one.width for one in pictures) + _GAP * (len(pictures) - 1)
    made = Image.new("RGB", (width, head + max(one.height for one in pictures)), (255, 255, 255))
    draw, left = ImageDraw.Draw(made), 0
    for picture, title in zip(pictures, titles, strict=True):
        draw.text((left + _GAP, _GAP), title, fill=(0, 0, 0), font=font)
        made.paste(picture, (left, head))
        left += picture.width + _GAP
    return made


def _label(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    font: Font,
    size: tuple[int, int],
    below: bool = False,
) -> float:
    """The text in a field of the colour, above its place unless there is no room; its height."""
    shown = "".join(character if character.isprintable() else "?" for character in text)[:60]
    high, wide = _height(font) + 4, draw.textlength(shown, font=font) + 6
    left = max(0.0, min(place[0], size[0] - wide))
    top = place[1] if below or place[1] < high else place[1] - high
    draw.rectangle((left, top, left + wide, top + high), fill=colour)
    draw.text((left + 3, top + 1), shown, fill=(0, 0, 0), font=font)
    return float(high)


def _height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ag")
    return round(bottom + max(0, top) / 2)


def _font(size: tuple[int, int]) -> Font:
    return ImageFont.load_default(size=max(11, min(24, min(size) // 32)))
