"""Least squares of a layer's weights: the change that brings its output nearest to a wanted one, and the error left.

    min over D, b  of  || (W + D) X + b - Y ||^2 + r g ||D||^2

W: the weights as they are, X: what the layer reads, Y: what it should make of it, g: mean of X^2, r: the ridge. D is
the solution of K linear equations in float64, for each group of a grouped convolution apart. Sums over samples are all
that is stored, so that the number of samples costs no memory, and the error of any D is known without running it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NormalEquations:
    """Normal equations of the change D (groups, outputs, K) of a layer's weights, summed over batches in float64.

    gram: (groups, K, K) sum x x'.
    cross: (groups, outputs, K) sum e x', e the error of the weights as they are.
    x, e, y: sums of what is read, of the error, of what is wanted.
    total, squares: sums of e^2 and of y^2.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        groups, outputs, inputs = weight.shape
        self.weight, self.bias = weight, bias
        self.gram = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=weight.device)
        self.cross = torch.zeros(groups, outputs, inputs, dtype=torch.float64, device=weight.device)
        self.x, self.e, self.y = (
            self.cross.new_zeros(groups, inputs),
            self.cross.new_zeros(groups, outputs),
            self.cross.new_zeros(groups, outputs),
        )
        self.around: Tensor | None = None
        self.squares = self.total = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (N, groups, K, places); y: (N, groups, outputs, places)."""
        x, y = (value.permute(1, 2, 0, 3).flatten(2).float() for value in (x, y))  # (groups, K or outputs, samples)
        e = y - self.weight.float() @ x
        if self.bias is not None:
            e = e - self.bias.float().reshape(len(e), -1, 1)
        # Around the first batch's mean, so that products in float32 keep what varies; then moved back in float64.
        self.around = x.mean(2, keepdim=True) if self.around is None else self.around
        near, far = x - self.around, self.around.double()
        moved, sum_e = near.double().sum(2, keepdim=True), e.double().sum(2)
        self.gram += (near @ near.mT).double() + far @ moved.mT + moved @ far.mT + x.shape[2] * far @ far.mT
        self.cross += (e @ near.mT).double() + sum_e.unsqueeze(2) @ far.mT
        self.x, self.e, self.y = self.x + x.double().sum(2), self.e + sum_e, self.y + y.double().sum(2)
        self.total += float(e.double().square().sum())
        self.squares += float(y.double().square().sum())
        self.count += x.shape[2]

    def merge(self, other: NormalEquations) -> None:
        """Take in the samples of another, of the same weights."""
        self.gram, self.cross = self.gram + other.gram, self.cross + other.cross
        self.x, self.e, self.y = self.x + other.x, self.e + other.e, self.y + other.y
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.count += other.count

    @property
    def variance(self) -> float:
        """Of the wanted outputs, a sample (summed over outputs)."""
        return (self.squares - float(self.y.square().sum()) / max(self.count, 1)) / max(self.count, 1)

    def solve(self, ridge: float, shifts: bool) -> tuple[Tensor, Tensor | None]:
        """D (groups, outputs, K), and the shift (outputs,) of the output, if there may be one.

        Equations that can't be solved ask for no change.
        """
        count = max(self.count, 1)
        mean_x, mean_e = self.x / count, self.e / count
        gram, cross = self.gram / count, self.cross / count
        if shifts:
            gram = gram - mean_x.unsqueeze(2) * mean_x.unsqueeze(1)
            cross = cross - mean_e.unsqueeze(2) * mean_x.unsqueeze(1)
        size = gram.shape[-1]
        level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        damped = gram + (ridge * level).view(-1, 1, 1) * torch.eye(size, dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        change = torch.cholesky_solve(cross.mT, factor).mT if not bool(failed.any()) else torch.zeros_like(cross)
        return change, (mean_e - (change @ mean_x.unsqueeze(2)).squeeze(2)).reshape(-1) if shifts else None

    def error(self, change: Tensor | None, shift: Tensor | None) -> float:
        """Mean over samples of |e - D x - shift|^2, summed over outputs."""
        total = self.total
        if change is not None:
            total += float(((change @ self.gram) * change).sum() - 2 * (change * self.cross).sum())
        if shift is not None:
            moves = shift.reshape(self.e.shape)
            left = self.e if change is None else self.e - (change @ self.x.unsqueeze(2)).squeeze(2)
            total += float(self.count * moves.square().sum() - 2 * (moves * left).sum())
        return max(total, 0.0) / max(self.count, 1)
