"""Families of detectors: known by their outputs, read and taught rightly, and their models go through every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rarefy
from rarefy import plugins
from rarefy.data.boxes.boxes import CLASS, FOUND_COLUMNS, SCORE, TARGET_COLUMNS, iou, padded, present
from rarefy.errors import FormatError
from rarefy.tasks.detector import Detector, capture, detector_of, found
from rarefy.tasks.metric import OutputError, Outputs
from tests.detecting import BinHead, GridHead, SoftmaxHead
from tests.networks import ConvNormLinear

SIZE = (64, 96)
# name -> network, and the text of its family
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "yolox": (GridHead, "yolox:classes=3,size=64/96"),
    "yolox of one class": (lambda: GridHead(1), "yolox:classes=1,size=64/96"),
    "nanodet": (BinHead, "nanodet:classes=3,size=64/96"),
    "nanodet of as many classes as bins": (lambda: BinHead(32), "nanodet:classes=32,size=64/96"),
    "nanodet-plus": (lambda: BinHead(5, joined=True), "nanodet:classes=5,size=64/96,outputs=joined,offset=0.0"),
    "fastestdet": (SoftmaxHead, "fastestdet:classes=3,size=64/96"),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()


def graph_of(name: str):
    return capture(network(name), (3, *SIZE))


def family_of(name: str) -> Detector:
    family = detector_of(graph_of(name))
    assert family is not None
    return family


def targets(*pictures: list[list[float]]) -> Tensor:
    """left, top, right, bottom, class of each box."""
    rows = [torch.tensor(one).reshape(-1, 5) for one in pictures]
    return padded([torch.nn.functional.pad(one, (0, TARGET_COLUMNS - 5)) for one in rows], TARGET_COLUMNS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_family_is_known_by_its_outputs_and_is_a_line_of_text(name: str) -> None:
    graph, text = graph_of(name), NETWORKS[name][1]
    assert graph.meta["detector"] == text
    family = plugins.resolve("detectors", text)
    assert plugins.describe(family) == text and family == found(graph) and family.feed.size == SIZE


@pytest.mark.parametrize(
    "model", [ConvNormLinear(), nn.Conv2d(1, 3, 3), nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sigmoid())]
)
def test_other_networks_are_of_no_family(model: nn.Module) -> None:
    graph = capture(model.eval(), (1, 32, 32))
    assert "detector" not in graph.meta and detector_of(graph) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_teaches_what_boxes_reads(name: str) -> None:
    """Outputs that are trained freely end in the boxes of the targets, and no others: the two agree."""
    family, graph = family_of(name), graph_of(name)
    with torch.no_grad():
        outputs = graph(torch.zeros(2, 3, *SIZE))
    # what a sigmoid and a softmax left is free behind them
    free = [torch.zeros_like(value).requires_grad_() for value in pytree.tree_leaves(outputs)]
    last = family.classes - 1
    wanted = targets([[10, 6, 42, 40, 0], [50, 20, 90, 60, last]], [[4, 30, 60, 62, last]])
    optimizer = torch.optim.Adam(free, 0.2)
    first = None
    for _ in range(120):
        optimizer.zero_grad()
        loss = family.loss(_ended(name, family, free, outputs), wanted, SIZE)
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert first is not None and loss.item() < 0.3 * first
    boxes = family.boxes(_ended(name, family, free, outputs), SIZE)
    assert boxes.shape[0] == 2 and boxes.shape[2] == FOUND_COLUMNS
    for picture, right in zip(boxes, wanted, strict=True):
        right = right[present(right)]
        sure = picture[present(picture) & (picture[:, SCORE] > 0.3)]
        overlaps = iou(right, sure) * (right[:, None, CLASS] == sure[None, :, CLASS])
        assert (overlaps.amax(1) > 0.8).all(), (right, sure)
        assert (overlaps.amax(0) > 0.5).all(), (right, sure)


def _ended(name: str, family: Detector, free: list[Tensor], outputs: Outputs) -> Outputs:
    """Free numbers as the family's network ends them."""
    classes = family.classes
    if name.startswith("yolox"):
        values = [torch.cat([free[0][..., :4], free[0][..., 4:].sigmoid()], -1)]
    elif name == "fastestdet":
        values = [torch.cat([free[0][:, :1].sigmoid(), free[0][:, 1:5], free[0][:, 5:].softmax(1)], 1)]
    elif name == "nanodet-plus":
        values = [torch.cat([free[0][..., :classes].sigmoid(), free[0][..., classes:]], -1)]
    else:
        values = [one.sigmoid() for one in free[:3]] + free[3:]
    return pytree.tree_unflatten(values, pytree.tree_structure(outputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_pictures_without_boxes_and_boxes_to_ignore_are_learned(name: str) -> None:
    family = family_of(name)
    graph = graph_of(name).train()
    inputs = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    empty, crowd = targets([], []), targets([[0, 0, 90, 60, 0]], [])
    crowd[0, 0, 5] = 1.0
    outputs = graph(inputs)
    losses = [family.loss(outputs, one, SIZE) for one in (empty, crowd)]
    assert all(bool(one.isfinite()) for one in losses)
    if not name.startswith("fastestdet"):
        assert losses[1] < losses[0]  # what lies in the crowd is neither right nor wrong
    losses[0].backward()
    assert all(one.grad is None or bool(one.grad.isfinite().all()) for one in graph.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_nan_is_no_box(name: str) -> None:
    family, graph = family_of(name), graph_of(name)
    with torch.no_grad():
        outputs = graph(torch.zeros(2, 3, *SIZE))
    for value in (float("nan"), float("inf")):
        broken = pytree.tree_map(lambda one, value=value: torch.full_like(one, value), outputs)
        boxes = family.boxes(broken, SIZE)
        assert boxes.isfinite().all()
    assert not present(family.boxes(pytree.tree_map(lambda one: one * float("nan"), outputs), SIZE)).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_another_family_are_refused_with_the_way_out(name: str) -> None:
    family = family_of(name)
    for outputs in (torch.zeros(2, 10), (torch.zeros(2, 5), torch.zeros(2, 5)), "text"):
        with pytest.raises(OutputError, match="say which family"):
            family.boxes(outputs, SIZE)


@pytest.mark.parametrize("name", ["yolox", "nanodet", "fastestdet"])
def test_a_detector_goes_through_every_step(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the model is exported, too")
    graph, family = graph_of(name), family_of(name)
    small = rarefy.prune(graph, keep=0.5)
    before, after = (sum(one.numel() for one in model.parameters()) for model in (graph, small))
    assert after < 0.45 * before, f"{after} of {before} parameters stay"
    outputs = small.train()(torch.randn(2, 3, *SIZE))
    family.loss(outputs, targets([[10, 6, 42, 40, 0]], []), SIZE).backward()
    small.eval()
    codes = rarefy.quantize(small, batches=[torch.randn(16, 3, *SIZE)], progress=False)
    kept = rarefy.load(rarefy.save(codes, tmp_path / "small"))
    assert detector_of(kept) == family
    facts = rarefy.export(kept, tmp_path / "core.onnx", boxes=False)
    assert facts["passed"], facts
    rarefy.export(kept, tmp_path / "small.onnx", compare=False)  # scores of random weights tie
    boxes = family.boxes(kept(torch.zeros(1, 3, *SIZE)), SIZE)
    assert boxes.shape[2] == FOUND_COLUMNS


@pytest.mark.parametrize(
    "text",
    [
        *("os:system", "nosuch", "yolox:classes=0", "yolox:classes=x", "yolox:strides=", "yolox:size=640"),
        *("yolox:size=16000/16000,strides=1", "nanodet:bins=100000", "tests.detecting:GridHead", "../yolox", "", 7),
        *("yolox:" + "strides=8," * 1000, "yolox:classes=3\n", "nanodet:outputs=other"),
    ],
)
def test_a_file_may_name_no_family_but_ours(text: object, tmp_path: Path) -> None:
    folder = Path(rarefy.save(graph_of("yolox"), tmp_path / "model"))
    file = folder / "graph.json"
    description = json.loads(file.read_text())
    description["meta"]["detector"] = text
    file.write_text(json.dumps(description))
    with pytest.raises(FormatError, match=r"graph\.json"):
        rarefy.load(folder)


def test_the_original_is_left_as_it_is_and_the_door_knows_what_is_no_detector() -> None:
    model = network("yolox")
    graph = capture(model, (3, *SIZE))
    inputs = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    again = rarefy.as_original(graph, model)
    torch.testing.assert_close(again(inputs), model(inputs), rtol=1e-4, atol=1e-5)
