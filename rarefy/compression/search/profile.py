"""What is measured once, before the first trial: what widths cost, and what each alone does to the answers.

**Cost** is the latency table of ``pruning/latency_table.py``, from the runtime's own profiles of six networks; where a
runtime does not tell the time of its kernels, or the machine was so busy that a smaller network took longer than the
whole one, the MACs, as a table of the same form.

**Sensitivity** e_f(w) is the squared error of the answers, in shares of their variance, when family f alone is cut to w
channels, on a few images. It says where the integer program begins; it is not believed further, because errors of
layers do not add up (EvoPress, arXiv 2410.14649): ``first.py`` goes on with errors of whole networks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx

from rarefy import plugins
from rarefy.compression.search.space import Family
from rarefy.deployment.runtime import Kernel, Runtime
from rarefy.errors import CheckFailed, InputError
from rarefy.graph.signature import tensors
from rarefy.pruning.groups.groups import Coupling, couple
from rarefy.pruning.groups.slicing import cut
from rarefy.pruning.latency_search import Bench
from rarefy.pruning.latency_table import Array, Space, Table, cache_file, cached, design, fit, keep
from rarefy.pruning.options import Measured
from rarefy.pruning.ranking import Criterion, Ranking, names_of, rank
from rarefy.system.progress import track

LEVELS = 8  # widths of a family, at most
LEAST = 0.1  # of a family, stays


@dataclass(frozen=True, eq=False)
class Profile:
    """families: what may be pruned. errors: of each, by level. unit: of the cost: "us", or "MACs".

    axes, blocks, form: of the cost's table, over the axes that it knows. parts: of each family (levels, axes), what it
    then holds of them. fixed: (axes,) what stays in any case.
    """

    families: tuple[Family, ...]
    errors: tuple[tuple[float, ...], ...]
    unit: str
    blocks: Array
    form: Array
    parts: tuple[Array, ...]
    fixed: Array

    @cached_property
    def table(self) -> Table:
        return Table(np.arange(len(self.fixed)), self.blocks, self.form, 0.0, 1.0)

    @property
    def whole(self) -> tuple[int, ...]:
        return tuple(len(one.widths) - 1 for one in self.families)

    def cost(self, levels: Sequence[int]) -> float:
        """Of the float network, as the table expects it, in shares of the whole network's."""
        return self._of(levels) / self._of(self.whole)

    def _of(self, levels: Sequence[int]) -> float:
        sizes = self.fixed + sum((part[level] for part, level in zip(self.parts, levels, strict=True)), np.zeros(1))
        return max(float(self.table(sizes[None])[0]), 1e-9)

    def to_json(self) -> dict[str, object]:
        return {
            "families": [{"name": one.name, "widths": list(one.widths)} for one in self.families],
            "errors": [list(row) for row in self.errors],
            "unit": self.unit,
            "blocks": self.blocks.tolist(),
            "form": self.form.tolist(),
            "parts": [part.tolist() for part in self.parts],
            "fixed": self.fixed.tolist(),
        }

    @classmethod
    def from_json(cls, told: dict[str, object]) -> Profile:
        """Of a sealed file of a search's folder."""
        families = cast(list[dict[str, object]], told["families"])
        return cls(
            tuple(Family(str(one["name"]), tuple(cast(list[int], one["widths"]))) for one in families),
            tuple(map(tuple, cast(list[list[float]], told["errors"]))),
            str(told["unit"]),
            np.array(told["blocks"]),
            np.array(told["form"]),
            tuple(np.array(part) for part in cast(list[list[list[float]]], told["parts"])),
            np.array(told["fixed"]),
        )


class Network:
    """The original, cut to any widths of its families; its answers on a few images.

    images: (N, ...), what errors are measured on.
    """

    def __init__(self, graph: fx.GraphModule, images: Tensor, families: Sequence[Family] | None = None) -> None:
        self.coupling: Coupling = couple(graph, (), "dims")
        self.images = images
        criterion: Criterion = plugins.resolve("criteria", "magnitude")
        scores = criterion.scores(self.coupling.graph, self.coupling, None, 0)
        self.ranking: Ranking = rank(self.coupling, scores, rule="global", floor=LEAST)
        names = names_of(self.ranking)
        free = [index for index in range(1, len(names)) if self.ranking.sizes[index] > 1 and names[index]]
        self.indices = [index for index in free if self.ranking.least[index] < self.ranking.sizes[index]]
        self.families = tuple(families or (_family(self.ranking, index, names[index][0]) for index in self.indices))
        self.exact = _answers(graph, images)

    def at(self, widths: Sequence[int]) -> fx.GraphModule:
        """The network with so many channels of each family."""
        return cut(self.coupling, torch.from_numpy(self._alive(widths))).eval()

    def _alive(self, widths: Sequence[int]) -> Array:
        counts = self.ranking.sizes.copy()
        counts[self.indices] = widths
        return self.ranking.alive(counts)

    def error(self, widths: Sequence[int], count: int) -> float:
        """Of the answers of the cut network on the first ``count`` images: squared, over their variance."""
        exact = self.exact[:count]
        spread = (exact - exact.mean(0)).square().sum().clamp_min(1e-30)
        moved = _answers(self.at(widths), self.images[:count]) - exact
        found = float(moved.square().sum() / spread)
        return found if np.isfinite(found) else 1e9

    def space(self) -> Space:
        """The widths as the latency table takes them."""
        parts = []
        for index, one in zip(self.indices, self.families, strict=True):
            members = np.flatnonzero(self.ranking.family == index)
            members = members[np.argsort(self.ranking.place[members])]
            parts.append(np.cumsum(self.ranking.costs.widths_of(members), 1)[:, np.array(one.widths) - 1].T)
        widths = [np.array(one.widths) for one in self.families]
        fixed = self.ranking.costs.widths(~np.isin(self.ranking.family, self.indices))
        return Space(widths, [np.zeros(len(one)) for one in widths], parts, fixed)


def _answers(graph: fx.GraphModule, images: Tensor) -> Tensor:
    """(N, numbers): all outputs."""
    with torch.no_grad():
        leaves = tensors(graph.eval()(images))
    return torch.cat([leaf.reshape(leaf.shape[0], -1).double() for leaf in leaves], 1)


def _family(ranking: Ranking, index: int, name: str) -> Family:
    """A few widths, multiples of eight where there are enough channels."""
    size, least = int(ranking.sizes[index]), int(ranking.least[index])
    step = max(1, -(-size // LEVELS))
    step = -(-step // 8) * 8 if size >= 8 * LEVELS else step
    widths = [width for width in range(step, size, step) if width >= least]
    return Family(name, (*widths, size))


def measure(network: Network, runtime: Runtime, seed: int, progress: bool) -> Profile:
    """The table of costs and the sensitivities. Raises InputError where nothing can be pruned."""
    space = network.space()
    table, unit = _table(network, space, runtime, seed)
    rows = []
    whole = [one.widths[-1] for one in network.families]
    for index, one in track(list(enumerate(network.families)), len(whole), "sensitivities", progress):
        row = [network.error([*whole[:index], width, *whole[index + 1 :]], len(network.images)) for width in one.widths]
        rows.append((*row[:-1], 0.0))
    parts = tuple(part[:, table.axes] for part in space.parts)
    return Profile(network.families, tuple(rows), unit, table.blocks, table.form, parts, space.fixed[table.axes])


def _table(network: Network, space: Space, runtime: Runtime, seed: int) -> tuple[Table, str]:
    """Of the runtime's microseconds; of MACs, where it tells none, or none to be trusted."""
    if runtime.capabilities.has_kernel_times and network.families:
        try:
            samples = _profiled(network, space, runtime, seed)
            return fit(samples, np.stack([space.axes(option) for option in design(space, seed)])), "us"
        except (InputError, CheckFailed):
            pass
    return macs_table(network), "MACs"


def _profiled(network: Network, space: Space, runtime: Runtime, seed: int) -> list[list[Kernel]]:
    """On the runtime, or from an earlier run. Raises InputError where it can't tell, or the machine was too busy."""
    options = design(space, seed)
    with tempfile.TemporaryDirectory(prefix="rarefy-") as temporary:
        build = lambda widths: network.at(widths.tolist())
        bench = Bench(space, build, Measured(runtime), seed, Path(temporary))
        widths = [space.kept(option).tolist() for option in options]
        file = cache_file(None, bench.original, widths, bench.settings, bench.runtime.package)
        known = cached(file)
        samples = bench.sampled(options) if known is None else known
    if not _is_sound(samples):
        raise InputError("the latency table: a smaller network took longer than the whole one; the machine is busy")
    if known is None:
        keep(file, samples)
    return samples


def macs_table(network: Network) -> Table:
    """MACs are sums of products of widths; those of more than two are taken at the whole network's other widths."""
    macs, count = network.ranking.costs.macs, len(network.ranking.costs.axes)
    whole = np.append(network.ranking.costs.widths(np.ones(network.coupling.count, dtype=bool)), 1.0)
    form = np.zeros((count + 1, count + 1))
    for coefficient, factors in zip(macs.coefficients, macs.factors, strict=True):
        named = [int(factor) % (count + 1) for factor in factors if factor >= 0]
        one, other, *rest = [*named, count, count]
        form[one, other] += coefficient * float(whole[rest].prod())
    return Table(np.arange(count), np.ones(count), form, 0.0, 1.0)


def _is_sound(samples: Sequence[Sequence[Kernel]]) -> bool:
    """Was the machine quiet enough? Every smaller network is to take less time than the whole one."""
    whole, *smaller = (sum(kernel.us for kernel in sample) for sample in samples)
    return all(one < whole for one in smaller)
