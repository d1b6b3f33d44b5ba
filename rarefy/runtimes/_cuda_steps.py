"""A quantised graph as steps for CUDA: layers with all that follows them in one kernel, pooling, sums, movers of codes,
and islands of everything else.

    quantize(act(conv2d(...) + dequantize(r)))     one step; conv2d_codes(...) likewise
    quantize(view(dequantize(q)))                  the codes move, where the grid is the same
    conv2d(quantize(picture))                      the stem rounds the picture itself

Codes are kept as int8, unsigned ones that reach beyond 127 less 128; pictures lie with their channels last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import argument, arguments, attribute
from rarefy.kernels import makes_codes
from rarefy.kernels.cuda.convolution import pooling
from rarefy.kernels.cuda.convolution.join import join
from rarefy.kernels.cuda.convolution.timing import Remembered
from rarefy.runtimes._cuda_codes import MOVERS, Codes, Step, carried, constant_pad, lined, planes
from rarefy.runtimes._cuda_islands import island
from rarefy.runtimes._cuda_layers import CODED, SUMS, Fused, Layers

aten = torch.ops.aten
RAREFY = torch.ops.rarefy


class Steps:
    """The steps of ``graph``, its layers integer, its tensors on the device; for the values of ``wanted``."""

    def __init__(self, graph: fx.GraphModule, wanted: Sequence[fx.Node], device: torch.device, remembered: Remembered):
        self.graph, self.device, codes = graph, device, Codes(graph)
        self.codes, self.kept, self.grid, self.number = codes, codes.kept, codes.grid, codes.number
        self.layers = Layers(codes, remembered)
        self.made: dict[fx.Node, Step] = {}
        for node in graph.graph.nodes:
            if node.op == "call_function" and (step := self._step(node)) is not None:
                self.made[node] = step
        self.wanted = list(wanted)
        self.steps = self._ordered()

    # --------------------------------------------------------------------------------------------------------- steps

    def _step(self, node: fx.Node) -> Step | None:
        """None for what goes into an island."""
        if makes_codes(node) and self.kept(node) is None:
            return None
        if node.target in SUMS or node.target in CODED:
            return self.layers.step(Fused(node, node))
        if node.target is RAREFY.quantize.default and argument(node, "axis") is None:
            fused = self.layers.fused(node)
            return self._moved(node) if fused is None else self.layers.step(fused)
        if node.target in (RAREFY.add.default, RAREFY.mul.default):
            return self._join(node)
        if node.target is RAREFY.mean.default and self.kept(argument(node, "x")) is not None:
            return self._mean(node)
        if node.target is aten.pad.default and self.kept(node) is not None and constant_pad(node) is not None:
            return self._pad(node)
        return None

    def _moved(self, node: fx.Node) -> Step | None:
        """Rounding what was decoded from the same grid and only moved."""
        movers, source = [], argument(node, "x")
        while source.target in MOVERS and not any(isinstance(one, fx.Node) for one in source.args[1:]):
            movers.append(source)
            source = source.args[0]
        if not is_decoded(source) or argument(source, "axis") is not None or argument(source, "q").op == "get_attr":
            return None
        codes = argument(source, "q")
        same = all(
            torch.equal(attribute(self.graph, argument(source, name)), attribute(self.graph, argument(node, name)))
            for name in ("scale", "zero_point")
        )
        if not same or self.kept(codes) != self.kept(node):
            return None
        movers.reverse()

        def run(x: Tensor) -> list[Tensor]:
            for mover in movers:
                x = carried(mover, x)
            return [x]

        return Step((node,), (codes,), run)

    def _join(self, node: fx.Node) -> Step | None:
        given, multiply = arguments(node), node.target is RAREFY.mul.default
        sides = {name: self.kept(given[name]) for name in "ab"}
        if any(kept is None for kept in sides.values()):
            return None
        scales = {name: attribute(self.graph, given[f"{name}_scale"]) for name in "ab"}
        shifts = {name: kept[0] for name, kept in sides.items() if kept is not None}
        zeros = {name: int(self.number(given[f"{name}_zero_point"])) for name in "ab"}
        scale, out = attribute(self.graph, given["scale"]), self.kept(node)
        assert out is not None
        start = self.number(given["zero_point"])
        ends = (int(given["qmin"]), int(given["qmax"]))
        if multiply:
            factors = {"a": float(scales["a"] * scales["b"] / scale), "b": 0.0}
        else:
            factors = {name: float(scales[name] / scale) for name in "ab"}

        def run(a: Tensor, b: Tensor) -> list[Tensor]:
            first, other = ("a", "b") if a.numel() >= b.numel() else ("b", "a")
            given = {"a": a, "b": b}
            x, y = given[first], given[other]
            pair = (factors["a"], 0.0) if multiply else (factors[first], factors[other])
            wide = lined(x) if x.dim() == 4 else x.contiguous()
            narrow = y.reshape(1) if y.numel() == 1 else lined(y) if y.dim() == 4 else y.contiguous()
            if multiply:
                taken, offset = (zeros[first] - shifts[first], zeros[other] - shifts[other]), start
            else:  # zero points are taken off at once, as the operator does it: ties are frequent
                taken = (-shifts[first], -shifts[other])
                offset = start - _float32(pair[0] * zeros[first] + _float32(pair[1] * zeros[other]))
            joined = join(wide, narrow, multiply, taken, pair, offset, ends, out[0])
            return [planes(joined) if x.dim() == 4 else joined]

        return Step((node,), (given["a"], given["b"]), run) if self._joinable(node) else None

    def _joinable(self, node: fx.Node) -> bool:
        """Of equal shapes, one number, or one place of a picture: told when it runs, but for constants."""
        stored = [
            attribute(self.graph, one) for one in (argument(node, "a"), argument(node, "b")) if one.op == "get_attr"
        ]
        return all(one.numel() == 1 for one in stored)

    def _mean(self, node: fx.Node) -> Step:
        given, grid, kept = arguments(node), self.grid(node), self.kept(argument(node, "x"))
        assert kept is not None
        zero = int(self.number(given["x_zero_point"])) - kept[0]
        x_scale, scale = (attribute(self.graph, given[name]).cpu() for name in ("x_scale", "scale"))
        ends = (int(grid["qmin"]), int(grid["qmax"]))

        def run(x: Tensor) -> list[Tensor]:
            factor = float(x_scale / (scale * (x.shape[-1] * x.shape[-2])))
            return [planes(pooling.mean(lined(x), zero, factor, int(grid["zero"]), ends))]

        return Step((node,), (given["x"],), run)

    def _pad(self, node: fx.Node) -> Step | None:
        kept, around = self.kept(node), constant_pad(node)
        assert kept is not None and around is not None
        value = int(argument(node, "value") or 0) - kept[0]
        return Step((node,), (argument(node, "self"),), lambda x: [F.pad(x, around, value=value)])

    # ------------------------------------------------------------------------------------------------- what runs when

    def _ordered(self) -> list[Step]:
        """What the wanted values need; nodes that are no step, in islands as large as their order allows."""
        needed, level = self._needed(), dict[fx.Node, int]()
        for node in needed:
            inner = node not in self.made
            sources = self.made[node].reads if not inner else tuple(node.all_input_nodes)
            apart = [level[one] + (inner and one in self.made) for one in sources if one in level]
            level[node] = max(apart, default=0)
        steps: list[Step] = []
        for depth in range(max(level.values(), default=0) + 1):
            here = [node for node in needed if level[node] == depth]
            loose = [node for node in here if node not in self.made]
            if loose:
                steps.append(self._island(loose, needed))
            steps += [self.made[node] for node in here if node in self.made]
        return steps

    def _needed(self) -> list[fx.Node]:
        """In the graph's order."""
        wanted = set(self.wanted)
        order = [node for node in self.graph.graph.nodes if node.op == "call_function"]
        for node in reversed(order):
            if node in wanted:
                wanted.update(self.made[node].reads if node in self.made else node.all_input_nodes)
        return [node for node in order if node in wanted]

    def _island(self, nodes: list[fx.Node], needed: Sequence[fx.Node]) -> Step:
        inside = set(nodes)
        outer = [source for node in nodes for source in node.all_input_nodes if source not in inside]
        reads = tuple(dict.fromkeys(one for one in outer if one.op != "get_attr"))
        read_by_others = {source for node in needed if node not in inside for source in self._sources(node)}
        yields = tuple(node for node in nodes if node in read_by_others or node in self.wanted)
        kept = {node: kept for node in (*reads, *yields) if node.op != "placeholder" and (kept := self.kept(node))}
        run = island(self.graph, nodes, reads, yields, kept, self.device)
        return Step(yields, reads, run, "float")

    def _sources(self, node: fx.Node) -> Sequence[fx.Node]:
        return self.made[node].reads if node in self.made else node.all_input_nodes


def _float32(number: float) -> float:
    """Rounded once."""
    return float(torch.tensor(number, dtype=torch.float32))
