"""Every row of the table of ONNX operators against ONNX Runtime: other forms, and opsets old and new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import answers, write

from rarefy.errors import InputError
from rarefy.models.load import graph_of, load
from rarefy.models.onnx.file import ROWS

rng = np.random.default_rng(0)


def numbers(*shape: int, low: float = -1.5, high: float = 1.5) -> Any:
    return rng.uniform(low, high, shape).astype(np.float32)


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


IMAGE, ROW, VOLUME, SEQUENCE = (2, 4, 7, 9), (2, 5), (2, 4, 5, 6, 7), (2, 6, 8)

# operator, shape of x, constants (None: an input left out), attributes, opset
Case = tuple[str, tuple[int, ...], list[Any], dict[str, Any], int]
CASES: list[Case] = [
    *((kind, IMAGE, [], {}, 17) for kind in (
        "Relu Sigmoid Tanh Erf Softplus Softsign Exp Abs Neg Floor Ceil Round Sign Sin Cos Tan Atan Sinh Cosh Asinh "
        "Identity HardSigmoid HardSwish Elu Celu LeakyRelu ThresholdedRelu Selu Softmax LogSoftmax Shrink "
        "GlobalAveragePool GlobalMaxPool Dropout Flatten LpNormalization"
    ).split()),
    ("Mish", IMAGE, [], {}, 18),
    ("Swish", IMAGE, [], {"alpha": 1.5}, 24),
    ("Gelu", IMAGE, [], {}, 20),
    ("Gelu", IMAGE, [], {"approximate": "tanh"}, 20),
    ("HardSigmoid", IMAGE, [], {"alpha": 1 / 6, "beta": 0.5}, 17),
    ("Selu", IMAGE, [], {"alpha": 1.2, "gamma": 0.9}, 7),
    ("Shrink", IMAGE, [], {"bias": 0.2, "lambd": 0.3}, 9),
    *((kind, IMAGE, [numbers(1, 4, 1, 1)], {}, 17) for kind in "Add Sub Mul Div Min Max PRelu".split()),
    *((kind, IMAGE, [numbers(4, 7, 9, low=0.5)], {}, 8) for kind in "Add Sub Mul Div Min Max Sum Mean PRelu".split()),
    *((kind, IMAGE, [floats(0.7).reshape(())], {}, 7) for kind in "Add Sub Mul Div Pow".split() if kind != "Pow"),
    ("Pow", IMAGE, [floats(2.0)], {}, 13),
    ("Pow", IMAGE, [ints(3)], {}, 13),
    ("PRelu", IMAGE, [numbers(1)], {}, 9),
    ("PRelu", IMAGE, [numbers(4, 1, 1)], {}, 9),
    ("Mod", IMAGE, [floats(0.4)], {"fmod": 1}, 13),
    ("Clip", IMAGE, [], {"min": -0.3, "max": 0.4}, 7),
    ("Clip", IMAGE, [floats(0.0).reshape(()), floats(6.0).reshape(())], {}, 11),
    ("Clip", IMAGE, [None, floats(0.4).reshape(())], {}, 13),
    ("Clip", IMAGE, [floats(0.0).reshape(())], {}, 13),
    ("Softmax", IMAGE, [], {}, 11),
    ("Softmax", IMAGE, [], {"axis": 3}, 11),
    ("Softmax", IMAGE, [], {"axis": 1}, 13),
    ("LogSoftmax", IMAGE, [], {"axis": 2}, 9),
    ("Conv", IMAGE, [numbers(6, 4, 3, 3), numbers(6)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, 7),
    ("Conv", IMAGE, [numbers(8, 2, 3, 2)], {"group": 2, "dilations": [2, 1], "pads": [0, 1, 2, 0]}, 11),
    ("Conv", IMAGE, [numbers(4, 1, 3, 3)], {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 11),
    ("Conv", IMAGE, [numbers(3, 4, 4, 4)], {"auto_pad": "SAME_LOWER"}, 11),
    ("Conv", IMAGE, [numbers(3, 4, 3, 3)], {"auto_pad": "VALID"}, 11),
    ("Conv", SEQUENCE, [numbers(5, 6, 3), numbers(5)], {"pads": [1, 1]}, 17),
    ("Conv", VOLUME, [numbers(3, 4, 2, 3, 2)], {"pads": [0, 1, 0, 0, 1, 1]}, 17),
    ("ConvTranspose", IMAGE, [numbers(4, 3, 3, 3), numbers(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}, 11),
    ("ConvTranspose", IMAGE, [numbers(4, 3, 3, 3)],
     {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, 11),
    ("ConvTranspose", IMAGE, [numbers(4, 1, 2, 2)], {"strides": [2, 2], "group": 4, "pads": [0, 1, 1, 0]}, 11),
    ("ConvTranspose", IMAGE, [numbers(4, 2, 3, 3)], {"strides": [2, 2], "output_shape": [14, 18]}, 11),
    ("ConvTranspose", SEQUENCE, [numbers(6, 2, 4)], {"strides": [2], "pads": [1, 1]}, 11),
    ("BatchNormalization", IMAGE, [numbers(4), numbers(4), numbers(4), numbers(4, low=0.5)], {"epsilon": 1e-3}, 9),
    ("BatchNormalization", ROW, [numbers(5), numbers(5), numbers(5), numbers(5, low=0.5)], {}, 15),
    ("InstanceNormalization", IMAGE, [numbers(4), numbers(4)], {"epsilon": 1e-3}, 7),
    ("LayerNormalization", SEQUENCE, [numbers(8), numbers(8)], {}, 17),
    ("LayerNormalization", IMAGE, [numbers(4, 7, 9)], {"axis": 1}, 17),
    ("GroupNormalization", IMAGE, [numbers(4), numbers(4)], {"num_groups": 2}, 21),
    ("RMSNormalization", SEQUENCE, [numbers(8)], {}, 23),
    ("LRN", IMAGE, [], {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 2.0}, 13),
    ("MeanVarianceNormalization", IMAGE, [], {"axes": [2, 3]}, 13),
    ("Gemm", ROW, [numbers(5, 3), numbers(3)], {}, 7),
    ("Gemm", ROW, [numbers(3, 5), numbers(1, 3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, 11),
    ("Gemm", ROW, [numbers(3, 5)], {"transB": 1}, 13),
    ("MatMul", SEQUENCE, [numbers(8, 3)], {}, 9),
    ("MatMul", SEQUENCE, [numbers(1, 8, 3)], {}, 9),
    ("Einsum", SEQUENCE, [numbers(8, 3)], {"equation": "bij,jk->bik"}, 12),
    ("MaxPool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 8),
    ("MaxPool", IMAGE, [], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}, 11),
    ("MaxPool", IMAGE, [], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "dilations": [2, 1]}, 11),
    ("MaxPool", IMAGE, [], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 11),
    ("MaxPool", SEQUENCE, [], {"kernel_shape": [3]}, 11),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 7),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 11),
    ("AveragePool", IMAGE, [], {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0]}, 11),
    ("AveragePool", IMAGE, [], {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0], "count_include_pad": 1}, 11),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}, 19),
    ("AveragePool", VOLUME, [], {"kernel_shape": [2, 2, 2]}, 11),
    *((kind, IMAGE, [], {"axes": [2, -1], "keepdims": 0}, 11) for kind in (
        "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare "
        "ReduceLogSumExp").split()),
    *((kind, IMAGE, [ints(1)], {}, 18) for kind in "ReduceSum ReduceMean ReduceMax ReduceL2 ReduceProd".split()),
    ("ReduceSum", IMAGE, [ints()], {"noop_with_empty_axes": 1}, 13),
    ("ReduceMean", SEQUENCE, [ints(-1, 1)], {"keepdims": 0}, 18),
    ("ArgMax", SEQUENCE, [], {"axis": 1}, 11),
    ("ArgMax", SEQUENCE, [], {"axis": -1, "keepdims": 0, "select_last_index": 1}, 13),
    ("ArgMin", SEQUENCE, [], {"axis": 2}, 13),
    ("TopK", SEQUENCE, [ints(3)], {"axis": 1}, 11),
    ("TopK", SEQUENCE, [ints(3)], {"largest": 0}, 11),
    ("CumSum", SEQUENCE, [ints(1).reshape(())], {}, 14),
    ("CumSum", SEQUENCE, [ints(2).reshape(())], {"exclusive": 1, "reverse": 1}, 14),
    ("Trilu", SEQUENCE, [ints(1).reshape(())], {"upper": 0}, 14),
    ("Trilu", SEQUENCE, [], {}, 14),
    ("Concat", IMAGE, [], {"axis": -1}, 13),
    ("Split", SEQUENCE, [], {"axis": 1, "split": [2, 4]}, 11),
    ("Split", SEQUENCE, [ints(3, 5)], {"axis": 2}, 13),
    ("Split", SEQUENCE, [], {"axis": 1}, 11),
    ("Slice", IMAGE, [], {"starts": [1, -4], "ends": [3, 9223372036854775807], "axes": [1, 3]}, 9),
    ("Slice", IMAGE, [ints(0, 1), ints(4, -1), ints(1, 3), ints(2, 3)], {}, 10),
    ("Slice", IMAGE, [ints(-1), ints(-100), ints(2), ints(-2)], {}, 13),
    ("Slice", IMAGE, [ints(5), ints(1), ints(3), ints(-1)], {}, 13),
    ("Gather", SEQUENCE, [ints(2).reshape(())], {"axis": 1}, 11),
    ("Gather", SEQUENCE, [ints(0, 2, 4)], {"axis": 1}, 11),
    ("Gather", SEQUENCE, [ints(3, 0, -1, 3)], {"axis": 2}, 13),
    ("Gather", SEQUENCE, [ints(3, 0, -1, 3).reshape(2, 2)], {"axis": 2}, 13),
    ("Expand", (2, 1, 8), [ints(1, 6, 1)], {}, 13),
    ("Tile", SEQUENCE, [ints(1, 2, 3)], {}, 13),
    ("Pad", IMAGE, [], {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5}, 9),
    ("Pad", IMAGE, [ints(0, 1, 1, 2, 0, 0, 0, -1), floats(0.3).reshape(())], {}, 13),
    ("Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "reflect"}, 13),
    ("Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "edge"}, 13),
    ("Pad", ROW, [ints(0, 2, 0, 1)], {"mode": "reflect"}, 13),
    ("Pad", IMAGE, [ints(1, 2), None, ints(3)], {"mode": "wrap"}, 19),
    ("Pad", IMAGE, [ints(2, 1), None, ints(-1)], {}, 18),
    ("Reshape", IMAGE, [ints(0, 2, -1, 9)], {}, 13),
    ("Reshape", IMAGE, [ints(-1, 252)], {}, 13),
    ("Flatten", IMAGE, [], {"axis": 2}, 13),
    ("Squeeze", (2, 1, 5, 1), [], {"axes": [1, -1]}, 11),
    ("Squeeze", (2, 1, 5, 1), [ints(3)], {}, 13),
    ("Squeeze", (2, 1, 5, 1), [], {}, 13),
    ("Unsqueeze", ROW, [], {"axes": [1, -1]}, 11),
    ("Unsqueeze", ROW, [ints(1, 3)], {}, 13),
    ("Transpose", IMAGE, [], {"perm": [0, 2, 3, 1]}, 13),
    ("DepthToSpace", (2, 8, 3, 4), [], {"blocksize": 2}, 13),
    ("DepthToSpace", (2, 8, 3, 4), [], {"blocksize": 2, "mode": "CRD"}, 13),
    ("SpaceToDepth", (2, 3, 4, 6), [], {"blocksize": 2}, 13),
    ("Upsample", IMAGE, [floats(1, 1, 2, 2)], {"mode": "nearest"}, 9),
    ("Resize", IMAGE, [floats(1, 1, 2, 3)], {"mode": "nearest"}, 10),
    ("Resize", IMAGE, [floats(), floats(1, 1, 2, 2)],
     {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 11),
    *(("Resize", IMAGE, [None, floats(1, 1, *scale)],
       {"coordinate_transformation_mode": mode, "nearest_mode": near}, 13)
      for scale in ((2, 2), (1.3, 0.7)) for mode in ("half_pixel", "asymmetric", "align_corners")
      for near in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    *(("Resize", IMAGE, [None, None, ints(2, 4, 11, 5)], {"mode": mode, "coordinate_transformation_mode": place}, 18)
      for mode in ("linear", "cubic") for place in ("half_pixel", "align_corners", "pytorch_half_pixel")),
    ("Resize", IMAGE, [None, floats(1, 1, 1.3, 0.6)], {"mode": "linear"}, 13),
    ("Resize", IMAGE, [None, None, ints(14, 18)], {"mode": "linear", "axes": [2, 3]}, 18),
    ("Resize", SEQUENCE, [None, floats(1, 1, 2)], {"mode": "linear"}, 13),
    ("Cast", IMAGE, [], {"to": TensorProto.INT64}, 13),
    ("Cast", IMAGE, [], {"to": TensorProto.BOOL}, 13),
    *((kind, IMAGE, [floats(0.2)], {}, 16) for kind in "Greater GreaterOrEqual Less LessOrEqual".split()),
    ("IsNaN", IMAGE, [], {}, 13),
    ("IsInf", IMAGE, [], {}, 10),
    ("LSTM", SEQUENCE, [numbers(1, 20, 8), numbers(1, 20, 5), numbers(1, 40)], {"hidden_size": 5}, 14),
    ("LSTM", SEQUENCE, [numbers(2, 20, 8), numbers(2, 20, 5)], {"hidden_size": 5, "direction": "bidirectional"}, 14),
    ("LSTM", SEQUENCE, [numbers(1, 20, 8), numbers(1, 20, 5), numbers(1, 40)],
     {"hidden_size": 5, "direction": "reverse"}, 7),
    ("GRU", SEQUENCE, [numbers(1, 15, 8), numbers(1, 15, 5), numbers(1, 30)],
     {"hidden_size": 5, "linear_before_reset": 1}, 14),
    ("GRU", SEQUENCE, [numbers(2, 15, 8), numbers(2, 15, 5), numbers(2, 30)],
     {"hidden_size": 5, "linear_before_reset": 1, "direction": "bidirectional"}, 14),
    ("RNN", SEQUENCE, [numbers(1, 5, 8), numbers(1, 5, 5), numbers(1, 10)], {"hidden_size": 5}, 14),
]  # fmt: skip
# positive x only
CASES += [(kind, IMAGE, [], {}, 13) for kind in ("Sqrt", "Log", "Reciprocal", "Acosh")]
CASES += [(kind, IMAGE, [], {"axes": [1]}, 13) for kind in ("ReduceLogSum",)]
POSITIVE = {"Sqrt", "Log", "Reciprocal", "Acosh", "ReduceLogSum"}
OUTPUTS = {"Split": 2, "TopK": 2, "LSTM": 3, "GRU": 2, "RNN": 2}
IN_UNIT = {"Asin", "Acos", "Atanh"}
CASES += [(kind, IMAGE, [], {}, 13) for kind in sorted(IN_UNIT)]


def named(case: Case) -> str:
    kind, _, constants, attributes, opset = case
    return f"{kind}-{opset}-{len(constants)}-{'_'.join(str(value) for value in attributes.values())}"[:60]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(named, CASES))
def test_a_node_answers_as_onnx_runtime_does(index: int, tmp_path: Path) -> None:
    kind, shape, constants, attributes, opset = CASES[index]
    names = ["x", *("" if value is None else f"c{place}" for place, value in enumerate(constants))]
    if kind == "Concat":
        names = ["x", "x"]
    outputs = [f"y{place}" for place in range(OUTPUTS.get(kind, 1))]
    recurrent = kind in ("LSTM", "GRU", "RNN")
    nodes = [
        helper.make_node(kind, ["t" if recurrent and name == "x" else name for name in names], outputs, **attributes)
    ]
    if recurrent:
        nodes.insert(0, helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]))
    file = write(
        tmp_path / "node.onnx", nodes, {"x": ["n", *shape[1:]]}, outputs,
        {f"c{place}": value for place, value in enumerate(constants) if value is not None}, opset,
    )  # fmt: skip
    x = numbers(*shape, low=-1.5)
    x = (
        np.abs(x) + (1.01 if kind == "Acosh" else 0.1)
        if kind in POSITIVE
        else np.clip(x, -0.9, 0.9)
        if kind in IN_UNIT
        else x
    )
    try:
        wanted = answers(file, x)
    except Exception as error:
        pytest.fail(f"ONNX Runtime does not take the case: {error}")
    source = load(str(file))
    model = graph_of(source) if index % 9 == 0 else source.model  # tracing takes ten times as long
    with torch.no_grad():
        found = model(torch.from_numpy(x))
    same(found, wanted)


def same(found: Any, wanted: list[Any]) -> None:
    for mine, its in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        assert mine.shape == its.shape and mine.numpy().dtype == its.dtype
        np.testing.assert_allclose(mine.numpy(), its, rtol=1e-4, atol=1e-5)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, outputs.split(), name=f"{kind}_{outputs}", **attributes)


# Small nets of what takes more than one tensor of floats. x: (n, 4, 6)
INT, BOOL = TensorProto.INT64, TensorProto.BOOL
NETS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "logic": (
        [node("Greater", "x zero", "a"), node("Less", "x half", "b"), node("And", "a b", "c"), node("Not", "c", "d"),
         node("Xor", "d a", "e"), node("Or", "e b", "f"), node("Where", "f x half", "g"), node("Equal", "g x", "h"),
         node("Cast", "h", "i", to=1), node("Where", "c half zero", "j"), node("Add", "i j", "y")],
        {"zero": floats(0.0).reshape(()), "half": floats(0.5)},
    ),
    "indices": (
        [node("Cast", "x", "a", to=INT), node("Abs", "a", "b"), node("GatherElements", "x b", "c", axis=1),
         node("ScatterElements", "x b c", "d", axis=2), node("Gather", "table b", "e"),
         node("ReduceSum", "e axis", "f", keepdims=0), node("Add", "d f", "y")],
        {"table": numbers(5, 3), "axis": ints(-1)},
    ),
    "places": (
        [node("Transpose", "x", "a", perm=[1, 0, 2]), node("GatherND", "a rows", "b"),
         node("ScatterND", "a rows b", "c"), node("ScatterND", "c rows b", "d", reduction="add"),
         node("Transpose", "d", "y", perm=[1, 0, 2])],
        {"rows": ints(0, -1).reshape(2, 1)},
    ),
    "bits": (
        [node("Cast", "x", "a", to=INT), node("BitwiseAnd", "a three", "b"), node("BitwiseOr", "b one", "c"),
         node("BitwiseXor", "c a", "d"), node("BitwiseNot", "d", "e"), node("Div", "e three", "f"),
         node("Mod", "f three", "g"), node("CastLike", "g x", "y")],
        {"three": ints(3), "one": ints(1)},
    ),
    "classes": (
        [node("ArgMax", "x", "a", axis=1, keepdims=0), node("OneHot", "a depth values", "b", axis=1),
         node("Mul", "b x", "c"), node("OneHot", "a depth same", "d"),
         node("Transpose", "d", "e", perm=[0, 2, 1]), node("Add", "c e", "y")],
        {"depth": ints(4), "values": floats(-1, 2), "same": floats(0.5, 0.7)},
    ),
    "sizes": (
        [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Gather", "s two", "w"),
         node("Mul", "w four", "v"),
         node("Unsqueeze", "n axis", "n1"), node("Unsqueeze", "v axis", "v1"), node("Concat", "n1 v1", "to", axis=0),
         node("Reshape", "x to", "a"), node("ConstantOfShape", "to", "b", value=helper.make_tensor("", 1, [1], [0.5])),
         node("Add", "a b", "c"), node("Range", "zero v one", "r"), node("Cast", "r", "rf", to=1),
         node("Mul", "c rf", "d"),
         node("Size", "x", "z"), node("Div", "z n", "zn"), node("Cast", "zn", "zf", to=1), node("Div", "d zf", "e"),
         node("Shape", "e", "s2", start=0, end=1), node("Concat", "s2 ones", "more", axis=0),
         node("Expand", "e2 more", "f"),
         node("ReduceSum", "f axis1", "g", keepdims=0), node("Add", "e g", "y")],
        {"zero": ints(0).reshape(()), "one": ints(1).reshape(()), "two": ints(2).reshape(()),
         "four": ints(4).reshape(()),
         "axis": ints(0), "axis1": ints(-1), "ones": ints(1, 3), "e2": floats(0.5)},
    ),
    "halves": (
        [node("Shape", "x", "s"), node("Slice", "s one three", "p"), node("Cast", "p", "pf", to=1),
         node("Mul", "pf scale", "q"), node("Floor", "q", "qf"), node("Cast", "qf", "qi", to=INT),
         node("Slice", "s zero one", "n"), node("Unsqueeze", "n zero", "n2"), node("Squeeze", "n2 zero", "n3"),
         node("Concat", "n3 one qi", "to", axis=0), node("Unsqueeze", "x one", "x4"),
         node("Resize", "x4 - - to", "y", mode="linear", coordinate_transformation_mode="half_pixel")],
        {"zero": ints(0), "one": ints(1), "three": ints(3), "scale": floats(1.5, 1.5)},
    ),
    "sampling": (
        [node("Unsqueeze", "x axis", "a"), node("Tanh", "x", "g"), node("Reshape", "g to", "grid"),
         node("GridSample", "a grid", "y", align_corners=1)],
        {"axis": ints(1), "to": ints(0, 4, 3, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_small_nets_of_several_operators(name: str, tmp_path: Path) -> None:
    nodes, constants = NETS[name]
    file = write(tmp_path / "net.onnx", nodes, {"x": ["n", 4, 6]}, ["y"], constants, 18)
    x = numbers(3, 4, 6)
    graph = graph_of(load(str(file)))
    with torch.no_grad():
        same(graph(torch.from_numpy(x)), answers(file, x))


def test_every_row_has_a_case() -> None:
    tried = {case[0] for case in CASES} | {one.op_type for nodes, _ in NETS.values() for one in nodes}
    assert set(ROWS) - tried == {"Scatter"}  # ScatterElements under its old name


@pytest.mark.parametrize(
    "kind, constants, attributes, match",
    [
        ("Resize", [None, floats(1, 1, 2, 2)], {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
         "here .Resize.: Resize with mode=linear, coordinate_transformation_mode=asymmetric.*export it with"),
        ("Resize", [None, floats(2, 1, 2, 2)], {}, "resize of batch or channels"),
        ("AveragePool", [], {"kernel_shape": [2, 2], "dilations": [2, 2]}, "AveragePool with dilations"),
        ("Dropout", [floats(0.5).reshape(()), np.array(True)], {}, "dropout in training mode; export the model"),
        ("BatchNormalization", [numbers(4)] * 4, {"training_mode": 1}, "batch norm in training mode"),
        ("Cast", [], {"to": TensorProto.STRING}, "a cast to ONNX's type 8"),
        ("Reshape", [ints(2, 10**12)], {}, "here .Reshape.: .*"),
        ("Expand", [ints(1, 10**9, 10**9, 10**9)], {}, "makes a tensor of .*damaged"),
        ("Tile", [ints(1, 10**9, 10**9, 1)], {}, "makes a tensor of .*damaged"),
        ("Pad", [ints(0, 0, 10**9, 10**9, 0, 0, 0, 0)], {}, "makes a tensor of .*damaged"),
        ("Transpose", [], {"perm": [0, 1, 2, 9]}, "here .Transpose.: does not run"),
        ("Conv", [numbers(6, 5, 3, 3)], {}, "here .Conv.: does not run"),
        ("Softmax", [], {"axis": 7}, "axis 7 of a tensor of 4 axes"),
    ],
)  # fmt: skip
def test_forms_without_a_row_are_refused_by_node(
    kind: str, constants: list[Any], attributes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    names = ["x", *("" if value is None else f"c{place}" for place, value in enumerate(constants))]
    nodes = [helper.make_node(kind, names, ["y"], name="here", **attributes)]
    stored = {f"c{place}": value for place, value in enumerate(constants) if value is not None}
    file = write(tmp_path / "node.onnx", nodes, {"x": ["n", *IMAGE[1:]]}, ["y"], stored, 18)
    with pytest.raises(InputError, match=match):
        load(str(file))
