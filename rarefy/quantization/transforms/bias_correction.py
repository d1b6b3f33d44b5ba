"""Means of layers in codes, brought back to what they were in float.

Rounding weights moves the mean of a layer's output, a channel, by (q - w) E x, which goes out of its bias (1906.04721,
sec. 4.2). E x is what float reads: that part of a moved mean is the weights' own and holds on any image. What moves
means besides, clipping and noise at the ends of ReLUs, is not even over images and places; taken out of biases too, it
took MobileNetV2 from 21.9 dB to 17.5, NanoDet from 17 to 14 and YOLOX-Nano from 7 to 4 (docs/log.md).
"""

from __future__ import annotations

from torch import Tensor, fx

from rarefy.graph import im2col
from rarefy.quantization import qdq


def correct_bias(
    graph: fx.GraphModule, layer: fx.Node, wanted: tuple[Tensor, Tensor], read: tuple[im2col.Mean, im2col.Mean]
) -> bool:
    """Shift a layer's bias, in place, so that its mean output is what it was. The layer need not run: sums are linear.

    wanted: weight and bias in float. read: of what the layer reads in float, on two halves of the images. Where what
    one half says does not lessen what the other sees, nothing is shifted, and False comes back.
    """
    weight, bias = (
        exact.double() - qdq.decoded(graph, number).double()
        for exact, number in zip(wanted, qdq.numbers(layer), strict=True)
    )
    groups = im2col.groups_of(layer)
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    seen = [mean for mean in read if mean.count]
    halves = [(rows @ mean.value(groups)).flatten() + bias for mean in seen]
    if len(halves) == 2 and float((halves[0] - halves[1]).norm()) > min(float(half.norm()) for half in halves):
        return False
    total = sum(mean.count for mean in seen)
    qdq.shift_bias(
        graph, layer, sum((half * (mean.count / total) for half, mean in zip(halves, seen, strict=True)), bias * 0)
    )
    return True
