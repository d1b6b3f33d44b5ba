"""Every loss there is gets the contract; the known ones their formulas."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from networks import TokenStages, TwoStages
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import plugins
from rarefy.distillation.losses.at import At
from rarefy.distillation.losses.dist import Dist
from rarefy.distillation.losses.dkd import Dkd
from rarefy.distillation.losses.kl import Kl
from rarefy.distillation.losses.lskd import Lskd
from rarefy.distillation.losses.mlkd import Mlkd
from rarefy.distillation.losses.mse import Mse
from rarefy.distillation.losses.reviewkd import Reviewkd
from rarefy.distillation.losses.rkd import Rkd
from rarefy.distillation.losses.skd import Skd
from rarefy.distillation.losses.wkd import Wkd
from rarefy.distillation.objective import FeatureLoss, Loss, terms
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.features import cuts, matched, tapped

NAMES = plugins.available("losses")
FORMS = [*NAMES, "mse:on=logits"]
SHAPES = {"early": (8, 6, 6), "late": (12, 3, 3)}


def pictures(seed: int, batch: int = 6, classes: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(batch, *shape, generator=draw) for name, shape in SHAPES.items()}
    return 3 * torch.randn(batch, classes, generator=draw), features


def seen(loss: Loss, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What a loss of that kind is given beside the logits."""
    if loss.on == "logits":
        return {}
    if loss.on not in ("answers", "cross"):
        return {name: (ours[name], theirs[name]) for name in ours}
    pairs = [answers(one) for one in (ours, theirs)]
    return {name: (pairs[0][name], pairs[1][name]) for name in pairs[0]}


def answers(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores, boxes and distances made of features: of each picture as many places as its late map has channels."""
    late = features["late"].flatten(2)
    centre, sides = late[..., :2].sigmoid(), late[..., 2:4].sigmoid() + 0.1
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], -1)
    return {"scores": late[..., 1:].sigmoid(), "boxes": boxes, "distances": late[..., None, :].expand(-1, -1, 4, -1)}


def value(loss: Loss, student: Tensor, teacher: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    targets = torch.arange(len(student)) % student.shape[1]
    return loss(student, teacher, targets, seen(loss, ours, theirs))


@pytest.mark.parametrize("form", FORMS)
class TestContract:
    def test_is_a_loss_described_by_its_text(self, form: str) -> None:
        loss = plugins.resolve("losses", form)
        assert isinstance(loss, Loss)
        assert loss.on == "logits" or isinstance(loss, FeatureLoss)
        assert plugins.resolve("losses", plugins.describe(loss)) == loss
        assert plugins.summary("losses", form.partition(":")[0])
        with pytest.raises(AttributeError):
            loss.on = "elsewhere"  # frozen

    def test_least_at_the_teacher(self, form: str) -> None:
        loss = plugins.resolve("losses", form)
        teacher, theirs = pictures(0)
        student, ours = pictures(1)
        at_teacher = value(loss, teacher, teacher, theirs, theirs)
        assert at_teacher.shape == ()
        assert abs(float(at_teacher)) < 1e-5
        for share in (0.1, 0.5, 1.0):
            moved = {name: torch.lerp(theirs[name], ours[name], share) for name in ours}
            assert value(loss, torch.lerp(teacher, student, share), teacher, moved, theirs) > at_teacher + 1e-4

    def test_descending_its_gradient_comes_nearer(self, form: str) -> None:
        loss = plugins.resolve("losses", form)
        teacher, theirs = pictures(0)
        student, ours = pictures(1)
        inputs = [student, *ours.values()]
        for one in inputs:
            one.requires_grad_()
        before = value(loss, student, teacher, ours, theirs)
        before.backward()
        assert all(one.grad is None or one.grad.isfinite().all() for one in inputs)
        with torch.no_grad():
            for one in inputs:
                if one.grad is not None:
                    one -= 0.05 * one.grad
            assert value(loss, student, teacher, ours, theirs) < before

    def test_gradient_is_that_of_its_values(self, form: str) -> None:
        loss = plugins.resolve("losses", form)
        teacher, theirs = pictures(0, batch=3)
        student, ours = pictures(1, batch=3)
        theirs64 = {name: one.double()[:, :2, :2, :2] for name, one in theirs.items()}

        def scalar(logits: Tensor, *features: Tensor) -> Tensor:
            return value(loss, logits, teacher.double(), dict(zip(ours, features)), theirs64)

        points = [
            student.double().requires_grad_(),
            *(one.double()[:, :2, :2, :2].contiguous().requires_grad_() for one in ours.values()),
        ]
        assert torch.autograd.gradcheck(scalar, points)

    def test_order_of_the_batch_does_not_matter(self, form: str) -> None:
        loss = plugins.resolve("losses", form)
        teacher, theirs = pictures(0)
        student, ours = pictures(1)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        targets = torch.arange(6) % 5
        features = seen(loss, ours, theirs)
        shuffled = {name: (a[order], b[order]) for name, (a, b) in features.items()}
        straight = loss(student, teacher, targets, features)
        torch.testing.assert_close(
            loss(student[order], teacher[order], targets[order], shuffled), straight, rtol=1e-5, atol=1e-6
        )

    def test_needs_no_labels_or_takes_soft_ones(self, form: str) -> None:
        loss = plugins.resolve("losses", form)
        teacher, theirs = pictures(0)
        student, ours = pictures(1)
        features = seen(loss, ours, theirs)
        soft = torch.full((6, 5), 0.2)
        for targets in (None, soft):
            assert loss(student, teacher, targets, features).isfinite()

    @pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
    def test_finite_at_the_edges(self, form: str, size: float) -> None:
        """All logits equal, tiny, huge: value and gradient stay finite."""
        loss = plugins.resolve("losses", form)
        teacher, theirs = pictures(0)
        student, ours = pictures(1)
        student, ours = (
            (size * student).requires_grad_(),
            {name: (size * one).requires_grad_() for name, one in ours.items()},
        )
        result = value(loss, student, size * teacher, ours, {name: size * one for name, one in theirs.items()})
        result.backward()
        assert result.isfinite()
        assert all(one.grad is None or one.grad.isfinite().all() for one in (student, *ours.values()))


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_kl_is_the_closed_form(T: float) -> None:
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double().requires_grad_()
    p, q = (teacher / T).softmax(1), (student / T).softmax(1)
    loss = Kl(temperature=T)(student, teacher, None, {})
    torch.testing.assert_close(loss, T**2 * (p * (p.log() - q.log())).sum(1).mean())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, T * (q - p) / len(student))  # T² · (q - p)/T, mean over the batch


def test_kl_tends_to_the_squared_distance_of_centred_logits() -> None:
    """T -> inf: T² KL -> |s - t|²/(2 classes), Hinton's remark; the next term is smaller by |logit|/T."""
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    apart = (student - teacher) - (student - teacher).mean(1, keepdim=True)
    limit = apart.square().sum(1).mean() / (2 * student.shape[1])
    far = Kl(temperature=1e4)(student, teacher, None, {})
    largest = max(student.abs().max(), teacher.abs().max())
    assert abs(far - limit) < limit * 4 * largest / 1e4


def test_lskd_is_kl_of_standardised_logits() -> None:
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    z = [(one - one.mean(1, keepdim=True)) / one.std(1, keepdim=True) for one in (student, teacher)]
    torch.testing.assert_close(
        Lskd(temperature=2, weight=9)(student, teacher, None, {}), 9 * Kl(temperature=2)(*z, None, {})
    )


def test_lskd_does_not_see_shift_and_scale_and_kl_does() -> None:
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    moved = 0.3 * student + 7
    torch.testing.assert_close(Lskd()(moved, teacher, None, {}), Lskd()(student, teacher, None, {}))
    assert abs(Kl()(moved, teacher, None, {}) - Kl()(student, teacher, None, {})) > 0.1


def test_mse_is_the_mean_of_its_pairs() -> None:
    _, ours = pictures(1)
    _, theirs = pictures(0)
    expected = (F.mse_loss(ours["early"], theirs["early"]) + F.mse_loss(ours["late"], theirs["late"])) / 2
    torch.testing.assert_close(value(Mse(), *2 * [torch.zeros(6, 5)], ours, theirs), expected)


def test_mse_projects_only_where_channels_differ() -> None:
    adapter = Mse().adapter(
        {
            "same": ((8, 6, 6), (8, 6, 6)),
            "wider": ((4, 3, 3), (12, 3, 3)),
            "tokens": ((4, 9), (6, 9)),
            "vector": ((4,), (5,)),
        }
    )
    assert adapter is not None
    given = {
        "same": torch.randn(2, 8, 6, 6),
        "wider": torch.randn(2, 4, 3, 3),
        "tokens": torch.randn(2, 4, 9),
        "vector": torch.randn(2, 4),
    }
    seen = adapter(given)
    assert seen["same"] is given["same"]
    assert {name: tuple(one.shape) for name, one in seen.items() if name != "same"} == {
        "wider": (2, 12, 3, 3),
        "tokens": (2, 6, 9),
        "vector": (2, 5),
    }
    assert Mse().adapter({"same": ((8, 6, 6), (8, 6, 6))}) is None
    with pytest.raises(InputError, match=r"early.*equal resolution"):
        Mse().adapter({"early": ((8, 6, 6), (8, 3, 3))})


def test_dkd_with_the_weights_of_kl_is_kl() -> None:
    """KL = TCKD + (1 - p_label of the teacher) NCKD, the paper's equation 6, one sample at a time."""
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    label = torch.arange(len(teacher)) % 5
    for i in range(len(teacher)):
        rest = 1 - float((teacher[i] / 4).softmax(0)[label[i]])
        found = Dkd(alpha=1, beta=rest)(student[i : i + 1], teacher[i : i + 1], label[i : i + 1], {})
        torch.testing.assert_close(found, Kl(temperature=4)(student[i : i + 1], teacher[i : i + 1], None, {}))


def test_dkd_takes_the_teachers_answer_where_there_are_no_labels() -> None:
    teacher, student = pictures(0)[0], pictures(1)[0]
    assert Dkd()(student, teacher, None, {}) == Dkd()(student, teacher, teacher.argmax(1), {})
    assert Dkd()(student, teacher, F.one_hot(teacher.argmax(1), 5).float(), {}) == Dkd()(
        student, teacher, teacher.argmax(1), {}
    )


def test_dist_is_one_minus_the_correlations() -> None:
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    p, q = (student / 4).softmax(1), (teacher / 4).softmax(1)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T)])
    torch.testing.assert_close(
        Dist(beta=2, gamma=3, temperature=4)(student, teacher, None, {}),
        16 * (2 * (1 - rows).mean() + 3 * (1 - columns).mean()),
    )


def test_mlkd_is_the_mean_over_temperatures() -> None:
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    expected = []
    for T in (2, 3):
        p, q = (teacher / T).softmax(1), (student / T).softmax(1)
        instance = T**2 * (p * (p.log() - q.log())).sum(1).mean()
        batch, classes = (p @ p.T - q @ q.T).square().sum() / len(p), (p.T @ p - q.T @ q).square().sum() / p.shape[1]
        share = 64 / len(p) * p.shape[1] / 100
        expected.append(instance + batch * share + classes * share**2)
    found = Mlkd(lowest=2, highest=3)(student, teacher, None, {})
    torch.testing.assert_close(found, torch.stack(expected).mean())
    eight_times = Mlkd(lowest=2, highest=3)(student.repeat(8, 1), teacher.repeat(8, 1), None, {})
    torch.testing.assert_close(eight_times, found)  # a batch of the same samples again is no other loss


def test_skd_adds_mahalanobis_distances_to_kl() -> None:
    teacher, student = pictures(0)[0].double(), pictures(1)[0].double()
    s, t = (one / one.norm(dim=1, keepdim=True) for one in (student, teacher))
    apart = s @ s.T - t @ t.T
    inverse = torch.linalg.inv(torch.cov(apart.T) + 0.1 * torch.eye(len(s), dtype=s.dtype))
    distance = (apart @ inverse @ apart.T).diagonal().sqrt().mean()
    found = Skd(direction=2)(student, teacher, None, {}) - Kl(temperature=4)(student, teacher, None, {})
    torch.testing.assert_close(found, 2 * distance, atol=1e-3, rtol=0)


def test_at_does_not_see_the_channels_and_their_scale() -> None:
    _, ours = pictures(1)
    _, theirs = pictures(0)
    doubled = {name: torch.cat([3 * one, 3 * one.flip(1)], 1) for name, one in ours.items()}
    logits = torch.zeros(6, 5)
    torch.testing.assert_close(value(At(), logits, logits, doubled, theirs), value(At(), logits, logits, ours, theirs))
    with pytest.raises(InputError, match="equal resolution"):
        At().adapter({"early": ((8, 6, 6), (8, 3, 3))})
    with pytest.raises(InputError, match="no positions"):
        At(on="embedding")


def test_rkd_is_distances_and_angles_and_sees_no_rotation() -> None:
    draw = torch.Generator().manual_seed(3)
    s, t = torch.randn(5, 4, generator=draw).double(), torch.randn(5, 7, generator=draw).double()

    def relations(x: Tensor) -> tuple[Tensor, Tensor]:
        distances = torch.cdist(x, x)
        apart = x[None] - x[:, None]
        unit = F.normalize(apart, dim=-1)
        return distances / (distances.sum() / 20), torch.einsum("jic,jkc->jik", unit, unit)

    (a, b), (c, d) = relations(s), relations(t)
    logits = torch.zeros(5, 3)
    found = Rkd(distance=25, angle=50)(logits, logits, None, {"x": (s, t)})
    torch.testing.assert_close(found, 25 * F.smooth_l1_loss(a, c) + 50 * F.smooth_l1_loss(b, d), rtol=1e-5, atol=1e-5)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw).double()).Q
    torch.testing.assert_close(Rkd()(logits, logits, None, {"x": (2 * s @ turn + 1, t)}), found, rtol=1e-5, atol=1e-5)


def test_wkd_compares_moments_and_no_positions() -> None:
    s, t = torch.randn(3, 4, 5, 5).double(), torch.randn(3, 4, 2, 2).double()
    expected = (s.mean((2, 3)) - t.mean((2, 3))).square() + (
        s.std((2, 3), correction=0) - t.std((2, 3), correction=0)
    ).square()
    logits = torch.zeros(3, 5)
    torch.testing.assert_close(Wkd()(logits, logits, None, {"x": (s, t)}), expected.mean())
    torch.testing.assert_close(Wkd()(logits, logits, None, {"x": (s.flip(2).mT, t)}), expected.mean())


def test_reviewkd_fuses_from_the_deepest_stage_up() -> None:
    shapes = {"early": ((4, 8, 8), (6, 8, 8)), "late": ((5, 4, 4), (7, 4, 4))}
    adapter = Reviewkd(width=3).adapter(shapes)
    assert adapter is not None
    early, late = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    seen = adapter({"early": early, "late": late})
    assert {name: tuple(one.shape) for name, one in seen.items()} == {"early": (2, 6, 8, 8), "late": (2, 7, 4, 4)}
    assert not torch.autograd.grad(seen["late"].sum(), early, retain_graph=True, allow_unused=True)[
        0
    ]  # deep does not read shallow
    assert torch.autograd.grad(seen["early"].square().sum(), late)[0].abs().sum() > 0  # shallow reads deep
    with pytest.raises(InputError, match="equal resolution"):
        Reviewkd().adapter({"early": ((8, 6), (8, 6))})


# -- sums as text


def test_sum_as_text() -> None:
    assert terms("lskd + 50*mse:on=embedding+1e+1 * kl:temperature=2") == [
        (1.0, Lskd()),
        (50.0, Mse(on="embedding")),
        (10.0, Kl(temperature=2.0)),
    ]
    assert terms("dkd:beta=8 + 50*feature") == terms("dkd:beta=8 + 50*mse")
    assert terms("feature:on=embedding") == terms("mse:on=embedding")
    assert terms(Kl()) == [(1.0, Kl())]
    assert terms([(2, Kl())]) == [(2.0, Kl())]
    assert terms(None) == []


@pytest.mark.parametrize(
    "bad",
    ["nonsense", "x*kl", "-1*kl", "nan*kl", "kl:temperature=0", "kl:warmth=1", "kl + ", "", [(1.0, "kl")], [(1.0, 7)]],
)
def test_bad_sums_name_themselves(bad: object) -> None:
    with pytest.raises(InputError) as raised:
        terms(bad)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kl:temperature=0", "kl: temperature=0.0 is not positive; 1 to 10 is usual"),
        ("lskd:temperature=-1", "lskd: temperature=-1.0 is not positive; 2 is usual"),
        ("dkd:temperature=0", "dkd: temperature=0.0 is not positive; 4 is usual"),
        ("dkd:alpha=-1", "dkd: alpha=-1.0, beta=2.0 must not be negative"),
        ("dkd:beta=-1", "dkd: alpha=1.0, beta=-1.0 must not be negative"),
        ("dist:temperature=0", "dist: temperature=0.0 is not positive; 1 to 4 is usual"),
        ("skd:temperature=0", "skd: temperature=0.0 is not positive; 4 is usual"),
        ("dist:beta=-1", "dist: beta=-1.0, gamma=2.0 must not be negative"),
        ("dist:gamma=nan", "'dist:gamma=nan': gamma: 'nan' is too large, or no number"),
        ("lskd:weight=-1", "lskd: weight=-1.0 must not be negative"),
        ("skd:direction=-1", "skd: direction=-1.0 must not be negative"),
        ("skd:ridge=0", "skd: ridge=0.0 is not positive; 0.1 is usual"),
        ("mlkd:lowest=0", "mlkd: temperatures from 0 to 6: lowest must be at least 1"),
        ("mlkd:lowest=7", "mlkd: temperatures from 7 to 6: lowest must be at least 1, and highest no less"),
        ("rkd:distance=-1", "rkd: distance=-1.0, angle=50.0 must not be negative"),
        ("rkd:angle=-1", "rkd: distance=25.0, angle=-1.0 must not be negative"),
        ("at:on=logits", "at: logits has no positions"),
        ("at:on=embedding", "at: embedding has no positions"),
        ("wkd:on=logits", "wkd: logits have no positions"),
        ("reviewkd:width=0", "reviewkd: width=0 must be at least 1"),
        ("reviewkd:on=logits", "reviewkd: logits is no map"),
        ("reviewkd:on=embedding", "reviewkd: embedding is no map"),
    ],
)
def test_options_out_of_bounds_are_refused_in_these_words(text: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as raised:
        terms(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["dkd:alpha=0,beta=0", "rkd:distance=0,angle=0", "mlkd:lowest=6", "reviewkd:width=1"])
def test_options_at_their_bounds_are_taken(text: str) -> None:
    ((_, loss),) = terms(text)
    assert plugins.describe(loss) == plugins.describe(plugins.resolve("losses", text))


OTHERS = {"crosskd": "cross", "ld": "answers", "quality": "answers"}  # that look at neither logits nor features
DEFAULTS = {
    "crosskd": {"scores": 1.0, "boxes": 2.0, "distances": 0.25, "power": 2.0, "temperature": 10.0},
    "cwd": {"on": "neck", "temperature": 1.0},
    "ld": {"temperature": 10.0, "weight": 0.25},
    "pkd": {"on": "neck"},
    "quality": {"scores": 1.0, "boxes": 2.0, "power": 2.0},
    "at": {"on": "stages"},
    "dist": {"beta": 2.0, "gamma": 2.0, "temperature": 1.0},
    "dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0},
    "kl": {"temperature": 4.0},
    "lskd": {"temperature": 2.0, "weight": 9.0},
    "mlkd": {"lowest": 2, "highest": 6},
    "mse": {"on": "stages"},
    "reviewkd": {"width": 64, "on": "stages"},
    "rkd": {"distance": 25.0, "angle": 50.0, "on": "embedding"},
    "skd": {"temperature": 4.0, "direction": 1.0, "ridge": 0.1},
    "wkd": {"on": "stages"},
}


def test_defaults_are_those_of_the_papers() -> None:
    assert plugins.available("losses") == sorted(DEFAULTS)
    for name, options in DEFAULTS.items():
        loss = plugins.resolve("losses", name)
        assert dataclasses.asdict(loss) == options, name
        assert {key: type(value) for key, value in dataclasses.asdict(loss).items()} == {
            key: type(value) for key, value in options.items()
        }, name
        assert loss.on == options.get("on", OTHERS.get(name, "logits")), name


# -- where features are found


def test_stages_end_where_no_path_goes_around() -> None:
    graph = capture(TwoStages(4, 2), torch.zeros(2, 3, 12, 12))
    pairs = matched(graph, capture(TwoStages(6, 3), torch.zeros(2, 3, 12, 12)), "stages")
    assert [(a.shape, b.shape) for a, b in pairs] == [((4, 12, 12), (6, 12, 12)), ((8, 6, 6), (12, 6, 6))]
    assert [a.node.meta["stack"] for a, _ in pairs] == ["first.1", "second.1"]
    assert all("sub" not in str(tap.node.target) for tap in cuts(graph))  # the input's normalisation is no feature


def test_embedding_is_what_the_classifier_reads_before_dropout() -> None:
    graph = capture(TwoStages(4, 1), torch.zeros(2, 3, 12, 12))
    ((ours, _),) = matched(graph, graph, "embedding")
    assert ours.shape == (8,)
    assert "dropout" not in str(ours.node.target)


def test_networks_of_one_resolution_are_matched_by_depth() -> None:
    few, many = (capture(TokenStages(depth), torch.zeros(2, 3, 16, 16)) for depth in (4, 8))
    pairs = matched(few, many, "stages")
    assert [a.shape for a, _ in pairs] == [(8, 16)] * 4
    order = {node: index for index, node in enumerate(few.graph.nodes)}
    places = [order[a.node] for a, _ in pairs]
    assert places == sorted(set(places))


def test_names_of_nodes_and_modules() -> None:
    graph = capture(TwoStages(4, 2), torch.zeros(2, 3, 12, 12))
    ((ours, theirs),) = matched(graph, graph, "first=first.1")
    assert ours.node is theirs.node
    ((by_node, _),) = matched(graph, graph, ours.node.name)
    assert by_node == ours
    with pytest.raises(InputError, match=r"layer9.*stem"):
        matched(graph, graph, "layer9")


def test_no_common_resolution_says_so() -> None:
    small, large = (
        capture(TwoStages(4, 1), torch.zeros(2, 3, 12, 12)),
        capture(TwoStages(4, 1), torch.zeros(2, 3, 20, 20)),
    )
    with pytest.raises(InputError, match=r"12x12/6x6 and 20x20/10x10"):
        matched(small, large, "stages")


def test_taps_share_the_tensors_and_change_no_bit() -> None:
    graph = capture(TwoStages(4, 2), torch.zeros(2, 3, 12, 12)).train()
    graph.drop = nn.Module()
    taps = [a for a, _ in matched(graph.eval(), graph, "stages")]
    with_taps = tapped(graph, taps)
    x = torch.randn(3, 3, 12, 12)
    output, values = with_taps(x)
    assert torch.equal(output, graph(x))
    assert [tuple(one.shape[1:]) for one in values] == [tap.shape for tap in taps]
    mine, its = dict(graph.named_parameters()), dict(with_taps.named_parameters())
    assert mine.keys() == its.keys() and all(mine[name] is its[name] for name in mine)
    before = {name: one.clone() for name, one in graph.named_buffers()}
    with_taps.train()(x)
    assert any(
        not torch.equal(before[name], one) for name, one in graph.named_buffers()
    )  # running statistics move in both


def test_features_are_channels_first() -> None:
    graph = capture(TokenStages(2), torch.zeros(2, 3, 16, 16))
    taps = [a for a, _ in matched(graph, graph, "stages")]
    _, values = tapped(graph, taps)(torch.randn(3, 3, 16, 16))
    assert [tuple(one.shape) for one in values] == [(3, 8, 16)] * 4
    assert math.prod(taps[0].resolution) == 16
