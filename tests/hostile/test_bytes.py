"""Every byte of a signed folder counts: flipped, cut, appended, added, removed or linked, it is refused."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.artifact import folder as folder_
from rarefy.artifact import signature, signing
from rarefy.deployment import external_data
from rarefy.errors import FormatError, InputError, RarefyError, SignatureRefused
from rarefy.graph.capture import capture

pytest.importorskip("model_signing", reason="signing needs pip install 'rarefy[sign]'")


def saved(folder: Path, width: int) -> Path:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(width, width, bias=False)), torch.zeros(2, width))
    return folder_.save(graph, folder, files={"notes.txt": b"abc"})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return signing.keygen(tmp_path_factory.mktemp("keys") / "me.pem")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Path:
    folder = saved(tmp_path_factory.mktemp("small") / "model", 2)
    signing.sign(folder, keys[0])
    return folder


def places(folder: Path) -> list[tuple[str, int]]:
    return [(path.name, place) for path in sorted(folder.iterdir()) for place in range(path.stat().st_size)]


def flipped(folder: Path, name: str, place: int, mask: int) -> Iterator[None]:
    path = folder / name
    data = path.read_bytes()
    changed = bytearray(data)
    changed[place] ^= mask
    path.write_bytes(changed)
    yield
    path.write_bytes(data)


def refused(folder: Path, key: Path) -> None:
    for read in (lambda: signing.verify(folder, key), lambda: folder_.load(folder, key=key)):
        with pytest.raises(RarefyError) as refusal:
            read()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.slow)])
def test_every_byte_flipped_is_refused(count: int | None, small: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """The signature's own bytes too. count: so many of them, drawn; None: all, each with one bit and with all."""
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    every = places(folder)
    draw = random.Random(0)
    chosen = [*(one for one in draw.sample(every, count))] if count is not None else every
    signature_bytes = [one for one in every if one[0] == "model.sig"]
    chosen += draw.sample(signature_bytes, 60) if count is not None else []
    for name, place in chosen:
        for mask in (1 << draw.randrange(8),) if count is not None else (1, 0x20, 0xFF):
            for _ in flipped(folder, name, place, mask):
                refused(folder, keys[1])
    assert "notes.txt" in signing.verify(folder, keys[1])


@pytest.mark.slow
def test_random_bytes_of_a_large_folder_are_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = saved(tmp_path / "model", 400)
    signing.sign(folder, keys[0])
    draw = random.Random(0)
    every = places(folder)
    for name, place in draw.sample(every, 10_000):
        for _ in flipped(folder, name, place, 1 << draw.randrange(8)):
            refused(folder, keys[1])


def _edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


CHANGES: dict[str, Callable[[Path], Any]] = {
    **{
        f"{name} {what}": (lambda folder, n=name, c=change: _edit(folder / n, c))
        for name in ("graph.json", "weights.safetensors", "manifest.json", "notes.txt", "model.sig")
        for what, change in {
            "appended to": lambda data: data + b"\n",
            "prepended to": lambda data: b" " + data,
            "cut": lambda data: data[:-1],
            "emptied": lambda data: b"",
            "twice": lambda data: data * 2,
        }.items()
    },
    **{
        f"{name} removed": (lambda folder, n=name: (folder / n).unlink())
        for name in ("graph.json", "weights.safetensors", "manifest.json", "notes.txt", "model.sig")
    },
    **{
        f"{name} linked": (
            lambda folder, n=name: ((folder / n).rename(folder.parent / n), (folder / n).symlink_to(folder.parent / n))
        )
        for name in ("graph.json", "weights.safetensors", "manifest.json", "notes.txt", "model.sig")
    },
    **{
        f"{name!r} added": (lambda folder, n=name: (folder / n).write_bytes(b""))
        for name in ("x", ".x", "MODEL.SIG", "model.sig.bak", ".model.0123abcd.part.sig")
    },
    "a folder added": lambda folder: (folder / "x").mkdir(),
    "a pipe added": lambda folder: os.mkfifo(folder / "x"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_change_is_refused(change: str, small: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    CHANGES[change](folder)
    refused(folder, keys[1])


# -------------------------------------------------------------------------------------- other bytes, the same statement


def _bundle(data: bytes, change: Callable[[dict[str, Any]], Any], **how: Any) -> bytes:
    value = json.loads(data)
    change(value)
    return json.dumps(value, **{"separators": (",", ":"), **how}).encode()


def _larger_s(value: dict[str, Any]) -> None:
    from cryptography.hazmat.primitives.asymmetric import utils

    one = value["dsseEnvelope"]["signatures"][0]
    r, s = utils.decode_dss_signature(base64.b64decode(one["sig"]))
    order = signature._ORDERS["secp256r1"]
    one["sig"] = base64.b64encode(utils.encode_dss_signature(r, order - s)).decode()


def _turned(value: dict[str, Any]) -> None:
    value["dsseEnvelope"] = dict(reversed(value["dsseEnvelope"].items()))


SAME = {
    "spaces": lambda data: _bundle(data, lambda value: None, separators=(", ", ": ")),
    "lines": lambda data: _bundle(data, lambda value: None, indent=1),
    "a line at the end": lambda data: data + b"\n",
    "keys in another order": lambda data: _bundle(data, _turned),
    "a key more": lambda data: _bundle(data, lambda value: value.update(more=1)),
    "a key more within": lambda data: _bundle(data, lambda value: value["verificationMaterial"].update(more=1)),
    "a key twice": lambda data: data.replace(b'{"mediaType"', b'{"mediaType":"x","mediaType"', 1),
    "a keyid": lambda data: data.replace(b'"keyid":""', b'"keyid":"x"'),
    "an escape": lambda data: data.replace(b'"mediaType"', b'"media\\u0054ype"'),
    "a mark in front": lambda data: b"\xef\xbb\xbf" + data,
    "the larger s": lambda data: _bundle(data, _larger_s),
    "a second signature": lambda data: _bundle(
        data, lambda value: value["dsseEnvelope"]["signatures"].append(value["dsseEnvelope"]["signatures"][0])
    ),
    "a log entry": lambda data: data.replace(b'"tlogEntries":[]', b'"tlogEntries":[{}]'),
    "base64 with a line": lambda data: data.replace(b'"payload":"', b'"payload":"\\n'),
    "another hint": lambda data: _bundle(
        data, lambda value: value["verificationMaterial"]["publicKey"].update(hint="0" * 64)
    ),
}


@pytest.mark.parametrize("form", SAME)
def test_other_bytes_for_the_same_statement_are_refused(
    form: str, small: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    before = (folder / "model.sig").read_bytes()
    (folder / "model.sig").write_bytes(SAME[form](before))
    assert (folder / "model.sig").read_bytes() != before
    with pytest.raises(SignatureRefused, match=r"model\.sig.*\[signature-[a-z]+\]$"):
        signing.verify(folder, keys[1])


def test_what_is_signed_is_in_the_form_that_is_accepted(small: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """Half of all signatures have the larger s at first."""
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    for _ in range(8):
        signing.sign(folder, keys[0])
        assert "graph.json" in signing.verify(folder, keys[1])


def test_a_private_key_is_not_signed(small: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    other = ed25519.Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    forms = {
        "pem": keys[0].read_bytes(),
        "text": b"my key:\n" + keys[0].read_bytes(),
        "der": other.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, plain),
        "ssh": other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, plain),
        "locked": other.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        ),
    }
    for name, data in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "graph.json").write_text("{}")
        (folder / "notes").write_bytes(data)
        with pytest.raises(InputError, match="notes: is a private key, which would be published"):
            signing.sign(folder, keys[0])
        assert not (folder / "model.sig").exists()


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "x25519", "dsa", "secp256k1", "text", "pipe"])
def test_a_key_of_another_kind_is_told_before_anything_is_written(kind: str, small: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa, x25519

    path = tmp_path / "key.pem"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "text":
        path.write_text("no key")
    else:
        key = {
            "rsa": lambda: rsa.generate_private_key(65537, 2048),
            "ed25519": ed25519.Ed25519PrivateKey.generate,
            "x25519": x25519.X25519PrivateKey.generate,
            "dsa": lambda: dsa.generate_private_key(2048),
            "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        }[kind]()
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (tmp_path / "pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        with pytest.raises(InputError, match="is not a kind of key that signs models"):
            signing.verify(small, tmp_path / "pub")
    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    (folder / "model.sig").unlink()
    with pytest.raises(InputError, match="can't sign with it") as refusal:
        signing.sign(folder, path)
    assert "\n" not in str(refusal.value) and not (folder / "model.sig").exists()


# ----------------------------------------------------------------------------------------------------------- model.onnx


def test_weights_of_an_onnx_file_lie_in_it() -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np

    def tensor(outside: bool) -> Any:
        one = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
        if outside:
            one.ClearField("raw_data")
            one.data_location = onnx.TensorProto.EXTERNAL
            one.external_data.add(key="location", value="/etc/passwd")
        return one

    def model(*nodes: Any, weights: Any = ()) -> Any:
        return onnx.helper.make_model(onnx.helper.make_graph(list(nodes), "g", [], [], list(weights)))

    make = onnx.helper.make_node
    inner = onnx.helper.make_graph([make("Constant", [], ["c"], value=tensor(True))], "inner", [], [])
    external_data.check(onnx, model(make("Identity", ["w"], ["y"]), weights=[tensor(False)]), "x")
    for bad in (
        model(weights=[tensor(True)]),
        model(make("Constant", [], ["y"], value=tensor(True))),
        model(make("If", ["c"], ["y"], then_branch=inner, else_branch=inner)),
    ):
        with pytest.raises(FormatError, match=r"^x: the weights 'w' lie in another file.*\[onnx-external\]$"):
            external_data.check(onnx, bad, "x")
