"""The front of a search against as many seconds of random recipes, and of Optuna's TPE alone, over the same space.

The digits demo on the CPU. All three are given the same seconds of work (those that the search's trials took), the same
table of costs, and are timed the same way; a random recipe draws each family's width, the bits, the length of training,
the learning rate and the criterion.

* ``files``: of the front, each saved and verified.
* ``beaten``: points of the front that a random recipe of at most their latency betters by more than the point's
  interval.
* ``hypervolume``: of 1 - accuracy and latency in shares of the original's, below a reference of 0.2 and 1.05.

    python bench/search.py --check              24 trials, a quarter of an hour on two cores
    python bench/search.py --small --check      8 trials: that it works, not how well
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from rarefy import demo
from rarefy.compression.budget import Budget
from rarefy.compression.search.front import Front, Point, hypervolume
from rarefy.compression.search.search import search
from rarefy.demo.digits import demo as digits
from rarefy.distillation import distill
from rarefy.tasks import detector

FILES, GAIN = 8, 1.1
REFERENCE = (0.2, 1.05)


def original(seed: int, width: int, epochs: int) -> tuple[torch.fx.GraphModule, object]:
    shown = digits(seed)
    torch.manual_seed(seed)
    graph = detector.capture(demo.model(width=width), shown.task.data.input_shape)
    training = {**shown.training, "epochs": epochs}
    return distill.train(graph, shown.task, **training, seed=seed, progress=False), shown.task


def place(one: Point) -> tuple[float, float]:
    return 1 - one["value"], 1 / one["speedup"]["median"]


def beaten(front: Front, others: list[Point]) -> list[int]:
    """Points of the front that another of at most their latency betters by more than their interval."""
    worse = []
    for one in front.best:
        rivals = [other for other in others if other["latency_ms"]["median"] <= one["latency_ms"]["median"]]
        if rivals and max(other["value"] for other in rivals) > one["interval"][1]:
            worse.append(one["number"])
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=10, help="of the patient training")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="8 trials of a narrow network")
    parser.add_argument("--folder", help="where the searches lie; default: temporary")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if asked.small:
        asked.trials, asked.epochs, asked.width = 8, 2, 16
    torch.set_num_threads(1)
    graph, task = original(asked.seed, asked.width, 2 if asked.small else 8)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(asked.folder or temporary)
        given = {"epochs": asked.epochs, "budget": Budget(max_drop=0.01), "seed": asked.seed, "corruptions": []}
        found = {"search": search(graph, task, folder=home / "search", trials=asked.trials, **given)}
        minutes = sum(one["seconds"] for one in found["search"].points) / 60
        for name, strategy in (("random", "random"), ("TPE alone", "tpe")):
            found[name] = search(graph, task, folder=home / strategy, minutes=minutes, strategy=strategy, **given)
    volumes = {name: hypervolume([place(one) for one in front.points], REFERENCE) for name, front in found.items()}
    worse = beaten(found["search"], list(found["random"].points))
    print(f"{'':12} trials  minutes  front  hypervolume")
    for name, front in found.items():
        spent = sum(one["seconds"] for one in front.points) / 60
        print(f"{name:12} {len(front.points):6} {spent:8.1f} {len(front.best):6} {volumes[name]:12.4f}")
    print(found["search"])
    files = len([one for one in found["search"].best if one["folder"]])
    gain = volumes["search"] / max(volumes["TPE alone"], 1e-9)
    short = [
        *([f"{files} files, fewer than {FILES}"] if files < FILES and not asked.small else []),
        *([f"points {worse} are beaten by random recipes"] if worse else []),
        *([f"hypervolume {gain:.2f} times TPE's, less than {GAIN}"] if gain < GAIN and not asked.small else []),
    ]
    print(json.dumps({"files": files, "beaten": worse, "hypervolume": volumes, "gain": round(gain, 3), "short": short}))
    return 1 if asked.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
