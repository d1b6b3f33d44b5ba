"""What was found: against a plain loop, and the file's answer in ONNX Runtime against the operator's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rarefy.kernels  # noqa: F401
from rarefy.graph.capture import capture

FOUND = torch.ops.rarefy.detections.default


class Found(nn.Module):
    def __init__(self, overlap: float = 0.5, least: float = 0.3, most: int = 20, candidates: int = 100):
        super().__init__()
        self.options = (overlap, least, most, candidates)

    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return FOUND(boxes, scores, *self.options)


def drawn(pictures: int, places: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(pictures, places, 2, generator=generator) * 30
    sides = torch.rand(pictures, places, 2, generator=generator) * 20 + 1
    return torch.cat([corner, corner + sides], -1), torch.rand(pictures, places, classes, generator=generator)


def by_loop(boxes: Tensor, scores: Tensor, overlap: float, least: float, most: int, candidates: int) -> list[list]:
    pairs = [(float(scores[p, k]), p, k) for p in range(len(boxes)) for k in range(scores.shape[1])]
    pairs = [one for one in sorted(pairs, key=lambda one: -one[0])[:candidates] if one[0] > least]
    kept: list[list] = []
    for score, place, kind in pairs:
        box = boxes[place].tolist()
        if all(other[4] != kind or _iou(box, other) <= overlap for other in kept):
            kept.append([*box, float(kind), score])
    return kept[:most]


def _iou(a: list[float], b: list[float]) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("options", [(0.5, 0.3, 20, 100), (0.1, 0.0, 300, 3000), (0.7, 0.9, 5, 30), (1.0, 0.5, 10, 50)])
@pytest.mark.parametrize("classes", [1, 3])
def test_it_is_greedy_suppression(options: tuple[float, float, int, int], classes: int) -> None:
    boxes, scores = drawn(3, 60, classes)
    found = FOUND(boxes, scores, *options)
    assert found.shape == (3, options[2], 6)
    for picture, box, score in zip(found, boxes, scores, strict=True):
        wanted = torch.tensor(by_loop(box, score, *options))
        count = int((picture[:, 4] >= 0).sum())
        assert count == len(wanted) > 2
        assert torch.allclose(picture[:count], wanted)
        assert (picture[count:, 4] == -1).all() and (picture[count:, [0, 1, 2, 3, 5]] == 0).all()


def test_a_chain_of_boxes_each_over_the_next() -> None:
    left = torch.arange(40.0)[:, None] * 3
    boxes = torch.cat([left, left * 0, left + 10, left * 0 + 10], 1)[None]  # IoU of neighbours 7/13, of the next 4/16
    found = FOUND(boxes, torch.linspace(0.9, 0.5, 40)[None, :, None], 0.5, 0.1, 40, 40)
    assert found[0, :20, 0].tolist() == left[::2, 0].tolist() and found[0, 20, 4] == -1


def test_what_is_no_number_is_no_box() -> None:
    boxes, scores = drawn(1, 20, 2)
    wanted = FOUND(torch.cat([boxes, boxes[:, :3]], 1), torch.cat([scores, scores[:, :3] * 0], 1), 0.5, 0.3, 9, 99)
    broken = torch.cat([boxes, torch.tensor([[[0, 0, math.nan, 9], [0, 0, math.inf, 9], [0.0, 0, 9, 9]]])], 1)
    wild = torch.tensor([[[9.0, 9], [9, 9], [math.nan, math.inf]]])
    assert torch.equal(FOUND(broken, torch.cat([scores, wild], 1), 0.5, 0.3, 9, 99), wanted)


@pytest.mark.parametrize("classes, options", [
    (3, (0.5, 0.3, 20, 100)), (1, (0.4, 0.2, 7, 40)), (2, (0.5, 0.1, 300, 3000)), (3, (1.0, 0.5, 10, 50)),
])  # fmt: skip
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_file_finds_the_same(
    classes: int, options: tuple[float, float, int, int], runtime: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    from rarefy import plugins

    chosen = plugins.resolve("runtimes", runtime)
    graph = capture(Found(*options), drawn(2, 60, classes))
    chosen.export(graph, tmp_path / "found.onnx")
    session = chosen.open(tmp_path / "found.onnx")
    for pictures in (1, 4):
        boxes, scores = drawn(pictures, 60, classes, seed=pictures)
        boxes[0, 0, 2], scores[0, 1, 0] = math.nan, math.nan
        assert torch.allclose(session(boxes, scores), FOUND(boxes, scores, *options), atol=1e-5)
