"""How to train: the options, presets of them, and what training asks of a penalty and of a student's maker."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rarefy.errors import InputError
from rarefy.system.options import check, option

if TYPE_CHECKING:  # the command line reads the options, and answers --help before torch could be imported
    from torch import Tensor, fx, nn

    from rarefy.tasks.task import Task

DEFAULT_LR = {"sgd": 0.05, "adamw": 1e-3}
AUTO_STEPS = 2000


class Penalty(Protocol):
    """What else pulls at the weights: ``begin`` is called at each epoch's start, ``add`` once a step has gradients."""

    def describe(self) -> str: ...  # two penalties that pull differently differ in it
    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None: ...
    def add(self, parameters: Mapping[str, nn.Parameter]) -> None: ...  # to .grad, in place
    def state(self) -> dict[str, Tensor]: ...  # for a checkpoint in the middle of an epoch
    def restore(self, state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None: ...


@runtime_checkable
class Student(Protocol):
    """A network to train, made from its teacher: a choice of ``rarefy/compression/students``, or a user's own."""

    def make(self, teacher: fx.GraphModule, task: Task | None, seed: int) -> fx.GraphModule:
        """A new graph, whose inputs and outputs have the teacher's shapes. task: for kinds that look at images."""
        ...


def _below_one(share: float) -> bool:
    return 0 <= share < 1


def _up_to_one(share: float) -> bool:
    return 0 <= share <= 1


def _bounded(number: float) -> bool:
    return 0 <= number < math.inf


def _positive(number: int) -> bool:
    return number >= 1


def _not_negative(number: float) -> bool:
    return number >= 0


def _one_of(names: str, metavar: str, help: str = "", default: str = "") -> str:
    """A field that holds one of the names in ``"a, b or c"``, the first where no other is the default."""
    known = names.replace(" or ", ", ").split(", ")
    field: str = option(default or known[0], help or f"{names}.", known.__contains__, names, metavar)
    return field


_PARTS = "1 to batch_size"
_DELTA = "0 (off) up to momentum, and below 1 - momentum"


@dataclass(frozen=True)
class Training:
    """What ``distill`` and ``train`` take as keywords; each field says of itself what it is and what it may be."""

    # Length of the run, and what a step sees: batch_size pictures, over all processes. steps wins over epochs.
    epochs: int = option(30, "Times through the training data.", _positive, "at least 1", least=1)
    steps: int | None = option(
        None, "In place of epochs.", lambda n: n is None or n >= 1, "at least 1, or None", least=1
    )
    batch_size: int = option(128, "Images at a time.", _positive, "at least 1", least=1)
    accumulate: int = option(1, "A batch is done in so many parts.", _positive, _PARTS, least=1)

    # Optimizer: SGD with Nesterov momentum, or AdamW; a linear rise to the peak rate, then a cosine to zero.
    optimizer: str = _one_of("sgd or adamw", "NAME")
    lr: float | None = option(
        None,
        "Peak learning rate; default 0.05 for sgd, 0.001 for adamw.",
        lambda rate: rate is None or 0 < rate < math.inf,
        "positive, or None",
        "RATE",
    )
    momentum: float = option(0.9, "Of sgd.", _below_one, "0 up to, not including, 1", "SHARE")
    weight_decay: float = option(5e-4, "Pull of the weights towards 0.", _bounded, "0 or more", "RATE")
    warmup: float = option(
        0.05,
        "Share of the run with a rising rate.",
        _below_one,
        "a share of the steps, 0 up to, not including, 1",
        "SHARE",
    )
    clip: float = option(0.0, "Greatest norm of the gradient; 0: none.", _bounded, "0 (off) or more", "NORM")

    # Loss against labels.
    label_smoothing: float = option(0.0, "Of the labels.", _below_one, "0 up to, not including, 1", "SHARE")
    hard_weight: float = option(
        1.0, "Of the loss against labels; 0: unlabelled images do.", _bounded, "0 or more", "WEIGHT"
    )

    # Mixed pictures: α of Beta(α, α); with both on, one of the two at random a step.
    mixup: float = option(0.0, "0: off.", _bounded, "0 (off) or more", "ALPHA")
    cutmix: float = option(0.0, "0: off.", _bounded, "0 (off) or more", "ALPHA")

    # Averaged weights.
    ema: float = option(
        0.0, "Moving average of the weights; 0: off.", _below_one, "0 (off) up to, not including, 1", "DECAY"
    )

    # Precision, layout and compiler. auto: bf16 on CUDA; channels last where there are convolutions; CUDA graphs
    # (reduce-overhead) on CUDA from AUTO_STEPS steps on, where they have paid for the minute they take, and back to no
    # where the compiler can't.
    precision: str = _one_of("auto, fp32 or bf16", "NAME")
    channels_last: str = _one_of("auto, yes or no", "WHEN")
    compile: str = _one_of("auto, no, default or reduce-overhead", "HOW")

    # Validation, in epochs. The figure of the best state is optimistic: it was chosen by it.
    validate_every: int = option(1, "0: never.", _not_negative, "0 (never) or more", "EPOCHS", 0)
    keep: str = _one_of("last or best", "WHICH", "The last or the best state.")
    patience: int = option(
        0,
        "Stop after so many without a better state; 0: never.",
        _not_negative,
        "0 (never) or more epochs",
        "EPOCHS",
        0,
    )

    # What is not the same in all steps, and Δ of the two momenta (optimizer.py).
    dot: float = option(
        0.0, "More momentum for the teacher's gradient, less for the labels'; 0: off.", _not_negative, _DELTA, "SHARE"
    )
    freeze: float = option(
        0.0,
        "Of the steps, the last: batch norm's statistics stand still.",
        _up_to_one,
        "a share of the steps, 0 to 1",
        "SHARE",
    )
    loss_warmup: float = option(
        0.0, "Of the steps, the first: the teacher's weight rises.", _up_to_one, "a share of the steps, 0 to 1", "SHARE"
    )

    # Batch norm: of several processes (distributed.py), and of a quantised student (qat_batch_norm.py).
    sync_norm: str = _one_of("yes or no", "WHETHER", "Under torchrun, batch norm looks at the whole batch: yes or no.")
    live_norm: str = _one_of(
        "yes or no", "WHETHER", "In codes, batch norm is put back meanwhile: yes or no.", default="no"
    )

    # Of all that is drawn.
    seed: int = option(0, "The same seed gives the same result.", least=0)

    def __post_init__(self) -> None:
        check(self, "training")
        if self.accumulate > self.batch_size:
            raise InputError(f"training: accumulate={self.accumulate!r} is not {_PARTS}")
        if self.dot and not (self.dot <= self.momentum and self.dot < 1 - self.momentum):
            raise InputError(f"training: dot={self.dot!r} is not {_DELTA}")
        if self.patience and not self.validate_every:
            raise InputError(f"training: patience={self.patience} needs validation; pass validate_every=1")
        if self.dot and (self.optimizer != "sgd" or self.compile not in ("auto", "no")):
            raise InputError(
                f"training: dot={self.dot} is of sgd, and takes two passes backwards, which can't be compiled; "
                "pass optimizer=sgd, compile=no"
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


def training_of(given: Training | str | None, options: Mapping[str, object], verb: str) -> Training:
    """The training that is meant.

    given: a Training, the name of a preset, or None for the usual one.
    options: values that go before the fields of that name.
    verb: who asks, for the message.

    Raises InputError for an unknown preset or option, and for a value out of its bounds.
    """
    known = [one.name for one in dataclasses.fields(Training)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise InputError(f"{verb}: unknown option {unknown[0]!r}; have {', '.join(sorted(known))}")
    if isinstance(given, str):
        if given not in PRESETS:
            raise InputError(f"{verb}: training={given!r} is no preset; have {', '.join(PRESETS)}, or pass a Training")
        given = PRESETS[given]
    return dataclasses.replace(given or Training(), **options)  # type: ignore[arg-type]  # checked by Training
