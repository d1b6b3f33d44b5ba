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

import difflib
import importlib
import inspect
import io
import json
import logging
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # the exception alone: what torch.load raises for what it refuses
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.errors import CaptureError, FormatError, InputError, MissingDependency
from rarefy.graph.capture import capture, is_graph, output_shapes

FORMS = "timm:NAME, torchvision:NAME, package.module:function, a folder saved by rarefy, or a .pt2 file"


@dataclass(frozen=True)
class Source:
    """A model and what its maker says of its input.

    text: what was asked for.
    model: the module, in eval mode, on the CPU.
    shape: its input without batch, ``(3, 224, 224)``, or None where nobody says.
    preprocessing: ``mean``, ``std`` (a float a channel), ``size`` (pixels), ``crop`` (share of the resized image kept), ...,
        as far as the maker states them; they are ``Classification``'s options of the same names.
    weights: what was loaded into it, or None: as the source made it.
    """

    text: str
    model: nn.Module
    shape: tuple[int, ...] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def example(self, shape: tuple[int, ...] | None = None, batch: int = 2) -> Tensor:
        """An input of that shape (else the source's own): standard normal numbers, the same every time."""
        chosen = shape or self.shape
        if chosen is None:
            raise InputError(f"{self.text}: nothing says what its input looks like; pass --input, for example --input 3,224,224")
        return torch.randn((batch, *chosen), generator=torch.Generator().manual_seed(0))


def load(text: str, *, weights: str | os.PathLike[str] | None = None, classes: int | None = None, seed: int = 0) -> Source:
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
        raise InputError(f"{text}: a file rarefy can't take a model from; give {FORMS}, and such a file's weights with --weights")
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


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the tensors of ``path`` into ``model``, every one at its place.

    Raises InputError where a tensor is missing, unexpected or of another shape (the first of each kind is named, and how many
    there are); FormatError for a file that is broken or that holds objects.
    """
    found = _strip(read_weights(path))
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    shapes = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    wrong = []
    if shapes:
        first = shapes[0]
        hint = "; pass --classes" if found[first].shape[1:] == wanted[first].shape[1:] else ""
        wrong.append(f"{first} is {_by(found[first].shape)} there and {_by(wanted[first].shape)} in the model{_more(shapes)}{hint}")
    if missing:
        wrong.append(f"{missing[0]} is missing there{_more(missing)}")
    if unexpected:
        wrong.append(f"{unexpected[0]} is not in the model{_more(unexpected)}")
    if wrong:
        raise InputError(f"{path}: does not fit the model: {'; '.join(wrong)}; give the weights of this very architecture")
    model.load_state_dict(found, strict=False)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a safetensors file or of a checkpoint, without running anything the file says."""
    file = Path(path)
    if not file.exists():
        raise InputError(f"{file}: no such file; --weights takes a .safetensors file or a checkpoint of model.state_dict()")
    if file.is_dir():
        raise InputError(f"{file}: is a folder; --weights takes a file (a folder saved by rarefy is given as the model itself)")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise FormatError(f"{file}: is no safetensors file ({error}); download or write it again") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise FormatError(
            f"{file}: holds more than tensors, and loading it would run code of the file; "
            "save the weights alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{file}: is no checkpoint torch can read ({_first_line(error)}); give .safetensors or torch.save(model.state_dict())"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise FormatError(f"{file}: no named tensors in it; save model.state_dict() (alone, or under the key 'state_dict' or 'model')")
    return tensors


def parse_shape(text: str) -> tuple[int, ...]:
    """``"3,224,224"`` or ``"3x224x224"`` -> ``(3, 224, 224)``."""
    try:
        shape = tuple(int(part) for part in re.split(r"[,x]", text.strip().strip("()")) if part.strip())
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input {text!r}: give positive sizes without the batch, for example 3,224,224")
    return shape


def parse_value(text: str) -> Any:
    """An option's value: a number, true, false, none, or else text."""
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _options(rest: str, text: str) -> tuple[str, dict[str, Any]]:
    name, _, query = rest.partition("?")
    options = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{text!r}: {part!r} is no option; write ?name=value&name=value")
        options[key] = parse_value(value)
    return name, options


def _timm(text: str, name: str, options: dict[str, Any], classes: int | None) -> Source:
    timm = _library("timm", "vision")
    if not timm.is_model(name) and ":" not in name and "/" not in name:
        raise InputError(f"{text}: timm has no model {name!r}{_near(name.split('.')[0], timm.list_models())}")
    if classes is not None:
        options["num_classes"] = classes
    model = _made(text, lambda: timm.create_model(name, **options))
    config = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(config.get("input_size") or (3, 224, 224))
    if isinstance(options.get("img_size"), int):
        shape = (shape[0], options["img_size"], options["img_size"])
    if isinstance(options.get("in_chans"), int):
        shape = (options["in_chans"], *shape[1:])
    known = {"mean": config.get("mean"), "std": config.get("std"), "size": shape[-1], "crop": config.get("crop_pct")}
    kept = {key: value for key, value in known.items() if value is not None}
    return Source(text, model, shape, kept if shape[0] == 3 else {"size": shape[-1]})


def _torchvision(text: str, name: str, options: dict[str, Any], classes: int | None) -> Source:
    torchvision = _library("torchvision", "vision")
    names = torchvision.models.list_models()
    if name not in names:
        raise InputError(f"{text}: torchvision has no model {name!r}{_near(name, names)}")
    if classes is not None:
        options["num_classes"] = classes
    if name in ("googlenet", "inception_v3"):  # their defaults warn, and their auxiliary heads only train
        options = {"init_weights": True, "aux_logits": False, **options}
    if "weights_backbone" in _parameters(torchvision.models.get_model_builder(name)):  # which would be downloaded unasked
        options = {"weights_backbone": None, **options}
    model = _made(text, lambda: torchvision.models.get_model(name, **options))
    side = 299 if name == "inception_v3" else 224
    means = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Source(text, model, (3, side, side), {**means, "size": side})


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
            raise InputError(f"{text}: takes no num_classes, so --classes can't be passed on; leave it out, or add that parameter")
        options[taken] = classes
    model = _made(text, lambda: target(**options))
    if not isinstance(model, nn.Module):
        raise InputError(f"{text}: returned a {type(model).__name__}; it must return a torch.nn.Module")
    return Source(text, model, _shape_of(model))


def imported(module: str, name: str, text: str) -> Any:
    """What ``package.module:name`` names; the working directory is searched too."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(f"{text}: no module {error.name!r} here or installed; give {FORMS}") from error
    except AttributeError as error:
        have = [key for key in vars(importlib.import_module(module)) if not key.startswith("_")]
        raise InputError(f"{text}: {module} has no {name!r}{_near(name, have)}") from error
    except Exception as error:
        raise InputError(f"{text}: importing {module} failed: {type(error).__name__}: {_first_line(error)}; mend that module") from error


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
    known = {key: task[key] for key in ("mean", "std", "crop", "interpolation") if key in task} if isinstance(task, dict) else {}
    shape = _shape_of(graph)
    if shape is not None and len(shape) == 3 and shape[1] == shape[2]:
        known["size"] = shape[1]
    return Source(text, graph, shape, known)


def _check_classes(text: str, own: list[tuple[int, ...]], classes: int) -> None:
    """What is made already can't be given other classes; the same number is no contradiction (``--classes`` is meant for a reference beside it, too)."""
    if own != [(classes,)]:
        raise InputError(f"{text}: was made with outputs of {', '.join(map(_by, own))}, not {classes}; leave out --classes")


def _shape_of(model: nn.Module) -> tuple[int, ...] | None:
    if isinstance(model, fx.GraphModule) and is_graph(model):
        return tuple(model.meta["inputs"][0]["shape"])
    stated = getattr(model, "input_shape", None)
    return tuple(stated) if isinstance(stated, (tuple, list)) and all(isinstance(size, int) for size in stated) else None


def _exported(text: str, classes: int | None) -> Source:
    content = _checked_pt2(text)
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(content))
        module = program.module(check_guards=False)
    except Exception as error:
        raise FormatError(
            f"{text}: torch {torch.__version__} can't read it ({_first_line(error)}); save it again with torch.export.save"
        ) from error
    for name in ("train", "eval"):  # they refuse; the graph that capture makes of it has working ones
        vars(module).pop(name, None)
    inputs = [
        node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise InputError(f"{text}: takes {len(inputs)} inputs; rarefy's commands take models of one image tensor")
    if isinstance(inputs[0].shape[0], int):
        raise CaptureError(
            f"{text}: was exported for batches of {inputs[0].shape[0]} only; "
            "export it again with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
        )
    if classes is not None:
        answers = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_outputs]
        _check_classes(text, [tuple(value.shape[1:]) for value in answers], classes)
    sizes = inputs[0].shape[1:]
    return Source(text, module, tuple(sizes) if all(isinstance(size, int) for size in sizes) else None)


# What a .pt2 may hold: operators by these names, and sizes written with these characters (torch hands them to sympify).
_OPERATORS = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+")
_EXPRESSION = re.compile(r"[A-Za-z0-9_ +\-*/%(),<>=!&|~]*")
_SYMPY_NAMES = set(
    "Symbol Integer Add Mul Pow Max Min Mod FloorDiv CeilDiv CleanDiv PythonMod ModularIndexing IntTrueDiv Where Eq Ne Ge Gt Le Lt And Or Not "
    "Equality Unequality GreaterThan LessThan StrictGreaterThan StrictLessThan positive nonnegative integer True False oo int_oo".split()
)


def _checked_pt2(text: str) -> bytes:
    """The file's bytes, if nothing in it is more than data."""
    path = Path(text)
    if not path.is_file():
        raise InputError(f"{text}: no such file; give {FORMS}")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise FormatError(f"{text}: {damaged} is damaged; copy or write the file again")
            names = archive.namelist()
            roots = {name.partition("/")[0] for name in names}
            if len(roots) != 1 or len(set(names)) != len(names):
                raise FormatError(f"{text}: is not laid out as torch.export.save does; save it again")
            parts = [name.partition("/")[2] for name in names]
            for name, part in zip(names, parts, strict=True):
                why = _why_unsafe(part, lambda name=name: archive.read(name))  # type: ignore[misc]
                if why:
                    raise FormatError(
                        f"{text}: {part}: {why}; save it again with torch.export.save from a model of tensors and ATen operators only"
                    )
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, NotImplementedError) as error:
        raise FormatError(f"{text}: is no .pt2 file ({_first_line(error)}); write one with torch.export.save") from error
    if not any(part.startswith("models/") for part in parts):
        raise FormatError(f"{text}: holds no model; write one with torch.export.save")
    return content


def _why_unsafe(part: str, read: Callable[[], bytes]) -> str | None:
    """Why a part of a .pt2 can't be trusted, or None."""
    if part.startswith("data/aotinductor/"):
        return "is compiled code, not a model"
    if part.startswith(("data/weights/", "data/constants/")) and part.endswith(".pt"):
        return "is of the old format that unpickles objects"
    if part.startswith("data/sample_inputs/"):
        try:
            torch.load(io.BytesIO(read()), map_location="cpu", weights_only=True)
        except Exception:
            return "holds objects that would run code when loaded"
    if part.endswith("_config.json"):
        for payload in json.loads(read()).get("config", {}).values():
            if payload.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
                return f"{payload.get('path_name')} is pickled"
    if part.startswith("models/"):
        for key, value in _strings(json.loads(read())):
            if key == "target" and not _OPERATORS.fullmatch(value):
                return f"operator {value!r} is none of torch's"
            if key == "expr_str" and not _is_size(value):
                return f"{value!r} is no size expression"
    return None


def _is_size(expression: str) -> bool:
    expression = re.sub(r"'([su]\d+)'", r"\1", expression)
    names = re.findall(r"[A-Za-z_]\w*", expression)
    return bool(_EXPRESSION.fullmatch(expression)) and all(re.fullmatch(r"[su]\d+", name) or name in _SYMPY_NAMES for name in names)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


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


def _check_finite(source: Source) -> None:
    for name, value in source.model.state_dict().items():
        if value.is_floating_point() and not math.isfinite(value.sum(dtype=torch.float64).item()):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise InputError(
                    f"{source.weights or source.text}: {name} holds {bad} values that are NaN or infinite; give weights from before the training diverged"
                )


def _made(text: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except MissingDependency:
        raise
    except Exception as error:
        raise InputError(
            f"{text}: making it failed: {type(error).__name__}: {_first_line(error)}; check the name and the options after '?'"
        ) from error


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(name, extra) from error


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _near(name: str, have: list[str]) -> str:
    close = difflib.get_close_matches(name, have, n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(close)}" if close else f"; it has {len(have)} others"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _by(shape: Any) -> str:
    return "x".join(str(int(size)) for size in shape) or "a single number"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


class _quiet:
    """torch.export's loader logs what it does; none of it is for the user."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("torch")
        self.level = self.logger.level
        self.logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
