"""How to train: the options, presets of them, and what the loop (``distilling.py``) asks of a task and of a penalty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from rarefy.errors import InputError

DEFAULT_LR = {"sgd": 0.05, "adamw": 1e-3}
AUTO_STEPS = 2000


class Penalty(Protocol):
    """What else pulls at the weights. The loop calls ``begin`` at each epoch's start, ``add`` in each step, once the gradients are there."""

    def describe(self) -> str: ...  # two penalties that pull differently differ in it
    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None: ...
    def add(self, parameters: Mapping[str, nn.Parameter]) -> None: ...  # to .grad, in place
    def state(self) -> dict[str, Tensor]: ...  # for a checkpoint in the middle of an epoch
    def restore(self, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None: ...


@dataclass(frozen=True)
class Training:
    """How to train: what ``distill`` and ``train`` take as keywords.

    epochs, steps: length of the run; steps wins. batch_size: pictures a step, over all processes; accumulate: in so many parts.
    lr: peak learning rate; None: 0.05 for sgd, 0.001 for adamw. warmup: share of the steps with rising lr. clip: greatest norm of the
    gradient, 0: none. hard_weight: weight of the loss against labels. mixup, cutmix: α of Beta(α, α), 0: off; with both on, one of them at
    random a step. ema: decay, 0: off. precision: fp32, bf16 or auto (bf16 on CUDA). channels_last: yes, no or auto (for convolutions).
    compile: no, default, reduce-overhead (CUDA graphs) or auto: the last on CUDA from AUTO_STEPS steps on, where it has paid for the minute
    it takes, and back to no where the compiler can't. validate_every: epochs between two looks at the val split, 0: never. keep: the last state
    or the best on the val split (whose figure is then optimistic: it was chosen by it). patience: stop once the val split saw no better state for so
    many epochs, 0: never. dot: Δ of the two momenta (``dot.py``), 0: off. freeze: share of the
    steps, the last, in which batch norm's statistics stand still. loss_warmup: share of the steps in which the teacher's weight rises to what it is.
    sync_norm: under torchrun, yes: batch norm looks at the whole batch; no: each process at its share, which is faster. live_norm:
    for a quantised student, yes: batch norm is put back for the training (``normalizing.py``); no: it stays folded.
    """

    epochs: int = 30
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float = 0.0
    label_smoothing: float = 0.0
    hard_weight: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    precision: str = "auto"
    channels_last: str = "auto"
    compile: str = "auto"
    validate_every: int = 1
    keep: str = "last"
    patience: int = 0
    dot: float = 0.0
    freeze: float = 0.0
    loss_warmup: float = 0.0
    sync_norm: str = "yes"
    live_norm: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        rules: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or None"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, "1 to batch_size"),
            ("optimizer", self.optimizer in DEFAULT_LR, " or ".join(DEFAULT_LR)),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "positive, or None"),
            ("momentum", 0 <= self.momentum < 1, "0 up to, not including, 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, 0 up to, not including, 1"),
            ("clip", 0 <= self.clip < math.inf, "0 (off) or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 up to, not including, 1"),
            ("hard_weight", 0 <= self.hard_weight < math.inf, "0 or more"),
            ("mixup", 0 <= self.mixup < math.inf, "0 (off) or more"),
            ("cutmix", 0 <= self.cutmix < math.inf, "0 (off) or more"),
            ("ema", 0 <= self.ema < 1, "0 (off) up to, not including, 1"),
            ("precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16"),
            ("channels_last", self.channels_last in ("auto", "yes", "no"), "auto, yes or no"),
            (
                "compile",
                self.compile in ("auto", "no", "default", "reduce-overhead"),
                "auto, no, default or reduce-overhead",
            ),
            ("validate_every", self.validate_every >= 0, "0 (never) or more"),
            ("live_norm", self.live_norm in ("yes", "no"), "yes or no"),
            ("sync_norm", self.sync_norm in ("yes", "no"), "yes or no"),
            ("loss_warmup", 0 <= self.loss_warmup <= 1, "a share of the steps, 0 to 1"),
            ("freeze", 0 <= self.freeze <= 1, "a share of the steps, 0 to 1"),
            ("keep", self.keep in ("last", "best"), "last or best"),
            ("patience", self.patience >= 0, "0 (never) or more epochs"),
            (
                "dot",
                0 <= self.dot <= min(self.momentum, 1 - self.momentum)
                and (self.dot < 1 - self.momentum or not self.dot),
                "0 (off) up to momentum, and below 1 - momentum",
            ),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise InputError(f"training: {name}={getattr(self, name)!r} is not {allowed}")
        if self.patience and not self.validate_every:
            raise InputError(f"training: patience={self.patience} needs validation; pass validate_every=1")
        if self.dot and (self.optimizer != "sgd" or self.compile not in ("auto", "no")):
            raise InputError(
                f"training: dot={self.dot} is of sgd, and takes two passes backwards, which can't be compiled; pass optimizer=sgd, compile=no"
            )

    def rate(self, step: int, total: int) -> float:
        """Learning rate of that step: linear up to the peak, then a cosine to zero."""
        peak = self.lr if self.lr is not None else DEFAULT_LR[self.optimizer]
        rising = round(self.warmup * total)
        if step < rising:
            return peak * (step + 1) / (rising + 1)
        return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


PRESETS = {
    "fast": Training(epochs=10),  # a look at what distillation will give
    "normal": Training(),
    "patient": Training(epochs=200, mixup=0.2),  # a long run on varied pictures lifts the end most (2106.05237)
}


def training_of(given: Training | str | None, options: Mapping[str, Any], verb: str) -> Training:
    """The training meant by an object, a preset's name or nothing, with ``options`` in place of its fields. Raises InputError."""
    known = [one.name for one in dataclasses.fields(Training)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise InputError(f"{verb}: unknown option {unknown[0]!r}; have {', '.join(sorted(known))}")
    if isinstance(given, str):
        if given not in PRESETS:
            raise InputError(f"{verb}: training={given!r} is no preset; have {', '.join(PRESETS)}, or pass a Training")
        given = PRESETS[given]
    return dataclasses.replace(given or Training(), **options)
