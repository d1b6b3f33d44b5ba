"""A folder that rarefy saved: its graph, and the preprocessing that its manifest states."""

from __future__ import annotations

import os

from rarefy.artifact import snapshot
from rarefy.errors import FormatError, InputError
from rarefy.graph.shapes import output_shapes
from rarefy.models.source import FORMS, Request, Source, input_shape_of

STATED = ("mean", "std", "crop", "interpolation")


def saved(request: Request) -> Source | None:
    """``small/``; the folder's own weights are used. What else lies in it is read from the same version."""
    text = request.text
    if not os.path.isdir(text):
        return None
    if not any(os.path.lexists(os.path.join(text, name)) for name in (snapshot.GRAPH, snapshot.MANIFEST)):
        raise FormatError(f"{text}: no graph.json in that folder, so rarefy did not save it; give {FORMS}")
    if request.has_weights:
        raise InputError(f"{text}: a saved folder has its own weights; leave out --weights")
    held = snapshot.hold(text, request.key)
    graph = held.graph()
    if request.classes is not None:
        request.check_classes(output_shapes(graph))
    task = held.manifest.get("task")
    known = {key: task[key] for key in STATED if key in task} if isinstance(task, dict) else {}
    shape = input_shape_of(graph)
    if shape is not None and len(shape) == 3 and shape[1] == shape[2]:
        known["size"] = shape[1]
    return Source(text, graph, shape, known, folder=held)
