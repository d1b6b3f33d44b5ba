"""The service, on a port of its own: what ``predict.py`` says, many pictures at once, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES, Exported, same
from PIL import Image

SERVE = EXAMPLES / "serve"


@pytest.fixture(scope="module")
def service(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}: pip install -r examples/serve/requirements.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("service") / "log"
    with open(log, "w", encoding="utf-8") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)],
            cwd=SERVE, env={**os.environ, "MODEL": str(exported.onnx), "THREADS": "1"}, stdout=told, stderr=told,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            try:
                assert asked(f"{address}/health")["status"] == "ok"
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def asked(address: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, data=data), timeout=60) as answer:
        return json.load(answer)


def line(one: dict[str, Any], many: bool) -> str:
    where = f" at {', '.join(f'{value:.1f}' for value in one['box'])}" if "box" in one else ""
    return f"{'class ' if where and many else ''}{one['name']} {one['score']:.4f}{where}"


@pytest.mark.slow
def test_it_says_what_python_says_of_many_at_once(service: str, exported: Exported) -> None:
    with ThreadPoolExecutor(24) as threads:
        asks = [picture for picture in exported.pictures for _ in range(4)]
        found = list(threads.map(lambda one: asked(f"{service}/predict", one.read_bytes()), asks))
    for picture, answer in zip(asks, found, strict=True):
        wanted = exported.said.get(picture.name, [])
        boxes = answer.get("boxes")
        said = (
            [", ".join(line(one, False) for one in answer["classes"])]
            if boxes is None
            else [line(one, True) for one in boxes]
        )
        assert same({picture.name: said}, {picture.name: wanted})


@pytest.mark.slow
def test_a_bad_picture_is_refused_and_the_next_is_answered(service: str, exported: Exported) -> None:
    good = exported.pictures[0].read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    wide = io.BytesIO()
    Image.new("L", (7200, 7200)).save(wide, "PNG")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"
    hostile = [
        (one, 400) for one in (bomb.getvalue(), wide.getvalue(), script, good[:-200], b"\x89PNG\r\n\x1a\n" * 999)
    ]
    for bad, code in (*hostile, (b"", 400), (b"GIF89a", 400), (good[:60], 400), (b"\0" * 20_000_001, 413)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(f"{service}/predict", bad)
        assert refused.value.code == code and "send" in json.load(refused.value)["detail"]
    assert asked(f"{service}/predict", good)


def test_pictures_are_prepared_by_the_words_of_predict_py() -> None:
    """Its lines are those of the programs beside an exported file, but for annotations."""
    mine = (SERVE / "pictures.py").read_text(encoding="utf-8")
    templates = Path(__file__).resolve().parents[2] / "rarefy" / "deployment"
    for file, begin, end in (
        ("predict.txt", "    if image.mode.startswith", "    return np.ascontiguousarray"),
        ("predict_boxes.txt", "    if pixels.shape[:2] ==", "\n\ndef placed"),
        ("predict_boxes.txt", "    ratio = min(", "    return canvas"),
    ):
        text = (templates / file).read_text(encoding="utf-8")
        part = text[text.index(begin) : text.index(end)]
        assert len(part.splitlines()) > 5 and part.strip() in mine


def test_the_requirements_are_whole() -> None:
    """Every package that is imported is named."""
    named = (SERVE / "requirements.txt").read_text(encoding="utf-8")
    for package in re.findall(
        r"^(?:import|from) (fastapi|numpy|onnxruntime|PIL)", (SERVE / "app.py").read_text(encoding="utf-8"), re.M
    ):
        assert {"PIL": "pillow"}.get(package, package) in named
