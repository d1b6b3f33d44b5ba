"""Showing: what models say of a few pictures, as words and drawn, one model's beside another's.

Every model sees a picture as the task feeds it, and the task says what its outputs mean (``tasks/answers.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import fx

from rarefy import plugins
from rarefy.data.decoding import opened
from rarefy.data.formats.imagefolder import images_below
from rarefy.errors import DataError, InputError, first_line
from rarefy.models import fitting
from rarefy.models.source import Source
from rarefy.reports.drawing import Mark, drawn, side_by_side
from rarefy.system.files import replacing
from rarefy.tasks.answers import Answer, Answering
from rarefy.tasks.task import Settling, Task, fitted

MOST_PICTURES = 10_000
MOST_DRAWN = 100  # answers of a picture
USUAL = "classification"


@dataclass(frozen=True)
class Shown:
    """said: model -> what it says of the picture, the surest first. picture: all of it, drawn."""

    file: str
    said: Mapping[str, list[Answer]]
    picture: Image.Image

    def saved(self, folder: Path) -> Path:
        """Into the folder, under the picture's name, or with a number behind it where that is taken."""
        stem, number = Path(self.file).stem, 1
        target = folder / f"{stem}.png"
        while target.exists():
            number += 1
            target = folder / f"{stem}-{number}.png"
        with replacing(target) as partial:
            self.picture.save(partial)
        return target


def pictures(given: Sequence[str]) -> list[str]:
    """Files, and those below each folder. Raises InputError for what is not there, and for too many."""
    files: list[str] = []
    for text in given:
        path = Path(text).expanduser()
        if not path.exists():
            raise InputError(f"{text}: no such picture; give files of pictures, or a folder of them")
        inside = images_below(path) if path.is_dir() else [str(path)]
        if not inside:
            raise InputError(f"{text}: holds no pictures; give files of pictures, or a folder of them")
        files += inside
    if len(files) > MOST_PICTURES:
        raise InputError(f"{len(files):,} pictures; give at most {MOST_PICTURES:,} at a time")
    return files


def kind_of(source: Source, files: Sequence[str]) -> str:
    """The name of the task whose kind the model is: one that knows it, else classification."""
    for name in plugins.tasks():
        task: Task = plugins.task_class(name)(val=list(files))
        if isinstance(task, Settling) and fitting.fit(source, task, ()).task is not task:
            return name
    return USUAL


def shown(
    models: Mapping[str, fx.GraphModule], task: Task, files: Sequence[str], names: Sequence[str] | None, least: float
) -> list[Shown]:
    """Of each picture what each model says, and both drawn.

    models: by the names that stand above the pictures. task: whose validation images are the files. names: of the
    classes; None: as the first model's maker says that has any. least: score of the boxes that are shown.
    Raises DataError for a picture that can't be read, InputError for a task whose answers can't be shown.
    """
    names = names if names is not None else next(filter(None, map(_names, models.values())), None)
    tasks: dict[str, Answering] = {}
    for name, model in models.items():
        one = fitted(task, model)
        if not isinstance(one, Answering):
            raise InputError(f"{task.name}: has no answers(), so what its models say can't be shown; write it")
        tasks[name] = one
    found = []
    for file, (inputs, _) in zip(files, task.data.batches("val", 1, labelled=False), strict=True):
        picture = _upright(file)
        size = [(picture.height, picture.width)]
        with torch.no_grad():
            said = {
                name: tasks[name].answers(model.eval()(inputs), size, names, least)[0] for name, model in models.items()
            }
        rows = [
            drawn(picture, [Mark(one.text, one.kind, one.corners) for one in said[name][:MOST_DRAWN]]) for name in said
        ]
        found.append(Shown(file, said, side_by_side(rows, [os.path.basename(name) or name for name in said])))
    return found


def _names(model: fx.GraphModule) -> list[str] | None:
    told = model.meta.get("task")
    names = told.get("class_names") if isinstance(told, Mapping) else None
    return list(map(str, names)) if isinstance(names, list | tuple) else None


def _upright(file: str) -> Image.Image:
    try:
        picture = opened(file, file, 3, ImageOps.exif_transpose)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read ({first_line(error)}); leave it out") from error
    if not isinstance(picture, Image.Image):
        raise DataError(f"{file}: is an array, which can't be drawn on; give a picture")
    return picture
