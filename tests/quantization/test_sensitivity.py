"""Ranges, scales and layers in float by what noise costs the answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy.graph.canonical import simplify
from rarefy.graph.fold import fold
from rarefy.graph.nodes import attribute, share_copy
from rarefy.quantization import qdq
from rarefy.quantization.calibration.minmax import MinMax
from rarefy.quantization.calibration.sensitivity import Sensitivity
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import Histogram
from rarefy.quantization.sensitivity import SHARES, Cost, Side, sensitivities, unlike
from rarefy.quantization.transforms import channel_scales
from rarefy.quantization.transforms.bias_correction import correct_bias

UINT8 = Grid(8, signed=False, symmetric=False)


def images(count: int = 16, seed: int = 0, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def noise_db(model: Callable[[Tensor], Tensor], quantised: Callable[[Tensor], Tensor], x: Tensor) -> float:
    with torch.no_grad():
        exact = model(x)
        return float(10 * torch.log10(exact.square().sum() / (quantised(x) - exact).square().sum()))


def quantised(model: nn.Module, **options: object) -> nn.Module:
    batches = [images(8, seed) for seed in range(1, 5)]
    made: nn.Module = rarefy.quantize(
        model,
        inputs=images(2),
        batches=batches,
        progress=False,
        **options,  # type: ignore[arg-type]
    )
    return made


def facts(graph: nn.Module) -> dict[str, object]:
    found: dict[str, object] = graph.meta["history"][-1]["facts"]  # type: ignore[index,union-attr]
    return found


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_side_adds_up_what_clipping_moves(sign: float) -> None:
    """For each end: sum over x beyond it of g (end - x)."""
    torch.manual_seed(0)
    x, g = torch.randn(3, 500), torch.randn(3, 500)
    end = sign * float((x * sign).max())
    side = Side(end, 0.3 * end, [], [])
    side.add(x[:2], g[:2], 2)
    side.add(x[2:], g[2:], 1)
    wanted = torch.stack(
        [(g * (torch.where(x * sign > h * sign, h, x) - x)).double().sum(1) for h in side.ends().tolist()], 1
    )
    assert side.costs().shape == (3, SHARES)
    torch.testing.assert_close(side.costs(), wanted, atol=1e-4, rtol=1e-4)
    assert float(side.costs()[:, 0].abs().max()) < 1e-4  # nothing lies beyond the extreme


def graph_of(forward: Callable[[nn.Module, Tensor], object]) -> tuple[nn.Module, object]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> object:
            return forward(self, x)

    model = Net().eval()
    return model, rarefy.capture(model, images(2))


def test_the_cost_of_a_value_is_its_squared_gradient() -> None:
    """One answer: the sign goes, and the power is sum(g^2) over y^2, but where the value is exactly 0."""
    model, graph = graph_of(lambda net, x: net.head(F.relu(net.one(x)).mean((2, 3))))  # type: ignore[operator]
    relu = next(node for node in graph.graph.nodes if "relu" in node.name)  # type: ignore[attr-defined]
    x = images(4)
    with torch.no_grad():
        value, y = F.relu(model.one(x)), model(x)  # type: ignore[operator]
    seen = {relu: Histogram.of(value.flatten())}
    cost = sensitivities(graph, seen, [(x,)], torch.Generator().manual_seed(0))[relu]  # type: ignore[arg-type]
    g = model.head.weight.detach().view(1, 8, 1, 1) / value[0, 0].numel()  # type: ignore[union-attr,operator]
    wanted = (g.square() * (value != 0)).sum((1, 2, 3)) / y.square().mean()
    torch.testing.assert_close(torch.cat(cost.powers).float(), wanted, rtol=1e-4, atol=1e-9)


def test_answers_side_by_side_are_looked_at_one_by_one() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.two(net.one(x))  # type: ignore[operator]
        return torch.cat([y[:, :4].exp(), torch.sigmoid(y[:, 4:])], 1).flatten(2).transpose(1, 2)

    _, graph = graph_of(forward)
    assert {node.name for node in unlike(graph)} == {"exp", "sigmoid"}  # type: ignore[arg-type]


def cost(power: float, clipped: Tensor) -> Cost:
    """Of clipping the upper end of [0, 10]: (samples,) for all ends but the extreme."""
    zero = torch.zeros(len(clipped), SHARES, dtype=torch.float64)
    moments = clipped[:, None].double().expand(-1, SHARES).clone()
    moments[:, 0] = 0
    return Cost(
        Side(0.0, 0.0, [zero], [zero]), Side(10.0, 2.0, [zero], [moments]), [torch.full((len(clipped),), power)]
    )


def ends(cost: Cost) -> tuple[float, float]:
    histogram = Histogram.of(torch.linspace(0, 10, 100))
    histogram.cost = cost
    return Sensitivity().activation_range(histogram, UINT8)


def test_what_no_answer_hangs_on_is_clipped() -> None:
    assert ends(cost(1.0, torch.zeros(16))) == (0.0, 2.0)


def test_what_answers_hang_on_is_not() -> None:
    assert ends(cost(1.0, torch.full((16,), 5.0))) == (0.0, 10.0)


@pytest.mark.parametrize(("count", "most"), [(6, 10.0), (8, 2.0)])
def test_of_few_images_nothing_is_clipped(count: int, most: float) -> None:
    assert ends(cost(1.0, torch.zeros(count)))[1] == most


def test_images_that_were_not_fitted_on_undo_a_range() -> None:
    """One image in four pays for the clipping: those that are fitted on never see it."""
    clipped = torch.zeros(16)
    clipped[3::4] = 5.0
    found = cost(1.0, clipped)
    assert ends(found) == (0.0, 10.0)
    assert found.undone


def test_of_ends_that_may_be_as_good_the_widest_is_taken() -> None:
    """Clipping costs one of twelve images much: the mean is a little lower, and the doubt larger than that."""
    clipped = torch.zeros(16)
    clipped[0] = (100 / 255**2 / 12 * 0.9 * 12) ** 0.5 / 2**0.5
    assert ends(cost(1.0, clipped))[1] == 10.0


def test_values_without_a_gradient_are_left_to_mse() -> None:
    histogram = Histogram.of(torch.randn(1000).abs())
    assert Sensitivity().activation_range(histogram, UINT8)[1] <= MinMax().activation_range(histogram, UINT8)[1]


class Outlier(nn.Module):
    """A channel a hundred times as large as the others, which the next layer hardly reads; one that is constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        with torch.no_grad():
            self.one.weight[0] *= 100
            self.one.weight[1] = 0
            self.two.weight[:, 0] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


@pytest.mark.parametrize(("count", "won"), [(1, -0.01), (2, -0.01), (8, -0.01), (16, 2.0), (32, 5.0)])
def test_never_worse_than_min_max(count: int, won: float) -> None:
    model = Outlier().eval()
    made = [
        rarefy.quantize(
            model, inputs=images(2), batches=[images(count, 5)], calibration=rule, equalize=False, progress=False
        )
        for rule in ("minmax", "sensitivity")
    ]
    least, default = (noise_db(model, graph, images(32, 9)) for graph in made)
    assert default > least + won


class Silu(nn.Module):
    """Channels of unlike size before and behind SiLU."""

    def __init__(self, wide: float = 30.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.three, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        with torch.no_grad():
            self.one.weight[0] *= wide
            self.two.weight[0] /= wide

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.two(F.silu(self.one(x))))
        return self.head(F.silu(self.three(x)).mean((2, 3)))


def test_scales_around_a_function_change_nothing_in_float() -> None:
    graph = simplify(fold(rarefy.capture(Silu().eval(), images(2))))
    before = share_copy(graph)
    assert channel_scales.open_up(graph) == 2  # the last is read by no layer
    layers = [node for node in graph.graph.nodes if channel_scales.is_scaling(node)]
    assert len(layers) == 4
    weight = attribute(graph, layers[0].args[1])
    weight.mul_(2.0)
    assert channel_scales.settle(graph) == 1
    graph.recompile()
    assert not any(channel_scales.is_scaling(node) for node in graph.graph.nodes)
    with torch.no_grad():
        assert not torch.allclose(graph(images(4)), before(images(4)))  # it is where it says
        weight.div_(2.0)


def test_channels_behind_silu_are_rounded_evenly() -> None:
    model = Silu().eval()
    plain, scaled = quantised(model, equalize=False), quantised(model)
    assert facts(scaled)["scaled"]
    assert noise_db(model, scaled, images(32, 9)) > noise_db(model, plain, images(32, 9)) + 1.5


def test_silu_is_one_step_between_two_roundings() -> None:
    graph = quantised(Silu(1.0).eval(), equalize=False)
    gates = [node for node in graph.graph.nodes if node.target is torch.ops.aten.sigmoid.default]
    assert len(gates) == 3 and all(user.target is torch.ops.aten.mul.Tensor for gate in gates for user in gate.users)


class Fragile(nn.Module):
    """A wide value, and a sine of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 64, 3)
        with torch.no_grad():
            self.stem.weight.mul_(120)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.sin(self.two(F.silu(self.stem(x))))
        return self.three(waves)


def test_layers_around_a_value_that_8_bits_cannot_hold_stay_float() -> None:
    model = Fragile().eval()
    graph = quantised(model)
    assert "stem" in facts(graph)["noisy"]  # type: ignore[operator]
    assert "noisy" not in facts(quantised(Silu(1.0).eval()))
    plain = quantised(model, calibration="minmax")
    assert "noisy" not in facts(plain)
    assert noise_db(model, graph, images(32, 9)) > noise_db(model, plain, images(32, 9)) + 6


def test_a_bias_is_left_where_the_halves_disagree() -> None:
    class Mean:
        def __init__(self, value: float) -> None:
            self.count, self._value = 8, value

        def value(self, groups: int) -> Tensor:
            return torch.full((1, 3, 1), self._value, dtype=torch.float64)

    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    graph = rarefy.quantize(
        model,
        inputs=torch.randn(2, 3),
        batches=[torch.randn(32, 3)],
        correct_bias=False,
        rounding="nearest",
        progress=False,
    )
    from rarefy.graph.lowering import to_numbers

    numbers = to_numbers(graph)
    layer = next(node for node in numbers.graph.nodes if node.target is torch.ops.aten.linear.default)
    weight = model[1].weight.detach()
    bias = qdq.decoded(numbers, qdq.numbers(layer)[1])
    codes = attribute(numbers, qdq.numbers(layer)[1].all_input_nodes[0])
    before = codes.clone()
    assert not correct_bias(numbers, layer, (weight, bias), (Mean(5.0), Mean(-5.0)))  # type: ignore[arg-type]
    assert torch.equal(codes, before)
    assert correct_bias(numbers, layer, (weight, bias), (Mean(5.0), Mean(4.0)))  # type: ignore[arg-type]
    lost = weight.double() - qdq.decoded(numbers, qdq.numbers(layer)[0]).double()
    scale = attribute(numbers, qdq.numbers(layer)[1].all_input_nodes[1]).double()
    torch.testing.assert_close((codes - before).double(), torch.round(lost.sum(1) * 4.5 / scale))


class Windows(nn.Module):
    """Looks at windows of an image as a batch (Swin), and at steps before images (a recurrent network's layout)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.first(x.unflatten(2, (3, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 3)).relu()
        steps = self.inner(x.reshape(n, 144, 8).transpose(0, 1)).relu()
        mean: Tensor = self.last(steps.mean(0))
        return mean


def test_windows_of_an_image_are_a_part_of_it() -> None:
    model = Windows().eval()
    small = quantised(model)
    assert len(facts(small)["layers"]) == 3  # type: ignore[arg-type]
    assert noise_db(model, small, images(8, 9)) > 25


def test_one_number_a_sample_is_an_answer() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            alike: Tensor = self.head(self.conv(x).relu().mean((2, 3))).squeeze(-1)
            return alike, alike.mean()

    small = quantised(Alike().eval())
    assert len(facts(small)["layers"]) == 2  # type: ignore[arg-type]
    assert noise_db(lambda x: Alike().eval()(x)[0], lambda x: small(x)[0], images(8, 9)) > 20
