"""What prune() is asked: help and bounds stand at the fields, where the command line and the verb itself read them.

Nothing here imports torch, so that ``rarefy prune --help`` need not wait for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy import plugins
from rarefy.errors import InputError
from rarefy.system.options import check, option

if TYPE_CHECKING:
    import torch

    from rarefy.deployment.runtime import Runtime
    from rarefy.pruning.mask import Saliency
    from rarefy.pruning.ranking import Criterion, Selection
    from rarefy.pruning.schedule import Schedule
    from rarefy.tasks.task import Task

RANKINGS = ("global", "loss", "local", "isomorphic")
TARGETS = ("keep", "macs", "params", "speedup")
Amount = float | Mapping[str, float]  # of what may remain; by globs on names of layers, of which the last holds
SCOPES = ("global", "layer", "output")


@dataclass(frozen=True)
class Target:
    """``kind``: one of ``TARGETS``; ``value``: a fraction, or a number above 1; of keep also a fraction a layer.

    Raises InputError for a value that is none.
    """

    kind: str
    value: Amount

    def __post_init__(self) -> None:
        kind, value = self.kind, self.value
        if isinstance(value, Mapping):
            self._check_layers(value)
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if kind == "speedup":
            if not number or value <= 1:
                raise InputError(f"speedup={value!r} is not a ratio above 1; twice as fast is 2")
        elif not number or value <= 0 or (value > 1 and (kind == "keep" or not float(value).is_integer())):
            allowed = "a fraction in (0, 1]" if kind == "keep" else "a fraction in (0, 1] or a whole number"
            raise InputError(f"{kind}={value!r} is not {allowed}")

    def _check_layers(self, shares: Mapping[str, float]) -> None:
        if self.kind != "keep" or not shares:
            raise InputError(f"{self.kind}={dict(shares)!r}: only keep= takes shares by layer, {{'stem.*': 0.5}}")
        for name, share in shares.items():
            Target("keep", share) if isinstance(name, str) else self._check_layers({})

    @property
    def number(self) -> float:
        """Of a target that is one number. Raises InputError for shares by layer."""
        if isinstance(self.value, Mapping):
            raise InputError(
                "keep= by layer is nothing that this schedule can divide; give one share, such as keep=0.5, or "
                "schedule=oneshot"
            )
        return self.value

    @property
    def asked(self) -> dict[str, Amount]:
        return {self.kind: self.value}

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"


@dataclass(frozen=True)
class Measured:
    """What a speedup is measured on. runtime: the object or its name.  threads: None for one.  batch: samples a run."""

    runtime: Runtime | str = "onnxruntime"
    threads: int | None = None
    batch: int = 1


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _are_globs(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(glob, str) for glob in value))


# What follows the default in an option that both verbs have.
_SEED = ("The same seed gives the same result.", lambda n: _is_whole(n, 0), "must be a whole number from 0", "N", 0)
_IGNORE = (
    "Layers to leave alone; may be given more than once.",
    _are_globs,
    "must be a list of globs, such as ['head.*']",
    "GLOB",
)


def _globs(ignore: Sequence[str]) -> tuple[str, ...]:
    """Of one glob or several."""
    return (ignore,) if isinstance(ignore, str) else tuple(ignore)


@dataclass(frozen=True)
class Options:
    """All that ``prune`` takes beside the model.

    Raises InputError for a value out of its bounds, an unknown choice, or repair without images.
    """

    keep: float | Mapping[str, float] | None = option(None, "Share of the channels to keep.", metavar="SHARE")
    macs: float | int | None = option(None, "MACs that may remain: a share, or a number above 1.", metavar="SHARE")
    params: float | int | None = option(
        None, "Parameters that may remain: a share, or a number above 1.", metavar="SHARE"
    )
    speedup: float | None = option(
        None, "Times as fast as the original, measured on --runtime; widths follow its kernels' times.", metavar="RATIO"
    )
    runtime: Runtime | str = option(
        "onnxruntime", "Where the model will run; see `rarefy list runtimes`.", metavar="NAME"
    )
    threads: int | None = option(None, "Of the runtime, for --speedup; default 1.", metavar="N", least=1)
    batch: int = option(1, "Samples a run, for --speedup.", metavar="N", least=1)
    criterion: Criterion | str = option(
        "magnitude", "What a channel is worth; see `rarefy list criteria`.", metavar="CHOICE"
    )
    ranking: str = option(
        "global",
        "global: layers compete; loss: the same, for hessian:group=true and taylor:form=fisher; "
        "local: each loses its share; isomorphic: layers of like structure compete.",
        lambda name: name in RANKINGS,
        f"one of {', '.join(RANKINGS)}",
        "NAME",
    )
    round_to: int = option(
        1,
        "Channels left are a multiple of this; with --speedup 8 unless given.",
        lambda n: _is_whole(n, 1),
        "must be a whole number from 1",
        "N",
        1,
    )
    floor: float = option(
        0.1,
        "Share of any layer that stays in any case.",
        lambda share: isinstance(share, (int, float)) and 0 <= share <= 1,
        "must lie between 0 and 1",
        "SHARE",
    )
    ignore: Sequence[str] = option((), *_IGNORE)
    heads: str = option("dims", "Of attention: dims, the same of each head leave; whole: heads leave.", metavar="NAME")
    select: Selection | str = option(
        "best", "How scores decide: best, or sample:temperature=1; see `rarefy list selection`.", metavar="CHOICE"
    )
    schedule: Schedule | str = option(
        "oneshot", "oneshot, iterative:rounds=5, group_sparse:epochs=10; see `rarefy list schedules`.", metavar="CHOICE"
    )
    check: bool = option(True, "Compare with the masked original.")
    repair: bool = option(False, "Mend it on 512 training images, without training.")
    task: Task | None = option(None, "For criteria that need data, and schedules that train.")
    seed: int = option(0, *_SEED)
    device: str | torch.device | None = option(
        None, "cpu, cuda, cuda:1; default: a GPU if there is one.", metavar="NAME"
    )
    checkpoint: str | Path | None = option(None, "Where a schedule that trains goes on after a kill.")
    progress: bool = option(True, "Show how far a schedule that trains has come.")

    def __post_init__(self) -> None:
        check(self, "")
        if self.repair and self.task is None:
            raise InputError(
                "repair=True needs images: pass task= (--data), or call rarefy.pruning.repair.repair() with batches "
                "of your own"
            )
        for kind, choice in (("criteria", self.criterion), ("selection", self.select), ("schedules", self.schedule)):
            plugins.resolve(kind, choice)

    @property
    def globs(self) -> tuple[str, ...]:
        return _globs(self.ignore)

    @property
    def target(self) -> Target:
        """Raises InputError where there is not one, or it is none."""
        given = {kind: value for kind in TARGETS if (value := getattr(self, kind)) is not None}
        if len(given) != 1:
            raise InputError(
                f"give one of keep=, macs=, params=, speedup=, such as macs=0.5; got {', '.join(given) or 'none'}"
            )
        ((kind, value),) = given.items()
        return Target(kind, value)

    @property
    def measured(self) -> Measured:
        return Measured(self.runtime, self.threads, self.batch)


# --------------------------------------------------------------------------------------------------------------- mask


@dataclass(frozen=True)
class Pattern:
    """A share of zeros, or (n > 0) n of each m that stay."""

    share: float
    n: int = 0
    m: int = 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.n else f"{self.share:g}"


def parse(sparsity: float | str) -> Pattern:
    """0.5, "0.5" or "2:4". Raises InputError."""
    text = str(sparsity).strip()
    pair = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if pair:
        n, m = int(pair[1]), int(pair[2])
        if 1 <= n < m:
            return Pattern(1 - n / m, n, m)
    try:
        share = math.nan if isinstance(sparsity, bool) else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise InputError(
            f"sparsity={sparsity!r} is neither a share between 0 and 1 nor N:M with N below M; write 0.5 or 2:4"
        )
    return Pattern(share)


@dataclass(frozen=True)
class MaskOptions:
    """All that ``mask`` takes beside the model.

    Raises InputError for a value out of its bounds, or an unknown choice.
    """

    sparsity: float | str = option(
        MISSING, "0.5: half of the weights become zero; 2:4: of each 4, 2 stay.", metavar="SHARE|N:M"
    )
    criterion: Saliency | str = option(
        "magnitude", "What a weight is worth; see `rarefy list saliency`.", metavar="CHOICE"
    )
    scope: str | None = option(
        None, "Where a share is taken: global, layer or output; default: the criterion's.", metavar="NAME"
    )
    ignore: Sequence[str] = option((), *_IGNORE)
    task: Task | None = option(None, "For criteria that look at data.")
    seed: int = option(0, *_SEED)

    def __post_init__(self) -> None:
        pattern = self.pattern
        if self.scope is not None and pattern.n:
            raise InputError(f"scope={self.scope!r} goes with a share, not with {pattern}")
        if self.scope is not None and self.scope not in SCOPES:
            raise InputError(f"scope={self.scope!r} is not one of {', '.join(SCOPES)}")
        check(self, "")
        plugins.resolve("saliency", self.criterion)

    @property
    def pattern(self) -> Pattern:
        return parse(self.sparsity)

    @property
    def globs(self) -> tuple[str, ...]:
        return _globs(self.ignore)
