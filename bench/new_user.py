"""A new user's path: a network of one's own of one channel, a folder of 28x28 pictures, Lightning's checkpoint, and no
option but the names.

MNIST of ``shared/data`` is written as PNG files into ``Train/`` and ``Test/``, the network is trained in plain PyTorch
with MNIST's mean and std, which stand in no file, and saved as Lightning does. Then ``rarefy evaluate`` and ``rarefy
quantize`` run as typed, each in a process of its own. ``--check``: size, channels and classes are found, the accuracy
is plain PyTorch's to the image, int8 loses less than half a point, no process takes more than 2 GB or five minutes.

    python bench/new_user.py [--train 6000] [--test 10000] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

MEAN, STD = 0.1307, 0.3081
MOST_BYTES, MOST_SECONDS, MOST_LOST = 2e9, 300, 0.005
NETWORK = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )
"""


def data_folder() -> Path:
    named = os.environ.get("RAREFY_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "mnist" / "mnist.npz").is_file():
        sys.exit(f"no mnist/mnist.npz in {folder}; set RAREFY_DATA")
    return folder


def written(folder: Path, train: int, test: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The pictures as files; and as arrays, for plain PyTorch."""
    with np.load(data_folder() / "mnist" / "mnist.npz", allow_pickle=False) as file:
        parts = {
            "Train": (file["x_train"][:train], file["y_train"][:train]),
            "Test": (file["x_test"][:test], file["y_test"][:test]),
        }
    for split, (images, labels) in parts.items():
        for label in range(10):
            (folder / split / f"digit{label}").mkdir(parents=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / split / f"digit{label}" / f"{index}.png")
    return {
        split: (torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))
        for split, (images, labels) in parts.items()
    }


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    inputs = (images.float() / 255 - MEAN) / STD
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(64):
            loss = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        answers = [model((part.float() / 255 - MEAN) / STD).argmax(1) for part in images.split(500)]
    return float((torch.cat(answers) == labels).double().mean())


def typed(folder: Path, *arguments: str) -> tuple[dict[str, object], float, float]:
    """What the command prints as JSON, its seconds, and its peak memory in bytes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    program = "import resource, sys; from rarefy.cli.main import run; code = run(sys.argv[1:]); "
    program += "sys.stderr.write(f'peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}'); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return json.loads(done.stdout), seconds, 1024 * float(done.stderr.rpartition("peak ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    asked = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts = written(folder / "digits", asked.train, asked.test)
        (folder / "mynet.py").write_text(NETWORK, encoding="utf-8")
        sys.path.insert(0, place)
        import mynet

        model = trained(mynet.net(), *parts["Train"], asked.epochs)
        plain = accuracy(model, *parts["Test"])
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        torch.save(
            {"state_dict": state, "epoch": asked.epochs, "pytorch-lightning_version": "2.1"}, folder / "last.ckpt"
        )
        given = ("mynet:net", "--weights", "last.ckpt", "--data", "imagefolder:digits")
        judged, judge_seconds, judge_bytes = typed(folder, "evaluate", *given)
        small, small_seconds, small_bytes = typed(folder, "quantize", *given, "-o", "small")
        again, again_seconds, again_bytes = typed(folder, "evaluate", "small", "--data", "imagefolder:digits")
    task = dict(small["task"])  # type: ignore[call-overload]
    result = {
        "images": asked.test, "plain": plain, "float": judged["value"], "int8": again["value"],
        "input": task["input"], "mean": task["mean"], "std": task["std"], "crop": task["crop"],
        "classes": task.get("class_names"), "cpu_seconds": [judge_seconds, small_seconds, again_seconds],
        "peak_bytes": [judge_bytes, small_bytes, again_bytes], "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(f"| | top-1 of {asked.test:,} | CPU s | peak MB |\n|---|---|---|---|")
    print(f"| plain PyTorch | {100 * plain:.2f} % | | |")
    for name, value, seconds, peak in (
        ("`rarefy evaluate`", judged["value"], judge_seconds, judge_bytes),
        ("`rarefy quantize`", None, small_seconds, small_bytes),
        ("`rarefy evaluate small/`", again["value"], again_seconds, again_bytes),
    ):
        shown = "" if value is None else f"{100 * float(str(value)):.2f} %"
        print(f"| {name} | {shown} | {seconds:.1f} | {peak / 1e6:.0f} |")
    print(json.dumps(result))
    goals = {
        "size, channels and classes found": (task["input"], len(task["class_names"])) == ([1, 28, 28], 10),
        "mean and std found": (task["mean"], task["std"], task["crop"]) == ([MEAN], [STD], 1.0),
        "accuracy of plain PyTorch": abs(float(str(judged["value"])) - plain) < 1e-9,
        "int8 within half a point": plain - float(str(again["value"])) <= MOST_LOST,
        "at most 2 GB": max(judge_bytes, small_bytes, again_bytes) <= MOST_BYTES,
        "at most five minutes each": max(judge_seconds, small_seconds, again_seconds) <= MOST_SECONDS,
    }
    missed = [name for name, met in goals.items() if not met]
    if asked.check and missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
