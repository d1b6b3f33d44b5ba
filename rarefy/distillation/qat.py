"""Quantization-aware training: the form of a quantised graph that learns, and the way back (LSQ, 1902.08153).

    codes       rarefy.conv2d_codes(x, w, b, scales)                      what a graph is kept in (graph/lowering.py)
    trainable   conv2d(fake_quantize(x, s_x), fake_quantize(w, s_w), b)   w, b, s_x, s_w float parameters

Both compute the same: only the bias, a 32-bit code in the one, is not rounded in the other. The start is what
quantisation after training came to: a weight starts at the number its code stands for, so that what a learned rounding
found is kept. The way back writes the learned tensors into the graph they came from, rounded as training saw them; its
nodes are not touched, so what ran before runs afterwards.

Batch norm stays folded: a weight scale and a bias for each output channel, both learned, are what its factor and shift
would be. What is given up is its conditioning: single layers run away at a rate that training from scratch takes. So
where no rate is given it is ``LR``, and gradients are clipped to a norm of ``CLIP``. ``live_norm="yes"`` puts batch
norm back for the training and freezes its statistics late (``qat_batch_norm.py``): a little better on ResNet-20 at 4
bits, worse on a small net at 2. Zero points stay: ranges grow and shrink around zero.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from rarefy.distillation.checkpoint import digest, tensors_of
from rarefy.distillation.loop import Job, run
from rarefy.distillation.options import Training
from rarefy.distillation.qat_batch_norm import folded, put_back
from rarefy.errors import InputError, TrainingDiverged
from rarefy.graph import history
from rarefy.graph.lowering import LAYERS, is_decoded, to_numbers
from rarefy.graph.nodes import argument, arguments, attribute, device_of, finish, set_attribute
from rarefy.graph.shapes import shapes
from rarefy.kernels.int_linear import BIAS_LIMIT, CODES
from rarefy.kernels.quantize import along, dequantize, fake_quantize, quantize

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy

LR, LIVE_LR, CLIP, FREEZE = 0.01, 0.03, 1.0, 0.25  # FREEZE: share of the steps
MOMENT_BATCHES = 8  # of images, for the statistics that batch norm starts with


def trained(job: Job) -> fx.GraphModule:
    """The job's student, a quantised graph, trained in its codes and quantised again. Raises what ``loop.run``
    raises.
    """
    coded = job.student
    inner = dataclasses.replace(job, student=_learner(job), training=suited(job.training), origin=digest(coded))
    try:
        return to_codes(coded, run(inner))
    except TrainingDiverged as error:
        error.graph = to_codes(coded, error.graph)
        raise


def suited(training: Training) -> Training:
    """``training`` with the rate, the clipping and the freezing that learning in codes bears, where it gives no
    rate.
    """
    if training.lr is not None or training.optimizer != "sgd":
        return training
    live = training.live_norm == "yes"
    return dataclasses.replace(
        training,
        lr=LIVE_LR if live else LR,
        clip=training.clip or CLIP,
        freeze=training.freeze or (FREEZE if live else 0.0),
    )


def _learner(job: Job) -> fx.GraphModule:
    """The student's trainable form; with ``live_norm`` the batch norm that was folded into it is put back."""
    learner, training = to_trainable(job.student), job.training
    quantised = [record for record in history.records(job.student) if record["step"] == "quantize"]
    weights = {name for record in quantised for name in record["facts"].get("batch_norm", ())}
    if not weights or training.live_norm == "no":
        return learner
    home = device_of(learner)
    batches = job.task.data.batches(
        "train",
        min(training.batch_size, 64),
        shuffle_seed=training.seed,
        augment=True,
        device=job.device,
        labelled=training.hard_weight > 0,
    )
    inputs = (inputs for inputs, _ in itertools.islice(batches, MOMENT_BATCHES))
    return put_back(learner.to(job.device), weights, inputs).to(home)


def to_trainable(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that answers as ``graph`` does, in floats that learn. Raises InputError for codes that are no integers."""
    bits = graph.meta.get("bits", {})
    learner = to_numbers(copy.deepcopy(graph))  # training changes tensors in place
    known = shapes(learner)
    numbers: dict[fx.Node, fx.Node] = {}  # node that yields codes -> node that yields what they stand for
    for node in list(learner.graph.nodes):
        stored = is_decoded(node) and argument(node, "q").op == "get_attr"
        if node.target is OPERATORS.dequantize_fp4.default or (
            is_decoded(node) and known[argument(node, "q")].dtype.is_floating_point
        ):
            raise InputError(
                f"{node.name}: weights or activations that are floats of few bits can't be trained; "
                "quantise to integers"
            )
        if node.target is OPERATORS.quantize.default:
            numbers[node] = _activation(learner, node, known[argument(node, "x")])
        elif stored:
            _stored(learner, node, bits)
        elif is_decoded(node):
            node.replace_all_uses_with(_decoded(learner, node, numbers[argument(node, "q")]))
        elif any(source in numbers for source in node.all_input_nodes):
            numbers[node] = _moved(learner, node, numbers)
    learner.requires_grad_(True)
    return finish(learner)


def to_codes(graph: fx.GraphModule, trained: fx.GraphModule) -> fx.GraphModule:
    """``graph`` with the codes, scales and floats that ``to_trainable(graph)`` has come to by training."""
    learned = folded(trained)
    before, graph = graph, copy.deepcopy(graph)
    with torch.no_grad():
        for name, value in tensors_of(graph).items():
            if name in learned and isinstance(learned[name], nn.Parameter):
                value.copy_(_above_zero(learned[name]) if name.endswith(("_scale", ".scale")) else learned[name])
        for node in graph.graph.nodes:
            if node.target in LAYERS:
                given = arguments(node)
                scale = attribute(graph, given["weight_scale"])
                _recode(graph, given["weight"], learned, scale, 0, 0)
                _recode(graph, given["bias"], learned, attribute(graph, given["x_scale"]) * scale, 0, 0)
            elif is_decoded(node) and argument(node, "q").op == "get_attr":
                given = arguments(node)
                _recode(
                    graph, given["q"], learned, attribute(graph, given["scale"]), given["axis"], given["group"] or 0
                )
        for node in to_numbers(before).graph.nodes:  # codes that are read on another grid than they were origin on
            if is_decoded(node) and argument(node, "q").op != "get_attr":
                scale, origin = argument(node, "scale"), _scale_of(argument(node, "q"))
                if origin.target != scale.target:
                    attribute(graph, scale).copy_(attribute(graph, origin) * _ratio(before, scale, origin))
    graph.meta = {**copy.deepcopy(trained.meta), **{key: graph.meta[key] for key in ("bits",) if key in graph.meta}}
    return graph.eval()


def _activation(graph: fx.GraphModule, node: fx.Node, x: Tensor) -> fx.Node:
    """fake_quantize in place of ``quantize``. x: what it rounds."""
    given = arguments(node)
    scale, qmax = given["scale"], given["qmax"]
    _learn(graph, str(scale.target), attribute(graph, scale))
    gradient = 1 / math.sqrt(max(x[0].numel(), 1) * qmax)
    with graph.graph.inserting_before(node):
        return graph.graph.call_function(
            fake_quantize, (given["x"], scale, given["zero_point"], given["axis"], given["qmin"], qmax, gradient)
        )


def _decoded(graph: fx.GraphModule, node: fx.Node, number: fx.Node) -> fx.Node:
    """What reads the codes of ``number``: itself, or, on another grid than they were origin on, a fixed multiple."""
    scale, origin = argument(node, "scale"), _scale_of(argument(node, "q"))
    if origin.target == scale.target:
        return number
    with graph.graph.inserting_before(node):
        return graph.graph.call_function(aten.mul.Tensor, (number, _ratio(graph, scale, origin)))


def _moved(graph: fx.GraphModule, node: fx.Node, numbers: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """What moves codes moves numbers just so, and pads with 0."""
    with graph.graph.inserting_before(node):
        moved = graph.graph.node_copy(node, lambda source: numbers.get(source, source))
    if node.target is aten.pad.default:
        moved.args = (*moved.args[:3], 0.0)
    return moved


def _stored(graph: fx.GraphModule, node: fx.Node, bits: Mapping[str, int]) -> None:
    """A weight becomes a parameter that is fake-quantised, a bias one that is not; constants stay codes."""
    given = arguments(node)
    codes, scale = attribute(graph, given["q"]), attribute(graph, given["scale"])
    target = str(given["q"].target)
    name = target.removesuffix(CODES)
    number = dequantize(codes, scale, attribute(graph, given["zero_point"]), given["axis"], given["group"])
    if codes.dim():
        _learn(graph, name, number)
    else:
        set_attribute(graph, name, number)
    with graph.graph.inserting_before(node):
        parameter = graph.graph.get_attr(name)
        if codes.dim() and codes.dtype != torch.int32:
            qmin, qmax = _range(codes, bits.get(target, 8))
            _learn(graph, str(given["scale"].target), scale)
            gradient = 1 / math.sqrt(codes.numel() / max(scale.numel(), 1) * qmax)
            grid = (given["scale"], given["zero_point"], given["axis"], qmin, qmax)
            parameter = graph.graph.call_function(fake_quantize, (parameter, *grid, gradient, given["group"]))
    node.replace_all_uses_with(parameter)


def _range(codes: Tensor, bits: int) -> tuple[int, int]:
    """Codes the grid has. At 8 bits the lowest of a signed one is left out where the codes do."""
    if codes.dtype == torch.uint8:
        return 0, 2**bits - 1
    most = 2 ** (bits - 1) - 1
    return (-most if bits == 8 and int(codes.min()) >= -most else -most - 1), most


def _learn(graph: fx.GraphModule, name: str, value: Tensor) -> None:
    set_attribute(graph, name, nn.Parameter(value.detach().clone()))


def _scale_of(node: fx.Node) -> fx.Node:
    """The scale that codes were origin with, through what moves them."""
    while node.target is not OPERATORS.quantize.default:
        node = node.all_input_nodes[0]
    scale: fx.Node = argument(node, "scale")
    return scale


def _ratio(graph: fx.GraphModule, scale: fx.Node, other: fx.Node) -> float:
    return float(attribute(graph, scale).detach() / attribute(graph, other).detach())


def _above_zero(scale: Tensor) -> Tensor:
    return scale.detach().abs().clamp_min(1e-12)  # a grid that is symmetric around 0 is the same with -s


def _recode(
    graph: fx.GraphModule, node: fx.Node, learned: Mapping[str, Tensor], scale: Tensor, axis: int | None, group: int
) -> None:
    """The codes of the learned numbers of that name, if there are."""
    target = str(node.target)
    value = learned.get(target.removesuffix(CODES))
    if not isinstance(value, nn.Parameter) or not target.endswith(CODES):
        return
    codes = attribute(graph, node)
    if codes.dtype == torch.int32:
        steps = value.double() / along(scale, codes, axis, group).double()
        codes.copy_(torch.round(steps).clamp_(-BIAS_LIMIT, BIAS_LIMIT))
        return
    qmin, qmax = _range(codes, graph.meta.get("bits", {}).get(target, 8))
    # an integer layer's weights have no zero point
    decoded = next((user for user in node.users if is_decoded(user)), None)
    none = torch.zeros((), dtype=torch.int8, device=codes.device)
    zero = attribute(graph, argument(decoded, "zero_point")) if decoded is not None else none
    codes.copy_(quantize(value.detach(), scale, zero, axis, qmin, qmax, codes.dtype, group))
