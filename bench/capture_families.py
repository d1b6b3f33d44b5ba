"""Captured models against their originals: outputs (eval) and gradients (train, without dropout), for the classifier
families of torchvision.

    python bench/capture_families.py [FAMILY ...] [--check]

One small model a family, random weights, batch of 3. A difference is the largest absolute one, relative to the largest
absolute value of what it is compared with.
``--check`` exits 1 where an output or a running statistic differs at all, a gradient by more than 1e-6, or a family
can't be captured. Gradients are allowed a rounding error because autograd adds up the paths into a shared tensor in an
order that depends on the graph.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rarefy import capture
from rarefy.cli.terminal import show_table
from rarefy.errors import RarefyError

FAMILIES = {
    "alexnet": 224,
    "convnext_tiny": 224,
    "densenet121": 224,
    "efficientnet_b0": 224,
    "efficientnet_v2_s": 224,
    "googlenet": 224,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_small": 224,
    "regnet_x_400mf": 224,
    "resnet18": 224,
    "resnext50_32x4d": 224,
    "shufflenet_v2_x0_5": 224,
    "squeezenet1_0": 224,
    "swin_t": 224,
    "swin_v2_t": 224,
    "vgg11_bn": 224,
    "vit_b_32": 224,
    "wide_resnet50_2": 224,
}
GRADIENT_TOLERANCE = 1e-6


def built(name: str) -> nn.Module:
    """The model with seed 0, and with everything random in training switched off."""
    import torchvision

    torch.manual_seed(0)
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    model = torchvision.models.get_model(name, weights=None, **options)
    for module in model.modules():
        for attribute in (
            "p",
            "dropout",
            "attention_dropout",
        ):  # of Dropout and StochasticDepth, of attention, of Swin's and MaxViT's attention
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def difference(ours: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Largest over all pairs of max |a - b| / max |b|."""
    return max(
        (
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            for a, b in ((a.double(), b.double()) for a, b in ours)
        ),
        default=0.0,
    )


def examined(name: str) -> dict[str, Any]:
    model, inputs = built(name), torch.randn(3, 3, FAMILIES[name], FAMILIES[name])
    began = time.perf_counter()
    graph = capture(model, inputs)
    seconds = time.perf_counter() - began
    twin = copy.deepcopy(model)  # what the capture may have touched shows as a difference
    with torch.no_grad():
        outputs = difference([(graph.eval()(inputs), twin.eval()(inputs))])
    graph.train()(inputs).square().mean().backward()
    twin.train()(inputs).square().mean().backward()
    ours, theirs = dict(graph.named_parameters()), dict(twin.named_parameters())
    gradients = difference(
        (ours[key].grad, one.grad) for key, one in theirs.items() if key in ours and one.grad is not None
    )
    kept = dict(graph.named_buffers())
    statistics = difference((kept[key], one) for key, one in twin.named_buffers() if key in kept)
    without = sorted(
        key for key, one in theirs.items() if one.grad is not None and (key not in ours or ours[key].grad is None)
    )
    return {
        "output": outputs, "gradient": gradients, "statistics": statistics, "seconds": seconds,
        "parameters": sum(one.numel() for one in theirs.values()), "without_gradient": without,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"default: all {len(FAMILIES)}: {', '.join(FAMILIES)}"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a family falls short")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    given = parser.parse_args()
    for name in given.families:
        if name not in FAMILIES:
            parser.error(f"{name}: no such family; have {', '.join(FAMILIES)}")
    found: dict[str, dict[str, Any]] = {}
    for name in given.families or FAMILIES:
        print(name, file=sys.stderr, flush=True)
        try:
            found[name] = examined(name)
        except RarefyError as error:
            found[name] = {"error": str(error)}
    short = [
        name
        for name, one in found.items()
        if "error" in one
        or one["output"]
        or one["statistics"]
        or one["gradient"] > GRADIENT_TOLERANCE
        or one["without_gradient"]
    ]
    show_table(
        f"capture against original, torch {torch.__version__}",
        ["family", "output", "gradient", "statistics", "seconds"],
        [
            [name, one["error"], "", "", ""]
            if "error" in one
            else [
                name,
                f"{one['output']:.1e}",
                f"{one['gradient']:.1e}",
                f"{one['statistics']:.1e}",
                f"{one['seconds']:.1f}",
            ]
            for name, one in found.items()
        ],
        (1, 2, 3, 4),
    )
    line = json.dumps({"bench": "capture_families", "torch": torch.__version__, "families": found, "short": short})
    print(line)
    if given.out:
        given.out.write_text(line + "\n")
    if short:
        print(f"falls short: {', '.join(short)}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
