"""torchvision's detectors: their boxes and losses are told from the core's outputs alone, and a compressed core is
called as the original was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import rarefy
from rarefy import plugins
from rarefy.data.boxes.boxes import SCORE, TARGET_COLUMNS, padded, present
from rarefy.errors import InputError
from rarefy.tasks.detector import capture, detector_of, found
from tests.detecting import torchvision_detector

NAMES = ("ssd", "retinanet", "fcos", "faster_rcnn")
BOXES = [torch.tensor([[10.0, 12, 60, 50], [30, 30, 62, 60]]), torch.tensor([[5.0, 5, 50, 40]])]
LABELS = [torch.tensor([1, 3]), torch.tensor([2])]


def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision_detector(name)


def targets() -> Tensor:
    rows = [torch.cat([box, label[:, None] - 1.0], 1) for box, label in zip(BOXES, LABELS, strict=True)]
    return padded([F.pad(one, (0, TARGET_COLUMNS - 5)) for one in rows], TARGET_COLUMNS)


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 60, 90, generator=generator), torch.rand(3, 100, 70, generator=generator)]


def fed(model: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with pictures taken as they are, such pictures, and what they are to the core."""
    plain = copy.copy(model)
    plain._modules = dict(model._modules)
    old = model.transform
    plain.transform = torchvision.models.detection.transform.GeneralizedRCNNTransform(
        size[0], max(size), old.image_mean, old.image_std, fixed_size=(size[1], size[0])
    )
    inputs = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(one)[:, None, None] for one in (old.image_mean, old.image_std))
    return plain, inputs, (inputs - mean) / std


@pytest.mark.parametrize("name", ["ssd", "retinanet", "fcos"])
def test_boxes_and_loss_are_torchvisions_own(name: str) -> None:
    model = detector(name)
    family = found(model)
    assert family is not None and family.classes == 3
    assert plugins.resolve("detectors", plugins.describe(family)) == family
    size = family.feed.size
    plain, inputs, normalised = fed(model, size)
    with torch.no_grad():
        outputs = family.core(model)(normalised)
        theirs = plain(list(inputs))
        losses = plain.train()(list(inputs), [{"boxes": a, "labels": b} for a, b in zip(BOXES, LABELS, strict=True)])
        # batch norm of the backbone is in training there, too
        taught = family.core(model)(normalised)
    torch.testing.assert_close(family.loss(taught, targets(), size), sum(losses.values()), rtol=1e-4, atol=1e-4)
    model.eval()
    for own, other in zip(family.boxes(outputs, size), theirs, strict=True):
        own, real = own[present(own)], other["labels"] > 0
        count = min(len(own), int(real.sum()), 50)  # the background's boxes have taken places of theirs
        assert count > 20
        torch.testing.assert_close(own[:count, SCORE], other["scores"][real][:count], rtol=1e-4, atol=1e-4)
        # boxes of one score may change places
        mine = torch.cat([own[:count, :4], 1000 * own[:count, 4:5]], 1)
        all_theirs = torch.cat([other["boxes"][real], 1000 * (other["labels"][real][:, None] - 1.0)], 1)
        assert torch.cdist(mine, all_theirs, p=torch.inf).amin(1).max() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_core_is_called_as_the_original(name: str) -> None:
    model = detector(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = capture(model)
    again = rarefy.as_original(graph, model)
    with torch.no_grad():
        for one, other in zip(again(pictures()), model(pictures()), strict=True):
            assert one.keys() == other.keys() and len(one["boxes"]) == len(other["boxes"]) > 0
            for key in one:
                torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-3)
    assert sum(value.numel() for value in again.parameters()) == sum(value.numel() for value in model.parameters())
    taught = [{"boxes": a, "labels": b} for a, b in zip(BOXES, LABELS, strict=True)]
    losses = again.train()(pictures(), taught)
    sum(losses.values()).backward()
    assert any(one.grad is not None and bool(one.grad.any()) for one in graph.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_channels_leave_backbone_neck_and_head(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the model is exported, too")
    model = detector(name)
    graph = capture(model)
    small = rarefy.prune(graph, keep=0.5)
    assert detector_of(small) == found(model)
    before, after = dict(graph.named_parameters()), dict(small.named_parameters())
    left = {key: len(after[key]) / len(before[key]) for key in after if before[key].dim() == 4}
    heads = [key for key in left if key.startswith("head.") and "conv" in key]
    assert left["backbone.pyramid.stages.1.0.weight"] < 0.6
    assert name == "faster_rcnn" or left["backbone.pyramid.lateral.1.weight"] < 0.8  # the second look reads them there
    # what is tied over 32 groups of a normalisation is worth more than a channel of its own
    assert name == "fcos" or all(left[key] < 1 for key in heads), left
    family = detector_of(small)
    assert family is not None
    size = family.feed.size
    family.loss(small.train()(torch.randn(2, 3, *size)), targets(), size).backward()
    codes = rarefy.quantize(small.eval(), batches=[torch.randn(16, 3, *size)], progress=False)
    kept = rarefy.load(rarefy.save(codes, tmp_path / "small"))
    with torch.no_grad():
        answers = rarefy.as_original(kept, model)(pictures())
    assert [answer["boxes"].shape[1] for answer in answers] == [4, 4]
    assert rarefy.export(kept, tmp_path / "core.onnx", boxes=False)["passed"]
    rarefy.export(kept, tmp_path / "small.onnx", compare=False)  # scores of random weights tie


def test_a_graph_of_another_detector_is_refused() -> None:
    graph = capture(detector("fcos"))
    with pytest.raises(InputError, match="graph is of fcos, and the original is of ssd"):
        rarefy.as_original(graph, detector("ssd"))
