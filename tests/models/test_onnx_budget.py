"""What an ONNX file makes of its own constants is known before memory is taken for it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx_files
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rarefy.errors import InputError
from rarefy.models.load import load
from rarefy.models.onnx import budget

node = helper.make_node
TALL, WIDE = np.ones((2**16, 1), np.float32), np.ones((1, 2**16), np.float32)
FILLED = {"value": numpy_helper.from_array(np.ones(1, np.float32))}
TENSOR = ["big"]


def of(kind: str, *inputs: str, **attributes: Any) -> list[Any]:
    return [node(kind, inputs, ["big"], "bad", **attributes)]


# name -> nodes that make "big", and the constants that they read
KINDS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "filled": (of("ConstantOfShape", "s", **FILLED), {"s": np.array([2**30])}),
    "filled beyond any": (of("ConstantOfShape", "s", **FILLED), {"s": np.array([2**40, 2**20])}),
    "expanded": (
        [node("Expand", ["x1", "s"], ["e"], "bad"), node("Relu", ["e"], ["big"], "bad")],
        {"x1": np.ones((1,), np.float32), "s": np.array([2**29])},
    ),
    "tiled": (of("Tile", "x1", "s"), {"x1": np.ones(4, np.float32), "s": np.array([2**28])}),
    "counted": (of("Range", "a", "b", "c"), {"a": np.array(0), "b": np.array(2**30), "c": np.array(1)}),
    "padded": (of("Pad", "x1", "s"), {"x1": np.ones(4, np.float32), "s": np.array([0, 2**29])}),
    "sum of two axes": (of("Add", "t", "w"), {"t": TALL, "w": WIDE}),
    "compared by two axes": (of("Less", "t", "w"), {"t": TALL, "w": WIDE}),
    "outer product": (of("MatMul", "t", "w"), {"t": TALL, "w": WIDE}),
    "gathered": (of("Gather", "x1", "p"), {"x1": np.ones((4, 2**14)), "p": np.zeros(2**14, np.int64)}),
    "chosen": (of("Where", "c", "t", "w"), {"c": np.ones((1, 1), bool), "t": TALL, "w": WIDE}),
    "doubled": (
        [node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], f"bad{i}", axis=0) for i in range(40)]
        + [node("Identity", ["d40"], ["big"])],
        {"d0": np.ones(2**10, np.float32)},
    ),
    "many": (
        [node("Neg", ["x1"], [f"d{i}"], f"bad{i}") for i in range(200)] + of("Sum", "d0", "d1"),
        {"x1": np.ones(2**20, np.float32)},
    ),
    "resized": (
        of("Resize", "x4", "", "r", mode="nearest"),
        {"x4": np.ones((1, 1, 4, 4), np.float32), "r": np.array([1, 1, 5000, 5000], np.float32)},
    ),
}


def written(path: Path, nodes: list[Any], constants: dict[str, Any]) -> Path:
    """What is made is read by the one node that takes the input, too."""
    last = [node("ReduceSum", ["big"], ["small"], keepdims=0), node("Cast", ["small"], ["f"], to=TensorProto.FLOAT)]
    return onnx_files.write(path, [*nodes, *last, node("Mul", ["x", "f"], ["y"])], {"x": ["n", 4]}, ["y"], constants)


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_the_budget_is_refused_before_it_is_taken(kind: str, tmp_path: Path) -> None:
    nodes, constants = KINDS[kind]
    path = written(tmp_path / "m.onnx", nodes, constants)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"bad.*(GB of the file's constants|makes a tensor of)") as refusal:
        load(str(path))
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 2 * budget.LEAST + 2**27


@pytest.mark.parametrize(
    ("nodes", "constants", "value"),
    [
        (of("Expand", "x1", "s"), {"x1": np.ones(1, np.float32), "s": np.array([1000])}, 1000),
        (of("Tile", "x1", "s"), {"x1": np.ones(4, np.float32), "s": np.array([100])}, 400),
        (of("Range", "a", "b", "c"), {"a": np.array(0), "b": np.array(10), "c": np.array(1)}, 45),
        (of("Gather", "x1", "p"), {"x1": np.arange(4.0), "p": np.array([3, 3])}, 6),
        (of("MatMul", "t", "w"), {"t": np.ones((3, 2), np.float32), "w": np.ones((2, 5), np.float32)}, 30),
        (of("Cast", "t", to=TensorProto.FLOAT), {"t": np.ones((2**21, 1), np.int8)}, 2**21),
    ],
)
def test_what_a_model_makes_of_its_constants_is_made(
    nodes: list[Any], constants: dict[str, Any], value: float, tmp_path: Path
) -> None:
    model = load(str(written(tmp_path / "m.onnx", nodes, constants))).model
    assert torch.equal(model(torch.ones(3, 4)), torch.full((3, 4), float(value)))


def test_a_larger_file_may_make_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST", 0)
    nodes = [node("Neg", ["w"], ["m"], "bad"), node("Abs", ["m"], ["big"], "bad")]
    load(str(written(tmp_path / "m.onnx", nodes, {"w": np.ones(1000, np.float32)})))
    with pytest.raises(InputError, match="GB of the file's constants"):
        twice = [*nodes, *(node("Neg", ["w"], [f"m{i}"], "bad") for i in range(9))]
        load(str(written(tmp_path / "m.onnx", twice, {"w": np.ones(1000, np.float32)})))
