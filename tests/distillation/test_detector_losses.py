"""What detectors are taught: necks and branches are found, each loss runs on each kind of head, and places weigh."""

from __future__ import annotations

import functools

import pytest
import torch
from detecting import BinHead, GridHead, SoftmaxHead, torchvision_detector
from networks import TwoStages
from torch import Tensor, nn

from rarefy import capture, distill, plugins, prune
from rarefy.demo.shapes import Pictures
from rarefy.distillation.losses import _places
from rarefy.distillation.losses.quality import Quality
from rarefy.distillation.objective import terms
from rarefy.errors import InputError
from rarefy.graph.features import behind, matched, tapped
from rarefy.tasks.detection import Detection
from rarefy.tasks.detectors._losses import paired_iou
from rarefy.tasks.task import compared, fitted

LOSSES = ("auto", "quality", "pkd", "10*cwd", "crosskd", "ld")
HEADS: dict[str, nn.Module] = {
    "yolox": GridHead(), "nanodet": BinHead(), "fastestdet": SoftmaxHead(), "ssd": torchvision_detector("ssd"),
    "fcos": torchvision_detector("fcos"), "faster_rcnn": torchvision_detector("faster_rcnn"),
}  # fmt: skip


@functools.cache
def graph_of(name: str) -> torch.fx.GraphModule:
    own = name in ("yolox", "nanodet", "fastestdet")
    return capture(HEADS[name].eval(), (3, 64, 64)) if own else capture(HEADS[name])


@pytest.mark.parametrize(("name", "necks", "branches"), [("yolox", 3, 3), ("nanodet", 3, 3), ("fastestdet", 1, 1)])
def test_a_neck_is_what_all_heads_of_a_resolution_read(name: str, necks: int, branches: int) -> None:
    graph = graph_of(name)
    found = [ours for ours, _ in matched(graph, graph, "neck")]
    assert [tap.resolution for tap in found] == [(8, 8), (4, 4), (2, 2)][3 - necks :] or found[0].resolution == (4, 4)
    assert len(found) == necks and all(tap.shape[0] == 8 for tap in found)
    assert len(matched(graph, graph, "cross")) == branches


def test_networks_without_heads_are_compared_by_stages() -> None:
    graph = capture(TwoStages(4, 1).eval(), (3, 16, 16))
    assert matched(graph, graph, "neck")
    with pytest.raises(InputError, match="no value of that name"):
        matched(graph, graph, "nowhere")


def test_the_rest_of_a_network_answers_from_the_middle() -> None:
    graph, inputs = graph_of("nanodet"), torch.randn(2, 3, 64, 64)
    taps = [theirs for _, theirs in matched(graph, graph, "cross")]
    outputs, values = tapped(graph, taps)(inputs)
    rest = behind(graph, taps)
    for one, other in zip(rest(torch.zeros_like(inputs), *values), outputs, strict=True):
        torch.testing.assert_close(one, other)
    values = [value.detach().requires_grad_() for value in values]
    changed = rest(inputs, *(2 * value for value in values))
    assert not torch.allclose(changed[0], outputs[0])
    changed[0].sum().backward()
    assert values[0].grad is not None and all(one.grad is None for one in rest.parameters())


@pytest.mark.parametrize("name", sorted(HEADS))
def test_each_loss_teaches_a_small_detector_without_labels(name: str) -> None:
    teacher = graph_of(name)
    student = prune(teacher, keep=0.5)
    task = Detection(train=Pictures(4, 0), augment="none")
    for loss in LOSSES:
        if loss == "ld" and name != "nanodet":
            with pytest.raises(InputError, match="no distributions"):
                distill(student, teacher, task, loss=loss, hard_weight=0, steps=1, batch_size=2, progress=False)
            continue
        trained = distill(student, teacher, task, loss=loss, hard_weight=0, steps=1, batch_size=2, progress=False)
        assert trained.meta["history"][-1]["facts"]["curve"][-1]["loss"] > 0
        stem = {key: one for key, one in student.named_parameters() if "stem" in key and one.dim() == 4}
        assert stem and not any(torch.equal(one, trained.get_parameter(key)) for key, one in stem.items())


def test_answers_of_the_teacher_itself_are_at_no_distance() -> None:
    graph = graph_of("nanodet")
    task = fitted(Detection(train=Pictures(2, 0), detector=graph.meta["detector"]), graph)
    outputs = [one.detach() for one in graph(torch.randn(2, 3, 64, 64))]
    parts = compared(task, outputs, outputs, task)
    assert set(parts) == {"scores", "boxes", "distances"} and parts["distances"][0].shape == (2, 84, 4, 8)
    for name in ("quality", "ld", "crosskd"):
        ((weight, loss),) = terms(name)
        assert weight == 1 and abs(float(loss(outputs[0], outputs[0], None, parts))) < 1e-5


def test_background_does_not_drown_the_few_places_that_count() -> None:
    """Ten thousand places of nothing, where the student is a little off, change the loss by less than one thing."""
    thing = torch.tensor([[[0.9]]]), torch.tensor([[[0.2]]])
    nothing = torch.full((1, 10_000, 1), 0.001), torch.full((1, 10_000, 1), 0.01)
    theirs, ours = (torch.cat(pair, 1) for pair in zip(thing, nothing))
    alone = Quality()(ours, theirs, None, {"scores": (thing[1], thing[0])})
    among = Quality()(ours, theirs, None, {"scores": (ours, theirs)})
    assert 0.5 * alone * 0.9 / (0.9 + 10) < among < alone
    missed = ours.clone()
    missed[:, 0] = 0.9
    assert Quality()(ours, theirs, None, {"scores": (missed, theirs)}) < 0.1 * among


def test_boxes_are_apart_by_generalised_iou_where_the_teacher_is_sure() -> None:
    draw = torch.Generator().manual_seed(0)
    corner, side = torch.rand(2, 2, 5, 2, generator=draw), torch.rand(2, 2, 5, 2, generator=draw) + 0.01
    a, b = torch.cat([corner, corner + side], -1)
    sure = torch.rand(2, 5, generator=draw)
    wanted = ((1 - paired_iou(a, b)[1]) * sure).sum() / sure.sum()
    torch.testing.assert_close(_places.boxes_apart({"boxes": (a, b)}, sure), wanted)
    assert _places.boxes_apart({}, sure) == 0


@pytest.mark.parametrize("softmax", [True, False])
def test_sets_of_boxes_are_compared_by_partners(softmax: bool) -> None:
    """A student that says the same in another order is at no distance."""
    task = Detection(train=Pictures(2, 0), detector=f"detr:classes=3,size=64/96,softmax={softmax}")
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 10, 3 + softmax, generator=draw)
    boxes = torch.rand(2, 10, 4, generator=draw) * 0.4 + 0.1
    order = torch.randperm(10, generator=draw)
    theirs: tuple[Tensor, Tensor] = (logits, boxes)
    ours = logits[:, order].requires_grad_(), boxes[:, order].requires_grad_()
    parts = compared(task, ours, theirs, task)
    torch.testing.assert_close(*parts["scores"])
    torch.testing.assert_close(*parts["boxes"])
    loss = plugins.resolve("losses", "quality")
    assert abs(float(loss(logits, logits, None, parts).detach())) < 1e-5
    moved = logits[:, order].requires_grad_(), (boxes[:, order] + 0.05).requires_grad_()
    loss(logits, logits, None, compared(task, moved, theirs, task)).backward()
    assert moved[1].grad is not None and moved[1].grad.abs().sum() > 0
    again = task.logits(theirs).softmax(-1)[:, 0]
    wanted = logits.softmax(-1)[..., -1].flatten() if softmax else 1 - logits.sigmoid().flatten()
    torch.testing.assert_close(again, wanted)


def test_answers_at_other_places_are_refused_with_the_way_out() -> None:
    teacher, student = graph_of("yolox"), capture(GridHead(classes=4).eval(), (3, 64, 64))
    task = Detection(train=Pictures(2, 0), augment="none")
    with pytest.raises(InputError, match="pkd"):
        distill(student, teacher, task, hard_weight=0, steps=1, batch_size=2, progress=False)
    distill(student, teacher, task, loss="pkd", hard_weight=0, steps=1, batch_size=2, progress=False)
