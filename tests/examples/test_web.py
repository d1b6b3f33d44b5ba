"""The page says of a picture what ``predict.py`` says: in headless Chromium, and its core in node."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess

import pytest
from conftest import EXAMPLES, Exported, lines_of, same
from PIL import Image

WEB = EXAMPLES / "web"


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("there is no node")
    if not (WEB / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip("onnxruntime-web is not installed: npm ci --prefix examples/web")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", ["node", "browser"])
def test_it_says_what_python_says(where: str, node: str, exported: Exported) -> None:
    if where == "browser" and not (WEB / "node_modules" / "@sparticuz").is_dir():
        pytest.skip("no Chromium: npm ci --prefix examples/web")
    pictures = []
    for picture in exported.pictures:
        with Image.open(picture) as opened:
            image, has_alpha = opened.convert("RGBA"), opened.mode == "RGBA"
        picture.with_name(f"{picture.name}.rgba").write_bytes(struct.pack("<II", *image.size) + image.tobytes())
        if not has_alpha:  # by which a canvas multiplies
            pictures.append(picture)
    done = subprocess.run(
        [node, "check.mjs", where, exported.onnx, *pictures], cwd=WEB, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    if "cannot open shared object file" in done.stderr:
        pytest.skip("Chromium's libraries are not installed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(
        lines_of(done.stdout), {one.name: exported.said[one.name] for one in pictures if one.name in exported.said}
    )


@pytest.mark.slow
def test_a_file_that_is_none_is_told(node: str, exported: Exported) -> None:
    done = subprocess.run(
        [node, "check.mjs", "node", exported.pictures[0]], cwd=WEB, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and re.search("not a(n| whole) ONNX file|does not say how it is fed", done.stderr)


def test_no_other_host_is_asked() -> None:
    """The page's own files name no address, and its policy allows its own alone."""
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "unsafe-inline" not in page and "'unsafe-eval" not in page
    for file in (*WEB.glob("*.html"), *WEB.glob("*.css"), WEB / "page.mjs", WEB / "model.mjs"):
        assert "://" not in file.read_text(encoding="utf-8"), file.name
