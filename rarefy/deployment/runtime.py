from __future__ import annotations

import dataclasses
from typing import Any

import torch

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Operators a runtime runs in integers. float_result: layers whose sums may stay float (others are rounded in any case).
    posts: operators that it computes within the layer before them. products: of two activations, whose sums stay float."""

    layers: frozenset[Any]
    joins: frozenset[Any]
    carriers: frozenset[Any]
    paddings: frozenset[Any]
    clips: frozenset[Any]
    float_result: frozenset[Any]
    posts: frozenset[Any] = frozenset()
    products: frozenset[Any] = frozenset()

    @property
    def whole(self) -> frozenset[Any]:
        """Operators that are not to be written in simpler ones: those it knows by themselves, and attention, unless a product of it can be integer."""
        return self.posts if self.products else self.posts | {aten.scaled_dot_product_attention.default}
