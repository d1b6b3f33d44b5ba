"""What the rows of the table write with: nodes and constants of an ONNX model, and the shapes of the graph.

Every node is looked at with two batch sizes: a size that stays the same is written as a number, so that runtimes see
constant shapes and fuse across them, and a size that moves is computed from the input's.

A row is ``row(writer, node, arguments) -> name`` (or names, for an operator with several results); ``arguments`` are
the node's by the names of the operator's schema, defaults included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rarefy.artifact.coding.packing import pack
from rarefy.errors import InputError
from rarefy.graph.nodes import Value, is_tensor
from rarefy.graph.shapes import shapes

BATCHES = (3, 8)
LAST = 2**63 - 1
CONTRIB = "com.microsoft"

Arguments = dict[str, Value]
Message = Any  # of protobuf: a node, a tensor, a model
Shape = Sequence[int | None]  # None where a size moves with the batch


class Untranslated(InputError):
    """The table has no row for an operator, or none for this form of it."""


class Writer:
    """Collects ONNX nodes and constants.

    known, moved: what a node yields for the first of the two batch sizes, and for the other.
    names, lists: the tensor, or the tensors, that a node has become.
    taken: every name of the file, tensors' and nodes': each is asked of ``fresh``, so that none stands for two things.
    four_bits: codes of up to 4 bits may be stored two a byte.
    contrib: operators of ONNX Runtime's own (domain ``CONTRIB``) may be written.
    """

    def __init__(self, onnx: ModuleType, graph: fx.GraphModule, four_bits: bool = False, contrib: bool = False):
        self.onnx, self.graph, self.four_bits, self.contrib = onnx, graph, four_bits, contrib
        self.known, self.moved = (shapes(graph, batch) for batch in BATCHES)
        self.nodes: list[Message] = []
        self.initializers: dict[str, Tensor] = {}
        self.stores: dict[tuple[str, str], str] = {}
        self.in_4_bits: set[str] = set()
        self.names: dict[fx.Node, str] = {}
        self.lists: dict[fx.Node, list[str]] = {}
        self.constants: dict[tuple[object, ...], str] = {}
        self.taken: set[str] = set()
        self.current = ""

    def op(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        """Append a node; the name of its output."""
        return self.ops(kind, inputs, 1, **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], outputs: int, **attributes: object) -> list[str]:
        """Append a node; the names of its outputs."""
        name = self.fresh(f"{self.current}.{kind}")
        names = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def fresh(self, name: str) -> str:
        """A name that no tensor has yet."""
        free, count = name, 1
        while free in self.taken:
            free, count = f"{name}_{count}", count + 1
        self.taken.add(free)
        return free

    def stored(self, name: str, value: Tensor, form: str = "") -> str:
        """The initialiser of what the graph calls ``name``; its own name is that, or the next that is free.

        form: how it is written, where that is not as the graph has it ("transposed").
        """
        if (name, form) not in self.stores:
            free = self.stores[name, form] = self.fresh(f"{name}_{form}" if form else name)
            self.initializers[free] = value
        return self.stores[name, form]

    def stored_anew(self, name: str, value: Tensor) -> str:
        """An initialiser of the current node, by a name of its own."""
        free = self.fresh(f"{self.current}.{name}")
        self.initializers[free] = value
        return free

    def stored_in_4_bits(self, name: str, codes: Tensor, form: str) -> str:
        """As ``stored``, of codes of up to 4 bits, two a byte."""
        stored = self.stored(name, codes, form)
        self.in_4_bits.add(stored)
        return stored

    def initializer(self, name: str, into: Message) -> None:
        """As ONNX has it.

        into: an empty tensor of the model, which copies one that is put there (as ``make_graph`` and ``make_model`` do,
            once each).
        """
        tensor = self.initializers[name]
        kind, value = self.type_of(tensor.dtype), tensor
        if name in self.in_4_bits:
            kind = self.onnx.TensorProto.INT4 if tensor.dtype == torch.int8 else self.onnx.TensorProto.UINT4
            value = pack(tensor, 4)
        into.name, into.data_type = name, kind
        into.raw_data = value.detach().cpu().contiguous().numpy().tobytes()
        into.dims.extend(tensor.shape)

    def constant(self, value: object, dtype: torch.dtype = torch.int64) -> str:
        """A number or a list of them, as a tensor of that type."""
        tensor = torch.tensor(value, dtype=dtype)
        key = (dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist()))
        if key not in self.constants:
            self.constants[key] = self.fresh(f"constant_{len(self.constants)}")
            self.initializers[self.constants[key]] = tensor
        return self.constants[key]

    def value(self, argument: Value, dtype: torch.dtype | None = None) -> str:
        """The name of a node's tensor, or of a number as a scalar; cast to ``dtype`` if it has another."""
        if not isinstance(argument, fx.Node):
            return self.constant(argument, dtype or (torch.float32 if isinstance(argument, float) else torch.int64))
        known = self.known[argument]
        if not is_tensor(known):
            if isinstance(known, (int, float)) and self.moved[argument] == known:
                return self.constant(known, dtype or torch.int64)
            name = self.op("Squeeze", [self.names[argument], self.constant([0])])
            return name if dtype in (None, torch.int64) else self.cast(name, dtype)
        name = self.names[argument]
        return name if dtype is None or known.dtype == dtype else self.cast(name, dtype)

    def values(self, *arguments: Value) -> list[str]:
        """Those of them that are not None."""
        return [self.value(argument) for argument in arguments if argument is not None]

    def cast(self, name: str, dtype: torch.dtype | None) -> str:
        """``name`` as another type."""
        return self.op("Cast", [name], to=self.type_of(dtype))

    def type_of(self, dtype: torch.dtype | None) -> int:
        """ONNX's number of a type."""
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)))

    def dtype(self, node: fx.Node) -> torch.dtype:
        """Of what the node yields."""
        dtype: torch.dtype = self.known[node].dtype
        return dtype

    def shape(self, node: fx.Node) -> list[int | None]:
        """None where a size moves with the batch."""
        return static(self.known[node], self.moved[node])

    def same_shape(self, one: fx.Node, other: fx.Node) -> bool:
        """For both batch sizes."""
        known, moved = self.known, self.moved
        return bool(known[one].shape == known[other].shape and moved[one].shape == moved[other].shape)

    def rank(self, node: fx.Node) -> int:
        """Number of axes."""
        return len(self.known[node].shape)

    def fixed(self, node: fx.Node, axis: int) -> int:
        """A size that may not move."""
        size = self.shape(node)[axis]
        if size is None:
            raise Untranslated(f"{node.name}: its size moves with the batch")
        return size

    def plane(self, node: fx.Node) -> list[int]:
        """Sizes of the axes behind batch and channels, which may not move."""
        return [self.fixed(node, axis) for axis in range(2, self.rank(node))]

    def plain(self, value: Value) -> Value:
        """A size argument as a number; None where it moves."""
        if not isinstance(value, fx.Node):
            return value
        return self.known[value] if self.known[value] == self.moved[value] else None

    def vector(self, sizes: Sequence[Value]) -> str:
        """Sizes, some of which may move, as one int64 tensor."""
        plain = [self.plain(size) for size in sizes]
        if None not in plain:
            return self.constant(plain)
        parts = [self.names[size] if one is None else self.constant([one]) for size, one in zip(sizes, plain)]
        return self.op("Concat", parts, axis=0)

    def size_of(self, source: fx.Node, axis: int) -> str:
        """The size of an axis, as a tensor of one element."""
        size, axis = self.shape(source)[axis], axis % self.rank(source)
        return (
            self.constant([size])
            if size is not None
            else self.op("Shape", [self.names[source]], start=axis, end=axis + 1)
        )

    def scaled(self, name: str, factor: Value, dtype: torch.dtype) -> str:
        """Times a number, which may be 1."""
        return name if factor == 1 else self.op("Mul", [name, self.constant(factor, dtype)])

    def reshaped(self, name: str, shape: Shape, sizes: Sequence[Value] = ()) -> str:
        """``name`` in that shape; ``sizes`` are what to read the moving ones from, if there are several."""
        if list(shape).count(None) <= 1:
            wanted = self.constant([-1 if size is None else size for size in shape])
            return self.op("Reshape", [name, wanted], allowzero=0)
        if len(sizes) != len(shape):
            raise Untranslated(f"{self.current}: several sizes move with the batch")
        return self.op("Reshape", [name, self.vector(sizes)], allowzero=0)

    def transposed(self, name: str, order: Sequence[int]) -> str:
        """``name`` with its axes in that order."""
        return name if list(order) == list(range(len(order))) else self.op("Transpose", [name], perm=list(order))

    def sliced(self, name: str, axis: int, start: Value, end: Value, step: int = 1) -> str:
        """A part of an axis."""
        start, end = self.vector([start]), self.vector([end])
        return self.op("Slice", [name, start, end, self.constant([axis]), self.constant([step])])

    def interleaved(self, name: str, shape: Shape, axis: int, times: int) -> str:
        """``name``, which has that shape, with each position of an axis ``times`` in a row."""
        apart = self.op("Unsqueeze", [name, self.constant([axis + 1])])
        repeats = [times if dim == axis + 1 else 1 for dim in range(len(shape) + 1)]
        repeated = self.op("Expand", [apart, self.constant(repeats)])
        sizes = [size if dim != axis or size is None else size * times for dim, size in enumerate(shape)]
        return self.reshaped(repeated, sizes)


Row = Callable[[Writer, fx.Node, Arguments], str | list[str]]


def static(one: Tensor, two: Tensor) -> list[int | None]:
    """The sizes of a value for two batch sizes as one shape."""
    return [int(a) if a == b else None for a, b in zip(one.shape, two.shape, strict=True)]


def listed(value: Value, length: int) -> list[Value]:
    """A list of that length: the value itself, or a number for all axes."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * length if len(values) == 1 else values
