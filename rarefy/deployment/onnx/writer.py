"""A graph as an ONNX model, by a table: one row an ATen operator.

torch's own exporter traces the graph again, decomposes it and translates what is left, 20 to 60 s for a MobileNetV3; the table takes one. Every node is
looked at with two batch sizes: a size that stays the same is written as a number, so that runtimes see constant shapes and fuse across them, and
a size that moves is computed from the input's. Constants are computed beforehand (``folding.fold_constants``).

A row is ``row(writer, node, arguments) -> name`` (or names, for an operator with several results); ``arguments`` are the node's by the names of the operator's schema,
defaults included. An operator without a row raises ``Untranslated``; ``runtimes`` then fall back to torch's exporter.

Given up: forms of an operator nobody uses in a network for inference (complex numbers, indexing by masks, sizes that depend on values).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.artifact.packing import pack
from rarefy.errors import InputError
from rarefy.graph.lowering import is_decoded
from rarefy.graph.nodes import attribute, is_tensor
from rarefy.graph.shapes import shapes

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy
OPSET, IR_VERSION = 20, 10
OPSET_OF_4_BITS = 21  # INT4, UINT4, and scales of blocks
_BLOCKS = (16, 32, 64, 128, 256)  # that runtimes have a product with codes of 4 bits for
_BATCHES = (3, 8)
_LAST = 2**63 - 1


class Untranslated(InputError):
    """The table has no row for an operator, or none for this form of it."""


class Writer:
    """Collects ONNX nodes and constants. ``known``: what a node yields for the first of two batch sizes; ``moved``: for the other."""

    def __init__(self, onnx: Any, graph: fx.GraphModule, four_bits: bool = False):
        self.onnx, self.graph, self.four_bits = onnx, graph, four_bits
        self.in_4_bits: set[str] = set()
        self.known, self.moved = (shapes(graph, batch) for batch in _BATCHES)
        self.nodes: list[Any] = []
        self.initializers: dict[str, Tensor] = {}
        self.names: dict[fx.Node, Any] = {}
        self.constants: dict[tuple[Any, ...], str] = {}
        self.taken: set[str] = set()
        self.current = ""

    def op(self, kind: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its output's name, or the list of them if several are asked for."""
        name = self.fresh(f"{self.current}.{kind}")
        names = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def fresh(self, name: str) -> str:
        made, count = name, 1
        while made in self.taken:
            made, count = f"{name}_{count}", count + 1
        self.taken.add(made)
        return made

    def stored(self, name: str, value: Tensor) -> str:
        """An initialiser of that name."""
        if name not in self.initializers:
            self.taken.add(name)
            self.initializers[name] = value
        return name

    def stored_in_4_bits(self, name: str, codes: Tensor) -> str:
        """An initialiser of codes of up to 4 bits, two a byte."""
        self.in_4_bits.add(name)
        return self.stored(name, codes)

    def initializer(self, name: str, into: Any) -> None:
        """As ONNX has it. into: an empty tensor of the model, which copies one that is put there (as ``make_graph`` and ``make_model`` do, once each)."""
        tensor = self.initializers[name]
        kind, value = self.type_of(tensor.dtype), tensor
        if name in self.in_4_bits:
            kind = self.onnx.TensorProto.INT4 if tensor.dtype == torch.int8 else self.onnx.TensorProto.UINT4
            value = pack(tensor, 4)
        into.name, into.data_type, into.raw_data = name, kind, _numpy(value).tobytes()
        into.dims.extend(tensor.shape)

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> str:
        """A number or a list of them, as a tensor of that type."""
        tensor = torch.tensor(value, dtype=dtype)
        key = (dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist()))
        if key not in self.constants:
            self.constants[key] = self.stored(self.fresh(f"constant_{len(self.constants)}"), tensor)
        return self.constants[key]

    def value(self, argument: Any, dtype: torch.dtype | None = None) -> str:
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

    def cast(self, name: str, dtype: torch.dtype) -> str:
        return str(self.op("Cast", [name], to=self.type_of(dtype)))

    def type_of(self, dtype: torch.dtype) -> int:
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(_numpy(torch.empty(0, dtype=dtype)).dtype)))

    def dtype(self, node: Any) -> torch.dtype:
        return self.known[node].dtype

    def shape(self, node: Any) -> list[int | None]:
        """None where a size moves with the batch."""
        return _static(self.known[node], self.moved[node])

    def rank(self, node: Any) -> int:
        return len(self.known[node].shape)

    def fixed(self, node: Any, axis: int, what: str = "size") -> int:
        """A size that may not move."""
        size = self.shape(node)[axis]
        if size is None:
            raise Untranslated(f"{node.name}: its {what} moves with the batch")
        return size

    def plain(self, value: Any) -> Any:
        """A size argument as a number; None where it moves."""
        if not isinstance(value, fx.Node):
            return value
        return self.known[value] if self.known[value] == self.moved[value] else None

    def vector(self, sizes: Sequence[Any]) -> str:
        """Sizes, some of which may move, as one int64 tensor."""
        plain = [self.plain(size) for size in sizes]
        if None not in plain:
            return self.constant(plain)
        parts = [
            self.names[size] if one is None else self.constant([one]) for size, one in zip(sizes, plain, strict=True)
        ]
        return str(self.op("Concat", parts, axis=0))

    def size_of(self, source: fx.Node, axis: int) -> str:
        """The size of an axis, as a tensor of one element."""
        size = self.shape(source)[axis]
        return (
            self.constant([size])
            if size is not None
            else str(
                self.op("Shape", [self.names[source]], start=axis % self.rank(source), end=axis % self.rank(source) + 1)
            )
        )

    def reshaped(self, name: str, shape: Sequence[int | None], sizes: Sequence[Any] = ()) -> str:
        """``name`` in that shape; ``sizes`` are what to read the moving ones from, if there are several."""
        if list(shape).count(None) <= 1:
            return str(
                self.op("Reshape", [name, self.constant([-1 if size is None else size for size in shape])], allowzero=0)
            )
        if len(sizes) != len(shape):
            raise Untranslated(f"{self.current}: several sizes move with the batch")
        return str(self.op("Reshape", [name, self.vector(sizes)], allowzero=0))

    def transposed(self, name: str, order: Sequence[int]) -> str:
        return name if list(order) == list(range(len(order))) else str(self.op("Transpose", [name], perm=list(order)))

    def sliced(self, name: str, axis: int, start: Any, end: Any, step: int = 1) -> str:
        return str(
            self.op(
                "Slice", [name, self.vector([start]), self.vector([end]), self.constant([axis]), self.constant([step])]
            )
        )


def onnx_model(onnx: Any, graph: fx.GraphModule, four_bits: bool = False) -> Any:
    """The ONNX model of ``graph`` (in eval mode, on the CPU, constants folded); ``four_bits``: as in ``onnxfile.write``. Raises Untranslated."""
    writer = Writer(onnx, graph, four_bits)
    helper = onnx.helper
    inputs: list[Any] = []
    outputs: list[Any] = []
    writer.taken |= {node.name for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        writer.current = node.name
        if node.op == "placeholder":
            writer.names[node] = node.name
            shape = ["batch", *writer.known[node].shape[1:]]
            inputs.append(helper.make_tensor_value_info(node.name, writer.type_of(writer.dtype(node)), shape))
        elif node.op == "get_attr":
            if isinstance(value := attribute(graph, node), Tensor):
                writer.names[node] = writer.stored(str(node.target), value)
        elif node.op == "call_function":
            _write(writer, node)
        elif node.op == "output":
            leaves = [
                leaf
                for leaf in pytree.tree_leaves(node.args[0])
                if isinstance(leaf, fx.Node) and is_tensor(writer.known[leaf])
            ]
            for leaf in leaves:
                name = writer.names[leaf]
                if any(name == info.name for info in [*inputs, *outputs]) or leaf.op == "get_attr":
                    name = writer.op("Identity", [name])
                sizes = zip(writer.known[leaf].shape, writer.moved[leaf].shape, strict=True)
                dims = [
                    one if one == two else "batch" if (one, two) == _BATCHES else f"{leaf.name}_{index}"
                    for index, (one, two) in enumerate(sizes)
                ]
                outputs.append(helper.make_tensor_value_info(name, writer.type_of(writer.dtype(leaf)), dims))
    read, nodes = {info.name for info in outputs}, []
    for made in reversed(writer.nodes):  # what nothing reads is left out
        if read.intersection(made.output):
            read.update(made.input)
            nodes.append(made)
    opset = OPSET_OF_4_BITS if read & writer.in_4_bits else OPSET
    model = helper.make_model(
        helper.make_graph(nodes[::-1], "main_graph", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
    )
    for name in writer.initializers:
        if name in read:
            writer.initializer(name, model.graph.initializer.add())
    return model


def _write(writer: Writer, node: fx.Node) -> None:
    known = writer.known[node]
    if isinstance(known, (int, float, bool)) and writer.moved[node] == known:
        return  # a number: its readers ask for it
    row = ROWS.get(node.target)
    if row is None:
        raise Untranslated(
            f"{node.meta.get('stack') or node.name}: {node.target} has no row in the table of ONNX operators"
        )
    begun = len(writer.nodes)
    made = row(writer, node, _arguments(node))
    if any(
        made in written.output for written in writer.nodes[begun:]
    ):  # named after the node, as its codes and weights are
        for written in writer.nodes[begun:]:
            for names in (written.input, written.output):
                names[:] = [node.name if name == made else name for name in names]
            if node.name in written.output:
                written.name = node.name
        made = node.name
    writer.names[node] = made


def _arguments(node: fx.Node) -> dict[str, Any]:
    """By the names of the operator's schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(index): value for index, value in enumerate(node.args)}
    found = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    found.update(zip(found, node.args, strict=False))
    found.update(node.kwargs)
    return found


def _static(one: Any, two: Any) -> list[int | None]:
    return [int(a) if a == b else None for a, b in zip(one.shape, two.shape, strict=True)]


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().contiguous().numpy()


def _listed(value: Any, length: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * length if len(values) == 1 else values


# --- arithmetic


def _unary(kind: str, **attributes: Any) -> Callable[..., str]:
    return lambda w, node, g: w.op(kind, [w.value(next(iter(g.values())), w.dtype(node))], **attributes)


def _binary(kind: str) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        if not is_tensor(w.known[node]):  # sizes
            return str(w.op(kind, [w.vector([g["0"]]), w.vector([g["1"]])]))
        one, two = (w.value(g[side], w.dtype(node)) for side in ("self", "other"))
        if g.get("alpha", 1) != 1:
            two = w.op("Mul", [two, w.constant(g["alpha"], w.dtype(node))])
        return str(w.op(kind, [one, two]))

    return row


def _reverse_subtract(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    one, two = (w.value(g[side], w.dtype(node)) for side in ("self", "other"))
    if g["alpha"] != 1:
        one = w.op("Mul", [one, w.constant(g["alpha"], w.dtype(node))])
    return str(w.op("Sub", [two, one]))


def _divide(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    dtype = w.dtype(node)
    name = str(w.op("Div", [w.value(g["self"], dtype), w.value(g["other"], dtype)]))
    mode = g.get("rounding_mode")
    if mode is None:
        return name
    if not dtype.is_floating_point:
        raise Untranslated(f"{node.name}: a division of integers, rounded")
    return str(w.op("Floor", [name])) if mode == "floor" else w.cast(w.cast(name, torch.int64), dtype)


def _compare(kind: str, negate: bool = False) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        sides = [w.known[value] if isinstance(value, fx.Node) else value for value in (g["self"], g["other"])]
        dtype = torch.result_type(
            *(torch.empty(side.shape, dtype=side.dtype) if is_tensor(side) else side for side in sides)
        )
        name = str(w.op(kind, [w.value(g["self"], dtype), w.value(g["other"], dtype)]))
        return str(w.op("Not", [name])) if negate else name

    return row


def _logical(kind: str) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        if w.dtype(node) != torch.bool:
            raise Untranslated(f"{node.name}: {node.target} on integers")
        return str(w.op(kind, [w.value(value, torch.bool) for value in g.values()]))

    return row


def _clip(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    lo, hi = (g.get(short, g.get(long)) for short, long in (("min", "min_val"), ("max", "max_val")))
    dtype = w.dtype(node)
    if isinstance(lo, fx.Node) or isinstance(hi, fx.Node):
        name = w.value(g["self"], dtype)
        name = name if lo is None else w.op("Max", [name, w.value(lo, dtype)])
        return name if hi is None else str(w.op("Min", [name, w.value(hi, dtype)]))
    bounds = ["" if value is None else w.constant(value, dtype) for value in (lo, hi)]
    return str(w.op("Clip", [w.value(g["self"], dtype), *bounds]))


def _relu6(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return _clip(w, node, {"self": g["self"], "min": 0.0, "max": 6.0})


def _silu(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    x = w.value(g["self"])
    return str(w.op("Mul", [x, w.op("Sigmoid", [x])]))


def _gelu(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Gelu", [w.value(g["self"])], approximate=g["approximate"]))


def _softplus(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    x = w.value(g["self"])
    if g["beta"] == 1:
        return str(w.op("Softplus", [x]))
    beta = w.constant(g["beta"], w.dtype(node))
    return str(w.op("Div", [w.op("Softplus", [w.op("Mul", [x, beta])]), beta]))


def _rsqrt(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Reciprocal", [w.op("Sqrt", [w.value(g["self"], w.dtype(node))])]))


def _power(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    dtype = w.dtype(node)
    base = w.value(g["self"], dtype)
    if g["exponent"] == 2:
        return str(w.op("Mul", [base, base]))
    if g["exponent"] == 0.5:
        return str(w.op("Sqrt", [base]))
    return str(w.op("Pow", [base, w.value(g["exponent"], dtype)]))


def _square(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Mul", [w.value(g["self"])] * 2))


def _prelu(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    slope = w.value(g["weight"])
    if w.rank(g["weight"]) == 1 and w.rank(node) > 2:
        slope = w.reshaped(slope, [w.fixed(g["weight"], 0), *[1] * (w.rank(node) - 2)])
    return str(w.op("PRelu", [w.value(g["self"]), slope]))


def _glu(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    one, two = w.op("Split", [w.value(g["self"])], 2, axis=g["dim"], num_outputs=2)
    return str(w.op("Mul", [one, w.op("Sigmoid", [two])]))


def _addcmul(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    product = w.op("Mul", [w.value(g["tensor1"]), w.value(g["tensor2"])])
    if g["value"] != 1:
        product = w.op("Mul", [product, w.constant(g["value"], w.dtype(node))])
    return str(w.op("Add", [w.value(g["self"]), product]))


def _lerp(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    start = w.value(g["self"])
    return str(
        w.op(
            "Add", [start, w.op("Mul", [w.op("Sub", [w.value(g["end"]), start]), w.value(g["weight"], w.dtype(node))])]
        )
    )


def _where(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(
        w.op(
            "Where",
            [
                w.value(g["condition"], torch.bool),
                w.value(g["self"], w.dtype(node)),
                w.value(g["other"], w.dtype(node)),
            ],
        )
    )


def _masked_fill(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Where", [w.value(g["mask"], torch.bool), w.value(g["value"], w.dtype(node)), w.value(g["self"])]))


def _convert(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return w.value(g["self"], w.dtype(node))


def _same(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return w.value(next(iter(g.values())))


# --- codes


def _quantize(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    axis = {} if g["axis"] is None else {"axis": g["axis"]}
    name = str(w.op("QuantizeLinear", [w.value(g["x"]), w.value(g["scale"]), w.value(g["zero_point"])], **axis))
    limits = torch.iinfo(g["dtype"])
    if (g["qmin"], g["qmax"]) == (limits.min, limits.max):
        return name
    return str(w.op("Clip", [name, w.constant(g["qmin"], g["dtype"]), w.constant(g["qmax"], g["dtype"])]))


def _dequantize(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    if w.rank(g["scale"]) > 1:
        return _dequantize_groups(w, node, g)
    axis = {} if g["axis"] is None or not w.rank(g["scale"]) else {"axis": g["axis"]}
    return str(w.op("DequantizeLinear", [w.value(g["q"]), w.value(g["scale"]), w.value(g["zero_point"])], **axis))


def _dequantize_groups(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    """Codes cut into groups, times their scales, put together: constants that a runtime computes when it opens the file."""
    codes, scale, zero = (attribute(w.graph, g[name]) for name in ("q", "scale", "zero_point"))
    (out, groups), name = scale.shape[:2], str(g["q"].target)
    missing = (
        groups * max(g["group"], 1) - codes.shape[1] if groups > 1 else 0
    )  # of the last group, which may be shorter
    cut = F.pad(codes, (*[0, 0] * (codes.dim() - 2), 0, missing)).reshape(out, groups, -1)
    number = str(w.op("Cast", [w.stored(f"{name}_grouped", cut)], to=1))
    if zero.any():
        number = str(
            w.op(
                "Sub", [number, w.stored(f"{g['zero_point'].target}_grouped", zero.float().reshape(*zero.shape[:2], 1))]
            )
        )
    number = str(w.op("Mul", [number, w.stored(f"{g['scale'].target}_grouped", scale.reshape(out, groups, 1))]))
    whole = str(w.op("Reshape", [number, w.constant([out, codes.shape[1] + missing, *codes.shape[2:]], torch.int64)]))
    return w.sliced(whole, 1, 0, codes.shape[1]) if missing else whole


# --- layers


def _convolution(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    kernel = [w.fixed(g["weight"], axis) for axis in range(2, w.rank(g["weight"]))]
    stride, dilation = (_listed(g[key], len(kernel)) for key in ("stride", "dilation"))
    if g["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [one // 2 for one in total] + [one - one // 2 for one in total]
    else:
        pads = _listed(0 if g["padding"] == "valid" else g["padding"], len(kernel)) * 2
    inputs = [w.value(g[key]) for key in ("input", "weight", "bias") if g[key] is not None]
    return str(
        w.op("Conv", inputs, kernel_shape=kernel, strides=stride, dilations=dilation, pads=pads, group=g["groups"])
    )  # fmt: skip


def _transposed_convolution(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    kernel = [w.fixed(g["weight"], axis) for axis in range(2, w.rank(g["weight"]))]
    stride, dilation, padding, more = (
        _listed(g[key], len(kernel)) for key in ("stride", "dilation", "padding", "output_padding")
    )
    inputs = [w.value(g[key]) for key in ("input", "weight", "bias") if g[key] is not None]
    return str(
        w.op(
            "ConvTranspose",
            inputs,
            kernel_shape=kernel,
            strides=stride,
            dilations=dilation,
            pads=padding * 2,
            output_padding=more,
            group=g["groups"],
        )
    )


def _linear(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    x = w.value(g["input"])
    if (weight := _weight_in_4_bits(w, node, g)) is not None:
        product = str(w.op("MatMul", [x, weight]))
        return product if g["bias"] is None else str(w.op("Add", [product, w.value(g["bias"])]))
    if w.rank(g["input"]) == 2:
        inputs = [w.value(g[key]) for key in ("weight", "bias") if g[key] is not None]
        return str(w.op("Gemm", [x, *inputs], transB=1))
    product = str(w.op("MatMul", [x, _turned(w, g["weight"])]))
    return product if g["bias"] is None else str(w.op("Add", [product, w.value(g["bias"])]))


def _weight_in_4_bits(w: Writer, node: fx.Node, g: dict[str, Any]) -> str | None:
    """The weight (in, out), decoded from codes of 4 bits and a scale for each block of inputs; None where a runtime has no product of floats with those.

    One scale an output is written as one for each of its blocks.
    """
    decoded = g["weight"]
    if not w.four_bits or not is_decoded(decoded) or is_decoded(g["input"]) or is_decoded(g["bias"]):
        return None
    codes, scale, zero, axis, group = (*decoded.args, 0)[:5]
    if (
        codes.op != "get_attr"
        or w.graph.meta.get("bits", {}).get(str(codes.target), 8) > 4
        or (not group and axis not in (0, None))
    ):
        return None
    stored, scales, zeros = (attribute(w.graph, source) for source in (codes, scale, zero))
    outs, ins = stored.shape
    block = group or next((size for size in _BLOCKS if size >= ins), _BLOCKS[-1])
    if block not in _BLOCKS:
        return None
    sizes = (outs, -(-ins // block))
    name = str(codes.target)
    inputs = [
        w.stored_in_4_bits(f"{name}_in_4_bits", stored.t()),
        w.stored(f"{name}_blocks", (scales if group else scales.reshape(-1, 1)).expand(sizes).t()),
    ]
    if zeros.any():
        inputs.append(
            w.stored_in_4_bits(
                f"{name}_zeros_in_4_bits",
                (zeros if group or not zeros.dim() else zeros.reshape(-1, 1)).expand(sizes).t(),
            )
        )
    return str(w.op("DequantizeLinear", inputs, axis=0, block_size=block))


def _turned(w: Writer, weight: fx.Node) -> str:
    """A matrix transposed: where it is stored, in the store."""
    if weight.op == "get_attr":
        return w.stored(f"{weight.target}_transposed", attribute(w.graph, weight).t())
    if (
        weight.target is OPERATORS.dequantize.default
        and weight.args[0].op == "get_attr"
        and weight.args[3] in (0, None)
    ):
        codes, scale, zero, _ = weight.args
        if w.rank(scale) <= 1:
            inputs = [
                w.stored(f"{codes.target}_transposed", attribute(w.graph, codes).t()),
                w.value(scale),
                w.value(zero),
            ]
            return str(w.op("DequantizeLinear", inputs, **({"axis": 1} if w.rank(scale) else {})))
    return str(w.op("Transpose", [w.value(weight)], perm=[1, 0]))


def _matmul(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("MatMul", [w.value(value) for value in g.values() if isinstance(value, fx.Node)]))


def _addmm(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    one, two = (g.get(key, g.get(other)) for key, other in (("mat1", "batch1"), ("mat2", "batch2")))
    product = w.op("MatMul", [w.value(one), w.value(two)])
    if g["alpha"] != 1:
        product = w.op("Mul", [product, w.constant(g["alpha"], w.dtype(node))])
    added = w.value(g["self"])
    if g["beta"] != 1:
        added = w.op("Mul", [added, w.constant(g["beta"], w.dtype(node))])
    return str(w.op("Add", [product, added]))


def _attention(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    query, key, value = (g[part] for part in ("query", "key", "value"))
    rank, dtype = w.rank(query), w.dtype(query)
    scale = g["scale"] if g["scale"] is not None else 1 / math.sqrt(w.fixed(query, -1))
    keys, values = w.value(key), w.value(value)
    if g["enable_gqa"] and w.fixed(query, 1) != w.fixed(key, 1):
        times = w.fixed(query, 1) // w.fixed(key, 1)
        keys, values = (
            _interleaved(w, one, w.shape(source), 1, times) for one, source in ((keys, key), (values, value))
        )
    turned = w.transposed(keys, [*range(rank - 2), rank - 1, rank - 2])
    scores = w.op("MatMul", [w.op("Mul", [w.value(query), w.constant(float(scale), dtype)]), turned])
    mask = g["attn_mask"]
    if g["is_causal"]:
        allowed = torch.ones(w.fixed(query, -2), w.fixed(key, -2)).tril() > 0
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -math.inf)
        scores = w.op("Add", [scores, w.stored(w.fresh(f"{node.name}.causal"), bias)])
    elif mask is not None:
        added = w.value(mask)
        if w.dtype(mask) == torch.bool:
            added = w.op("Where", [added, w.constant(0.0, dtype), w.constant(-math.inf, dtype)])
        scores = w.op("Add", [scores, added])
    return str(w.op("MatMul", [w.op("Softmax", [scores], axis=-1), values]))


def _interleaved(w: Writer, name: str, shape: Sequence[int | None], axis: int, times: int) -> str:
    """Each position of an axis ``times`` in a row."""
    apart = w.op("Unsqueeze", [name, w.constant([axis + 1])])
    wide = w.op("Expand", [apart, w.constant([times if dim == axis + 1 else 1 for dim in range(len(shape) + 1)])])
    return w.reshaped(
        str(wide), [size if dim != axis or size is None else size * times for dim, size in enumerate(shape)]
    )


def _batch_norm(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    if g["running_mean"] is None:
        raise Untranslated(f"{node.name}: batch norm with the statistics of the batch")
    mean = w.known[g["running_mean"]]
    neutral = {"weight": torch.ones(mean.shape, dtype=mean.dtype), "bias": torch.zeros(mean.shape, dtype=mean.dtype)}
    factors = [
        w.value(g[key]) if g[key] is not None else w.stored(w.fresh(f"{node.name}.{key}"), neutral[key])
        for key in neutral
    ]
    inputs = [w.value(g["input"]), *factors, w.value(g["running_mean"]), w.value(g["running_var"])]
    return str(w.op("BatchNormalization", inputs, epsilon=g["eps"]))


def _layer_norm(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    size, dtype = list(g["normalized_shape"]), w.dtype(node)
    weight = (
        w.value(g["weight"])
        if g["weight"] is not None
        else w.stored(w.fresh(f"{node.name}.weight"), torch.ones(size, dtype=dtype))
    )
    inputs = [w.value(g["input"]), weight, *([w.value(g["bias"])] if g["bias"] is not None else [])]
    return str(w.op("LayerNormalization", inputs, axis=-len(size), epsilon=g["eps"]))


def _rms_norm(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    x, dtype = w.value(g["input"]), w.dtype(node)
    axes = w.constant(list(range(-len(g["normalized_shape"]), 0)))
    eps = g["eps"] if g["eps"] is not None else torch.finfo(dtype).eps
    mean = w.op("ReduceMean", [w.op("Mul", [x, x]), axes], keepdims=1)
    name = str(w.op("Div", [x, w.op("Sqrt", [w.op("Add", [mean, w.constant(eps, dtype)])])]))
    return name if g["weight"] is None else str(w.op("Mul", [name, w.value(g["weight"])]))


def _group_norm(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    groups, dtype, shape = g["num_groups"], w.dtype(node), w.shape(node)
    ones, zeros = (
        w.stored(w.fresh(f"{node.name}.{key}"), make(groups, dtype=dtype))
        for key, make in (("1", torch.ones), ("0", torch.zeros))
    )
    apart = w.op("Reshape", [w.value(g["input"]), w.constant([0, groups, -1])], allowzero=0)
    name = w.reshaped(str(w.op("InstanceNormalization", [apart, ones, zeros], epsilon=g["eps"])), shape)
    for kind, factor in (("Mul", g["weight"]), ("Add", g["bias"])):
        if factor is not None:
            name = str(w.op(kind, [name, w.reshaped(w.value(factor), [w.fixed(factor, 0), *[1] * (len(shape) - 2)])]))
    return name


def _softmax(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Softmax", [w.value(g["self"], w.dtype(node))], axis=g["dim"]))


def _log_softmax(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("LogSoftmax", [w.value(g["self"], w.dtype(node))], axis=g["dim"]))


def _lstm(w: Writer, node: fx.Node, g: dict[str, Any]) -> list[str]:
    """Gates: torch's order is i f g o, ONNX's i o f g."""
    both, layers, parameters = g["bidirectional"], g["num_layers"], list(g["params"])
    directions = 2 if both else 1
    each = len(parameters) // (layers * directions)
    if any(not isinstance(one, fx.Node) or one.op != "get_attr" for one in parameters) or each not in (2, 4):
        raise Untranslated(f"{node.name}: an LSTM with computed weights or a projection")
    stored = [attribute(w.graph, one).detach() for one in parameters]
    hidden = stored[1].shape[1]

    def ordered(part: Tensor) -> Tensor:
        i, f, g, o = part.split(hidden)
        return torch.cat([i, o, f, g])

    x = w.value(g["input"])
    if g["batch_first"]:
        x = w.transposed(x, [1, 0, 2])
    first, cell = (w.value(one) for one in g["hx"])
    lasts: list[list[str]] = [[], []]
    for layer in range(layers):
        parts = [stored[(layer * directions + way) * each :][:each] for way in range(directions)]
        inputs = [torch.stack([ordered(part[index]) for part in parts]) for index in range(2)]
        names = [w.stored(w.fresh(f"{node.name}.{key}{layer}"), value) for key, value in zip("WR", inputs, strict=True)]
        bias = ""
        if each == 4:
            value = torch.stack([torch.cat([ordered(part[2]), ordered(part[3])]) for part in parts])
            bias = w.stored(w.fresh(f"{node.name}.B{layer}"), value)
        starts = [w.sliced(name, 0, layer * directions, (layer + 1) * directions) for name in (first, cell)]
        outputs = w.op(
            "LSTM", [x, *names, bias, "", *starts], 3, hidden_size=hidden, direction="bidirectional" if both else "forward"
        )  # fmt: skip
        turned = w.transposed(
            outputs[0], [0, 2, 1, 3]
        )  # (time, directions, batch, hidden) -> (time, batch, directions x hidden)
        x = str(w.op("Reshape", [turned, w.constant([0, 0, -1])], allowzero=0))
        for last, name in zip(lasts, outputs[1:], strict=True):
            last.append(name)
    answer = w.transposed(x, [1, 0, 2]) if g["batch_first"] else x
    return [answer, *(last[0] if layers == 1 else str(w.op("Concat", last, axis=0)) for last in lasts)]


# --- pooling and resizing


def _max_pool(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    kernel = _listed(g["kernel_size"], w.rank(node) - 2)
    stride = _listed(g["stride"] or kernel, len(kernel))
    padding, dilation = (_listed(g[key], len(kernel)) for key in ("padding", "dilation"))
    name = w.value(g["self"])
    return str(
        w.op(
            "MaxPool",
            [name],
            kernel_shape=kernel,
            strides=stride,
            pads=padding * 2,
            dilations=dilation,
            ceil_mode=int(g["ceil_mode"]),
        )
    )


def _average_pool(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    kernel = _listed(g["kernel_size"], w.rank(node) - 2)
    stride, padding = _listed(g["stride"] or kernel, len(kernel)), _listed(g["padding"], len(kernel))
    name = str(
        w.op(
            "AveragePool",
            [w.value(g["self"])],
            kernel_shape=kernel,
            strides=stride,
            pads=padding * 2,
            ceil_mode=int(g["ceil_mode"]),
            count_include_pad=int(g["count_include_pad"]) if any(padding) else 0,
        )
    )
    divisor = g.get("divisor_override")
    if divisor is None:
        return name
    if g["ceil_mode"] or (any(padding) and not g["count_include_pad"]):
        raise Untranslated(f"{node.name}: a divisor of its own with windows of several sizes")
    return str(w.op("Mul", [name, w.constant(math.prod(kernel) / divisor, w.dtype(node))]))


def _adaptive_average(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    """A mean over the plane, windows of one size, or, where windows differ, a product with the windows' weights along each axis."""
    source = g["self"]
    wanted = list(w.known[node].shape)[2:]
    sides = [w.fixed(source, axis) for axis in range(2, w.rank(source))]
    name = w.value(source)
    if wanted == sides:
        return name
    if all(size == 1 for size in wanted):
        return str(w.op("GlobalAveragePool", [name]))
    if all(side % size == 0 for side, size in zip(sides, wanted, strict=True)):
        kernel = [side // size for side, size in zip(sides, wanted, strict=True)]
        return str(w.op("AveragePool", [name], kernel_shape=kernel, strides=kernel))
    if len(sides) != 2:
        raise Untranslated(f"{node.name}: adaptive pooling of {len(sides)} axes with windows of several sizes")
    rows, columns = (_windows(side, size, w.dtype(node)) for side, size in zip(sides, wanted, strict=True))
    across = w.op("MatMul", [name, w.stored(w.fresh(f"{node.name}.columns"), columns.t())])
    return str(w.op("MatMul", [w.stored(w.fresh(f"{node.name}.rows"), rows), across]))


def _windows(side: int, size: int, dtype: torch.dtype) -> Tensor:
    """(size, side): what each input position counts in each window's mean."""
    starts = torch.arange(size) * side // size
    ends = -(-(torch.arange(size) + 1) * side // size)
    places = torch.arange(side)
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    return (inside / inside.sum(1, keepdim=True)).to(dtype)


def _adaptive_max(w: Writer, node: fx.Node, g: dict[str, Any]) -> list[str]:
    source = g["self"]
    wanted = list(w.known[node][0].shape)[2:]
    sides = [w.fixed(source, axis) for axis in range(2, w.rank(source))]
    if any(side % size for side, size in zip(sides, wanted, strict=True)):
        raise Untranslated(f"{node.name}: adaptive pooling with windows of several sizes")
    kernel = [side // size for side, size in zip(sides, wanted, strict=True)]
    return list(w.op("MaxPool", [w.value(source)], 2, kernel_shape=kernel, strides=kernel))


def _resize(mode: str, antialias: bool = False) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        source: fx.Node = g["input"] if "input" in g else g["self"]
        scales = [1.0, 1.0, *(_factor(w.fixed(source, axis), w.fixed(node, axis)) for axis in range(2, w.rank(node)))]
        aligned = g.get("align_corners")
        options: dict[str, Any] = {"mode": mode}
        if mode == "nearest":
            options |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        else:
            options["coordinate_transformation_mode"] = "align_corners" if aligned else "half_pixel"
            options |= {"cubic_coeff_a": -0.5 if antialias else -0.75} if mode == "cubic" else {}
            options |= {"antialias": 1} if antialias else {}
        return str(w.op("Resize", [w.value(source), "", w.constant(scales, torch.float32)], **options))

    return row


def _factor(side: int, size: int) -> float:
    """What ``side`` is multiplied by to give ``size`` when rounded down; a float32. (Between integer kernels ONNX Runtime loses sizes.)"""
    factor = np.float32(size / side)
    return float(factor if side * float(factor) >= size else np.nextafter(factor, np.float32(np.inf)))


def _grid_sample(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    modes, paddings = ("linear", "nearest", "cubic"), ("zeros", "border", "reflection")
    return str(
        w.op(
            "GridSample",
            [w.value(g["input"]), w.value(g["grid"])],
            mode=modes[g["interpolation_mode"]],
            padding_mode=paddings[g["padding_mode"]],
            align_corners=int(g["align_corners"]),
        )
    )


# --- reductions


def _reduce(kind: str) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        name, axes = w.value(g["self"], w.dtype(node)), _axes(w, g)
        if kind == "ReduceMean" and w.rank(g["self"]) == 4 and axes == [2, 3] and g["keepdim"]:
            return str(w.op("GlobalAveragePool", [name]))
        return str(w.op(kind, [name, w.constant(axes)], keepdims=int(g.get("keepdim", False))))

    return row


def _axes(w: Writer, g: dict[str, Any]) -> list[int]:
    dims, rank = g.get("dim"), w.rank(g["self"])
    dims = [dims] if isinstance(dims, int) else dims
    return sorted(dim % rank for dim in dims) if dims else list(range(rank))


def _extreme(kind: str) -> Callable[..., list[str]]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> list[str]:
        name, keep = w.value(g["self"]), int(g["keepdim"])
        return [
            w.op(f"Reduce{kind}", [name, w.constant([g["dim"]])], keepdims=keep),
            w.op(f"Arg{kind}", [name], axis=g["dim"], keepdims=keep),
        ]

    return row


def _place_of(kind: str) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        if g["dim"] is None:
            raise Untranslated(f"{node.name}: {node.target} over everything")
        return str(w.op(kind, [w.value(g["self"])], axis=g["dim"], keepdims=int(g["keepdim"])))

    return row


def _variance(root: bool) -> Callable[..., str]:
    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        axes, source, dtype = _axes(w, g), g["self"], w.dtype(node)
        name, over = w.value(source), w.constant(axes)
        count = math.prod(w.fixed(source, axis) for axis in axes)
        away = w.op("Sub", [name, w.op("ReduceMean", [name, over], keepdims=1)])
        sums = w.op("ReduceSum", [w.op("Mul", [away, away]), over], keepdims=int(g["keepdim"]))
        unbiased = g.get("correction", 1 if g.get("unbiased", True) else 0)
        answer = w.op("Div", [sums, w.constant(float(count - (1 if unbiased is None else unbiased)), dtype)])
        return str(w.op("Sqrt", [answer]) if root else answer)

    return row


def _vector_norm(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    order = g.get("ord", g.get("p", 2))
    if order not in (1, 2, None):
        raise Untranslated(f"{node.name}: a norm of order {order}")
    kind = "ReduceL1" if order == 1 else "ReduceL2"
    return str(w.op(kind, [w.value(g["self"]), w.constant(_axes(w, g))], keepdims=int(g["keepdim"])))


def _cumulative(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("CumSum", [w.value(g["self"], w.dtype(node)), w.constant(g["dim"])]))


def _top(w: Writer, node: fx.Node, g: dict[str, Any]) -> list[str]:
    return list(
        w.op(
            "TopK",
            [w.value(g["self"]), w.vector([g["k"]])],
            2,
            axis=g["dim"],
            largest=int(g["largest"]),
            sorted=int(g["sorted"]),
        )
    )


# --- shapes


def _reshape(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    source, shape = g["self"], w.shape(node)
    name = w.value(source)
    if w.known[source].shape == w.known[node].shape and w.moved[source].shape == w.moved[node].shape:
        return name
    return w.reshaped(name, shape, g.get("size", g.get("shape", ())))


def _permute(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    rank = w.rank(g["self"])
    return w.transposed(w.value(g["self"]), [dim % rank for dim in g["dims"]])


def _swap(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    rank = w.rank(g["self"])
    order = list(range(rank))
    one, two = (dim % rank for dim in (g.get("dim0", g.get("axis0", -1)), g.get("dim1", g.get("axis1", -2))))
    order[one], order[two] = order[two], order[one]
    return w.transposed(w.value(g["self"]), order)


def _reverse_axes(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return w.transposed(w.value(g["self"]), list(reversed(range(w.rank(g["self"])))))


def _move(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    rank = w.rank(g["self"])
    sources, targets = ([dim % rank for dim in _listed(g[key], 1)] for key in ("source", "destination"))
    rest = iter(dim for dim in range(rank) if dim not in sources)
    order = [sources[targets.index(dim)] if dim in targets else next(rest) for dim in range(rank)]
    return w.transposed(w.value(g["self"]), order)


def _expand(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    shape, source = w.shape(node), g["self"]
    if w.known[source].shape == w.known[node].shape and w.moved[source].shape == w.moved[node].shape:
        return w.value(source)
    sizes = list(g["size"]) if "size" in g else [None] * len(shape)
    parts: list[str] = []
    for axis, size in enumerate(shape):
        own = axis - len(shape) + w.rank(source)
        if own >= 0 and w.known[source].shape[own] != 1:
            parts.append(w.constant([1]))  # broadcasts
        elif size is not None:
            parts.append(w.constant([size]))
        elif isinstance(sizes[axis], fx.Node):
            parts.append(w.vector([sizes[axis]]))
        elif "other" in g:
            parts.append(w.size_of(g["other"], axis))
        else:
            raise Untranslated(f"{node.name}: a size that moves with the batch")
    plain = [w.initializers.get(part) for part in parts]
    if all(one is not None for one in plain):
        return str(w.op("Expand", [w.value(source), w.constant([int(one) for one in plain if one is not None])]))
    return str(w.op("Expand", [w.value(source), w.op("Concat", parts, axis=0)]))


def _repeat(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    times = list(g.get("repeats", g.get("dims")))
    name = w.value(g["self"])
    missing = len(times) - w.rank(g["self"])
    if missing > 0:
        name = w.op("Unsqueeze", [name, w.constant(list(range(missing)))])
    return str(w.op("Tile", [name, w.vector([1] * max(-missing, 0) + times)]))


def _repeat_each(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    if g["dim"] is None:
        raise Untranslated(f"{node.name}: repeat_interleave of everything")
    return _interleaved(w, w.value(g["self"]), w.shape(g["self"]), g["dim"] % w.rank(g["self"]), g["repeats"])


def _squeeze(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    rank, sizes = w.rank(g["self"]), list(w.known[g["self"]].shape)
    dims = range(rank) if g.get("dim") is None else [dim % rank for dim in _listed(g["dim"], 1)]
    gone = [dim for dim in dims if sizes[dim] == 1]
    return str(w.op("Squeeze", [w.value(g["self"]), w.constant(gone)])) if gone else w.value(g["self"])


def _unsqueeze(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Unsqueeze", [w.value(g["self"]), w.constant([g["dim"] % w.rank(node)])]))


def _concatenate(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    parts = [part for part in g["tensors"] if tuple(w.known[part].shape) != (0,)]
    return str(w.op("Concat", [w.value(part, w.dtype(node)) for part in parts], axis=g["dim"] % w.rank(node)))


def _stack(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    axis = g["dim"] % w.rank(node)
    return str(
        w.op("Concat", [w.op("Unsqueeze", [w.value(part), w.constant([axis])]) for part in g["tensors"]], axis=axis)
    )


def _split(w: Writer, node: fx.Node, g: dict[str, Any]) -> list[str]:
    axis = g["dim"] % w.rank(g["self"])
    sizes = [_static(one, two)[axis] for one, two in zip(w.known[node], w.moved[node], strict=True)]
    if None in sizes or len(w.known[node]) != len(w.moved[node]):
        raise Untranslated(f"{node.name}: splits an axis that moves with the batch")
    if len(sizes) == 1:
        return [w.value(g["self"])]
    return list(w.op("Split", [w.value(g["self"]), w.constant(sizes)], len(sizes), axis=axis))


def _unbind(w: Writer, node: fx.Node, g: dict[str, Any]) -> list[str]:
    axis = g["dim"] % w.rank(g["self"])
    name = w.value(g["self"])
    return [str(w.op("Gather", [name, w.constant(index)], axis=axis)) for index in range(w.fixed(g["self"], axis))]


def _item(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.names[g["0"]][g["1"]])


def _slice(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    axis = g["dim"] % w.rank(g["self"])
    start, end = 0 if g["start"] is None else g["start"], _LAST if g["end"] is None else g["end"]
    source = g["self"]
    if w.known[source].shape == w.known[node].shape and w.moved[source].shape == w.moved[node].shape:
        return w.value(source)
    return w.sliced(w.value(source), axis, start, end, g["step"])


def _narrow(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    start, length = (w.plain(g[key]) for key in ("start", "length"))
    if start is None or length is None:
        raise Untranslated(f"{node.name}: a part that moves with the batch")
    return w.sliced(w.value(g["self"]), g["dim"] % w.rank(g["self"]), start, start + length)


def _select(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    index = w.plain(g["index"])
    if index is None:
        raise Untranslated(f"{node.name}: a place that moves with the batch")
    return str(w.op("Gather", [w.value(g["self"]), w.constant(index)], axis=g["dim"] % w.rank(g["self"])))


def _roll(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    name, rank = w.value(g["self"]), w.rank(g["self"])
    if not g["dims"]:
        raise Untranslated(f"{node.name}: rolls everything as one axis")
    for shift, dim in zip(_listed(g["shifts"], 1), g["dims"], strict=True):
        size = w.fixed(g["self"], dim)
        if shift % size:
            cut = size - shift % size
            name = str(
                w.op(
                    "Concat",
                    [w.sliced(name, dim % rank, cut, _LAST), w.sliced(name, dim % rank, 0, cut)],
                    axis=dim % rank,
                )
            )
    return name


def _flip(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    name, rank = w.value(g["self"]), w.rank(g["self"])
    for dim in g["dims"]:
        name = w.sliced(name, dim % rank, -1, -_LAST, -1)
    return name


def _pad(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        g.get("mode", "constant")
    ]
    sizes = [w.plain(size) for size in g.get("pad", g.get("padding"))]
    if None in sizes:
        raise Untranslated(f"{node.name}: a margin that moves with the batch")
    rank = w.rank(node)
    before, after = [0] * rank, [0] * rank
    for index in range(len(sizes) // 2):
        before[rank - 1 - index], after[rank - 1 - index] = sizes[2 * index : 2 * index + 2]
    inputs = [w.value(g["self"]), w.constant(before + after)]
    if mode == "constant":
        inputs.append(w.constant(g.get("value") or 0, w.dtype(node)))
    return str(w.op("Pad", inputs, mode=mode))


def _reflection(mode: str) -> Callable[..., str]:
    return lambda w, node, g: _pad(w, node, {**g, "mode": mode})


def _index(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    """x[:, i, j]: the indexed axes, which must lie side by side, are one axis that is gathered from."""
    source, indices = g["self"], g["indices"]
    used = [axis for axis, one in enumerate(indices) if one is not None]
    shape, rank = w.shape(source), w.rank(source)
    if any(w.dtype(indices[axis]) not in (torch.int64, torch.int32) for axis in used) or used != list(
        range(used[0], used[-1] + 1)
    ):
        raise Untranslated(f"{node.name}: indexing by a mask, or of axes apart")
    name = w.value(source)
    if len(used) == 1:
        return str(w.op("Gather", [name, w.value(indices[used[0]])], axis=used[0]))
    sizes = [w.fixed(source, axis) for axis in used]
    place = ""
    for axis, size in zip(used, sizes, strict=True):
        one = w.value(indices[axis], torch.int64)
        one = w.op("Where", [w.op("Less", [one, w.constant(0)]), w.op("Add", [one, w.constant(size)]), one])
        place = one if not place else w.op("Add", [w.op("Mul", [place, w.constant(size)]), one])
    merged = [*shape[: used[0]], math.prod(sizes), *shape[used[-1] + 1 : rank]]
    return str(w.op("Gather", [w.reshaped(name, merged), place], axis=used[0]))


def _gather(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("GatherElements", [w.value(g["self"]), w.value(g.get("index", g.get("indices")))], axis=g["dim"]))


def _index_select(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Gather", [w.value(g["self"]), w.value(g["index"])], axis=g["dim"] % w.rank(g["self"])))


def _embedding(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Gather", [w.value(g["weight"]), w.value(g["indices"])], axis=0))


def _one_hot(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    if w.shape(node)[-1] is None or g["num_classes"] == -1:
        raise Untranslated(f"{node.name}: as many classes as the values say")
    return str(w.op("OneHot", [w.value(g["self"]), w.constant([w.fixed(node, -1)]), w.constant([0, 1])], axis=-1))


def _scatter(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    if not isinstance(g.get("src"), fx.Node):
        raise Untranslated(f"{node.name}: scatters a number")
    return str(w.op("ScatterElements", [w.value(g["self"]), w.value(g["index"]), w.value(g["src"])], axis=g["dim"]))


def _slice_scatter(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    """A part of an axis exchanged: what is before, the part, what is after."""
    base, axis = g["self"], g["dim"] % w.rank(g["self"])
    start, end = (w.plain(g[key]) if g[key] is not None else default for key, default in (("start", 0), ("end", _LAST)))
    size = w.shape(base)[axis]
    if w.known[base].shape == w.known[g["src"]].shape and w.moved[base].shape == w.moved[g["src"]].shape:
        return w.value(g["src"], w.dtype(node))
    if size is None or start is None or end is None or g["step"] != 1:
        raise Untranslated(f"{node.name}: writes to places that move with the batch, or lie apart")
    start, end, _ = slice(start, end).indices(size)
    return _exchanged(w, node, base, w.value(g["src"], w.dtype(node)), axis, start, end, size)


def _select_scatter(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    base, axis = g["self"], g["dim"] % w.rank(g["self"])
    size = w.fixed(base, axis)
    start = g["index"] % size
    part = str(w.op("Unsqueeze", [w.value(g["src"], w.dtype(node)), w.constant([axis])]))
    return _exchanged(w, node, base, part, axis, start, start + 1, size)


def _exchanged(w: Writer, node: fx.Node, base: fx.Node, part: str, axis: int, start: int, end: int, size: int) -> str:
    name = w.value(base)
    parts = [w.sliced(name, axis, 0, start)] if start > 0 else []
    parts.append(part)
    parts += [w.sliced(name, axis, end, size)] if end < size else []
    return str(w.op("Concat", parts, axis=axis)) if len(parts) > 1 else part


def _pixel_shuffle(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("DepthToSpace", [w.value(g["self"])], blocksize=g["upscale_factor"], mode="CRD"))


def _pixel_unshuffle(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    factor, shape = g["downscale_factor"], w.shape(g["self"])
    batch, channels, height, width = shape
    assert height is not None and width is not None
    apart = w.reshaped(w.value(g["self"]), [batch, channels, height // factor, factor, width // factor, factor])
    return w.reshaped(w.transposed(apart, [0, 1, 3, 5, 2, 4]), w.shape(node))


def _channel_shuffle(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    batch, channels, *plane = w.shape(g["self"])
    assert channels is not None
    apart = w.reshaped(w.value(g["self"]), [batch, g["groups"], channels // g["groups"], *plane])
    return w.reshaped(w.transposed(apart, [0, 2, 1, *range(3, 3 + len(plane))]), w.shape(node))


def _windowed(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    """x.unfold(axis, size, step): windows of an axis, their places in a new last one."""
    rank = w.rank(g["self"])
    axis = g["dimension"] % rank
    count = w.fixed(node, axis)
    places = torch.arange(count)[:, None] * g["step"] + torch.arange(g["size"])
    name = w.op("Gather", [w.value(g["self"]), w.constant(places.tolist())], axis=axis)
    return w.transposed(str(name), [dim for dim in range(rank + 1) if dim != axis + 1] + [axis + 1])


def _patches(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    """F.unfold: (n, c, h, w) -> (n, c kh kw, oh ow)."""
    source, name = g["self"], w.value(g["self"])
    if any(g["padding"]):
        high, wide = g["padding"]
        name = w.op("Pad", [name, w.constant([0, 0, high, wide] * 2), w.constant(0, w.dtype(node))])
    for axis, place in ((2, 0), (4, 1)):
        side = w.fixed(source, 2 + place) + 2 * g["padding"][place]
        kernel, dilation, stride = (g[key][place] for key in ("kernel_size", "dilation", "stride"))
        count = (side - dilation * (kernel - 1) - 1) // stride + 1
        places = torch.arange(kernel)[:, None] * dilation + torch.arange(count) * stride
        name = w.op("Gather", [name, w.constant(places.tolist())], axis=axis)
    return w.reshaped(w.transposed(str(name), [0, 1, 2, 4, 3, 5]), w.shape(node))


def _from_patches(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    sizes = [w.constant([w.plain(size) for size in g[key]]) for key in ("output_size", "kernel_size")]
    return str(
        w.op(
            "Col2Im",
            [w.value(g["self"]), *sizes],
            strides=list(g["stride"]),
            pads=list(g["padding"]) * 2,
            dilations=list(g["dilation"]),
        )
    )


def _einsum(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    return str(w.op("Einsum", [w.value(one) for one in g["tensors"]], equation=g["equation"]))


def _triangle(upper: int) -> Callable[..., str]:
    return lambda w, node, g: w.op("Trilu", [w.value(g["self"]), w.constant(g["diagonal"])], upper=upper)


def _filled(value: float | None) -> Callable[..., str]:
    """A tensor of one number; its sizes are the argument's, or those of the tensor it is to be like."""

    def row(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
        scalar = w.value(g.get("fill_value", g.get("value", value)), w.dtype(node))
        if "size" in g:
            return str(w.op("Expand", [scalar, w.vector(g["size"])]))
        return str(
            w.op(
                "Expand", [scalar, w.op("Concat", [w.size_of(g["self"], axis) for axis in range(w.rank(node))], axis=0)]
            )
        )

    return row


def _range(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    dtype = w.dtype(node)
    return str(
        w.op("Range", [w.value(g.get(key, default), dtype) for key, default in (("start", 0), ("end", 0), ("step", 1))])
    )


def _size(w: Writer, node: fx.Node, g: dict[str, Any]) -> str:
    axis = g["dim"] % w.rank(g["self"])
    return str(w.op("Shape", [w.value(g["self"])], start=axis, end=axis + 1))


def _rows(overloads: Iterable[Any], row: Any) -> dict[Any, Any]:
    return dict.fromkeys(overloads, row)


ROWS: dict[Any, Callable[[Writer, fx.Node, dict[str, Any]], Any]] = {
    **{
        getattr(aten, name).default: _unary(kind)
        for name, kind in {
            "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs", "neg": "Neg",
            "floor": "Floor", "ceil": "Ceil", "round": "Round", "erf": "Erf", "sin": "Sin", "cos": "Cos", "reciprocal": "Reciprocal", "sign": "Sign",
            "hardswish": "HardSwish", "mish": "Mish",
        }.items()
    },
    aten.hardsigmoid.default: _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.leaky_relu.default: lambda w, node, g: w.op("LeakyRelu", [w.value(g["self"])], alpha=g["negative_slope"]),
    aten.elu.default: lambda w, node, g: w.op("Elu", [w.value(g["self"])], alpha=g["alpha"]),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.rsqrt.default: _rsqrt,
    aten.square.default: _square,
    aten.prelu.default: _prelu,
    aten.glu.default: _glu,
    **_rows((aten.relu6.default,), _relu6),
    **_rows((aten.hardtanh.default, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default, aten.clip.default), _clip),
    **_rows((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar), _power),
    **_rows((aten.add.Tensor, aten.add.Scalar, operator.add), _binary("Add")),
    **_rows((aten.sub.Tensor, aten.sub.Scalar, operator.sub), _binary("Sub")),
    **_rows((aten.mul.Tensor, aten.mul.Scalar, operator.mul), _binary("Mul")),
    **_rows((aten.maximum.default, aten.max.other), _binary("Max")),
    **_rows((aten.minimum.default, aten.min.other), _binary("Min")),
    operator.floordiv: _binary("Div"),
    **_rows((aten.rsub.Scalar, aten.rsub.Tensor), _reverse_subtract),
    **_rows((aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode), _divide),
    **_rows((aten.eq.Scalar, aten.eq.Tensor), _compare("Equal")),
    **_rows((aten.ne.Scalar, aten.ne.Tensor), _compare("Equal", negate=True)),
    **_rows((aten.lt.Scalar, aten.lt.Tensor), _compare("Less")),
    **_rows((aten.gt.Scalar, aten.gt.Tensor), _compare("Greater")),
    **_rows((aten.le.Scalar, aten.le.Tensor), _compare("LessOrEqual")),
    **_rows((aten.ge.Scalar, aten.ge.Tensor), _compare("GreaterOrEqual")),
    **_rows((aten.logical_not.default, aten.bitwise_not.default), _logical("Not")),
    **_rows((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), _logical("And")),
    **_rows((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), _logical("Or")),
    aten.addcmul.default: _addcmul,
    **_rows((aten.lerp.Scalar, aten.lerp.Tensor), _lerp),
    **_rows((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where),
    **_rows((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **_rows((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default), _convert),
    **_rows(
        (
            aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default, aten.detach.default, aten.alias.default,
        ),
        _same,
    ),
    OPERATORS.quantize.default: _quantize,
    OPERATORS.dequantize.default: _dequantize,
    **_rows((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _convolution),
    **_rows((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _transposed_convolution),
    aten.linear.default: _linear,
    **_rows((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    **_rows((aten.addmm.default, aten.baddbmm.default), _addmm),
    aten.scaled_dot_product_attention.default: _attention,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten.lstm.input: _lstm,
    **_rows((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), _max_pool),
    **_rows((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), _average_pool),
    **_rows((aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default), _adaptive_average),
    aten.adaptive_max_pool2d.default: _adaptive_max,
    **_rows((aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.upsample_nearest1d.vec), _resize("nearest")),
    **_rows((aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default, aten.upsample_linear1d.vec), _resize("linear")),
    **_rows((aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default), _resize("cubic")),
    **_rows((aten._upsample_bilinear2d_aa.vec, aten._upsample_bilinear2d_aa.default), _resize("linear", antialias=True)),
    **_rows((aten._upsample_bicubic2d_aa.vec, aten._upsample_bicubic2d_aa.default), _resize("cubic", antialias=True)),
    **_rows((aten.grid_sampler.default, aten.grid_sampler_2d.default), _grid_sample),
    **_rows((aten.mean.dim, aten.mean.default), _reduce("ReduceMean")),
    **_rows((aten.sum.dim_IntList, aten.sum.default), _reduce("ReduceSum")),
    **_rows((aten.amax.default, aten.max.default), _reduce("ReduceMax")),
    **_rows((aten.amin.default, aten.min.default), _reduce("ReduceMin")),
    aten.prod.dim_int: _reduce("ReduceProd"),
    aten.logsumexp.default: _reduce("ReduceLogSumExp"),
    aten.max.dim: _extreme("Max"),
    aten.min.dim: _extreme("Min"),
    aten.argmax.default: _place_of("ArgMax"),
    aten.argmin.default: _place_of("ArgMin"),
    **_rows((aten.var.correction, aten.var.dim), _variance(root=False)),
    **_rows((aten.std.correction, aten.std.dim), _variance(root=True)),
    **_rows((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), _vector_norm),
    aten.cumsum.default: _cumulative,
    aten.topk.default: _top,
    **_rows((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.reshape_as.default, aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int), _reshape),
    aten.permute.default: _permute,
    **_rows((aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.t.default, aten.mT.default), _swap),
    aten.numpy_T.default: _reverse_axes,
    **_rows((aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int), _move),
    **_rows((aten.expand.default, aten.expand_as.default), _expand),
    **_rows((aten.repeat.default, aten.tile.default), _repeat),
    aten.repeat_interleave.self_int: _repeat_each,
    **_rows((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _squeeze),
    aten.unsqueeze.default: _unsqueeze,
    **_rows((aten.cat.default, aten.concat.default), _concatenate),
    aten.stack.default: _stack,
    **_rows((aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections), _split),
    aten.unbind.int: _unbind,
    operator.getitem: _item,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.roll.default: _roll,
    aten.flip.default: _flip,
    **_rows((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **_rows((aten.reflection_pad1d.default, aten.reflection_pad2d.default), _reflection("reflect")),
    **_rows((aten.replication_pad1d.default, aten.replication_pad2d.default), _reflection("replicate")),
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    **_rows((aten.gather.default, aten.take_along_dim.default), _gather),
    aten.embedding.default: _embedding,
    aten.one_hot.default: _one_hot,
    aten.scatter.src: _scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.channel_shuffle.default: _channel_shuffle,
    aten.unfold.default: _windowed,
    aten.im2col.default: _patches,
    aten.col2im.default: _from_patches,
    aten.einsum.default: _einsum,
    aten.tril.default: _triangle(0),
    aten.triu.default: _triangle(1),
    **_rows((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _filled(0)),
    **_rows((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _filled(1)),
    **_rows((aten.full.default, aten.full_like.default, aten.new_full.default, aten.fill.Scalar, aten.fill.Tensor), _filled(None)),
    **_rows((aten.arange.default, aten.arange.start, aten.arange.start_step), _range),
    aten.sym_size.int: _size,
}  # fmt: skip
