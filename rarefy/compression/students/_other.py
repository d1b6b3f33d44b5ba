"""Another model: any that ``rarefy/models/load.py`` can name, with the teacher's input and number of classes."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from torch import fx

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.graph.nodes import device_of
from rarefy.graph.shapes import output_shapes
from rarefy.models import functions, load
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task


def of(text: str) -> Other | None:
    """The model that is named; None where ``package.module:Name`` is a student of the user's own, a dataclass."""
    module, _, name = text.partition(":")
    name = name.partition(":")[0]
    if "." in module and re.fullmatch(r"[A-Za-z_][\w.]*", module) and name.isidentifier():
        named = functions.imported(module, name, text)
        if isinstance(named, type) and dataclasses.is_dataclass(named):
            return None
    return Other(text)


@dataclass(frozen=True)
class Other:
    """text: as ``load`` takes it. Built with as many outputs as the teacher has, where a library builds it."""

    text: str

    def make(self, teacher: fx.GraphModule, task: Task | None, seed: int) -> fx.GraphModule:
        try:
            built = any(self.text.startswith(prefix) for prefix in ("timm:", "torchvision:"))
            source = load.load(self.text, classes=_classes(teacher) if built else None, seed=seed)
        except InputError as error:
            kinds = ", ".join(plugins.available("students"))
            raise InputError(f"student={self.text!r}: neither one of {kinds}, nor a model ({error})") from error
        specs = teacher.meta["inputs"]
        graph = capture(load.graph_of(source, tuple(specs[0]["shape"])))
        return graph.train(teacher.training).to(device_of(teacher))


def _classes(teacher: fx.GraphModule) -> int:
    shapes = output_shapes(teacher)
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise InputError(
            f"the teacher answers {shapes}, not one number a class; give a student of your own as a module"
        )
    return shapes[0][0]
