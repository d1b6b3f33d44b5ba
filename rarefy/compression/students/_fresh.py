"""fresh(): the same graph with weights as before any training, though no class is there that knows how to draw them.

What a tensor is follows from the argument it is of the operator that reads it:

* weight of a convolution or linear layer: normal, variance 2 / inputs of one output (He et al., 1502.01852); 1 / inputs
  for a linear layer;
* bias: 0; weight of a normalisation: 1; running mean and variance: 0 and 1;
* anything else (position embeddings, layer scales, a matrix multiplied as it is): normal, with the mean and the
  deviation that it had.

Given up: what an author's own initialisation is fine-tuned to (zeros in the last norm of a block, truncated normals).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, fx, nn

from rarefy.errors import InputError
from rarefy.graph import history
from rarefy.graph.nodes import argument_name, attribute, operator_name

_CONVOLUTIONS = {
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
}
_LAYERS = {"linear", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"} | _CONVOLUTIONS
_CONSTANTS = {"bias": 0.0, "weight": 1.0, "running_mean": 0.0, "running_var": 1.0}


@torch.no_grad()
def fresh(graph: fx.GraphModule, seed: int) -> fx.GraphModule:
    """A copy of the graph, initialised anew from the seed. Raises InputError for a quantised graph."""
    if history.last(graph, "quantize") is not None:
        raise InputError(
            "fresh=true: the teacher is quantised, and codes can't be drawn anew; make the student of the float model"
        )
    untrained = copy.deepcopy(graph)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for node in untrained.graph.nodes:
        value = attribute(untrained, node) if node.op == "get_attr" else None
        if not isinstance(value, Tensor) or id(value) in done or not node.users or not value.is_floating_point():
            continue
        done.add(id(value))
        where = [(operator_name(user), argument_name(user, node)) for user in node.users]
        operator, role = next(
            ((name, role) for name, role in where if name in _LAYERS and role in _CONSTANTS), ("", "")
        )
        if role == "weight" and (operator in _CONVOLUTIONS or operator == "linear"):
            inputs = math.prod(value.shape[1:])
            value.copy_(
                torch.randn(value.shape, generator=generator) * math.sqrt((1 if operator == "linear" else 2) / inputs)
            )
        elif role:
            value.fill_(_CONSTANTS[role])
        elif isinstance(value, nn.Parameter):
            spread = float(value.float().std()) if value.numel() > 1 else 0.0
            value.copy_(torch.randn(value.shape, generator=generator) * spread + float(value.float().mean()))
    return untrained
