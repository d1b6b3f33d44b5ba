"""Number formats: text and back, bounds from the maths, torch's own 8-bit floats, the tables of the MX specification,
and files that give back every code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import fx, nn

from rarefy.artifact.coding.packing import WIDTHS, code_range
from rarefy.artifact.folder import load, save
from rarefy.artifact.words import STORES
from rarefy.errors import InputError
from rarefy.kernels import fp4
from rarefy.kernels.quantize import along, dequantize, fake_quantize, quantize
from rarefy.quantization import formats
from rarefy.quantization.formats import Fp4, Fp8, Grid, parse, rows, shaped

OPERATORS = torch.ops.rarefy
TEXTS = [
    "int8",
    "uint4",
    "int4:group=32",
    "int8:symmetric=no",
    "uint3:group=7,symmetric=yes",
    "fp8:e4m3",
    "fp8:e5m2,group=8",
    "mxfp4",
    "nvfp4",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_back(text: str) -> None:
    grid = parse(text, symmetric=not text.startswith("u"), axis=0)
    assert str(grid) == text and parse(grid, symmetric=True) is grid and isinstance(grid, formats.Format)
    assert parse(str(grid), symmetric=not text.startswith("u"), axis=0) == grid


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("int8", (-127, 127)), ("int8:symmetric=no", (-128, 127)), ("int7", (-64, 63)), ("int6", (-32, 31)),
        ("int5", (-16, 15)), ("int4", (-8, 7)), ("int3", (-4, 3)), ("int2", (-2, 1)), ("uint8", (0, 255)),
        ("uint4", (0, 15)), ("uint2", (0, 3)), ("fp8:e4m3", (-448, 448)), ("fp8:e5m2", (-57344, 57344)),
        ("mxfp4", (-6, 6)), ("nvfp4", (-6, 6)),
    ],
)  # fmt: skip
def test_lowest_and_highest_code(text: str, ends: tuple[float, float]) -> None:
    grid = parse(text, symmetric=not text.startswith("u"))
    assert (grid.qmin, grid.qmax) == ends
    assert grid.snap(torch.tensor([-1e9, 1e9])).tolist() == list(ends)


def test_layers_take_a_format_as_it_is() -> None:
    grid = Grid(4, axis=0)
    given = formats.assign({"fc": grid, "head": "float", "*.conv": "int2"}, symmetric=True, axis=0)
    assert given.of(["fc"]) is grid and given.of(["head"]) is None and given.of(["a.conv"]) == Grid(2, axis=0)
    assert given.of(["other"]) == Grid(8, axis=0) and str(given) == "int8;fc=int4;head=float;*.conv=int2"
    assert formats.assign(Fp8(), symmetric=True).of(["fc"]) == Fp8()


def test_options_in_any_order_and_wrong_ones() -> None:
    assert parse("INT4: symmetric=no, group=16", symmetric=True, axis=0) == Grid(4, True, False, 0, 16)
    assert parse("fp8", symmetric=True, axis=0) == Fp8("e4m3", 0)
    for wrong in (
        "int9",
        "int4:group=x",
        "int4:group=0",
        "int4:rows=3",
        "fp8:e3m4",
        "fp8:e4m3,symmetric=no",
        "mxfp4:group=16",
        "fp4",
        "",
    ):
        with pytest.raises(InputError):
            parse(wrong, symmetric=True)


@given(
    st.integers(2, 8),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([(), (3,), (2, 3)]),
    st.integers(1, 11),
    st.integers(0, 999),
)
def test_groups_are_within_half_a_step_and_their_scales_serve_them_alone(
    bits: int, out: int, inputs: int, kernel: tuple[int, ...], group: int, seed: int
) -> None:
    grid = Grid(bits, axis=0, group=group)
    weight = torch.randn(out, inputs, *kernel, generator=torch.Generator().manual_seed(seed))
    scale = shaped(rows(weight, grid).abs().amax(1) / grid.qmax, weight, grid)
    assert scale.shape == (out, math.ceil(inputs / group), *[1] * len(kernel))
    zero = torch.zeros((), dtype=grid.dtype)
    codes = OPERATORS.quantize(weight, scale, zero, 1, grid.qmin, grid.qmax, grid.dtype, group)
    back = OPERATORS.dequantize(codes, scale, zero, 1, group)
    for first in range(0, inputs, group):
        part = weight[:, first : first + group]
        step = part.flatten(1).abs().amax(1) / grid.qmax
        error = (part - back[:, first : first + group]).flatten(1).abs()
        assert (error <= step[:, None] / 2 * (1 + 1e-5)).all()
    assert torch.equal(fake_quantize(weight, scale, zero, 1, grid.qmin, grid.qmax, 1.0, group), back)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_is_torchs(kind: str) -> None:
    grid = Fp8(kind)
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[torch.isfinite(every.float())]
    assert torch.equal(grid.snap(finite.float()), finite.float())  # each value is its own nearest
    x = torch.cat([torch.randn(4000) * 10 ** torch.linspace(-4, 3, 4000), torch.tensor([1e9, -1e9])])
    snapped, values = grid.snap(x), finite.float().sort().values
    nearest = (x[:, None] - values).abs().min(1).values
    assert torch.equal((snapped - x).abs(), nearest)
    codes = OPERATORS.quantize(
        x, torch.tensor(0.5), torch.zeros((), dtype=dtype), None, int(grid.qmin), int(grid.qmax), dtype
    )
    assert codes.dtype is dtype and torch.equal(codes.float(), grid.snap(x / 0.5))
    assert torch.equal(
        OPERATORS.dequantize(codes, torch.tensor(0.5), torch.zeros((), dtype=dtype), None), codes.float() * 0.5
    )


def test_e2m1_codes_are_the_specifications() -> None:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wanted = torch.tensor([*values, *(-float(value) for value in values)])
    assert torch.equal(fp4.decoded(torch.arange(16, dtype=torch.uint8)), wanted)
    assert fp4.encoded(wanted).tolist() == list(range(16))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5, 9.0])
    assert fp4.decoded(fp4.encoded(ties)).tolist() == [
        0,
        1,
        1,
        2,
        2,
        4,
        4,
        -2,
        6,
    ]  # to the even code; too large: the largest
    x = torch.linspace(-7, 7, 1001)
    assert torch.equal((fp4.decoded(fp4.encoded(x)) - x).abs(), (x[:, None] - wanted).abs().min(1).values)


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 37), (2, 20, 3, 3), (4, 1, 3, 3)])
def test_blocks_of_fp4(text: str, shape: tuple[int, ...]) -> None:
    grid = parse(text, symmetric=True, axis=0)
    assert isinstance(grid, Fp4)
    weight = torch.randn(*shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
    scale, whole = grid.scales(weight)
    step = fp4.block_scale(scale) * whole
    codes = grid.codes(grid.snap(weight / along(step, weight, 1, grid.group)))
    back = OPERATORS.dequantize_fp4(codes, scale, whole, grid.group)
    blocks = rows(weight, grid)
    step = step.reshape(-1)
    largest = blocks.abs().amax(1)
    if text == "mxfp4":
        assert torch.equal(torch.log2(step), torch.log2(step).round()) and float(whole) == 1
        assert ((largest < 8 * step) & (largest >= 4 * step)).all()
    else:
        assert (largest <= 6 * step * (1 + 2**-4)).all() and (
            largest >= 6 * step * (1 - 2**-4)
        ).all()  # e4m3 has 3 bits after the point
    error = (rows(back, grid) - blocks).abs()
    assert (
        error <= torch.maximum(step[:, None], largest[:, None] - 6 * step[:, None]) * (1 + 1e-5)
    ).all()  # the widest gap is 2: half is 1
    assert float(error.square().sum() / blocks.square().sum()) < 0.02


def graph_of(layers: list[tuple[torch.Tensor, torch.Tensor, int | None, int]], bits: dict[str, int]) -> fx.GraphModule:
    """Yields each layer's decoded weights, so that every code shows. layers: codes, scale, axis, group."""
    holder, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    answers = []
    for index, (codes, scale, axis, group) in enumerate(layers):
        for name, value in (
            (f"codes{index}", codes),
            (f"scale{index}", scale),
            (f"zero{index}", torch.zeros((), dtype=codes.dtype)),
        ):
            holder.register_buffer(name, value)
        sources = tuple(graph.get_attr(f"{name}{index}") for name in ("codes", "scale", "zero"))
        answers.append(graph.call_function(OPERATORS.dequantize.default, (*sources, axis, group)))
    graph.output((x, *answers))
    module = fx.GraphModule(holder, graph)
    module.meta = {"inputs": [{"shape": [1], "dtype": "float32"}], "core": None, "bits": bits}
    return module.eval()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("store", STORES)
def test_every_width_and_odd_shape_is_saved_without_gaps_and_comes_back(bits: int, store: str, tmp_path) -> None:
    layers = []
    for signed in (True, False):
        grid = Grid(bits, signed, axis=0, group=4)
        low, high = code_range(bits, grid.dtype)
        for shape in [(1, 1), (3, 5), (7, 3, 3, 3), (2, 33), (5, 1, 5, 5), (8, 16)]:
            codes = torch.randint(low, high + 1, shape).to(grid.dtype)
            layers.append((codes, shaped(torch.rand(len(rows(codes.float(), grid))) + 0.1, codes, grid), 1, 4))
    graph = graph_of(layers, {f"codes{index}": bits for index in range(len(layers))})
    back = load(save(graph, tmp_path / "saved", store=store))
    found, wanted = dict(back.named_buffers()), dict(graph.named_buffers())
    assert all(found[name].dtype is value.dtype and torch.equal(found[name], value) for name, value in wanted.items())
    assert all(map(torch.equal, back(torch.zeros(2, 1)), graph(torch.zeros(2, 1))))
    if store == "fastest" and bits < 8:
        with safe_open(tmp_path / "saved" / "weights.safetensors", "pt") as file:
            for index, (codes, *_) in enumerate(layers):
                assert file.get_tensor(f"codes{index}").numel() == math.ceil(codes.numel() * bits / 8)


def test_float_codes_are_saved_too(tmp_path) -> None:
    codes = torch.randn(3, 5).to(torch.float8_e4m3fn)
    back = load(save(graph_of([(codes, torch.rand(3), 0, 0)], {}), tmp_path / "saved")).codes0
    assert back.dtype is codes.dtype and torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


def test_learned_scales_have_the_papers_gradient() -> None:
    """LSQ, equation 3: d y / d s = round(v) - v inside, the clip's code outside, times the factor."""
    x = torch.tensor([[-9.0, -0.6, 0.3, 2.2, 30.0], [0.1, 0.2, -0.7, 1.0, 50.0]], requires_grad=True)
    scale = torch.tensor([0.5, 2.0], requires_grad=True)
    y = fake_quantize(x, scale, torch.zeros((), dtype=torch.int8), 0, -7, 7, 0.25)
    y.sum().backward()
    v = (x / scale[:, None]).detach()
    slope = torch.where(v < -7, -7.0, torch.where(v > 7, 7.0, v.round() - v))
    assert torch.allclose(scale.grad, 0.25 * slope.sum(1))
    assert torch.equal(x.grad, ((v >= -7) & (v <= 7)).float())
    zero = torch.tensor(3, dtype=torch.uint8)  # affine: what is clipped stands for q - z
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(torch.tensor([100.0, -100.0]), scale, zero, None, 0, 15).sum().backward()
    assert float(scale.grad) == (15 - 3) + (0 - 3)
    assert torch.equal(
        fake_quantize(x, scale, zero, None, 0, 15),
        dequantize(quantize(x, scale, zero, None, 0, 15, torch.uint8), scale, zero, None),
    )


def test_integers_of_two_to_eight_bits_and_groups_of_one_or_more() -> None:
    for bits in (1, 9, 0):
        with pytest.raises(InputError, match=f"a grid of {bits} bits"):
            Grid(bits)
    for group in (0, -1):
        with pytest.raises(InputError, match=f"groups of {group}"):
            Grid(group=group)
    ends = [(Grid(bits).qmin, Grid(bits).qmax, Grid(bits).levels) for bits in (2, 4, 8)]
    assert ends == [(-2, 1, 3), (-8, 7, 15), (-127, 127, 254)] and Grid(8, symmetric=False).qmin == -128
    assert [(Grid(bits, signed=False).qmin, Grid(bits, signed=False).qmax) for bits in (2, 8)] == [(0, 3), (0, 255)]
    assert [Fp4(kind).group for kind in ("mx", "nv")] == [32, 16]
    assert Grid(group=1).group == 1
