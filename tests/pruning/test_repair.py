"""repair(): exact where it can be, never worse where it judges, on what the layers really read; its records and
refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import RepairedStream
from torch import Tensor, fx, nn

from rarefy.artifact.folder import load, save
from rarefy.errors import CheckFailed, DataError, InputError
from rarefy.graph.capture import capture
from rarefy.graph.layers import weighted
from rarefy.graph.nodes import attribute
from rarefy.pruning.least_squares import NormalEquations
from rarefy.pruning.prune import prune
from rarefy.pruning.records import packed, unpacked
from rarefy.pruning.repair import RIDGES, _pairs, kept_channels, repair

aten = torch.ops.aten


def images(count: int, seed: int = 0) -> list[Tensor]:
    """Smooth random pictures, in batches of at most 20: neighbours are alike, as in real ones."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    return list(F.interpolate(small, size=13, mode="bicubic").split(20))


@torch.no_grad()
def settled(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Batch norm as after training: its statistics are those of the pictures."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    for _ in range(3):
        for batch in batches:
            model.train()(batch)
    return model


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    torch.manual_seed(0)
    model = settled(RepairedStream(), images(100, seed=9))
    return capture(model, torch.zeros(2, 3, 13, 13))


@pytest.fixture(scope="module")
def small(net: fx.GraphModule) -> fx.GraphModule:
    return prune(net, macs=0.6)


def wrong(graph: fx.GraphModule, original: fx.GraphModule, seed: int = 5) -> float:
    """Share of the variance of the original's answers, on images that nothing has seen."""
    batch = torch.cat(images(200, seed))
    with torch.no_grad():
        wanted = original(batch)
        return float((graph(batch) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def record(graph: fx.GraphModule) -> dict:  # type: ignore[type-arg]
    return graph.meta["history"][-1]["facts"]


# ------------------------------------------------------------------------------------------------------ least squares


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(6, 8, 3, 1, 1), (7, 5)),
        (lambda: nn.Conv2d(6, 8, (3, 5), (2, 1), (0, 2)), (9, 8)),
        (lambda: nn.Conv2d(6, 8, 3, 1, "same", dilation=2, groups=2), (7, 6)),
        (lambda: nn.Conv2d(6, 8, (2, 4), 1, "same"), (7, 6)),
        (lambda: nn.Conv2d(6, 6, 3, 2, 1, groups=6), (30, 30)),
        (lambda: nn.Conv1d(6, 8, 3, 1, 1), (11,)),
        (lambda: nn.Linear(6, 8), ()),
    ],
)
def test_patches_times_weights_are_the_layers_output(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    layer = make().double()
    graph = capture(layer, torch.zeros(2, 6, *size, dtype=torch.float64))
    node = next(node for node in graph.graph.nodes if weighted(node))
    source = torch.randn(3, 6, *size, dtype=torch.float64)
    wanted = layer(source).detach() - layer.bias.detach().reshape(-1, *[1] * len(size))
    groups = getattr(layer, "groups", 1)
    x, y = _pairs(node, source, wanted, layer.weight.shape, groups, torch.Generator().manual_seed(0))
    weight = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
    assert x.shape[1:3] == (groups, weight.shape[2]) and torch.allclose(weight @ x, y, rtol=1e-10, atol=1e-12)
    assert x.shape[3] == min(64, wanted[0, 0].numel()) and y.unique().numel() == y.numel()  # no place twice


@pytest.mark.parametrize("shifts", [True, False])
def test_solution_and_error_are_those_of_lstsq(shifts: bool) -> None:
    """The ridge as further rows, each weight pulled to where it was; the error by running it."""
    x, y = torch.randn(40, 2, 7, 3) + 0.5, torch.randn(40, 2, 4, 3)
    weight, bias = torch.randn(2, 4, 7), torch.randn(8)
    normal = NormalEquations(weight, bias)
    for part in range(0, 40, 16):
        normal.add(x[part : part + 16], y[part : part + 16])
    change, shift = normal.solve(0.3, shifts)
    total = 0.0
    for group in range(2):
        one = x[:, group].transpose(1, 2).reshape(-1, 7).double()
        error = (
            y[:, group].transpose(1, 2).reshape(-1, 4).double()
            - one @ weight[group].double().T
            - bias.reshape(2, 4)[group].double()
        )
        flat, aim = (one - one.mean(0), error - error.mean(0)) if shifts else (one, error)
        ridge = (0.3 * flat.square().mean(0).mean() * len(flat)).sqrt() * torch.eye(7, dtype=torch.float64)
        solved = torch.linalg.lstsq(
            torch.cat((flat, ridge)), torch.cat((aim, torch.zeros(7, 4, dtype=torch.float64)))
        ).solution
        assert torch.allclose(change[group], solved.T, rtol=1e-4, atol=1e-5)  # products in float32
        left = error - one @ change[group].T - (shift.reshape(2, 4)[group] if shift is not None else 0)
        total += float(left.square().sum())
    assert (shift is not None) == shifts
    assert normal.error(change, shift) == pytest.approx(total / 120, rel=1e-4)
    assert normal.error(change, shift) < normal.error(None, None)


def test_exact_where_the_rest_says_it_all() -> None:
    """16 linear units of 4 inputs: any 4 say the others, so repair must find the original again."""
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 6)), torch.zeros(2, 4))
    cut = prune(graph, keep=0.5)
    batch, fresh = torch.randn(512, 4), torch.randn(100, 4)
    whole = repair(cut, graph, [batch])
    apart = [
        float((one(fresh) - graph(fresh)).detach().square().mean() / graph(fresh).detach().var())
        for one in (cut, whole)
    ]
    assert apart[0] > 0.1 and apart[1] < 1e-4


# ----------------------------------------------------------------------------------------------------- whole networks


def test_answers_come_nearer_on_new_images(net: fx.GraphModule, small: fx.GraphModule) -> None:
    both, norms, layers = (
        repair(small, net, images(200), **options) for options in ({}, {"reconstruct": False}, {"batchnorm": False})
    )
    before = wrong(small, net)
    assert before > 0.05
    assert wrong(both, net) < 0.4 * before and wrong(layers, net) < 0.4 * before
    facts = record(both)
    assert facts["images"] == 200 and facts["reestimated"] == ["bn1", "bn2", "bn3"]  # what bn0 reads is as it was
    assert [layer["name"] for layer in facts["reconstructed"]] == ["conv1", "depth", "conv2", "grouped", "head"]
    assert all(
        layer["wrong"] <= layer["wrong_before"] and layer["ridge"] in (None, *RIDGES)
        for layer in facts["reconstructed"]
    )
    assert record(norms)["reconstructed"] == [] and record(layers)["reestimated"] == []


def test_batch_norm_has_the_statistics_of_what_it_reads(net: fx.GraphModule, small: fx.GraphModule) -> None:
    given = images(90)
    whole = repair(small, net, given)
    read: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            if node.target is aten.batch_norm.default:
                read[str(node.args[3].target)] = self.env[node.args[0]]
            return super().run_node(node)

    with torch.no_grad():
        Watch(whole).run(torch.cat(given))
    for name in ("bn1", "bn2", "bn3"):
        flat = read[f"{name}.running_mean"].transpose(0, 1).flatten(1).double()
        mean, variance = attribute(whole, f"{name}.running_mean"), attribute(whole, f"{name}.running_var")
        assert torch.allclose(mean.double(), flat.mean(1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(variance.double(), flat.var(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(attribute(whole, "bn0.running_mean"), attribute(small, "bn0.running_mean"))


def test_inputs_stay_and_the_seed_decides(net: fx.GraphModule, small: fx.GraphModule) -> None:
    before = [{name: value.clone() for name, value in graph.state_dict().items()} for graph in (net, small)]
    history = copy.deepcopy(small.meta["history"])
    one, two = (repair(small, net, images(60), seed=1) for _ in range(2))
    for graph, state in zip((net, small), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())
    assert small.meta["history"] == history and len(one.meta["history"]) == len(history) + 1
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.training == small.training and all(value.requires_grad for value in one.parameters())
    assert one.train()(torch.cat(images(4))).requires_grad  # it can be trained


def test_a_layer_that_would_not_gain_stays(net: fx.GraphModule) -> None:
    """The head reads noise of its own from few images: where no ridge lowers the error of the images that judge,
    nothing is changed."""
    cut = prune(net, keep=0.9)
    whole = repair(cut, net, images(12), batchnorm=False)
    for layer in record(whole)["reconstructed"]:
        same = torch.equal(attribute(whole, f"{layer['name']}.weight"), attribute(cut, f"{layer['name']}.weight"))
        assert same == (layer["ridge"] is None)


def tokens() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    return model


def test_transformer() -> None:
    """Tokens, and a projection that takes (positions, images, channels)."""
    torch.manual_seed(0)
    batches = [F.interpolate(batch, size=32) for batch in images(120)]
    graph = capture(tokens(), torch.zeros(2, 3, 32, 32))
    cut = prune(graph, macs=0.7)
    whole = repair(cut, graph, batches)
    fresh = torch.cat([F.interpolate(batch, size=32) for batch in images(60, seed=5)])
    with torch.no_grad():
        apart = [float((one(fresh) - graph(fresh)).square().sum()) for one in (cut, whole)]
    assert apart[1] < 0.7 * apart[0]
    assert any(".in_proj" in layer["name"] or "out_proj" in layer["name"] for layer in record(whole)["reconstructed"])


def test_two_prunings_and_a_file(net: fx.GraphModule, tmp_path: Path) -> None:
    """Channels are followed through both records, and through a file."""
    once = prune(net, keep=0.8)
    twice = prune(once, keep=0.7)
    kept = kept_channels(twice, net)
    stem = attribute(twice, "stem.weight")
    assert 0 < len(kept["stem.weight"]) == len(stem) < 16 and torch.equal(
        stem, attribute(net, "stem.weight")[kept["stem.weight"]]
    )
    save(twice, tmp_path / "twice")
    one, two = (repair(graph, net, images(40)) for graph in (twice, load(tmp_path / "twice")))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert wrong(one, net) < wrong(twice, net)
    save(one, tmp_path / "one")
    assert record(load(tmp_path / "one"))["images"] == 40


def test_masks_as_text() -> None:
    mask = torch.rand(37) > 0.5
    assert torch.equal(unpacked(packed(mask), 37), mask.nonzero().flatten()) and len(packed(mask)) == 10


def test_fewer_images_where_memory_is_short(net: fx.GraphModule, small: fx.GraphModule) -> None:
    few = record(repair(small, net, images(200), memory=3e6))["images"]
    assert 8 <= few < 200
    with pytest.raises(InputError, match="repair: memory=1e.04 bytes hold the activations of 0 images; raise it to"):
        repair(small, net, images(200), memory=1e4)


# ------------------------------------------------------------------------------------------------------- from prune()


class Task:
    name = "own"

    @property
    def data(self) -> Task:
        return self

    def inputs(
        self, split: str, count: int, batch_size: int, seed: int = 0, device: object = "cpu"
    ) -> Iterator[Tensor]:
        assert split == "train" and count == 512
        return iter(images(100, seed))


def test_prune_repairs(net: fx.GraphModule, small: fx.GraphModule) -> None:
    whole = prune(net, macs=0.6, task=Task(), repair=True, seed=3)
    by_hand = repair(small, net, images(100, 3), seed=3)
    assert all(torch.equal(value, by_hand.state_dict()[name]) for name, value in whole.state_dict().items())
    (made,) = whole.meta["history"]
    assert made["options"]["repair"] is True and made["facts"]["repair"] == record(by_hand)
    with pytest.raises(InputError, match="repair=True needs images: pass task="):
        prune(net, macs=0.6, repair=True)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_refusals(net: fx.GraphModule, small: fx.GraphModule) -> None:
    for options, message in (
        ({"images": 4}, "images=4.*at least 8 images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batchnorm": False, "reconstruct": False}, "both off; leave at least one on"),
    ):
        with pytest.raises(InputError, match=message):
            repair(small, net, images(20), **options)
    with pytest.raises(DataError, match="5 images are too few; give at least 8"):
        repair(small, net, images(5))
    with pytest.raises(DataError, match="0 images are too few"):
        repair(small, net, [])
    with pytest.raises(InputError, match=r"a batch of shape \[20, 3, 9, 9\] for \w+: the model takes \(N, 3, 13, 13\)"):
        repair(small, net, [torch.zeros(20, 3, 9, 9)])
    with pytest.raises(InputError, match="no record of pruning"):
        repair(net, net, images(20))
    with pytest.raises(InputError, match="stem.weight: the original is not what the graph was pruned from"):
        repair(prune(small, keep=0.5), copy_without_record(small), images(20))
    with pytest.raises(CheckFailed, match="conv1: yields NaN or infinity on the images"):
        repair(small, net, [torch.full((20, 3, 13, 13), torch.nan)])


def copy_without_record(graph: fx.GraphModule) -> fx.GraphModule:
    copied = copy.deepcopy(graph)
    copied.meta["history"] = []
    return copied


def test_two_thirds_of_the_loss_on_real_weights(real_data: Path) -> None:
    """ResNet-20, 0.7 of its MACs, 200 images without labels, 500 test images."""
    from bench import real_data as bench

    (pictures, labels), (training, _) = bench.cifar10("val"), bench.cifar10("train")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    test, some = ((torch.from_numpy(array) / 255 - mean) / std for array in (pictures[:500], training[:200]))
    graph = capture(bench.resnet20(), test[:2])

    @torch.no_grad()
    def accuracy(graph: fx.GraphModule) -> float:
        return float((graph(test).argmax(1) == torch.from_numpy(labels[:500])).float().mean())

    cut = prune(graph, macs=0.7)
    original, pruned, whole = accuracy(graph), accuracy(cut), accuracy(repair(cut, graph, some.split(64)))
    assert original - pruned > 0.1 and whole - pruned > 2 / 3 * (original - pruned)


@pytest.mark.gpu
def test_repairs_on_the_gpu(net: fx.GraphModule, small: fx.GraphModule) -> None:
    whole = repair(copy.deepcopy(small).cuda(), copy.deepcopy(net).cuda(), images(100))
    assert all(value.is_cuda for value in whole.state_dict().values())
    assert wrong(whole.cpu(), net) < 0.4 * wrong(small, net)
