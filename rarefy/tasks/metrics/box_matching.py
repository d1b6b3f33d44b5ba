"""Which boxes are found, as COCO judges it: of a batch, all pictures, classes, thresholds and sizes at once.

Of each picture and class the found boxes are taken by falling score, at most ``MOST``. Each takes the box to be found
that it overlaps most, of those that are free, at an intersection over union of at least the threshold; one that is
ignored only where there is no other. A found box that takes one is right; one that takes an ignored box, or takes none
and is not of the size looked at, is neither right nor wrong; any other is wrong. A crowd may be taken by many, and of a
box and a crowd the share of the box inside it counts (pycocotools, which decides ties as here: of boxes that are
overlapped equally the last).

A step is a rank: the first found box of every picture and class at once, then the second.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from rarefy.data.boxes.boxes import AREA, BOTTOM, CLASS, FACTOR, IGNORED, SCORE

Array = np.ndarray
THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
MOST = 100  # found boxes of a picture and class that are judged
_AT_ONCE = 2**22  # intersections in memory
_BITS = (1 << np.arange(len(THRESHOLDS))).astype(np.uint16)
_EVERY = np.uint16(_BITS.sum())


class Matches(NamedTuple):
    """Found boxes of a batch, those of a picture and class by falling score, and what there was to be found.

    picture, kind: (n,) of each; rank: among those of its picture and class. right, ignored: (n, sizes) uint16, a bit a
    threshold. truth: (m, 2), picture and class of each box to be found; counted: (m, sizes) bool, where it is not
    ignored.
    """

    picture: Array
    kind: Array
    rank: Array
    score: Array
    right: Array
    ignored: Array
    truth: Array
    counted: Array


def matched(found: Tensor, targets: Tensor) -> Matches:
    """found: (N, M, 6), targets: (N, K, 8), as ``boxes.py`` says."""
    rows, wanted = (one.detach().cpu().double().numpy() for one in (found, targets))
    factor = wanted[:, -1, FACTOR]
    is_box = (rows[..., CLASS] >= 0) & np.isfinite(rows).all(-1)
    picture, place = np.nonzero(is_box)
    boxes = rows[picture, place]
    order = np.lexsort((-boxes[:, SCORE], boxes[:, CLASS], picture))
    picture, boxes = picture[order], boxes[order]
    kind = boxes[:, CLASS].astype(np.int64)
    rank = _ranks(picture, kind)
    good = rank < MOST
    picture, boxes, kind, rank = picture[good], boxes[good], kind[good], rank[good]
    own = _area(boxes) * factor[picture]
    low, high = np.array(list(SIZES.values())).T
    outside = (own[:, None] < low) | (own[:, None] > high)

    owner, place = np.nonzero(wanted[..., CLASS] >= 0)
    truth = wanted[owner, place]
    area = truth[:, AREA][:, None]
    passed_over = (truth[:, IGNORED] > 0)[:, None] | (area < low) | (area > high)
    of_truth = np.stack([owner, truth[:, CLASS].astype(np.int64)], 1)
    right = np.zeros((len(boxes), len(SIZES)), np.uint16)
    took_ignored = np.zeros_like(right)
    for ours, theirs in _groups(picture, kind, rank, of_truth):
        good, other = _taken(boxes, truth, passed_over, ours, theirs)
        real = ours >= 0
        right[ours[real]], took_ignored[ours[real]] = good[real], other[real]
    neither = np.where(outside, _EVERY & ~right, took_ignored).astype(np.uint16)
    return Matches(picture, kind, rank, boxes[:, SCORE], right, neither, of_truth, ~passed_over)


def _ranks(picture: Array, kind: Array) -> Array:
    """Place of each row among those of its picture and class, which stand together."""
    if not len(picture):
        return np.zeros(0, np.int64)
    first = np.ones(len(picture), bool)
    first[1:] = (picture[1:] != picture[:-1]) | (kind[1:] != kind[:-1])
    places = np.arange(len(picture))
    return places - np.maximum.accumulate(np.where(first, places, 0))


def _groups(picture: Array, kind: Array, rank: Array, truth: Array) -> list[tuple[Array, Array]]:
    """Of pictures and classes with boxes of both kinds: (groups, most found) and (groups, most truth), -1 where none.

    In several parts, so that each fits memory; the groups of most found boxes first.
    """
    if not len(picture) or not len(truth):
        return []
    width = int(max(kind.max(), truth[:, 1].max())) + 1
    ours, theirs = picture * width + kind, truth[:, 0] * width + truth[:, 1]
    keys = np.intersect1d(ours, theirs)
    order = np.argsort(theirs, kind="stable")
    ranks = np.empty(len(theirs), np.int64)
    ranks[order] = _ranks(theirs[order], np.zeros(len(theirs)))
    tables = []
    for key, place in ((ours, rank), (theirs, ranks)):
        at = np.searchsorted(keys, key).clip(max=len(keys) - 1) if len(keys) else np.zeros(len(key), np.int64)
        known = keys[at] == key if len(keys) else np.zeros(len(key), bool)
        table = np.full((len(keys), int(place[known].max(initial=-1)) + 1), -1, np.int64)
        table[at[known], place[known]] = np.flatnonzero(known)
        tables.append(table)
    largest = np.argsort(-(tables[0] >= 0).sum(1), kind="stable")
    parts = []
    while len(largest):
        found, wanted = (table[largest] for table in tables)
        many = max(1, _AT_ONCE // max(1, found.shape[1] * wanted.shape[1]))
        found, wanted, largest = found[:many], wanted[:many], largest[many:]
        parts.append((found[:, (found >= 0).any(0)], wanted[:, (wanted >= 0).any(0)]))
    return parts


def _taken(boxes: Array, truth: Array, passed_over: Array, ours: Array, theirs: Array) -> tuple[Array, Array]:
    """(groups, found, sizes) uint16 each: at which thresholds a box is right, and takes an ignored one."""
    groups, most = ours.shape
    crowd = truth[theirs, IGNORED] > 0
    shared = _overlaps(boxes[ours], truth[theirs], crowd)
    shared[np.broadcast_to((theirs < 0)[:, None], shared.shape)] = -1
    ignored = passed_over[theirs].transpose(0, 2, 1)[:, :, None]  # (groups, sizes, 1, truth)
    free = np.ones((groups, len(SIZES), len(THRESHOLDS), theirs.shape[1]), bool)
    last = theirs.shape[1] - 1
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    good = np.zeros((groups, most, len(SIZES)), np.uint16)
    other = np.zeros_like(good)
    for rank in range(most):
        alive = int((ours[:, rank] >= 0).sum())  # the groups of most boxes come first
        over = shared[:alive, rank, None, None]
        open_ = (over >= least) & (free[:alive] | crowd[:alive, None, None])
        worth = np.where(open_, over + 2.0 * ~ignored[:alive], -1.0)
        pick = last - worth[..., ::-1].argmax(-1)
        best = np.take_along_axis(worth, pick[..., None], -1)[..., 0]
        group, size, threshold = np.nonzero(best >= 0)
        free[group, size, threshold, pick[group, size, threshold]] = False
        good[:alive, rank] = ((best >= 2) * _BITS).sum(-1)
        other[:alive, rank] = (((best >= 0) & (best < 2)) * _BITS).sum(-1)
    return good, other


def _overlaps(found: Array, truth: Array, crowd: Array) -> Array:
    """(groups, found, truth): intersection over union, of a crowd over the found box."""
    low = np.maximum(found[:, :, None, :2], truth[:, None, :, :2])
    high = np.minimum(found[:, :, None, 2:4], truth[:, None, :, 2:4])
    shared = (high - low).clip(0).prod(-1)
    ours, theirs = _area(found)[:, :, None], _area(truth)[:, None]
    whole = np.where(crowd[:, None], ours, ours + theirs - shared)
    found_over: Array = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
    return found_over


def _area(boxes: Array) -> Array:
    sides = (boxes[..., 2 : BOTTOM + 1] - boxes[..., :2]).clip(0)
    area: Array = sides.prod(-1)
    return area
