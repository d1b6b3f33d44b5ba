"""export(): the file that a runtime runs, put in place only when it is whole, and compared with the model."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.artifact.folder import placing
from rarefy.deployment import description, pictures
from rarefy.deployment.runtime import Inputs, Runtime, several
from rarefy.errors import FormatError, InputError, MissingDependency
from rarefy.graph.capture.batches import Arranger
from rarefy.graph.nodes import dtype_name, example_inputs
from rarefy.system.files import replacing
from rarefy.tasks.detector import capture, detector_of, proposes
from rarefy.tasks.task import Task


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    runtime: Runtime | str | None = None,
    inputs: Inputs | None = None,
    task: Task | None = None,
    compare: bool = True,
    boxes: bool = True,
) -> dict[str, Any]:
    """Write ``model`` for ``runtime`` to ``path``, and say how its answers differ from the model's.

    The file says what the model is for, and ``predict.py`` is written beside an ONNX file that takes pictures
    (``rarefy/deployment/description.py``); another's file of that name stays.

    path: a file there is replaced, and stays as it was if anything fails. In a saved folder, its manifest lists it
        then; a signed one is refused.
    runtime: a choice of ``rarefy.runtimes``, as an object or as text; None: by the file's name, ``.onnx`` for
        ``onnxruntime``, ``.xml`` for ``openvino`` (a ``.bin`` lies beside it), ``.zip`` for ``inductor``, ``.tflite``
        ``litert``, ``.pte`` for ``executorch``.
    inputs: an example batch, of each input: needed where ``model`` is not captured yet and no task says what it takes,
        and what is compared on (else random numbers).
    task: what the model is for; None: what it was made for by the step that made it.
    compare: False returns an empty dictionary.
    boxes: a detector's file takes pictures (N, H, W, 3) uint8 of its size and tells what was found (``pictures``);
        False, and of Faster R-CNN: it is its core's, from normalised inputs to raw outputs.

    Returns a ``rarefy.deployment.runtime.Parity``; warns where it did not pass. Raises InputError for a layer the
    runtime can't run, and for a name that belongs to another runtime.
    """
    target = Path(path)
    chosen = runtime_of(target, runtime)
    graph = description.remember(capture(description.graph_for(model, inputs, task)).eval(), task)
    given = given_to(graph, inputs)
    if len(given) != len(graph.meta["inputs"]):
        raise InputError(
            f"export: {len(given)} inputs are given, the model takes {len(graph.meta['inputs'])}; pass all"
        )
    graph, given = fed(graph, given, boxes)
    with placing(target) as place:
        with _placed(place) as partial, _told(graph, target, partial, chosen):
            chosen.export(graph, partial)
            parity = dict(chosen.compare(graph, partial, given)) if compare else {}
        if place == target or not os.path.lexists(target.with_name(description.PROGRAM)):
            description.write_program(graph, place)
    if parity.get("passed") is False:
        warnings.warn(f"{target}: {doubt(parity, 'inputs')}", stacklevel=2)
    return parity


def fed(graph: fx.GraphModule, given: tuple[Tensor, ...], boxes: bool) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """What a file is made of and what it is run on: of a detector, from pictures to boxes, where they are asked."""
    family = detector_of(graph) if boxes else None
    if family is None or proposes(family):
        return graph, given
    return pictures.with_boxes(graph, family), (pictures.pictures_of(given[0], family.feed),)


def given_to(graph: fx.GraphModule, inputs: Any) -> tuple[Tensor, ...]:
    """What is compared on, by place: random numbers where only shapes, or nothing, are given."""
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else [] if inputs is None else several(inputs)
    if not isinstance(inputs, Mapping) and parts and all(isinstance(one, Tensor) for one in parts):
        return tuple(parts)
    if isinstance(inputs, np.ndarray) or any(isinstance(one, (Tensor, np.ndarray)) for one in parts):
        return Arranger(graph, "export")(inputs)
    return example_inputs(graph, batch=8)


def doubt(parity: dict[str, Any], samples: str) -> str:
    """What to say of a parity that did not pass. samples: what was compared on, in a word."""
    layer = parity.get("first_diverging_layer")
    where = "no layer differs by itself" if layer is None else f"{layer} is the first layer that differs"
    way_out = "" if layer is None else f", or quantise again with that layer left in float (ignore={layer!r})"
    return (
        f"gives the model's answer on {parity['agreement']:.1%} of {parity['samples']} {samples}, and {where}; "
        f"the file is written, do not deploy it: choose another runtime{way_out}"
    )


def runtime_of(path: Path, runtime: Runtime | str | None = None) -> Runtime:
    """The runtime that a file of that name is for.

    runtime: what was asked for; None: the first whose files end so. Raises InputError where they contradict each other.
    """
    chosen: Runtime | None = None if runtime is None else plugins.resolve("runtimes", runtime)
    suffix = path.suffix.lower()
    if chosen is not None and suffix in suffixes_of(chosen):
        return chosen
    all_runtimes: list[Runtime] = [plugins.resolve("runtimes", name) for name in plugins.available("runtimes")]
    other = next((one for one in all_runtimes if suffix in suffixes_of(one)), None)
    if chosen is None:
        return other or plugins.resolve("runtimes", "onnxruntime")
    if other is not None:
        raise InputError(
            f"{path}: a {suffix} file is for {plugins.name_of(other)}, and {plugins.name_of(chosen)} is asked for; "
            f"give a name that ends in {' or '.join(suffixes_of(chosen))}, or leave the runtime out"
        )
    return chosen


def suffixes_of(runtime: Runtime) -> tuple[str, ...]:
    """How names of the runtime's files may end, its own way first."""
    return (runtime.suffix, *runtime.capabilities.suffixes)


@contextlib.contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """A name beside ``target`` to write to; what lies there at the end takes its place, with what was written beside it
    (OpenVINO's weights)."""
    with replacing(target) as partial:
        beside = f"{glob.escape(str(partial.with_suffix('')))}.*"
        try:
            yield partial
            for one in (Path(name) for name in glob.glob(beside)):
                if one != partial:
                    os.replace(one, target.with_suffix(one.suffix))
        finally:
            for name in glob.glob(beside):
                if name != str(partial):
                    os.remove(name)


@contextlib.contextmanager
def _told(graph: fx.GraphModule, target: Path, partial: Path, runtime: Runtime) -> Iterator[None]:
    """Errors by the file's own name; of a model in half or double precision, with what helps."""
    try:
        yield
    except InputError as error:
        why = str(error).replace(str(partial), str(target))
        other = next((name for name in _precisions(graph) if name != "float32"), None)
        if other is not None:
            raise InputError(
                f"{target}: a model in {other} can't be written for {plugins.name_of(runtime)}, or run there; export "
                f"model.float(), captured from float32 inputs ({why.partition('; ')[0]})"
            ) from error
        if isinstance(error, FormatError):
            raise FormatError(why) from error
        if isinstance(error, MissingDependency):
            raise
        raise InputError(why) from error.__cause__


def _precisions(graph: fx.GraphModule) -> list[str]:
    """Types of the floats that the graph holds and takes."""
    held = (one.dtype for one in itertools.chain(graph.parameters(), graph.buffers()) if one.is_floating_point())
    taken = (getattr(torch, str(one["dtype"])) for one in graph.meta["inputs"])
    return sorted({dtype_name(one) for one in (*held, *taken) if one.is_floating_point})
