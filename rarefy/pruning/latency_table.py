from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from torch import Tensor, fx

from rarefy.deployment.runtime import Kernel, Runtime
from rarefy.errors import FormatError, InputError
from rarefy.graph.nodes import attribute
from rarefy.system.files import cache_folder
from rarefy.system.strict_json import parse

SAMPLES = 6  # of the table: the whole network and five smaller ones
BLOCKS = (1, 4, 8, 16, 32)  # what layouts round channels up to
JUMPS = (1, 2, 4, 8)  # steps of a family that are tried at once
TURNS = 20  # of a sample and the whole network
FORMAT = 1

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Space:
    """What can be chosen.

    widths: for each family (options,) channels kept, ascending, the last is all.  damage: for each family (options,), the last is 0.
    parts: for each family (options, axes), the positions of each axis of the network that it then holds.  fixed: (axes,) those that always stay.
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
        held: Array = self.fixed + sum(part[index] for part, index in zip(self.parts, option, strict=True))
        return held

    def kept(self, option: Array) -> Array:
        return np.array([widths[index] for widths, index in zip(self.widths, option, strict=True)])


# ----------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True, eq=False)
class Table:
    """Microseconds of the network as ``f Q f``: f are the sizes of ``axes``, rounded up to ``blocks``, and a 1.

    error: median of |fitted - measured| / measured over the samples' totals.  modelled: share of the time whose kernels have a fit.
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


def fit(samples: Sequence[Sequence[Kernel]], sizes: Array) -> Table:
    """The table of samples taken at ``sizes`` (samples, axes); the first is the whole network, which may be built of other kernels."""
    named = [{kernel.name: kernel for kernel in sample} for sample in samples]
    common = [name for name in named[-1] if all(name in sample for sample in named[1:])]
    seen: dict[tuple[int, ...], list[dict[tuple[float, ...], int]]] = {}
    features: dict[tuple[int, int], int] = {}
    pools: dict[Any, list[tuple[list[int], Array, Array]]] = {}
    for name in common:
        present = [index for index, sample in enumerate(named) if name in sample]
        kernels = [named[index][name] for index in present]
        kernels = [kernel for kernel in kernels if [*map(len, kernel.shapes)] == [*map(len, kernels[-1].shapes)]]
        present = [index for index in present if any(named[index][name] is kernel for kernel in kernels)]
        known = seen.setdefault(tuple(present), []) or _columns(sizes[present], seen[tuple(present)])
        own: dict[int, int] = {}  # feature -> its place among this kernel's
        rows: list[Array] = []
        structure: list[Any] = [kernels[0].operator]
        for place, shape in enumerate(kernels[0].shapes):
            for axis, size in enumerate(shape):
                column = np.array([kernel.shapes[place][axis] for kernel in kernels], dtype=np.float64)
                if (column == column[0]).all():
                    structure.append(size)
                    continue
                found = next(
                    ((by[key], block) for block, by in zip(BLOCKS, known, strict=True) if (key := tuple(column)) in by),
                    None,
                )
                if found is None:
                    structure.append("?")
                    continue
                feature = features.setdefault(found, len(features))
                if feature not in own:
                    own[feature] = len(own)
                    rows.append(column)
                structure.append(f"w{own[feature]}")
            structure.append("/")
        times = np.array([max(kernel.us, 0.1) for kernel in kernels])
        pools.setdefault(tuple(structure), []).append(
            (list(own), np.stack(rows, 1) if rows else np.zeros((len(times), 0)), times)
        )
    form = np.zeros((len(features) + 1, len(features) + 1))
    for members in pools.values():
        one, other, coefficients = _fitted(
            np.concatenate([rows for _, rows, _ in members]), np.concatenate([times for *_, times in members])
        )
        for places, _, _ in members:
            names = np.array([*places, len(features)])
            np.add.at(form, (names[one], names[other]), coefficients)
    totals = np.array([sum(kernel.us for kernel in sample) for sample in samples])
    rest = [sum(kernel.us for kernel in sample if kernel.name not in set(common)) for sample in samples[1:]] or [0.0]
    form[-1, -1] += float(np.mean(rest))
    pairs = np.array(list(features), dtype=np.int64).reshape(-1, 2)
    table = Table(
        pairs[:, 0],
        pairs[:, 1],
        form,
        0.0,
        1 - float(np.mean(rest)) / float(totals[1:].mean() if len(totals) > 1 else totals[0]),
    )
    apart = np.abs(table(sizes) / totals - 1)
    return Table(table.axes, table.blocks, form, float(np.median(apart)), table.modelled)


def _columns(sizes: Array, into: list[dict[tuple[float, ...], int]]) -> list[dict[tuple[float, ...], int]]:
    """For each block, the sizes an axis has in the samples, rounded up -> the first such axis."""
    for block in BLOCKS:
        rounded = (-(-sizes // block) * block).T
        into.append({tuple(column): index for index, column in reversed(list(enumerate(rounded.tolist())))})
    return into


def _fitted(widths: Array, times: Array) -> tuple[Array, Array, Array]:
    """Pairs of widths (the last stands for 1) and the coefficients of their products, not negative, least squares of the relative error."""
    with_one = np.concatenate((widths, np.ones((len(widths), 1))), 1)
    one, other = np.triu_indices(with_one.shape[1])
    terms = with_one[:, one] * with_one[:, other]
    scale = terms.max(0)
    found, _ = nnls(terms / scale / times[:, None], np.ones(len(times)))
    return one, other, found / scale


def _design(space: Space, seed: int) -> list[Array]:
    """The whole network, then a Latin hypercube: every family takes each fraction of its range once, never all of itself."""
    random = np.random.default_rng(seed)
    whole, smaller = space.whole, SAMPLES - 1
    strata = np.stack([random.permutation(smaller) for _ in whole], 1) if len(whole) else np.zeros((smaller, 0))
    return [whole, *(((strata + 0.5) / smaller * whole).astype(np.int64))]


def _total(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.us for kernel in kernels)


def _kernels(runtime: Runtime, file: Path, example: Tensor, name: str) -> list[Kernel]:
    if not runtime.capabilities.has_kernel_times:
        raise InputError(f"{name}: can't tell the time of each of its kernels; prune to macs= in place of speedup=")
    return runtime.kernel_times(file, example)


def _cache_file(
    cache: str | os.PathLike[str] | None,
    graph: fx.GraphModule,
    widths: list[list[int]],
    settings: dict[str, Any],
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
    own = [
        next((line for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags", "Features", "cache size")
    ]
    return [platform.machine(), platform.processor(), str(os.cpu_count()), *own]


def _cached(file: Path) -> list[list[Kernel]] | None:
    """The samples of an earlier run; None where there is no sound file."""
    try:
        content = parse(file.read_bytes(), file)
        samples = content["samples"]
        if content["format"] != FORMAT or content["sha256"] != _digest(samples) or len(samples) != SAMPLES:
            return None
        return [[Kernel(*kernel) for kernel in sample] for sample in samples]
    except (OSError, FormatError, KeyError, TypeError):
        return None


def _keep(file: Path, samples: list[list[Kernel]]) -> None:
    """Write the whole file or nothing; a cache that can't be written is no error."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".json")
        with os.fdopen(descriptor, "w") as stream:
            json.dump({"format": FORMAT, "sha256": _digest(samples), "samples": samples}, stream)
        os.replace(partial, file)


def _digest(samples: Any) -> str:
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()
