"""Quantization-aware training: the form of a quantised graph that learns, and the way back. Learned step sizes (LSQ, 1902.08153).

codes       rarefy.conv2d_codes(x, w, b, scales)                   the form a graph is kept in (``lowering.py``)
trainable   conv2d(fake_quantize(x, s_x), fake_quantize(w, s_w), b)   w, b, s_x, s_w float parameters

Both compute the same: only the bias, a 32-bit code in the one, is not rounded in the other. The start is what quantisation after training came to:
a weight starts at the number its code stands for, so that what a learned rounding found is kept. The way back writes the learned tensors into
the graph they came from, rounded as training saw them; its nodes are not touched, so what ran before runs afterwards.

Batch norm stays folded: a weight scale and a bias for each output channel, both learned, are what its factor and shift would be. What is given up is its conditioning: single layers
run away at a rate that training from scratch takes. So where no rate is given it is ``LR``, and gradients are clipped to a norm of ``CLIP``. ``live_norm="yes"`` puts batch norm back for the
training and freezes its statistics late (``normalizing.py``): a little better on ResNet-20 at 4 bits, worse on a small net at 2.
Zero points stay: ranges grow and shrink around zero.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

import rarefy.kernels
from rarefy.distillation.options import Training
from rarefy.distillation.qat_batch_norm import folded
from rarefy.errors import InputError
from rarefy.graph.lowering import LAYERS, is_decoded, to_numbers
from rarefy.graph.nodes import attribute, finish, set_attribute
from rarefy.graph.shapes import shapes
from rarefy.kernels.int_linear import BIAS_LIMIT, CODES
from rarefy.kernels.quantize import along, fake_quantize, quantize

aten = torch.ops.aten

OPERATORS = torch.ops.rarefy

LR, LIVE_LR, CLIP, FREEZE = 0.01, 0.03, 1.0, 0.25  # FREEZE: share of the steps


def is_quantized(model: Any) -> bool:
    """Does the graph compute on codes?"""
    return isinstance(model, fx.GraphModule) and any(
        node.target in rarefy.kernels.OPERATORS for node in model.graph.nodes
    )


def to_trainable(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that answers as ``graph`` does, in floats that learn. Raises InputError for codes that are no integers."""
    bits = graph.meta.get("bits", {})
    learns = to_numbers(copy.deepcopy(graph))  # training changes tensors in place
    found = shapes(learns)
    numbers: dict[fx.Node, fx.Node] = {}  # node that yields codes -> node that yields what they stand for
    for node in list(learns.graph.nodes):
        if node.target is OPERATORS.dequantize_fp4.default or (
            is_decoded(node) and found[node.args[0]].dtype.is_floating_point
        ):
            raise InputError(
                f"{node.name}: weights or activations that are floats of few bits can't be trained; quantise to integers"
            )
        if node.target is OPERATORS.quantize.default:
            numbers[node] = _activation(learns, node, found[node.args[0]])
        elif is_decoded(node) and node.args[0].op == "get_attr":
            _stored(learns, node, bits)
        elif is_decoded(node):
            source, scale = node.args[:2]
            number, own = numbers[source], _scale_of(source)
            if (
                own.target != scale.target
            ):  # the codes are read on another grid, a fixed share of the one they were made on
                with learns.graph.inserting_before(node):
                    number = learns.graph.call_function(aten.mul.Tensor, (number, _ratio(learns, scale, own)))
            node.replace_all_uses_with(number)
        elif any(
            source in numbers for source in node.all_input_nodes
        ):  # moves codes: moves numbers just so, and pads with 0
            with learns.graph.inserting_before(node):
                moved = learns.graph.node_copy(node, lambda source: numbers.get(source, source))
            if node.target is aten.pad.default:
                moved.args = (*moved.args[:3], 0.0)
            numbers[node] = moved
    learns.requires_grad_(True)
    return finish(learns)


def to_codes(graph: fx.GraphModule, trained: fx.GraphModule) -> fx.GraphModule:
    """``graph`` with the codes, scales and floats that ``to_trainable(graph)`` has come to by training."""
    learned = folded(trained)
    before = graph
    graph = copy.deepcopy(before)
    own = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    with torch.no_grad():
        for name, value in own.items():
            if name in learned and isinstance(learned[name], nn.Parameter):
                value.copy_(_positive(learned[name]) if _is_scale(name) else learned[name])
        for node in graph.graph.nodes:
            if node.target in LAYERS:
                _, weight, bias, scale, _, weight_scale = node.args[:6]
                _recode(graph, weight, learned, attribute(graph, weight_scale), 0, 0)
                _recode(graph, bias, learned, attribute(graph, scale) * attribute(graph, weight_scale), 0, 0)
            elif is_decoded(node) and node.args[0].op == "get_attr":
                _recode(
                    graph, node.args[0], learned, attribute(graph, node.args[1]), node.args[3], (*node.args[4:5], 0)[0]
                )
        numbers = to_numbers(before)
        for node in numbers.graph.nodes:  # codes that are read on another grid than they were made on
            if (
                is_decoded(node)
                and node.args[0].op != "get_attr"
                and (source := _scale_of(node.args[0])).target != node.args[1].target
            ):
                attribute(graph, node.args[1]).copy_(attribute(graph, source) * _ratio(before, node.args[1], source))
    graph.meta = {**copy.deepcopy(trained.meta), **{key: graph.meta[key] for key in ("bits",) if key in graph.meta}}
    return graph.eval()


def suited(training: Training) -> Training:
    """``training`` with the rate, the clipping and the freezing that learning in codes bears, where it gives no rate."""
    if training.lr is not None or training.optimizer != "sgd":
        return training
    live = training.live_norm == "yes"
    return dataclasses.replace(
        training,
        lr=LIVE_LR if live else LR,
        clip=training.clip or CLIP,
        freeze=training.freeze or (FREEZE if live else 0.0),
    )


def _activation(graph: fx.GraphModule, node: fx.Node, x: Tensor) -> fx.Node:
    """fake_quantize in place of ``quantize``."""
    source, scale, zero, axis, qmin, qmax = cast(Any, node.args[:6])
    _learn(graph, str(scale.target), attribute(graph, scale))
    gradient = 1 / math.sqrt(max(x[0].numel(), 1) * qmax)
    with graph.graph.inserting_before(node):
        return graph.graph.call_function(fake_quantize, (source, scale, zero, axis, qmin, qmax, gradient))


def _stored(graph: fx.GraphModule, node: fx.Node, bits: dict[str, int]) -> None:
    """A weight becomes a parameter that is fake-quantised, a bias one that is not; constants stay codes."""
    codes_node, scale_node, zero_node, axis, *rest = node.args
    assert isinstance(codes_node, fx.Node) and isinstance(scale_node, fx.Node) and isinstance(zero_node, fx.Node)
    codes, scale = attribute(graph, codes_node), attribute(graph, scale_node)
    name = str(codes_node.target).removesuffix(CODES)
    number = node.target(*(attribute(graph, source) for source in node.args[:3]), *node.args[3:])  # type: ignore[operator]
    if codes.dim():
        _learn(graph, name, number)
    else:
        set_attribute(graph, name, number)
    with graph.graph.inserting_before(node):
        parameter = graph.graph.get_attr(name)
        if codes.dim() and codes.dtype != torch.int32:
            qmin, qmax = _range(codes, bits.get(str(codes_node.target), 8))
            _learn(graph, str(scale_node.target), scale)
            gradient = 1 / math.sqrt(codes.numel() / max(scale.numel(), 1) * qmax)
            parameter = graph.graph.call_function(
                fake_quantize, (parameter, scale_node, zero_node, axis, qmin, qmax, gradient, *rest)
            )
    node.replace_all_uses_with(parameter)


def _range(codes: Tensor, bits: int) -> tuple[int, int]:
    """Codes the grid has. At 8 bits the lowest of a signed one is left out where the codes do."""
    if codes.dtype == torch.uint8:
        return 0, 2**bits - 1
    most = 2 ** (bits - 1) - 1
    return (-most if bits == 8 and int(codes.min()) >= -most else -most - 1), most


def _learn(graph: fx.GraphModule, name: str, value: Tensor) -> None:
    set_attribute(graph, name, nn.Parameter(value.detach().clone()))


def _scale_of(node: Any) -> Any:
    """The scale that codes were made with, through what moves them."""
    while node.target is not OPERATORS.quantize.default:
        node = node.args[0]
    return node.args[1]


def _ratio(graph: fx.GraphModule, scale: Any, own: Any) -> float:
    return float(attribute(graph, scale).detach() / attribute(graph, own).detach())


def _is_scale(name: str) -> bool:
    return name.endswith(("_scale", ".scale"))


def _positive(scale: Tensor) -> Tensor:
    return scale.detach().abs().clamp_min(1e-12)  # a grid that is symmetric around 0 is the same with -s


def _recode(
    graph: fx.GraphModule, node: Any, learned: dict[str, Tensor], scale: Tensor, axis: int | None, group: int
) -> None:
    """The codes of the learned numbers of that name, if there are."""
    value = learned.get(str(node.target).removesuffix(CODES))
    codes = attribute(graph, node)
    if not isinstance(value, nn.Parameter) or not str(node.target).endswith(CODES):
        return
    if codes.dtype == torch.int32:
        codes.copy_(
            torch.round(value.double() / along(scale, codes, axis, group).double()).clamp_(-BIAS_LIMIT, BIAS_LIMIT)
        )
        return
    qmin, qmax = _range(codes, graph.meta.get("bits", {}).get(str(node.target), 8))
    zero = _zero_of(graph, node)
    codes.copy_(quantize(value.detach(), scale, zero, axis, qmin, qmax, codes.dtype, group))


def _zero_of(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """Zero point of stored codes: an integer layer's weights have none."""
    decoded = next((user for user in node.users if is_decoded(user)), None)
    return (
        attribute(graph, decoded.args[2])
        if decoded is not None
        else torch.zeros((), dtype=torch.int8, device=attribute(graph, node).device)
    )
