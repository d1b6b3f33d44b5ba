"""Weights from a file into a model: which of the file's tensors are the model's.

Training code saves more than ``model.state_dict()``, each under names of its own: Lightning writes ``model.`` before
them, DistributedDataParallel ``module.``, a distiller ``module.student.``; they lie under ``state_dict``, ``net``,
``ema``, beside an optimiser's state. What fits is found by the names alone: the prefix under which *every* tensor of
the model is there, in its shape, and nothing else is. If there is one, it is taken; what was taken is told.

If there are several, equal ones are one, and of an averaged copy (EMA, SWA) and a plain one the averaged is taken, as
timm and Lightning evaluate; of any others none is, and the message names them. ``FILE?prefix=student.`` takes the one
named.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rarefy.errors import InputError
from rarefy.graph.nodes import dtype_name
from rarefy.models.checkpoint import entries
from rarefy.models.source import Source, by

# What wrappers put into the middle of names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged|shadow)(?:[._]|$)|ema_model|model_ema")
_COUNTERS = re.compile(r"(?:^|\.)(?:n_averaged|total_ops|total_params)$")  # of averaging, and of profilers


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> str | None:
    """Put the tensors of ``path`` into ``model``, every one at its place.

    path: a file; ``FILE?prefix=student.`` where several parts of it fit.
    Returns what was taken, in a line, of a file that holds more than the model's tensors under their own names; else
    None.
    Raises InputError where a tensor is missing, unexpected or of another shape (the first of each kind is named, and
    how many there are), or where several parts fit; FormatError for a file that is broken or would run code.
    """
    file, asked = _file_and_prefix(path)
    wanted, given = model.state_dict(), _given(file)
    fits, outer = _fits(given, wanted, asked), ""
    own = _common_prefix(wanted)
    if own and not any(not fit.wrong for fit in fits):  # the model is wrapped, and the file is not
        inner = _fits(given, {name.removeprefix(own): value for name, value in wanted.items()}, asked)
        if any(not fit.wrong for fit in inner):
            fits, outer = inner, own
    whole = _distinct([fit for fit in fits if not fit.wrong], given)
    if not whole:
        raise InputError(f"{path}: does not fit the model: {_why(fits, given, wanted, asked)}")
    taken, plain = _chosen(whole, file)
    model.load_state_dict({outer + name: given[there].value for name, there in taken.names.items()}, strict=False)
    told = _told(taken, plain, given, outer)
    if told is not None:
        logging.getLogger("rarefy").log(logging.INFO if plain is None else logging.WARNING, "%s: %s", path, told)
    return told


def check_finite(source: Source) -> None:
    """Raises InputError for weights that are NaN or infinite."""
    learned = dict(source.model.named_parameters(remove_duplicate=False))
    for name, value in source.model.state_dict().items():
        if value.is_floating_point() and not math.isfinite(value.sum(dtype=torch.float64).item()):
            bad = int((~torch.isfinite(value) if name in learned else torch.isnan(value)).sum())  # a mask may hold -inf
            if bad:
                raise InputError(
                    f"{source.weights or source.text}: {name} holds {bad} values that are NaN or infinite; "
                    "give weights from before the training diverged"
                )


class _Stored(NamedTuple):
    """A tensor of the file, and the dictionary there that it lies in."""

    value: Tensor
    entry: str


@dataclass(frozen=True)
class _Fit:
    """How a part of a file fits a model.

    prefix: what stands before the model's names there, the entry included. names: the model's name -> the file's.
    beside: others of the same dictionaries. wrong: why it does not fit, a sentence each; none where it does.
    """

    prefix: str
    names: Mapping[str, str]
    beside: Sequence[str]
    wrong: Sequence[str]


def _file_and_prefix(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    file, question, query = os.fspath(path).rpartition("?")
    if not question or os.path.exists(path):
        return Path(path), None
    key, _, prefix = query.partition("=")
    if key != "prefix":
        raise InputError(f"{path}: {query!r} is no option of a file of weights; write {file}?prefix=NAME")
    return Path(file), f"{prefix.rstrip('.')}." if prefix else ""


def _given(file: Path) -> dict[str, _Stored]:
    """Every tensor by its name, that of its dictionary before it, and without what wrappers put in between."""
    found: dict[str, _Stored] = {}
    for entry, tensors in entries(file).items():
        for name, value in tensors.items():
            found.setdefault(_WRAPPERS.sub("", f"{entry}.{name}" if entry else name), _Stored(value, entry))
    return found


def _fits(given: Mapping[str, _Stored], wanted: Mapping[str, Tensor], asked: str | None) -> list[_Fit]:
    """The prefixes under which the model's tensors are found: where most are, first."""
    found = Counter(name[:cut] for name in given for cut in _cuts(name) if name[cut:] in wanted)
    if asked is not None:
        under = [asked] if asked in found else [prefix for prefix in found if f".{prefix}".endswith(f".{asked}")]
        return [_fit(prefix, given, wanted) for prefix in under]
    most = max(found.values(), default=0)
    return [_fit(prefix, given, wanted) for prefix, count in found.most_common() if 2 * count > most]


def _cuts(name: str) -> list[int]:
    return [0, *(place.end() for place in re.finditer(r"\.", name))]


def _fit(prefix: str, given: Mapping[str, _Stored], wanted: Mapping[str, Tensor]) -> _Fit:
    names = {name: prefix + name for name in wanted if prefix + name in given}
    tied = {(_place(wanted[name])) for name in names}
    missing = [
        name
        for name, value in wanted.items()
        if name not in names and not name.endswith("num_batches_tracked") and _place(value) not in tied
    ]
    homes = {given[there].entry for there in names.values()}
    taken = set(names.values())
    others = [name for name, one in given.items() if one.entry in homes and name not in taken]
    unexpected = [name for name in others if name.startswith(prefix) and not _COUNTERS.search(name)]
    kinds = {name: why for name, there in names.items() if (why := _why_other(given[there].value, wanted[name]))}
    shapes = [
        name
        for name, there in names.items()
        if name not in kinds and not is_lazy(wanted[name]) and given[there].value.shape != wanted[name].shape
    ]
    wrong = []
    if kinds:
        first, why = next(iter(kinds.items()))
        wrong.append(f"{first} is {why}{_more(list(kinds))}")
    if shapes:
        there, here = given[names[shapes[0]]].value.shape, wanted[shapes[0]].shape
        head = there and there[1:] == here[1:]
        hint = f"; pass --classes {there[0]} (a maker of yours takes it as num_classes)" if head else ""
        wrong.append(f"{shapes[0]} is {by(there)} there and {by(here)} in the model{_more(shapes)}{hint}")
    if missing:
        wrong.append(f"{missing[0]} is missing there{_more(missing)}")
    if unexpected:
        wrong.append(f"{unexpected[0].removeprefix(prefix)} is not in the model{_more(unexpected)}")
    return _Fit(prefix, names, others, wrong)


def _why_other(given: Tensor, wanted: Tensor) -> str | None:
    """Why a tensor of the file has no numbers that a model's can take; copying would fail, or drop a part unsaid."""
    if given.is_nested:
        return "a nested tensor there: give it dense"
    if given.layout != torch.strided:
        return f"a sparse tensor there ({given.layout}): give it dense, .to_dense()"
    if given.device.type == "meta":
        return "without values there (on the meta device): give weights that were loaded"
    if given.is_quantized:
        return "quantised there: give it as floats, .dequantize()"
    if is_lazy(wanted) or given.dtype == wanted.dtype:
        return None
    floats = given.is_floating_point() and (given.dtype.itemsize > 1)
    if wanted.is_floating_point() and not floats:
        kind = dtype_name(given.dtype)
        return f"{kind} there and {dtype_name(wanted.dtype)} in the model: give the weights as floats"
    return None


def _place(value: Tensor) -> object:
    """The same of two tensors that share their memory, as tied weights do: a file may hold one of them alone."""
    pointer = 0 if is_lazy(value) or value.device.type == "meta" else value.data_ptr()
    return (pointer, value.shape, value.stride()) if pointer else id(value)


def _common_prefix(wanted: Mapping[str, Tensor]) -> str:
    """``net.`` of a model all of whose names begin so, up to the last point."""
    first, last = min(wanted, default=""), max(wanted, default="")
    shared = next((place for place, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), 0)
    return first[: first.rfind(".", 0, shared) + 1]


def _distinct(fits: Sequence[_Fit], given: Mapping[str, _Stored]) -> list[_Fit]:
    """Of parts that hold the same numbers, the first."""
    found: list[_Fit] = []
    for fit in fits:
        if not any(
            fit.names.keys() == other.names.keys()
            and all(torch.equal(given[fit.names[name]].value, given[other.names[name]].value) for name in fit.names)
            for other in found
        ):
            found.append(fit)
    return found


def _chosen(fits: Sequence[_Fit], file: Path) -> tuple[_Fit, _Fit | None]:
    """The part to take, and the plain one where that is an averaged copy."""
    if len(fits) == 1:
        return fits[0], None
    averaged, plain = (
        [fit for fit in fits if bool(_AVERAGED.search(fit.prefix)) is is_one] for is_one in (True, False)
    )
    if len(averaged) == len(plain) == 1:
        return averaged[0], plain[0]
    named = ", ".join(repr(fit.prefix) for fit in fits[:4])
    more = " ..." if len(fits) > 4 else ""
    raise InputError(
        f"{file}: {len(fits)} parts of it fit the model: {named}{more}; "
        f"name the one to take: '{file}?prefix={fits[0].prefix or fits[1].prefix}'"
    )


def _told(taken: _Fit, plain: _Fit | None, given: Mapping[str, _Stored], outer: str) -> str | None:
    """Which entry and prefix, and what was left beside."""
    if not taken.prefix and not outer and plain is None and not taken.beside:
        return None
    entry = next((given[there].entry for there in taken.names.values()), "")
    entry = entry if taken.prefix.startswith(f"{entry}.") else ""
    rest = taken.prefix.removeprefix(f"{entry}.")
    words = [f"{len(taken.names)} tensors taken"]
    words += [f"of the entry {entry!r}"] * bool(entry) + [f"without the prefix {rest!r}"] * bool(rest)
    words += [f"into {outer!r}"] * bool(outer)
    text = " ".join(words)
    if plain is not None:
        text += f", an averaged copy (the plain one: ?prefix={plain.prefix})"
    if taken.beside:
        text += f"; left there: {taken.beside[0]}{_more(taken.beside)}"
    return text


def _why(fits: Sequence[_Fit], given: Mapping[str, _Stored], wanted: Mapping[str, Tensor], asked: str | None) -> str:
    """What is missing, unexpected and of another shape in the part that fits best."""
    if not fits:
        under = f" under {asked!r}" if asked else ""
        return (
            f"none of the model's names is there{under}: it holds {next(iter(given))}{_more(list(given))}, "
            f"the model {next(iter(wanted), 'nothing')}; give the weights of this very architecture"
        )
    best = fits[0]
    under = f"under {best.prefix!r} " if best.prefix else ""
    else_ = "or give" if any("--classes" in why for why in best.wrong) else "give"
    return f"{under}{'; '.join(best.wrong)}; {else_} the weights of this very architecture"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
