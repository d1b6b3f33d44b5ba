"""A detector of the user's own, by the name of a function, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import boxed
import pytest
import torch

from rarefy.cli import main

NETWORK = """
import torch
from detecting import torchvision_detector

def net():
    torch.manual_seed(0)
    return torchvision_detector("ssd")
"""
BOXES = {f"{number}.png": [(8, 6, 26, 20, number % 3)] for number in range(8)}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main.run(list(arguments))
    out, told = capsys.readouterr()
    assert code == 0, told
    return out


def test_a_detector_of_ones_own_by_module_and_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_detector.py").write_text(NETWORK, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    text = boxed.coco(tmp_path / "seen", BOXES)[0]
    on = ("--task", "detection", "--data", text)  # of eight pictures two are kept to judge on
    run(capsys, "prune", "own_detector:net", *on, "--macs", "0.7", "--criterion", "magnitude", "-o", "slim")
    run(capsys, "quantize", "slim", *on, "--images", "4", "-o", "small", "--no-progress")
    judged = json.loads(run(capsys, "evaluate", "small", *on, "--reference", "own_detector:net", "--json"))
    assert judged["metric"] == "ap" and judged["samples"] == judged["reference"]["samples"] == 2
    told = json.loads(
        run(capsys, "predict", "small", "seen/0.png", "--reference", "own_detector:net", "-o", "drawn", "--json")
    )
    assert Path(told[0]["drawn"]).exists() and {"own_detector:net", "small"} <= told[0].keys()
    run(capsys, "export", "small", "-o", "seen.onnx")
    assert (tmp_path / "predict.py").exists() and (tmp_path / "seen.onnx").stat().st_size > 1000
