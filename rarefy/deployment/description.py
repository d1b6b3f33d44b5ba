"""What a model is for and how it is fed, as its saved graph and its files say it, and the program that reads that.

``graph.meta["task"]`` holds what the task says of a picture's way into the model: steps put it there, so that it is
saved and exported with the graph. A file holds it as JSON under the key ``rarefy``, with the names of inputs and
outputs; ``predict.py`` beside the file reads it and does the same to a picture as the evaluation does
(``rarefy/data/decoding.py``), with numpy, Pillow and ONNX Runtime alone.

::

    {"rarefy": "0.1.0", "task": "classification", "class_names": ["cat", "dog"],
     "inputs": [{"name": "x", "shape": [3, 224, 224], "dtype": "float32"}], "outputs": ["output"],
     "answer": "output", "answer_ends_in": "logits",
     "preprocessing": {"channels": "RGB", "size": [224, 224], "crop": 0.875, "interpolation": "bilinear",
                       "range": [0, 1], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}

``answer`` is the output that the task reads, ``answer_ends_in`` says whether it is logits or what a softmax or sigmoid
makes. ``crop`` is the share of the resized picture that is seen: the shorter side becomes round(size / crop), then the
middle is cut out (where ``crop`` is 1, a picture of the model's size is taken as it is); null: the whole picture is
resized to ``size``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from rarefy.data.images import ImageData
from rarefy.data.items import Arrays
from rarefy.deployment.runtime import Inputs
from rarefy.errors import DataError
from rarefy.graph.nodes import Value, device_of, is_graph
from rarefy.graph.signature import input_names, last_operators, output_names
from rarefy.kernels.detections import OPERATOR as DETECTIONS
from rarefy.system.files import replacing
from rarefy.tasks import reading
from rarefy.tasks.detector import capture, detector_of
from rarefy.tasks.task import Task

KEY = "rarefy"  # of the JSON in a file's metadata
PROGRAM, MARK = "predict.py", b"Written by rarefy"
PREPROCESSING = {"channels", "size", "crop", "interpolation", "range", "mean", "std"}
_TEMPLATE, _BOXES = (Path(__file__).with_name(name) for name in ("predict.txt", "predict_boxes.txt"))


def remember(graph: fx.GraphModule, task: Task | None) -> fx.GraphModule:
    """The graph, which knows from now on what it is for; as it was, without a task."""
    if task is not None:
        graph.meta["task"] = of_task(task)
    return graph


def remember_source(graph: fx.GraphModule, known: Mapping[str, object]) -> fx.GraphModule:
    """The graph, which knows what the model's maker says of its input, where nobody has said it before.

    known: ``mean``, ``std``, and perhaps ``crop`` and ``interpolation``.
    """
    shape = graph.meta["inputs"][0]["shape"]
    if "preprocessing" in graph.meta.get("task", {}) or not {"mean", "std"} <= known.keys() or len(shape) != 3:
        return graph
    channels, height, width = shape
    graph.meta["task"] = {
        **graph.meta.get("task", {}),
        "preprocessing": {
            "channels": {1: "L", 3: "RGB"}.get(channels, str(channels)),
            "size": [height, width],
            "crop": float(str(known.get("crop", 0.875))),
            "interpolation": str(known.get("interpolation", ImageData.interpolation)),
            "range": [0, 1],
            "mean": [float(value) for value in np.atleast_1d(np.asarray(known["mean"], dtype=np.float64))],
            "std": [float(value) for value in np.atleast_1d(np.asarray(known["std"], dtype=np.float64))],
        },
    }
    return graph


def graph_for(model: nn.Module, inputs: Inputs | None, task: Task | None) -> fx.GraphModule:
    """A graph of ``model``: itself where it is one, else captured from ``inputs``, or from images of the task's shape.

    Raises CaptureError where neither is given.
    """
    if is_graph(model):
        return model
    if inputs is None and task is not None:
        inputs = torch.zeros(2, *task.data.input_shape, device=device_of(model))
    return capture(model, inputs)


def of_task(task: Task) -> dict[str, Value]:
    """What the task says: its name, names of classes where it has them, preprocessing where images are prepared by
    ``ImageData``."""
    about: dict[str, Value] = {"task": str(task.name)}
    with contextlib.suppress(DataError):  # of a split that is not there
        names = getattr(task, "class_names", None)
        if names is not None:
            about["class_names"] = [str(name) for name in names]
    if getattr(task, "output", None) is not None:
        about["output"] = str(getattr(task, "output", None))
    if isinstance(task.data, ImageData) and task.data.shaping is None:  # else the graph's family says it
        about["preprocessing"] = _preprocessing(task.data)
    return about


def _preprocessing(data: ImageData) -> dict[str, Value]:
    channels, height, width = data.input_shape
    return {
        "channels": {1: "L", 3: "RGB"}.get(channels, str(channels)),
        "size": [height, width],
        "crop": None if _whole(data) else float(data.preparation.crop),
        "interpolation": data.interpolation,
        "range": [0, 1],
        "mean": [float(value) for value in data.normalization.mean],
        "std": [float(value) for value in data.normalization.std],
    }


def _whole(data: ImageData) -> bool:
    """Are images resized as they are, without a crop? So are those that come as numbers (``decoding.py``)."""
    source = data.source(data.splits[0])
    if isinstance(source, Arrays):
        return True
    first = source.item_or_none(0)[0]
    return isinstance(first, (np.ndarray, Tensor)) or str(first).lower().endswith(".npy")


def of(graph: fx.GraphModule) -> dict[str, Value]:
    """What a file says of itself."""
    told = graph.meta.get("task")
    about: dict[str, Value] = {KEY: importlib.import_module("rarefy").__version__}
    if isinstance(told, Mapping):
        about |= {key: told[key] for key in ("task", "class_names", "preprocessing") if key in told}
    about["inputs"] = [
        {"name": name, **spec} for name, spec in zip(input_names(graph), graph.meta["inputs"], strict=True)
    ]
    about["outputs"] = output_names(graph)
    about["answer"] = _answer(about["outputs"], told.get("output") if isinstance(told, Mapping) else None)
    makers = dict(zip(about["outputs"], tree_leaves(last_operators(graph)), strict=False))
    about["answer_ends_in"] = reading.ending(str(makers.get(about["answer"], "")), None) or "logits"
    family = detector_of(graph)
    if family is not None:
        about["detector"] = str(graph.meta["detector"])
        if is_whole(graph):
            about |= {"feed": {**dataclasses.asdict(family.feed)}, "answer_ends_in": "boxes"}
            about.pop("preprocessing", None)
    return about


def is_whole(graph: fx.GraphModule) -> bool:
    """Does the graph take pictures as they are, and tell what was found (``pictures.with_boxes``)?"""
    (output,) = graph.graph.find_nodes(op="output")
    return [one.target for one in tree_leaves(output.args[0]) if isinstance(one, fx.Node)] == [DETECTIONS]


def _answer(names: Sequence[str], asked: object) -> str:
    """The output that the task reads, as ``rarefy/tasks/reading.py`` has it."""
    wanted = [str(asked), str(asked).replace(".", "_"), "logits"]
    return next((name for name in wanted if name in names), names[0] if names else "")


def text_of(graph: fx.GraphModule) -> str:
    """The same as JSON, its keys in order."""
    return json.dumps(of(graph), sort_keys=True)


def write_program(graph: fx.GraphModule, file: Path) -> Path | None:
    """``predict.py`` beside an ONNX file; None where there is nothing to write, or another's file of that name is."""
    target = file.with_name(PROGRAM)
    text = program_for(graph, file.name) if file.suffix.lower() == ".onnx" else None
    if text is None or (target.exists() and MARK not in target.read_bytes()[:200]):
        return None
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target


def program_for(graph: fx.GraphModule, file: str) -> str | None:
    """``predict.py`` for an ONNX file of that name.

    None where the model takes something else than one picture, or nobody said how it is prepared.
    """
    told = of(graph)
    if "feed" in told:
        return _BOXES.read_text(encoding="utf-8").replace('"MODEL"', json.dumps(file))
    known = told.get("preprocessing")
    pictures = isinstance(known, Mapping) and known.keys() >= PREPROCESSING and known["channels"] in ("L", "RGB")
    if not pictures or len(told["inputs"]) != 1:
        return None
    return _TEMPLATE.read_text(encoding="utf-8").replace('"MODEL"', json.dumps(file))
