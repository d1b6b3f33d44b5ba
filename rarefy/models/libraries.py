"""Models of libraries: ``timm:NAME`` and ``torchvision:NAME``, with ``?option=value&...`` for the library's maker.

A maker takes more than sizes: files that it unpickles (``checkpoint_path``), addresses (``hf-hub:``,
``pretrained_cfg``), folders (``cache_dir``), classes. The text of a model may come from a stranger's recipe, so what is
passed on is a number or a flag, or one word for the options in ``_WORDS``, which the library looks up in a table of its
own; and the name is one that the library lists.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rarefy.data.decoding import RESAMPLING
from rarefy.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from rarefy.errors import InputError
from rarefy.models.source import Option, Request, Source, near, parameters_of
from rarefy.system.dependencies import needs

# Options that name a file, an address or code; even a number would be one.
_OUTSIDE = {
    "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "local_dir", "root", "url", "file",
    "feature_cls", "block_args", "trust_remote_code", "hf_hub_id", "state_dict", "weights_path",
}  # fmt: skip
# Options of timm's makers whose value is a word.
_WORDS = {
    "act_layer", "attn_act_layer", "attn_layer", "attn_type", "down_op", "downsample", "dw_act_layer", "fc_act_layer",
    "global_pool", "head_fn", "norm_layer", "norm_layer_cl", "pad_type", "pool_type", "pos_embed", "rel_pos_type",
    "rope_type", "se_layer", "stem_type", "union", "version", "weight_init",
}  # fmt: skip
# "" is a value too: no pooling, no initialization of its own.
_WORD = re.compile(r"[A-Za-z0-9_]{0,40}")
_MEMBER = re.compile(r"([A-Za-z0-9_]{1,60}\.)?[A-Za-z0-9_]{1,60}")  # of torchvision's tables of weights


def timm(request: Request) -> Source | None:
    """``timm:resnet18``, with the input that its pretrained configuration states."""
    if request.prefix != "timm" or not request.rest:
        return None
    name, options = request.name_and_options()
    library = needs("timm", "vision")
    if ":" in name or "/" in name:
        raise InputError(
            f"{request.text}: {name!r} is a place, not a name of timm's; download it yourself, check it, and give its "
            "weights with --weights FILE.safetensors"
        )
    _check_options(request, options, _WORDS, _WORD)
    if not library.is_model(name):
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


def _check_options(
    request: Request, options: Mapping[str, Option], words: Collection[str], word: re.Pattern[str]
) -> None:
    """Raises InputError for an option that could name a file, an address or code.

    words: the options whose value is text, of the form ``word``.
    """
    for name, value in options.items():
        if name in _OUTSIDE:
            raise InputError(
                f"{request.text}: {name} names a file, an address or code, which is not passed on; give weights with "
                "--weights FILE.safetensors, or make the model in a function of your own (package.module:function)"
            )
        if isinstance(value, str) and not (name in words and word.fullmatch(value)):
            kind = "a name out of the library's own table" if name in words else "a number, true, false or none"
            raise InputError(
                f"{request.text}: {name} takes {kind}, not {value[:80]!r}; "
                "make any other model in a function of your own (package.module:function)"
            )


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
    _check_options(request, options, {"weights", "weights_backbone"}, _MEMBER)
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
