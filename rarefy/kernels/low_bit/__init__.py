"""Numbers of few bits and masks: packing, and linear layers that read their weights as they are packed.

Formula and reference in torch, one operator a file; what runs on a GPU is in ``rarefy.kernels.cuda``. None of these
operators stands in a saved graph.
"""

from __future__ import annotations

from rarefy.kernels.low_bit import int8_linear, linear, masks, packing

__all__ = ["int8_linear", "linear", "masks", "packing"]
