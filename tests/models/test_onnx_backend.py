"""The onnx package's own tests of nodes: every operator of the table in all the forms that the standard shows."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from rarefy.errors import RarefyError
from rarefy.models.onnx import file, network
from rarefy.models.onnx.file import ROWS

# Right by PyTorch's rules where the standard says more: equal numbers in TopK's order, the largest of nothing; and by
# ONNX Runtime's: with align_corners it counts the pixels of the result, the standard's cases parts of them.
OTHERWISE = (
    "test_top_k_same_values", "test_reduce_max_empty_set", "test_reduce_min_empty_set",
    "test_resize_downsample_scales_linear_align_corners", "test_resize_downsample_scales_cubic_align_corners",
)  # fmt: skip
PLAIN = [np.dtype(one) for one in ("float32", "float64", "int64", "int32", "int8", "uint8", "bool")]


def answered(model: Any, inputs: list[Any], outputs: list[Any]) -> bool:
    """Without the batch that ``settle`` looks for: these nodes have none. Inputs that are settings become constants."""
    graph, named = model.graph, {info.name: value for info, value in zip(model.graph.input, inputs)}
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    for node in graph.node:
        if node.op_type in ROWS:
            row = ROWS[node.op_type]
            held = {*row.settings, *(place for place, role in enumerate(row.stored) if place and role)}
            constants |= {name: named[name] for place, name in enumerate(node.input) if place in held and name in named}
    live = {name: value for name, value in named.items() if name not in constants}
    net = network.Network(list(live), [info.name for info in graph.output])
    opset = next(one.version for one in model.opset_import if one.domain == "")
    steps, folded = file._steps(onnx, graph, opset, list(live), constants, Path("case"))
    steps = network.needed(network.join_bias(steps, folded, net.output_names), net.output_names)
    net.constants = {name: folded[name] for name in net.output_names if name in folded}
    network.assemble(net, steps, folded)
    with torch.no_grad():
        found = net.eval()(*(torch.from_numpy(np.array(value)) for value in live.values()))
    for mine, its in zip(found if isinstance(found, tuple) else (found,), outputs, strict=True):
        np.testing.assert_allclose(mine.numpy(), its, rtol=1e-3, atol=1e-5)
        assert mine.shape == its.shape and mine.numpy().dtype == its.dtype
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_standards_own_cases() -> None:
    from onnx.backend.test.case.node import collect_testcases

    told: Counter[str] = Counter()
    wrong = []
    for case in collect_testcases(None):
        inputs, outputs = case.data_sets[0]
        kinds = {node.op_type for node in case.model.graph.node} - {"Constant"}
        tensors = all(isinstance(one, (np.ndarray, np.generic)) and one.dtype in PLAIN for one in (*inputs, *outputs))
        if not kinds <= set(ROWS) or any(node.domain for node in case.model.graph.node) or not tensors:
            continue
        if "training" in case.name and "dropout" in case.name:
            continue  # at random
        told["cases"] += 1
        try:
            with contextlib.suppress(RarefyError):  # a form that is refused in a line
                told["answered"] += answered(case.model, inputs, outputs)
        except Exception as error:
            if not case.name.startswith(OTHERWISE):
                wrong.append(f"{case.name}: {error}"[:200])
    assert not wrong, "\n".join(wrong)
    assert told["answered"] >= 950 and told["answered"] >= 0.85 * told["cases"], told
