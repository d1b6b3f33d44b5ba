"""What the rows of the table write with: tensors, operators and constants of a TensorFlow Lite model.

A tensor there has a type and a grid (int8 with a scale and a zero point, or float32), and one operator is for both: ADD
adds codes or numbers by what it is given. A row therefore is written once. Where an operator reads decoded codes and
its result is rounded, ``value`` gives the codes themselves and ``compute`` makes codes on the grid of the rounding;
elsewhere both are numbers. What only moves values (``move``) keeps type and grid of what it reads.

Planes are kept channels last there, (N, H, W, C). A tensor knows its order (``last``), and is turned where an operator
needs it otherwise. Sizes are fixed: a file is for one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from rarefy.errors import InputError
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import Value, argument, attribute
from rarefy.graph.shapes import shapes
from rarefy.kernels import qparams

Arguments = dict[str, Value]
Foreign = Any  # an object of the schema
Array = NDArray[Any]
TO_LAST, TO_PLAIN = (0, 2, 3, 1), (0, 3, 1, 2)
SIGNED = 128  # what unsigned codes are lowered by


class Untranslated(InputError):
    """The table has no row for an operator, or none for this form of it."""


class Grid(NamedTuple):
    """scale, zero: of int8 codes."""

    scale: float
    zero: int


class Ref(NamedTuple):
    """A tensor of the file. place: among them. shape: as it is stored. last: (N, H, W, C) of (N, C, H, W)."""

    place: int
    shape: tuple[int, ...]
    dtype: str
    grid: Grid | None = None
    last: bool = False


class Writer:
    """Collects tensors and operators.

    known: what a node yields for the file's batch. refs, lists: the tensor, or tensors, that a node has become.
    wanted: the grid of what is computed now; None: numbers.
    """

    def __init__(self, schema: ModuleType, graph: fx.GraphModule, batch: int):
        self.schema, self.graph = schema, graph
        self.known = shapes(graph, batch)
        self.tensors: list[Foreign] = []
        self.operators: list[Foreign] = []
        self.buffers: list[bytes] = [b""]
        self.codes: dict[int, int] = {}  # builtin operator -> its place
        self.data: dict[int, Array] = {}
        self.refs: dict[fx.Node, Ref] = {}
        self.lists: dict[fx.Node, list[Ref]] = {}
        self.turned: dict[tuple[object, ...], Ref] = {}
        self.stored: dict[tuple[object, ...], Ref] = {}
        self.wanted: Grid | None = None
        self.name = ""

    def tensor(
        self, shape: Sequence[int], dtype: str = "float32", grid: Grid | None = None, last: bool = False, name: str = ""
    ) -> Ref:
        """A new tensor that an operator makes, or that the file is given."""
        one = self.schema.TensorT()
        one.shape, one.type, one.buffer = [int(size) for size in shape], self._type(dtype), 0
        one.name, one.hasRank = name or f"{self.name}.{len(self.tensors)}", True
        if grid is not None:
            one.quantization = self._quantization([grid.scale], [grid.zero], 0)
        self.tensors.append(one)
        return Ref(len(self.tensors) - 1, tuple(one.shape), dtype, grid, last)

    def constant(self, value: Array | Tensor, name: str = "", grid: Grid | None = None, last: bool = False) -> Ref:
        """A tensor of the file's own; the same numbers are stored once."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else np.ascontiguousarray(value)
        if array.dtype in (np.float64, np.float16):
            array = array.astype(np.float32)
        key = (array.tobytes(), array.shape, str(array.dtype), grid, last)
        if key not in self.stored:
            ref = self.tensor(array.shape, str(array.dtype), grid, last, name)
            self._fill(ref, array)
            self.stored[key] = ref
        return self.stored[key]

    def by_channel(self, codes: Array, scales: Array, axis: int, name: str) -> Ref:
        """Stored codes with a scale for each position of an axis (one for all of them is repeated), zero point 0."""
        ref = self.tensor(codes.shape, str(codes.dtype), None, False, name)
        self._fill(ref, codes)
        numbers = [float(scale) for scale in np.broadcast_to(scales, (codes.shape[axis],))]
        self.tensors[ref.place].quantization = self._quantization(numbers, [0] * len(numbers), axis)
        return ref

    def _fill(self, ref: Ref, array: Array) -> None:
        self.buffers.append(np.ascontiguousarray(array).tobytes())
        self.tensors[ref.place].buffer = len(self.buffers) - 1
        self.data[ref.place] = array

    def _quantization(self, scales: list[float], zeros: list[int], axis: int) -> Foreign:
        about = self.schema.QuantizationParametersT()
        about.scale, about.zeroPoint, about.quantizedDimension = scales, zeros, axis
        return about

    def _type(self, dtype: str) -> int:
        return int(getattr(self.schema.TensorType, dtype.upper()))

    # ---- operators

    def operator(self, kind: str, inputs: Sequence[Ref | None], output: Ref | list[Ref], **options: object) -> None:
        """Append one. options: of the schema's table for it, whose name is ``table``."""
        code = getattr(self.schema.BuiltinOperator, kind)
        one = self.schema.OperatorT()
        one.opcodeIndex = self.codes.setdefault(code, len(self.codes))
        one.inputs = [-1 if ref is None else ref.place for ref in inputs]
        one.outputs = [ref.place for ref in (output if isinstance(output, list) else [output])]
        if table := options.pop("table", None):
            one.builtinOptionsType = getattr(self.schema.BuiltinOptions, str(table))
            one.builtinOptions = getattr(self.schema, f"{table}T")()
            for name, value in options.items():
                setattr(one.builtinOptions, name, value)
        self.operators.append(one)

    def compute(
        self, kind: str, inputs: Sequence[Ref | None], shape: Sequence[int], last: bool = False, **options: Any
    ) -> Ref:
        """The result of an operator: codes on the wanted grid, else numbers."""
        output = self.tensor(shape, "float32" if self.wanted is None else "int8", self.wanted, last)
        self.operator(kind, inputs, output, **options)
        return output

    def move(
        self, kind: str, source: Ref, more: Sequence[Ref], shape: Sequence[int], last: bool = False, **options: object
    ) -> Ref:
        """The result of an operator that changes no value: of the type and on the grid of what it reads."""
        output = self.tensor(shape, source.dtype, source.grid, last)
        self.operator(kind, [source, *more], output, **options)
        return output

    # ---- values of the graph

    def value(self, node: Value) -> Ref:
        """What a node yields: codes where it decodes some and codes are wanted, else numbers; a number as a scalar."""
        if not isinstance(node, fx.Node):
            return self.constant(np.asarray(node, dtype=np.float32))
        if is_decoded(node) and node not in self.refs:
            return self.decoded(node)
        if node.op == "get_attr" and node not in self.refs:
            self.refs[node] = self.constant(attribute(self.graph, node), str(node.target))
        if node not in self.refs and isinstance(known := self.known[node], (int, float)):
            return self.constant(np.asarray(known, dtype=np.float32))
        return self.refs[node]

    def decoded(self, node: fx.Node) -> Ref:
        """Of a node that decodes: codes where codes are wanted, else numbers."""
        source, step, offset = (argument(node, name) for name in ("q", "scale", "zero_point"))
        if source.op == "get_attr":
            numbers: Tensor = node.target(  # type: ignore[operator]
                *(attribute(self.graph, one) if isinstance(one, fx.Node) else one for one in node.args)
            )
            codes, scale = attribute(self.graph, source), attribute(self.graph, step)
            if self.wanted is None or scale.dim() or codes.dtype not in (torch.int8, torch.uint8):
                return self.constant(numbers)
            grid = self.grid_of(scale, attribute(self.graph, offset))
            return self.constant(lowered(codes), str(source.target), grid)
        ref = self.refs[source]
        grid = self.grid_of(attribute(self.graph, step), attribute(self.graph, offset))
        if ref.grid != grid:  # the same codes, read on another grid
            key = (ref.place, grid)
            if key not in self.turned:
                sizes = self.constant(np.array(ref.shape, np.int32))
                self.turned[key] = read = self.tensor(ref.shape, "int8", grid, ref.last)
                self.operator("RESHAPE", [ref, sizes], read, table="ReshapeOptions", newShape=list(ref.shape))
            ref = self.turned[key]
        return self.numbers(ref) if self.wanted is None else ref

    def numbers(self, ref: Ref) -> Ref:
        """What codes stand for."""
        decoding = (ref.place, "numbers")
        if decoding not in self.turned:
            self.turned[decoding] = self.tensor(ref.shape, "float32", None, ref.last)
            self.operator("DEQUANTIZE", [ref], self.turned[decoding], table="DequantizeOptions")
        return self.turned[decoding]

    def grid_of(self, scale: Tensor, zero: Tensor) -> Grid:
        """Of activations. Raises Untranslated for several scales."""
        if scale.dim():
            raise Untranslated(f"{self.name}: activations with several scales")
        return Grid(float(scale), int(zero) - (SIGNED if zero.dtype == torch.uint8 else 0))

    def grid(self, node: fx.Node) -> Grid:
        """That a node makes codes on."""
        scale, zero, *_ = qparams(node)
        return self.grid_of(attribute(self.graph, scale), attribute(self.graph, zero))

    def rounded(self, ref: Ref, grid: Grid) -> Ref:
        """Codes of numbers, or of other codes, on that grid: by way of numbers, as LiteRT's own step is inexact."""
        if ref.grid == grid:
            return ref
        if ref.grid is not None and ref.grid.scale != grid.scale:
            ref = self.numbers(ref)
        output = self.tensor(ref.shape, "int8", grid, ref.last)
        self.operator("QUANTIZE", [ref], output, table="QuantizeOptions")
        return output

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """As the graph has it."""
        return tuple(int(size) for size in self.known[node].shape)

    def transposed(self, ref: Ref, order: Sequence[int], last: bool) -> Ref:
        """``ref`` with its axes in that order: of a constant, in the store."""
        if ref.place in self.data:
            return self.constant(self.data[ref.place].transpose(order), "", ref.grid, last)
        key = (ref.place, tuple(order), last)
        if key not in self.turned:
            shape = [ref.shape[axis] for axis in order]
            kept = [axis for axis in order if ref.shape[axis] > 1]
            if kept == sorted(kept):  # only axes of one place move
                self.turned[key] = self.reshaped(ref, shape, last)
            else:
                wanted = self.constant(np.array(order, np.int32))
                self.turned[key] = self.move("TRANSPOSE", ref, [wanted], shape, last, table="TransposeOptions")
        return self.turned[key]

    def channels_last(self, ref: Ref) -> Ref:
        """(N, H, W, C) of a plane."""
        return ref if ref.last else self.transposed(ref, TO_LAST, True)

    def plain(self, ref: Ref) -> Ref:
        """In the order of the graph."""
        return self.transposed(ref, TO_PLAIN, False) if ref.last else ref

    def reshaped(self, ref: Ref, shape: Sequence[int], last: bool = False) -> Ref:
        """``ref``, whose numbers lie as they are, in that shape."""
        if tuple(shape) == ref.shape and last == ref.last:
            return ref
        if ref.place in self.data:
            return self.constant(self.data[ref.place].reshape(shape), "", ref.grid, last)
        sizes = self.constant(np.array(shape, np.int32))
        return self.move("RESHAPE", ref, [sizes], shape, last, table="ReshapeOptions", newShape=[int(n) for n in shape])


Row = Callable[[Writer, fx.Node, Arguments], Ref | list[Ref]]


def lowered(codes: Tensor) -> Tensor:
    """Unsigned codes as signed ones."""
    return (codes.to(torch.int16) - SIGNED).to(torch.int8) if codes.dtype == torch.uint8 else codes


def pair(value: Value) -> list[int]:
    """A number, or two, for both axes of a plane."""
    values = [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * 2 if len(values) == 1 else values
