"""The networks whose speed is measured, with random weights: speed does not hang on them. Needs torch, torchvision and timm, nothing of rarefy."""

from __future__ import annotations

import torch
from torch import nn

MODELS = ("efficientnet_lite0", "resnet18", "resnet50", "mobilenet_v3_large", "vit_tiny")
TRANSFORMERS = ("vit_tiny",)


def build(name: str) -> nn.Module:
    """The network, in eval mode, its weights from seed 0."""
    torch.manual_seed(0)
    if name in ("efficientnet_lite0", "vit_tiny"):
        import timm

        return timm.create_model("vit_tiny_patch16_224" if name == "vit_tiny" else "tf_efficientnet_lite0", pretrained=False).eval()
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return network.eval()
