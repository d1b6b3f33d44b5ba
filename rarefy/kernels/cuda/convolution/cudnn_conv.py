"""Convolution on codes by cuDNN's graph API: convolution, scale, bias, residual, activation and rounding in one kernel.

    y = sum F + B    (+ r R)    (swish(y) / s + z)    -> int8, nearest, saturated

F, B: float32 of each output channel, in steps of the result's grid, its zero point in B. What there is (backend 9.19,
Hopper): signed codes, one group, zeros as padding, multiples of 4 channels; the first plan of its heuristics is often
half as fast as the best of them, so that all are tried (``timing``). What has none raises ``cudnn``'s own error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import cudnn
import torch
from torch import Tensor

from rarefy.kernels.cuda.convolution.epilogue import Result
from rarefy.kernels.cuda.convolution.int8_conv import Places
from rarefy.kernels.cuda.convolution.timing import Launch, Make

MOST = 16  # plans that are tried
PREFIX = "cudnn "


def fits(weight: Tensor, result: Result, places: Places, pad_code: int) -> bool:
    """Is it of the kind that cuDNN has kernels of? weight: (o, kh, kw, c / groups)."""
    ends = (result.qmin, result.qmax)
    clips = ends == (-128, 127) or (ends == (0, 127) and result.zero == 0)
    return (
        weight.is_cuda
        and result.codes
        and clips
        and result.activation in ("none", "silu")
        and places.groups == 1
        and (pad_code == 0 or not any(places.padding))
        and weight.shape[0] % 4 == 0
        and weight.shape[3] % 4 == 0
        and weight.shape[3] >= 16
    )


@functools.cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()


def _step(result: Result) -> Tensor:
    """What turns numbers into steps of the result's grid: one, or one a channel; float64."""
    one = result.factor.new_ones(1, dtype=torch.float64) if result.post is None else result.post.double()
    return one / result.scale


class _Graph:
    """One convolution of one shape, and what is constant of it."""

    def __init__(self, x: Tensor, weight: Tensor, result: Result, places: Places, residual: Tensor | None, out: Tensor):
        self.handle = _handle(x.device.index or 0)
        kinds = cudnn.data_type
        graph = cudnn.pygraph(
            handle=self.handle,
            io_data_type=kinds.INT8,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
        )
        self.x, self.weight = (self._picture(graph, one, name) for one, name in ((x, "x"), (weight, "w")))
        top, bottom, left, right = places.padding
        y = graph.conv_fprop(
            image=self.x,
            weight=self.weight,
            pre_padding=[top, left],
            post_padding=[bottom, right],
            stride=list(places.stride),
            dilation=list(places.dilation),
            compute_data_type=kinds.INT32,
        )
        y.set_data_type(kinds.INT32)
        apart = result.activation == "silu"  # the grid's step comes behind it
        step = result.factor.new_ones(1, dtype=torch.float64) if apart else _step(result)
        factor = result.factor.double() * step
        shift = 0.0 if apart else float(result.zero)
        self.constants: dict[Any, Tensor] = {self.weight: weight}
        y = self._with(graph, "mul", y, factor)
        taken = result.residual_zero * result.residual_scale * step if residual is not None else 0.0 * step
        y = self._with(graph, "add", y, result.bias.double() * factor + (shift - taken))
        self.residual = None
        if residual is not None:
            self.residual = self._picture(graph, residual, "r")
            scaled = self._with(graph, "mul", self.residual, result.residual_scale * step)
            y = graph.add(a=y, b=scaled, compute_data_type=kinds.FLOAT)
            y.set_data_type(kinds.FLOAT)
        if apart:
            y = graph.swish(input=y, swish_beta=1.0, compute_data_type=kinds.FLOAT)
            y.set_data_type(kinds.FLOAT)
            y = self._with(graph, "mul", y, _step(result))
            if result.zero:
                y = self._with(graph, "add", y, factor.new_tensor([float(result.zero)]))
        if result.qmin == 0:
            y = graph.relu(input=y, compute_data_type=kinds.FLOAT)
        y.set_output(True).set_data_type(kinds.INT8)
        self.out, self.graph = y, graph
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()

    @staticmethod
    def _picture(graph: Any, x: Tensor, name: str) -> Any:
        count, height, width, channels = x.shape
        strides = [height * width * channels, 1, width * channels, channels]
        return graph.tensor(
            name=name, dim=[count, channels, height, width], stride=strides, data_type=cudnn.data_type.INT8
        )

    def _with(self, graph: Any, operator: str, y: Any, numbers: Tensor) -> Any:
        """``y`` with one number, or one a channel."""
        count = len(numbers)
        name = f"c{len(self.constants)}"
        operand = graph.tensor(
            name=name, dim=[1, count, 1, 1], stride=[count, 1, count, count], data_type=cudnn.data_type.FLOAT
        )
        self.constants[operand] = numbers.float().contiguous()
        made = getattr(graph, operator)(a=y, b=operand, compute_data_type=cudnn.data_type.FLOAT)
        made.set_data_type(cudnn.data_type.FLOAT)
        return made

    def plan(self, index: int) -> Launch:
        """The plan of that number, built. Raises cuDNN's error where it can't be."""
        self.graph.build_plan_at_index(index)
        size = max(1, self.graph.get_workspace_size_plan_at_index(index))
        workspace = torch.empty(size, dtype=torch.uint8, device=self.constants[self.weight].device)

        def launch(x: Tensor, residual: Tensor | None, out: Tensor) -> None:
            cudnn.set_stream(self.handle, torch.cuda.current_stream(x.device).cuda_stream)
            given: dict[Any, Tensor | None] = {self.x: x, self.out: out, **self.constants}
            if self.residual is not None:
                given[self.residual] = residual
            self.graph.execute_plan_at_index(given, workspace, index, handle=self.handle)

        return launch


def ways(
    x: Tensor, weight: Tensor, result: Result, places: Places, pad_code: int, residual: Tensor | None, out: Tensor
) -> Iterator[tuple[str, Make]]:
    """Each plan that cuDNN proposes, best first by its own judgement; none where it has no kernel for it."""
    if not fits(weight, result, places, pad_code):
        return
    try:
        graph = _Graph(x, weight, result, places, residual, out)
        count = min(MOST, graph.graph.get_execution_plan_count())
    except torch.OutOfMemoryError:
        raise
    except Exception:  # cuDNN's own words for "no engine"; the other kernels are there for that
        return
    for index in range(count):
        yield f"{PREFIX}{index}", functools.partial(graph.plan, index)
