"""From text to objects: models, data, devices, references."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.cli.options import DataOptions, ModelOptions
from rarefy.cli.terminal import aside
from rarefy.errors import InputError


def share_or_count(value: float | None) -> float | int | None:
    """0.5 is a share; 3e6 is a number of them."""
    return int(value) if value is not None and value > 1 and value == int(value) else value


def shape_of(model: ModelOptions) -> tuple[int, ...] | None:
    from rarefy.models.source import parse_shape

    return parse_shape(model.input) if model.input is not None else None


def loaded(text: str, weights: str | None = None, classes: int | None = None, key: str | None = None) -> Any:
    """The source that the text names; what was taken of a file of weights that holds more is told.

    key: public, of who must have signed it.
    """
    from rarefy.models import load

    source = load.load(text, weights=weights, classes=classes, key=key)
    if source.taken is not None:
        aside(f"{source.weights}: {source.taken}")
    return source


def fitted(
    options: Mapping[str, Any],
    source: Any,
    name: str,
    shape: tuple[int, ...] | None = None,
    pictures: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """The task, and its options with what ``--input``, the model and the images say where the user says nothing.

    pictures: files, in place of validation data. What was settled is told in a line.
    """
    from rarefy.compression import recipe
    from rarefy.models import fitting

    if shape is not None:
        square = {"size": shape[1]} if len(shape) == 3 and shape[1] == shape[2] else {}
        source = dataclasses.replace(source, shape=shape, preprocessing={**source.preprocessing, **square})
    asked = recipe.data_options(options, task=name)
    files = {"val": list(pictures)} if pictures else {}
    found = fitting.fit(source, recipe.make_task({**asked, **files}, name), {*asked, *files})
    line = fitting.told(found)
    if line is not None:
        aside(line)
    return found.task, {**asked, **found.options}


def prepared(
    model: ModelOptions, data: DataOptions, needed: bool = True, key: str | None = None
) -> tuple[Any, Any, Any]:
    """The source, its graph, and the task (None where no data is given and none is needed)."""
    from rarefy.models import load

    options = data.options()
    if needed:
        check_data(options)
    shape = shape_of(model)
    source = loaded(model.model, model.weights, model.classes, key)
    task = fitted(options, source, data.task, shape)[0] if options else None
    graph = load.graph_of(source, agreed_shape(shape, task), model.core)
    return source, graph, task


def check_data(options: Mapping[str, Any]) -> None:
    if not {"train", "val"} & set(options):
        raise InputError("no data is given; pass --data SOURCE, or --train and --val")


def agreed_shape(shape: tuple[int, ...] | None, task: Any) -> tuple[int, ...] | None:
    """The input's shape: as given, which must be what the data gives, or else that."""
    if task is None:
        return shape
    given: tuple[int, ...] = task.data.input_shape
    if shape is not None and shape != given:
        asked, have = (",".join(map(str, one)) for one in (shape, given))
        alike = len(shape) == 3 and shape[1] == shape[2]
        way_out = f", or pass --image-size {shape[1]} --channels {shape[0]}" if alike else ""
        raise InputError(f"--input {asked}: the data gives images of {have}; leave --input out{way_out}")
    return given


def weight_of(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise InputError(f"{where}: {text!r} is not a number; write 2*MODEL") from None
    if not 0 < number < math.inf:
        raise InputError(f"{where}: the weight {text} is not above 0; write 2*MODEL")
    return number


def device_of(text: str | None) -> str | None:
    """The device's name, if it is there."""
    import torch

    if text is None:
        return None
    try:
        torch.empty(0, device=torch.device(text))
    except (RuntimeError, AssertionError) as error:
        have = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(f"--device {text}: no such device here; have {', '.join(have)}") from error
    return text


def reference_graph(reference: str | None, weights: str | None, classes: int | None, task: Any) -> Any:
    from rarefy.models import load

    if reference is None:
        if weights is not None:
            raise InputError("--reference-weights belongs to --reference; name the model too")
        return None
    return load.graph_of(loaded(reference, weights, classes), task.data.input_shape)


@contextlib.contextmanager
def session(runtime: str, source: Any, graph: Any, samples: int) -> Iterator[Callable[..., Any]]:
    """The model in the runtime: the file of the saved folder that it came from, else one exported for the occasion.

    A file of a folder is run from a private copy, made of the bytes that the folder's manifest lists, once it is seen
    to be one that rarefy writes. samples: that are run at once.
    """
    from rarefy import plugins
    from rarefy.deployment import served

    chosen = plugins.resolve("runtimes", runtime)
    name = f"model{chosen.suffix}"
    with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
        file = Path(folder) / name
        if source.folder is not None and name in source.folder:
            source.folder.copy(name, file)
            served.check(file, graph, chosen, str(source.folder.path / name), samples)
        else:
            chosen.export(graph, file)
        yield chosen.open(file)


def output_count(graph: Any, name: str | None = None) -> int | None:
    """Numbers that the model answers an image with; None where it answers otherwise than with a tensor (batch, N).

    name: of the output that is read; None: the only one, or ``logits``.
    """
    from rarefy.graph.shapes import output_shapes
    from rarefy.graph.signature import output_names

    shapes = output_shapes(graph)
    by_name = dict(zip(output_names(graph), shapes, strict=False))
    shape = shapes[0] if len(shapes) == 1 else by_name.get(name or "logits")
    return None if shape is None or len(shape) > 1 else shape[0] if shape else 1
