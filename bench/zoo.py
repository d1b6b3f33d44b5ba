"""Models by the name of their library, with inputs they take, each looked at in a process of its own: what the benches
of breadth share.

Of torchvision every image model; of timm one small variant of every architecture module, the one with the fewest
parameters, counted on the meta device. Weights are random, and nothing is left at its neutral value (``alive``). A
process has a limit of time and memory, and what is killed, or takes too long, is a failure like any other.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, list[tuple[Tensor, ...]]]  # a model and inputs to try, the cheapest first


class Core(nn.Module):
    """A detector without anchors, decoding and NMS: backbone, and the dense head if there is one."""

    def __init__(self, detector: Any):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def torchvision_model(name: str) -> Made:
    import torchvision

    options: dict[str, Any] = {}
    if name.endswith(("googlenet", "inception_v3")):
        options = {"aux_logits": False, "init_weights": False}
    if (
        "deeplab" in name
        or "fcn_resnet" in name
        or "lraspp" in name
        or "rcnn" in name
        or "ssd" in name
        or "retina" in name
        or "fcos" in name
    ):
        options = {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **options)
    if hasattr(model, "backbone") and (hasattr(model, "rpn") or hasattr(model, "anchor_generator")):
        return Core(model), [images(320), images(300)]
    if name.startswith("raft"):
        return model, [(*images(128), *images(128))]
    owner = type(model).__module__
    if ".video." in owner or name.startswith("swin3d"):
        return model, [(torch.randn(2, 3, frames, size, size),) for frames, size in ((8, 64), (16, 64), (16, 224))]
    return model, [images(size) for size in (96, 224, 299)]


def timm_model(module: str) -> Made:
    """Of a module the smallest variant, or the model of that name."""
    import timm

    model = timm.create_model(smallest(module) if module in timm.models.list_modules() else module)
    channels, side, _ = model.default_cfg["input_size"]
    sizes = (
        [side]
        if model.default_cfg.get("fixed_input_size")
        else [size for size in (96, 128, 160, 192, 224) if size < side] + [side]
    )
    return model, [images(size, channels) for size in sizes]


def smallest(module: str) -> str:
    """The variant with the fewest parameters, of a version that is not known here yet remembered in ``out/``: counting
    them all takes minutes."""
    import timm

    here, name = Path(__file__).resolve().parent, f"smallest_timm_{timm.__version__}.json"
    file = here.parent / "out" / name
    known: dict[str, str] = {}
    for table in (here / name, file):
        known |= json.loads(table.read_text()) if table.exists() else {}
    if module in known:
        return known[module]

    def count(name: str) -> float:
        try:
            with torch.device("meta"):
                return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except RuntimeError:  # computes with its weights while it is made
            return math.inf

    known[module] = min(timm.list_models(module=module), key=count)
    file.parent.mkdir(exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(known))
    new.replace(file)
    return known[module]


def images(side: int, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, side, side),)


def alive(model: nn.Module) -> nn.Module:
    """Nothing neutral: a constant vector (a norm's weight, a layer scale, a bias of zeros) or running statistic gets
    noise of its own."""
    statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    with torch.no_grad():
        for tensor in [*model.parameters(), *statistics]:
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.rand_like(tensor).mul_(0.5))
    return model


def usable(model: nn.Module, candidates: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The first inputs the model takes."""
    failure: Exception | None = None
    for inputs in candidates:
        try:
            with torch.no_grad():
                model(*(one[:1] for one in inputs))
            return inputs
        except Exception as error:
            failure = error
    raise RuntimeError(f"takes none of the inputs: {failure}")


def guarded(job: Callable[[str], dict[str, Any]], name: str, pipe: Connection, memory: float) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
    pipe.send(job(name))


def each(
    job: Callable[[str], dict[str, Any]], names: Iterable[str], jobs: int, seconds: float, memory: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what ``job`` found of it), every model in a process of its own with so many seconds and GiB."""
    context = multiprocessing.get_context("fork")
    waiting = iter(names)
    running: dict[Connection, tuple[str, Any, float]] = {}
    while True:
        while len(running) < jobs and (name := next(waiting, "")):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=guarded, args=(job, name, sender, memory), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic())
        if not running:
            return
        ready = wait(list(running), timeout=1)
        for receiver in list(running):
            name, process, began = running[receiver]
            late = time.monotonic() - began > seconds
            if receiver not in ready and not late:
                continue
            try:
                facts = receiver.recv() if receiver in ready else {"error": f"takes more than {seconds:.0f} s"}
            except EOFError:
                process.join()
                facts = {"error": f"its process died (exit code {process.exitcode})"}
            process.kill()
            process.join()
            del running[receiver]
            yield name, facts


def listed(library: str) -> list[str]:
    if library == "torchvision":
        import torchvision

        return list(torchvision.models.list_models())
    import timm

    return list(timm.models.list_modules())


MAKERS: dict[str, Callable[[str], Made]] = {"torchvision": torchvision_model, "timm": timm_model}
