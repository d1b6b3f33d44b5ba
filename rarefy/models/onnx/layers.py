"""Rows of the layers with weights: convolutions, linear layers, normalisations, recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.graph.nodes import Value
from rarefy.models.onnx.step import Row, Step

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def pads(step: Step, sizes: Sequence[Value], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Zeros before and after each axis of the plane, from ``pads`` or ``auto_pad``. sizes: of the plane."""
    rank = len(kernel)
    stride, dilation = step.get("strides", [1] * rank), step.get("dilations", [1] * rank)
    auto = step.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        given = step.get("pads", [0] * (2 * rank))
        if len(given) != 2 * rank:
            raise step.refuse(f"{len(given)} pads for {rank} axes", "the file is damaged; export it again")
        return list(given[:rank]), list(given[rank:])
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if not all(isinstance(size, int) for size in sizes):
        raise step.refuse(f"auto_pad={auto} on sizes that are free", "fix the size of the input")
    totals = [
        max((-(-size // jump) - 1) * jump + (side - 1) * gap + 1 - size, 0)
        for size, side, jump, gap in zip(sizes, kernel, stride, dilation)
    ]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """The last axes with so many values around them."""
    around = [side for pair in zip(reversed(before), reversed(after)) for side in pair]
    return F.pad(x, around, value=value) if any(around) else x


def _convolution(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    if rank not in _CONVOLUTIONS:
        raise step.refuse(f"a convolution over {rank} axes")
    before, after = pads(step, x.shape[2:], weight.shape[2:])
    places = step.get("strides", [1] * rank), step.get("dilations", [1] * rank), step.get("group", 1)
    if before != after:
        x, before = padded(x, before, after), [0] * rank
    return _CONVOLUTIONS[rank](x, weight, bias, places[0], before, *places[1:])


def _transposed(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    if rank not in _TRANSPOSED:
        raise step.refuse(f"a convolution over {rank} axes")
    ones = [1] * rank
    stride, dilation, group = step.get("strides", ones), step.get("dilations", ones), step.get("group", 1)
    extra = step.get("output_padding", [0] * rank)
    whole = [
        jump * (size - 1) + more + (side - 1) * gap + 1
        for jump, size, more, side, gap in zip(stride, x.shape[2:], extra, weight.shape[2:], dilation)
    ]
    auto = step.get("auto_pad", "NOTSET")
    shape: list[int] = step.get("output_shape", [])
    if shape or auto.startswith("SAME"):
        wanted = shape[-rank:] if shape else [size * jump for size, jump in zip(x.shape[2:], stride)]
        totals = [max(one - two, 0) for one, two in zip(whole, wanted)]
        extra = [more + max(two - one, 0) for more, one, two in zip(extra, whole, wanted)]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
    else:
        before, after = pads(step, x.shape[2:], weight.shape[2:])
    if before == after:
        return _TRANSPOSED[rank](x, weight, bias, stride, before, extra, group, dilation)
    shift = [max(more - jump + 1, more - gap + 1, 0) if more else 0 for more, jump, gap in zip(extra, stride, dilation)]
    if any(shift):
        raise step.refuse("output_padding of a stride or more")
    y = _TRANSPOSED[rank](x, weight, bias, stride, 0, extra, group, dilation)
    for axis, (low, high) in enumerate(zip(before, after), 2):
        y = y.narrow(axis, low, y.shape[axis] - low - high)
    return y


def _gemm(step: Step, x: Tensor, weight: Tensor, bias: Value = None) -> Tensor:
    """``weight`` is (out, in) already where it is stored."""
    if step.get("transA", 0):
        x = x.t()
    alpha, beta = step.get("alpha", 1.0), step.get("beta", 1.0)
    weight = weight if step.get("transB", 0) or step.stored_turned else weight.t()
    if alpha == 1 and (bias is None or (beta == 1 and bias.dim() == 1 and len(bias) == weight.shape[0])):
        return F.linear(x, weight, bias)
    y = F.linear(x, weight) * alpha
    return y if bias is None else y + bias * beta


def _turned(step: Step, name: str, value: np.ndarray) -> np.ndarray:
    if name != "weight" or step.get("transB", 0) or value.ndim != 2:
        return value.reshape(-1) if name == "bias" and value.ndim == 2 and value.shape[0] == 1 else value
    step.stored_turned = True
    return value.T


def _matmul(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias) if step.stored_turned else torch.matmul(x, weight)


def _batch_norm(step: Step, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if step.get("training_mode", 0) or not step.get("spatial", 1):
        raise step.refuse("batch norm in training mode", "export the model in eval mode")
    momentum = 1 - step.get("momentum", 0.9)
    return F.batch_norm(x, mean, variance, weight, bias, step.training, momentum, step.get("epsilon", 1e-5))


def _layer_norm(step: Step, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    sizes = list(x.shape[step.axis(x.dim(), -1) :])
    epsilon = step.get("epsilon", 1e-5)
    if all(one is None or list(one.shape) == sizes for one in (weight, bias)):
        return F.layer_norm(x, sizes, weight, bias, epsilon)
    y = F.layer_norm(x, sizes, eps=epsilon)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(step: Step, x: Tensor, weight: Tensor) -> Tensor:
    sizes = list(x.shape[step.axis(x.dim(), -1) :])
    epsilon = step.get("epsilon", 1e-5)
    if list(weight.shape) == sizes:
        return F.rms_norm(x, sizes, weight, epsilon)
    return F.rms_norm(x, sizes, eps=epsilon) * weight


def _group_norm(step: Step, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups, channels = step.get("num_groups", 1), x.shape[1]
    if len(weight) != channels:  # before opset 21, one number a group
        weight, bias = (one.repeat_interleave(channels // groups) for one in (weight, bias))
    return F.group_norm(x, groups, weight, bias, step.get("epsilon", 1e-5))


def _local_response(step: Step, x: Tensor) -> Tensor:
    size = step.get("size", 1)
    if size % 2 == 0:
        raise step.refuse(f"LRN over {size} channels")
    return F.local_response_norm(x, size, step.get("alpha", 1e-4), step.get("beta", 0.75), step.get("bias", 1.0))


def _lp_normalization(step: Step, x: Tensor) -> Tensor:
    return F.normalize(x, step.get("p", 2), step.axis(x.dim(), -1))


def _mean_variance(step: Step, x: Tensor) -> Tensor:
    axes = step.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


def _einsum(step: Step, *inputs: Tensor) -> Tensor:
    return torch.einsum(step.get("equation", ""), *inputs)


# For each of PyTorch's gates, which one of ONNX's it is: (i, f, g, o) of i, o, f, c; (r, z, n) of z, r, h.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _store(step: Step, name: str, value: np.ndarray) -> dict[str, np.ndarray] | np.ndarray:
    """(directions, gates * hidden, ...) -> one tensor a direction, as ``torch.nn.LSTM`` names them."""
    gates = _GATES[step.kind]
    if value.ndim < 2 or value.shape[1] % len(gates) or name not in ("weight_ih", "weight_hh", "bias"):
        return value
    found: dict[str, np.ndarray] = {}
    halves = {"bias_ih": 0, "bias_hh": 1} if name == "bias" else {name: 0}
    for direction, part in enumerate(value):
        parts = part.reshape(len(halves) * len(gates), -1, *part.shape[1:])
        for key, half in halves.items():
            chosen = parts[[half * len(gates) + gate for gate in gates]]
            found[f"{key}_l0{'_reverse' if direction else ''}"] = chosen.reshape(-1, *part.shape[1:])
    return found


def _recurrent(
    step: Step,
    x: Tensor,
    weights: Sequence[Tensor],
    recurrent: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    lengths: Value = None,
    hidden: Value = None,
    cell: Value = None,
    peephole: Value = None,
) -> tuple[Tensor, ...]:
    kind, direction, count = step.kind, step.get("direction", "forward"), len(weights)
    _check(step, direction, count, lengths, peephole)
    if step.get("layout", 0):
        x = x.transpose(0, 1)
    if direction == "reverse":
        x = x.flip(0)
    size = recurrent[0].shape[1]
    starts = [_start(step, state, x, count, size) for state in ((hidden, cell) if kind == "LSTM" else (hidden,))]
    parameters: list[Tensor] = []
    for index in range(count):
        parameters += [weights[index], recurrent[index]]
        if biases is not None:
            parameters += [biases[2 * index], biases[2 * index + 1]]
    settings = (parameters, biases is not None, 1, 0.0, step.training, count == 2, False)
    if kind == "LSTM":
        y, *last = torch.lstm(x, starts, *settings)
    elif kind == "GRU":
        y, *last = torch.gru(x, starts[0], *settings)
    else:
        y, *last = torch.rnn_tanh(x, starts[0], *settings)
    if direction == "reverse":
        y = y.flip(0)
    y = y.reshape(*y.shape[:2], count, size)
    if step.get("layout", 0):
        return y.transpose(0, 1), *(one.transpose(0, 1) for one in last)
    return y.permute(0, 2, 1, 3), *last


def _start(step: Step, state: Value, x: Tensor, count: int, size: int) -> Tensor:
    """(directions, batch, hidden): zeros where there is none; one state may stand for the whole batch."""
    if state is None:
        return x.new_zeros(count, x.shape[1], size)
    state = state.transpose(0, 1) if step.get("layout", 0) else state
    found: Tensor = state.expand(count, x.shape[1], size)
    return found


def _check(step: Step, direction: str, count: int, lengths: Value, peephole: Value) -> None:
    if lengths is not None or peephole is not None or step.get("clip", 0) or step.get("input_forget", 0):
        raise step.refuse(f"{step.kind} with lengths of sequences, peepholes, clip or input_forget")
    wanted = _ACTIVATIONS[step.kind] * count
    if [name.lower() for name in step.get("activations", wanted)] != [name.lower() for name in wanted]:
        raise step.refuse(f"{step.kind} with other activations than {', '.join(wanted)}")
    if step.kind == "GRU" and not step.get("linear_before_reset", 0):
        raise step.refuse("GRU with linear_before_reset=0", "export it from PyTorch, or with reset_after=True")


_PAIR = ("", "weight", "bias")
ROWS = {
    "Conv": Row(_convolution, stored=_PAIR),
    "ConvTranspose": Row(_transposed, stored=_PAIR),
    "Gemm": Row(_gemm, stored=_PAIR, store=_turned),
    "MatMul": Row(_matmul, stored=_PAIR, store=_turned),
    "BatchNormalization": Row(_batch_norm, stored=(*_PAIR, "running_mean", "running_var")),
    "InstanceNormalization": Row(
        lambda s, x, weight, bias: F.instance_norm(x, weight=weight, bias=bias, eps=s.get("epsilon", 1e-5)),
        stored=_PAIR,
    ),
    "LayerNormalization": Row(_layer_norm, stored=_PAIR),
    "RMSNormalization": Row(_rms_norm, stored=_PAIR[:2]),
    "GroupNormalization": Row(_group_norm, stored=_PAIR),
    "LRN": Row(_local_response),
    "LpNormalization": Row(_lp_normalization),
    "MeanVarianceNormalization": Row(_mean_variance),
    "Einsum": Row(_einsum),
    **{kind: Row(_recurrent, stored=("", "weight_ih", "weight_hh", "bias"), store=_store) for kind in _GATES},
}
