"""push and pull through a hub of our own on a local port; what comes down is what went up, or refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from networks import ConvNormLinear

import rarefy
from rarefy.artifact import folder as folder_
from rarefy.artifact import signing
from rarefy.cli import main
from rarefy.errors import FormatError, InputError, SignatureRefused
from rarefy.evaluation import card
from rarefy.graph.capture import capture

constants = pytest.importorskip("huggingface_hub.constants", reason="push and pull need huggingface_hub")
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The few ways of the hub that are gone, of one repository of small files."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    allows = True

    def log_message(self, *_: object) -> None: ...

    def answer(self, value: object, code: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_POST(self) -> None:
        body = self.body()
        if not type(self).allows or not self.headers.get("authorization"):
            return self.answer({"error": "not yours"}, 401)
        if self.path.endswith("/create"):
            return self.answer({"url": f"{constants.ENDPOINT}/me/small"})
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}
            )
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        for line in body.splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                type(self).files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
        return self.answer(
            {"commitUrl": f"{constants.ENDPOINT}/me/small/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": ""}
        )

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path.startswith("/api/models/me/small"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in type(self).files.items()]
            return self.answer({"id": "me/small", "sha": COMMIT, "siblings": siblings})
        found = re.fullmatch(rf"/me/small/resolve/{COMMIT}/(.+)", self.path)
        if found is None or found[1] not in type(self).files:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        data = type(self).files[found[1]]
        self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files, Hub.asked, Hub.allows = {}, [], True
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    graph = capture(ConvNormLinear(), torch.zeros(2, 1, 5, 5))
    graph.meta["task"] = {"task": "classification", "class_names": ["a|b", "<script>", "# c"]}
    return rarefy.save(graph, tmp_path / "small", files={"notes.txt": b"mine"})


def test_what_goes_up_comes_down(hub: type[Hub], small: Path, tmp_path: Path) -> None:
    assert COMMIT in rarefy.push(small, "me/small", license="apache-2.0")
    assert hub.files.keys() == {one.name for one in small.iterdir()} | {card.README}
    assert "license: apache-2.0" in hub.files[card.README].decode()
    hub.files["evil.pkl"] = b"never"
    hub.asked.clear()
    back = rarefy.pull("me/small", tmp_path / "back")
    assert {one.name: one.read_bytes() for one in back.iterdir()} == {
        one.name: one.read_bytes() for one in small.iterdir()
    }
    assert not any("evil" in one for one in hub.asked)
    images = torch.rand(3, 1, 5, 5)
    assert torch.equal(rarefy.load(back)(images), rarefy.load(small)(images))


def test_a_signed_folder_stays_signed(hub: type[Hub], small: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="signing needs the extra `sign`")
    card.write(small, license="mit")
    for name in ("mine", "other"):
        signing.keygen(tmp_path / name)
    signing.sign(small, tmp_path / "mine")
    rarefy.push(small, "me/small")
    back = rarefy.pull("me/small", tmp_path / "back", key=tmp_path / "mine.pub")
    assert signing.verify(back, tmp_path / "mine.pub")
    with pytest.raises(SignatureRefused):
        rarefy.pull("me/small", tmp_path / "third", key=tmp_path / "other.pub")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("damage", ["changed", "longer", "missing", "manifest", "escape"])
def test_what_is_not_as_pushed_is_refused(damage: str, hub: type[Hub], small: Path, tmp_path: Path) -> None:
    rarefy.push(small, "me/small")
    weights = hub.files["weights.safetensors"]
    if damage == "changed":
        hub.files["weights.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    elif damage == "longer":
        hub.files["weights.safetensors"] = weights * 1000
    elif damage == "missing":
        del hub.files["notes.txt"]
    else:
        manifest = json.loads(hub.files["manifest.json"])
        manifest["files"]["../evil.txt" if damage == "escape" else "notes.txt"] = {"sha256": "0" * 64, "size": 4}
        hub.files["manifest.json"] = json.dumps(manifest).encode()
        hub.files["../evil.txt"] = b"evil"
    hub.asked.clear()
    with pytest.raises(FormatError):
        rarefy.pull("me/small", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "evil.txt").exists()
    if damage == "longer":  # told before it is fetched
        assert not any("weights" in one for one in hub.asked)


def test_a_disk_without_room_is_told_before_anything_large_is_fetched(
    hub: type[Hub], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rarefy.push(small, "me/small")
    back = rarefy.pull("me/small", tmp_path / "back")
    whole = sum(one.stat().st_size for one in small.iterdir() if one.name != "manifest.json")
    hub.asked.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, whole))
    with pytest.raises(InputError, match=r"what is fetched takes 0\.\d\d MB of disk, 0\.\d\d MB are free; .*TMPDIR"):
        rarefy.pull("me/small", back)
    assert not any("weights" in one for one in hub.asked)
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda place: shutil._ntuple_diskusage(10**9, 0, whole - 1 if Path(place) == back else 10**9),
    )
    with pytest.raises(InputError, match="what is pulled takes .* of disk, .* are free; make room"):
        rarefy.pull("me/small", back)
    rarefy.load(back)


def test_what_cannot_be_done_is_one_line(
    hub: type[Hub], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (("push", str(small), "a/b/c"), "give OWNER/NAME"),
        (("push", str(small), "me/small", "--license", "My Own!"), "in small letters"),
        (("pull", "me/none", str(tmp_path / "back")), "is not there"),
        (("pull", "me/small", str(tmp_path)), "not a rarefy folder"),
        (("push", str(tmp_path / "none"), "me/small"), "none"),
    ):
        assert main.run(arguments) == 2
        told = capsys.readouterr().err
        assert words in told and len(told.strip().splitlines()) == 1, told
    hub.allows = False
    with pytest.raises(InputError, match="HF_TOKEN"):
        rarefy.push(small, "me/small")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="can't be reached"):
        rarefy.pull("me/small", tmp_path / "back")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install"):
        rarefy.pull("me/small", tmp_path / "back")


def test_a_card_says_what_the_folder_says(small: Path, tmp_path: Path) -> None:
    card.write(small, license="mit")
    page = (small / card.README).read_text(encoding="utf-8")
    assert page.startswith("---\nlibrary_name: rarefy\nlicense: mit\n") and "It tells 3 classes apart" in page
    assert "<script>" not in page and "a\\|b" in page and "\\# c" in page
    assert "| `notes.txt` |" in page and "| these weights | mit |" in page
    assert folder_.read_manifest(small)["files"].keys() >= {card.README, "notes.txt"}
    rarefy.load(small)  # whose files are all listed
    (tmp_path / "mine.md").write_text("# My own\n", encoding="utf-8")
    assert main.run(["card", str(small), "--from", str(tmp_path / "mine.md")]) == 0
    assert (small / card.README).read_text(encoding="utf-8") == "# My own\n"
    with pytest.raises(InputError, match="small letters"):
        card.write(small, license="MIT License")
    with pytest.raises(InputError, match="its licence itself"):
        card.write(small, license="mit", source=tmp_path / "mine.md")


def test_a_card_has_the_figures_of_the_report() -> None:
    graph = capture(ConvNormLinear(), torch.zeros(2, 1, 5, 5))
    facts: dict[str, Any] = {
        "title": "Small `digits`",
        "before": {"size_bytes": 4000, "parameters": 1000, "macs": 9000},
        "after": {"size_bytes": 1000, "parameters": 1000, "macs": 9000},
    }
    page = card.text(graph, facts)
    assert "# Small \\`digits\\`" in page and re.search(r"\| size \| 4 kB \| 1 kB \| 4× smaller \|", page), page
    assert "Nothing is recorded" in card.text(graph)
