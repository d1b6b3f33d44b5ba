"""Batch norm under torchrun: mean and variance of the whole batch, over all processes, as one process with all of it would have.

    m = Σ_p Σ x / n,  v = Σ_p Σ (x - m)² / n        n: images and places of all processes

Two sums a layer are exchanged, forwards, and their gradients backwards (the gradient of a sum over processes is the sum of theirs; DDP then takes the mean of the weights'
gradients). Two passes, because E x² - m² loses digits. ``torch.nn.SyncBatchNorm`` is a module and for GPUs alone; this is a node of the graph. Given up: the time of the exchange.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def synchronised(graph: fx.GraphModule) -> fx.GraphModule:
    """``graph``, changed in place, whose batch norms in training look at the batches of all processes."""
    for node in graph.graph.nodes:
        if node.target is aten.batch_norm.default and not isinstance(node.args[5], bool):
            node.target = batch_norm
    graph.recompile()
    return graph


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, training: bool, momentum: float, eps: float, fast: bool
) -> Tensor:  # fmt: skip
    """As ``aten.batch_norm``; every process has as many images."""
    if not training:
        return torch.batch_norm(x, weight, bias, mean, variance, False, momentum, eps, fast)
    wide = [1, -1, *[1] * (x.dim() - 2)]
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
    number = x.float()
    own_mean: Tensor = _Sum.apply(number.sum(axes)) / count
    centred = number - own_mean.view(wide)
    own_variance: Tensor = _Sum.apply(centred.square().sum(axes)) / count
    with torch.no_grad():
        mean.lerp_(own_mean.to(mean.dtype), momentum)
        variance.lerp_((own_variance * (count / max(count - 1, 1))).to(variance.dtype), momentum)
    y = centred * torch.rsqrt(own_variance + eps).view(wide)
    y = y if weight is None else y * weight.view(wide)
    return (y if bias is None else y + bias.view(wide)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """Over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(gradient)
        return gradient
