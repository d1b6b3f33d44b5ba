"""int8 and ONNX, model by model: every torchvision classifier, one small variant of every timm module, and the models
that have real weights here.

    python bench/quantization_breadth.py --library torchvision|timm|real [--only GLOB] [--part I/N] [--int8] [--float]
    [--pruned] [--jobs N] [--resume] [--check]

Each is captured, quantised (defaults; calibrated on a few natural images of $RAREFY_DATA at the model's size, on noise
where there are none), exported, opened
in ONNX Runtime and compared with its simulation: the same most likely class, the largest difference of the answers
(absolute, and in units of the answers' standard deviation), signal-to-noise of the simulation against the float model
and of the file against the simulation in dB, and layer by layer, both starting from the file's own codes, by how many
codes a value differs. ``--float`` exports the model as it is; ``--pruned`` prunes half of the channels first.

``torchvision`` and ``timm`` have random weights, of which nothing is left neutral (bench/zoo.py); they fail by an
error, or by a layer that differs by more than one code. ``real`` are EfficientNet-Lite0 to 2 and the CIFAR ResNets on
256 natural images; simulation and file must agree on 99.9 % of them, and the margin between the two most likely
classes, in units of their difference, is told where they don't. Each model has a process of its own, of one thread and
with a limit of time and memory; what is known of it is kept in ``out/``, and ``--resume`` goes on from there
(bench/cells.py).
``--check`` exits 1 if a model with real weights falls short, or more than 5 % of the others.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from bench.cells import Cells, add_options
from bench.efficientnet_lite0 import sqnr
from bench.zoo import MAKERS, Made, alive, each, images, usable
from rarefy import capture, prune, quantize
from rarefy.cli.terminal import show_table
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

AGREEMENT, MOST_FAILURES, LARGEST_FLOAT = 0.999, 0.05, 1e-3
SAMPLES, CALIBRATION, BATCH = {"real": 256}, {"real": 128}, {"real": 16}  # others: 2 images each
COMPARED = 32  # images compared layer by layer, at most
REAL = [*(f"efficientnet_lite{number}" for number in range(3)), *(f"resnet{depth}" for depth in real_data.DEPTHS)]


def real_model(name: str) -> Made:
    if name.startswith("efficientnet"):
        number = int(name[-1])
        return real_data.efficientnet_lite(number), [images(real_data.LITE_SIZES[number])]
    return real_data.resnet_cifar(int(name.removeprefix("resnet"))), [images(32)]


def task_for(name: str, side: int) -> Classification:
    if side == 32:
        return Classification(train="bench.real_data:cifar10", val="bench.real_data:cifar10")
    lite = name.startswith("efficientnet_lite")
    return Classification(
        train=real_data.imagenet_calib(),
        val=real_data.imagenet_val(),
        size=side,
        class_count=1000,
        mean=real_data.LITE_MEAN if lite else None,
        std=real_data.LITE_STD if lite else None,
    )


def natural(name: str, like: tuple[Tensor, ...], split: Any, count: int, batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Images of the size of ``like``; noise where there are none, or the model takes something else than an image."""
    if len(like) == 1 and like[0].dim() == 4 and like[0].shape[1] == 3:
        try:
            yield from ((one,) for one in task_for(name, like[0].shape[-1]).inputs(split, count, batch))
            return
        except DataError:
            pass
    for _ in range(count // batch):
        yield tuple(torch.randn((batch, *one.shape[1:])) for one in like)


def examined(library: str, kinds: Sequence[str], name: str) -> dict[str, Any]:
    """{kind: facts}; the model is made and captured once."""
    torch.manual_seed(0)
    made, watch = Stages("make"), {}
    try:
        model, candidates = real_model(name) if library == "real" else MAKERS[library](name)
        model = model.eval() if library == "real" else alive(model).eval()
        inputs = usable(model, candidates)
        made.begin("capture")
        graph = capture(model, inputs)
        del model
    except Exception as error:
        return {kind: {"seconds": made.seconds, "error": made.failure(error)} for kind in kinds}
    made.begin("done")
    for kind in kinds:
        gc.collect()  # the model and what was made of it are in cycles of references
        facts: dict[str, Any] = {"input": [list(one.shape[1:]) for one in inputs]}
        stages = Stages("begin", dict(made.seconds))
        try:
            examine(facts, stages, library, kind, name, graph, inputs)
        except Exception as error:
            facts |= {"error": stages.failure(error), "traceback": traceback.format_exc()[-6000:]}
        stages.begin("done")
        watch[kind] = facts | {
            "seconds": stages.seconds,
            "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    return watch


class Stages:
    """What is going on, and how long each part took."""

    def __init__(self, stage: str, seconds: dict[str, float] | None = None):
        self.stage, self.began, self.seconds = stage, time.perf_counter(), seconds or {}

    def begin(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[self.stage], self.stage, self.began = now - self.began, stage, now

    def failure(self, error: Exception) -> str:
        return f"{self.stage}: {' '.join(str(error).split())[:400] or type(error).__name__}"


def examine(
    facts: dict[str, Any],
    stages: Stages,
    library: str,
    kind: str,
    name: str,
    graph: fx.GraphModule,
    inputs: tuple[Tensor, ...],
) -> None:
    from rarefy.runtimes.onnxruntime import OnnxRuntime

    batch = BATCH.get(library, 2)
    if kind == "pruned":
        stages.begin("prune")
        graph = prune(graph, keep=0.5, ranking="local")
    small = graph
    if kind != "float":
        stages.begin("quantize")
        small = quantize(
            graph, batches=natural(name, inputs, "train", CALIBRATION.get(library, 2), batch), progress=False
        )
        own = small.meta["history"][-1]["facts"]
        facts |= {"integer_layers": len(own["layers"]), "float_layers": own["float"]}
    samples = tuple(
        torch.cat(parts) for parts in zip(*natural(name, inputs, "val", SAMPLES.get(library, 2), batch), strict=True)
    )
    runtime = OnnxRuntime(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        stages.begin("export")
        path = runtime.export(small, Path(folder) / "model.onnx")
        facts["bytes"] = path.stat().st_size
        stages.begin("open")
        session = runtime.open(path)
        stages.begin("run")
        answers = answered(session, samples, batch)
        stages.begin("simulate")
        simulated = answered(small, samples, batch)
        stages.begin("judge")
        facts |= compared(answers, simulated)
        if kind != "float":
            stages.begin("float")
            facts["sqnr_db"] = sqnr(answered(graph, samples, batch), simulated)
            stages.begin("compare")
            found = runtime.compare(small, path, samples[0][:COMPARED], batch=batch)
            layers = found["layers"]
            differing = max(layers, key=lambda layer: layer["share"], default={"share": 0.0, "value": ""})
            facts |= {"ulp": found["ulp"], "first_diverging": found["first_diverging_layer"], "values": len(layers)}
            facts |= {"most_codes": differing["share"], "most_codes_in": differing["value"]}
            facts["diverging"] = [layer["value"] for layer in layers if layer["difference"] > 1]
    stages.begin("judge")
    judge(facts, library, kind)


def answered(model: Any, samples: tuple[Tensor, ...], batch: int) -> Tensor:
    """The first answer to all samples, (N, ...)."""
    with torch.no_grad():
        return torch.cat(
            [pytree.tree_leaves(model(*part))[0] for part in zip(*(one.split(batch) for one in samples), strict=True)]
        )


def compared(answers: Tensor, simulated: Tensor) -> dict[str, Any]:
    if not bool(answers.isfinite().all()):
        raise RuntimeError("the file's answers are not finite")
    if answers.shape != simulated.shape:
        raise RuntimeError(f"the file answers {tuple(answers.shape)}, the simulation {tuple(simulated.shape)}")
    difference = (answers - simulated).abs()
    facts: dict[str, Any] = {
        "difference": float(difference.max()),
        "relative_difference": float(difference.max() / simulated.std().clamp_min(1e-30)),
        "file_db": sqnr(simulated, answers),
    }
    if answers.dim() == 2:
        same = answers.argmax(1) == simulated.argmax(1)
        best = simulated.topk(2, 1).values
        margins = ((best[:, 0] - best[:, 1]) / difference.amax(1).clamp_min(1e-30))[~same]
        facts |= {"agreement": float(same.float().mean()), "samples": len(answers), "margins": margins.tolist()}
    return facts


def judge(facts: dict[str, Any], library: str, kind: str) -> None:
    if facts.get("ulp", 0) > 1:
        raise RuntimeError(f"{facts['first_diverging']}: differs by {facts['ulp']} codes at most")
    if kind == "float" and facts["relative_difference"] > LARGEST_FLOAT:
        raise RuntimeError(f"answers differ by {facts['relative_difference']:.2g} of their standard deviation")
    if library == "real" and facts["agreement"] < AGREEMENT:
        raise RuntimeError(f"the same class for {facts['agreement']:.2%} of {facts['samples']}")


def listed(library: str) -> list[str]:
    """The largest first where sizes are known, so that the last to run are short."""
    if library == "real":
        return REAL
    if library == "torchvision":
        import torchvision

        models = torchvision.models
        sizes = {
            name: models.get_model_weights(name).DEFAULT.meta["num_params"]
            for name in models.list_models(module=models)
        }  # type: ignore[attr-defined]
        return sorted(sizes, key=lambda name: -sizes[name])
    import timm

    return list(timm.models.list_modules())


def summary(name: str, facts: dict[str, Any]) -> list[str]:
    def told(key: str, form: str) -> str:
        return format(facts[key], form) if key in facts else ""

    layers = f"{facts['integer_layers']}+{len(facts['float_layers'])}" if "integer_layers" in facts else ""
    return [
        name,
        "fails" if "error" in facts else "ok",
        layers,
        told("sqnr_db", ".1f"),
        told("agreement", ".2%"),
        told("difference", ".1e"),
        told("relative_difference", ".1e"),
        "exact" if facts.get("difference") == 0 else told("file_db", ".0f"),
        told("ulp", "d"),
        told("most_codes", ".0e"),
        f"{sum(facts.get('seconds', {}).values()):.0f}",
        told("gigabytes", ".1f"),
        facts.get("error", ""),
    ]


HEADINGS = [
    "model",
    "",
    "int8+float",
    "SQNR dB",
    "same top-1",
    "largest",
    "in std",
    "file dB",
    "codes",
    "share",
    "s",
    "GiB",
    "cause",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--library", choices=["torchvision", "timm", "real"], default="torchvision")
    option("--only", metavar="GLOB", action="append", help="models (of timm: modules) by name; may be repeated")
    option("--part", metavar="I/N", help="every Nth of them, from the Ith on: for several machines")
    option(
        "--float",
        dest="kinds",
        action="append_const",
        const="float",
        help="the model as it is, as well as or instead of int8",
    )
    option(
        "--pruned", dest="kinds", action="append_const", const="pruned", help="half of the channels pruned, then int8"
    )
    option("--int8", dest="kinds", action="append_const", const="int8", help="int8 (the default)")
    option("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    option("--seconds", type=float, default=250, help="limit for a model")
    option("--memory", type=float, default=8, help="limit for a model, in GiB")
    option("--retry", action="store_true", help="with --resume: look at those that failed again")
    option("--check", action="store_true", help="exit 1 where it falls short")
    option("--out", type=Path, help="write the JSON there too, anew after each model")
    add_options(parser)
    given = parser.parse_args()
    try:
        everything = listed(given.library)
    except ImportError:
        print(f"skipped: {given.library} is not installed")
        return 1 if given.check else 0
    names = [name for name in everything if any(fnmatch.fnmatch(name, glob) for glob in given.only or ["*"])]
    if given.part:
        index, parts = (int(number) for number in given.part.split("/"))
        names = names[index - 1 :: parts]
    torch.set_num_threads(1)
    kinds = list(dict.fromkeys(given.kinds or ["int8"]))
    cells = Cells(
        "quantization_breadth", {"library": given.library, "kinds": sorted(kinds), "torch": torch.__version__}, given
    )
    found: dict[str, dict[str, dict[str, Any]]] = {
        name: kept for name in names if (kept := cells.found(name)) is not None
    }
    for name in [
        name for name, facts in found.items() if given.retry and any("error" in one for one in facts.values())
    ]:
        cells.forget(name)
        del found[name]
    for name, results in each(
        partial(examined, given.library, kinds), cells.missing(names), given.jobs, given.seconds, given.memory
    ):
        found[name] = cells.keep(
            name, dict.fromkeys(kinds, results) if "error" in results else results
        )  # killed before it could tell
        for kind in kinds:
            print("  ".join([kind, *summary(name, found[name][kind])]), file=sys.stderr, flush=True)
        if given.out:
            given.out.write_text(as_line(given.library, cells.left, found) + "\n")
    short = cells.left > 0
    for kind in kinds:
        rows = {name: found[name][kind] for name in names if name in found}
        failed = [name for name, facts in rows.items() if "error" in facts]
        title = f"{given.library}, {kind}: simulation and ONNX Runtime, torch {torch.__version__}"
        show_table(title, HEADINGS, [summary(name, facts) for name, facts in rows.items()], tuple(range(2, 12)))
        left = f"; {cells.left} not looked at yet: --resume goes on" if cells.left else ""
        spread = sorted(facts["relative_difference"] for facts in rows.values() if "relative_difference" in facts)
        exact = sum(facts.get("difference") == 0 for facts in rows.values())
        middle = (
            f"; largest difference in std, median {spread[len(spread) // 2]:.1e}, {exact} equal to the bit"
            if spread
            else ""
        )
        print(f"{len(rows) - len(failed)} of {len(rows)} pass{left}{middle}")
        short |= len(failed) > (0 if given.library == "real" else MOST_FAILURES) * len(names)
    print(as_line(given.library, cells.left, found))
    return 1 if given.check and short else 0


def as_line(library: str, left: int, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    models = {
        name: {
            kind: {key: value for key, value in facts.items() if key != "traceback"} for kind, facts in kinds.items()
        }
        for name, kinds in found.items()
    }
    return json.dumps(
        {
            "bench": "quantization_breadth",
            "library": library,
            "torch": torch.__version__,
            "left": left,
            "models": models,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
