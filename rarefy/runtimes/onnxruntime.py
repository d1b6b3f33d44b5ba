"""ONNX Runtime on the CPU: ONNX files with QuantizeLinear/DequantizeLinear, which it fuses into integer kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.placing import Capabilities

aten = torch.ops.aten

@dataclasses.dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, CPU; threads=0: one a core."""
    threads: int = 0
    capabilities = Capabilities(
        layers=frozenset({aten.conv2d.default, aten.conv2d.padding, aten.linear.default}),
        joins=frozenset({aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.sigmoid.default, aten.hardsigmoid.default}),
        carriers=frozenset({aten.max_pool2d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default, aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}),
        clips=frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}),
        float_result=frozenset({aten.linear.default}),
    )
