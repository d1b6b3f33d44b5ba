"""Number formats as values: ``Grid("int8")`` says which codes there are and what they stand for.

    integer code q in [qmin, qmax]  stands for  s (q - z)

``symmetric`` fixes z = 0 and, for signed codes, drops the lowest one (int8 is -127..127), so that a sign flip is exact.
Text, in Python, TOML and on the command line alike: ``"int8"``, ``"uint8"``, ``"int4"``, with options ``"int8:symmetric=no"``.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from rarefy.errors import InputError


@dataclasses.dataclass(frozen=True)
class Grid:
    """bits: 2 to 8. signed: two's complement or from zero. symmetric: zero point fixed at 0. axis: one scale a position of that
    axis, or None for one scale a tensor. group: positions of the last axis that share a scale (None: all)."""

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"a grid of {self.bits} bits: choose 2 to 8, or leave the layer in float with ignore")

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def levels(self) -> int:
        """Steps from the lowest to the highest code."""
        return self.qmax - self.qmin

    @property
    def dtype(self) -> torch.dtype:
        """The type a code is kept in."""
        return torch.int8 if self.signed else torch.uint8

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"


def parse(text: str | Grid, *, symmetric: bool, axis: int | None = None) -> Grid:
    """``"int8"`` -> a grid; ``symmetric`` and ``axis`` are the user of the grid's defaults (weights: symmetric, axis 0)."""
    if isinstance(text, Grid):
        return text
    match = re.fullmatch(r"(u?)int([2-8])(?::symmetric=(yes|no))?", text.strip().lower())
    if not match:
        raise InputError(f"number format {text!r}: give int2 to int8 or uint2 to uint8, such as int8")
    unsigned, bits, said = match.groups()
    if said is not None:
        symmetric = said == "yes"
    return Grid(bits=int(bits), signed=not unsigned, symmetric=symmetric, axis=axis)
