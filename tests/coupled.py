"""Couplings for tests: of a small network, of which a random half is cut and compared with the masked whole."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rarefy.graph.capture import capture
from rarefy.pruning.groups.groups import Coupling, couple
from rarefy.pruning.groups.slicing import cut
from rarefy.pruning.self_check.equivalence import check


def coupled(net: nn.Module, *inputs: Tensor, heads: str = "dims") -> Coupling:
    """Batch norms get statistics of their own, so that none is the identity."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return couple(capture(net, inputs), heads=heads)


def classes(coupling: Coupling, name: str, axis: int) -> list[int]:
    """Classes along an axis of a tensor; none may vary along an axis without a row."""
    return next(row.classes.tolist() for row in coupling.rows if name in row.names and row.axis == axis)


def cut_half(coupling: Coupling, seed: int = 0) -> tuple[fx.GraphModule, Tensor]:
    """Remove a random half of the classes, one at least, check against the masked network and run at another batch
    size."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.ones(coupling.count, dtype=torch.bool)
    alive[1 + torch.randperm(coupling.count - 1, generator=generator)[: max((coupling.count - 1) // 2, 1)]] = False
    for row in coupling.rows:  # no axis may become empty
        if not bool(alive[row.classes].any()):
            alive[row.classes[0]] = True
    small = cut(coupling, alive)
    assert check(coupling, small, alive).largest < 1e-12
    before = sum(parameter.numel() for parameter in coupling.graph.parameters())
    assert sum(parameter.numel() for parameter in small.parameters()) < before
    inputs = [torch.randn(5, *spec["shape"]) for spec in coupling.graph.meta["inputs"]]
    outputs, expected = small(*inputs), coupling.graph(*inputs)
    for one, other in zip(
        torch.utils._pytree.tree_leaves(outputs), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert one.shape == other.shape
    return small, alive
