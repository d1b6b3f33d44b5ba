"""ONNX files that do harm to who runs them: what a good file becomes, and words of the refusal of each.

``KINDS`` maps a name to (a function that changes the parsed model, words). "" for the words: any of a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Model = Any
KINDS: dict[str, tuple[Callable[[Model], None], str]] = {}
OPERATOR, SIZES = "which rarefy does not write", "[onnx-sizes]"


def constant(model: Model, value: Any, kind: type = np.int64) -> str:
    name = f"c{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, kind), name))
    return name


def behind(
    model: Model, kind: str, inputs: Sequence[str] = (), domain: str = "", count: int = 1, **options: Any
) -> str:
    """An operator more, of the answer or of ``inputs``; its result is added to the answer, so that it is read."""
    answer = model.graph.output[0].name
    name = f"n{len(model.graph.node)}"
    outputs = [f"{name}_{place}" for place in range(count)]
    node = helper.make_node(kind, inputs or [answer], outputs, name=name, domain=domain, **options)
    model.graph.node.append(node)
    return outputs[0]


def read(model: Model, name: str) -> None:
    """The value counts for the answer: its sum is added to that."""
    answer = model.graph.output[0].name
    for node in model.graph.node:
        for place, made in enumerate(node.output):
            if made == answer:
                node.output[place] = "before"
        for place, taken in enumerate(node.input):
            if taken == answer:
                node.input[place] = "before"
    model.graph.node.append(helper.make_node("ReduceSum", [name], ["told"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["before", "told"], [answer]))


def kind(name: str, words: str) -> Callable[[Callable[[Model], Any]], Callable[[Model], Any]]:
    def known(change: Callable[[Model], Any]) -> Callable[[Model], Any]:
        KINDS[name] = (change, words)
        return change

    return known


def makes(name: str, words: str, make: Callable[[Model], str]) -> None:
    """What is made is read."""
    KINDS[name] = (lambda model: read(model, make(model)), words)


def graph(*nodes: Any, inputs: Sequence[Any] = (), outputs: Sequence[str] = ("y",)) -> Any:
    made = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in outputs]
    return helper.make_graph(list(nodes), "inner", list(inputs), made)


def _true(model: Model) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    return "true"


BODY = [
    helper.make_node("Identity", ["i"], ["unused"]),
    helper.make_node("Identity", ["go_on"], ["still"]),
    helper.make_node("Identity", ["v"], ["w"]),
]
LOOP = helper.make_graph(
    BODY,
    "body",
    [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
    ],
    [
        helper.make_tensor_value_info("still", TensorProto.BOOL, []),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, None),
    ],
)


def nested(depth: int) -> Any:
    inner = graph(helper.make_node("Constant", [], ["y"], value_float=1.0))
    for _ in range(depth):
        inner = graph(helper.make_node("If", ["true"], ["y"], then_branch=inner, else_branch=inner))
    return inner


def chain(depth: int) -> Any:
    inner = graph(helper.make_node("Constant", [], ["y"], value_float=1.0))
    flat = graph(helper.make_node("Constant", [], ["y"], value_float=1.0))
    for _ in range(depth):
        inner = graph(helper.make_node("If", ["true"], ["y"], then_branch=inner, else_branch=flat))
    return inner


# ------------------------------------------------------------------------------------------- operators that choose
makes("a loop without end", OPERATOR, lambda m: behind(
    m, "Loop", [constant(m, 2**62), _true(m), m.graph.output[0].name], body=LOOP))  # fmt: skip
makes("an If", OPERATOR, lambda m: behind(m, "If", [_true(m)], then_branch=nested(0), else_branch=nested(0)))
makes(
    "graphs that double", OPERATOR, lambda m: behind(m, "If", [_true(m)], then_branch=nested(14), else_branch=nested(0))
)
makes("graphs 28 deep", OPERATOR, lambda m: behind(m, "If", [_true(m)], then_branch=chain(28), else_branch=nested(0)))
makes("a graph in an operator of ours", OPERATOR, lambda m: behind(m, "Relu", body=nested(1)))
makes("a Scan", OPERATOR, lambda m: behind(m, "Scan", body=graph(
    helper.make_node("Identity", ["x"], ["y"]), inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
), num_scan_inputs=1))  # fmt: skip
for _name in ("RandomNormalLike", "SequenceConstruct", "NonZero", "Unique", "Optional", "Dropout", "Hardmax", "DFT"):
    makes(f"an operator {_name}", OPERATOR, lambda m, n=_name: behind(m, n))
makes("an operator of another domain", OPERATOR, lambda m: behind(m, "Run", domain="evil.example"))
makes("one of ONNX Runtime's own", OPERATOR, lambda m: behind(m, "Rfft", domain="com.microsoft"))
makes("one of PyTorch's", OPERATOR, lambda m: behind(m, "ATen", domain="org.pytorch.aten"))
makes("an operator without a name", OPERATOR, lambda m: behind(m, ""))
makes("zeros without end", OPERATOR, lambda m: behind(m, "ConstantOfShape", [constant(m, [2**40])]))


@kind("a function", "functions, sparse weights or a training")
def _function(model: Model) -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("local", "Mine", ["x"], ["y"], body, model.opset_import))


@kind("a training", "functions, sparse weights or a training")
def _training(model: Model) -> None:
    model.training_info.add().algorithm.CopyFrom(nested(0))


@kind("sparse weights", "functions, sparse weights or a training")
def _sparse(model: Model) -> None:
    one = model.graph.sparse_initializer.add()
    one.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    one.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))
    one.dims.append(2**40)


# ------------------------------------------------------------------------------------------------------- memory
makes("Expand of a number", SIZES, lambda m: behind(m, "Expand", [constant(m, 1.0, np.float32), constant(m, [2**40])]))
makes("Expand of two gigabytes", SIZES, lambda m: behind(
    m, "Expand", [constant(m, 1.0, np.float32), constant(m, [2**29])]))  # fmt: skip
makes("Expand of a computed size", SIZES, lambda m: behind(m, "Expand", [constant(m, 1.0, np.float32), behind(
    m, "Mul", [behind(m, "Shape"), constant(m, [2**30])])]))  # fmt: skip
makes("Expand of a size among the numbers", SIZES, lambda m: behind(m, "Expand", [
    constant(m, 1.0, np.float32), behind(m, "Cast", [behind(m, "ReduceMax", keepdims=1)], to=TensorProto.INT64)
]))  # fmt: skip
makes("Tile", SIZES, lambda m: behind(m, "Tile", [constant(m, [[1.0]], np.float32), constant(m, [2**20, 2**20])]))
makes("Range of whole numbers", SIZES, lambda m: behind(m, "Cast", [behind(
    m, "Range", [constant(m, 0), constant(m, 10**12), constant(m, 1)])], to=TensorProto.FLOAT))  # fmt: skip
makes("Range of tiny steps", SIZES, lambda m: behind(m, "Range", [
    constant(m, 0.0, np.float32), constant(m, 1e9, np.float32), constant(m, 1e-9, np.float32)]))  # fmt: skip
makes("Range of steps of 0", "", lambda m: behind(m, "Range", [
    constant(m, 0.0, np.float32), constant(m, 1.0, np.float32), constant(m, 0.0, np.float32)]))  # fmt: skip
makes("OneHot", SIZES, lambda m: behind(m, "OneHot", [
    constant(m, [1, 2]), constant(m, 2**40), constant(m, [0.0, 1.0], np.float32)]))  # fmt: skip
makes("Pad", SIZES, lambda m: behind(m, "Pad", [m.graph.output[0].name, constant(m, [0, 2**31, 0, 2**31])]))
makes("Pad of less than nothing", "", lambda m: behind(
    m, "Pad", [m.graph.output[0].name, constant(m, [0, -(2**31), 0, 0])]))  # fmt: skip
makes("Resize", SIZES, lambda m: behind(m, "Resize", [
    m.graph.input[0].name, "", constant(m, [1, 1, 2.0**16, 2.0**16], np.float32)]))  # fmt: skip
makes("an outer sum", SIZES, lambda m: behind(m, "Add", [
    constant(m, np.zeros((1, 60_000)), np.float32), constant(m, np.zeros((60_000, 1)), np.float32)]))  # fmt: skip
makes("an outer product", SIZES, lambda m: behind(m, "MatMul", [
    constant(m, np.zeros((60_000, 1)), np.float32), constant(m, np.zeros((1, 60_000)), np.float32)]))  # fmt: skip
makes("Gemm of a column and a row", SIZES, lambda m: behind(m, "Gemm", [
    constant(m, np.zeros((60_000, 1)), np.float32), constant(m, np.zeros((1, 60_000)), np.float32)]))  # fmt: skip
makes("Einsum of many", SIZES, lambda m: behind(
    m, "Einsum", [constant(m, np.zeros(3000), np.float32)] * 4, equation="a,b,c,d->ad"))  # fmt: skip
makes("Einsum that makes much", SIZES, lambda m: behind(
    m, "Einsum", [constant(m, np.zeros(60_000), np.float32)] * 2, equation="a,b->ab"))  # fmt: skip
makes("Gather of many", SIZES, lambda m: behind(m, "Gather", [
    constant(m, np.zeros((2, 3000)), np.float32), behind(m, "Expand", [constant(m, 0), constant(m, [10**6])])
]))  # fmt: skip
makes("Conv of wide borders", SIZES, lambda m: behind(m, "Conv", [
    m.graph.input[0].name, constant(m, np.zeros((1, 1, 1, 1)), np.float32)], pads=[2**16] * 4))  # fmt: skip
makes("ConvTranspose of long strides", SIZES, lambda m: behind(m, "ConvTranspose", [
    m.graph.input[0].name, constant(m, np.zeros((1, 1, 1, 1)), np.float32)], strides=[2**14, 2**14]))  # fmt: skip
makes("MaxPool of wide borders", "", lambda m: behind(
    m, "MaxPool", [m.graph.input[0].name], kernel_shape=[2**20, 2**20], pads=[2**19] * 4))  # fmt: skip
makes("a kernel of less than nothing", "", lambda m: behind(
    m, "MaxPool", [m.graph.input[0].name], kernel_shape=[-3, -3]))  # fmt: skip
makes("strides of nothing", "", lambda m: behind(
    m, "MaxPool", [m.graph.input[0].name], kernel_shape=[2, 2], strides=[0, 0]))  # fmt: skip
makes("Split of one into very many", "", lambda m: behind(
    m, "Split", [m.graph.input[0].name], count=3, axis=1, num_outputs=2**40))  # fmt: skip
makes("a depth of a million", "", lambda m: behind(m, "DepthToSpace", [m.graph.input[0].name], blocksize=2**20))
makes("all products of all boxes", SIZES, lambda m: behind(m, "Cast", [behind(m, "NonMaxSuppression", [
    constant(m, np.zeros((1, 5000, 4)), np.float32), constant(m, np.zeros((1, 50, 5000)), np.float32),
    constant(m, 2**40)])], to=TensorProto.FLOAT))  # fmt: skip


@kind("a chain that doubles", SIZES)
def _doubles(model: Model) -> None:
    name = model.graph.output[0].name
    for _ in range(30):
        name = behind(model, "Concat", [name, name], axis=1)
    read(model, name)


@kind("many that stay", SIZES)
def _many(model: Model) -> None:
    shape = constant(model, [2**20])
    made = [behind(model, "Expand", [constant(model, 1.0, np.float32), shape]) for _ in range(300)]
    read(model, behind(model, "Concat", made, axis=0))


@kind("much work in little memory", "out of proportion to the model's own")
def _work(model: Model) -> None:
    name = constant(model, np.zeros((1500, 1500)), np.float32)
    first = name
    for _ in range(100):
        name = behind(model, "MatMul", [name, first])
    read(model, name)


@kind("a kernel as large as the picture, many times", "out of proportion to the model's own")
def _pools(model: Model) -> None:
    name = behind(model, "Resize", [model.graph.input[0].name, "", constant(model, [1, 1, 40, 40], np.float32)])
    for _ in range(20):
        name = behind(model, "MaxPool", [name], kernel_shape=[249, 249], pads=[124] * 4)
    read(model, name)


@kind("100,000 nodes", "nodes, and a file of this model")
def _nodes(model: Model) -> None:
    name = model.graph.output[0].name
    for place in range(100_000):
        model.graph.node.add(op_type="Relu", input=[name], output=[f"r{place}"])
        name = f"r{place}"
    read(model, name)


# ------------------------------------------------------------------------------------------- weights, inputs, form


@kind("weights without numbers", "")
def _empty(model: Model) -> None:
    model.graph.initializer[0].dims[0] = 2**40


@kind("weights of a negative size", "")
def _negative(model: Model) -> None:
    model.graph.initializer[0].dims[0] = -1


@kind("weights of a type that is none", "")
def _type(model: Model) -> None:
    model.graph.initializer[0].data_type = 999


@kind("weights of texts", "")
def _texts(model: Model) -> None:
    one = model.graph.initializer[0]
    one.ClearField("raw_data")
    one.data_type = TensorProto.STRING
    one.string_data.extend([b"x"] * 10)


@kind("weights elsewhere", "lie in another file")
def _outside(model: Model) -> None:
    one = model.graph.initializer[0]
    one.ClearField("raw_data")
    one.data_location = TensorProto.EXTERNAL
    one.external_data.add(key="location", value="/etc/passwd")


@kind("weights elsewhere in a node", "lie in another file")
def _outside_node(model: Model) -> None:
    one = onnx.TensorProto(name="out", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    one.external_data.add(key="location", value="../../../etc/passwd")
    read(model, behind(model, "Constant", [""], value=one))


@kind("an input more", "has inputs of")
def _input(model: Model) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 4]))


@kind("an input of another size", "has inputs of")
def _size(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 4096


@kind("an input without a shape", "has inputs of")
def _shapeless(model: Model) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


@kind("an input that is a sequence", "has inputs of")
def _sequence(model: Model) -> None:
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1


@kind("a ring", "")
def _ring(model: Model) -> None:
    model.graph.node[0].input[0] = model.graph.output[0].name


@kind("two values of one name", "")
def _twice(model: Model) -> None:
    model.graph.node.append(model.graph.node[-1])


@kind("an opset of the future", "")
def _opset(model: Model) -> None:
    model.opset_import[0].version = 10_000


@kind("no opset", "")
def _no_opset(model: Model) -> None:
    del model.opset_import[:]


@kind("no nodes", "")
def _no_nodes(model: Model) -> None:
    del model.graph.node[:]


@kind("no graph", "")
def _no_graph(model: Model) -> None:
    model.ClearField("graph")


@kind("names as commands", "")
def _names(model: Model) -> None:
    model.graph.node[0].name = "\x1b[2J\n\x1b]0;evil\x07"
    model.graph.node[0].op_type = "\x1b[31mRun\n"
