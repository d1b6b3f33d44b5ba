"""What each layer costs on the runtime, in integers and in float: the table of the integer program of mixed precision (``rarefy.quantization.mixed_precision``).

The network is exported whole in float and whole in integers, and the runtime tells the time of each kernel in the caches as it finds them there. A kernel is a layer's by what
it is (``LAYERS``) and by how many numbers it reads and makes, in the order of the network; where the runtime made other sizes of some (padded channels), by the order alone. All that is
no layer (activations, sums, layout changes, rounding) counts with the layer before it. The two files then take turns, and the integer kernels are scaled to the ratio of their
times, since a machine's speed drifts between profiles.

What is assumed: a layer takes as long whatever its neighbours are. It does not: between a layer in float and one in integers numbers are converted. So what a choice promises is measured
(``share``), and the caller corrects its goal by what was missed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from rarefy import plugins
from rarefy.deployment import latency
from rarefy.deployment.runtime import Kernel
from rarefy.errors import InputError
from rarefy.graph.layers import layer_name, weighted
from rarefy.graph.nodes import example_inputs, share_copy
from rarefy.graph.shapes import shapes
from rarefy.quantization import formats, latency_gate, qdq
from rarefy.quantization.calibration.minmax import MinMax
from rarefy.quantization.observers import observe
from rarefy.quantization.placement import place

LAYERS = (
    "Conv",
    "FusedConv",
    "Gemm",
    "MatMul",
    "FusedGemm",
    "FusedMatMul",
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
)


class LayerTimes:
    """``graph``: float, folded. ignore: globs of what stays float. All times with a batch of one."""

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: Sequence[fx.Node],
        batch: tuple[Tensor, ...],
        ignore: Sequence[str],
        runtime: Any,
        grid: formats.Grid,
    ):
        self.runtime, self.grid, self.ignore = latency.with_threads(runtime), grid, ignore
        self.graph = share_copy(graph)
        for node in self.graph.graph.nodes:
            if weighted(node):
                qdq.own_bias(self.graph, node)
        placement = place(self.graph, self.runtime.capabilities, ignore)
        seen = observe(self.graph, placement.values, [batch])
        self.ranges = {}
        for value in placement.values:
            own = qdq.grid_of(placement, value, grid)
            lo, hi = MinMax().activation_range(seen.histograms[value], own)
            self.ranges[value.name] = qdq.clipped(placement, value, min(lo, 0.0), max(hi, 0.0), own)
        self.example = example_inputs(self.graph, batch=1)[0]
        sizes = shapes(self.graph)
        twins = {node.name: node for node in self.graph.graph.nodes}
        self.sizes = [
            tuple(_one(sizes[twin]) for twin in (twins[node.name].args[0], twins[node.name])) for node in layers
        ]
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            files = [self._export(Path(folder), None), self._export(Path(folder), ())]
            kernels = [self._kernels(file) for file in files]
            whole, integer = [layer_times(run, self.sizes, layers) for run in kernels]
            ratio = self._ratio(*files)
        self.whole_us = sum(whole)
        scale = self.whole_us / ratio / sum(integer)
        self.float_us, self.integer_us = whole, [scale * us for us in integer]

    def share(self, floats: Sequence[fx.Node]) -> float:
        """Measured: the time of the network with these layers in float, in shares of that of the float network."""
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            names = [layer_name(node) for node in floats]
            return 1 / self._ratio(self._export(Path(folder), None), self._export(Path(folder), names))

    def _export(self, folder: Path, floats: Sequence[str] | None) -> Path:
        """floats: layers in float beside ``ignore``; None: all."""
        made = (
            self.graph
            if floats is None
            else latency_gate.rounded(self.graph, self.ranges, [*self.ignore, *floats], self.runtime, self.grid)
        )
        name = "float" if floats is None else "integer"
        exported: Path = self.runtime.export(made, folder / f"{name}{self.runtime.suffix}")
        return exported

    def _kernels(self, file: Path) -> list[Kernel]:
        if not self.runtime.capabilities.has_kernel_times:
            raise InputError(
                f"mixed: latency: {plugins.describe(self.runtime)} can't tell the time of each of its kernels; "
                "give bits=, size= or bitops="
            )
        return self.runtime.kernel_times(file, self.example)

    def _ratio(self, whole: Path, other: Path) -> float:
        """How many times as fast ``other`` is, taking turns."""
        for _ in range(3):
            found = latency.timed({"float": whole, "other": other}, self.example, runtime=self.runtime, warmup=5)
            ratio = found["other"]["speedup"]["float"]
            if latency.is_calm(ratio):
                return ratio["median"]
        raise InputError(
            "mixed: latency: no measurement could be trusted, other processes use the processor; run it again when it is free, or give bits=, size= or bitops="
        )


def _one(value: Any) -> int:
    """Numbers of one sample."""
    return math.prod(value.shape[1:])


def layer_times(kernels: Sequence[Kernel], sizes: Sequence[tuple[int, ...]], layers: Sequence[fx.Node]) -> list[float]:
    """Microseconds of each layer, with all that is none and comes after it. kernels: (name, operator, shapes, us) in the order of a run."""
    own = [index for index, (_, operator, *_) in enumerate(kernels) if operator in LAYERS]
    place: dict[int, int] = {}  # kernel -> layer
    for size in set(sizes):
        ours = [index for index, other in enumerate(sizes) if other == size]
        theirs = [index for index in own if (math.prod(kernels[index][2][0]), math.prod(kernels[index][2][-1])) == size]
        if len(ours) == len(theirs):
            place |= dict(zip(theirs, ours, strict=True))
    left = [index for index in range(len(layers)) if index not in place.values()]
    open_to = [index for index in own if index not in place]
    if left and len(left) != len(open_to):
        raise InputError(
            f"mixed: latency: {layer_name(layers[left[0]])}: its kernel is not to be told from others in the runtime's profile; give bits=, size= or bitops="
        )
    place |= dict(zip(open_to, left, strict=True)) if left else {}
    times = [0.0] * len(layers)
    at = place[min(place)]
    for index, (*_, us) in enumerate(kernels):
        at = place.get(index, at)
        times[at] += us
    return times
