"""Wrong input, through the command line: exit 2, one line that names the way out, and nothing that existed is lost.

A row of ``CASES`` is a kind of wrong input: the words that its line must hold, and the command line, in which
``{here}`` is a folder that the fixture ``place`` fills.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.cli import main

HERE = __name__
ROOT = Path(__file__).resolve().parents[2]


class Net(nn.Module):
    """For images of (1, 8, 8)."""

    def __init__(self, num_classes: int = 10, channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


class Branching(Net):
    """What it computes depends on the values: no graph says that."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return super().forward(x)


class Two(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def no_model() -> str:
    return "a model"


def _arrays(labels: np.ndarray, count: int = 40, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)
    return images, labels


def good() -> Any:
    return _arrays(np.arange(40) % 10)


def labels_too_large() -> Any:
    return _arrays(np.arange(40) % 13)


def labels_negative() -> Any:
    return _arrays(np.arange(40) % 10 - 1)


def labels_too_few() -> Any:
    return _arrays(np.arange(39) % 10)


def labels_fractional() -> Any:
    return _arrays(np.arange(40) / 10)


def images_with_nan() -> Any:
    images = np.zeros((40, 1, 8, 8), np.float32)
    images[3] = np.nan
    return images, np.arange(40) % 10


def images_colour() -> Any:
    return _arrays(np.arange(40) % 10, channels=3)


def images_none() -> Any:
    return np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64)


def unlabelled() -> Any:
    return _arrays(np.arange(40) % 10)[0]


def data_broken() -> Any:
    raise OSError("the share is not mounted")


MODEL = f"{HERE}:Net"
DATA = f"{HERE}:good"
ON = f"--data {DATA}"
OUT = "-o {here}/out"

# name: (words that the line must hold, the command line)
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    # usage
    "unknown command": (("frobnicate", "--help"), "frobnicate"),
    "unknown option": (("--frob", "rarefy prune --help"), f"prune {MODEL} --frob 3 {OUT}"),
    "missing argument": (("MODEL", "--help"), "measure"),
    "missing output": (("--output", "--help"), f"prune {MODEL} --keep 0.5"),
    "option of the wrong type": (("--epochs", "many", "--help"), f"distill {MODEL} {ON} --epochs many {OUT}"),
    "batch size 0": (("--batch-size", "'0' should be greater than or equal to 1"), f"evaluate {MODEL} {ON} "
                                                                                   "--batch-size 0"),
    "negative epochs": (("--epochs", "'-3' should be greater than or equal to 1"), f"distill {MODEL} {ON} --epochs -3 "
                                                                                   f"{OUT}"),
    "unknown kind of choice": (("criteria, losses",), "list colours"),
    # models
    "no such model": (("no such model", "timm:NAME"), f"prune nothing --keep 0.5 {OUT}"),
    "no such timm model": (("nearest are resnet18",), f"prune timm:resnet1888 --keep 0.5 {OUT}"),
    "no such torchvision model": (("nearest are resnet18",), f"prune torchvision:rsnet18 --keep 0.5 {OUT}"),
    "module that does not exist": (("no module 'nolab'",), f"prune nolab.nets:Net --keep 0.5 {OUT}"),
    "function that returns no model": (("returned a str", "torch.nn.Module"), f"prune {HERE}:no_model --keep 0.5 "
                                                                              f"{OUT}"),
    "model that can't be captured": (("can't be captured", "test_bad_input.py:", "core="), f"prune {HERE}:Branching "
                                                                                           "--input 1,8,8 --keep 0.5 "
                                                                                           f"{OUT}"),
    "core that does not exist": (("core='neck'", "have conv, head"), f"prune {MODEL} --input 1,8,8 --core neck --keep "
                                                                     f"0.5 {OUT}"),
    "model with nothing to prune": (("nothing can be pruned",), f"prune {HERE}:Nothing --input 1,8,8 --keep 0.5 {OUT}"),
    "input shape that is none": (("--input 'wide'", "3,224,224"), f"prune {MODEL} --input wide --keep 0.5 {OUT}"),
    "input shape of the wrong channels": (("3x8x8", "--input"), f"prune {MODEL} --input 3,8,8 --keep 0.5 {OUT}"),
    "input shape that nobody says": (("pass --input",), f"prune {MODEL} --keep 0.5 {OUT}"),
    "exported program that is damaged": (("torch.export.save",), f"prune {{here}}/damaged.pt2 --keep 0.5 {OUT}"),
    "ONNX file that does not exist": (("none.onnx", "no such file"), f"prune onnx:{{here}}/none.onnx --keep 0.5 {OUT}"),
    "ONNX file that is a folder": (("folder.onnx", "is a folder, not a plain file"),
                                   f"prune onnx:{{here}}/folder.onnx --keep 0.5 {OUT}"),
    "ONNX file that is none": (("is no ONNX file", "export or copy it again"),
                               f"prune {{here}}/wrong.onnx --keep 0.5 {OUT}"),
    "ONNX file that is empty": (("is no ONNX file",), f"quantize onnx:{{here}}/empty.onnx {ON} {OUT}"),
    "folder that rarefy did not save": (("no graph.json", "timm:NAME"), "measure {here}/notes"),
    "saved folder with a changed byte": (("weights.safetensors",), "measure {here}/changed"),
    "saved folder with a file missing": (("weights.safetensors",), "measure {here}/missing"),
    "saved folder with a broken graph": (("graph.json",), "measure {here}/broken"),
    "saved folder with other classes": (("outputs of 10, not 3", "leave out --classes"), "measure {here}/saved "
                                                                                         "--classes 3"),
    "saved folder with other weights": (("leave out --weights",), "measure {here}/saved --weights "
                                                                  "{here}/other.safetensors"),
    "saved folder with another input": (("1x8x8", "1x9x9"), f"prune {{here}}/saved --input 1,9,9 --keep 0.5 {OUT}"),
    "input that the data contradicts": (("--input 1,9,9", "images of 1,8,8"), f"evaluate {MODEL} {ON} --input 1,9,9"),
    # weights
    "weights that do not exist": (("no such file", "--weights"), f"prune {MODEL} --weights {{here}}/none.pt --keep "
                                                                 f"0.5 {OUT}"),
    "weights of another model": (("head.weight is 7x8 there and 10x8", "--classes"), f"prune {MODEL} --weights "
                                                                                     f"{{here}}/other.safetensors "
                                                                                     f"--keep 0.5 {OUT}"),
    "weights with a tensor missing": (("conv.bias is missing there",), f"prune {MODEL} --weights "
                                                                       f"{{here}}/partial.safetensors --keep 0.5 "
                                                                       f"{OUT}"),
    "weights that hold code": (("run code of the file", "safetensors"), f"prune {MODEL} --weights {{here}}/evil.pt "
                                                                        f"--keep 0.5 {OUT}"),
    "weights that hold NaN": (("conv.weight holds 2 values that are NaN",), f"prune {MODEL} --weights "
                                                                            f"{{here}}/nan.safetensors --keep 0.5 "
                                                                            f"{OUT}"),
    "weights that are cut off": (("is no safetensors file",), f"prune {MODEL} --weights {{here}}/cut.safetensors "
                                                              f"--keep 0.5 {OUT}"),
    # data
    "no data": (("--data SOURCE",), f"evaluate {MODEL}"),
    "no data to compress on": (("--data SOURCE",), f"compress {MODEL} --speedup 2 {OUT}"),
    "data twice": (("--data names both splits",), f"evaluate {MODEL} {ON} --val {DATA}"),
    "data that does not exist": (("{here}/nowhere",), f"evaluate {MODEL} --input 1,8,8 --data "
                                                      f"imagefolder:{{here}}/nowhere"),
    "data of an unknown kind": (("imagefolder:PATH",), f"evaluate {MODEL} --data tfrecord:x"),
    "data function that fails": (("the share is not mounted",), f"evaluate {MODEL} --data {HERE}:data_broken"),
    "empty validation set": (("{here}/empty",), f"evaluate {MODEL} --val imagefolder:{{here}}/empty"),
    "no images at all": (("images",), f"evaluate {MODEL} --data {HERE}:images_none"),
    "corrupt image": (("b.png", "--skip-unreadable"), f"evaluate {MODEL} --val imagefolder:{{here}}/corrupt "
                                                      "--image-size 8 --channels 1"),
    "labels out of range": (("label 12", "13 outputs"), f"evaluate {MODEL} --data {HERE}:labels_too_large"),
    "negative labels": (("-1",), f"evaluate {MODEL} --data {HERE}:labels_negative"),
    "fewer labels than images": (("39", "40"), f"evaluate {MODEL} --data {HERE}:labels_too_few"),
    "labels that are no whole numbers": (("label",), f"evaluate {MODEL} --data {HERE}:labels_fractional"),
    "no labels": (("label",), f"evaluate {MODEL} --val {HERE}:unlabelled"),
    "images with NaN": (("NaN",), f"evaluate {MODEL} --data {HERE}:images_with_nan"),
    "images of other channels": (("3x8x8",), f"evaluate {MODEL} --data {HERE}:images_colour"),
    "mean that is no list of numbers": (("--mean", "0.485"), f"evaluate {MODEL} {ON} --mean grey"),
    "std of zero": (("std", "positive"), f"evaluate {MODEL} {ON} --std 0"),
    "crop of more than all": (("crop=2.0",), f"evaluate {MODEL} {ON} --crop 2"),
    "unknown augmentation": (("spin",), f"distill {MODEL} {ON} --augment spin {OUT}"),
    "unknown corruption": (("rain", "fog"), f"evaluate {MODEL} {ON} --corruptions rain"),
    "unknown split": (("--split 'test'", "train or val"), f"evaluate {MODEL} {ON} --split test"),
    "batch larger than the data": (("batch_size=5000", "smaller"), f"distill {MODEL} {ON} --batch-size 5000 --epochs "
                                                                   f"1 {OUT}"),
    # choices and targets
    "unknown criterion": (("magnitud", "have", "taylor"), f"prune {MODEL} --input 1,8,8 --keep 0.5 --criterion "
                                                          f"magnitud {OUT}"),
    "unknown option of a criterion": (("size=3", "have", "batches"), f"prune {MODEL} --input 1,8,8 --keep 0.5 "
                                                                     f"--criterion taylor:size=3 {OUT}"),
    "criterion that needs data": (("data",), f"prune {MODEL} --input 1,8,8 --keep 0.5 --criterion taylor {OUT}"),
    "unknown loss": (("kll", "have"), f"distill {MODEL} {ON} --teacher {MODEL} --loss kll {OUT}"),
    "weight of a loss that is none": (("loss",), f"distill {MODEL} {ON} --teacher {MODEL} --loss x*kl {OUT}"),
    "unknown optimizer": (("adam", "sgd"), f"distill {MODEL} {ON} --optimizer adam {OUT}"),
    "learning rate of zero": (("lr",), f"distill {MODEL} {ON} --lr 0 {OUT}"),
    "teacher of other classes": (("7", "10"), f"distill {MODEL} {ON} --teacher {MODEL}?num_classes=7 --epochs 1 "
                                              f"--batch-size 8 {OUT}"),
    "teacher of negative weight": (("-2", "above 0"), f"distill {MODEL} {ON} --teacher=-2*{MODEL} --epochs 1 {OUT}"),
    "unknown rounding": (("neerest", "have"), f"quantize {MODEL} {ON} --rounding neerest {OUT}"),
    "unknown calibration": (("maxmin", "have"), f"quantize {MODEL} {ON} --calibration maxmin {OUT}"),
    "unknown grid": (("int99",), f"quantize {MODEL} {ON} --weight-grid int99 {OUT}"),
    "unknown runtime": (("tensorflow", "onnxruntime"), f"quantize {MODEL} {ON} --runtime tensorflow {OUT}"),
    "unknown ranking": (("ranking", "global"), f"prune {MODEL} --input 1,8,8 --keep 0.5 --ranking best {OUT}"),
    "unknown device": (("--device abacus", "cpu"), f"distill {MODEL} {ON} --device abacus {OUT}"),
    "no target": (("keep", "macs", "params"), f"prune {MODEL} --input 1,8,8 {OUT}"),
    "two targets": (("keep, macs",), f"prune {MODEL} --input 1,8,8 --keep 0.5 --macs 0.5 {OUT}"),
    "negative target": (("macs",), f"prune {MODEL} --input 1,8,8 --macs=-0.5 {OUT}"),
    "keep more than all": (("keep=1.5",), f"prune {MODEL} --input 1,8,8 --keep 1.5 {OUT}"),
    "everything ignored": (("nothing can be pruned",), f"prune {MODEL} --input 1,8,8 --keep 0.5 --ignore * {OUT}"),
    # budget
    "drop that is no share": (("max_drop", "0.5%"), f"compress {MODEL} {ON} --max-drop little {OUT}"),
    "drop surely meant in percent": (("0.5 would be 50 %",), f"compress {MODEL} {ON} --max-drop 0.5 {OUT}"),
    "negative drop": (("max_drop", "0.5%"), f"compress {MODEL} {ON} --max-drop=-1% {OUT}"),
    "negative speedup": (("speedup",), f"compress {MODEL} {ON} --speedup=-2 {OUT}"),
    "size of nothing": (("size", "2MB"), f"compress {MODEL} {ON} --size 0 {OUT}"),
    "contradicting steps": (("keep, macs",), f"compress {MODEL} {ON} --step 'prune keep=0.5 macs=0.5' --speedup 2 "
                                             f"{OUT}"),
    "unknown step": (("prun", "prune, mask, cluster, distill, quantize"), f"compress {MODEL} {ON} --step prun {OUT}"),
    "empty step": (("--step ''", "prune macs=0.5"), f"compress {MODEL} {ON} --step '' {OUT}"),
    "unknown option of a step": (("mac", "did you mean 'macs'"), f"compress {MODEL} {ON} --step 'prune mac=0.5' {OUT}"),
    "model that returns two tensors": (("--core",), f"compress {HERE}:Two {ON} --speedup 2 {OUT}"),
    "training what is no classifier": (("returns a tuple", "output_1", "--read"), f"distill {HERE}:Two {ON} "
                                                                                     "--batch-size 8 --epochs 1 "
                                                                                     f"{OUT}"),
    "criterion on what is no classifier": (("returns a tuple", "--read"), f"prune {HERE}:Two {ON} --keep 0.5 "
                                                                                f"--criterion taylor {OUT}"),
    "max drop without a reference": (("--reference",), f"evaluate {MODEL} {ON} --max-drop 1%"),
    # recipes
    "recipe that does not exist": (("no such recipe",), "run {here}/none.toml"),
    "recipe that is no TOML": (("is no TOML", "line 1"), "run {here}/bad.toml"),
    "recipe with an unknown key": (("'outputt'", "did you mean 'output'"), "run {here}/unknown.toml"),
    "recipe with a wrong type": (("seed = 'one'",), "run {here}/type.toml"),
    "recipe without an output": (("names no output", "-o"), "run {here}/noout.toml"),
    # where it goes
    "output that is not ours": (("notes: exists and was not saved by rarefy", "--output"), f"prune {MODEL} --input "
                                                                                           "1,8,8 --keep 0.5 -o "
                                                                                           f"{{here}}/notes"),
    "output that is a file": (("is a file",), f"prune {MODEL} --input 1,8,8 --keep 0.5 -o {{here}}/notes/mine.txt"),
    "output below a file": (("can't be written", "--output"), f"prune {MODEL} --input 1,8,8 --keep 0.5 -o "
                                                              f"{{here}}/notes/mine.txt/out"),
    "output where nobody may write": (("can't be written", "--output"), f"prune {MODEL} --input 1,8,8 --keep 0.5 -o "
                                                                        "/proc/rarefy/out"),
    "export to a folder": (("is a folder",), f"export {MODEL} --input 1,8,8 -o {{here}}/folder.onnx"),
    "export to another kind of file": ((".onnx",), f"export {MODEL} --input 1,8,8 -o {{here}}/model.exe"),
    "certificate where nobody may write": (("can't be written", "--certify"), "export {here}/saved --certify "
                                                                              "/proc/rarefy/c.json -o {here}/m.onnx"),
    "certificate of a runtime of other files": (("inductor", ".zip", ".onnx"), "export {here}/saved --certify "
                                                                               "{here}/c.json --also inductor -o "
                                                                               "{here}/m.onnx"),
    "limit without a certificate": (("--limit", "--certify"), "export {here}/saved --limit 3 -o {here}/m.onnx"),
    "report into a sealed folder": (("sealed", "--output"), "report {here}/saved/manifest.json -o "
                                                            "{here}/saved/report.html"),
    "report of a folder without one": (("no such file", "--data"), "report {here}/saved -o {here}/r.html"),
    "report that is no report": (("is no report", "--data"), "report {here}/odd.json -o {here}/r.html"),
    "report of other JSON": (("is no report",), "report {here}/saved/graph.json -o {here}/r.html"),
    # signatures
    "sign what is no folder": (("no such folder",), "sign {here}/nowhere --key {here}/my.key"),
    "sign with a key that does not exist": (("none.key",), "sign {here}/saved --key {here}/none.key"),
    "sign with what is no key": (("mine.txt",), "sign {here}/saved --key {here}/notes/mine.txt"),
    "verify with what is no key": (("mine.txt",), "verify {here}/saved --key {here}/notes/mine.txt"),
    "keys over other keys": (("never overwritten", "another name"), "keygen {here}/my.key"),
    "key for compress that does not exist": (("none.key", "keygen"), f"compress {MODEL} {ON} --speedup 2 --key "
                                                                     f"{{here}}/none.key {OUT}"),
}  # fmt: skip


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("pwned",)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each case gets a copy of."""
    here = tmp_path_factory.mktemp("prepared")
    assert main.run(["prune", MODEL, "--input", "1,8,8", "--keep", "0.5", "-o", str(here / "saved")]) == 0
    for name in ("changed", "missing", "broken"):
        shutil.copytree(here / "saved", here / name)
    content = bytearray((here / "changed" / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (here / "changed" / "weights.safetensors").write_bytes(content)
    (here / "missing" / "weights.safetensors").unlink()
    (here / "broken" / "graph.json").write_text('{"nodes": [', encoding="utf-8")
    (here / "notes").mkdir()
    (here / "notes" / "mine.txt").write_text("years of work", encoding="utf-8")
    (here / "folder.onnx").mkdir()
    (here / "damaged.pt2").write_bytes(b"PK\x03\x04 and no more")
    (here / "wrong.onnx").write_bytes(b"PK\x03\x04 and no more")
    (here / "empty.onnx").touch()
    state = {name: value.clone() for name, value in Net().state_dict().items()}
    save_file({**state, "head.weight": torch.zeros(7, 8), "head.bias": torch.zeros(7)}, here / "other.safetensors")
    save_file({name: value for name, value in state.items() if name != "conv.bias"}, here / "partial.safetensors")
    state["conv.weight"].view(-1)[:2] = torch.nan
    save_file(state, here / "nan.safetensors")
    (here / "cut.safetensors").write_bytes((here / "nan.safetensors").read_bytes()[:100])
    torch.save({"conv.weight": Evil()}, here / "evil.pt")
    for split in ("empty", "corrupt"):
        for label in ("a", "b"):
            (here / split / label).mkdir(parents=True)
    for label in ("a", "b"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(here / "corrupt" / label / f"{label}.png")
    picture = here / "corrupt" / "b" / "b.png"
    picture.write_bytes(picture.read_bytes()[:40])
    for name, text in {
        "bad": "model = \nseed = 1",
        "unknown": f'model = "{MODEL}"\noutputt = "x"',
        "type": f'model = "{MODEL}"\nseed = "one"',
        "noout": f'model = "{MODEL}"',
    }.items():
        (here / f"{name}.toml").write_text(text, encoding="utf-8")
    (here / "odd.json").write_text('{"before": [1, 2], "steps": 3}', encoding="utf-8")
    (here / "my.key").write_text("a key", encoding="utf-8")
    (here / "my.key.pub").write_text("a key", encoding="utf-8")
    return here


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    shutil.copytree(prepared, here)
    monkeypatch.chdir(here)
    return here


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_there_are_at_least_25_kinds() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_2_nothing_lost(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, line = CASES[case]
    before = contents(place)
    code = main.run(shlex.split(line.replace("{here}", str(place))))
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("rarefy: ") and "Traceback" not in err, err
    for word in words:
        assert word.replace("{here}", str(place)) in err, err
    after = contents(place)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) == set(), "something half done was left"


# ------------------------------------------------------------------ what needs a process of its own


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rarefy", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}


def test_disk_full_keeps_what_was_there(place: Path) -> None:
    """The limit on a file's size stands for a full disk: the write fails in the middle."""

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    before = contents(place)
    wide = program("prune", "torchvision:squeezenet1_1", "--input", "3,64,64", "--keep", 0.9, "-o", place / "saved")
    done = subprocess.run(
        wide, env=ENVIRONMENT, preexec_fn=little_room, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and ("disk is full" in done.stderr or "File too large" in done.stderr), (
        done.stderr
    )
    assert contents(place) == before


def test_interrupt_is_one_line_and_keeps_what_was_there(place: Path) -> None:
    before = contents(place)
    long = program(
        "distill",
        f"{HERE}:Net",
        "--data",
        f"{HERE}:good",
        "--batch-size",
        8,
        "--epochs",
        100000,
        "--augment",
        "none",
        "-o",
        place / "saved",
    )
    before_it = signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a run started in the background inherits that interrupts are ignored
    try:
        process = subprocess.Popen(long, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before_it)
    with process:
        deadline = time.monotonic() + 60
        while not (place / "saved.work").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("rarefy: ")]
    assert process.returncode == 2 and out == ""
    assert len(lines) == 1 and "interrupted" in lines[0] and "Traceback" not in err, err
    after = contents(place)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize(
    ("hidden", "arguments", "line"),
    [
        ("onnx", ("export", MODEL, "--input", "1,8,8", "-o", "m.onnx"), "pip install 'rarefy[onnx]'"),
        ("timm", ("prune", "timm:resnet18", "--keep", "0.5", "-o", "out"), "pip install 'rarefy[vision]'"),
        ("model_signing", ("keygen", "new.key"), "pip install 'rarefy[sign]'"),
        ("sklearn", ("evaluate", MODEL, "--data", "sklearn:digits"), "pip install 'rarefy[demo]'"),
    ],
)
def test_a_missing_extra_prints_the_pip_line(place: Path, hidden: str, arguments: tuple[str, ...], line: str) -> None:
    hide = (
        f"import sys; sys.modules[{hidden!r}] = None; from rarefy.cli.main import run; "
        f"sys.exit(run({list(arguments)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide],
        env=ENVIRONMENT,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr


def test_a_usage_error_in_a_real_process(place: Path) -> None:
    done = subprocess.run(program("compress"), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
