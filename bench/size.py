"""Bytes of the codes that a saved folder holds, beside their zeroth-order entropy: what the best coder of single codes
takes.

    python bench/size.py [--only resnet56 --bits 8 4] [--check]

Weights alone are rounded (to the nearest code), a scale an output channel. ResNet-56 has its CIFAR-10 weights, where
$RAREFY_DATA has them; the others are networks of torchvision and timm with random weights. Entropy is of each tensor by
itself. --check: exit 1 where codes take more than 1.05 of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rarefy
from rarefy.artifact import weights

MOST = 1.05  # of the entropy


def resnet56() -> nn.Module:
    import real_data

    return real_data.resnet56()


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]]:
    import timm
    import torchvision

    return {
        "resnet56": (resnet56, (3, 32, 32)),
        "efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), (3, 224, 224)),
        "mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 224, 224)),
        "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), (3, 224, 224)),
    }


def entropy_bytes(codes: Tensor) -> float:
    """Of one tensor's codes, by how often each occurs in it."""
    counts = torch.bincount(codes.reshape(-1).to(torch.int64) + 128, minlength=384).double()
    share = counts[counts > 0] / codes.numel()
    return float(-(share * share.log2()).sum()) * codes.numel() / 8


def measured(name: str, model: nn.Module, shape: tuple[int, int, int], bits: int) -> dict[str, object]:
    quantised = rarefy.quantize(
        rarefy.capture(model.eval(), shape), weights=f"int{bits}", activations="float", rounding="nearest",
        progress=False,
    )  # fmt: skip
    entries, stored = weights.described(quantised, True)
    buffers = dict(quantised.named_buffers())
    codes = [one for one in stored if one in buffers and buffers[one].dtype in (torch.int8, torch.uint8)]
    taken, least = sum(stored[one].nbytes for one in codes), sum(entropy_bytes(buffers[one]) for one in codes)
    ways = sorted({str(entries[one].get("stored", "plain")) for one in codes})
    return {
        "network": name, "bits": bits, "codes": sum(buffers[one].numel() for one in codes), "stored_bytes": taken,
        "entropy_bytes": round(least), "ratio": round(taken / least, 4), "ways": ways,
        "file_bytes": sum(one.nbytes for one in stored.values()),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    parser.add_argument("--check", action="store_true", help="exit 1 where codes take more than 1.05 of their entropy")
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(f"{'network':20} {'bits':>4} {'codes':>10} {'stored':>10} {'entropy':>10} {'ratio':>7}  {'all tensors':>11}")
    for name, (make, shape) in networks().items():
        if given.only and name not in given.only:
            continue
        torch.manual_seed(0)
        try:
            model = make()
        except (OSError, SystemExit, ImportError, rarefy.RarefyError) as error:
            print(f"{name:20} skipped: {error}")
            continue
        for bits in given.bits:
            row = measured(name, model, shape, bits)
            rows.append(row)
            print(
                f"{name:20} {bits:4} {row['codes']:10,} {row['stored_bytes']:10,} {row['entropy_bytes']:10,} "
                f"{row['ratio']:7.4f}  {row['file_bytes']:11,}  {' '.join(row['ways'])}"
            )
    print(json.dumps({"most": MOST, "rows": rows}))
    return int(given.check and (not rows or any(row["ratio"] > MOST for row in rows)))


if __name__ == "__main__":
    sys.exit(main())
