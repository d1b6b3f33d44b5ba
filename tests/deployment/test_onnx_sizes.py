"""What is known of an ONNX file without running it: the sizes of its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bounds import bounded
from onnx import TensorProto, helper, numpy_helper

from rarefy.deployment import onnx_sizes
from rarefy.errors import FormatError


def model_of(nodes: list[Any], constants: dict[str, Any], output: str) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def node(kind: str, inputs: str, output: str, **options: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **options)


def reshaped() -> Any:
    """The batch is read from the input and put among the sizes of a Reshape, as exporters write it."""
    return model_of(
        [
            node("Shape", "x", "all"),
            node("Gather", "all zero", "n", axis=0),
            node("Unsqueeze", "n axes", "n1"),
            node("Slice", "all one two", "c"),
            node("Mul", "c eight", "c8"),
            node("Concat", "n1 c8 rest", "sizes", axis=0),
            node("Reshape", "x sizes", "y"),
        ],
        {
            "zero": np.int64(0), "axes": np.array([0]), "one": np.array([1]), "two": np.array([2]),
            "eight": np.array([8]), "rest": np.array([-1]),
        },
        "y",
    )  # fmt: skip


def test_sizes_that_a_file_calculates_from_its_input_are_known() -> None:
    found = onnx_sizes.sizes_of(onnx, reshaped(), 5, "x")
    assert found["y"] == (5, 24, 8)
    session = onnxruntime.InferenceSession(reshaped().SerializeToString(), providers=["CPUExecutionProvider"])
    (ran,) = session.run(None, {"x": np.zeros((5, 3, 8, 8), np.float32)})
    assert found["y"] == ran.shape


def test_a_size_that_only_running_it_tells_is_none() -> None:
    model = model_of([node("NonZero", "x", "at"), node("Cast", "at", "y", to=TensorProto.FLOAT)], {}, "y")
    assert onnx_sizes.sizes_of(onnx, model, 2, "x")["y"] == (4, None)


@pytest.mark.parametrize(
    ("nodes", "constants", "sizes"),
    [
        ([node("Range", "a b c", "v"), node("Concat", "v v", "w", axis=0), node("Cast", "w", "y", to=1)],
         {"a": np.int64(0), "b": np.int64(10**12), "c": np.int64(1)}, (2 * 10**12,)),
        ([node("Expand", "a b", "v"), node("Add", "v v", "w"), node("Cast", "w", "y", to=1)],
         {"a": np.int64(1), "b": np.array([2**31])}, (2**31,)),
        ([node("ConstantOfShape", "a", "v"), node("Concat", "v v", "w", axis=0), node("Cast", "w", "y", to=1)],
         {"a": np.array([2**29])}, (2**30,)),
    ],
)  # fmt: skip
def test_a_long_value_is_not_written_down(nodes: list[Any], constants: dict[str, Any], sizes: tuple[int, ...]) -> None:
    model = model_of(nodes, constants, "y")
    with bounded(50 * 2**20, 2):
        try:
            assert onnx_sizes.sizes_of(onnx, model, 2, "x")["y"] == sizes
        except FormatError as refusal:  # ONNX's own bound of a Range
            assert "[onnx-sizes]" in str(refusal)


def test_a_file_that_contradicts_itself_is_refused() -> None:
    model = model_of([node("Add", "x seven", "y")], {"seven": np.zeros(7, np.float32)}, "y")
    with pytest.raises(FormatError, match="contradicts itself"):
        onnx_sizes.sizes_of(onnx, model, 2, "x")
