"""The networks whose speed is measured, with random weights: speed does not hang on them, as long as biases are not
zero, which a trained network's are not: OpenVINO takes
an addition of zeros out, and so a network as timm makes it is faster than it will be. Needs torch, torchvision and
timm, nothing of rarefy."""

from __future__ import annotations

import torch
from torch import nn

MODELS = ("efficientnet_lite0", "resnet18", "resnet50", "mobilenet_v3_large", "vit_tiny")
TRANSFORMERS = ("vit_tiny",)


def build(name: str) -> nn.Module:
    """The network, in eval mode, its weights from seed 0."""
    torch.manual_seed(0)
    network: nn.Module
    if name in ("efficientnet_lite0", "vit_tiny"):
        import timm

        network = timm.create_model(
            "vit_tiny_patch16_224" if name == "vit_tiny" else "tf_efficientnet_lite0", pretrained=False
        )
    else:
        import torchvision

        network = torchvision.models.get_model(name, weights=None)
    for part, value in network.named_parameters():
        if part.endswith("bias") and not value.any():
            nn.init.normal_(value, std=0.02)
    return network.eval()
