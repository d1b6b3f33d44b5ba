"""Any model: networks of many kinds and makers through every verb, one after the other.

    python bench/zoo_tasks.py [--only GLOB] [--jobs N] [--check] [--resume] [--for SECONDS]

Each (bench/task_networks.py: transformers, timm's feature maps, segmentation, recurrent, Conv1d and Conv3d, ONNX files)
is captured, and must answer as the original does, in the same form, another batch size included; pruned (keep=0.5,
ranking local), where it is told which share of the channels could leave, and what holds the others; trained a step
(a classifier of images by ``distill``, the others by a step of SGD towards the original's answers); quantised on 8
inputs of noise; exported to ONNX Runtime and OpenVINO, float and int8, each file compared with its model. Random
weights, of which nothing is left neutral. One whose file differs, whose weights do not move, of which nothing becomes
integer, or that is refused, fails, by the step's name; one that is to be refused fails where it is not. What an ONNX
file answers is said by ONNX Runtime, or, where that is further off than 1e-4, by the same graph in float64. A row whose
package is missing is skipped, and said to be. Each has a process of its own with a limit of time and memory.

``--check`` exits 1 where one fails at a step that is not in ``KNOWN``, which says why. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cells import Cells, add_options
from bench.efficientnet_lite0 import sqnr
from bench.task_networks import NETWORKS, Inputs, Made, Network, is_here
from bench.zoo import alive, each
from rarefy import RarefyError, capture, distill, export, prune, quantize
from rarefy.cli.terminal import show_table
from rarefy.graph.macs import count_parameters
from rarefy.tasks import Classification

EXACT, IN_FLOAT = 1e-4, 1e-3  # largest difference, in units of the answers' largest: captured, exported
KNOWN = {  # network -> the step at which it stops, and why
    "transformers Cvt": (
        "int8 to openvino",
        "OpenVINO can't compile a linear layer behind a join of the class token and patches on two grids",
    ),
    "onnx rapidocr_onnxruntime ch_PP-OCRv4_det_infer.onnx": (
        "float to onnxruntime",
        "pruned, it answers at most 4e-7 to noise, and ONNX Runtime's sigmoid is off by 1e-7",
    ),
}
RUNTIMES = {"onnxruntime": ".onnx", "openvino": ".xml"}
CALIBRATION = 4  # batches of two


def examined(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    facts: dict[str, Any] = {"seconds": {}, "gigabytes": 0.0}
    network, stage = NETWORKS[name], "make"
    began = time.perf_counter()
    try:
        for stage in steps(network, facts):
            facts["seconds"][stage] = time.perf_counter() - began
            began = time.perf_counter()
    except Exception as error:
        own = type(error).__name__ if not isinstance(error, RarefyError) else ""
        facts["error"] = " ".join(f"{facts.get('stage', 'make')}: {own} {error}".split())[:400]
        facts["traceback"] = traceback.format_exc()[-4000:]
    facts["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return facts


def steps(network: Network, facts: dict[str, Any]) -> Any:
    """Goes through the verbs; yields the name of each that is done; which is under way stands in ``facts``."""
    facts["stage"] = "make"
    made = network.make()
    made.model.eval()
    if made.answer is None:
        alive(made.model)
    yield "make"
    facts["stage"] = "capture"
    if network.refused:
        refused(network, made)
        yield "capture"
        return
    graph = capture(made.model, made.inputs)
    same_answers(graph, made, facts)
    yield "capture"
    facts["stage"] = "prune"
    small = pruned(graph, facts)
    yield "prune"
    facts["stage"] = "train"
    trained = a_step(small, graph, network, made)
    yield "train"
    facts["stage"] = "quantize"
    integer = quantised(trained, made, facts)
    yield "quantize"
    for kind, model in (("float", trained), ("int8", integer)):
        for runtime in RUNTIMES:
            facts["stage"] = f"{kind} to {runtime}"
            noise = 10 ** (-facts["sqnr_db"] / 20) if kind == "int8" else 0.0
            facts[f"{kind} {runtime}"] = exported(model, made, noise, runtime)
        yield f"export {kind}"
    facts["stage"] = "done"


def refused(network: Network, made: Made) -> None:
    try:
        capture(made.model, made.inputs)
    except RarefyError as error:
        if network.refused not in str(error):
            raise RuntimeError(f"is refused without the word {network.refused}: {error}") from error
    else:
        raise RuntimeError(f"is not refused; the words would be {network.refused}")


def asked(model: Any, inputs: Inputs) -> Any:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(answer: Any) -> list[Tensor]:
    """All tensors of an answer in order. A ModelOutput is a dictionary that pytree may not know."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    return [one for one in pytree.tree_leaves(answer) if isinstance(one, Tensor)]


def repeated(inputs: Inputs, times: int) -> Inputs:
    """So many times as large a batch, of which images or sequences are turned, so that no two are the same."""
    found: Inputs = pytree.tree_map(lambda one: torch.cat([one.roll(i, -1) for i in range(times)]), inputs)
    return found


def same_answers(graph: fx.GraphModule, made: Made, facts: dict[str, Any]) -> None:
    for inputs in (made.inputs, repeated(made.inputs, 3)):
        wanted = asked(made.model, inputs)
        got = asked(graph, inputs)
        if isinstance(wanted, dict) and list(wanted) != list(got):
            raise RuntimeError(f"answers {list(got)} in place of {list(wanted)}")
        facts["captured"] = max(facts.get("captured", 0.0), apart(tensors(got), tensors(wanted)))
        if facts["captured"] > EXACT:
            raise RuntimeError(f"the graph's answers differ by {facts['captured']:.1e} of the largest")
    if made.answer is not None:
        ours, theirs = tensors(asked(graph, made.inputs)), tensors(made.answer)
        facts["captured"] = apart(ours, theirs)
        if facts["captured"] > EXACT:  # whose is wrong, in numbers of one half the rounding?
            exact = tensors(asked(copy.deepcopy(graph).double(), as_double(made.inputs)))
            facts["theirs_to_float64"] = apart(theirs, exact)
            facts["captured"] = apart(ours, exact)
        if facts["captured"] > EXACT:
            raise RuntimeError(f"ONNX Runtime's answers to the file differ by {facts['captured']:.1e} of the largest")


def as_double(inputs: Inputs) -> Inputs:
    found: Inputs = pytree.tree_map(lambda one: one.double() if one.is_floating_point() else one, inputs)
    return found


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference in units of the largest answer; infinite where their forms differ."""
    if [one.shape for one in ours] != [one.shape for one in theirs]:
        return float("inf")
    return max(
        float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30))
        for one, other in zip(ours, theirs, strict=True)
    )


def pruned(graph: fx.GraphModule, facts: dict[str, Any]) -> fx.GraphModule:
    small = prune(graph, keep=0.5, ranking="local")
    own = small.meta["history"][-1]["facts"]
    widths = {name: before for name, (before, _) in own["channels"].items()}
    held = {name: why for name, why in own["frozen"].items() if name in widths}
    facts["could_leave"] = 1 - sum(widths[name] for name in held) / sum(widths.values())
    facts["frozen"] = dict(Counter(why for why in held.values()))
    facts["parameters"] = [count_parameters(graph), count_parameters(small)]
    if facts["parameters"][1] >= facts["parameters"][0]:
        raise RuntimeError(f"nothing left: {facts['frozen']}")
    return small


def a_step(small: fx.GraphModule, teacher: fx.GraphModule, network: Network, made: Made) -> fx.GraphModule:
    if network.classes:
        assert isinstance(made.inputs, Tensor)
        pictures = torch.randint(0, 256, (4, *made.inputs.shape[1:]), dtype=torch.uint8)
        task = Classification(train=(pictures, torch.arange(4) % 5), val=(pictures, torch.arange(4) % 5), class_count=5)
        trained = distill(small, teacher, task, epochs=1, batch_size=4, progress=False)
    else:
        trained = by_hand(small, tensors(asked(teacher, made.inputs)), made.inputs)
    before, after = small.state_dict(), trained.state_dict()
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    if not moved or not all(bool(value.isfinite().all()) for value in after.values() if value.is_floating_point()):
        raise RuntimeError("no weight moved, or one is not finite")
    return trained


def by_hand(small: fx.GraphModule, wanted: list[Tensor], inputs: Inputs) -> fx.GraphModule:
    trained = capture(small, inputs).train()  # a copy
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
    with torch.enable_grad():
        answers = trained(**inputs) if isinstance(inputs, dict) else trained(*pytree.tree_leaves(inputs))
        pairs = zip(tensors(answers), wanted, strict=True)
        loss = sum((one - other).square().mean() for one, other in pairs if one.is_floating_point())
        assert isinstance(loss, Tensor)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()
    return trained.eval()


def quantised(graph: fx.GraphModule, made: Made, facts: dict[str, Any]) -> fx.GraphModule:
    batches = [pytree.tree_map(lambda one, i=i: one.roll(i, -1), made.inputs) for i in range(CALIBRATION)]
    small = quantize(graph, batches=batches, progress=False)
    own = small.meta["history"][-1]["facts"]
    facts["integer"], facts["float"] = len(own["layers"]), own["float"]
    pairs = zip(tensors(asked(graph, made.inputs)), tensors(asked(small, made.inputs)), strict=True)
    facts["sqnr_db"] = min(sqnr(one, other) for one, other in pairs if one.is_floating_point())
    if not facts["integer"]:
        raise RuntimeError(f"no layer became integer: {dict(Counter(facts['float'].values()))}")
    return small


def exported(model: fx.GraphModule, made: Made, noise: float, runtime: str) -> float:
    """The largest difference of the file's answers, in units of the largest answer.

    noise: of int8, as a share of the answers: where it is large, a code that differs by one in the file may change them
    by as much, although every rounded value, read out of the file, is the graph's.
    """
    inputs = made.inputs
    with tempfile.TemporaryDirectory() as folder:
        parity = export(model, Path(folder) / f"model{RUNTIMES[runtime]}", runtime=runtime, inputs=inputs)
    largest = max(float(one.double().abs().max()) for one in tensors(asked(model, inputs)))
    found: float = parity["largest_difference"] / max(largest, 1e-30)
    if not parity["passed"] and (parity["first_diverging_layer"] is not None or found > noise):
        first = parity["first_diverging_layer"]
        raise RuntimeError(
            f"differs by {found:.1e} of the largest answer, agreement {parity['agreement']:.2f}, first at {first}"
        )
    if not noise and found > IN_FLOAT:
        raise RuntimeError(f"answers differ by {found:.1e} of the largest")
    return found


HEADINGS = ["network", "", "could leave", "left", "int8+float", "SQNR dB", "ONNX R.", "OpenVINO", "s", "GiB"]


def summary(name: str, facts: dict[str, Any]) -> list[str]:
    def told(key: str, form: str) -> str:
        return format(facts[key], form) if key in facts else ""

    before, after = facts.get("parameters", (0, 0))
    stops = "error" in facts and name in KNOWN and facts["error"].startswith(KNOWN[name][0])
    verdict = "skipped" if "skipped" in facts else "known" if stops else "fails" if "error" in facts else "ok"
    return [
        name,
        verdict,
        told("could_leave", ".0%"),
        f"{after / before:.0%}" if before else "",
        f"{facts['integer']}+{len(facts['float'])}" if "integer" in facts else "",
        told("sqnr_db", ".1f"),
        *(told(f"int8 {runtime}", ".0e") for runtime in RUNTIMES),
        f"{sum(facts.get('seconds', {}).values()):.0f}",
        told("gigabytes", ".1f"),
    ]


def cause(facts: dict[str, Any]) -> str:
    """Why it failed or was skipped; else what holds channels."""
    held = "; ".join(f"{count} held by {why}" for why, count in Counter(facts.get("frozen", {})).most_common(3))
    return facts.get("skipped") or facts.get("error") or held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", metavar="GLOB", action="append", help="networks by name; may be repeated")
    option("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    option("--seconds", type=float, default=240, help="limit for a network")
    option("--memory", type=float, default=6, help="limit for a network, in GiB")
    option("--check", action="store_true", help="exit 1 where one fails")
    add_options(parser)
    given = parser.parse_args()
    names = [name for name in NETWORKS if any(fnmatch.fnmatch(name, glob) for glob in given.only or ["*"])]
    found: dict[str, dict[str, Any]] = {
        name: {"skipped": f"{NETWORKS[name].needs} is not installed: make bench-setup"}
        for name in names
        if not is_here(NETWORKS[name].needs)
    }
    cells = Cells("zoo_tasks", {"torch": torch.__version__}, given)
    here = [name for name in names if name not in found]
    found |= {name: facts for name in here if (facts := cells.found(name)) is not None}
    for name, facts in each(examined, cells.missing(here), given.jobs, given.seconds, given.memory):
        found[name] = cells.keep(name, facts)
        print("  ".join([*summary(name, facts), cause(facts)]), file=sys.stderr, flush=True)
    known = [name for name in names if name in found]
    rows = {name: summary(name, found[name]) for name in known}
    for group in dict.fromkeys(NETWORKS[name].group for name in known):
        show_table(
            group, HEADINGS, [rows[name] for name in known if NETWORKS[name].group == group], tuple(range(2, 10))
        )
    for name in known:
        print(f"{name}: {cause(found[name]) or 'all could leave'}")
    count = Counter(row[1] for row in rows.values())
    left = f"; {cells.left} not looked at yet: --resume goes on" if cells.left else ""
    print(
        f"{count['ok']} pass, {count['fails']} fail, {count['known']} stop where it is known why, "
        f"{count['skipped']} skipped{left}"
    )
    told = {name: {key: value for key, value in facts.items() if key != "traceback"} for name, facts in found.items()}
    print(json.dumps({"bench": "zoo_tasks", "torch": torch.__version__, "left": cells.left, "networks": told}))
    return 1 if given.check and (count["fails"] or cells.left) else 0


if __name__ == "__main__":
    sys.exit(main())
