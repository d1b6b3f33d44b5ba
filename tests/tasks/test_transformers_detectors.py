"""Detectors of transformers, from configurations with random weights: read, matched, taught and called as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from rarefy import plugins
from rarefy.data.boxes.boxes import SCORE, iou, padded, present
from rarefy.errors import InputError
from rarefy.tasks.detector import capture, detector_of

SIZE = (64, 96)


def detr() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, use_pretrained_backbone=False, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=10, num_labels=3,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config).eval()


def target() -> torch.Tensor:
    return padded([torch.tensor([[24.0, 16, 72, 48, 1, 0, 0, 1]]), torch.zeros(0, 8)], 8)


def test_detr_is_called_as_it_was_and_its_loss_is_its_own() -> None:
    model = detr()
    graph = capture(model, (3, *SIZE))
    family = detector_of(graph)
    assert family is not None and graph.meta["detector"] == "detr:classes=3"
    again, inputs = rarefy.as_original(graph, model), torch.randn(2, 3, *SIZE)
    labels = [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    one, other = again(pixel_values=inputs, labels=labels), model(pixel_values=inputs, labels=labels)
    assert type(one) is type(other)
    torch.testing.assert_close(one.pred_boxes, other.pred_boxes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(family.loss(graph(inputs), target(), SIZE), other.loss, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="do_pad"):
        again(pixel_values=inputs, pixel_mask=torch.zeros(2, *SIZE))
    small = rarefy.prune(graph, keep=0.5)
    assert sum(one.numel() for one in small.parameters()) < 0.5 * sum(one.numel() for one in graph.parameters())
    family.loss(small.train()(inputs), target(), SIZE).backward()


@pytest.mark.parametrize("softmax", [True, False])
def test_the_loss_teaches_what_boxes_reads(softmax: bool) -> None:
    family = plugins.resolve("detectors", f"detr:classes=3,size=64/96,softmax={softmax}")
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, 6, 3 + softmax).requires_grad_()
    boxes = torch.randn(2, 6, 4, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([logits, boxes], 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        family.loss({"logits": logits, "pred_boxes": boxes.sigmoid()}, target(), SIZE).backward()
        optimizer.step()
    first, second = family.boxes({"logits": logits, "pred_boxes": boxes.sigmoid()}, SIZE)
    sure = first[present(first) & (first[:, SCORE] > 0.3)]
    assert len(sure) == 1 and sure[0, 4] == 1 and iou(sure, target()[0, :1]).item() > 0.9
    assert not (present(second) & (second[:, SCORE] > 0.3)).any()
