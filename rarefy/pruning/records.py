"""Which output channels a pruning left, as text in its record, and followed over several prunings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from rarefy.graph.nodes import Value


def packed(mask: Tensor) -> str:
    """(n,) bool as hexadecimal text, eight to two digits."""
    return np.packbits(mask.cpu().numpy()).tobytes().hex()


def unpacked(text: str, size: int) -> Tensor:
    """Positions of the ones, int64."""
    return torch.from_numpy(
        np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=size))
    )


def followed(records: Iterable[Mapping[str, Value]]) -> dict[str, Tensor]:
    """Weight name -> the positions of the first network's output channels that are left after all prunings, int64, from
    their facts in order."""
    found: dict[str, Tensor] = {}
    for facts in records:
        for name, bits in facts.get("kept", {}).items():
            own = unpacked(bits, int(facts["channels"][name][0]))
            found[name] = found[name][own] if name in found else own
    return found
