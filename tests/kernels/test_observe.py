"""Extremes, moments and histogram of a tensor: what they are, and that a GPU counts the same."""

from __future__ import annotations

import math

import pytest
import torch

from rarefy.kernels.observe import FIELDS, observe


@pytest.mark.parametrize(("shape", "axis"), [((3, 4, 5, 6), None), ((3, 4, 5, 6), 1), ((3, 4, 5, 6), -1), ((9,), 0)])
def test_statistics_and_counts(shape: tuple[int, ...], axis: int | None) -> None:
    x = torch.randn(shape)
    statistics, counts = torch.ops.rarefy.observe(x, axis, -2.0, 2.0, 16)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    assert statistics.shape == (len(rows), len(FIELDS)) and counts.sum(1).tolist() == [rows.shape[1]] * len(rows)
    for row, found, bins in zip(rows, statistics, counts, strict=True):
        wanted = (row.min(), row.max(), row.abs().max(), row.double().mean(), row.double().square().mean())
        assert torch.allclose(found, torch.stack([one.double() for one in wanted]))
        assert bins.equal(torch.histc(row.clamp(-2, 2 - 1e-6), 16, -2, 2).int())


def test_nan_is_no_extreme_and_counts_nowhere() -> None:
    x = torch.tensor([1.0, math.nan, -3.0, math.inf])
    statistics, counts = observe(x, None, -4.0, 4.0, 4)
    assert statistics[0, :3].tolist() == [-3, math.inf, math.inf] and statistics[0, 3].isnan()
    assert counts.tolist() == [[1, 0, 1, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 117, 203), None), ((3, 5, 117, 203), 1), ((7, 33), 1), ((9,), 0)])
def test_a_gpu_counts_alike(dtype: torch.dtype, shape: tuple[int, ...], axis: int | None) -> None:
    x = torch.randn(shape).to(dtype)
    x[:2] = 0.25  # flat, as parts of pictures are
    x.view(-1)[-1] = math.nan
    for bins in (0, 100, 2048):
        wanted, counts = observe(x, axis, -3.0, 4.0, bins)
        found, again = (torch.ops.rarefy.observe(x.cuda(), axis, -3.0, 4.0, bins) for _ in range(2))
        assert found[1].cpu().equal(counts) and found[0][:, :3].cpu().equal(wanted[:, :3])
        assert torch.allclose(found[0].cpu(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert torch.equal(found[0].nan_to_num(), again[0].nan_to_num())
