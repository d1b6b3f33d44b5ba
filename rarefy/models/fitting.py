"""Fitting: a task's images as the model takes them, where nobody said how.

What the user says holds. Then what the model's maker states (timm's and torchvision's settings, a saved folder), then
what the images say (``rarefy/data/preparation.py``), and of these what the model takes: a shape that nobody states is
tried on it. Of pictures whose size neither says is asked for.

* **Channels**: grey pictures are one channel where the model takes one, colour ones are made grey for it.
* **Normalisation** is in no checkpoint. For weights from a file the usual ones are tried on labelled images
  (``normalization.py``): a wrong one costs accuracy without a word.

What was settled, and by whom, is told in a line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from rarefy.data.images import ImageData, share_opened
from rarefy.data.preparation import SIZE
from rarefy.errors import InputError
from rarefy.graph.nodes import is_graph
from rarefy.models.load import SIZES, looked_at, takes
from rarefy.models.normalization import learned
from rarefy.models.source import Source, by
from rarefy.tasks.classification import Classification
from rarefy.tasks.task import Settling, Task, settled

Fitting = TypeVar("Fitting", bound=Task)


@dataclass(frozen=True)
class Fitted:
    """task: with what was settled. options: that, by the names of the task's options. why: option -> who said it."""

    task: Task
    options: Mapping[str, object]
    why: Mapping[str, str]


def fit(source: Source, task: Task, given: Collection[str]) -> Fitted:
    """The task with what the source's model needs of it. given: options that the user set, which stay.

    Raises InputError where the size of pictures can't be known.
    """
    fields: set[str] = {field.name for field in dataclasses.fields(task)} if dataclasses.is_dataclass(task) else set()
    kind = settled(task, source.model)
    side = getattr(task, "size", None)
    shape = source.shape if source.shape is not None or side is None else (3, side, side)
    if kind is task and isinstance(task, Settling) and shape is not None and not is_graph(source.model):
        kind = settled(task, looked_at(source, shape))  # of a file, or another's module, its graph says it
    if kind is not task:
        own = {name: getattr(kind, name) for name in fields if getattr(kind, name) != getattr(task, name)}
        return Fitted(kind, own, dict.fromkeys(own, "the model's"))
    data = task.data
    if not isinstance(data, ImageData) or not {"size", "channels", "crop"} <= fields:
        return Fitted(task, {}, {})
    open_ = fields - set(given)
    why = dict.fromkeys(set(given) & fields, "as asked")
    stated = {name: value for name, value in source.preprocessing.items() if name in open_}
    found = _shaped(source, data, open_, stated, why)
    for name in ("mean", "std", "interpolation"):
        values = stated.get(name)
        channels = found.get("channels", data.input_shape[0])
        if values is not None and not (isinstance(values, tuple | list) and len(values) not in (1, channels)):
            found[name], why[name] = values, "the model's"
    task = _changed(task, found)
    if task.data.preparation.crop_of == "usual" and "crop" in stated:  # type: ignore[attr-defined]
        found["crop"], why["crop"] = stated["crop"], "the model's"
        task = _changed(task, {"crop": stated["crop"]})
    if source.weights is not None and {"mean", "std"} <= open_ - found.keys() and isinstance(task, Classification):
        normalised = learned(source.model, task)
        if normalised is not None:
            found["mean"], found["std"], why["mean"] = normalised
            task = _changed(task, {"mean": found["mean"], "std": found["std"]})
    return Fitted(task, found, why)


def fit_module(model: nn.Module, task: Task) -> Task:
    """The task with the size and channels that the module takes, where the task leaves them open (None)."""
    if not dataclasses.is_dataclass(task):
        return task
    given = [field.name for field in dataclasses.fields(task) if getattr(task, field.name) is not None]
    was_training = [(module, module.training) for module in model.modules()]
    try:
        return fit(Source(type(model).__name__, model.eval()), task, given).task
    finally:
        for module, training in was_training:
            module.training = training


def told(fitted: Fitted) -> str | None:
    """What images become before the model sees them, and who said so, in a line; None of a task of another kind."""
    data = fitted.task.data
    if not isinstance(data, ImageData):
        return None
    if data.shaping is not None:
        about = data.shaping.describe()
        said = ", ".join(f"{name} {value}" for name, value in about.items() if name != "augment")
        return "; ".join([f"images of {by(data.input_shape)}", said, *_named(fitted.task), *data.notes])
    prepared, normal, why = data.preparation, data.normalization, fitted.why
    own = {"given": "as asked", "the images": "the images' own", "usual": "usual"}
    parts = [f"images of {by(prepared.shape)} (size {why.get('size', own[prepared.size_of])}"]
    parts[0] += f", channels {why['channels']})" if "channels" in why else ")"
    if prepared.pictures:
        whole = "whole" if prepared.crop == 1 else f"crop {prepared.crop:.3g}"
        fits = "" if prepared.crop_of == "the images" else f" ({why.get('crop', own[prepared.crop_of])})"
        parts += [f"{whole}{fits}", data.interpolation]
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (normal.mean, normal.std))
    parts.append(f"minus {mean}, over {std} ({why.get('mean', 'usual')})")
    if prepared.turned:
        parts.append(f"{prepared.turned} pictures looked at are marked as turned (EXIF): read as they lie, not turned")
    return "; ".join([*parts, *_named(fitted.task), *data.notes])


def _named(task: Task) -> list[str]:
    """The classes in words, where they have names."""
    names = getattr(task, "class_names", None)
    if not names:
        return []
    more = f", ... {names[-1]}" if len(names) > 6 else ""
    return [f"{len(names)} classes: {', '.join(names[:5] if more else names)}{more}"]


def _changed(task: Fitting, options: Mapping[str, object]) -> Fitting:
    """The task with other options, its data still open."""
    if not options:
        return task
    changed = dataclasses.replace(task, **options)  # type: ignore[type-var]
    share_opened(task.data, changed.data)  # type: ignore[arg-type]
    return changed


def _shaped(
    source: Source, data: ImageData, open_: Collection[str], stated: Mapping[str, object], why: dict[str, str]
) -> dict[str, object]:
    """Size and channels, as far as they are other than the data's own."""
    prepared = data.preparation
    own = prepared.shape
    if source.shape is not None:
        found: dict[str, object] = {}
        if "size" in open_ and "size" in stated and (prepared.pictures or is_graph(source.model)):
            found["size"], why["size"] = stated["size"], "the model's"
        other = len(source.shape) == 3 and source.shape[0] != own[0]
        if "channels" in open_ and other and (prepared.pictures or own[0] == 1):
            found["channels"], why["channels"] = source.shape[0], "the model's"
        return found
    channels = [own[0]]
    if "channels" in open_:
        channels = (
            [1, 3] if prepared.grey else [own[0], 1] if prepared.pictures else [*{own[0], 3 * (own[0] == 1)} - {0}]
        )
    shape = next((one for count in channels if takes(source.model, one := (count, *own[1:]))), None)
    if shape is None and "size" in open_:
        shape = _other_size(source.model, channels, why)
    elif prepared.size_of == "usual" and prepared.largest is not None and max(prepared.largest) < SIZE:
        raise InputError(
            f"{source.text}: takes pictures of any size, and these are of several, up to "
            f"{prepared.largest[1]}x{prepared.largest[0]}; pass --image-size PIXELS (size=)"
        )
    if shape is None:
        return {}
    found = {}
    if shape[0] != own[0] or (prepared.pictures and "channels" in open_):
        found["channels"], why["channels"] = shape[0], "the model's"
    if shape[1:] != own[1:]:
        found["size"] = shape[1]
    return found


def _other_size(model: nn.Module, channels: Collection[int], why: dict[str, str]) -> tuple[int, int, int] | None:
    """The one size that the model takes, or the usual one of several."""
    taken = [(count, size, size) for size in SIZES for count in channels if takes(model, (count, size, size))]
    sizes = {shape[1] for shape in taken}
    if len(sizes) == 1:
        why["size"] = "the only one that the model takes"
        return taken[0]
    usual = next((shape for shape in taken if shape[1] == SIZE), None)
    if usual is not None:
        why["size"] = "usual; the model does not take the images' own"
    return usual
