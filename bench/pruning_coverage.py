"""Structural pruning, model by model: every image model of torchvision, and one small variant of every architecture
module of timm.

    python bench/pruning_coverage.py --library torchvision|timm [--only GLOB] [--check] [--jobs N] [--resume]
        [--for SECONDS]

Random weights (nothing left at its neutral value: norms, layer scales and running statistics are made alive), half of
the channels of every family removed (keep=0.5, ranking local), the result compared with its masked twin in float64, run
forwards at another batch size and backwards in training mode, saved, loaded, and compared bit for bit. A model passes
if all of that works and its parameters shrink by a quarter at least; one with layers that are frozen by something else
than the output of the network must shrink too, and these are listed with the operator. Detectors and video models go
through the part that is tensors: backbone and head. Of timm the variant with the fewest parameters is taken, counted on
the meta device. ``--check`` exits 1 if a torchvision model fails, or more than 2 % of timm's. Each model has a process
of its own, with a limit of time and memory; what it found is kept below out/, so that a run may be cut off
(``--resume``). "prune s" is from the captured graph to the checked smaller one.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cells import Cells, add_options
from bench.zoo import MAKERS, Made, alive, each, listed, usable
from rarefy import capture, prune
from rarefy.artifact import folder as folder_
from rarefy.cli.terminal import show_table
from rarefy.graph.macs import count_parameters
from rarefy.graph.nodes import example_inputs

SHRINK, MOST_FAILURES = 0.25, {"torchvision": 0.0, "timm": 0.02}


def examined(make: Callable[[str], Made], name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    stage, began = "make", time.perf_counter()
    facts: dict[str, Any] = {}
    try:
        model, candidates = make(name)
        inputs = usable(alive(model).eval(), candidates)
        facts["input"] = [list(one.shape[1:]) for one in inputs]
        stage = "capture"
        graph = capture(model, inputs)
        del model
        before = count_parameters(graph)
        stage, start = "prune", time.perf_counter()
        small = prune(graph, keep=0.5, ranking="local")
        facts["prune_seconds"] = time.perf_counter() - start
        own = small.meta["history"][-1]["facts"]
        frozen = {key: why for key, why in own["frozen"].items() if not why.startswith("output of the network")}
        facts |= {
            "before": before,
            "after": count_parameters(small),
            "frozen": frozen,
            "unknown": own["unknown_operators"],
        }
        facts["channels"] = [sum(width[index] for width in own["channels"].values()) for index in (0, 1)]
        del graph
        stage = "forward"
        check_run(small)
        stage = "save and load"
        with tempfile.TemporaryDirectory() as folder:
            loaded = folder_.load(folder_.save(small, Path(folder) / "small"))
        stage = "loaded forward"
        sample = example_inputs(small, 3)
        small.eval()
        with torch.no_grad():
            for one, other in zip(pytree.tree_leaves(small(*sample)), pytree.tree_leaves(loaded(*sample)), strict=True):
                if not torch.equal(one, other):
                    raise RuntimeError(f"differs from what was saved by {float((one - other).abs().max()):.3g}")
        stage = "shrink"
        least = 0.0 if frozen else SHRINK
        if facts["after"] >= before or 1 - facts["after"] / before < least:
            raise RuntimeError(f"{before:,} parameters became {facts['after']:,}")
    except Exception as error:
        facts["error"] = f"{stage}: {' '.join(str(error).split())[:400] or type(error).__name__}"
        facts["traceback"] = traceback.format_exc()[-3000:]
    facts["seconds"] = time.perf_counter() - began
    facts["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return facts


def check_run(small: nn.Module) -> None:
    """Forwards in eval at batch 3, backwards in training mode at batch 2."""
    with torch.no_grad():
        outputs = pytree.tree_leaves(small.eval()(*example_inputs(small, 3)))
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise RuntimeError("outputs are not finite")
    small.train()
    loss = sum(output.float().square().mean() for output in pytree.tree_leaves(small(*example_inputs(small, 2))))
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = [parameter.grad for parameter in small.parameters() if parameter.grad is not None]
    if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise RuntimeError("no gradients, or not finite ones")
    small.zero_grad(set_to_none=True)


def summary(name: str, facts: dict[str, Any]) -> list[str]:
    left = f"{facts['after'] / facts['before']:.0%}" if "after" in facts else ""
    frozen = "; ".join(f"{count} {why}" for why, count in reasons(facts).most_common(2))
    unknown = ", ".join(facts.get("unknown", {}))
    notes = facts.get("error") or " ".join(filter(None, [frozen, f"unknown: {unknown}" if unknown else ""]))
    prune_seconds = f"{facts['prune_seconds']:.1f}" if "prune_seconds" in facts else ""
    outcome = "fails" if "error" in facts else "ok"
    return [
        name,
        outcome,
        left,
        prune_seconds,
        f"{facts.get('seconds', 0):.0f}",
        f"{facts.get('gigabytes', 0):.1f}",
        notes,
    ]


def reasons(facts: dict[str, Any]) -> Counter[str]:
    return Counter(facts.get("frozen", {}).values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=sorted(MOST_FAILURES), default="torchvision")
    parser.add_argument(
        "--only",
        metavar="GLOB",
        action="append",
        help="models (torchvision) or modules (timm) by name; may be repeated",
    )
    parser.add_argument("--model", action="append", help="this model instead, by its own name; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=600, help="limit for a model")
    parser.add_argument("--memory", type=float, default=16, help="limit for a model, in GiB")
    parser.add_argument("--check", action="store_true", help="exit 1 where it falls short")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    add_options(parser)
    given = parser.parse_args()
    try:
        names = given.model or [
            name
            for name in listed(given.library)
            if not given.only or any(fnmatch.fnmatch(name, glob) for glob in given.only)
        ]
    except ImportError:
        print(f"skipped: {given.library} is not installed")
        return 1 if given.check else 0
    torch.set_num_threads(1)
    options = {"library": given.library, "torch": torch.__version__, "seconds": given.seconds, "memory": given.memory}
    cells = Cells("pruning_coverage", options, given)
    found: dict[str, dict[str, Any]] = {name: kept for name in names if (kept := cells.found(name)) is not None}
    job = partial(examined, MAKERS[given.library])
    for name, facts in each(job, cells.missing(names), given.jobs, given.seconds, given.memory):
        found[name] = cells.keep(name, facts)
        print("  ".join(summary(name, facts)), file=sys.stderr, flush=True)
    failed = {name: facts["error"] for name, facts in found.items() if "error" in facts}
    show_table(
        f"{given.library}: half of the channels, torch {torch.__version__}",
        ["model", "", "parameters left", "prune s", "s", "GiB", "frozen, or cause"],
        [summary(name, found[name]) for name in names if name in found],
        (2, 3, 4, 5),
    )
    passed = len(found) - len(failed)
    print(f"{passed} of {len(names)} pass" + (f", {cells.left} not run yet: --resume goes on" if cells.left else ""))
    line = json.dumps(
        {
            "bench": "pruning_coverage",
            "library": given.library,
            "torch": torch.__version__,
            "passed": passed,
            "of": len(names),
            "models": found,
        }
    )
    print(line)
    if given.out:
        given.out.write_text(line + "\n")
    return 1 if given.check and len(names) - passed > MOST_FAILURES[given.library] * len(names) else 0


if __name__ == "__main__":
    sys.exit(main())
