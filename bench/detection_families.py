"""Every detector of torchvision and seven of transformers, with random weights and small pictures: does it go all the
way?

    python bench/detection_families.py [--only NAME ...] [--seconds S] [--check]

Of each: its family is found and its core captured; half of the channels leave; a step of training moves it; saved and
loaded again it answers bit by bit as before; in int8 it is written as ONNX, run in ONNX Runtime, and answers as the
graph does there; and it is called as the original was. Each runs in a process of its own. Mask and Keypoint R-CNN
answer with more than boxes, and are no detectors here.

``--check`` exits 1 where one stops on the way that is not in ``KNOWN``, which says why; 2 where none ran.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rarefy
from rarefy import plugins
from rarefy.cli.terminal import show_table
from rarefy.data.boxes.boxes import padded
from rarefy.tasks.detector import capture, detector_of

TORCHVISION = (
    "ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)  # fmt: skip
BY_SCORE = ("rt_detr", "rt_detr_v2", "d_fine")  # their queries are places, chosen by their scores
STAGES = ("captured", "pruned", "trained", "loaded", "quantised", "exported", "compared", "called")
LEAST_SNR = 30.0  # dB, of the file's answers to the graph's
KNOWN: dict[str, str] = {}  # network -> at which stage it stops, and why
PLACES = 336  # of 128 x 128 pixels at strides 8, 16 and 32
HALF = 4  # classes of the transformers


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    small = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 192}
    make = getattr(torchvision.models.detection, name)
    model: nn.Module = make(weights=None, weights_backbone=None, num_classes=1 + HALF, **small)
    return model


def backbone(transformers: Any, kind: str = "ResNetConfig") -> Any:
    return getattr(transformers, kind)(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def transformers_models() -> dict[str, Callable[[], nn.Module]]:
    import transformers as t

    common: dict[str, Any] = {"num_labels": HALF, "num_queries": 12, "decoder_layers": 2}
    old = {
        **common, "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "d_model": 32,
        "encoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }  # fmt: skip
    new = {
        **common, "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [32, 48, 64],
        "decoder_in_channels": [32] * 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_attention_heads": 2,
        "encoder_attention_heads": 2, "num_denoising": 0, "anchor_image_size": [128, 128],
        "with_box_refine": True, "feat_strides": [8, 16, 32], "num_queries": PLACES,
    }  # fmt: skip

    def made(name: str, config: str, options: dict[str, Any], kind: str = "") -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            given = dict(options)
            if kind:
                given["backbone_config"] = backbone(t, kind)
            model: nn.Module = getattr(t, f"{name}ForObjectDetection")(getattr(t, f"{config}Config")(**given))
            return model

        return make

    yolos = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": [64, 96], "num_detection_tokens": 12, "num_labels": HALF,
    }  # fmt: skip
    return {
        "detr": made("Detr", "Detr", old, "ResNetConfig"),
        "conditional_detr": made("ConditionalDetr", "ConditionalDetr", old, "ResNetConfig"),
        "deformable_detr": made("DeformableDetr", "DeformableDetr", {**old, "num_feature_levels": 3}, "ResNetConfig"),
        "yolos": made("Yolos", "Yolos", yolos),
        "rt_detr": made("RTDetr", "RTDetr", new, "RTDetrResNetConfig"),
        "rt_detr_v2": made("RTDetrV2", "RTDetrV2", new, "RTDetrResNetConfig"),
        "d_fine": made("DFine", "DFine", {**new, "decoder_n_points": [4, 4, 4]}, "RTDetrResNetConfig"),
    }


def size_of(name: str) -> tuple[int, int] | None:
    """(H, W) that the core of a transformer is captured at; None: the model's own."""
    if name in TORCHVISION:
        return None
    return (64, 96) if name in ("yolos", "detr", "conditional_detr", "deformable_detr") else (128, 128)


def in_order(answers: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """The answers of one picture, each query in the place of the one of ``wanted`` that it is nearest to.

    Queries that are the best places by their scores come in the order of the scores, which says nothing where they tie,
    as those of random weights and codes do. All places are asked for, so that the same ones are chosen.
    """
    ours, theirs = (torch.cat([one[0] for one in some], -1).double() for some in (wanted, answers))
    nearest = torch.cdist(ours, theirs).argmin(1)
    return [one[:, nearest] for one in answers]


def snr(answers: Any, wanted: Any) -> float:
    """Decibels, the least of the outputs that say anything."""
    pairs = zip(pytree.tree_leaves(answers), pytree.tree_leaves(wanted), strict=True)
    found = [float(10 * torch.log10(b.square().mean() / (a - b).square().mean().clamp_min(1e-20))) for a, b in pairs]
    return min(found)


def examined(name: str) -> dict[str, Any]:
    """How far it goes: {"reached": stage, "why": message or None, "seconds": ..., "snr": dB}."""
    torch.manual_seed(0)
    facts: dict[str, Any] = {"network": name, "reached": "", "why": None}
    began = time.perf_counter()
    try:
        for stage in _stages(name, facts):
            facts["reached"] = stage
    except Exception as error:  # what stops a network is told, of whatever kind
        facts["why"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return facts


def _stages(name: str, facts: dict[str, Any]) -> Any:
    model = (torchvision_model(name) if name in TORCHVISION else transformers_models()[name]()).eval()
    size = size_of(name)
    graph = capture(model, None if size is None else (3, *size))
    family = detector_of(graph)
    if family is None:
        raise RuntimeError("no family knows it")
    facts["family"] = plugins.describe(family).partition(":")[0]
    shape = tuple(graph.meta["inputs"][0]["shape"])
    inputs = torch.randn(2, *shape)
    for count in (1, 3):  # the batch is free
        graph(torch.randn(count, *shape))
    yield "captured"
    small = rarefy.prune(graph, keep=0.5, progress=False)
    facts["params"] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in graph.parameters())
    if facts["params"] > 0.9:
        raise RuntimeError(f"{facts['params']:.0%} of the parameters are left")
    yield "pruned"
    target = padded([torch.tensor([[8.0, 8, 56, 48, 1, 0, 0, 1]]), torch.zeros(0, 8)], 8)
    loss = family.loss(small.train()(inputs), target, (shape[1], shape[2]))
    loss.backward()  # type: ignore[no-untyped-call]
    if not any(one.grad is not None and one.grad.abs().sum() > 0 for one in small.parameters()):
        raise RuntimeError("nothing learns")
    small.eval().zero_grad()
    yield "trained"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rarefy.save(small, Path(folder) / "small")
        again = rarefy.load(Path(folder) / "small")
        for one, other in zip(pytree.tree_leaves(again(inputs)), pytree.tree_leaves(small(inputs)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        yield "loaded"
        codes = rarefy.quantize(small, batches=[torch.randn(4, *shape) for _ in range(2)], progress=False)
        yield "quantised"
        runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
        file = Path(folder) / "small.onnx"
        runtime.export(codes, file)
        yield "exported"
        theirs, ours = runtime.open(file).outputs(inputs[:1]), _plain(codes(inputs[:1]))
        facts["snr"] = round(snr(in_order(theirs, ours) if name in BY_SCORE else theirs, ours), 1)
        if facts["snr"] < LEAST_SNR:
            raise RuntimeError(f"the file's answers are {facts['snr']} dB from the graph's")
        yield "compared"
        whole = rarefy.as_original(codes, model).eval()
        whole([torch.rand(3, 90, 120), torch.rand(3, 120, 90)]) if name in TORCHVISION else whole(
            pixel_values=inputs[:1]
        )
        yield "called"


def _plain(outputs: Any) -> list[Tensor]:
    return [one.float() for one in pytree.tree_leaves(outputs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=600, help="of each network")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="exit 1 where one stops on the way")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(examined(given.one)))
        return 0
    rows, skipped = [], {}
    names = [*TORCHVISION]
    try:
        names += list(transformers_models())
    except ImportError as error:
        skipped["transformers"] = str(error)
    for name in given.only or names:
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=given.seconds,
                check=False, env=dict(os.environ),
            )  # fmt: skip
            lines = done.stdout.strip().splitlines()
            last = (done.stderr.strip().splitlines() or [""])[-1][:160]
            row = json.loads(lines[-1]) if lines else {"network": name, "reached": "", "why": last}
        except subprocess.TimeoutExpired:
            row = {"network": name, "reached": "", "why": f"over {given.seconds:.0f} seconds"}
        rows.append(row)
        print(f"{name}: {row['reached']} {row['why'] or ''}", file=sys.stderr, flush=True)
    columns = ["network", "family", "goes to", "parameters", "dB", "s", "why not on"]
    show_table("Detectors, all the way", columns, [
        [row["network"], row.get("family", ""), row["reached"], f"{row['params']:.2f}" if "params" in row else "",
         row.get("snr", ""), row.get("seconds", ""), row["why"] or ""] for row in rows
    ])  # fmt: skip
    short = [f"{row['network']}: {row['why']}" for row in rows if row["why"] and row["network"] not in KNOWN]
    for line in [
        *(f"skipped {name}: {why}" for name, why in skipped.items()),
        *(f"falls short: {one}" for one in short),
    ]:
        print(line, file=sys.stderr)
    print(json.dumps({"bench": "detection_families", "rows": rows, "skipped": skipped, "known": KNOWN, "short": short}))
    return 2 if not rows else int(bool(short) and given.check)


if __name__ == "__main__":
    raise SystemExit(main())
