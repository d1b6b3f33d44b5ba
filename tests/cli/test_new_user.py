"""A new user's path: a network and a folder of one's own, Lightning's checkpoint, and no option but the names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rarefy.cli import main

NETWORK = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 49, 10),
    )
"""
MEAN, STD = 0.1307, 0.3081  # of the user's training, in no file


def pictures(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's digits as 28x28 pictures in ``Train/zero/0.png``; and as arrays."""
    digits = load_digits()
    found = {}
    for split, chosen in (("Train", slice(0, 600)), ("Test", slice(600, 800))):
        images = []
        for index, (grey, label) in enumerate(zip(digits.images[chosen], digits.target[chosen], strict=True)):
            picture = Image.fromarray((grey * 15.9).astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
            place = folder / split / f"digit{label}"
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{index}.png")
            images.append(np.asarray(picture))
        labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
        found[split] = torch.from_numpy(np.stack(images)).unsqueeze(1), labels
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The user's folder, and what plain PyTorch says of the accuracy."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "new_users_net.py").write_text(NETWORK, encoding="utf-8")
    splits = pictures(folder / "digits")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        model: nn.Module = importlib.import_module("new_users_net").net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    inputs, labels = (splits["Train"][0].float() / 255 - MEAN) / STD, splits["Train"][1]
    for _ in range(3):
        for chosen in torch.randperm(len(inputs)).split(32):
            loss = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        answers = model((splits["Test"][0].float() / 255 - MEAN) / STD).argmax(1)
    checkpoint = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": checkpoint, "epoch": 3, "pytorch-lightning_version": "2.1"}, folder / "last.ckpt")
    return folder, float((answers == splits["Test"][1]).float().mean())


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main.run(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0 and err == "", err
    return out


ON = ("--weights", "last.ckpt", "--data", "imagefolder:digits")


def test_the_accuracy_is_plain_pytorch_s(
    path: tuple[Path, float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = path
    assert plain > 0.8  # or there is nothing to lose
    monkeypatch.chdir(folder)
    out = run(capsys, "evaluate", "new_users_net:net", *ON)
    assert f"{100 * plain:.2f} %" in out
    assert "last.ckpt: 16 tensors taken of the entry 'state_dict' without the prefix 'model.'" in out
    said = next(line for line in out.splitlines() if line.startswith("images of"))
    assert "1x28x28 (size the images' own, channels the model's); whole; bilinear; minus 0.1307, over 0.3081" in said
    assert "10 classes: digit0, digit1, digit2, digit3, digit4, ... digit9" in said
    assert "train: the folder digits/Train; val: the folder digits/Test" in said
    assert out.count("images of 1x28x28") == 1


def test_what_is_saved_says_how_to_be_fed(
    path: tuple[Path, float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, plain = path
    monkeypatch.chdir(folder)
    small = str(tmp_path / "small")
    found = json.loads(run(capsys, "quantize", "new_users_net:net", *ON, "--images", "32", "-o", small, "--json"))
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text(encoding="utf-8"))
    for task in (found["task"], manifest["task"]):
        assert (task["input"], task["mean"], task["std"]) == ([1, 28, 28], [MEAN], [STD])
        assert (task["crop"], task["interpolation"]) == (1.0, "bilinear")
        assert task["class_names"] == [f"digit{label}" for label in range(10)]
    assert "of the entry 'state_dict'" in found["taken"]
    judged = json.loads(run(capsys, "evaluate", small, "--data", "imagefolder:digits", "--json"))
    assert abs(judged["value"] - plain) < 0.03
