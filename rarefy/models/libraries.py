"""Models of libraries: ``timm:NAME`` and ``torchvision:NAME``, with ``?option=value&...`` for the library's maker."""

from __future__ import annotations

from typing import Any

from rarefy.data.decoding import RESAMPLING
from rarefy.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from rarefy.errors import InputError
from rarefy.models.source import Request, Source, near, parameters_of
from rarefy.system.dependencies import needs


def timm(request: Request) -> Source | None:
    """``timm:resnet18``, with the input that its pretrained configuration states."""
    if request.prefix != "timm" or not request.rest:
        return None
    name, options = request.name_and_options()
    library = needs("timm", "vision")
    if not library.is_model(name) and ":" not in name and "/" not in name:
        raise InputError(f"{request.text}: timm has no model {name!r}{near(name.split('.')[0], library.list_models())}")
    if request.classes is not None:
        options["num_classes"] = request.classes
    model = request.make(lambda: library.create_model(name, **options))
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    side, given = options.get("img_size"), options.get("in_chans")
    if isinstance(side, int):
        height = width = side
    if isinstance(given, int):
        channels = given
    stated = {"mean": config.get("mean"), "std": config.get("std")} if channels == 3 else {}
    stated |= {"size": width, "crop": config.get("crop_pct"), "interpolation": _resampling(config.get("interpolation"))}
    known = {key: value for key, value in stated.items() if value is not None}
    return Source(request.text, model, (channels, height, width), known)


def _resampling(name: object) -> str | None:
    """What both libraries and we call it; timm draws "random" in training alone."""
    return str(name) if name in RESAMPLING else None


def torchvision(request: Request) -> Source | None:
    """``torchvision:resnet18``, with ImageNet's means."""
    if request.prefix != "torchvision" or not request.rest:
        return None
    name, options = request.name_and_options()
    models = needs("torchvision", "vision").models
    names = models.list_models()
    if name not in names:
        raise InputError(f"{request.text}: torchvision has no model {name!r}{near(name, names)}")
    if request.classes is not None:
        options["num_classes"] = request.classes
    if name in ("googlenet", "inception_v3"):  # their defaults warn, and their auxiliary heads only train
        options = {"init_weights": True, "aux_logits": False, **options}
    if "weights_backbone" in parameters_of(models.get_model_builder(name)):  # which would be downloaded unasked
        options = {"weights_backbone": None, **options}
    model = request.make(lambda: models.get_model(name, **options))
    side = 299 if name == "inception_v3" else 224
    known: dict[str, object] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "size": side}
    if options.get("weights") is not None:
        known |= _of_weights(models, name, str(options["weights"]))
        side = known["size"] if isinstance(known["size"], int) else side
    return Source(request.text, model, (3, side, side), known)


def _of_weights(models: Any, name: str, weights: str) -> dict[str, object]:
    """How torchvision judged those weights; nothing where its settings are of another kind than a classifier's."""
    found = models.get_model_weights(name)[weights.rpartition(".")[2]].transforms()
    resized, cropped = getattr(found, "resize_size", None), getattr(found, "crop_size", None)
    if not resized or not cropped:
        return {}
    mode = _resampling(getattr(getattr(found, "interpolation", None), "value", None))
    return {
        "mean": tuple(found.mean),
        "std": tuple(found.std),
        "size": cropped[0],
        "crop": min(1.0, cropped[0] / resized[0]),
        **({"interpolation": mode} if mode else {}),
    }
