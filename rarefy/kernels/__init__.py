"""Operators of our own, one a file: formula, reference in torch, and a Triton kernel where PyTorch has none.

Each file registers its operators under ``torch.ops.rarefy`` and lists them in its ``OPERATORS``; importing this package
registers them all, and ``OPERATORS`` here is what a loaded file may call.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import fx, nn

OPERATORS: set[Any] = set()
for _module in pkgutil.iter_modules(__path__):
    OPERATORS |= set(getattr(importlib.import_module(f"{__name__}.{_module.name}"), "OPERATORS", ()))


def is_quantised(model: nn.Module) -> bool:
    """Is it a graph that computes with codes?"""
    return isinstance(model, fx.GraphModule) and any(node.target in OPERATORS for node in model.graph.nodes)
