"""The options of ``quantize`` and ``cluster``, with help and bounds. Nothing heavy is imported: the command line
reads them to answer --help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rarefy.errors import InputError
from rarefy.system.options import check, option

if TYPE_CHECKING:
    import torch

    from rarefy.deployment.runtime import Runtime
    from rarefy.quantization.formats import Format
    from rarefy.quantization.mixed_precision import Mixed
    from rarefy.quantization.observers import Calibration
    from rarefy.quantization.rounding_pass import Rounding

GATES = (None, "latency")


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``quantize`` is asked for, beside a model and its images: its keyword arguments, which its record tells."""

    images: int = option(128, "Images to calibrate on; they need no labels.", lambda n: n >= 1, "at least 1", "N", 1)
    batch_size: int = option(16, "Images at a time.", lambda n: n >= 1, "at least 1", "N", 1)
    weights: str | Format | Mapping[str, str] | Mixed = option(
        "int8",
        "int8, int4, int4:group=32, mixed:bits=4, ...; by layer: 'int4;stem.*=int8;head=float', "
        "the last that matches holds.",
        metavar="GRID",
    )
    activations: str | Format | Mapping[str, str] = option(
        "uint8",
        "uint8, uint4 (simulated), float: weights alone; a layer's input with 'uint4;fc=uint8'.",
        metavar="GRID",
    )
    calibration: str | Calibration = option(
        "sensitivity", "Range of the activations; see `rarefy list calibration`.", metavar="CHOICE"
    )
    weight_calibration: str | Calibration | None = option(
        None, "Range of the weights; the same choices; default: minmax at 8 bits, mse below.", metavar="CHOICE"
    )
    rounding: str | Rounding = option("narrow", "See `rarefy list rounding`.", metavar="CHOICE")
    runtime: str | Runtime = option(
        "onnxruntime", "Where the model will run; see `rarefy list runtimes`.", metavar="NAME"
    )
    ignore: Sequence[str] = option((), "Layers to leave alone; may be given more than once.", metavar="GLOB")
    equalize: bool = option(
        True,
        "Equalise channels between layers, and let dead ones carry the noisiest, where that is exact "
        "and lowers the noise.",
    )
    correct_bias: bool = option(True, "Mend the means that rounding moves, and how far the answers vary.")
    smooth: float | None = option(
        None,
        "SmoothQuant before linear layers that read a norm; 0.5, say; default: not done.",
        lambda alpha: alpha is None or 0 <= alpha <= 1,
        "from 0 to 1",
        "ALPHA",
    )
    gate: str | None = option(
        None,
        "Time each stretch of layers in integers and in float, and keep only what pays.",
        lambda gate: gate in GATES,
        "latency, or none",
        "latency",
    )
    seed: int = option(0, "The same seed gives the same result.", lambda n: n >= 0, "at least 0", "N", 0)
    device: str | torch.device | None = option(
        None, "Where to calculate: cpu, cuda, cuda:1; default: where the model is.", metavar="NAME"
    )
    progress: bool = option(True, "Show how far it is.")


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """All that ``cluster`` takes beside the model. Raises InputError for a value out of its bounds."""

    values: int = option(
        16, "Different values a layer's weight may have, zero among them.", lambda n: 2 <= n <= 256, "2 to 256", "N", 2
    )
    fold: bool = option(True, "Batch norm goes into the weights first, as deployment has it.")
    ignore: Sequence[str] = option((), "Layers to leave alone; may be given more than once.", metavar="GLOB")

    def __post_init__(self) -> None:
        if isinstance(self.values, bool) or not isinstance(self.values, int):
            raise InputError(f"values={self.values!r} is not a whole number; 16 is usual")
        check(self, "")

    @property
    def globs(self) -> tuple[str, ...]:
        return (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)
