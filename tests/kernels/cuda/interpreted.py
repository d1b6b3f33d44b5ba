"""Triton kernels for tests: compiled where there is a GPU; else Triton's interpreter runs them (``conftest``)."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernels(name: str) -> ModuleType:
    """``rarefy.kernels.cuda.convolution.NAME``; skips where Triton is missing."""
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module(f"rarefy.kernels.cuda.convolution.{name}")
