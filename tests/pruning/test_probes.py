"""Axes an operator treats alike: computed on a part of them, it yields that part of the result."""

from __future__ import annotations

from typing import Any

import torch
from networks import EveryShape
from torch import Tensor, fx, nn

from rarefy.graph.capture import capture
from rarefy.graph.nodes import attribute, example_inputs, operator_name
from rarefy.pruning.self_check.probes import alike, lengths, sources_of


def test_a_part_of_the_axes_gives_that_part_of_the_result() -> None:
    torch.manual_seed(0)
    graph = capture(EveryShape().eval(), torch.randn(2, 3, 5, 6))
    values: dict[fx.Node, Any] = {}
    inputs = iter(example_inputs(graph, 2))
    seen: set[str] = set()

    def called(node: fx.Node, arguments: list[Any], groups: int | None = None) -> Any:
        waiting = iter(arguments)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(waiting))
        args, kwargs = (args, kwargs) if groups is None else (args[:6], {**kwargs, "groups": groups})
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = False if node.target == "training" else attribute(graph, str(node.target))
            elif node.op == "call_function":
                own = [values[source] for source in sources_of(node)]
                values[node] = called(node, own)
                results = values[node] if isinstance(values[node], (list, tuple)) else [values[node]]
                if not isinstance(results[0], Tensor):
                    continue
                shapes = [tuple(one.shape) if isinstance(one, Tensor) else None for one in own]
                for run in alike(node, shapes, tuple(results[0].shape)):
                    if run.sized or any(isinstance(one, (list, tuple)) for one in own):
                        continue
                    part = list(own)
                    for place, axis in run.sources.items():
                        part[place] = own[place].narrow(
                            axis, 0, own[place].shape[axis] // run.groups if run.groups else 1
                        )
                    made = called(node, part, 1 if run.groups else None)
                    for one, full in zip(made if isinstance(made, (list, tuple)) else [made], results, strict=True):
                        length = full.shape[run.result] // run.groups if run.groups else 1
                        torch.testing.assert_close(one, full.narrow(run.result, 0, length), rtol=1e-5, atol=1e-6)
                    seen.add("groups" if run.groups else operator_name(node))
    assert {
        "linear",
        "layer_norm",
        "batch_norm",
        "gelu",
        "add",
        "permute",
        "cat",
        "softmax",
        "einsum",
        "matmul",
        "slice",
        "conv2d",
    } <= seen
    assert {"scaled_dot_product_attention", "adaptive_avg_pool2d", "groups"} <= seen


def test_lengths_bring_every_tensor_below_the_limit() -> None:
    graph = capture(nn.Linear(300, 400), torch.randn(2, 500, 300))
    node = next(node for node in graph.graph.nodes if operator_name(node) == "linear")
    shapes, result = [(1, 500, 300), (400, 300), (400,)], (1, 500, 400)
    sizes = [list(shape) for shape in (*shapes, result)]
    for run, length in lengths(alike(node, shapes, result), shapes, result, 20_000):
        for place, axis in {**run.sources, 3: run.result}.items():
            sizes[place][axis] = length
    assert all(torch.Size(size).numel() < 20_000 + 400 for size in sizes)  # rounded up to a whole row
    assert sizes[1][0] >= 32
