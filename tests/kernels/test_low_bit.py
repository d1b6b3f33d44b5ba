"""Codes of few bits: packed words, random bits, masks and linear layers, in torch and in Triton."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rarefy.artifact.coding import packing as stored
from rarefy.kernels.low_bit import int8_linear, linear, masks, packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:triton.*")


def triton_form(name: str) -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module(f"rarefy.kernels.cuda.{name}")


def philox(counter: int, seed: int) -> list[int]:
    """Philox4x32-7 in Python's whole numbers, from the paper's figure."""
    x, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def test_random_bits_are_philox() -> None:
    assert philox(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]  # of Random123's known answers
    for seed, block in ((0, 0), (7, 5), (2**40 + 3, 2**33 + 1)):
        wanted = [half for word in philox(block, seed) for half in (word & 0xFFFF, word >> 16)]
        assert packing.random_bits(5, seed, first=8 * block).tolist() == wanted[:5]


@pytest.mark.parametrize("bits", packing.WIDTHS)
@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 3), None), ((3, 16), 0), ((2, 5, 6), 1)])
def test_packed_codes_are_the_file_s_and_come_back(bits: int, shape: tuple[int, ...], axis: int | None) -> None:
    x = torch.randn(shape) * 3
    scale = torch.tensor(0.7) if axis is None else torch.rand(shape[axis]) + 0.3
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    low = -(2 ** (bits - 1))
    words = packing.quantize_pack(x, scale, zero, axis, low, low + 2**bits - 1, bits, None)
    step = scale if axis is None else scale.view([-1 if dim == axis else 1 for dim in range(len(shape))])
    codes = torch.round(x / step).clamp(low, low + 2**bits - 1)
    file = stored.pack(codes.to(torch.int8), bits)
    assert words.view(torch.uint8)[: len(file)].equal(file) and not words.view(torch.uint8)[len(file) :].any()
    assert packing.unpack(words, bits, x.numel(), True).view(shape).equal(codes.long())
    assert packing.unpack_dequantize(words, scale, zero, axis, list(shape), bits, True).equal(codes * step)


@pytest.mark.parametrize(
    ("bits", "axis", "seed"), [(8, None, 2**40 + 3), (4, 1, 7), (3, 1, None), (3, None, 5), (2, None, None)]
)
def test_triton_packs_the_same_bits_for_any_launch(bits: int, axis: int | None, seed: int | None) -> None:
    kernel = triton_form("packing")
    x = torch.randn(1, 5, 7) * 3
    scale = torch.tensor(0.7) if axis is None else torch.rand(5) + 0.3
    zero = torch.randint(0, 3, scale.shape)
    given = (axis, 0, 2**bits - 1, bits)
    wanted = packing.quantize_pack(x, scale, zero, *given, seed)
    moved = [one.to(DEVICE) for one in (x, scale, zero)]
    for lanes, warps in ((4, 1), (16, 4)):
        assert kernel.quantize_pack(*moved, *given, seed, lanes=lanes, warps=warps).cpu().equal(wanted)
    numbers = packing.unpack_dequantize(wanted, scale, zero, axis, [1, 5, 7], bits, False)
    again = kernel.unpack_dequantize(wanted.to(DEVICE), *moved[1:], axis, [1, 5, 7], bits, False, lanes=16)
    assert again.cpu().equal(numbers)


def test_stochastic_rounding_is_unbiased() -> None:
    """z of the mean code of 2^16 numbers at each of 8 places between two codes; and two seeds differ."""
    places = torch.arange(8) / 8 + 1 / 16
    x = places.repeat_interleave(2**16)
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    codes = [
        packing.unpack(packing.quantize_pack(x, one, zero, None, -8, 7, 4, seed), 4, x.numel(), True) for seed in (1, 2)
    ]
    assert set(codes[0].tolist()) == {0, 1} and not codes[0].equal(codes[1])
    deviation = (places * (1 - places) / 2**16).sqrt()
    for found in codes:
        z = (found.view(8, -1).double().mean(1) - places) / deviation
        assert z.abs().max() < 4.5, z  # one in 150,000 each
    near = torch.full((2**12,), 0.5)
    assert not packing.unpack(packing.quantize_pack(near, one, zero, None, -8, 7, 4, None), 4, 2**12, True).any()


def test_rounding_alone_is_that_of_packing_on_every_device() -> None:
    x = torch.randn(3, 5, 7) * 2
    rounded = packing.round_stochastic(x, 2**40 + 3)
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    words = packing.quantize_pack(x, one, zero, None, -128, 127, 8, 2**40 + 3)
    assert packing.unpack(words, 8, x.numel(), True).view(x.shape).equal(rounded.long())
    assert ((rounded - x).abs() < 1).all() and not rounded.equal(x.round())
    kernel = triton_form("packing")
    for lanes in (4, 64):
        assert kernel.round_stochastic(x.to(DEVICE), 2**40 + 3, lanes=lanes, warps=1).cpu().equal(rounded)
    beyond = torch.zeros(2**20 + 9)  # in two pieces: the places go on
    found = packing.round_stochastic(beyond + 0.5, 1)
    noise = (packing.random_bits(9, 1, first=2**20) + 0.5) / 65536
    assert found[2**20 :].equal((0.5 + noise).floor())


def test_codes_that_do_not_fit_are_refused() -> None:
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    for low, high, bits in ((-8, 8, 4), (0, 31, 5), (-9, 0, 4)):
        with pytest.raises(ValueError, match="choose 2, 3, 4 or 8 bits"):
            torch.ops.rarefy.quantize_pack(torch.ones(3), one, zero, None, low, high, bits, None)
    with pytest.raises(ValueError, match="choose n"):
        torch.ops.rarefy.n_of_m_mask(torch.ones(8), 4, 4)


@pytest.mark.parametrize(("n", "m", "signed"), [(2, 4, False), (1, 3, True), (5, 16, False), (5, 40, True)])
def test_n_of_m_keeps_the_largest_and_the_first_of_equals(n: int, m: int, signed: bool) -> None:
    x = torch.randn(7, 13).round(decimals=1)
    kept = torch.ops.rarefy.n_of_m_mask(x, n, m, signed)
    for start in range(0, 13, m):
        part = x[:, start : start + m]
        part = part if signed else part.abs()
        for row, alive in zip(part.tolist(), kept[:, start : start + m].tolist(), strict=True):
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:n]
            assert [i for i, one in enumerate(alive) if one] == sorted(best)
    kernel = triton_form("packing")
    if m <= masks.MOST:
        assert kernel.n_of_m_mask(x.to(DEVICE), n, m, signed).cpu().equal(kept)
    wanted = (x if signed else x.abs()) > 0.5
    assert kernel.threshold_mask(x.to(DEVICE), 0.5, signed).cpu().equal(wanted)
    assert torch.ops.rarefy.threshold_mask(x, 0.5, signed).equal(wanted)


def packed(outputs: int, inputs: int, bits: int, affine: bool) -> tuple[linear.Packed, Tensor, Tensor, Tensor | None]:
    codes = torch.randint(0, 2**bits, (outputs, inputs))
    scales = torch.rand(outputs, math.ceil(inputs / 128)) * 0.02 + 0.01
    zeros = torch.randint(0, 2**bits, scales.shape) if affine else None
    return linear.pack(codes, scales, zeros, bits), codes, scales, zeros


@pytest.mark.parametrize("bits", linear.BITS)
@pytest.mark.parametrize("affine", [False, True])
def test_linear_layers_of_few_bits(bits: int, affine: bool) -> None:
    one, codes, scales, zeros = packed(20, 200, bits, affine)
    assert linear.unpack(one).equal(codes)
    zero = 2 ** (bits - 1) if zeros is None else zeros.repeat_interleave(128, 1)[:, :200]
    weight = (codes - zero) * scales.half().float().repeat_interleave(128, 1)[:, :200]
    assert linear.dequantized(one, torch.float32).equal(weight)
    x, bias = torch.randn(2, 3, 200).half(), torch.randn(20).half()
    wanted = (x.double() @ weight.double().T + bias.double()).float()
    found = torch.ops.rarefy.low_bit_linear(x, one.words, one.scales, one.zeros, bias, bits, 20)
    # numbers and weights have 11 bits: half a unit each, relative to the sum of sizes
    size = x.abs().double() @ weight.abs().double().T + bias.abs().double()
    assert found.dtype == torch.float16 and ((found.double() - wanted).abs() <= 2.0**-10 * size).all()
    kernel = triton_form("packing")
    there = [part.to(DEVICE) if isinstance(part, Tensor) else part for part in one]
    assert kernel.decoded(*there[:4], 20, 200, torch.float32).cpu().equal(weight)


def test_a_planned_layer_answers_alike_for_few_and_many_rows() -> None:
    one, *_ = packed(20, 200, 4, True)
    bias = torch.randn(20).half()
    for rows in (1, linear.FEW, linear.FEW + 1):
        x = torch.randn(rows, 200).half()
        wanted = torch.ops.rarefy.low_bit_linear(x, *one[:3], bias, 4, 20)
        assert torch.allclose(linear.planned(one, bias, rows, torch.float16)(x), wanted, rtol=1e-3, atol=1e-3)


def test_scales_that_16_bits_do_not_hold_stay_wide() -> None:
    codes = torch.randint(0, 16, (16, 128))
    small = linear.pack(codes, torch.full((16, 1), 1e-6), None, 4)
    assert small.scales.dtype == torch.float32
    assert linear.dequantized(small, torch.float32).equal((codes - 8) * torch.tensor(1e-6))
    with pytest.raises(ValueError, match="no form of these"):
        linear.pack(codes, torch.ones(16, 2), None, 4)


def test_linear_layers_of_8_bits_scale_exact_sums() -> None:
    kernel = triton_form("int8_linear")
    for rows, inputs, outputs in ((1, 64, 48), (33, 100, 50)):
        x, weight = (torch.randint(-127, 128, size).to(torch.int8) for size in ((rows, inputs), (outputs, inputs)))
        x_scale, scale, bias = torch.rand(rows) * 0.01, torch.rand(outputs) * 0.01, torch.randn(outputs).half()
        wanted = (x.long() @ weight.long().T).float() * (x_scale[:, None] * scale) + bias.float()
        found = torch.ops.rarefy.scaled_linear(x, weight, x_scale, scale, bias, torch.float32)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
        moved = [one.to(DEVICE) for one in (x, weight, x_scale, scale, bias)]
        again = kernel.scaled_linear(*moved, torch.float32, (16, 32, 32, 4, 1, 1)).cpu()
        assert torch.allclose(again, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="both int8, or both fp8"):
        int8_linear.scaled_linear(x, weight.float(), x_scale, scale, None, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", linear.BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_multiplies_few_and_many_rows_alike(bits: int, dtype: torch.dtype) -> None:
    """Each route, from one row to weights decoded first; the same inputs give the same bits."""
    for outputs, inputs, affine in ((100, 1000, True), (512, 1536, False)):
        one, *_ = packed(outputs, inputs, bits, affine)
        there = [part.cuda() if isinstance(part, Tensor) else part for part in one]
        weight = linear.dequantized(one, torch.float64)
        for rows in (1, 3, 8, 16, 31, 64, 100, 300, 1100):
            x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
            wanted = x.double() @ weight.T + bias.double()
            found, again = (
                torch.ops.rarefy.low_bit_linear(x.cuda(), *there[:3], bias.cuda(), bits, outputs) for _ in range(2)
            )
            assert found.equal(again)
            error = (found.cpu().double() - wanted).norm() / wanted.norm()
            assert error < (1e-3 if dtype == torch.float16 else 8e-3), (rows, float(error))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", packing.WIDTHS)
def test_a_gpu_packs_and_masks_the_same_bits(bits: int) -> None:
    """Rounding at random has a kernel of its own for float32 in whole eights of one scale; others go through Triton."""
    low = -(2 ** (bits - 1))
    for shape, axis, dtype in (
        ((2**16 + 5,), None, torch.float32), ((3, 40, 72), 1, torch.float32), ((5, 13), 0, torch.float32),
        ((4, 33), None, torch.float16), ((7,), None, torch.float32),
    ):  # fmt: skip
        x = (torch.randn(shape) * 3).to(dtype)
        x.view(-1)[:2] = torch.tensor([math.inf, -math.inf])
        scale = torch.tensor(0.37) if axis is None else torch.rand(shape[axis]) + 0.1
        zero = torch.randint(-1, 2, scale.shape, dtype=torch.int32)
        for seed in (None, 2**40 + 3):
            given = (axis, low, low + 2**bits - 1, bits, seed)
            wanted = torch.ops.rarefy.quantize_pack(x, scale, zero, *given)
            found = torch.ops.rarefy.quantize_pack(x.cuda(), scale.cuda(), zero.cuda(), *given)
            assert found.cpu().equal(wanted), (shape, axis, seed)
            beside = torch.cat([x.new_zeros(1), x.view(-1)]).cuda()[1:].view(shape)  # begins between two 16 bytes
            assert torch.ops.rarefy.quantize_pack(beside, scale.cuda(), zero.cuda(), *given).cpu().equal(wanted)
        assert torch.ops.rarefy.round_stochastic(x.cuda(), 5).cpu().equal(torch.ops.rarefy.round_stochastic(x, 5))
        for signed in (False, True):
            kept = torch.ops.rarefy.n_of_m_mask(x, 2, 4, signed)
            assert torch.ops.rarefy.n_of_m_mask(x.cuda(), 2, 4, signed).cpu().equal(kept)
