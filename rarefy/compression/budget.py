from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.errors import InputError

Step = Mapping[str, Any]
QUANTIZED_GAIN = 1.5  # what the usual recipe expects of int8: kernels differ, so less than the 2 to 4 that is common
LEAST = 0.02  # share of the MACs or parameters below which pruning is no advice
SAFETY = 1.2  # latency falls more slowly than MACs


@dataclass(frozen=True)
class Budget:
    """What must be reached; None does not matter.

    max_drop: top-1 that may be lost, as a share (0.005 is half a point). speedup: how many times faster on the runtime.
    size: largest size of the weights on disk, bytes.
    """

    max_drop: float | None = None
    speedup: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise InputError(f"budget: max_drop={self.max_drop} is not a share from 0 up to 1; half a point is 0.005")
        if self.speedup is not None and not 1 <= self.speedup < 1000:
            raise InputError(f"budget: speedup={self.speedup} is not a ratio from 1 up to 1000; twice as fast is 2")
        if self.size is not None and not self.size >= 1:
            raise InputError(f"budget: size={self.size} is not a number of bytes; 500 kB are 500_000")


def usual_steps(budget: Budget, size_bytes: int, task: Any) -> list[dict[str, Any]]:
    """The recipe where none is given. size_bytes: of the original's weights."""
    share = QUANTIZED_GAIN / (SAFETY * budget.speedup) if budget.speedup is not None else 0.5
    target = "macs"
    if budget.size is not None:
        stored = (
            0.9 * 4 * budget.size / size_bytes
        )  # what may remain, once a weight takes a byte, and scales and biases a tenth
        if stored < share:
            target, share = "params", stored
    steps: list[dict[str, Any]] = []
    if share < 0.9:
        steps += [
            {"do": "prune", target: round(max(0.1, share), 3), "round_to": 8},
            {
                "do": "distill",
                "epochs": 10,
                "batch_size": min(128, task.length("train")),
                **({} if task.labelled("train") else {"hard_weight": 0.0}),
            },
        ]
    return [*steps, {"do": "quantize"}]
