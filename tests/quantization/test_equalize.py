"""Equalising channels of streams: the network stays what it is, noise falls where channels are unlike, and what can't
be scaled is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Bottlenecks, OneStream
from torch import Tensor, fx, nn

from rarefy import capture, quantize
from rarefy.errors import DataError
from rarefy.graph.canonical import simplify
from rarefy.graph.fold import fold
from rarefy.graph.layers import layer_name, weighted
from rarefy.graph.nodes import attribute
from rarefy.quantization.formats import Grid
from rarefy.quantization.transforms.equalize import best_factor, equalize, sizes, streams


def folded(model: nn.Module, x: Tensor) -> fx.GraphModule:
    graph = simplify(fold(capture(model.eval(), x)))
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return graph


def grids_of(graph: fx.GraphModule) -> tuple[dict[fx.Node, Grid], dict[fx.Node, Grid]]:
    """All values rounded and all layers."""
    operators = [node for node in graph.graph.nodes if node.op == "call_function"]
    return {node: Grid(signed=False, symmetric=False) for node in operators}, {
        node: Grid(axis=0) for node in operators if weighted(node)
    }


def images(count: int = 8, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise_db(exact: Tensor, other: Tensor) -> float:
    exact, other = exact.detach(), other.detach()
    return float(10 * torch.log10(exact.var(0).sum() / (exact - other).square().mean(0).sum()))


@pytest.mark.parametrize("make", [OneStream, lambda: Bottlenecks(5.0)])
def test_answers_stay(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    graph = folded(make(), images(2))
    if isinstance(make, type):
        with torch.no_grad():
            attribute(graph, "one.weight")[0] *= 50
    before, weights = graph(images()), {name: value.clone() for name, value in graph.named_parameters()}
    assert equalize(graph, [(images(),)], *grids_of(graph)) >= 1
    assert any(not torch.equal(weights[name], value) for name, value in graph.named_parameters())
    assert torch.allclose(before, graph(images()), rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_streams_reach_across_additions() -> None:
    graph = folded(Bottlenecks(), images(2))
    found = [
        ({layer_name(node) for node in stream.makers}, {layer_name(node) for node in stream.readers})
        for stream in streams(graph)
    ]
    assert ({"stem", "project.0", "project.1"}, {"expand.0", "expand.1", "head"}) in found
    assert ({"expand.0"}, {"deep.0"}) in found  # across ReLU6
    graph = folded(OneStream(), images(2))
    (stream,) = streams(graph)
    assert {layer_name(node) for node in stream.makers} == {"one", "two", "deep"}
    assert {layer_name(node) for node in stream.readers} == {"two", "deep", "fc"}


def test_unlike_channels_get_one_range_and_int8_loses_less() -> None:
    """Of channels from 1/8 to 8 one scale leaves the smallest 64 times too rough; equalised, the network is nearly as
    good as it is with like channels."""
    torch.manual_seed(0)
    like = Bottlenecks().eval()
    torch.manual_seed(0)
    unlike = Bottlenecks(8.0).eval()
    assert torch.allclose(like(images()), unlike(images()), rtol=1e-4, atol=1e-4)
    found = {}
    for name, model in (("like", like), ("unlike", unlike)):
        graph = capture(model, images(2))
        for mended in (False, True):
            small = quantize(graph, batches=[images()], equalize=mended, progress=False)
            found[name, mended] = noise_db(graph(images(32)), small(images(32)))
            assert (small.meta["history"][-1]["facts"]["equalized"] > 0) <= mended
    assert found["unlike", True] > found["unlike", False] + 3
    assert found["unlike", True] > found["like", True] - 1
    graph = folded(unlike, images(2))
    equalize(graph, [(images(),)], *grids_of(graph))
    values: dict[str, Tensor] = {}

    class Seen(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Tensor:
            values[node.name] = value = super().run_node(node)
            return value  # type: ignore[no-any-return]

    Seen(graph).run(images())
    stream = next(one for one in streams(graph) if "stem" in map(layer_name, one.makers))
    last = values[stream.values[-1].name].abs().amax((0, 2, 3))
    assert float(last.max() / last.min()) < 5


def test_like_channels_are_left_as_they_are() -> None:
    """Of equal weights and one image in all channels, no factor wins."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(0.5), model[0].bias.zero_()
        model[2].weight.copy_(torch.eye(4).view(4, 4, 1, 1))
    graph = folded(model, images(2))
    weights = {name: value.clone() for name, value in graph.named_parameters()}
    assert equalize(graph, [(images(),)], *grids_of(graph)) == 0
    assert all(torch.equal(weights[name], value) for name, value in graph.named_parameters())


def _answer_read_twice(one: nn.Module, two: nn.Module, x: Tensor) -> Tensor:
    y = one(x)
    return two(y).mean((2, 3)) + y.mean((2, 3))


BARRED = {
    "a clip on both sides": lambda one, two, x: two(F.hardtanh(one(x))),
    "hardswish": lambda one, two, x: two(F.hardswish(one(x))),
    "a constant": lambda one, two, x: two(one(x) + 1.0),
    "a broadcast": lambda one, two, x: two(one(x) + one(x).mean((1, 2, 3), keepdim=True)),
    "product": lambda one, two, x: two(one(x) * one(x)),
    "the image": lambda one, two, x: two(one(x) + x[:, :1]),
    "padding with ones": lambda one, two, x: two(F.pad(one(x), (1, 1, 1, 1), value=1.0)),
    "the answer": _answer_read_twice,
    "a shared weight": lambda one, two, x: two(F.relu(two(F.relu(one(x))))),
}


@pytest.mark.parametrize("name", BARRED)
def test_what_can_not_be_scaled_is_left_alone(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return BARRED[name](self.one, self.two, x)  # type: ignore[no-any-return, no-untyped-call]

    assert streams(folded(Net(), images(2))) == []


class Clipped(nn.Module):
    """Channels of unlike width before ReLU6, of which the widest is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.one.weight *= torch.tensor([20.0, 1, 0.2, 0.1, 0.05, 1, 0.2, 0.1]).view(-1, 1, 1, 1)
            self.two.weight *= torch.tensor([0.1, 1, 5, 10, 20, 1, 5, 10]).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.two(F.relu6(self.one(x))))).mean((2, 3))  # type: ignore[no-any-return]


def test_channels_that_a_clip_never_cuts_are_widened() -> None:
    """With room for a rarer, larger number; a channel that is cut stays, and so do the answers."""
    torch.manual_seed(0)
    graph = folded(Clipped(), images(2))
    before = {name: value.clone() for name, value in graph.named_parameters()}
    answers = graph(images())
    assert equalize(graph, [(images(),)], *grids_of(graph)) >= 1
    grown = (attribute(graph, "one.weight") / before["one.weight"]).flatten(1).mean(1)
    assert grown[0] == 1 and grown.max() > 2 and (grown <= 4.001).all()
    with torch.no_grad():
        seen = F.conv2d(images(), attribute(graph, "one.weight"), attribute(graph, "one.bias")).amax((0, 2, 3))
    assert (4 * seen[grown > 1.001] <= 6.001).all()
    assert torch.allclose(answers, graph(images()), rtol=1e-4, atol=1e-4 * float(answers.abs().max()))


def test_dead_and_broken_channels_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    graph = folded(Bottlenecks(5.0), images(2))
    with torch.no_grad():
        for maker in ("stem", "project.0", "project.1"):
            attribute(graph, f"{maker}.weight")[3] = 0
            attribute(graph, f"{maker}.bias")[3] = 0
        attribute(graph, "head.weight")[:, 5] = 0
    before = graph(images())
    read, last = attribute(graph, "head.weight")[:, 3].clone(), attribute(graph, "fc.weight")[0].clone()
    assert equalize(graph, [(images(),)], *grids_of(graph)) >= 1
    rows = attribute(graph, "fc.weight")[0] / last  # of the head, which makes a stream of its own
    assert torch.allclose(read.flatten(), attribute(graph, "head.weight")[:, 3].flatten() * rows, rtol=1e-5)
    assert torch.allclose(before, graph(images()), rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    with torch.no_grad():
        attribute(graph, "stem.weight")[0] = math.nan
    assert equalize(graph, [(images(),)], *grids_of(graph)) == 0


def test_without_a_batch_the_error_says_so() -> None:
    with pytest.raises(DataError, match="no calibration images"):
        quantize(Bottlenecks().eval(), inputs=images(2), batches=[], progress=False)


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_equalises_nothing_and_two_no_clip(count: int) -> None:
    """A channel that one picture does not show is divided by next to nothing, and overflows on the next."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    with torch.no_grad():
        net[0].weight *= torch.logspace(-2, 0, 16).view(-1, 1, 1, 1)  # type: ignore[operator]
    graph = capture(net.eval(), torch.rand(2, 3, 12, 12))
    few, judged = torch.rand(count, 3, 12, 12), 4 * torch.rand(32, 3, 12, 12)
    noise = []
    for asked in (True, False):
        small = quantize(graph, batches=[few], images=count, equalize=asked, progress=False)
        noise.append(float((small(judged) - graph(judged)).detach().square().sum()))
    if count == 1:
        assert noise[0] == noise[1]
    assert noise[0] <= 1.05 * noise[1]


def test_what_wins_on_one_half_of_the_images_alone_is_not_done() -> None:
    """Channels that are small on one half are the large ones of the other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8).view(8, 8, 1, 1))
    graph = folded(net, torch.rand(2, 8, 6, 6))
    (stream,) = streams(graph)
    axes = dict.fromkeys((*stream.values, *stream.readers), stream.axis)
    rising = torch.logspace(-2, 0, 8).view(1, 8, 1, 1)
    one, other = (sizes(graph, axes, [(torch.rand(8, 8, 6, 6) * span,)]) for span in (rising, rising.flip(1)))
    grids, layers = grids_of(graph)
    assert best_factor(graph, stream, one, one, grids, layers) is not None
    assert best_factor(graph, stream, other, other, grids, layers) is not None
    assert best_factor(graph, stream, one, other, grids, layers) is None
