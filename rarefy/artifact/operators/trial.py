"""A graph from a file is tried on an example without numbers before anything runs it with some.

What an operator reads and makes follows from shapes, and they are known without running: the graph is walked as
``graph.shapes`` walks it, a few milliseconds for a ResNet-50. Refused is what does not run (lengths that do not fit are
told by torch's own rules), what would hold more memory than ``MOST_HELD`` and ``MULTIPLE`` times all that it is given,
also inside of an operator (the columns of a convolution, the scores of attention), and what breaks a rule of aten.txt
that needs shapes or types. Sizes of a computed number are bounded by what can be known of it: its bits.

The example has two samples, as everywhere. What a graph takes for more of them may grow faster than they do (products
of all with all): ``samples_within`` tries it on as many as are asked for, before they are run.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from rarefy.artifact.allowlist import FUNCTIONS, rules_of
from rarefy.artifact.operators.rules import RULES
from rarefy.errors import FormatError, RarefyError, first_line
from rarefy.graph.interpreter import steps
from rarefy.graph.nodes import Value, arguments
from rarefy.graph.shapes import fake_of, remembered, shape_of, walk
from rarefy.system.memory import HELD, afford
from rarefy.system.quiet import quiet

# Bytes that a graph may hold at once for two samples: so many whatever it is given, and so many for each byte it is.
MOST_HELD = 2**28
MULTIPLE = 256
GROWTH = 1.5  # times what two samples take of each more, within which memory still counts as growing as they do
MOST_AXES = 16
# Operators on shapes of their own, each of which takes torch up to a millisecond: DenseNet-201 has some hundreds.
MOST_KINDS = 2000
# Tensors that operators are given, and those in lists that they yield.
MOST_PIECES = 2**17
# Bits of a whole number that is computed from sizes; multiplying numbers adds theirs.
MOST_BITS = 2**16

_META = re.compile(r"\bmeta\b", re.IGNORECASE)  # the device, in what torch says


def check(graph: fx.GraphModule, where: str) -> None:
    """Raises FormatError for a graph that does not run on two samples of its own inputs, or asks for too much."""
    _check_numbers(graph, where)
    given = [*_inputs(graph, 2), *graph.parameters(), *graph.buffers()]
    _tried(graph, where, 2, max(MOST_HELD, MULTIPLE * sum(_bytes(one) for one in given)))


def samples_within(graph: fx.GraphModule, count: int, most: int = HELD) -> int:
    """How many of ``count`` samples may be run at once: what they hold is at most ``most`` bytes, or grows as they do;
    one at the least. Raises InputError where that takes more memory than is free."""
    try:
        pair = _tried(graph, "", 2, math.inf)
        while (held := _tried(graph, "", count, math.inf)) > max(most, GROWTH * pair * count / 2) and count > 1:
            count = (count + 1) // 2
    except FormatError:  # not with so many: what runs it says why
        return count
    afford(held, f"a run of the graph on {count} of its inputs", "take a smaller model, or end other programs")
    return count


def check_affordable(graph: fx.GraphModule, samples: int) -> None:
    """Raises InputError where a run of so many samples takes more memory than is free."""
    with contextlib.suppress(FormatError):
        held = _tried(graph, "", samples, math.inf)
        afford(held, f"a run of the graph on {samples} of its inputs", "pass a smaller batch, or end other programs")


def _tried(graph: fx.GraphModule, where: str, samples: int, most: float) -> int:
    """The most bytes that are held at once for so many samples, without the weights. Raises FormatError."""
    trial = _Trial(graph, where, most)
    with torch.no_grad():
        try:
            trial.run(walk(graph, _inputs(graph, samples), trial.compute(shape_of)))
        except _NeedsNumbers:
            trial.highest = 0
            mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)  # which run on real zeros
            with quiet("torch._subclasses.fake_tensor"), mode:
                examples = [torch.empty_like(one, device="cpu") for one in _inputs(graph, samples)]  # fake: no memory
                live = dict(zip(graph.graph.find_nodes(op="placeholder"), examples))
                trial.run(steps(graph, list(graph.graph.nodes)[:-1], live, trial.compute(fake_of)))
    return trial.highest


def _inputs(graph: fx.GraphModule, samples: int) -> list[Tensor]:
    return [
        torch.empty((samples, *spec["shape"]), dtype=getattr(torch, spec["dtype"]), device="meta")
        for spec in graph.meta["inputs"]
    ]


class _NeedsNumbers(Exception):
    """An operator can't be run on the meta device; torch's fake tensors know more of them, and take longer."""


class _Trial:
    """most: bytes that may be held at once. highest: that were, with what operators take inside."""

    def __init__(self, graph: fx.GraphModule, where: str, most: float):
        self.graph, self.where, self.most = graph, where, most
        self.last = {source: node for node in graph.graph.nodes for source in node.all_input_nodes}
        self.highest, self.inside = 0, 0  # inside: of the operator that runs
        self.kinds = 0  # of operators and shapes that were asked
        self.pieces = 0

    def compute(self, ask: Callable[[fx.Node, Mapping[fx.Node, Value]], Value]) -> Callable[..., Value]:
        """A rule for the interpreter: what ``ask`` says of a node, once its arguments keep the rules."""
        asked = remembered(lambda node, live: ask(self._counted(node), live))

        def rule(node: fx.Node, live: Mapping[fx.Node, Value]) -> Value:
            try:
                self._check_pieces(node, live)
                self._check_arguments(node, live)
                return asked(node, live)
            except FormatError:
                raise
            except Exception as error:
                if ask is shape_of and (isinstance(error, NotImplementedError) or _META.search(str(error))):
                    raise _NeedsNumbers from error
                said = str(error) if isinstance(error, RarefyError) else first_line(error)
                raise self._refusal(node, f"does not run on an example of the graph's inputs ({said})") from error

        return rule

    def _counted(self, node: fx.Node) -> fx.Node:
        self.kinds += isinstance(node.target, torch._ops.OpOverload)
        if self.kinds > MOST_KINDS:
            raise self._refusal(node, f"is too large a network: over {MOST_KINDS} operators on shapes of their own")
        return node

    def _check_pieces(self, node: fx.Node, live: Mapping[fx.Node, Value]) -> None:
        """Of the lists of tensors that it reads, which are gone through each time."""
        if isinstance(node.target, torch._ops.OpOverload):
            lists = (live[one] for one in node.all_input_nodes)
            self._add_pieces(
                node, len(node.all_input_nodes) + sum(len(one) for one in lists if isinstance(one, (list, tuple)))
            )

    def _add_pieces(self, node: fx.Node, count: int) -> None:
        self.pieces += count
        if self.pieces > MOST_PIECES:
            raise self._refusal(node, f"is too large a network: its lists hold over {MOST_PIECES} tensors together")

    def run(self, values: Iterable[tuple[fx.Node, Value]]) -> None:
        """Adds up what is held while the nodes run, one after the other."""
        held, sizes = 0, dict.fromkeys(self.graph.graph.nodes, 0)
        gone: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in self.last.items():
            gone.setdefault(reader, []).append(node)
        for node, value in values:
            sizes[node] = 0 if node.op == "get_attr" else self._size(node, value)
            held += sizes[node]
            self._hold(node, held)
            self.highest, self.inside = max(self.highest, held + self.inside), 0
            held -= sum(sizes.pop(source) for source in gone.get(node, ()))

    def _hold(self, node: fx.Node, count: int, what: str = "") -> None:
        if count > self.most:
            raise self._refusal(node, f"{what}needs {count} bytes for two samples (at most {self.most})")

    def _size(self, node: fx.Node, value: Value) -> int:
        found = value if isinstance(value, (list, tuple)) else [value]
        if len(found) > 1:
            self._add_pieces(node, len(found))
        if any(isinstance(one, Tensor) and one.dim() > MOST_AXES for one in found):
            raise self._refusal(node, f"yields a tensor of more than {MOST_AXES} axes")
        return sum(_bytes(one) for one in found)

    def _check_arguments(self, node: fx.Node, live: Mapping[fx.Node, Value]) -> None:
        for name, rule in rules_of(node.target).items():
            if rule not in RULES:
                continue
            given = arguments(node)
            values = fx.node.map_arg(given, live.__getitem__)
            found = RULES[rule](values, given, name)
            if isinstance(found, str):
                raise self._refusal(node, f"{name} {found}")
            self.inside = found
            self._hold(node, found, f"{name} ")  # before the operator is asked for its output

    def _refusal(self, node: fx.Node, what: str) -> FormatError:
        return FormatError(f"{self.where}: node {node.name}: {node.target} {what}")


def _bytes(value: Value) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


_NAME_OF = {function: name for name, (function, _) in FUNCTIONS.items()}


def _check_numbers(graph: fx.GraphModule, where: str) -> None:
    """Whole numbers of Python have no end: what is multiplied again and again takes all memory there is."""
    bits: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        name = _NAME_OF.get(node.target, "") if node.op == "call_function" else ""
        sizes = [bits.get(one, 64) if isinstance(one, fx.Node) else _bits(one) for one in node.args] or [0]
        if name == "operator.mul":
            bits[node] = sum(sizes)
        elif name == "operator.pow":
            bits[node] = sizes[0] * max(1, math.ceil(abs(node.args[1])))
        elif name in ("math.ceil", "math.floor", "math.trunc", "torch.sym_int"):
            bits[node] = max(1024, *sizes)  # of the largest float
        elif name:
            bits[node] = max(sizes) + 1
        if bits.get(node, 0) > MOST_BITS:
            raise FormatError(f"{where}: node {node.name}: {name} makes a number of more than {MOST_BITS} bits")


def _bits(value: Value) -> int:
    return value.bit_length() if type(value) is int else 64
