"""Where a model comes from, as text: the one grammar of the command line and of recipes.

========================== ============================================================================================
``timm:resnet18``          a model of timm; ``?option=value&...`` goes to ``timm.create_model``
``torchvision:resnet18``   a model of torchvision; ``?option=value&...`` goes to ``torchvision.models.get_model``
``package.module:name``    a function that returns a module, a module class, or a module; looked up from the working
                           directory too
``small/``                 a folder that rarefy saved
``model.pt2``              a file of ``torch.export.save``
``onnx:model.onnx``        an ONNX file of floats; ``onnx:`` may be left out
========================== ============================================================================================

A form is a function of the request, in a file of its own, and a place in ``SOURCES``. Nothing here unpickles objects.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from rarefy.errors import CaptureError, InputError, first_line
from rarefy.graph.nodes import is_graph
from rarefy.models.functions import function
from rarefy.models.libraries import timm, torchvision
from rarefy.models.onnx.file import onnx
from rarefy.models.pt2 import exported
from rarefy.models.saved import saved
from rarefy.models.source import FORMS, Form, Request, Source, by, input_shape_of
from rarefy.models.weights import check_finite, load_weights
from rarefy.system.failures import refusal
from rarefy.tasks.detector import capture, found

SOURCES: tuple[Form, ...] = (timm, torchvision, saved, exported, onnx, function)  # the first that knows the text
SIZES = (28, 32, 64, 96, 128, 160, 192, 224, 256, 299, 384)  # that networks for images are made for


def load(
    text: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: int | None = None,
    seed: int = 0,
    key: str | os.PathLike[str] | None = None,
) -> Source:
    """The model that ``text`` names (the forms stand at the top of this file).

    weights: a file to load into it.
    classes: outputs of the classifier, for sources that build one (timm, torchvision, a function that takes
        ``num_classes``).
    seed: of the weights of a model that comes without.
    key: the public key (a file, PEM) of who must have signed the folder that ``text`` names; the bytes that are loaded
        are those that were checked.

    Raises InputError, FormatError, MissingDependency, or SignatureRefused with a key.
    """
    if key is not None and not os.path.isdir(str(text).strip()):
        raise InputError(f"{text}: a key checks the signature of a folder that rarefy saved; leave it out")
    request = Request(str(text).strip(), classes, weights is not None, key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a model without weights is the same one every time
        source = next((source for form in SOURCES if (source := form(request)) is not None), None)
    if source is None and os.path.exists(request.text):
        raise InputError(
            f"{request.text}: a file rarefy can't take a model from; give {FORMS}, "
            "and such a file's weights with --weights"
        )
    if source is None:
        raise InputError(f"{request.text!r}: no such model; give {FORMS}")
    if weights is not None:
        taken = load_weights(source.model, weights)
        source = dataclasses.replace(source, weights=str(weights), taken=taken)
    check_finite(source)
    source.model.eval()
    detector = found(source.model)
    if detector is not None:
        source = dataclasses.replace(source, shape=(3, *detector.feed.size), preprocessing={})
    return source


def graph_of(source: Source, shape: tuple[int, ...] | None = None, core: str | None = None) -> fx.GraphModule:
    """The source's graph: as it is if it came as one, else captured from an example of ``shape``.

    shape: of an input without batch; None: the source's own. core: as in ``capture``.
    Raises InputError for another shape than a graph was captured for, CaptureError for one that the model can't take.
    """
    if is_graph(source.model):
        captured = input_shape_of(source.model) or ()
        if shape is not None and tuple(shape) != captured:
            raise InputError(
                f"{source.text}: was captured for inputs of {by(captured)}, not {by(shape)}; "
                "give inputs and data of that shape, or start from the original"
            )
        return source.model
    example = source.example(shape)
    if core is None:
        ready = source.captured.pop(_shapes(example), None)
        if ready is not None:
            return ready
        _check_runs(source, example)
    graph = capture(source.model, example, core=core)
    if source.names is not None and core is None:
        graph.meta["names"] = {kind: list(names) for kind, names in source.names.items()}
    return graph


def looked_at(source: Source, shape: tuple[int, ...]) -> fx.GraphModule:
    """The source's graph, to see what the model is: ``graph_of`` hands on the same one, once, and captures no other."""
    graph = graph_of(source, shape)
    if not is_graph(source.model):
        source.captured[_shapes(source.example(shape))] = graph
    return graph


def _shapes(example: Tensor | tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(one.shape) for one in ((example,) if isinstance(example, Tensor) else example))


def _check_runs(source: Source, example: Tensor | tuple[Tensor, ...]) -> None:
    """A wrong input shape is told as such, before the trace tells it as a failed capture."""
    examples = (example,) if isinstance(example, Tensor) else example
    detector = found(source.model)
    model = source.model if detector is None else detector.core(source.model)
    try:
        with torch.no_grad():
            model(*examples)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        shape = " and ".join(by(one.shape[1:]) for one in examples)
        refused = refusal(error)
        if refused is not None:
            raise InputError(f"{source.text}: an input of {shape}: {refused}, or a smaller --input") from error
        raise CaptureError(
            f"{source.text}: does not take an input of {shape} ({first_line(error)}); {_right_input(model, examples)}"
        ) from error


def _right_input(model: nn.Module, examples: Sequence[Tensor]) -> str:
    """The way out of an input that the model does not take: of pictures a shape that it does, if a usual one is."""
    if len(examples) == 1 and examples[0].dim() == 4:
        own = tuple(examples[0].shape[1:])
        sides = [own[1:], *((side, side) for side in SIZES)]
        shapes = [(channels, *side) for side in sides for channels in dict.fromkeys((own[0], 3, 1))]
        fits = next((shape for shape in shapes if takes(model, shape)), None)
        if fits is not None:
            data = f"--image-size {fits[1]}" if fits[0] == own[0] else f"--channels {fits[0]} --image-size {fits[1]}"
            return f"it takes {by(fits)}: pass {data} with --data, --input {','.join(map(str, fits))} without"
    return "pass the right --input CHANNELS,HEIGHT,WIDTH"


def takes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Does the model answer to an input of that shape, without batch?"""
    try:
        with torch.no_grad():
            model(torch.zeros(2, *shape))
    except Exception:
        return False
    return True
