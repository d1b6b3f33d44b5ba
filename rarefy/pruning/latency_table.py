"""The latency table: the time of a network as one quadratic form of its widths, fitted to profiles of a few.

MACs are no time: kernels work in tiles, are bound by memory where they are thin, and layout changes, softmax and
additions cost, too. So the runtime is asked. The network is exported whole and at a few widths, each family of channels
at another fraction every time (a Latin hypercube), and the runtime's profile gives the time of each kernel, as fused
and with the caches as it finds them there. Which axis of a kernel follows which axis of the network is read off the
sizes over the samples, rounded up to the layout's block where the runtime does so: no operator is known by name.
Kernels alike (operator, fixed sizes) share their samples; their time is fitted as ``a + b i + c o + d i o + ...`` of
their widths, coefficients not negative, by relative error.

Samples are kept in the user's cache, by runtime, version, processor, threads, batch, network and widths; a cache that
is damaged is measured anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, fx

from rarefy.deployment.runtime import Kernel
from rarefy.errors import FormatError
from rarefy.graph.nodes import attribute
from rarefy.system.files import cache_folder, replacing
from rarefy.system.strict_json import parse

SAMPLES = 6  # of the table: the whole network and five smaller ones
BLOCKS = (1, 4, 8, 16, 32)  # what layouts round channels up to
FORMAT = 1

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Space:
    """What can be chosen.

    widths: for each family (options,) channels kept, ascending, the last is all.
    damage: for each family (options,), the last is 0.
    parts: for each family (options, axes), the positions of each axis of the network that it then holds.
    fixed: (axes,) those that always stay.
    """

    widths: list[Array]
    damage: list[Array]
    parts: list[Array]
    fixed: Array

    @property
    def whole(self) -> Array:
        return np.array([len(widths) - 1 for widths in self.widths])

    def axes(self, option: Array) -> Array:
        """(axes,) sizes where family f takes ``option[f]``."""
        sizes: Array = self.fixed + sum(part[index] for part, index in zip(self.parts, option, strict=True))
        return sizes

    def kept(self, option: Array) -> Array:
        return np.array([widths[index] for widths, index in zip(self.widths, option, strict=True)])


def design(space: Space, seed: int) -> list[Array]:
    """The whole network, then a Latin hypercube: every family takes each fraction of its range once, never all."""
    random = np.random.default_rng(seed)
    whole, smaller = space.whole, SAMPLES - 1
    strata = np.stack([random.permutation(smaller) for _ in whole], 1) if len(whole) else np.zeros((smaller, 0))
    return [whole, *(((strata + 0.5) / smaller * whole).astype(np.int64))]


# ---------------------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True, eq=False)
class Table:
    """Microseconds of the network as ``f Q f``: f are the sizes of ``axes``, rounded up to ``blocks``, and a 1.

    error: median of |fitted - measured| / measured over the samples' totals.
    modelled: share of the time whose kernels have a fit.
    """

    axes: Array
    blocks: Array
    form: Array
    error: float
    modelled: float

    def __call__(self, sizes: Array) -> Array:
        """(batch, axes of the network) -> (batch,) microseconds."""
        rounded = -(-sizes[:, self.axes] // self.blocks) * self.blocks
        features = np.concatenate((rounded, np.ones((len(sizes), 1))), 1)
        total: Array = ((features @ self.form) * features).sum(1)
        return total


class _Fitted(NamedTuple):
    """A kernel over the samples.

    features: its widths, as numbers of features. widths: (samples, features). us: (samples,).
    """

    features: list[int]
    widths: Array
    us: Array


class _Features:
    """The axes of the network that kernels follow, each with the block it is rounded up to: (axis, block) -> number.

    sizes: (samples, axes of the network).
    """

    def __init__(self, sizes: Array):
        self.sizes = sizes
        self.numbers: dict[tuple[int, int], int] = {}
        self.columns: dict[tuple[int, ...], list[dict[tuple[float, ...], int]]] = {}

    def read(self, present: tuple[int, ...], kernels: Sequence[Kernel]) -> tuple[tuple[object, ...], _Fitted]:
        """(what kernels alike have in common, the kernel over the samples); present: the samples of ``kernels``."""
        places: dict[int, int] = {}  # feature -> its place among this kernel's
        widths: list[Array] = []
        structure: list[object] = [kernels[0].operator]
        for place, shape in enumerate(kernels[0].shapes):
            for axis, size in enumerate(shape):
                column = np.array([kernel.shapes[place][axis] for kernel in kernels], dtype=np.float64)
                if (column == column[0]).all():
                    structure.append(size)
                    continue
                feature = self._of(present, column)
                if feature is None:
                    structure.append("?")
                    continue
                if feature not in places:
                    places[feature] = len(places)
                    widths.append(column)
                structure.append(f"w{places[feature]}")
            structure.append("/")
        us = np.array([max(kernel.us, 0.1) for kernel in kernels])
        held = np.stack(widths, 1) if widths else np.zeros((len(us), 0))
        return tuple(structure), _Fitted(list(places), held, us)

    def _of(self, present: tuple[int, ...], column: Array) -> int | None:
        """The feature that has these sizes in the samples, with the smallest block."""
        if present not in self.columns:
            self.columns[present] = _columns(self.sizes[list(present)])
        key = tuple(column)
        for block, axes in zip(BLOCKS, self.columns[present], strict=True):
            if key in axes:
                return self.numbers.setdefault((axes[key], block), len(self.numbers))
        return None


def fit(samples: Sequence[Sequence[Kernel]], sizes: Array) -> Table:
    """The table of samples taken at ``sizes`` (samples, axes).

    The first is the whole network, which may be built of other kernels.
    """
    named = [{kernel.name: kernel for kernel in sample} for sample in samples]
    common = [name for name in named[-1] if all(name in sample for sample in named[1:])]
    features = _Features(sizes)
    alike: dict[tuple[object, ...], list[_Fitted]] = {}
    for name in common:
        last = [*map(len, named[-1][name].shapes)]
        found = {index: sample[name] for index, sample in enumerate(named) if name in sample}
        found = {index: kernel for index, kernel in found.items() if [*map(len, kernel.shapes)] == last}
        structure, kernel = features.read(tuple(found), list(found.values()))
        alike.setdefault(structure, []).append(kernel)
    totals = np.array([sum(kernel.us for kernel in sample) for sample in samples])
    rest = [sum(kernel.us for kernel in sample if kernel.name not in set(common)) for sample in samples[1:]] or [0.0]
    form = _form(alike.values(), len(features.numbers))
    form[-1, -1] += float(np.mean(rest))
    pairs = np.array(list(features.numbers), dtype=np.int64).reshape(-1, 2)
    modelled = 1 - float(np.mean(rest)) / float(totals[1:].mean() if len(totals) > 1 else totals[0])
    table = Table(pairs[:, 0], pairs[:, 1], form, 0.0, modelled)
    apart = np.abs(table(sizes) / totals - 1)
    return Table(table.axes, table.blocks, form, float(np.median(apart)), modelled)


def _columns(sizes: Array) -> list[dict[tuple[float, ...], int]]:
    """For each block, the sizes an axis has in the samples, rounded up -> the first such axis."""
    rounded = [(-(-sizes // block) * block).T.tolist() for block in BLOCKS]
    return [{tuple(column): index for index, column in reversed(list(enumerate(columns)))} for columns in rounded]


def _form(alike: Iterable[Sequence[_Fitted]], features: int) -> Array:
    """(features + 1, features + 1): the sum of what was fitted to kernels alike."""
    form = np.zeros((features + 1, features + 1))
    for kernels in alike:
        one, other, coefficients = _coefficients(
            np.concatenate([kernel.widths for kernel in kernels]), np.concatenate([kernel.us for kernel in kernels])
        )
        for kernel in kernels:
            numbers = np.array([*kernel.features, features])
            np.add.at(form, (numbers[one], numbers[other]), coefficients)
    return form


def _coefficients(widths: Array, us: Array) -> tuple[Array, Array, Array]:
    """Pairs of widths (the last stands for 1) and the coefficients of their products.

    They are not negative; least squares of the relative error.
    """
    from scipy.optimize import nnls  # once asked for: it takes long to import, and no other pruning needs it

    with_one = np.concatenate((widths, np.ones((len(widths), 1))), 1)
    one, other = np.triu_indices(with_one.shape[1])
    terms = with_one[:, one] * with_one[:, other]
    scale = terms.max(0)
    found, _ = nnls(terms / scale / us[:, None], np.ones(len(us)))
    return one, other, found / scale


# -------------------------------------------------------------------------------------------------------------- cache


def cache_file(
    cache: str | os.PathLike[str] | None,
    graph: fx.GraphModule,
    widths: list[list[int]],
    settings: Mapping[str, object],
    package: str,
) -> Path:
    """The file's name is a hash of all that the times depend on."""
    layers = [
        [node.op, str(node.target), str(node.args), str(node.kwargs), list(attribute(graph, str(node.target)).shape)]
        if node.op == "get_attr" and isinstance(attribute(graph, str(node.target)), Tensor)
        else [node.op, str(node.target), str(node.args), str(node.kwargs)]
        for node in graph.graph.nodes
    ]
    with suppress(importlib.metadata.PackageNotFoundError):
        settings = {**settings, "version": importlib.metadata.version(package)}
    known = {
        **settings,
        "format": FORMAT,
        "processor": _processor(),
        "layers": layers,
        "inputs": graph.meta["inputs"],
        "widths": widths,
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return (cache_folder() / "latency" if cache is None else Path(cache)) / f"{digest}.json"


def _processor() -> list[str]:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    wanted = ("model name", "flags", "Features", "cache size")
    said = [next((line for line in lines if line.startswith(name)), "") for name in wanted]
    return [platform.machine(), platform.processor(), str(os.cpu_count()), *said]


def cached(file: Path) -> list[list[Kernel]] | None:
    """The samples of an earlier run; None where there is no sound file."""
    try:
        content = parse(file.read_bytes(), file)
        samples = content["samples"]
        if content["format"] != FORMAT or content["sha256"] != _digest(samples) or len(samples) != SAMPLES:
            return None
        return [[Kernel(*kernel) for kernel in sample] for sample in samples]
    except (OSError, FormatError, KeyError, TypeError):
        return None


def keep(file: Path, samples: Sequence[Sequence[Kernel]]) -> None:
    """Write the whole file or nothing; a cache that can't be written is no error."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps({"format": FORMAT, "sha256": _digest(samples), "samples": samples}))


def _digest(samples: object) -> str:
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()
