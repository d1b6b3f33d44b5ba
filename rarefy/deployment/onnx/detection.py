"""The row of what was found: boxes and scores of all places to the best boxes of each picture, in operators of ONNX.

NonMaxSuppression yields a list of whatever length. It becomes a mask of the candidates, and the best of these are rows
(batch, most, 6) again, as ``rarefy.kernels.detections`` has them.
"""

from __future__ import annotations

import torch
from torch import fx

from rarefy.deployment.onnx.writer import Arguments, Row, Writer
from rarefy.kernels.detections import NONE

_LARGEST = 3e38  # NaN and infinity are not below it


def _detections(w: Writer, node: fx.Node, g: Arguments) -> str:
    boxes, scores = w.value(g["boxes"], torch.float32), w.value(g["scores"], torch.float32)
    classes = w.fixed(g["scores"], 2)
    places = w.fixed(g["boxes"], 1) * classes
    count, most = min(g["candidates"], places), g["most"]
    flat = w.op("Reshape", [_usable(w, boxes, scores), w.constant([-1, places])])
    best, order = w.ops("TopK", [flat, w.constant([count])], 2)
    place = _rows(w, w.op("Div", [order, w.constant(classes)]))
    kind = w.op("Mod", [order, w.constant(classes)])
    found = w.op("GatherND", [boxes, place], batch_dims=1)
    if g["overlap"] < 1:
        best = _staying(w, found, best, kind, classes, g)
        best, order = w.ops("TopK", [best, w.constant([min(most, count)])], 2)
        found = w.op("GatherND", [found, _rows(w, order)], batch_dims=1)
        kind = w.op("GatherElements", [kind, order], axis=1)
    else:
        best, kind, found = (w.sliced(one, 1, 0, min(most, count)) for one in (best, kind, found))
    columns = [found, _rows(w, w.cast(kind, torch.float32)), _rows(w, best)]
    nothing = w.constant([0.0, 0.0, 0.0, 0.0, NONE, 0.0], torch.float32)
    sure = w.op("Greater", [columns[2], w.constant(g["least"], torch.float32)])
    rows = w.op("Where", [sure, w.op("Concat", columns, axis=2), nothing])
    if count >= most:
        return rows
    batch = w.op("Concat", [w.op("Shape", [rows], start=0, end=1), w.constant([most - count, 6])], axis=0)
    return w.op("Concat", [rows, w.op("Expand", [nothing, batch])], axis=1)


def _usable(w: Writer, boxes: str, scores: str) -> str:
    """The scores, 0 where they or the box are no numbers."""
    largest, zero = w.constant(_LARGEST, torch.float32), w.constant(0.0, torch.float32)
    sides = w.cast(w.op("Less", [w.op("Abs", [boxes]), largest]), torch.float32)
    whole = w.op("Greater", [w.op("ReduceMin", [sides, w.constant([2])], keepdims=1), zero])
    numbers = w.op("Less", [w.op("Abs", [scores]), largest])
    return w.op("Where", [w.op("And", [whole, numbers]), scores, zero])


def _staying(w: Writer, found: str, best: str, kind: str, classes: int, g: Arguments) -> str:
    """The candidates' scores (batch, count), 0 of those that a better one of their class overlaps."""
    by_class = w.op("Unsqueeze", [best, w.constant([1])])
    if classes > 1:
        own = w.op("Equal", [w.op("Unsqueeze", [kind, w.constant([1])]), w.constant([[[k] for k in range(classes)]])])
        by_class = w.op("Where", [own, by_class, w.constant(0.0, torch.float32)])
    limits = [w.constant([g["most"]]), *(w.constant([g[name]], torch.float32) for name in ("overlap", "least"))]
    chosen = w.op("NonMaxSuppression", [found, by_class, *limits])
    at = w.op("Gather", [chosen, w.constant([0, 2])], axis=1)
    ones = w.op("Expand", [w.constant(1.0, torch.float32), w.op("Shape", [at], start=0, end=1)])
    mask = w.op("ScatterND", [w.op("Mul", [best, w.constant(0.0, torch.float32)]), at, ones])
    return w.op("Mul", [best, mask])


def _rows(w: Writer, name: str) -> str:
    return w.op("Unsqueeze", [name, w.constant([2])])


ROWS: dict[str, Row] = {"rarefy.detections": _detections}
