"""A picture as a model takes it, and its answer: what ``predict.py`` does, which lies beside an exported file."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def prepared(image: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """(C, H, W) float32, as the classifier was judged on."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert(about["channels"])
    (height, width), resample = about["size"], Image.Resampling[about["interpolation"].upper()]
    sizes = (width, height)
    if about["crop"] is not None and (about["crop"] < 1 or image.size != sizes):
        short = max(round(max(height, width) / about["crop"]), height, width)
        sizes = tuple(short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size)
    image = image if image.size == sizes else image.resize(sizes, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1) / np.float32(255)
    pixels = (pixels - np.array(about["mean"], np.float32)) / np.array(about["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized(pixels: np.ndarray, height: int, width: int, antialias: bool) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3) uint8, bilinear; without antialias by the four neighbours alone."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if antialias:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    for axis, size in enumerate((height, width)):
        own = pixels.shape[axis]
        place = ((np.arange(size) + 0.5) * (own / size) - 0.5).clip(0, own - 1)
        low = np.floor(place).astype(int)
        shape = [-1 if one == axis else 1 for one in range(3)]
        share = (place - low).astype(np.float32).reshape(shape)
        one, other = (np.take(pixels, at, axis).astype(np.float32) for at in (low, np.minimum(low + 1, own - 1)))
        pixels = one + (other - one) * share
    return np.round(pixels).clip(0, 255).astype(np.uint8)


def placed(image: Image.Image, feed: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A detector's input (H, W, 3) uint8; its boxes minus the second, over the third, are the picture's."""
    pixels = np.asarray(image.convert("RGB"))
    (height, width), (own_height, own_width) = feed["size"], pixels.shape[:2]
    if feed["resize"] == "stretch":
        scale = np.array([width / own_width, height / own_height] * 2)
        return resized(pixels, height, width, feed["antialias"]), np.zeros(4), scale
    ratio = min(height / own_height, width / own_width)
    left = top = 0
    if feed["centred"]:
        wide, high = max(1, round(own_width * ratio)), max(1, round(own_height * ratio))
        left, top = round((width - wide) / 2 - 0.1), round((height - high) / 2 - 0.1)
    else:
        wide, high = max(1, int(own_width * ratio)), max(1, int(own_height * ratio))
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.round(feed["fill"])
    canvas[top : top + high, left : left + wide] = resized(pixels, high, wide, feed["antialias"])
    return canvas, np.array([left, top, left, top]), np.full(4, ratio)


def named(about: dict[str, Any], place: int) -> str:
    names = about.get("class_names") or []
    return names[place] if place < len(names) else str(place)


def classes(scores: np.ndarray, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The five likeliest of one picture's scores."""
    if len(scores) == 1 and len(about.get("class_names", ())) == 2:  # one number for two classes
        is_share = about["answer_ends_in"] == "sigmoid"
        scores = np.array([1 - scores[0] if is_share else 0, scores[0]])
    best = np.argsort(-scores, kind="stable")[:5]
    return [{"name": named(about, int(place)), "score": float(scores[place])} for place in best]


def boxes(
    found: np.ndarray, shift: np.ndarray, scale: np.ndarray, about: dict[str, Any], least: float
) -> list[dict[str, Any]]:
    """What is seen on one picture, in its pixels."""
    return [
        {"name": named(about, int(kind)), "score": float(score), "box": [float(one) for one in (box - shift) / scale]}
        for *box, kind, score in found
        if kind >= 0 and score >= least
    ]
