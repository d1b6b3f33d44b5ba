"""Another size than the example's is answered as the model does, or refused in a line: never wrongly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.tasks import Classification

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.down, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2), nn.Linear(8, 5)
        self.table = nn.Parameter(torch.randn(1, 8, 16, 16))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def pooled(net: Any, x: Tensor) -> Tensor:
    return net.head(F.adaptive_avg_pool2d(net.conv(x).relu(), 1).flatten(1))


def meaned(net: Any, x: Tensor) -> Tensor:
    return net.head(net.conv(x).relu().mean((2, 3)))


def doubled(net: Any, x: Tensor) -> Tensor:
    return F.interpolate(net.down(net.conv(x)), scale_factor=2.0, mode="nearest")


def unpacked(net: Any, x: Tensor) -> Tensor:
    _n, _c, _h, _w = net.conv(x).shape  # read, and not used
    return net.head(net.conv(x).flatten(2).mean(2))


def skipped(net: Any, x: Tensor) -> Tensor:
    return net.conv(x) + F.interpolate(net.down(net.conv(x)), scale_factor=2.0)


def resized(net: Any, x: Tensor) -> Tensor:
    return F.interpolate(net.down(net.conv(x)), size=x.shape[2:], mode="bilinear")


def divided(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x).relu()
    return net.head(y.sum((2, 3)) / (y.shape[2] * y.shape[3]))


def by_kernel(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x).relu()
    return net.head(F.avg_pool2d(y, y.shape[2:]).flatten(1))


def padded(net: Any, x: Tensor) -> Tensor:
    """To an even size: nothing to do for the example's."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return net.conv(x).mean((2, 3))


def in_windows(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    n, c, h, w = y.shape
    return y.view(n, c, h // 4, 4, w // 4, 4).amax((3, 5)).mean((2, 3))


def branched(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return y.mean((2, 3)) if x.shape[2] < 20 else y.amax((2, 3))


def positioned(net: Any, x: Tensor) -> Tensor:
    return (net.conv(x) + net.table).mean((2, 3))


FREE: dict[Forward, int | None] = {pooled: 1, meaned: 1, doubled: 1, unpacked: 1, skipped: 32}
FIXED: dict[Forward, int | None] = dict.fromkeys((resized, divided, by_kernel, padded, in_windows, branched))
SIZES = [(16, 16), (15, 16), (24, 24), (17, 31), (48, 16), (16, 80), (112, 48)]


@pytest.mark.parametrize("kind", [*FREE, *FIXED, positioned], ids=lambda kind: kind.__name__)
def test_another_size_is_answered_as_the_model_does_or_refused(kind: Forward, tmp_path: Path) -> None:
    model = Net(kind).eval()
    graph = capture(model, (3, 16, 16))
    multiple = FREE.get(kind)
    assert graph.meta["sizes"] == [[None, multiple, multiple]]
    loaded = rarefy.load(rarefy.save(graph, tmp_path / "saved"))
    for one in (graph, copy.deepcopy(graph), loaded):
        for size in SIZES:
            x = torch.randn(3, 3, *size)
            fits = size == (16, 16) or (multiple and all(side == 16 or side % multiple == 0 for side in size))
            if fits:
                assert torch.allclose(one(x), model(x), atol=1e-5), size
            else:
                with pytest.raises(
                    InputError, match=rf"x: the graph takes \(N, 3, .*and got \(3, 3, {size[0]}"
                ) as told:
                    one(x)
                assert "\n" not in str(told.value)


@pytest.mark.parametrize(("kind", "count"), [(pooled, 0), (positioned, 0), (resized, 1), (branched, 1)])
def test_what_the_model_could_and_the_graph_can_not_is_told_once(
    kind: Forward, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "rarefy"):
        capture(Net(kind), (3, 16, 16))
    told = [record.getMessage() for record in caplog.records if record.name == "rarefy"]
    assert len(told) == count and all("takes the size of the example alone: x (N, 3, 16, 16)" in line for line in told)


def test_channels_axes_and_names_are_checked_too() -> None:
    graph = capture(Net(pooled), (3, 16, 16))
    with pytest.raises(InputError, match="which has no batch axis; give it one, as in x"):
        graph(torch.randn(3, 16, 16))
    with pytest.raises(InputError, match=r"takes \(N, 3, any, any\), and got \(2, 4, 16, 16\); capture the model with"):
        graph(x=torch.randn(2, 4, 16, 16))
    with pytest.raises(InputError, match=r"and got \(2, 3\)"):
        graph(torch.randn(2, 3))


def test_a_graph_of_before_refuses_nothing() -> None:
    graph = capture(Net(meaned), (3, 16, 16))
    del graph.meta["sizes"], graph.meta["names"]
    assert graph(torch.randn(2, 3, 24, 24)).shape == (2, 5)


def test_free_sizes_outlast_pruning_and_quantization() -> None:
    model = Net(pooled).eval()
    graph = capture(model, (3, 16, 16))
    x = torch.randn(2, 3, 27, 22)
    quantized = rarefy.quantize(graph, batches=torch.randn(8, 3, 16, 16), progress=False)
    small = rarefy.prune(graph, keep=0.5)
    assert small(x).shape == (2, 5) and small.meta["sizes"] == graph.meta["sizes"] == quantized.meta["sizes"]
    with torch.no_grad():
        found, wanted = quantized(x), model(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_a_pass_that_writes_a_size_into_the_graph_makes_it_the_only_one() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.adaptive_avg_pool2d(self.conv(x).relu(), 2).flatten(1))

    graph = capture(Grid(), (3, 16, 16))
    quantized = rarefy.quantize(graph, batches=torch.randn(8, 3, 16, 16), progress=False)
    assert graph(torch.randn(2, 3, 24, 24)).shape == (2, 5)
    with pytest.raises(InputError, match=r"takes \(N, 3, 16, 16\), and got \(2, 3, 24, 24\)"):
        quantized(torch.randn(2, 3, 24, 24))


def test_the_length_of_a_sequence_is_free_where_it_is() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.head((self.embedding(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    text = Text().eval()
    graph = capture(text, {"ids": torch.randint(0, 9, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.int64)})
    ids, mask = torch.randint(0, 9, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    assert graph.meta["sizes"] == [[1], [1]] and torch.allclose(graph(ids, mask), text(ids, mask), atol=1e-6)
    for model, shape, other, sizes in (
        (nn.Conv1d(4, 6, 3), (4, 10), (2, 4, 15), [[None, 1]]),
        (nn.LSTM(4, 6, batch_first=True), (2, 10, 4), (2, 15, 4), [[1, None]]),
        (nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU()), (2, 5, 6, 7), (2, 2, 9, 8, 7), [[None, 1, 1, 1]]),
    ):
        graph, x = capture(model.eval(), torch.randn(2, *shape[-len(sizes[0]) :])), torch.randn(other)
        found, wanted = graph(x), model(x)
        found, wanted = (found[0], wanted[0]) if isinstance(found, tuple) else (found, wanted)
        assert graph.meta["sizes"] == sizes and torch.allclose(found, wanted, atol=1e-6)


def test_training_takes_a_task_of_another_size_where_sizes_are_free() -> None:
    images, labels = torch.randint(0, 256, (16, 3, 12, 12), dtype=torch.uint8), torch.arange(16) % 4
    task = Classification(train=(images, labels), augment="none")
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "progress": False}
    rarefy.train(capture(Net(pooled), (3, 16, 16)), task, **options)
    with pytest.raises(InputError, match=r"takes inputs of shape \(3, 16, 16\), the task gives \(3, 12, 12\)"):
        rarefy.train(capture(Net(divided), (3, 16, 16)), task, **options)
