"""Means and spreads of layers in codes, brought back to what they were in float.

Rounding moves the mean of a layer's output, a channel, by (q - w) E x, which goes out of its bias before its successors
run (sequential bias correction, 1906.04721, sec. 4.2). Means right, what varies around them still shrinks from layer to
layer, as noise at the ends of ReLUs fills up what was off: the last layers' scales are raised until their outputs
deviate as much as in float.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from rarefy.graph import im2col
from rarefy.quantization import qdq
from rarefy.quantization.observers import Average


def correct_bias(graph: fx.GraphModule, layer: fx.Node, wanted: Tensor, read: im2col.Mean) -> None:
    """Shift a layer's bias, in place, so that its mean output is what it was. The layer need not run: sums are linear.

    wanted: (outputs,) float64, the mean in float. read: of what the layer reads.
    """
    weight, bias = (qdq.decoded(graph, number) for number in qdq.numbers(layer))
    groups = im2col.groups_of(layer)
    rows = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    mean = (rows @ read.value(groups)).flatten() + bias.double()
    qdq.shift_bias(graph, layer, wanted - mean)


def correct_spread(graph: fx.GraphModule, layer: fx.Node, wanted: float, outputs: Iterable[Tensor]) -> None:
    """Scale a layer, in place, so that its output varies as much around its mean as it did.

    wanted: the deviation in float, over all channels. outputs: what the layer makes, of each batch.
    """
    average = Average(spreads=True)
    for value in outputs:
        average.add(layer, value)
    if average.spread > 0 and wanted > 0:
        qdq.scale_output(graph, layer, wanted / average.spread)
