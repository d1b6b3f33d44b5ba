"""Models with anchors from a yaml file (v5, v7), as they come: known by their head, compressed, called as they were."""

from __future__ import annotations

from pathlib import Path

import boxed
import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import plugins
from rarefy.data.boxes.boxes import SCORE, iou, padded, present
from rarefy.tasks.detection import Detection
from rarefy.tasks.detector import capture, detector_of, found
from tests.detecting import AnchorNumbered

SIZE = (64, 64)
TEXT = (
    "yolov5:classes=3,size=64/64,anchors=8.0/8.0/12.0/20.0/20.0/12.0;16.0/16.0/24.0/40.0/40.0/24.0;"
    "24.0/24.0/36.0/60.0/60.0/36.0"
)
PLACES = 3 * (64 + 16 + 4)


def model(seven: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return AnchorNumbered(seven=seven).eval()


def target() -> Tensor:
    return padded([torch.tensor([[8.0, 6, 40, 44, 2, 0, 0, 1], [30, 30, 62, 60, 0, 0, 0, 1]])] * 2, 8)


@pytest.mark.parametrize("seven", [False, True])
def test_a_model_is_known_by_its_head_read_and_called_as_it_is(seven: bool) -> None:
    original = model(seven)
    graph = capture(original)
    family = detector_of(graph)
    assert graph.meta["detector"] == TEXT and family is not None and found(original) == family
    again = rarefy.as_original(graph, original)
    assert type(again) is type(original) and again.names == original.names
    inputs = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        decoded, maps = original(inputs)
        boxes, scores = family.scored(graph(inputs), SIZE)
        answer, own = again(inputs)
    torch.testing.assert_close(scores, decoded[..., 4:5] * decoded[..., 5:], rtol=1e-3, atol=1e-4)
    middle, sides = decoded[..., :2], decoded[..., 2:4]
    torch.testing.assert_close(boxes, torch.cat([middle - sides / 2, middle + sides / 2], -1), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(answer, decoded, rtol=1e-3, atol=1e-2)
    for one, other in zip(own, maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
    count = sum(value.numel() for value in original.parameters())
    assert sum(value.numel() for value in again.parameters()) == count
    assert [tuple(one.shape) for one in again.train()(inputs)] == [(2, 3, side, side, 8) for side in (8, 4, 2)]
    assert not original.training and len(original.model) > 2


@pytest.mark.parametrize("seven", [False, True])
def test_channels_leave_everywhere_and_the_rest_trains_is_saved_and_exported(seven: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the model is exported, too")
    original = model(seven)
    graph = capture(original)
    small = rarefy.prune(graph, keep=0.5)
    before = dict(graph.named_parameters())
    whole = [key for key, value in small.named_parameters() if value.dim() == 4 and value.shape == before[key].shape]
    assert sum(value.numel() for value in small.parameters()) < 0.45 * sum(value.numel() for value in before.values())
    assert all(".im." in key or "implicit" in key for key in whole), whole
    family = detector_of(small)
    assert family is not None
    family.loss(small.train()(torch.rand(2, 3, *SIZE)), target(), SIZE).backward()
    codes = rarefy.quantize(small.eval(), batches=[torch.rand(16, 3, *SIZE)], progress=False)
    kept = rarefy.load(rarefy.save(codes, tmp_path / "small"))
    with torch.no_grad():
        answer, maps = rarefy.as_original(kept, original)(torch.rand(2, 3, *SIZE))
    assert answer.shape == (2, PLACES, 8) and len(maps) == 3
    rarefy.export(kept, tmp_path / "small.onnx", runtime="onnxruntime", compare=False)  # scores of random weights tie
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    pictures = torch.randint(0, 256, (3, *SIZE, 3), dtype=torch.uint8)
    (boxes,) = session.run(None, {"picture": pictures.numpy()})
    assert boxes.shape == (3, 300, 6)
    with torch.no_grad():
        ours = family.boxes(kept(pictures.permute(0, 3, 1, 2).float() / 255), SIZE)
    theirs = torch.from_numpy(boxes)
    for one, other in zip(ours, theirs, strict=True):
        near = (iou(one[:20], other) > 0.95) & (one[:20, 4, None] == other[:, 4])
        assert near.any(1).float().mean() > 0.9  # scores of random weights are near each other: some change places


@pytest.mark.parametrize("outputs", ["maps", "decoded"])
def test_the_loss_teaches_what_boxes_reads(outputs: str) -> None:
    family = plugins.resolve("detectors", f"{TEXT},outputs={outputs}")
    torch.manual_seed(0)
    maps = [torch.zeros(2, 24, side, side).requires_grad_() for side in (8, 4, 2)]
    values = torch.zeros(2, PLACES, 8).requires_grad_()
    free = maps if outputs == "maps" else [values]
    plain = plugins.resolve("detectors", TEXT)

    def said() -> list[Tensor] | Tensor:
        if outputs == "maps":
            return maps
        start, _ = plain.scored([torch.zeros(2, 24, side, side) for side in (8, 4, 2)], SIZE)
        middle, sides = (start[..., :2] + start[..., 2:]) / 2, start[..., 2:] - start[..., :2]
        return torch.cat([middle + 20 * values[..., :2], sides * values[..., 2:4].exp(), values[..., 4:].sigmoid()], -1)

    optimizer = torch.optim.Adam(free, 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        family.loss(said(), target(), SIZE).backward()
        optimizer.step()
    for picture, right in zip(family.boxes(said(), SIZE), target(), strict=True):
        sure = picture[present(picture) & (picture[:, SCORE] > 0.3)].detach()
        assert (iou(right, sure).amax(1) > 0.8).all(), sure
        assert set(sure[:, 4].tolist()) == {0.0, 2.0}


def test_places_learn_as_by_hand() -> None:
    """A box of 12x20 whose middle is in column 2, row 3, nearer to the right and the bottom: of the finest map by three
    places, and by the anchors that are at most 4 times as wide or high."""
    family = plugins.resolve("detectors", TEXT)
    maps = [torch.zeros(1, 24, side, side) for side in (8, 4, 2)]
    left, top = 2.75 * 8 - 6, 3.9 * 8 - 10
    one = torch.tensor([[[left, top, left + 12, top + 20, 1, 0, 0, 1]]])
    said = family._said(maps, SIZE)
    from rarefy.tasks.detectors._assign import anchored

    found = anchored(family._boxes(said, SIZE), said.corner + said.stride / 2, said.stride, said.anchor, one)
    places = found.positive[0].nonzero().flatten().tolist()
    finest = {anchor * 64 + row * 8 + column for anchor in range(3) for row, column in ((3, 2), (3, 3), (4, 2))}
    assert {place for place in places if place < 192} == finest
    ratios = [max(12 / w, w / 12, 20 / h, h / 20) < 4 for w, h in said.anchor.tolist()]
    assert (all(ratios[place] for place in places) and not all(ratios)) or all(ratios)
    assert set(found.kind[0][places].tolist()) == {1}


class Wrapped(nn.Module):
    """A model in two of a user's own objects, as hubs hand it out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_an_object_around_the_model_is_called_as_it_was() -> None:
    original = Wrapped(Wrapped(model())).eval()
    again = rarefy.as_original(capture(original), original)
    assert type(again) is Wrapped and type(again.model) is Wrapped
    inputs = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs)[0], original(inputs)[0], rtol=1e-3, atol=1e-2)


def test_a_student_learns_from_its_teacher(tmp_path: Path) -> None:
    text = boxed.coco(tmp_path, {f"{n}.png": [(8 + n, 6, 24 + n, 26, n % 3)] for n in range(8)})[0]
    graph = capture(model())
    small = rarefy.prune(graph, keep=0.5)
    task = Detection(train=text, augment="none")
    done = rarefy.distill(
        small, graph, task=task, loss="quality + pkd", epochs=1, batch_size=4, device="cpu", progress=False
    )  # fmt: skip
    assert any(not torch.equal(one, other) for one, other in zip(done.parameters(), small.parameters(), strict=True))


class Decoding(nn.Module):
    """The network with its head, whose maps are not returned: as it is exported."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(inner.model)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.layers:
            x = x if layer.f == -1 else [x if place == -1 else seen[place] for place in layer.f]
            x = layer(x)
            seen.append(x)
        return x[0]


@pytest.mark.parametrize("seven", [False, True])
def test_a_graph_that_decodes_itself_is_known_by_its_output(seven: bool) -> None:
    whole = capture(Decoding(model(seven)).eval(), (3, *SIZE))
    assert whole.meta["detector"] == "yolov5:classes=3,size=64/64,outputs=decoded"
    graph, inputs = capture(model(seven)), torch.rand(2, 3, *SIZE)
    family, other = detector_of(graph), detector_of(whole)
    assert family is not None and other is not None
    with torch.no_grad():
        for one, two in zip(family.scored(graph(inputs), SIZE), other.scored(whole(inputs), SIZE), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-2)
    loss = other.loss(whole(inputs), target(), SIZE)
    loss.backward()
    assert bool(loss.isfinite())
