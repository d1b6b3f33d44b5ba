"""Models of libraries: ``timm:NAME`` and ``torchvision:NAME``, with ``?option=value&...`` for the library's maker."""

from __future__ import annotations

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
    stated = {"mean": config.get("mean"), "std": config.get("std"), "size": width, "crop": config.get("crop_pct")}
    known = {key: value for key, value in stated.items() if value is not None}
    return Source(request.text, model, (channels, height, width), known if channels == 3 else {"size": width})


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
    means = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Source(request.text, model, (3, side, side), {**means, "size": side})
