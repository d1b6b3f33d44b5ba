"""compare(): do the graph in PyTorch and the file in its runtime give the same answers, and which layer is the first to differ?

Each value that the model rounds is read out of the runtime and compared in codes. The simulation goes on from the runtime's codes after each
of them, so that a difference is that of one layer, and not of all before it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.graph.lowering import LAYERS, to_integers
from rarefy.system.dependencies import needs

LEAST_AGREEMENT = 0.995
APART = 0.01  # 20 dB
_SCALE: dict[Any, int] = {
    torch.ops.rarefy.quantize.default: 1,
    **{
        getattr(torch.ops.rarefy, name).default: -5
        for name in ("conv2d_codes", "linear_codes", "add", "mul", "mean", "avg_pool2d")
    },
}  # makes codes: place of their scale


def compare(
    written: fx.GraphModule,
    path: str | os.PathLike[str],
    inputs: Tensor,
    open_file: Callable[[Path], Any],
    batch: int = 32,
    decoded: bool = False,
) -> dict[str, Any]:
    """Parity of a graph and the ONNX file it was ``written`` to (its layers as numbers), which ``open_file`` makes a session of.

    decoded: read the numbers that codes stand for out of the runtime, where reading the codes would change what it makes of the file.

    agreement: share of the inputs with equal most likely classes; of an output that is no (N, classes), and of each of several, with a squared difference of at most ``APART`` of its variance. largest_difference: of all outputs. layers: what each rounded value differs by in units of
    the last place (codes) when both start from the file's own inputs of that layer, and the share of codes that differ; ulp: the
    largest of them. unread: values that the runtime gives in another shape (it moved a padding before them), which are not compared; only if there are any.
    first_diverging_layer: the first by more than one unit, which rounding a sum in another order can't explain.
    passed: agreement of at least 99.5 % and no such layer.
    """
    onnx = needs("onnx")
    model = onnx.load(os.fspath(path))
    seen_by_file = _values_in(model, "DequantizeLinear" if decoded else "QuantizeLinear")
    graph = to_integers(written)
    codes = coded(graph)
    shared = [name for name in codes if name in seen_by_file]
    steps = _grids_in(onnx, model, {seen_by_file[name] for name in shared})
    for name in shared:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(seen_by_file[name]))
    with tempfile.TemporaryDirectory() as folder:
        tapped = Path(folder) / "tapped.onnx"
        tapped.write_bytes(model.SerializeToString())
        session = open_file(tapped)

    def run(part: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        found = session.outputs(part)
        count = len(found) - len(shared)
        return found[:count], {
            name: _encoded(value, *steps[seen_by_file[name]]).to(codes[name].args[-1]) if decoded else value
            for name, value in zip(shared, found[count:], strict=True)
        }

    return against(graph, shared, run, inputs, batch)


def coded(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Name of each rounded value -> the first node of ``graph`` (its layers integer) that makes its codes, in order."""
    found = {_value_name(node): node for node in reversed(list(graph.graph.nodes)) if node.target in _SCALE}
    return {name: found[name] for name in reversed(found)}


def against(
    graph: fx.GraphModule,
    shared: Sequence[str],
    run: Callable[[Tensor], tuple[list[Tensor], dict[str, Tensor]]],
    inputs: Tensor,
    batch: int = 32,
) -> dict[str, Any]:
    """What ``compare`` returns, of a graph (layers integer) and a runtime: ``run`` gives its answers, and the codes of the ``shared`` values by their name."""
    codes = coded(graph)
    tally: dict[str, list[int]] = {}
    same = 0
    largest = 0.0
    for part in inputs.split(batch):
        theirs, read = run(part)
        runtime_codes = {codes[name]: value for name, value in read.items()}
        with torch.no_grad():
            answers = [value for value in tree_leaves(graph(part)) if isinstance(value, Tensor)]
            for name, difference in _Following(graph, runtime_codes).differences(part):
                entry = tally.setdefault(name, [0, 0, 0])
                entry[0] = max(entry[0], int(difference.max()))
                entry[1] += int((difference > 0).sum())
                entry[2] += difference.numel()
        largest = max(largest, *(float((one - other).abs().max()) for one, other in zip(answers, theirs, strict=True)))
        agree = [_agree(one, other, len(answers) > 1) for one, other in zip(answers, theirs, strict=True)]
        same += int(torch.stack(agree).all(0).sum())
    stacks = {name: _layer(codes[name]) for name in tally}
    layers: list[dict[str, Any]] = [
        {"name": stacks[name], "value": name, "difference": entry[0], "share": entry[1] / max(entry[2], 1)}
        for name, entry in tally.items()
    ]
    first = next((layer["name"] for layer in layers if layer["difference"] > 1), None)
    unread = [name for name in shared if name not in tally]
    agreement = same / len(inputs)
    return {
        "agreement": agreement,
        "samples": len(inputs),
        "largest_difference": largest,
        "ulp": max((layer["difference"] for layer in layers), default=0),
        "first_diverging_layer": first,
        "layers": layers,
        "passed": agreement >= LEAST_AGREEMENT and first is None,
        **({"unread": unread} if unread else {}),
    }


def _agree(ours: Tensor, theirs: Tensor, close: bool) -> Tensor:
    """(N,) bool. close: of (N, classes) too, not only the most likely one must be the same."""
    if ours.dim() < 2 or ours[0].numel() == 1:
        ours, theirs = ours.reshape(-1).double(), theirs.reshape(-1).double()
        return (ours - theirs).abs() <= APART * ours.abs().clamp_min(ours.abs().mean())
    same = ours.argmax(1) == theirs.argmax(1) if ours.dim() == 2 else torch.ones(len(ours), dtype=torch.bool)
    if ours.dim() == 2 and not close:
        return same
    ours, theirs = ours.flatten(1).double(), theirs.flatten(1).double()
    floor = torch.finfo(torch.float32).eps * ours.square().mean(1)
    return same & ((ours - theirs).square().mean(1) <= APART * ours.var(1, correction=0) + floor)


def _grids_in(onnx: Any, model: Any, made: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each tensor in ``made``, which DequantizeLinear yields: scale and zero point, which may be finer than those of its codes' making."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in made:
            scale, *zero = (torch.tensor(onnx.numpy_helper.to_array(stored[name])) for name in node.input[1:])
            found[node.output[0]] = scale, zero[0].float() if zero else torch.zeros(())
    return found


def _encoded(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The codes that ``values`` were decoded from."""
    return torch.round(values / scale + zero)


def _layer(node: fx.Node) -> str:
    """The module that made what ``node`` rounds; where a function did, the layer it follows."""
    name = _value_name(node)
    while node.op == "call_function":
        if node.target in LAYERS:
            return str(node.args[1].target).rpartition(".")[0] or name
        if node.meta.get("stack"):
            return str(node.meta["stack"])
        sources = [source for source in node.all_input_nodes if source.op == "call_function"]
        if len(sources) != 1:
            break
        node = sources[0]
    return name


class _Following(fx.Interpreter):
    """Runs a graph, but goes on from the runtime's codes after each rounded value, so that a difference is one layer's own."""

    def __init__(self, graph: fx.GraphModule, codes: dict[fx.Node, Tensor]):
        super().__init__(graph)
        self.codes = codes
        self.found: list[tuple[str, Tensor]] = []

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        theirs = self.codes.get(node)
        if theirs is None or theirs.shape != value.shape:
            return value
        self.found.append((_value_name(node), (value.to(torch.int32) - theirs.to(torch.int32)).abs()))
        return torch.empty_like(value).copy_(theirs)  # laid out as the graph's own, which a view may hang on

    def differences(self, inputs: Tensor) -> list[tuple[str, Tensor]]:
        self.run(inputs)
        return self.found


def _value_name(node: fx.Node) -> str:
    """``conv2d_3`` for the node that quantises with ``quantization.conv2d_3.scale``."""
    return str(node.args[_SCALE[node.target]].target).split(".")[1]


def _values_in(model: Any, kind: str) -> dict[str, str]:
    """Value name -> the first tensor that a node of ``kind`` makes with its scale; codes once they are clipped, where the grid ends before the type."""
    clipped = {
        node.input[0]: node.output[0]
        for node in model.graph.node
        if node.op_type == "Clip" and kind == "QuantizeLinear"
    }
    found: dict[str, str] = {}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == kind and node.input[1].startswith("quantization.") and node.input[0] not in constants:
            found.setdefault(node.input[1].split(".")[1], clipped.get(node.output[0], node.output[0]))
    return found
