"""Detector: what a family of detectors has in common, so that the task and the steps need not know any.

A detector is a **core**, which is one graph of tensors in and out (backbone, neck and head) and is what is pruned,
distilled and quantised, and what stays around it as it is: how pictures are fed, how outputs become boxes (anchors,
decoding, non-maximum suppression), and the loss. A family is a file of ``detectors/``: a frozen dataclass whose fields
(numbers, words, tuples of them) are all that it must know to read the core's outputs, so it is also a line of text,
``"yolox:classes=80"``, which the graph keeps as ``graph.meta["detector"]`` and a saved folder its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self, runtime_checkable

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from rarefy import plugins
from rarefy.data.boxes.placement import Feed, Resize
from rarefy.errors import InputError
from rarefy.graph import capture as graphs
from rarefy.graph.capture.examples import Inputs
from rarefy.graph.capture.wrapped import unwrapped
from rarefy.graph.nodes import is_graph
from rarefy.tasks.metric import Outputs

__all__ = [
    "Detector",
    "Feed",
    "Resize",
    "Spread",
    "Unordered",
    "as_original",
    "capture",
    "detector_of",
    "found",
    "proposes",
]


class Detector(Protocol):
    """A family, with what is to be known of one of its models."""

    @property
    def classes(self) -> int:
        """How many classes a box can be of; a background is none."""
        ...

    @property
    def feed(self) -> Feed: ...

    @property
    def overlap(self) -> float:
        """IoU from which on the worse of two boxes of a class is left out; 1: none is."""
        ...

    @property
    def least(self) -> float:
        """Score above which something is a box."""
        ...

    @property
    def most(self) -> int:
        """Boxes of a picture."""
        ...

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The family of a user's module, or of a graph (of an ONNX file) by its outputs; None where it is another."""
        ...

    def core(self, model: nn.Module) -> nn.Module:
        """What is captured of a user's module: inputs (N, 3, H, W), as ``feed`` makes them, to the outputs."""
        ...

    def around(self, model: nn.Module, core: nn.Module) -> nn.Module:
        """A copy of the user's module, called as it is, with another core (same outputs) in it."""
        ...

    def scored(self, outputs: Outputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes (N, places, 4) in pixels of the input, and scores (N, places, classes), before suppression.

        Can be traced. Raises OutputError for outputs that are not the family's.
        """
        ...

    def boxes(self, outputs: Outputs, size: tuple[int, int]) -> Tensor:
        """What was found, (N, M, 6), as ``rarefy/data/boxes/boxes.py`` says. size: (H, W) of the input.

        NaN and infinity are no box. Raises OutputError for outputs that are not the family's.
        """
        ...

    def logits(self, outputs: Outputs) -> Tensor:
        """What a loss on logits compares: (N x places, 1 + classes) as softmax takes them, or (N x places x classes, 2)
        of sigmoids; "nothing" is the first column."""
        ...

    def loss(self, outputs: Outputs, targets: Tensor, size: tuple[int, int]) -> Tensor:
        """Mean over the batch, to be minimised. targets: (N, M, 8). size: (H, W) of the input."""
        ...


@runtime_checkable
class Spread(Protocol):
    """A family that knows each side's distance as a distribution."""

    @property
    def spreads(self) -> bool:
        """Does it, with these options?"""
        ...

    def distances(self, outputs: Outputs) -> Tensor:
        """Logits (N, places, 4, bins)."""
        ...


@runtime_checkable
class Unordered(Protocol):
    """A family whose boxes are a set: which of one model's is which of another's is to be found."""

    def partners(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """(N, places of theirs), int64: of each of theirs the one of ours. Of both "scores" and "boxes", relative."""
        ...


def proposes(family: Detector) -> bool:
    """Are its boxes of one class, for a second look that says which?"""
    return bool(getattr(family, "proposes", False))


def found(model: nn.Module) -> Detector | None:
    """The family that knows a user's module, or a graph by its outputs; None: it is no detector, or of no family."""
    for name in plugins.available("detectors"):
        family: Detector | None = plugins.choice_class("detectors", name).of(model)
        if family is not None:
            return family
    return None


def detector_of(graph: nn.Module) -> Detector | None:
    """The family that the graph says it is of; None where it says none. Raises InputError for text that names none."""
    text = graph.meta.get("detector") if is_graph(graph) else None
    family: Detector | None = None if text is None else plugins.resolve("detectors", text)
    return family


def capture(
    model: nn.Module | ExportedProgram, inputs: Inputs | None = None, *, core: str | None = None
) -> fx.GraphModule:
    """The graph of a model; of a detector that of its core, which knows its family (``graph.meta["detector"]``).

    inputs: an example, batch first (any batch size; it stays free in the graph): a tensor, an array, a shape such as
        ``(3, 224, 224)``; a tuple of them for several inputs, or a dictionary by argument name. Of a detector what its
        core takes, pictures (N, 3, H, W) that are normalised already; None: as its maker feeds it.
    core: dotted name of the submodule to capture instead of the whole model, for models whose rest can't be captured;
        ``inputs`` are still those of the whole model.

    A graph is returned as a copy. It takes tensors, by place or by name, and returns what the model returns. Raises
    CaptureError, which names the user's line and the way out.
    """
    model = model if isinstance(model, nn.Module) else unwrapped(model)
    family = None if is_graph(model) or core is not None else found(model)
    if family is not None:
        graph = graphs.capture(family.core(model), (3, *family.feed.size) if inputs is None else inputs)
    elif core is not None and inputs is not None:
        graph = graphs.capture(model, inputs, core=core)
    else:
        graph = graphs.as_graph(model, inputs)
    if graph.meta.get("detector") is None:
        family = found(graph) if family is None else family
        if family is not None:
            graph.meta["detector"] = plugins.describe(family)
    return graph


def as_original(graph: nn.Module, original: nn.Module) -> nn.Module:
    """A detector that is called as ``original`` is, with ``graph`` for its core: what was pruned, trained, quantised.

    original: the module that ``graph`` was once captured of, which is left alone. Pictures go in and boxes come out as
    they do of it. Of a model that is no detector it is the graph itself. Raises InputError where the two are of
    different families.
    """
    family, said = found(original), detector_of(graph)
    if family is None:
        return graph
    if type(said) is not type(family):
        one, other = (plugins.name_of(one) if one else "no detector" for one in (said, family))
        raise InputError(f"the graph is of {one}, and the original is of {other}; give the model that it was made of")
    return family.around(original, graph)
