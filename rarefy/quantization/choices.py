"""What the options of ``quantize`` stand for: rules, formats and a runtime in place of their texts."""

from __future__ import annotations

import dataclasses

from rarefy import plugins
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError
from rarefy.quantization import formats, mixed_precision
from rarefy.quantization.observers import Calibration
from rarefy.quantization.options import GATES, Options
from rarefy.quantization.rounding_pass import OfBlocks, OfLayers, Rounding


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the texts of ``options`` stand for. mixed: chooses widths of weights; None: ``weights`` says them all."""

    options: Options
    runtime: Runtime
    mixed: mixed_precision.Mixed | None
    weights: formats.Assignment
    calibration: Calibration
    weight_calibration: Calibration | None
    rounding: Rounding
    activations: formats.Assignment

    @classmethod
    def of(cls, options: Options) -> Choices:
        """Raises InputError for a text that stands for nothing."""
        runtime = plugins.resolve("runtimes", options.runtime)
        mixed = mixed_precision.parse(options.weights)
        weights = "int8" if isinstance(options.weights, mixed_precision.Mixed) or mixed else options.weights
        weight_rule = options.weight_calibration
        return cls(
            options=options,
            runtime=runtime,
            mixed=mixed,
            weights=formats.assign(weights, symmetric=True, axis=0),
            calibration=plugins.resolve("calibration", options.calibration),
            weight_calibration=None if weight_rule is None else plugins.resolve("calibration", weight_rule),
            rounding=plugins.resolve("rounding", options.rounding),
            activations=formats.assign(options.activations, symmetric=False, default="uint8"),
        )

    def grid(self) -> formats.Grid:
        """Of activations that have none of their own. Raises InputError for a contradiction."""
        grid, options = self.activations.default, self.options
        if not isinstance(grid, formats.Grid):
            raise InputError(
                f"activations={self.activations}: integer kernels take uint8 or int8, and simulation fewer bits; "
                "write uint4, say"
            )
        if options.gate not in GATES:
            raise InputError(f"gate={options.gate!r}: choose latency, or none")
        if options.images < 1 or options.batch_size < 1:
            raise InputError(f"images={options.images}, batch_size={options.batch_size}: both must be at least 1")
        return grid

    def weight_rule(self, grid: formats.Format) -> Calibration:
        """For scales of weights on ``grid``."""
        return self.weight_calibration or plugins.resolve("calibration", "minmax" if grid.bits == 8 else "mse")

    @property
    def walks(self) -> bool:
        """Are layers rounded on what the layers before them yield?"""
        return self.options.correct_bias or isinstance(self.rounding, (OfLayers, OfBlocks))
