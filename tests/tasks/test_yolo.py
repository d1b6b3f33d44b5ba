"""Models from a yaml file, as they come: layers by number, a module ``Detect`` at the end, nothing of their library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import plugins
from rarefy.data.boxes.boxes import SCORE, iou, padded, present
from rarefy.tasks.detector import capture, detector_of, found
from tests.detecting import Numbered

SIZE = (64, 64)


def model(deep: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Numbered(deep=deep).eval()


def target() -> Tensor:
    return padded([torch.tensor([[8.0, 6, 40, 44, 2, 0, 0, 1], [30, 30, 62, 60, 0, 0, 0, 1]])] * 2, 8)


@pytest.mark.parametrize("deep", [False, True])
def test_a_model_is_known_by_its_head_and_read_as_it_reads_itself(deep: bool) -> None:
    original = model(deep)
    graph = capture(original)
    assert graph.meta["detector"] == "yolo:classes=3,size=64/64"
    family = detector_of(graph)
    assert family is not None and found(original) == family
    inputs = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        decoded, _ = original(inputs)
        boxes, scores = family.scored(graph(inputs), SIZE)
    torch.testing.assert_close(scores, decoded[:, 4:].transpose(1, 2), rtol=1e-3, atol=1e-4)
    middle, sides = decoded[:, :2].transpose(1, 2), decoded[:, 2:4].transpose(1, 2)
    torch.testing.assert_close(boxes, torch.cat([middle - sides / 2, middle + sides / 2], -1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("deep", [False, True])
def test_a_core_is_called_as_the_original(deep: bool) -> None:
    original = model(deep)
    again = rarefy.as_original(capture(original), original)
    assert type(again) is type(original) and again.names == original.names
    inputs = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        for one, other in zip(again(inputs), original(inputs), strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    count = sum(value.numel() for value in original.parameters())
    assert sum(value.numel() for value in again.parameters()) == count
    assert [tuple(one.shape) for one in again.train()(inputs)] == [(2, 67, 8, 8), (2, 67, 4, 4), (2, 67, 2, 2)]
    assert len(original.model) == 23 and not original.training


@pytest.mark.parametrize("deep", [False, True])
def test_channels_leave_everywhere_and_the_rest_trains_is_saved_and_exported(deep: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the model is exported, too")
    original = model(deep)
    graph = capture(original)
    small = rarefy.prune(graph, keep=0.5)
    before = dict(graph.named_parameters())
    whole = [key for key, value in small.named_parameters() if value.dim() == 4 and value.shape == before[key].shape]
    assert sum(value.numel() for value in small.parameters()) < 0.45 * sum(value.numel() for value in before.values())
    assert not whole, whole
    family = detector_of(small)
    assert family is not None
    family.loss(small.train()(torch.rand(2, 3, *SIZE)), target(), SIZE).backward()
    codes = rarefy.quantize(small.eval(), batches=[torch.rand(16, 3, *SIZE)], progress=False)
    kept = rarefy.load(rarefy.save(codes, tmp_path / "small"))
    with torch.no_grad():
        answer, maps = rarefy.as_original(kept, original)(torch.rand(2, 3, *SIZE))
    assert answer.shape == (2, 7, 84) and len(maps) == 3
    assert rarefy.export(kept, tmp_path / "small.onnx", runtime="onnxruntime", boxes=False)["passed"]


def test_the_loss_teaches_what_boxes_reads() -> None:
    family = plugins.resolve("detectors", "yolo:classes=3,size=64/64")
    free = [torch.zeros(2, 67, side, side).requires_grad_() for side in (8, 4, 2)]
    optimizer = torch.optim.Adam(free, 0.2)
    for _ in range(150):
        optimizer.zero_grad()
        family.loss(free, target(), SIZE).backward()
        optimizer.step()
    for picture, right in zip(family.boxes(free, SIZE), target(), strict=True):
        sure = picture[present(picture) & (picture[:, SCORE] > 0.3)]
        assert (iou(right, sure).amax(1) > 0.8).all(), sure
        assert set(sure[:, 4].tolist()) == {0.0, 2.0}


class Wrapped(nn.Module):
    """A model in a user's own object, whose answers are another's."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.predictor = model(), object()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_an_object_around_the_model_is_called_as_it_was() -> None:
    original = Wrapped().eval()
    graph = capture(original)
    again = rarefy.as_original(graph, original)
    assert type(again) is Wrapped and again.predictor is None and original.predictor is not None
    inputs = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs)[0], original(inputs)[0], rtol=1e-3, atol=1e-2)


def test_a_graph_that_decodes_itself_is_known_by_its_output() -> None:
    graph = capture(model(), (3, *SIZE))
    inner = model().model

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(inner)

        def forward(self, x: Tensor) -> Tensor:
            seen: list[Tensor] = []
            for layer in self.layers:
                x = x if layer.f == -1 else [x if place == -1 else seen[place] for place in layer.f]
                x = layer(x)
                seen.append(x)
            return x[0]

    whole = capture(Decoding().eval(), (3, *SIZE))
    assert whole.meta["detector"] == "yolo:classes=3,size=64/64,outputs=decoded"
    inputs, family, other = torch.rand(2, 3, *SIZE), detector_of(graph), detector_of(whole)
    assert family is not None and other is not None
    with torch.no_grad():
        for one, two in zip(family.scored(graph(inputs), SIZE), other.scored(whole(inputs), SIZE), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-2)
    loss = other.loss(whole(inputs), target(), SIZE)
    loss.backward()
    assert bool(loss.isfinite())
