"""Files of models and weights that would grow, or whose tensors are of another kind: refused by what they say."""

from __future__ import annotations

import io
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.errors import FormatError, InputError
from rarefy.models import load, pt2
from rarefy.models.checkpoint import entries
from rarefy.models.weights import load_weights

SIZES = {
    "2*s0": True, "s0**2 + 4*s0 + 1": True, "Max(1, s0//2)": True, "Mod(s0 + 1, 2)": True, "-s0 + 2": True,
    "(s77//2) - 1": True, "Pow(s0, 2)": True, "Pow(s0, -1)": True, "Symbol('s0', positive=True, integer=True)": True,
    "Integer(4)*s0": True, "Eq(s0, 3)": True, "s0 >= 2": True,
    "9**9**9**9": False, "9**(9**9)": False, "Pow(9, Pow(9, 9))": False, "Pow(Integer(9), Integer(999999999))": False,
    "((((9**9)**9)**9)**9)": False, "(s0**99)**99": False, "2**s0": False, "9**-999999999": False, "Pow(9)": False,
    "9" * 900: False, "*".join(["9"] * 490): False, "s0*" * 332 + "s0": False, "(" * 400 + "s0" + ")" * 400: False,
    "2**": False, "": False, "s0" + " " * 2000: False, "__import__('os')": False, "s0.mro()": False, "x": False,
    "1.5": False, "0x" + "f" * 600: False,
}  # fmt: skip


def test_expressions_are_bounded_before_they_are_computed() -> None:
    begin = time.process_time()
    assert {text: pt2._is_size(text) for text in SIZES} == SIZES
    assert time.process_time() - begin < 2


def program(path: Path) -> dict[str, bytes]:
    free = ({0: torch.export.Dim.DYNAMIC},)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 2, 2),), dynamic_shapes=free), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, members: dict[str, bytes], packed: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            form = zipfile.ZIP_DEFLATED if packed and name.endswith(packed) else zipfile.ZIP_STORED
            archive.writestr(name, content, form)
    return path


def test_a_program_that_would_grow_or_is_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    members = program(path)
    assert load.load(str(path)).shape == (1, 2, 2)
    name = next(one for one in members if one.endswith("models/model.json"))
    config = next(one for one in members if one.endswith("weights_config.json"))
    for change, packed, words in (
        ({name: b" " * 10**7 + members[name]}, "model.json", "would take more bytes than the file has"),
        ({config: b"[]"}, "", "is not a JSON object"),
        ({config: b'{"config": []}'}, "", "lists no weights"),
        ({config: b'{"config": {"a": []}}'}, "", "lists no weights"),
        ({name: b"[" * 100_000}, "", "nested"),
        ({name: b"{}"}, "", "can't read it"),
        ({name: b'{"a": NaN}'}, "", "no number of JSON"),
    ):
        with pytest.raises(FormatError, match=words) as raised:
            load.load(str(written(path, members | change, packed)))
        assert "save it again" in str(raised.value)


def test_a_checkpoint_that_would_grow(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(5_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with pytest.raises(FormatError, match="would take .* bytes, and has"):
        entries(written(tmp_path / "w.pt", members, packed="/0"))


KINDS: dict[str, tuple[Any, str]] = {
    "sparse": (lambda one: one.to_sparse(), "is a sparse tensor there"),
    "compressed": (lambda one: one.to_sparse_csr(), "is a sparse tensor there"),
    "nested": (lambda one: torch.nested.nested_tensor(list(one)), "is a nested tensor there"),
    "meta": (lambda one: one.to("meta"), "without values there"),
    "complex": (lambda one: one.to(torch.complex64), "is complex64 there and float32 in the model"),
    "bytes": (lambda one: one.to(torch.int8), "is int8 there and float32 in the model"),
    "bool": (lambda one: one > 0, "is bool there and float32 in the model"),
    "eight bits": (lambda one: one.to(torch.float8_e4m3fn), "is float8_e4m3fn there and float32 in the model"),
    "stretched": (lambda one: torch.zeros(1).expand(2, 2**40), "is 2x1099511627776 there and 2x4"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()
    change, words = KINDS[kind]
    torch.save({**model.state_dict(), "weight": change(before)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=words):
        load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, before)


def test_half_precision_is_taken(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    wanted: dict[str, Tensor] = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    torch.save(wanted, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, wanted["weight"].float())
