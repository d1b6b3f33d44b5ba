"""What a runtime is to the rest of rarefy: a table of what it can do, a file that it is given, a session that runs it.

A runtime is a frozen dataclass, one a file in ``rarefy/runtimes/``; its fields are its options. What one can't do is
said by its ``Capabilities`` and asked before it is tried: nobody calls ``kernel_times`` of a runtime that has none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, Protocol, Self, TypedDict

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from rarefy.errors import InputError
from rarefy.system.cpu import exact_int8

aten = torch.ops.aten

Operators = frozenset[OpOverload]
Inputs = Tensor | Sequence[Tensor]  # of a model: one tensor (N, ...), or several in the order of its inputs

PLANAR: Operators = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.linear.default})
LAYERS: Operators = PLANAR | {
    aten.conv1d.default, aten.conv1d.padding, aten.conv3d.default, aten.conv3d.padding,
}  # fmt: skip
# Choose among what they read, so that codes stay codes on their grid; of several results the first.
EXTREMES: Operators = frozenset(
    {
        aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.topk.default, aten.sort.default,
        aten.adaptive_max_pool2d.default,
    }
)  # fmt: skip
CARRIERS: Operators = EXTREMES | frozenset(
    {
        aten.max_pool2d.default, aten.max_pool3d.default, aten.view.default, aten.reshape.default,
        aten.flatten.using_ints, aten.permute.default,
        aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default,
        aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
    }
)  # fmt: skip
JOINS: Operators = frozenset(
    {
        aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default,
    }
)  # fmt: skip
CLIPS: Operators = frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default})
ACTIVATIONS: Operators = frozenset(
    {
        aten.hardswish.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.hardsigmoid.default,
        aten.tanh.default,
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a runtime can do: the operators that it runs in integers, and what may be asked of it beside running a file.

    layers: products with weights.
    joins: operators with a kernel on codes of several grids, whose result is rounded to another one.
    carriers: operators that move codes and change none.
    paddings: operators that put constants around codes.
    clips: operators that only narrow the range of what they read, so that rounding does their work.
    float_result: layers whose sums may stay float; others are rounded in any case.
    posts: operators that are computed within the layer before them.
    products: of two activations, whose sums stay float.
    centered: every grid is signed, with zero in the middle; such grids clip nothing, so ``clips`` has to be empty.
    residuals: what is added to a layer's sums is added before they are rounded.
    padded_zero: padding is with the code 0 and codes are signed: what a padded convolution of one group reads is on 7
        bits without a sign, or around zero.
    has_kernel_times: ``kernel_times`` tells the time of each kernel of a run.
    has_threads: its field ``threads`` is the number of threads of one operator.
    runs: rarefy opens and runs its files; else it writes them, and another runtime reads them.
    suffixes: how names of files may end that it writes when asked, beside its own ``suffix``.
    """

    layers: Operators = LAYERS
    joins: Operators = JOINS
    carriers: Operators = CARRIERS
    paddings: Operators = frozenset({aten.pad.default})
    clips: Operators = CLIPS
    float_result: Operators = LAYERS
    posts: Operators = frozenset()
    products: Operators = frozenset()
    centered: bool = False
    residuals: bool = False
    padded_zero: bool = False
    has_kernel_times: bool = False
    has_threads: bool = True
    runs: bool = True
    suffixes: tuple[str, ...] = ()

    @property
    def whole(self) -> Operators:
        """Operators that are not to be written in simpler ones.

        Those it knows by themselves, and attention, unless a product of it can be integer.
        """
        return self.posts if self.products else self.posts | {aten.scaled_dot_product_attention.default}


class Kernel(NamedTuple):
    """One kernel of a run.

    name: the same in files of other widths, if the runtime makes the same kernels of them.
    operator: as the runtime calls it. shapes: sizes of what it reads, then of what it makes. us: microseconds.
    """

    name: str
    operator: str
    shapes: list[list[int]]
    us: float


class Difference(TypedDict):
    """Of one rounded value, when both start from the file's own inputs of that layer.

    name: of the layer. value: of what is rounded. difference: the largest, in codes. share: of the codes that differ.
    """

    name: str
    value: str
    difference: int
    share: float


class Parity(TypedDict):
    """What a graph's answers and those of its file have in common.

    agreement: share of the inputs with equal most likely classes; of an output that is no (N, classes), and of each of
        several, with a squared difference of at most 1 % of its variance.
    samples: inputs compared. largest_difference: of all outputs. ulp: the largest difference of the layers, in codes.
    first_diverging_layer: the first by more than one code, which rounding a sum in another order can't explain. layers:
    each rounded value. passed: agreement of at least 99.5 % and no diverging layer. unread: values that the runtime
    gives in another shape (it moved a padding before them), which are not compared; only
        if there are any. evaluated: agreement with the graph as it is evaluated; only where the runtime rounds sums
        by a sequence of its own, by which the graph is then run here.
    version: of the runtime that read the file; only in a certificate.
    """

    agreement: float
    samples: int
    largest_difference: float
    ulp: int
    first_diverging_layer: str | None
    layers: list[Difference]
    passed: bool
    unread: NotRequired[list[str]]
    evaluated: NotRequired[float]
    version: NotRequired[str]


class Session(Protocol):
    """An opened file. threads: it runs with."""

    threads: int

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The first output, on the CPU; inputs: (N, ...) each, in the model's order."""

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs of the file."""


class Runtime(Protocol):
    """Where a compressed model runs: how to write a file for it, open the file, and compare the file with the model."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""

    @property
    def threads(self) -> int:
        """Of one operator; 0: one a core."""

    @property
    def floats(self) -> tuple[Self, ...]:
        """Ways to run a float network: itself, and what is faster at a lower precision."""

    @property
    def weight_bits(self) -> int:
        """The most bits of a weight whose products add up exactly."""

    @property
    def suffix(self) -> str:
        """Of its files, the dot included."""

    @property
    def package(self) -> str:
        """What is imported for it, and whose version counts."""

    @property
    def decoded(self) -> bool:
        """Files are compared by the numbers that codes stand for, since reading the codes would change its kernels."""

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as one file. Raises InputError for a graph that it can't run."""

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, ready to run. Raises FormatError for a file that is none of its own."""

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and the file it was exported to.

        inputs: (N, ...) each, ``batch`` of which are run at once. on: the runtime that reads the file; None: this one.
        """

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """The kernels of one run in order, each with its median over the quiet runs of ``seconds``.

        Called only where ``capabilities.has_kernel_times``.
        """


def several(inputs: Inputs) -> tuple[Tensor, ...]:
    """As many as there are."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def in_batches(run: Callable[..., list[Tensor]], inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """What ``run``, which takes ``batch`` inputs at once and no other number, gives for (N, ...) inputs."""
    count = len(inputs[0])
    if count == batch:
        return run(*inputs)
    pieces = []
    for start in range(0, count, batch):
        given = [one[start : start + batch] for one in inputs]
        missing = batch - len(given[0])
        if missing:
            given = [torch.cat([one, one[-1:].expand(missing, *one.shape[1:])]) for one in given]
        pieces.append(run(*(one.contiguous() for one in given)))
    return [torch.cat(parts)[:count] for parts in zip(*pieces, strict=True)]


def check_threads(runtime: str, threads: int) -> None:
    """Raises InputError for a number of threads below 0, which stands for one a core."""
    if threads < 0:
        raise InputError(f"{runtime}: threads={threads} must be at least 1, or 0 for one a core")


def exact_weight_bits(vnni: bool | None) -> int:
    """Bits of a weight that keep an int8 product on a CPU exact.

    8, or 7 where sums of two products saturate at 16 bits (255 2^6 2 < 2^15). vnni: of the processor it is for; None:
    this one.
    """
    exact = exact_int8() if vnni is None else vnni
    return 7 if exact is False else 8
