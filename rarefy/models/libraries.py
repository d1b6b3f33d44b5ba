from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from rarefy.errors import InputError, MissingDependency
from rarefy.models.source import FORMS, Source, _first_line, _made, _near, _parameters


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
    if "weights_backbone" in _parameters(
        torchvision.models.get_model_builder(name)
    ):  # which would be downloaded unasked
        options = {"weights_backbone": None, **options}
    model = _made(text, lambda: torchvision.models.get_model(name, **options))
    side = 299 if name == "inception_v3" else 224
    means = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Source(text, model, (3, side, side), {**means, "size": side})


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
        raise InputError(
            f"{text}: importing {module} failed: {type(error).__name__}: {_first_line(error)}; mend that module"
        ) from error


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(name, extra) from error
