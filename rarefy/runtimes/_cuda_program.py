"""A network on one GPU for one shape: its steps once by themselves, then as one CUDA graph; or torch.compile in
float16, where that is the faster."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from rarefy.graph.interpreter import call, run
from rarefy.graph.lowering import to_integers, to_numbers
from rarefy.graph.macs import MACS
from rarefy.graph.nodes import Value, attribute, operator_name, share_copy
from rarefy.kernels.cuda.convolution.timing import Remembered, captured, microseconds
from rarefy.runtimes._cuda_islands import in_half, restored, stored
from rarefy.runtimes._cuda_steps import Steps

ROUNDS, CALLS = 5, 10  # of the whole network, in integers and in float16


class Integer:
    """A quantised graph in integers for one shape.

    taps: nodes by the names of rounded values, whose codes are answers too, behind the network's own.
    """

    def __init__(
        self, graph: fx.GraphModule, given: Sequence[Tensor], remembered: Remembered, taps: Sequence[fx.Node] = ()
    ):
        self.device = given[0].device
        (last,) = (node for node in graph.graph.nodes if node.op == "output")
        answers = [one for one in tree_leaves(last.args[0]) if isinstance(one, fx.Node)]
        self.answers = [*answers, *taps]
        self.steps = Steps(graph, self.answers, self.device, remembered)
        self.inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.stored = {
            node: _stored(graph, node, self.steps)
            for node in graph.graph.nodes
            if node.op == "get_attr" and any(node in step.reads for step in self.steps.steps)
        }
        self.left = Counter(source for step in self.steps.steps for source in step.reads)
        self.left.update(self.answers)
        self.places = [one.clone() for one in given]
        self.found: list[Tensor] = self.run(self.places)
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.run(self.places)
            torch.cuda.synchronize(self.device)
            self.graph = torch.cuda.CUDAGraph()
            self.found = []
            with captured(self.graph):
                self.found = self.run(self.places)
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def run(self, given: Sequence[Tensor], see: Callable[..., None] | None = None) -> list[Tensor]:
        """Step by step. see: is called with each step and what it reads."""
        live: dict[fx.Node, Value] = {**dict(zip(self.inputs, given, strict=True)), **self.stored}
        left = Counter(self.left)
        for step in self.steps.steps:
            values = [live[one] for one in step.reads]
            if see is not None:
                see(step, values)
            live.update(zip(step.yields, step.run(*values), strict=True))
            for source in step.reads:
                left[source] -= 1
                if not left[source]:
                    live.pop(source, None)
        return [self._answer(live, node) for node in self.answers]

    def _answer(self, live: dict[fx.Node, Value], node: fx.Node) -> Tensor:
        kept = self.steps.kept(node) if node.op == "call_function" else None
        value: Tensor = live[node]
        return value if kept is None else restored(value, *kept)

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """The answers, which the next call overwrites."""
        if self.graph is None:
            return self.run(given)
        for place, one in zip(self.places, given, strict=True):
            if place.data_ptr() != one.data_ptr():
                place.copy_(one)
        self.graph.replay()
        return self.found


def _stored(graph: fx.GraphModule, node: fx.Node, steps: Steps) -> Tensor:
    """A stored tensor; codes as kernels keep them."""
    kept = steps.kept(node)
    value: Tensor = attribute(graph, node)
    return value if kept is None else stored(value, kept[0])


class Half:
    """A network in float16 through torch.compile(mode="reduce-overhead"), channels last."""

    def __init__(self, graph: fx.GraphModule, given: Sequence[Tensor]):
        module = in_half(graph).to(given[0].device)
        if given[0].dim() == 4:
            module = module.to(memory_format=torch.channels_last)
        self.compiled = torch.compile(module, mode="reduce-overhead", dynamic=False)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                self(*given)

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """The answers, which the next call overwrites."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return [one.float() if one.is_floating_point() else one for one in tree_leaves(self.compiled(*given))]


Program = Integer | Half


def integers_of(graph: fx.GraphModule) -> fx.GraphModule:
    """The form that steps are made of, sharing its tensors."""
    return to_integers(to_numbers(share_copy(graph)))


def faster(integer: Integer, half: Half, given: Sequence[Tensor]) -> tuple[str, dict[str, float]]:
    """ "int8" or "float16", and the milliseconds of both, which took turns.

    Half precision is not taken where its answers are none (it ends at 65,504).
    """
    ours, theirs = integer(*given), half(*given)
    sound = all(bool(torch.isfinite(one).all()) for one in theirs) or not all(
        bool(torch.isfinite(one).all()) for one in ours
    )
    times: dict[str, list[float]] = {"int8": [], "float16": []}
    for _ in range(ROUNDS):
        for name, program in (("int8", integer), ("float16", half)):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            program(*given)
            begun.record()
            for _ in range(CALLS):
                program(*given)
            ended.record()
            ended.synchronize()
            times[name].append(begun.elapsed_time(ended) / CALLS)
    ms = {name: sorted(some)[ROUNDS // 2] for name, some in times.items()}
    return ("float16" if sound and ms["float16"] < ms["int8"] else "int8"), ms


def step_times(program: Integer) -> list[tuple[str, str, list[list[int]], float]]:
    """Of each step: name, what it is, the sizes of what it reads and makes, microseconds."""
    found: list[tuple[str, str, list[list[int]], float]] = []

    def timed(step: Value, values: Sequence[Value]) -> None:
        us = microseconds(functools.partial(step.run, *values))
        made = step.run(*values)
        shapes = [list(one.shape) for one in (*values, *made) if isinstance(one, Tensor)]
        node = step.yields[0]
        found.append((node.name, step.where if step.where == "float" else str(node.target), shapes, us))

    program.run(program.places, timed)
    return found


def float_times(graph: fx.GraphModule, given: Sequence[Tensor]) -> list[tuple[str, str, list[list[int]], float]]:
    """The same of what multiplies in a float network, in float16, operator by operator."""
    found: list[tuple[str, str, list[list[int]], float]] = []
    half = in_half(graph).to(given[0].device)

    def timed(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
        value = call(node, live)
        name = operator_name(node)
        if name in MACS:
            us = microseconds(functools.partial(call, node, dict(live)))
            reads = [live[source] for source in node.all_input_nodes]
            found.append((node.name, name, [list(one.shape) for one in (*reads, value)], us))
        return value

    run(half, given, instead=timed)
    return found
