"""A detector's graph from pictures to what was found: its core, with what stays around it as operators on either side.

::

    picture (N, H, W, 3) uint8, RGB  ->  as the family feeds its core  ->  core  ->  boxes and scores of all places  ->
    found (N, most, 6): left, top, right, bottom in pixels of the input, class (-1: no box), score; the best first

Resizing stays outside, where pictures of any size are. Nothing of the core moves: its nodes keep their names, so that
what is told of layers is told of the same ones. (Layers that read the picture read numbers of its bytes: a first layer
in integers rounds them as it did.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.data.boxes.boxes import CLASS, SCORE, iou, present
from rarefy.graph.capture import capture
from rarefy.graph.nodes import attribute, device_of, example_inputs, finish, share_copy
from rarefy.graph.signature import attach
from rarefy.kernels.detections import OPERATOR as DETECTIONS
from rarefy.tasks.detector import Detector, Feed

CANDIDATES = 3000  # pairs of place and class of a picture that are looked at
INPUT, OUTPUT = "picture", "found"


def with_boxes(graph: fx.GraphModule, family: Detector) -> fx.GraphModule:
    """A copy of a core's graph that takes pictures and tells what was found; tensors are shared.

    Raises OutputError for outputs that are not the family's.
    """
    height, width = family.feed.size
    whole = share_copy(graph)
    with torch.no_grad():
        leaves, spec = pytree.tree_flatten(graph(*example_inputs(graph)))
    pictures = torch.zeros(2, height, width, 3, dtype=torch.uint8, device=device_of(graph))
    before = capture(_Fed(family.feed), pictures)
    behind = capture(_Read(family, spec, (height, width)), tuple(leaves))
    (placeholder,) = whole.graph.find_nodes(op="placeholder")
    (output,) = whole.graph.find_nodes(op="output")
    with whole.graph.inserting_before(placeholder):
        picture = whole.graph.placeholder(INPUT)
    (fed,) = _placed(whole, before, [picture], placeholder, "fed")
    placeholder.replace_all_uses_with(fed)
    whole.graph.erase_node(placeholder)
    values = [one for one in pytree.tree_leaves(output.args[0]) if isinstance(one, fx.Node)]
    output.args = tuple(_placed(whole, behind, values, output, "read"))
    shape = {"shape": [height, width, 3], "dtype": "uint8", "range": [0, 255]}
    whole.meta.update(inputs=[shape], names={"inputs": [INPUT], "outputs": [OUTPUT]}, sizes=[[None] * 3])
    plain = fx.GraphModule(finish(whole), whole.graph)  # without what checks and restores the core's own containers
    plain.meta = dict(whole.meta)
    attach(plain)
    return plain.eval()


def _placed(
    whole: fx.GraphModule, part: fx.GraphModule, values: Sequence[fx.Node], before: fx.Node, name: str
) -> list[fx.Node]:
    """The nodes of ``part``, which reads ``values``, before a node of the graph; what they yield."""
    known: dict[fx.Node, fx.Node] = {}
    given = iter(values)
    with whole.graph.inserting_before(before):
        for node in part.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "get_attr":
                target = f"{name}_{str(node.target).replace('.', '_')}"
                whole.register_buffer(target, attribute(part, node).detach())
                known[node] = whole.graph.get_attr(target)
            elif node.op == "output":
                return [known[one] for one in pytree.tree_leaves(node.args[0])]
            else:
                known[node] = whole.graph.node_copy(node, known.__getitem__)
    raise AssertionError("a graph ends in its output")


class _Fed(nn.Module):
    """uint8 pictures as a core takes them."""

    def __init__(self, feed: Feed):
        super().__init__()
        self.turned = feed.channels == "bgr"
        scale, shift = _affine(feed)
        self.same = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.permute(0, 3, 1, 2)
        x = (x.flip(1) if self.turned else x).float()
        return x if self.same else x * self.get_buffer("scale") + self.get_buffer("shift")


def _affine(feed: Feed) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as x scale + shift, (3, 1, 1) each."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (feed.mean, feed.std))
    scale, shift = 1 / (255 * std), -mean / std
    return scale.float(), shift.float()


class _Read(nn.Module):
    """A core's outputs as what was found."""

    def __init__(self, family: Detector, spec: pytree.TreeSpec, size: tuple[int, int]):
        super().__init__()
        self.family, self.spec, self.size = family, spec, size

    def forward(self, *outputs: Tensor) -> Tensor:
        boxes, scores = self.family.scored(pytree.tree_unflatten(list(outputs), self.spec), self.size)
        found: Tensor = DETECTIONS(boxes, scores, self.family.overlap, self.family.least, self.family.most, CANDIDATES)
        return found


def same_boxes(ours: Tensor, theirs: Tensor, least: float = 0.05) -> Tensor:
    """(N,) bool: has each box (N, M, 6) with a score of at least ``least`` its like on the other side, both ways?

    Its like: of the same class, IoU at least 0.95, scores at most 0.01 apart.
    """
    like = (ours[:, :, None, CLASS] == theirs[:, None, :, CLASS]) & (
        (ours[:, :, None, SCORE] - theirs[:, None, :, SCORE]).abs() < 0.01
    )
    like &= iou(ours, theirs) >= 0.95
    ours_sure, theirs_sure = (present(one) & (one[..., SCORE] >= least) for one in (ours, theirs))
    return ~((ours_sure & ~like.any(2)).any(1) | (theirs_sure & ~like.any(1)).any(1))


def pictures_of(inputs: Tensor, feed: Feed) -> Tensor:
    """A core's inputs (N, 3, H, W) as the pictures (N, H, W, 3) uint8 that they were made of."""
    scale, shift = (one.to(inputs.device) for one in _affine(feed))
    pictures = ((inputs.float() - shift) / scale).round().clamp(0, 255).to(torch.uint8)
    return (pictures.flip(1) if feed.channels == "bgr" else pictures).permute(0, 2, 3, 1)
