"""A frozen teacher answers as the network it was made of."""

from __future__ import annotations

import torch
from networks import DepthwiseWithToken
from torch import nn

from rarefy.distillation.teachers import frozen
from rarefy.graph.capture import capture
from rarefy.graph.features import cuts, tapped


def made() -> nn.Module:
    torch.manual_seed(0)
    model = DepthwiseWithToken()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_folded_and_tapped_it_answers_the_same() -> None:
    graph = capture(made(), torch.zeros(2, 3, 8, 8))
    with_taps = tapped(graph, [tap for tap in cuts(graph) if tap.resolution])
    quick = frozen(with_taps, bf16=False)
    assert not [node for node in quick.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert not any(one.requires_grad for one in quick.parameters()) and all(
        one.requires_grad for one in graph.parameters()
    )
    x = torch.randn(16, 3, 8, 8)
    (answer, features), (expected, wanted) = quick(x), with_taps(x)
    assert len(features) == len(wanted) > 1
    for ours, theirs in zip((answer, *features), (expected, *wanted)):  # float32 sums of at most 27 products, reordered
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_rounded_once_are_those_that_autocast_rounds_in_each_step() -> None:
    graph = tapped(capture(made(), torch.zeros(2, 3, 8, 8)), [])
    x = torch.randn(16, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        (ours, _), (expected, _) = frozen(graph, bf16=True)(x), frozen(graph, bf16=False)(x)
    assert torch.equal(ours, expected)
    kept = {name: one.dtype for name, one in frozen(graph, bf16=True).named_parameters()}
    assert kept["conv.weight"] == kept["head.weight"] == torch.bfloat16
    assert kept["token"] == kept["mix.weight"] == torch.float32  # read by what computes in float32
