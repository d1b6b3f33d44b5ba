"""The front of a search against as many seconds of random recipes, and of Optuna's TPE alone, over the same space.

The digits demo on the CPU. All three are given the same seconds of a processor (those that the search's trials took:
what others have beyond is not counted), the same table of costs, and are timed the same way; a random recipe draws each
family's width, the bits, the length of training, the learning rate and the criterion.

Then all models of the three are timed once more, in turns with the original and nothing else beside: a search's own
timing shares the machine with its trainings. Fronts are those of that timing.

* ``files``: of the front, each saved and verified.
* ``beaten``: points of the front that a random recipe of at most their latency betters by more than the point's
  interval.
* ``hypervolume``: of 1 - accuracy and latency in shares of the original's, below a reference of 0.2 and 1.05;
  ``in budget``: below the drop that all three were asked for, in place of 0.2.

    python bench/search.py --check              24 trials, a quarter of an hour on two cores
    python bench/search.py --small --check      8 trials: that it works, not how well
    python bench/search.py --folder F --time    searches that lie there, timed and judged once more: seconds
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from rarefy import demo
from rarefy.compression.budget import Budget
from rarefy.compression.gates import ORIGINAL
from rarefy.compression.run import FIRST
from rarefy.compression.search.front import Front, Point, hypervolume, mark, read
from rarefy.compression.search.journal import Journal
from rarefy.compression.search.search import search
from rarefy.compression.search.trial import BASE
from rarefy.demo.digits import demo as digits
from rarefy.deployment import latency
from rarefy.distillation import distill
from rarefy.tasks import detector

FILES, GAIN = 8, 1.1
FOLDERS = {"search": "search", "random": "random", "TPE alone": "tpe"}  # name -> the folder, and the strategy
TURNS = 8  # models that are timed in turns with the original
REFERENCE = (0.2, 1.05)
DROP = 0.01  # that is asked for
LONGER = 1.5  # that the others are given, of which as much counts as the search took


def original(seed: int, width: int, epochs: int) -> tuple[torch.fx.GraphModule, object]:
    shown = digits(seed)
    torch.manual_seed(seed)
    graph = detector.capture(demo.model(width=width), shown.task.data.input_shape)
    training = {**shown.training, "epochs": epochs}
    return distill.train(graph, shown.task, **training, seed=seed, progress=False), shown.task


def searched(asked: argparse.Namespace, home: Path) -> None:
    graph, task = original(asked.seed, asked.width, 2 if asked.small else 8)
    given = {"epochs": asked.epochs, "budget": Budget(max_drop=DROP), "seed": asked.seed, "corruptions": []}
    found = search(graph, task, folder=home / FOLDERS["search"], trials=asked.trials, **given)
    minutes = LONGER * sum(one["seconds"] for one in found.points) / 60
    for name in ("random", "TPE alone"):
        strategy = FOLDERS[name]
        search(graph, task, folder=home / strategy, minutes=minutes, strategy=strategy, **given)


def timed_again(home: Path) -> dict[str, Front]:
    """The fronts, every model timed in turns with the original, a few at a time."""
    task, fronts = digits(0).task, {name: read(home / folder) for name, folder in FOLDERS.items()}
    files, most = {}, 0.0
    for name, front in fronts.items():
        told = {one.number: one.told for one in Journal(front.folder, None, 0).trials()}
        spent = np.cumsum([float(str(told[number]["cpu_seconds"])) for number in sorted(told) if told[number]])
        most = most or float(spent[-1])  # the search's, which comes first
        counted = [number for number in sorted(told) if told[number]][: int((spent <= most).sum())]
        front = fronts[name] = dataclasses.replace(
            front, points=[one for one in front.points if one["number"] in counted]
        )
        print(f"{name}: {len(counted)} of {len(spent)} trials in {most:.0f} s of a processor")
        files |= {
            (name, one["number"]): front.folder / str(told[one["number"]]["result"]) / "model.onnx"
            for one in front.points
        }
    first = fronts["search"].folder / BASE / FIRST / "model.onnx"
    example, runtime = torch.cat(list(task.data.inputs("val", 1, 1, seed=0))), latency.with_threads("onnxruntime")
    speed, keys = {}, list(files)
    random.Random(0).shuffle(keys)  # neither of the three is timed first
    for begin in range(0, len(keys), TURNS):
        some = keys[begin : begin + TURNS]
        turns = {ORIGINAL: first, **{f"{name} {number}": files[name, number] for name, number in some}}
        found = latency.timed(turns, example, runtime=runtime, repeats=60)
        speed |= {(name, number): found[f"{name} {number}"]["speedup"][ORIGINAL] for name, number in some}
    base = float(fronts["search"].points[0]["latency_ms"]["median"] * fronts["search"].points[0]["speedup"]["median"])
    return {
        name: dataclasses.replace(
            front, points=mark([_with_speed(one, speed[name, one["number"]], base) for one in front.points])
        )
        for name, front in fronts.items()
    }


def _with_speed(one: Point, speed: latency.Quartiles, base_ms: float) -> Point:
    ms = {"median": base_ms / speed["median"], "low": base_ms / speed["high"], "high": base_ms / speed["low"]}
    return {**one, "speedup": speed, "latency_ms": ms}


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
    parser.add_argument("--time", action="store_true", help="no search: those in --folder, timed and judged again")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if asked.small:
        asked.trials, asked.epochs, asked.width = 8, 2, 16
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(asked.folder or temporary)
        if not asked.time:
            searched(asked, home)
        found = timed_again(home)
    whole = found["search"].points[0]
    reference = (1 - whole["value"] - whole["drop"] + DROP, REFERENCE[1])  # the original's error, and what may be lost
    volumes = {name: hypervolume([place(one) for one in front.points], REFERENCE) for name, front in found.items()}
    inside = {name: hypervolume([place(one) for one in front.points], reference) for name, front in found.items()}
    worse = beaten(found["search"], list(found["random"].points))
    print(f"{'':12} trials  minutes  front  hypervolume  in budget")
    for name, front in found.items():
        spent = sum(one["seconds"] for one in front.points) / 60
        found_there = f"{name:12} {len(front.points):6} {spent:8.1f} {len(front.best):6}"
        print(f"{found_there} {volumes[name]:12.4f} {inside[name]:10.5f}")
    print(found["search"])
    files = len([one for one in found["search"].best if one["folder"]])
    gain = volumes["search"] / max(volumes["TPE alone"], 1e-9)
    short = [
        *([f"{files} files, fewer than {FILES}"] if files < FILES and not asked.small else []),
        *([f"points {worse} are beaten by random recipes"] if worse else []),
        *([f"hypervolume {gain:.2f} times TPE's, less than {GAIN}"] if gain < GAIN and not asked.small else []),
    ]
    print(
        json.dumps(
            {
                "files": files,
                "beaten": worse,
                "hypervolume": volumes,
                "inside": inside,
                "gain": round(gain, 3),
                "short": short,
            }
        )
    )
    return 1 if asked.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
