"""What training code saves: the model's tensors are found in it by their names, told of, and nothing of it is run."""

from __future__ import annotations

import argparse
import copy
import datetime
import enum
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from bounds import bounded
from safetensors.torch import save_file
from torch import Tensor, nn

import rarefy
from rarefy.cli.main import run
from rarefy.errors import FormatError, InputError
from rarefy.models import checkpoint
from rarefy.models.weights import load_weights

State = dict[str, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def small() -> nn.Module:
    return net()


@pytest.fixture
def good() -> State:
    torch.manual_seed(3)
    return {name: torch.rand_like(value) if value.is_floating_point() else value + 7
            for name, value in net().state_dict().items()}  # fmt: skip


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def loaded(path: str | Path, model: nn.Module | None = None) -> tuple[State, str | None]:
    model = net() if model is None else model
    told = load_weights(model, path)
    return model.state_dict(), told


def same(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


class Colour(enum.Enum):
    RED = 1


class Config(dict[str, object]):
    """A dictionary with a class of its own, as easydict's and Lightning's are."""


ADAM = {"state": {index: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(4, 3, 3, 3)} for index in range(3)},
        "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}  # fmt: skip

FORMS: dict[str, Callable[[State], object]] = {
    "DDP": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled DDP under a key": lambda s: {"state_dict": under("_orig_mod.module.", s)},
    "compiled inside a module": lambda s: {"state_dict": under("net._orig_mod.", s)},
    "FSDP": lambda s: {f"_fsdp_wrapped_module.{n.replace('.', '._checkpoint_wrapped_module.', 1)}": v
                       for n, v in s.items()},
    "Lightning": lambda s: {"state_dict": under("model.", s), "epoch": 1, "optimizer_states": [ADAM],
                            "hyper_parameters": Config(lr=0.1), "pytorch-lightning_version": "2.1"},
    "Lightning, a loss's weights beside": lambda s: {
        "state_dict": {**under("net.", s), "criterion.weight": torch.ones(4)}
    },
    "student of a distiller": lambda s: {
        "state_dict": {**under("module.student.", s), "module.adapter.weight": torch.ones(2)}
    },
    "student and a larger teacher": lambda s: {**under("student.", s), "teacher.0.weight": torch.ones(8, 3, 3, 3)},
    **{f"key {key}": lambda s, key=key: {key: s, "epoch": 7, "acc": 93.0, "optimizer": ADAM}
       for key in ("net", "model", "params", "ema", "state_dict", "model_state_dict", "weights", "network", "module")},
    "keys in keys": lambda s: {"checkpoint": {"state": {"model": s}}},
    "averaged model": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "averaged model under a key": lambda s: {"swa_state_dict": {"n_averaged": torch.tensor(3), **under("module.", s)}},
    "counted by a profiler": lambda s: {**s, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "in parts": lambda s: {"0": {n[2:]: v for n, v in s.items() if n[0] == "0"},
                           **{n: v for n, v in s.items() if n[0] != "0"}},
    "a Namespace beside": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("runs"))},
    "a Namespace first": lambda s: {"args": argparse.Namespace(lr=0.1), "model": under("module.", s)},
    "plain data beside": lambda s: {
        "model": s, "when": datetime.datetime(2024, 1, 1), "kind": Colour.RED, "hits": defaultdict(list, a=[1]),
        "best": np.float64(3.0), "curve": np.arange(4.0), "where": Path("a") / "b", "config": Config(a=1, b=[2]),
        "options": types.SimpleNamespace(a=1), "make": partial(dict, a=1), "bounds": (1, 2.5, None, {3, 4}),
    },
    "a scheduler beside": lambda s: {"model": s, "scheduler": torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1), 1).state_dict()},
    "without counters of batches": lambda s: {n: v for n, v in s.items() if "num_batches" not in n},
    "half": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_found_in_what_training_code_saves(tmp_path: Path, good: State, form: str, old: bool) -> None:
    if form == "half":
        good = {name: value.half().float() if value.is_floating_point() else value for name, value in good.items()}
    torch.save(FORMS[form](good), tmp_path / "w.ckpt", _use_new_zipfile_serialization=not old)
    model = net()
    counters = {name: value for name, value in model.state_dict().items() if "num_batches" in name}
    found, _ = loaded(tmp_path / "w.ckpt", model)
    assert same(found, good if form != "without counters of batches" else {**good, **counters})


def test_a_plain_state_dict_needs_no_word(tmp_path: Path, good: State) -> None:
    torch.save(good, tmp_path / "w.pth")
    assert loaded(tmp_path / "w.pth")[1] is None
    save_file(good, tmp_path / "w.safetensors")
    assert loaded(tmp_path / "w.safetensors")[1] is None


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("DDP", "9 tensors taken without the prefix 'module.'"),
        ("key net", "9 tensors taken of the entry 'net'"),
        ("Lightning", "9 tensors taken of the entry 'state_dict' without the prefix 'model.'"),
        (
            "Lightning, a loss's weights beside",
            "9 tensors taken of the entry 'state_dict' without the prefix 'net.'; "
            "left there: state_dict.criterion.weight",
        ),
        ("keys in keys", "9 tensors taken of the entry 'checkpoint.state.model'"),
    ],
)
def test_what_was_taken_is_told(
    tmp_path: Path, good: State, form: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(FORMS[form](good), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "rarefy"):
        assert loaded(tmp_path / "w.pth")[1] == said.replace("9 tensors", f"{len(good)} tensors")
    assert said[2:] in caplog.text


@pytest.mark.parametrize(
    ("average", "plain"),
    [
        ("state_dict_ema.", "state_dict."), ("ema_model.", "online_model."), ("model_ema.module.", "model.module."),
        ("ema.shadow.", "net."), ("state_dict.ema_model.", "state_dict.model."), ("swa.module.", "net."),
    ],
)  # fmt: skip
def test_of_an_averaged_copy_and_a_plain_one_the_averaged_is_taken_and_told(
    tmp_path: Path, good: State, average: str, plain: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({**under(average, good), **under(plain, zeros(good))}, tmp_path / "w.pth")
    found, told = loaded(tmp_path / "w.pth")
    assert same(found, good) and told is not None
    assert f"an averaged copy (the plain one: ?prefix={plain})" in told and told in caplog.text
    assert same(loaded(f"{tmp_path / 'w.pth'}?prefix={plain}")[0], zeros(good))  # the way out, followed
    torch.save({**zeros(good), "ema": under("module.", good)}, tmp_path / "r.pth")
    assert same(loaded(tmp_path / "r.pth")[0], good)
    assert same(loaded(f"{tmp_path / 'r.pth'}?prefix=")[0], zeros(good))
    nested = {"state_dict": zeros(good), "state_dict_ema": good, "optimizer": ADAM}
    torch.save(nested, tmp_path / "n.pth")
    assert same(loaded(tmp_path / "n.pth")[0], good)
    assert same(loaded(f"{tmp_path / 'n.pth'}?prefix=state_dict")[0], zeros(good))


def test_equal_copies_are_one(tmp_path: Path, good: State) -> None:
    torch.save({"teacher": good, "student": {name: value.clone() for name, value in good.items()}}, tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth")[0], good)


def test_two_that_fit_are_refused_by_name_and_one_can_be_named(tmp_path: Path, good: State) -> None:
    torch.save({"state_dict": {**under("teacher.", good), **under("student.", zeros(good))}}, tmp_path / "w.pth")
    with pytest.raises(InputError) as raised:
        loaded(tmp_path / "w.pth")
    said = str(raised.value)
    assert "2 parts of it fit the model: 'state_dict.teacher.', 'state_dict.student.'" in said and "\n" not in said
    way_out = said.rpartition("'")[0].rpartition("'")[2]
    assert same(loaded(way_out)[0], good)
    with pytest.raises(InputError, match="none of the model's names is there under 'pupil.'"):
        loaded(f"{tmp_path / 'w.pth'}?prefix=pupil")
    with pytest.raises(InputError, match=r"'entry=a' is no option of a file of weights; write .*w.pth\?prefix=NAME"):
        loaded(f"{tmp_path / 'w.pth'}?entry=a")


def test_a_wrapped_model_takes_plain_weights(tmp_path: Path, good: State) -> None:
    torch.save({"state_dict": good}, tmp_path / "w.pth")
    model = nn.Module()
    model.core = net()
    _, told = loaded(tmp_path / "w.pth", model)
    assert same(model.core.state_dict(), good) and told is not None and "into 'core.'" in told
    compiled: Any = torch.compile(net())
    assert same(loaded(tmp_path / "w.pth", compiled)[0], under("_orig_mod.", good))


def test_a_part_of_a_larger_model(tmp_path: Path, good: State) -> None:
    torch.save({**under("backbone.", good), "head.weight": torch.zeros(9, 3)}, tmp_path / "w.pth")
    found, told = loaded(tmp_path / "w.pth")
    assert same(found, good) and told is not None and told.endswith("left there: head.weight")


def test_tied_weights_may_be_there_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    value = torch.rand(5, 3)
    save_file({"embed.weight": value}, tmp_path / "w.safetensors")
    model = Tied()
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.head.weight, value) and model.head.weight is model.embed.weight


def test_layers_that_take_their_shape_from_the_file(tmp_path: Path, good: State) -> None:
    torch.save({"net": good}, tmp_path / "w.pth")
    model = net()
    model[3] = nn.LazyLinear(3)
    assert same(loaded(tmp_path / "w.pth", model)[0], good)


def test_weights_in_several_files(tmp_path: Path, good: State) -> None:
    names = list(good)
    for number, part in enumerate((names[:4], names[4:])):
        save_file({f"model.{name}": good[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    places = {f"model.{name}": f"part-{int(name in names[4:])}.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    assert same(loaded(index)[0], good)
    for written, said in (
        ("{}", "no index of weights"),
        ("[1", "no index of weights"),
        ('{"weight_map": {"a": "../w.safetensors"}}', "no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no file beside it"),
        ('{"weight_map": {"a": 3}}', "no file beside it|no index"),
        ('{"weight_map": {"a": "other.index.json"}}', "no file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no such file"),
    ):
        index.write_text(written, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            loaded(index)


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("0.bias"), "under 'state_dict.model.' 0.bias is missing there; give"),
        (lambda s: s.update({"9.bias": torch.zeros(2)}), "9.bias is not in the model; give"),
        (lambda s: s.update({"3.weight": torch.zeros(7, 16), "3.bias": torch.zeros(7)}),
         "3.weight is 7x16 there and 3x16 in the model (and 1 more); pass --classes 7"),
        (lambda s: s.update({"0.weight": torch.zeros(4, 1, 3, 3)}),
         "0.weight is 4x1x3x3 there and 4x3x3x3 in the model; give"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, good: State, change: Callable[[State], object], said: str) -> None:
    change(good)
    torch.save({"state_dict": under("model.", good)}, tmp_path / "w.pth")
    before = net()
    kept = copy.deepcopy(before.state_dict())
    with pytest.raises(InputError) as raised:
        load_weights(before, tmp_path / "w.pth")
    assert said in str(raised.value) and same(before.state_dict(), kept)


def test_another_network(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.b": torch.zeros(1), "c": torch.zeros(2)}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"none of the model's names is there: it holds state_dict.a.b \(and 1 more\)"):
        loaded(tmp_path / "w.pth")


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for content in (net(), {"model": net(), "epoch": 3}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(FormatError) as raised:
            loaded(tmp_path / "w.pt")
        said = str(raised.value)
        assert "a pickled object (torch.nn.modules.container.Sequential)" in said
        assert "torch.save(model.state_dict(), 'weights.pth')" in said


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_other_files_are_called_by_their_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Flatten()), tmp_path / "w.pt")
    with pytest.raises(FormatError, match=r"is a TorchScript program; give its weights: torch.save\(torch.jit.load"):
        loaded(tmp_path / "w.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"is a folder; .*; pass --weights .*run/model.safetensors"):
        loaded(tmp_path / "run")


# ------------------------------------------------------------------ nothing is run


class Calls:
    """Unpickling it calls a function with arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize(
    "hostile",
    [
        lambda mark: Calls(os.mkdir, mark), lambda mark: Calls(eval, f"open({mark!r}, 'w')"),
        lambda mark: Calls(exec, f"open({mark!r}, 'w')"), lambda mark: Calls(subprocess.call, ["touch", mark]),
        lambda mark: Calls(getattr, "x", "upper"), lambda mark: Calls(__import__, "antigravity"),
        lambda mark: Calls(open, mark, "w"), lambda mark: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, mark))),
    ],
)  # fmt: skip
def test_a_file_that_calls_is_refused_and_nothing_is_run(
    tmp_path: Path, good: State, hostile: Callable[[str], object], old: bool
) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": good, "x": hostile(str(mark))}, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(FormatError, match="would run code of the file .*safetensors.torch.save_file"):
        loaded(tmp_path / "w.pth")
    assert not mark.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("operator", [b"\x8e", b"B", b"X", b"\x8d"], ids=["bytes8", "bytes", "text", "text8"])
def test_a_pickle_that_promises_more_than_it_has_takes_no_memory(operator: bytes, tmp_path: Path, good: State) -> None:
    buffer = io.BytesIO()
    torch.save(good, buffer, _use_new_zipfile_serialization=False)
    length = (2**40).to_bytes(8, "little") if operator in (b"\x8e", b"\x8d") else b"\xff" * 4
    (tmp_path / "w.pt").write_bytes(buffer.getvalue()[:60] + b"\x80\x04" + operator + length + b"x")
    with bounded(2**29, 5), pytest.raises(FormatError) as refusal:
        checkpoint.entries(tmp_path / "w.pt")
    assert "\n" not in str(refusal.value)


def test_an_archive_of_several_disks_is_refused(tmp_path: Path, good: State) -> None:
    torch.save(good, tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    place = data.rindex(b"PK\x06\x07") + 16  # of the locator of the 64-bit end: how many disks there are
    (tmp_path / "w.pt").write_bytes(data[:place] + b"\x09" + data[place + 1 :])
    with pytest.raises(FormatError, match="multiple disks"):
        checkpoint.entries(tmp_path / "w.pt")


def test_what_stands_in_for_the_user_s_own_code_does_nothing(tmp_path: Path, good: State) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": good, "x": Calls(touch, str(mark)), "y": Colour.RED}, tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth")[0], good) and not mark.exists()


def test_nothing_stays_allowed(tmp_path: Path, good: State) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": good, "args": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    loaded(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)


# ------------------------------------------------------------------ other forms than the name says


def test_a_file_is_known_by_what_it_holds(tmp_path: Path, good: State) -> None:
    save_file(good, tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth")[0], good)
    torch.save(good, tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match=r"torch\.save wrote it: call it w\.pth"):
        loaded(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / "w2.pth")  # as advised
    assert same(loaded(tmp_path / "w2.pth")[0], good)


def test_arrays_of_numpy_are_told_how_to_become_weights(tmp_path: Path, good: State) -> None:
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in good.items()})
    with pytest.raises(FormatError, match=r"arrays of NumPy.*safetensors\.numpy\.save_file\(dict\(numpy\.load"):
        loaded(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as arrays:
        safetensors.numpy.save_file(dict(arrays), tmp_path / "weights.safetensors")
    assert same(loaded(tmp_path / "weights.safetensors")[0], good)


def test_a_prefix_is_found_inside_the_entry_that_it_lies_in(tmp_path: Path, good: State) -> None:
    other = {name: value + 1 for name, value in good.items()}
    torch.save({"state_dict": {**under("student.", good), **under("teacher.", other)}}, tmp_path / "w.pth")
    assert same(loaded(f"{tmp_path / 'w.pth'}?prefix=student.")[0], good)
    assert same(loaded(f"{tmp_path / 'w.pth'}?prefix=teacher")[0], other)
    with pytest.raises(InputError, match="none of the model's names is there under 'dent.'"):
        loaded(f"{tmp_path / 'w.pth'}?prefix=dent.")
    torch.save({"a": under("x.", good), "b": under("x.", other)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"2 parts of it fit the model: 'a\.x\.', 'b\.x\.'"):
        loaded(f"{tmp_path / 'w.pth'}?prefix=x.")


# ------------------------------------------------------------------ the doors


def test_the_public_door(tmp_path: Path, good: State) -> None:
    torch.save(under("module.", good), tmp_path / "w.pth")
    model = net()
    rarefy.sources.load_weights(model, tmp_path / "w.pth")
    assert same(model.state_dict(), good)
    source = rarefy.sources.load(f"{__name__}:small", weights=tmp_path / "w.pth")
    assert source.taken == f"{len(good)} tensors taken without the prefix 'module.'"
    assert set(checkpoint.entries(tmp_path / "w.pth")) == {""}


def test_the_command_line_says_what_it_took(tmp_path: Path, good: State, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": under("model.", good)}, tmp_path / "w.pth")
    arguments = ["measure", f"{__name__}:small", "--input", "3,4,4", "--weights", str(tmp_path / "w.pth")]
    assert run([*arguments, "--repeats", "1"]) == 0
    printed = capsys.readouterr()
    assert f"w.pth: {len(good)} tensors taken of the entry 'state_dict' without the prefix 'model.'" in printed.out
    assert printed.err == ""
