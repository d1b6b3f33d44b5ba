"""What each layer costs on the runtime, in integers and in float: the table of mixed precision's integer program.

The network is exported whole in float and whole in integers, and the runtime tells the time of each kernel in the
caches as it finds them there. A kernel is a layer's by what it is (``LAYERS``) and by how many numbers it reads and
makes, in the order of the network; where the runtime made other sizes of some (padded channels), by the order alone.
All that is no layer (activations, sums, layout changes, rounding) counts with the layer before it. The two files then
take turns, and the integer kernels are scaled to the ratio of their times, since a machine's speed drifts between
profiles.

What is assumed: a layer takes as long whatever its neighbours are. It does not: between a layer in float and one in
integers numbers are converted. So what a choice promises is measured (``share``), and the caller corrects its goal by
what was missed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, fx

from rarefy import plugins
from rarefy.deployment import latency
from rarefy.deployment.runtime import Kernel, Runtime
from rarefy.errors import InputError
from rarefy.graph.layers import layer_name, weighted
from rarefy.graph.nodes import example_inputs, is_tensor, share_copy
from rarefy.graph.shapes import shapes
from rarefy.quantization import formats, latency_gate, qdq
from rarefy.quantization.observers import observe
from rarefy.quantization.placement import place

LAYERS = frozenset(
    "Conv FusedConv Gemm MatMul FusedGemm FusedMatMul QLinearConv QGemm QLinearMatMul MatMulInteger".split()
)


class LayerTimes:
    """float_us, integer_us: of each layer. whole_us: of the float network. All with a batch of one."""

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: Sequence[fx.Node],
        batch: tuple[Tensor, ...],
        ignore: Sequence[str],
        runtime: Runtime | str,
        grid: formats.Grid,
    ) -> None:
        """graph: float, folded. batch: images that tell how large values get. ignore: globs of what stays float.

        Raises InputError where the runtime can't tell, or nothing that it tells can be trusted.
        """
        self.runtime, self.grid, self.ignore = latency.with_threads(runtime), grid, ignore
        self.graph = share_copy(graph)
        for node in self.graph.graph.nodes:
            if weighted(node):
                qdq.own_bias(self.graph, node)
        placement = place(self.graph, self.runtime.capabilities, ignore)
        seen = observe(self.graph, placement.values, [batch])
        grids = {value: qdq.grid_of(placement, value, grid) for value in placement.values}
        ranges = qdq.ranges(placement, seen.histograms, plugins.resolve("calibration", "minmax"), grids)
        self.ranges = {value.name: span for value, span in ranges.items()}
        self.example = example_inputs(self.graph, batch=1)[0]
        numbers = {
            node.name: math.prod(value.shape[1:]) for node, value in shapes(self.graph).items() if is_tensor(value)
        }
        sizes = [(numbers[node.all_input_nodes[0].name], numbers[node.name]) for node in layers]
        with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
            files = [self._export(Path(folder), None), self._export(Path(folder), ())]
            whole, integer = (layer_times(self._kernels(file), sizes, layers) for file in files)
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
        if floats is None:
            return self.runtime.export(self.graph, folder / f"float{self.runtime.suffix}")
        integer = latency_gate.rounded(self.graph, self.ranges, [*self.ignore, *floats], self.runtime, self.grid)
        return self.runtime.export(integer, folder / f"integer{self.runtime.suffix}")

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
            "mixed: latency: no measurement could be trusted, other processes use the processor; "
            "run it again when it is free, or give bits=, size= or bitops="
        )


def layer_times(kernels: Sequence[Kernel], sizes: Sequence[tuple[int, ...]], layers: Sequence[fx.Node]) -> list[float]:
    """Microseconds of each layer, with all that is none and comes after it.

    kernels: in the order of a run. sizes: how many numbers each layer reads and makes.
    """
    multiply = [index for index, (_, operator, *_) in enumerate(kernels) if operator in LAYERS]
    place: dict[int, int] = {}  # kernel -> layer
    for size in set(sizes):
        ours = [index for index, other in enumerate(sizes) if other == size]
        theirs = [
            index for index in multiply if (math.prod(kernels[index][2][0]), math.prod(kernels[index][2][-1])) == size
        ]
        if len(ours) == len(theirs):
            place |= dict(zip(theirs, ours, strict=True))
    left = [index for index in range(len(layers)) if index not in place.values()]
    open_to = [index for index in multiply if index not in place]
    if left and len(left) != len(open_to):
        raise InputError(
            f"mixed: latency: {layer_name(layers[left[0]])}: its kernel is not to be told from others in the runtime's "
            "profile; give bits=, size= or bitops="
        )
    place |= dict(zip(open_to, left, strict=True)) if left else {}
    times = [0.0] * len(layers)
    at = place[min(place)]
    for index, (*_, us) in enumerate(kernels):
        at = place.get(index, at)
        times[at] += us
    return times
