"""Number formats as values: which codes there are, what they stand for, and which numbers share a scale.

    ``int2`` ... ``int8``, ``uint2`` ... ``uint8``    code q in [qmin, qmax] stands for s (q - z)
    ``fp8:e4m3``, ``fp8:e5m2``    s times an 8-bit float (OCP: e4m3 without infinities, 448 at most; e5m2 57,344)
    ``mxfp4``    s_block times e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6), s_block a power of two for each 32 (OCP MX 1.0)
    ``nvfp4``    s_tensor s_block times e2m1, s_block an e4m3 float for each 16

``symmetric`` fixes z = 0 and, of signed codes at 8 bits, drops the lowest one (int8 is -127..127, as kernels that add
two products in 16 bits want it). Of fewer bits all codes are used (int4 is -8..7, int2 -2..1): one in 16, let alone in
4, is worth more than a sign flip that is exact.

One scale serves a tensor, a position of ``axis`` (an output channel), or ``group`` neighbours along the input axis
within an output channel, whole kernels of a convolution; the last group may be shorter.

Text, in Python, TOML and on the command line alike, with options after a colon: ``"int4:group=32"``,
``"int8:symmetric=no"``. Floats below 8 bits are for weights, and simulated: no CPU runtime multiplies them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rarefy.errors import InputError
from rarefy.kernels import fp4

_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@runtime_checkable
class Format(Protocol):
    """What rounding and calibration need to know of a number format."""

    @property
    def bits(self) -> int: ...
    @property
    def qmin(self) -> float: ...  # lowest and highest multiple of the scale
    @property
    def qmax(self) -> float: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def axis(self) -> int | None: ...
    @property
    def group(self) -> int | None: ...
    @property
    def dtype(self) -> torch.dtype: ...  # that a code is kept in
    def snap(self, scaled: Tensor) -> Tensor: ...  # nearest multiples, clipped
    def codes(self, snapped: Tensor) -> Tensor: ...  # of what snap() gives


@dataclasses.dataclass(frozen=True)
class Grid:
    """Integers.

    bits: 2 to 8. signed: two's complement or from zero. symmetric: zero point fixed at 0.
    axis: one scale a position of that axis, or None for one scale a tensor.
    group: positions of the input axis (1) that share a scale (None: all).
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"a grid of {self.bits} bits: choose 2 to 8, or leave the layer in float with ignore")
        if self.group is not None and self.group < 1:
            raise InputError(f"a grid of groups of {self.group}: choose 1 or more inputs, such as 32")

    @property
    def qmin(self) -> int:
        if not self.signed:
            return 0
        dropped = 1 if self.symmetric and self.bits == 8 else 0  # of few codes each counts
        return dropped - int(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return int(2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1)

    @property
    def levels(self) -> int:
        """Steps from the lowest to the highest code."""
        return self.qmax - self.qmin

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def snap(self, scaled: Tensor) -> Tensor:
        return torch.round(scaled).clamp_(self.qmin, self.qmax)

    def codes(self, snapped: Tensor) -> Tensor:
        return snapped.to(self.dtype)

    def __str__(self) -> str:
        options = [f"group={self.group}"] * (self.group is not None)
        if self.signed != self.symmetric:
            options.append(f"symmetric={'yes' if self.symmetric else 'no'}")
        options = [one for one in options if self.signed or one != "symmetric=no"]
        return f"{'' if self.signed else 'u'}int{self.bits}{':' if options else ''}{','.join(options)}"


@dataclasses.dataclass(frozen=True)
class Fp8:
    """8-bit floats; kind: e4m3 or e5m2. Too large a number becomes the largest, as in training in FP8 (2209.05433)."""

    kind: str = "e4m3"
    axis: int | None = None
    group: int | None = None

    bits = 8
    symmetric = True

    @property
    def qmin(self) -> float:
        return -self.qmax

    @property
    def qmax(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def dtype(self) -> torch.dtype:
        return _FP8[self.kind]

    def snap(self, scaled: Tensor) -> Tensor:
        return scaled.clamp(self.qmin, self.qmax).to(self.dtype).to(scaled.dtype)

    def codes(self, snapped: Tensor) -> Tensor:
        return snapped.to(self.dtype)

    def __str__(self) -> str:
        return f"fp8:{self.kind}{f',group={self.group}' if self.group else ''}"


@dataclasses.dataclass(frozen=True)
class Fp4:
    """4-bit floats e2m1 in blocks of ``group`` inputs; kind: mx (block scales are powers of two) or nv (e4m3 floats,
    and one float32 scale a tensor)."""

    kind: str = "mx"

    bits = 4
    symmetric = True
    axis = 0
    dtype = torch.uint8

    @property
    def group(self) -> int:
        return 32 if self.kind == "mx" else 16

    @property
    def qmin(self) -> float:
        return -self.qmax

    @property
    def qmax(self) -> float:
        return fp4.LARGEST

    def snap(self, scaled: Tensor) -> Tensor:
        return fp4.decoded(fp4.encoded(scaled)).to(scaled.dtype)

    def codes(self, snapped: Tensor) -> Tensor:
        return fp4.encoded(snapped)

    def scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Stored block scales (out, groups, 1, ...) and the tensor's own scale (), by the formats' own rules: nothing
        is calibrated."""
        largest = rows(weight, self).abs().amax(1)
        block, whole = fp4.nv_scale(largest) if self.kind == "nv" else (fp4.mx_scale(largest), largest.new_ones(()))
        return shaped(block, weight, self), whole.float()

    def __str__(self) -> str:
        return f"{self.kind}fp4"


def parse(text: str | Format, *, symmetric: bool, axis: int | None = None) -> Format:
    """``"int8"`` -> a grid; ``symmetric`` and ``axis`` are the user of the grid's defaults (weights: symmetric, axis
    0)."""
    if not isinstance(text, str):
        return text
    name, _, options = text.strip().lower().partition(":")
    given = [part.strip() for part in options.split(",") if part.strip()]
    values = dict(part.partition("=")[::2] for part in given if "=" in part)
    words = [part for part in given if "=" not in part]
    group = values.pop("group", None)
    said = values.pop("symmetric", None)
    integer = re.fullmatch(r"(u?)int([2-8])", name)
    size = int(group) if group is not None and group.isdigit() else None
    if values or (group is not None and size is None) or said not in (None, "yes", "no"):
        integer, name = None, ""
    if integer and not words:
        unsigned, bits = integer.groups()
        return Grid(int(bits), not unsigned, symmetric if said is None else said == "yes", axis, size)
    if name == "fp8" and len(words) <= 1 and all(word in _FP8 for word in words) and said is None:
        return Fp8(words[0] if words else "e4m3", axis, size)
    if name in ("mxfp4", "nvfp4") and not given:
        return Fp4(name[:2])
    raise InputError(
        f"number format {text!r}: give int2 to int8 or uint2 to uint8, such as int8 or int4:group=32, fp8:e4m3, "
        "fp8:e5m2, mxfp4 or nvfp4"
    )


# -- which numbers share a scale


def rows(weight: Tensor, grid: Format) -> Tensor:
    """(scales, elements): the numbers of ``weight`` (out, in, ...) that share a scale, one row each; a shorter last
    group ends in zeros."""
    if grid.group is None:
        return weight.reshape(weight.shape[0], -1) if grid.axis is not None else weight.reshape(1, -1)
    out, inputs, kernel = weight.shape[0], weight.shape[1], weight[0, 0].numel()
    groups = -(-inputs // grid.group)
    whole = torch.nn.functional.pad(weight.reshape(out, inputs, kernel), (0, 0, 0, groups * grid.group - inputs))
    return whole.reshape(out * groups, grid.group * kernel)


def shaped(scale: Tensor, weight: Tensor, grid: Format) -> Tensor:
    """The scales of ``rows(weight, grid)``, (scales,), as ``quantize`` and ``dequantize`` take them: (), (out,), or
    (out, groups, 1, ...)."""
    if grid.group is None:
        return scale if grid.axis is not None else scale.reshape(())
    return scale.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


# -- which layer has which format


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A grid for each layer: (glob of layer names, grid, or None for float); the last that matches holds, else
    ``default``."""

    default: Format | None
    rules: tuple[tuple[str, Format | None], ...] = ()

    def of(self, names: Iterable[str]) -> Format | None:
        """The grid of a layer that goes by these names; None: float."""
        names = list(names)
        for glob, grid in reversed(self.rules):
            if any(fnmatch.fnmatch(name, glob) for name in names):
                return grid
        return self.default

    def __str__(self) -> str:
        rules = [f"{glob}={FLOAT if grid is None else grid}" for glob, grid in self.rules]
        return ";".join([FLOAT if self.default is None else str(self.default), *rules])


FLOAT = "float"


def assign(
    given: str | Format | Mapping[str, str | Format],
    *,
    symmetric: bool,
    axis: int | None = None,
    default: str | Format = "int8",
) -> Assignment:
    """``"int4"``, ``"int4;stem.*=int8;fc=float"`` or ``{"*": "int4", "stem.*": "int8", "fc": "float"}``; layers that
    nothing matches get ``default``."""

    def grid(value: str | Format) -> Format | None:
        return (
            None
            if isinstance(value, str) and value.strip().lower() == FLOAT
            else parse(value, symmetric=symmetric, axis=axis)
        )

    if isinstance(given, Mapping):
        return Assignment(grid(default), tuple((glob, grid(value)) for glob, value in given.items()))
    if not isinstance(given, str):
        return Assignment(given)
    chosen, rules = grid(default), []
    for index, part in enumerate(given.split(";")):
        glob, equals, value = part.partition("=")
        if equals and ":" not in glob:
            rules.append((glob.strip(), grid(value)))
        elif index == 0:
            chosen = grid(part)
        else:
            raise InputError(
                f"number formats {given!r}: {part.strip()!r} names no layer; write glob=format, such as layer1.*=int4"
            )
    return Assignment(chosen, tuple(rules))
