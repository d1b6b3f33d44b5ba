"""quantize(): bounds from the maths on grids, rules and rounding; and a network whose integers are what ONNX Runtime
computes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EveryKernel, ImageAndNumbers, PaddedReads
from torch import nn

from rarefy import plugins
from rarefy.deployment.export import export
from rarefy.errors import DataError, InputError
from rarefy.graph.canonical import simplify
from rarefy.graph.capture import capture
from rarefy.graph.fold import fold
from rarefy.graph.interpreter import Resumable, run
from rarefy.kernels.chunks import PIECE
from rarefy.kernels.quantize import dequantize, fake_quantize
from rarefy.kernels.quantize import quantize as to_codes
from rarefy.pruning.prune import prune
from rarefy.quantization import formats
from rarefy.quantization.formats import Grid
from rarefy.quantization.observers import BINS, Histogram, observe
from rarefy.quantization.options import Options
from rarefy.quantization.quantize import quantize
from rarefy.quantization.rounding_pass import OfWeights
from rarefy.tasks import Classification


@pytest.fixture(scope="module")
def block() -> nn.Module:
    torch.manual_seed(0)
    model = EveryKernel()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(4)]


def noise_db(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Signal to noise, of what differs from image to image (answers of an untrained network are mostly a constant)."""
    wanted, got = (answer.detach() - answer.detach().mean(0) for answer in (wanted, got))
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@given(bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_nearest_is_within_half_a_step(bits: int, signed: bool, seed: int) -> None:
    grid = Grid(bits, signed, symmetric=signed)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(7, generator=generator) + 0.01
    low, high = grid.qmin * scale, grid.qmax * scale
    w = low[:, None] + (high - low)[:, None] * torch.rand(7, 33, generator=generator)
    codes = plugins.resolve("rounding", "nearest").codes(w / scale[:, None], grid, generator)
    back = dequantize(codes, scale, torch.zeros((), dtype=grid.dtype), 0)
    assert codes.min() >= grid.qmin and codes.max() <= grid.qmax
    assert ((w - back).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()


OF_WEIGHTS = [
    name for name in plugins.available("rounding") if isinstance(plugins.resolve("rounding", name), OfWeights)
]


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_every_rounding_gives_neighbouring_codes_and_repeats(name: str) -> None:
    rule, grid = plugins.resolve("rounding", name), Grid(4)
    scaled = torch.linspace(-9, 9, 1001)
    first = rule.codes(scaled.clone(), grid, torch.Generator().manual_seed(3))
    again = rule.codes(scaled.clone(), grid, torch.Generator().manual_seed(3))
    assert first.dtype is grid.dtype and torch.equal(first, again)
    assert ((first - scaled.clamp(grid.qmin, grid.qmax)).abs() <= 1).all()


def test_stochastic_rounding_is_unbiased_and_follows_the_seed() -> None:
    rule, n = plugins.resolve("rounding", "stochastic"), 200_000
    share = 0.3
    codes = rule.codes(torch.full((n,), 2 + share), Grid(), torch.Generator().manual_seed(0)).double()
    z = (codes.mean() - 2 - share) / (share * (1 - share) / n) ** 0.5
    assert abs(z) < 4  # a right rule fails this once in 16,000 seeds
    assert set(codes.unique().tolist()) == {2.0, 3.0}
    assert not torch.equal(
        codes, rule.codes(torch.full((n,), 2 + share), Grid(), torch.Generator().manual_seed(1)).double()
    )


@pytest.mark.parametrize("name", plugins.available("calibration"))
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "negative", "constant"])
def test_every_calibration_covers_a_range_inside_what_was_seen(name: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    x = {
        "normal": x,
        "relu": x.relu(),
        "outlier": torch.cat([x, torch.tensor([60.0])]),
        "negative": -x.abs() - 1,
        "constant": torch.full((100,), 2.5),
    }[kind]
    histogram, grid = Histogram.of(x[: len(x) // 2]), Grid(8, False, False)
    histogram.add(x[len(x) // 2 :])
    lo, hi = plugins.resolve("calibration", name).activation_range(histogram, grid)
    width = float(x.max() - x.min()) / BINS * 4 + 1e-6
    assert min(0.0, float(x.min())) - width <= lo <= hi <= max(0.0, float(x.max())) + width
    assert histogram.counts.sum() == len(x)


def test_mse_calibration_is_no_worse_than_minmax_on_weights_and_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 200, generator=generator) ** 3
    grid = Grid(4, axis=0)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return ((rows / scale[:, None]).round().clamp(grid.qmin, grid.qmax) * scale[:, None] - rows).square().sum(1)

    mse, minmax = (plugins.resolve("calibration", name) for name in ("mse", "minmax"))
    assert (error(mse.weight_scale(rows, grid)) <= error(minmax.weight_scale(rows, grid)) * (1 + 1e-6)).all()
    x, fine = rows.flatten(), Grid(4, False, False)
    lo, hi = mse.activation_range(Histogram.of(x), fine)
    assert hi - lo < x.max() - x.min()


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_histogram_counts_everything_whatever_the_order(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    histogram = Histogram.of(tensors[0])
    for tensor in tensors[1:]:
        histogram.add(tensor)
    everything = torch.cat(tensors)
    assert histogram.counts.sum() == len(everything)
    assert histogram.minimum == everything.min() and histogram.maximum == everything.max()
    assert histogram.lo <= histogram.minimum and histogram.maximum <= histogram.hi


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor_has_the_codes_of_its_parts(dtype: torch.dtype) -> None:
    """A large one goes through a buffer piece by piece; one of another layout, and small ones, do not."""
    x = (3 * torch.randn(2, 3, 301, 303)).to(dtype).requires_grad_()
    assert x.numel() > 2 * PIECE and x.numel() % PIECE
    grid = (torch.tensor(0.021, dtype=dtype), torch.tensor(100, dtype=torch.uint8), None, 0, 255, torch.uint8)
    whole = torch.ops.rarefy.quantize(x, *grid)
    assert whole.min() == 0 and whole.max() == 255 and not whole.requires_grad
    rows = torch.stack([torch.ops.rarefy.quantize(row, *grid) for row in x.flatten(0, 2)]).view(x.shape)
    assert torch.equal(whole, rows)
    assert torch.equal(whole, torch.ops.rarefy.quantize(x.contiguous(memory_format=torch.channels_last), *grid))


def test_fake_quantize_equals_the_codes_and_lets_the_gradient_through() -> None:
    x = torch.linspace(-3, 3, 101, requires_grad=True)
    scale, zero = torch.tensor(0.01), torch.tensor(100, dtype=torch.uint8)
    y = fake_quantize(x, scale, zero, None, 0, 255)
    assert torch.allclose(
        y, dequantize(to_codes(x, scale, zero, None, 0, 255, torch.uint8), scale, zero, None), atol=1e-6
    )
    y.sum().backward()
    inside = (x >= -1.0) & (x <= 1.55)
    assert torch.equal(x.grad != 0, inside)


def test_folding_and_simplifying_change_no_answer(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0])
    folded = simplify(fold(graph))
    targets = {str(node.target) for node in folded.graph.nodes}
    assert not any("batch_norm" in target or "hardswish" in target or "mean.dim" in target for target in targets)
    assert torch.allclose(graph(batches[1]), folded(batches[1]), atol=2e-5)


@pytest.mark.parametrize(
    ("around", "padding", "value", "melts"),
    [
        ((1, 1, 2, 2), 0, 0.0, [2, 1]),
        ((2, 2), 1, 0.0, [1, 3]),
        ((0, 1, 0, 1), 0, 0.0, None),  # fewer on one side
        ((-1, -1, 1, 1), 2, 0.0, None),  # takes some away
        ((1, 1, 1, 1), 0, 0.5, None),
    ],
)
def test_zeros_around_what_a_convolution_reads_are_its_padding(
    around: Sequence[int], padding: int, value: float, melts: list[int] | None
) -> None:
    x = torch.randn(2, 3, 9, 11)
    graph = fold(capture(PaddedReads(around, padding, value).eval(), x))
    simple = simplify(graph)
    targets = [node.target for node in simple.graph.nodes if node.op == "call_function"]
    assert (torch.ops.aten.pad.default not in targets) == (melts is not None)
    (layer,) = [node for node in simple.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert melts is None or list(layer.args[4]) == melts
    assert layer.name in {node.name for node in graph.graph.nodes}
    assert torch.allclose(graph(x), simple(x), atol=1e-6)


@pytest.mark.parametrize("calibration", plugins.available("calibration"))
def test_int8_answers_are_near_the_floats(block: nn.Module, batches: list[torch.Tensor], calibration: str) -> None:
    graph = capture(block, batches[0])
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    small = quantize(graph, batches=batches, calibration=calibration, progress=False)
    assert all(
        torch.equal(value, graph.state_dict()[name]) for name, value in before.items()
    )  # the caller's model is left alone
    assert noise_db(graph(batches[0]), small(batches[0])) > (20 if calibration in ("minmax", "mse") else 15)
    assert small(batches[0][:3]).shape == (3, 10)
    record = small.meta["history"][-1]
    assert record["step"] == "quantize" and not record["facts"]["float"]
    assert {layer["bits"] for layer in record["facts"]["layers"]} == {8}


def test_bias_correction_mends_the_mean() -> None:
    """Of what the weights of one layer move, on inputs that are not 0 in the mean."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), torch.rand(64, 1, 8, 8)
    graph = capture(model, x[:2])
    shift = {
        mend: (
            quantize(graph, batches=x.split(16), weights="int4", rounding="nearest", correct_bias=mend, progress=False)(
                x
            )
            - graph(x)
        )
        .mean(0)
        .abs()
        .mean()
        for mend in (False, True)
    }
    assert shift[True] < shift[False] / 10


def test_fewer_bits_more_noise_and_packed_bits_are_told(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0])
    noise = []
    for bits in (8, 6, 4):
        small = quantize(graph, batches=batches, weights=f"int{bits}", progress=False)
        noise.append(noise_db(graph(batches[0]), small(batches[0])))
        codes = [value for name, value in small.named_buffers() if name.endswith("weight_codes")]
        least, most = min(int(value.min()) for value in codes), max(int(value.max()) for value in codes)
        assert -(2 ** (bits - 1)) <= least <= -most and most == 2 ** (bits - 1) - 1
        assert bits < 8 or least == -127
        assert set(small.meta.get("bits", {}).values()) == ({bits} if bits < 8 else set())
    assert noise[0] > noise[2] + 3 and noise[1] > noise[2] + 3  # at 8 and 6 bits the 8-bit activations are what is left


def test_the_same_seed_gives_the_same_bytes(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0])
    one, two, other = (
        quantize(graph, batches=batches, rounding="stochastic", seed=seed, progress=False).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_onnxruntime_computes_what_is_simulated(block: nn.Module, batches: list[torch.Tensor], tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    graph = capture(block, batches[0])
    small = quantize(graph, batches=batches, progress=False)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    first, second = runtime.export(small, tmp_path / "a.onnx"), runtime.export(small, tmp_path / "b.onnx")
    assert first.read_bytes() == second.read_bytes()
    found = runtime.compare(small, first, torch.cat(batches))
    assert found["passed"] and found["ulp"] <= 1 and found["first_diverging_layer"] is None
    assert len(found["layers"]) >= 12
    kernels = runtime.integer_islands(first)
    assert not kernels["float_islands"]
    assert kernels["integer"]["QLinearConv"] == 6 and {
        "QLinearAdd",
        "QLinearMul",
        "QLinearGlobalAveragePool",
        "QGemm",
    } <= set(kernels["integer"])
    wrong = copy.deepcopy(small)  # a file of another model: the layer is named
    dict(wrong.named_buffers())["depthwise.0.bias_codes"].add_(10_000)
    broken = runtime.compare(wrong, first, batches[0])
    assert not broken["passed"] and broken["first_diverging_layer"].startswith("depthwise")


def test_zero_padding_stays_in_integers_and_narrow_layers_are_written_wide(
    batches: list[torch.Tensor], tmp_path
) -> None:
    """The option-A shortcut pads channels; a static stride-2 pad melts into its convolution; 8 channels are written as
    16."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    class PaddedReads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(3, 16, 3, 2),
                nn.Conv2d(16, 8, 3, padding=1),
                nn.Conv2d(8, 32, 3, padding=1),
            )
            self.head = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(nn.functional.pad(x, (0, 1, 0, 1))).relu()
            y = self.c(self.b(x).relu())
            x = (y + nn.functional.pad(x, (0, 0, 0, 0, 8, 8))).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    graph = capture(PaddedReads().eval(), batches[0])
    small = quantize(graph, batches=batches, progress=False)
    assert noise_db(graph(batches[0]), small(batches[0])) > 20
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    path = runtime.export(small, tmp_path / "padded.onnx")
    found = runtime.compare(small, path, torch.cat(batches))
    assert found["passed"] and found["ulp"] <= 1
    assert not runtime.integer_islands(path)["float_islands"]
    nodes = onnx.load(str(path)).graph
    convolutions = [node for node in nodes.node if node.op_type == "Conv"]
    pads = [list(attribute.ints) for node in convolutions for attribute in node.attribute if attribute.name == "pads"]
    assert pads[0] == [0, 0, 1, 1] and [node.op_type for node in nodes.node].count("Pad") == 1
    shapes = {tensor.name: tuple(tensor.dims) for tensor in nodes.initializer}
    assert (16, 16, 3, 3) in shapes.values() and (32, 16, 3, 3) in shapes.values()
    assert dict(small.named_buffers())["b.weight_codes"].shape[0] == 8  # only the file is wider


def test_float_islands_are_found(batches: list[torch.Tensor], tmp_path) -> None:
    """A network with an operator that has no integer kernel shows one, so that the test above can fail."""
    pytest.importorskip("onnxruntime")

    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.sin(self.a(x))).mean((2, 3))

    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    small = quantize(capture(Island(), batches[0]), batches=batches, progress=False)
    assert runtime.integer_islands(runtime.export(small, tmp_path / "island.onnx"))["float_islands"]


def test_wrong_requests_are_refused(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0])
    small = quantize(graph, batches=batches, progress=False)
    for message, call in {
        "quantised already": lambda: quantize(small, batches=batches),
        "no calibration images": lambda: quantize(graph),
        "number format": lambda: quantize(graph, batches=batches, weights="int9"),
        "integer kernels take": lambda: quantize(graph, batches=batches, weights="int4:group=8"),
        "the model takes": lambda: quantize(graph, batches=[torch.randn(2, 1, 32, 32)]),
        "no layer can be quantised": lambda: quantize(graph, batches=batches, ignore=["*"]),
        "unknown choice": lambda: quantize(graph, batches=batches, calibration="nonsense"),
        "ignore: 'squeese' matches no layer": lambda: quantize(graph, batches=batches, ignore="squeese"),
        "weights: 'tail' matches no layer": lambda: quantize(
            graph, batches=batches, weights="int8;head=float;tail=int4"
        ),
        "activations: 'tail' matches no layer": lambda: quantize(
            graph, batches=batches, activations="uint8;tail=uint4"
        ),
        "weights: 'tai.' matches no layer": lambda: quantize(graph, activations="float", weights="int4;tai?=int8"),
        "prune its float original": lambda: prune(small, keep=0.5),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(DataError, match="no calibration images"):
        quantize(graph, batches=[], progress=False)
    with pytest.raises(InputError):
        Grid(1)
    assert str(formats.parse("uint4", symmetric=False)) == "uint4"


def test_averages_are_computed_on_codes(batches: list[torch.Tensor]) -> None:
    """Between integer layers neither pooling is left to float."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    small = quantize(capture(model.eval(), batches[0]), batches=batches, progress=False)
    targets = [str(node.target) for node in small.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "pool" in target or "mean" in target] == [
        "rarefy.avg_pool2d.default", "rarefy.mean.default"
    ]  # fmt: skip


def test_options_are_the_keywords_with_their_defaults() -> None:
    """The command line and the record read them; a seed is 0, and not None."""
    keywords = {
        name: one.default
        for name, one in inspect.signature(quantize).parameters.items()
        if name not in ("model", "task", "inputs", "batches")
    }
    options = {field.name: field.default for field in dataclasses.fields(Options)}
    assert list(options.items()) == list(keywords.items())
    assert options == {
        "images": 128, "batch_size": 16, "weights": "int8", "activations": "uint8", "calibration": "sensitivity",
        "weight_calibration": None, "rounding": "narrow", "runtime": "onnxruntime", "ignore": (), "equalize": True,
        "correct_bias": True, "smooth": None, "gate": None, "seed": 0, "device": None,
        "progress": True,
    }  # fmt: skip
    assert options["seed"] is not False and all(field.metadata["help"] for field in dataclasses.fields(Options))


def test_a_device_that_is_not_there_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    for name in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"device={name}: torch can't use it .*leave device out"):
            quantize(model, inputs=torch.zeros(2, 3, 8, 8), batches=[torch.randn(4, 3, 8, 8)], device=name)


@pytest.mark.gpu
def test_a_gpu_rounds_to_the_same_codes_but_for_ties() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 3))
    given = {"inputs": torch.zeros(2, 3, 8, 8), "progress": False}
    there, here = (quantize(model, batches=[torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))],
                            device=device, **given) for device in ("cuda", None))  # fmt: skip
    codes = {name: one for name, one in here.named_buffers() if name.endswith("codes") and one.dtype == torch.int8}
    assert codes
    for name, one in codes.items():
        other = there.get_buffer(name)
        assert other.device.type == "cpu" and (other != one).float().mean() < 0.01


@pytest.mark.parametrize(("images", "batch_size", "total"), [(32, 8, 4), (30, 8, 4), (None, None, None)])
def test_the_bar_knows_how_many_batches_calibrate(
    batches: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    images: int | None,
    batch_size: int | None,
    total: int | None,
) -> None:
    """Of a task's images; of the caller's batches nobody knows."""
    seen: list[tuple[int | None, int, str]] = []

    def track(items: Iterable[Any], total: int | None, label: str, shown: bool) -> Iterator[Any]:
        found = list(items)
        seen.append((total, len(found), label))
        return iter(found)

    monkeypatch.setattr("rarefy.quantization.quantize.track", track)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    pictures = (torch.rand(40, 3, 8, 8), torch.arange(40) % 2)
    graph = capture(model.eval(), pictures[0][:2])
    if images is None:
        quantize(graph, batches=[pictures[0][:20], pictures[0][20:]], progress=False)
        assert seen[0] == (None, 2, "calibrate")
    else:
        task = Classification(train=pictures, val=pictures)
        quantize(graph, task, images=images, batch_size=batch_size, progress=False)
        assert seen[0] == (total, total, "calibrate")


def test_batches_that_are_read_once_are_all_read(batches: list[torch.Tensor]) -> None:
    """Smoothing, mixed widths and equalising look at the first images, and calibration begins with them again."""
    graph = capture(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.LayerNorm(900), nn.Linear(900, 4)).eval(), batches[0]
    )
    options = {"smooth": 0.5, "weights": "mixed:bits=6", "progress": False}
    listed, once = (quantize(graph, batches=given, **options) for given in (batches, iter(batches)))
    assert listed.meta["history"][-1]["facts"]["images_of_rounding"] == 32
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in listed.state_dict().items())


def test_ignored_layers_stay_float(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0])
    for ignore in (["head"], "head"):
        small = quantize(graph, batches=batches, ignore=ignore, progress=False)
        assert "head.weight" in dict(small.named_parameters()) and small.meta["history"][-1]["facts"]["float"] == [
            "head"
        ]


def test_observe_refuses_nan(block: nn.Module) -> None:
    from rarefy.errors import CheckFailed

    graph = capture(block, torch.randn(2, 3, 32, 32))
    node = next(node for node in graph.graph.nodes if "conv2d" in node.name)
    with pytest.raises(CheckFailed, match="NaN"):
        observe(graph, [node], [(torch.full((2, 3, 32, 32), torch.nan),)])


def test_each_layer_has_the_grid_it_is_given(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0])
    as_text = quantize(graph, batches=batches, weights="int4;stem.*=int8;squeeze=int3;head=float", progress=False)
    as_table = quantize(
        graph,
        batches=batches,
        weights={"*": "int4", "stem.*": "int8", "squeeze": "int3", "head": "float"},
        progress=False,
    )
    for small in (as_text, as_table):
        facts = small.meta["history"][-1]["facts"]
        bits = {layer["name"]: layer["bits"] for layer in facts["layers"]}
        assert bits["stem.0"] == 8 and bits["squeeze"] == 3 and bits["excite"] == 4 and facts["float"] == ["head"]
        assert small.meta["bits"]["squeeze.weight_codes"] == 3 and "stem.0.weight_codes" not in small.meta["bits"]
    assert all(torch.equal(value, as_table.state_dict()[name]) for name, value in as_text.state_dict().items())
    with pytest.raises(InputError, match="names no layer"):
        formats.assign("int4;int8", symmetric=True)
    assert formats.assign("float; a.*=int4 ;a.b=int8:symmetric=no", symmetric=True).of(["a.b"]) == Grid(8, True, False)


@pytest.mark.parametrize("memory", [0, 10**5, 10**9])
def test_a_prefix_gives_each_place_its_values_whatever_it_may_keep(
    block: nn.Module, batches: list[torch.Tensor], memory: int
) -> None:
    """Values equal those of a run of the whole graph, and what is changed behind the place is seen."""
    uneven = [1, 2] * 10 + [2]  # more than are kept side by side
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in torch.cat(batches).split(uneven)]
    graph = capture(block, batches[0])
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    wanted: dict[torch.fx.Node, list[torch.Tensor]] = {}
    with torch.no_grad():
        for batch in batches:
            run(graph, [batch], see=lambda node, value: wanted.setdefault(node, []).append(value))
    prefix = Resumable(graph, [(batch,) for batch in batches], memory, torch.device("cpu"))
    for node in nodes[::3]:
        source = node.all_input_nodes[0]
        if source.op == "call_function":
            found = [value for (value,) in prefix.run(node, (source,))]
            assert all(torch.equal(one, other) for one, other in zip(found, wanted[source], strict=True))
    with torch.no_grad():
        dict(graph.named_parameters())["head.bias"].add_(1)
    answers = [value for (value,) in prefix.run(nodes[-1].next, (nodes[-1],), keep=False)]
    assert all(torch.allclose(one, other + 1, atol=1e-5) for one, other in zip(answers, wanted[nodes[-1]], strict=True))


def test_max_pooling_padded_by_infinity_resized_and_softmaxed_codes_are_the_runtimes(
    batches: list[torch.Tensor], tmp_path
) -> None:
    """-inf around a plane that is only pooled is the lowest code; a resize between integer kernels keeps its sizes;
    softmax on a grid of one over a whole number."""
    pytest.importorskip("onnxruntime")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Conv2d(3, 16, 3),
                nn.Conv2d(16, 16, 1),
                nn.Conv2d(16, 16, 1),
                nn.Conv2d(16, 8, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.max_pool2d(nn.functional.pad(self.a(x), (0, 1, 0, 1), value=-torch.inf), 3, 2)
            x = self.b(x).relu()
            x = self.c(nn.functional.interpolate(x, scale_factor=2)) * 4
            return self.d(self.c(x[..., :9]).softmax(1)).mean((2, 3))

    torch.manual_seed(0)
    graph = capture(Odd().eval(), batches[0])
    small = quantize(graph, batches=batches, progress=False)
    assert noise_db(graph(batches[0]), small(batches[0])) > 15
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    found = runtime.compare(small, runtime.export(small, tmp_path / "odd.onnx"), torch.cat(batches))
    assert found["passed"] and found["ulp"] <= 1
    assert max(layer["share"] for layer in found["layers"]) < 1e-3


def test_padding_by_infinity_is_the_lowest_code_of_the_value_padded(batches: list[torch.Tensor]) -> None:
    """The grid that lies last in the network is signed; the one that is padded is not."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.pad(self.stem(x), (0, 1, 0, 1), value=-torch.inf)
            return self.head(self.body(nn.functional.max_pool2d(x, 3, 2)).mean((2, 3)))

    torch.manual_seed(0)
    graph = capture(Pooled().eval(), batches[0])
    small = quantize(graph, batches=batches, activations="uint8;head=int8", progress=False)
    (pad,) = [node for node in small.graph.nodes if node.target is torch.ops.aten.pad.default]
    assert list(pad.args[1:]) == [[0, 1, 0, 1], "constant", 0]
    assert small.meta["history"][-1]["facts"]["layers"][-1]["activation_grid"] == "int8:symmetric=no"
    assert noise_db(graph(batches[0]), small(batches[0])) > 20


def test_names_of_values_and_layouts_of_codes_are_free(tmp_path) -> None:
    """A value called as a module's own attribute is (``to``), and a view that hangs on how its codes lie in memory."""
    pytest.importorskip("onnxruntime")

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 36, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.gelu(self.stem(x).permute(0, 2, 3, 1))  # channels first in memory
            return self.head(x.permute(0, 3, 1, 2).view(x.shape[0], 8 * 36))

    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 6, 6)
    graph = capture(Turned().eval(), inputs)
    next(node for node in graph.graph.nodes if node.target is torch.ops.aten.gelu.default)._rename("to")
    small = quantize(graph, batches=[inputs], progress=False)
    assert noise_db(graph(inputs), small(inputs)) > 15
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    found = runtime.compare(small, runtime.export(small, tmp_path / "turned.onnx"), inputs)
    assert found["passed"] and found["ulp"] <= 1


def test_the_float_model_is_left_as_it_was(block: nn.Module, batches: list[torch.Tensor]) -> None:
    graph = capture(block, batches[0]).requires_grad_(True)
    before = {name: (value, value.clone()) for name, value in graph.state_dict(keep_vars=True).items()}
    first = next(node for node in graph.graph.nodes if "conv2d" in str(node.target))
    small = quantize(graph, batches=batches, ignore=[str(first.args[1].target).rpartition(".")[0]], progress=False)
    after = graph.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, old) for name, (value, old) in before.items())
    assert all(parameter.requires_grad for parameter in graph.parameters())
    own = {value.untyped_storage().data_ptr() for value in small.state_dict().values()}
    assert not own & {value.untyped_storage().data_ptr() for value in after.values()}


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["nearest", "gptaq", "adaround:steps=50", "brecq:steps=20"])
@pytest.mark.parametrize("weights", ["int4", "mixed:bits=4"])
def test_quantizes_on_the_gpu_and_leaves_nothing_on_the_host(
    block: nn.Module, batches: list[torch.Tensor], rounding: str, weights: str
) -> None:
    there = [batch.cuda() for batch in batches]
    small = quantize(
        capture(copy.deepcopy(block).cuda(), there[0]),
        batches=there,
        weights=weights,
        rounding=rounding,
        progress=False,
    )
    assert all(value.is_cuda for value in small.state_dict().values())
    assert torch.isfinite(small(there[0])).all()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_model_of_two_inputs(rounding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = torch.randn(32, 3, 8, 8), torch.randn(32, 7)
    graph = capture(ImageAndNumbers().eval(), given)
    small = quantize(graph, batches=[given], rounding=rounding, progress=False)
    wanted = graph(*given)
    assert (small(*given) - wanted).square().mean() < 1e-3 * wanted.var()
    assert export(small, tmp_path / "model.onnx", inputs=given)["passed"]


def test_half_precision_is_refused_in_one_line(batches: list[torch.Tensor]) -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).half(), batches[0].half())
    with pytest.raises(InputError, match="0.weight is float16, and codes are made of float32"):
        quantize(graph, batches=batches, progress=False)
