"""Where a model comes from, as text: the one grammar of the command line and of recipes.

========================== ==================================================================================
``timm:resnet18``          a model of timm; ``?option=value&...`` goes to ``timm.create_model``
``torchvision:resnet18``   a model of torchvision; ``?option=value&...`` goes to ``torchvision.models.get_model``
``package.module:name``    a function that returns a module, a module class, or a module; looked up from the working
                           directory too
``small/``                 a folder that rarefy saved
``model.pt2``              a file of ``torch.export.save``
========================== ==================================================================================

Weights are a safetensors file or a checkpoint that ``torch.load(weights_only=True)`` can read: a state_dict, or one under
``state_dict`` or ``model``; the prefixes of DataParallel and torch.compile are taken off. Every tensor must find its place.

Nothing here unpickles objects. ``torch.export.load`` would (it falls back to the full unpickler for sample inputs, and
evaluates expressions of the file), so a ``.pt2`` is looked through first, and one that holds more than tensors, ATen operators
and plain size expressions is refused.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import CaptureError, FormatError, InputError
from rarefy.graph.capture import capture
from rarefy.graph.nodes import is_graph
from rarefy.graph.shapes import output_shapes
from rarefy.models.libraries import _timm, _torchvision, imported
from rarefy.models.pt2 import _exported
from rarefy.models.source import (
    FORMS,
    Source,
    _by,
    _check_classes,
    _first_line,
    _made,
    _parameters,
    _shape_of,
    parse_value,
)
from rarefy.models.weights import _check_finite, load_weights


def load(
    text: str, *, weights: str | os.PathLike[str] | None = None, classes: int | None = None, seed: int = 0
) -> Source:
    """The model that ``text`` names (the forms stand at the top of this file), with ``weights`` from a file.

    classes: outputs of the classifier, for sources that build one (timm, torchvision, a function that takes ``num_classes``).
    seed: of the weights of a model that comes without. Raises InputError, FormatError or MissingDependency.
    """
    text = str(text).strip()
    prefix, _, rest = text.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a model without weights is the same one every time
        source = _made_from(text, prefix, rest, weights, classes)
    if weights is not None:
        load_weights(source.model, weights)
        source = Source(source.text, source.model, source.shape, source.preprocessing, str(weights))
    _check_finite(source)
    source.model.eval()
    return source


def _made_from(text: str, prefix: str, rest: str, weights: Any, classes: int | None) -> Source:
    if prefix in ("timm", "torchvision") and rest:
        name, options = _options(rest, text)
        return (_timm if prefix == "timm" else _torchvision)(text, name, options, classes)
    if os.path.isdir(text):
        return _folder(text, weights, classes)
    if text.endswith(".pt2"):
        return _exported(text, classes)
    if rest and re.fullmatch(r"[A-Za-z_][\w.]*", prefix) and re.fullmatch(r"[A-Za-z_]\w*(\?.*)?", rest):
        name, options = _options(rest, text)
        return _function(text, prefix, name, options, classes)
    if os.path.exists(text):
        raise InputError(
            f"{text}: a file rarefy can't take a model from; give {FORMS}, and such a file's weights with --weights"
        )
    raise InputError(f"{text!r}: no such model; give {FORMS}")


def graph_of(source: Source, shape: tuple[int, ...] | None = None, core: str | None = None) -> Any:
    """The source's graph: as it is if it came as one, else captured from an example of ``shape``."""
    if is_graph(source.model):
        own = _shape_of(source.model) or ()
        if shape is not None and tuple(shape) != own:
            raise InputError(
                f"{source.text}: was captured for inputs of {_by(own)}, not {_by(shape)}; leave --input, --image-size and --channels out, or start from the original"
            )
        return source.model
    example = source.example(shape)
    if core is None:
        _check_runs(source, example)
    return capture(source.model, example, core=core)


def _options(rest: str, text: str) -> tuple[str, dict[str, Any]]:
    name, _, query = rest.partition("?")
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{text!r}: {part!r} is no option; write ?name=value&name=value")
        options[key] = parse_value(value)
    return name, options


def _function(text: str, module: str, name: str, options: dict[str, Any], classes: int | None) -> Source:
    target = imported(module, name, text)
    if isinstance(target, nn.Module):
        if options or classes is not None:
            raise InputError(f"{text}: is a module already made; leave out --classes and the options after '?'")
        return Source(text, target, _shape_of(target))
    if not callable(target):
        raise InputError(f"{text}: is a {type(target).__name__}; name a function that returns a torch.nn.Module")
    if classes is not None:
        taken = next((key for key in ("num_classes", "classes", "n_classes") if key in _parameters(target)), None)
        if taken is None:
            raise InputError(
                f"{text}: takes no num_classes, so --classes can't be passed on; leave it out, or add that parameter"
            )
        options[taken] = classes
    model = _made(text, lambda: target(**options))
    if not isinstance(model, nn.Module):
        raise InputError(f"{text}: returned a {type(model).__name__}; it must return a torch.nn.Module")
    return Source(text, model, _shape_of(model))


def _folder(text: str, weights: Any, classes: int | None) -> Source:
    if not os.path.isfile(os.path.join(text, "graph.json")):
        raise FormatError(f"{text}: no graph.json in that folder, so rarefy did not save it; give {FORMS}")
    if weights is not None:
        raise InputError(f"{text}: a saved folder has its own weights; leave out --weights")
    from rarefy.artifact import folder

    graph = folder.load(text)
    if classes is not None:
        _check_classes(text, output_shapes(graph), classes)
    task = folder.read_manifest(text).get("task")
    known = (
        {key: task[key] for key in ("mean", "std", "crop", "interpolation") if key in task}
        if isinstance(task, dict)
        else {}
    )
    shape = _shape_of(graph)
    if shape is not None and len(shape) == 3 and shape[1] == shape[2]:
        known["size"] = shape[1]
    return Source(text, graph, shape, known)


def _check_runs(source: Source, example: Tensor) -> None:
    """A wrong input shape is told as such, before the trace tells it as a failed capture."""
    try:
        with torch.no_grad():
            source.model(example)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        shape = _by(example.shape[1:])
        raise CaptureError(
            f"{source.text}: does not take an input of {shape} ({_first_line(error)}); pass the right --input CHANNELS,HEIGHT,WIDTH"
        ) from error
