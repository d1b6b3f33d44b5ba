"""mask(): which weights go, that training leaves them gone, and how they are stored."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from digits import digits
from hypothesis import strategies as st
from networks import EveryConvolution
from torch import Tensor, fx, nn

from rarefy.artifact import folder as folder_
from rarefy.artifact.coding import packing
from rarefy.cli import main
from rarefy.compression.budget import Budget
from rarefy.compression.compress import compress
from rarefy.distillation.distill import distill, train
from rarefy.errors import FormatError, InputError
from rarefy.graph.capture import capture
from rarefy.pruning.mask import _blocks, _shares, mask, weights_of
from rarefy.pruning.options import parse
from rarefy.pruning.saliency.wanda import Wanda
from rarefy.reports import view
from rarefy.tasks.classification import Classification

QUICK = {"epochs": 2, "batch_size": 96, "lr": 0.05, "progress": False, "validate_every": 0}


@functools.cache
def net() -> fx.GraphModule:
    torch.manual_seed(5)
    return capture(EveryConvolution(), torch.zeros(2, 1, 8, 8))


class Stopped(Exception):
    pass


class Stopping:
    """The task, until so many training batches were read."""

    def __init__(self, task: Any, left: int):
        self.task, self.left = task, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    @property
    def data(self) -> Stopping:
        return self

    def batches(self, *args: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.task.batches(*args, **options):
            if options.get("augment") and self.left == 0:
                raise Stopped
            self.left -= bool(options.get("augment"))
            yield batch


def zeros(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {name: graph.get_parameter(name).detach() == 0 for name in graph.meta["sparse"]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(graph: nn.Module) -> dict[str, Tensor]:
    return graph.state_dict()


# -- which weights go


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=4)


@hypothesis.given(
    shape=shapes, n=st.integers(1, 5), more=st.integers(1, 5), axis=st.integers(0, 1), seed=st.integers(0, 2**31)
)
def test_of_each_block_the_n_largest_stay(shape: list[int], n: int, more: int, axis: int, seed: int) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    alive = _blocks({"w": scores}, {"w": axis}, parse(f"{n}:{n + more}"))["w"]
    assert alive.shape == scores.shape and alive.dtype == torch.bool
    for block, own in zip(alive.split(n + more, axis), scores.split(n + more, axis), strict=True):
        assert bool((block.sum(axis) == min(n, block.shape[axis])).all())  # the last, shorter block too
        least = own.masked_fill(~block, math.inf).amin(axis)
        assert bool((own.masked_fill(block, -math.inf).amax(axis) <= least).all())


@hypothesis.given(
    shape=shapes,
    share=st.floats(0.01, 0.99),
    scope=st.sampled_from(["global", "layer", "output"]),
    seed=st.integers(0, 2**31),
)
def test_of_each_set_the_largest_stay(shape: list[int], share: float, scope: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = {
        "a": torch.rand(shape, generator=draw),
        "b": torch.rand(3, 5, generator=draw),
        "c": torch.rand(4, 2, 3, generator=draw),
    }
    axes = {"a": 1, "b": 1, "c": 0}
    alive = _shares(scores, axes, share, scope)
    if scope == "global":
        sets = [
            (
                torch.cat([one.flatten() for one in scores.values()]),
                torch.cat([alive[name].flatten() for name in scores]),
            )
        ]
    elif scope == "layer":
        sets = [(scores[name].flatten(), alive[name].flatten()) for name in scores]
    else:
        sets = [
            pair
            for name in scores
            for pair in zip(scores[name].unbind(1 - axes[name]), alive[name].unbind(1 - axes[name]), strict=True)
        ]
    for own, kept in sets:
        assert int((~kept).sum()) == round(share * kept.numel())
        if bool(kept.any()) and not bool(kept.all()):
            assert float(own[kept].min()) >= float(own[~kept].max())


def test_equals_keep_the_first() -> None:
    assert _blocks({"w": torch.ones(1, 4)}, {"w": 1}, parse("2:4"))["w"].tolist() == [[True, True, False, False]]
    assert _shares({"w": torch.ones(1, 4)}, {"w": 1}, 0.5, "layer")["w"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("sparsity", [0.5, "0.5", "2:4", "4:8", "1:3"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda:images=32"])
def test_a_masked_network_is_the_network_with_zeros(sparsity: float | str, criterion: str) -> None:
    before = {name: value.clone() for name, value in state(net()).items()}
    sparse = mask(net(), sparsity=sparsity, criterion=criterion, task=digits())
    assert all(
        torch.equal(value, before[name]) for name, value in state(net()).items()
    )  # the caller's model is left alone
    weights = [f"{name}.weight" for name in ("first", "grouped", "depthwise", "up", "out")]
    assert sparse.meta["sparse"] == sorted(weights)
    for name, value in state(sparse).items():
        gone = (value == 0) & (before[name] != 0)
        assert torch.equal(torch.where(gone, value, before[name]), value)
        assert bool(gone.any()) <= (name in weights)
    facts = sparse.meta["history"][-1]["facts"]
    total = sum(before[name].numel() for name in weights)
    left = sum(int((state(sparse)[name] != 0).sum()) for name in weights)
    assert (facts["weights"], facts["nonzero"]) == (total, left) and facts["sparsity"] == pytest.approx(
        1 - left / total
    )
    assert "no faster" in facts["note"]
    if str(sparsity) == "0.5":
        assert abs(facts["sparsity"] - 0.5) < 0.05
    else:
        n, m = map(int, str(sparsity).split(":"))
        axes = {name: axis for name, (axis, _) in weights_of(sparse).items()}
        assert axes == {name: 0 if name == "up.weight" else 1 for name in weights}
        for name, axis in axes.items():
            for block in (state(sparse)[name] != 0).split(m, axis):
                assert bool((block.sum(axis) <= n).all())


def test_a_denser_mask_only_adds_zeros() -> None:
    once = mask(net(), sparsity=0.5)
    twice = mask(once, sparsity=0.8)
    assert all(bool((gone <= zeros(twice)[name]).all()) for name, gone in zeros(once).items())
    assert [record["step"] for record in twice.meta["history"]] == ["mask", "mask"]


def test_what_is_ignored_stays_dense() -> None:
    sparse = mask(net(), sparsity=0.5, ignore=["first", "o*"])
    assert sparse.meta["sparse"] == ["depthwise.weight", "grouped.weight", "up.weight"]
    assert torch.equal(sparse.first.weight, net().first.weight) and torch.equal(sparse.out.weight, net().out.weight)


def test_wanda_weighs_by_what_each_weight_multiplies() -> None:
    """Against windows cut out by hand: stride, padding, dilation and groups included."""
    batch = torch.cat(list(digits().inputs("train", 20, 20, seed=0)))
    found = {name: nodes for name, (_, nodes) in weights_of(net()).items()}
    scores = Wanda(images=20, batch_size=7).scores(net(), found, digits(), 0)
    seen: dict[str, Tensor] = {}
    module = EveryConvolution().eval()
    module.load_state_dict(net().state_dict())
    for name, one in module.named_children():
        one.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].detach()}))
    with torch.no_grad():
        module(batch)
    for name in ("first", "grouped", "depthwise"):
        layer, x = module.get_submodule(name), seen[name]
        windows = (
            nn.functional.unfold(x, 3, layer.dilation, layer.padding, layer.stride)
            .square()
            .sum((0, 2))
            .reshape(x.shape[1], 3, 3)
        )
        inputs = windows.unflatten(0, (layer.groups, -1)).repeat_interleave(layer.out_channels // layer.groups, 0)
        torch.testing.assert_close(
            scores[f"{name}.weight"], layer.weight.detach().abs() * inputs.sqrt(), rtol=1e-4, atol=1e-5
        )
    norms = seen["out"].square().sum(0).sqrt()
    torch.testing.assert_close(scores["out.weight"], module.out.weight.detach().abs() * norms, rtol=1e-4, atol=1e-5)
    norms = seen["up"].square().sum((0, 2, 3)).sqrt()[:, None, None, None]
    torch.testing.assert_close(scores["up.weight"], module.up.weight.detach().abs() * norms, rtol=1e-4, atol=1e-5)


def test_wanda_keeps_more_of_the_answer_than_magnitude() -> None:
    """Inputs of very different size, one linear layer: what Wanda is for."""
    torch.manual_seed(0)
    scale = torch.logspace(-2, 2, 64)
    images = (torch.rand(200, 1, 8, 8) * 255).to(torch.uint8)
    task = Classification(
        train=(images.numpy(), np.arange(200) % 10), val=None, augment="none", mean=(0.0,), std=(1.0,)
    )
    model = nn.Sequential(nn.Flatten(), _Scale(scale), nn.Linear(64, 10))
    graph = capture(model, torch.zeros(2, 1, 8, 8))
    x = next(iter(task.inputs("train", 200, 200)))
    errors = {}
    for criterion in ("magnitude", "wanda"):
        with torch.no_grad():
            errors[criterion] = float(
                (mask(graph, sparsity=0.5, criterion=criterion, scope="output", task=task)(x) - graph(x))
                .square()
                .mean()
            )
    assert errors["wanda"] < 0.1 * errors["magnitude"]


class _Scale(nn.Module):
    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0}, "write 0.5 or 2:4"),
        ({"sparsity": 1.0}, "write 0.5 or 2:4"),
        ({"sparsity": True}, "write 0.5 or 2:4"),
        ({"sparsity": "4:2"}, "write 0.5 or 2:4"),
        ({"sparsity": "0:4"}, "write 0.5 or 2:4"),
        ({"sparsity": "half"}, "write 0.5 or 2:4"),
        ({"sparsity": math.nan}, "write 0.5 or 2:4"),
        ({"sparsity": "2:4", "scope": "layer"}, "goes with a share"),
        ({"sparsity": 0.5, "scope": "row"}, "global, layer, output"),
        ({"sparsity": 0.5, "criterion": "taylor"}, "have magnitude, wanda"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "pass task="),
        ({"sparsity": 0.5, "criterion": "wanda:images=0"}, "at least 1"),
        ({"sparsity": 0.5, "ignore": ["fc"]}, "names look like first.weight"),
        ({"sparsity": 0.5, "ignore": ["*"]}, "nothing can be masked"),
    ],
)
def test_bad_input_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        mask(net(), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -- training leaves them gone


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sparsity", [0.7, "2:4"])
def test_training_keeps_the_zeros_and_moves_the_rest(optimizer: str, sparsity: float | str) -> None:
    sparse = mask(net(), sparsity=sparsity)
    for ema in (0.0, 0.9):
        trained = distill(sparse, net(), digits(), optimizer=optimizer, ema=ema, accumulate=2, **QUICK)
        assert same(zeros(trained), zeros(sparse)) and trained.meta["sparse"] == sparse.meta["sparse"]
        for name, gone in zeros(sparse).items():
            moved = trained.get_parameter(name) != sparse.get_parameter(name)
            assert not bool(moved[gone].any()) and float(moved[~gone].float().mean()) > 0.95
    dense = distill(net(), net(), digits(), optimizer=optimizer, **QUICK)
    assert not any(
        bool((value == 0).any()) for name, value in dense.named_parameters() if name in sparse.meta["sparse"]
    )


@pytest.mark.parametrize("stop", [1, 14, 20])
def test_a_stopped_training_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    sparse = mask(net(), sparsity=0.7)
    run = functools.partial(train, sparse, checkpoint=tmp_path, checkpoint_seconds=0, ema=0.9, **QUICK)
    with pytest.raises(Stopped):
        run(Stopping(digits(), stop))
    resumed = run(digits())
    whole = train(sparse, digits(), ema=0.9, **QUICK)
    assert same(state(resumed), state(whole)) and same(zeros(resumed), zeros(sparse))


# -- how they are stored


@hypothesis.given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]),
    seed=st.integers(0, 2**31),
)
def test_sparse_bytes_come_back(shape: list[int], share: float, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    value = (torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) < share)).to(dtype)
    packed = packing.sparse_pack(value)
    back = packing.sparse_unpack(packed, shape, dtype)
    assert packed.dtype == torch.uint8 and packed.shape == (packing.sparse_size(value),)
    assert back.dtype == dtype and back.shape == value.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_sparse_golden_bytes() -> None:
    packed = packing.sparse_pack(torch.tensor([[0.0, 1.5], [0.0, -2.0]]))
    assert bytes(packed.tolist()).hex() == "0a0000c03f000000c0"
    special = torch.tensor([-0.0, 0.0, float("nan"), float("-inf")])
    back = packing.sparse_unpack(packing.sparse_pack(special), [4], torch.float32)
    assert torch.equal(back.view(torch.int32), special.view(torch.int32))  # -0.0 and NaN, bit for bit


@pytest.mark.parametrize(
    ("content", "shape", "words"),
    [
        (b"", [4], "at least"),
        (b"\x0a\x00\x00\xc0\x3f", [4], "take 9 bytes"),
        (b"\x0a\x00\x00\xc0\x3f\x00\x00\x00\xc0\x00", [4], "take 9 bytes"),
        (b"\x1a\x00\x00\xc0\x3f\x00\x00\x00\xc0", [4], "not zero"),
        (b"\x0a\x00\x00\xc0\x3f\x00\x00\x00\x00", [4], "a zero is stored"),
        (b"\x00", [2**40], "at least"),
    ],
)
def test_other_sparse_bytes_are_refused(content: bytes, shape: list[int], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        packing.sparse_unpack(torch.tensor(list(content), dtype=torch.uint8), shape, torch.float32)


@pytest.mark.parametrize(("sparsity", "most"), [("2:4", 0.60), (0.9, 0.22)])
def test_a_saved_folder_is_smaller_and_comes_back(tmp_path: Path, sparsity: float | str, most: float) -> None:
    torch.manual_seed(0)
    dense = capture(
        nn.Sequential(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 64)), torch.zeros(2, 4, 8, 8)
    )
    sparse = mask(dense, sparsity=sparsity).to(memory_format=torch.channels_last)
    sizes = [
        (folder_.save(one, tmp_path / name) / "weights.safetensors").stat().st_size
        for one, name in ((dense, "d"), (sparse, "s"))
    ]
    assert sizes[1] < most * sizes[0]
    loaded = folder_.load(tmp_path / "s")
    assert same(state(loaded), state(sparse)) and loaded.meta == sparse.meta
    weight = loaded.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.requires_grad
    folder_.save(loaded, tmp_path / "again")
    assert folder_.content_hash(tmp_path / "again") == folder_.content_hash(tmp_path / "s")
    (loaded(torch.randn(2, 4, 8, 8)).sum()).backward()  # it trains on


def test_what_sparse_storage_does_not_shrink_is_stored_as_it_is(tmp_path: Path) -> None:
    graph = mask(net(), sparsity=0.02)
    entries = json.loads((folder_.save(graph, tmp_path / "m") / "graph.json").read_text())["tensors"]
    assert not any("stored" in entry for entry in entries.values())
    assert same(state(folder_.load(tmp_path / "m")), state(graph))


def _damaged(folder: Path, change: Any) -> Path:
    """The folder with weights.safetensors and graph.json changed, and the hashes made to fit."""
    weights, text = folder / "weights.safetensors", folder / "graph.json"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, graph = json.loads(data[8 : 8 + length]), json.loads(text.read_text())
    body = change(header, graph["tensors"], bytearray(data[8 + length :]))
    written = json.dumps(header).encode()
    weights.write_bytes(len(written).to_bytes(8, "little") + written + bytes(body))
    text.write_text(json.dumps(graph))
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in (weights, text):
        manifest["files"][path.name] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _one_more(header: dict[str, Any], tensors: dict[str, Any], body: bytearray) -> bytearray:
    begin = header["grouped.weight"]["data_offsets"][0]
    byte = next(index for index in range(begin, begin + 81) if body[index] != 0xFF)
    body[byte] |= 1 << [body[byte] >> bit & 1 for bit in range(8)].index(0)
    return body


def _larger(header: dict[str, Any], tensors: dict[str, Any], body: bytearray) -> bytearray:
    tensors["grouped.weight"]["shape"] = [2**20, 2**20]
    return body


def _with_bits(header: dict[str, Any], tensors: dict[str, Any], body: bytearray) -> bytearray:
    tensors["grouped.weight"]["bits"] = 4
    return body


def _a_zero(header: dict[str, Any], tensors: dict[str, Any], body: bytearray) -> bytearray:
    end = header["grouped.weight"]["data_offsets"][1]
    body[end - 4 : end] = bytes(4)
    return body


def _of_integers(header: dict[str, Any], tensors: dict[str, Any], body: bytearray) -> bytearray:
    tensors["grouped.weight"].update(dtype="int32", requires_grad=False)
    return body


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_one_more, "sparse weights take"),
        (_larger, "the bits of its shape alone take"),
        (_with_bits, "can't be stored as sparse weights"),
        (_a_zero, "a zero is stored"),
        (_of_integers, "can't be stored as sparse weights"),
    ],
)
def test_a_damaged_sparse_tensor_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    folder = folder_.save(mask(net(), sparsity=0.6, scope="layer"), tmp_path / "m")
    assert same(state(folder_.load(_damaged(folder, lambda header, tensors, body: body))), state(folder_.load(folder)))
    with pytest.raises(FormatError, match=words) as caught:
        folder_.load(_damaged(folder, change))
    assert "grouped.weight" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("sparse", ["first.weight", ["nothing"], [1]])
def test_a_damaged_list_of_sparse_tensors_is_refused(tmp_path: Path, sparse: Any) -> None:
    folder = folder_.save(net(), tmp_path / "m")
    text = (folder / "graph.json").read_text()
    graph = json.loads(text)
    graph["meta"]["sparse"] = sparse
    (folder / "graph.json").write_text(json.dumps(graph))
    with pytest.raises(FormatError, match="meta.sparse"):
        folder_.load(_damaged(folder, lambda header, tensors, body: body))


# -- within compress, and on the command line


@pytest.mark.slow
def test_compress_prunes_by_rounds_masks_and_keeps_the_zeros(tmp_path: Path) -> None:
    dense = train(net(), digits(), **{**QUICK, "epochs": 4})
    steps = [
        {"do": "prune", "macs": 0.7, "schedule": "iterative:rounds=2,epochs=1,batch_size=96"},
        {"do": "mask", "sparsity": 0.6},
        {"do": "distill", "epochs": 2, "batch_size": 96},
    ]
    result = compress(
        dense,
        digits(),
        budget=Budget(max_drop=0.9),
        steps=steps,
        corruptions=(),
        workdir=tmp_path / "w",
        progress=False,
    )
    assert [step["kept"] for step in result.report["steps"]][1] is True, result.report["steps"]
    masked = folder_.load(tmp_path / "w" / "2-mask")
    assert same(zeros(folder_.load(tmp_path / "w" / "3-distill")), zeros(masked)) and masked.meta["sparse"]
    assert masked.meta["history"][-2]["options"]["schedule"].startswith("iterative")
    sizes = [
        (tmp_path / "w" / name / "weights.safetensors").stat().st_size for name in ("1-prune", "2-mask", "3-distill")
    ]
    assert sizes[1] < 0.85 * sizes[0] and sizes[2] == sizes[1]
    note = [fact for step in view.view(result.report)["steps"] for fact in step["facts"] if fact[0] == "note"]
    assert note and "no faster" in note[0][1]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_.save(net(), tmp_path / "dense")
    arguments = [
        "mask",
        str(tmp_path / "dense"),
        "--sparsity",
        "2:4",
        "--criterion",
        "wanda:images=16",
        "--data",
        "sklearn:digits",
    ]
    assert main.run([*arguments, "-o", str(tmp_path / "sparse"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == "mask" and found["facts"]["note"].endswith("no faster on onnxruntime")
    assert folder_.load(tmp_path / "sparse").meta["sparse"]
    assert main.run(["mask", str(tmp_path / "dense"), "--sparsity", "3", "-o", str(tmp_path / "x")]) == 2
    assert "write 0.5 or 2:4" in capsys.readouterr().err and not (tmp_path / "x").exists()
