"""Does another version of the code give the same bytes? What every verb makes, kept as hashes and folders by one tree,
and compared with what another one makes.

    PYTHONPATH=BEFORE python bench/same_results.py save before/      both trees with the same environment, the same
    machine and this one file PYTHONPATH=AFTER  python bench/same_results.py save after/
    python bench/same_results.py compare before/ after/ [--check]    what is the same; two runs of one tree must be, too
    PYTHONPATH=AFTER  python bench/same_results.py load before/ [--check]    folders of the old tree, in the new one
    ... save FOLDER --only 'prune *' [--only 'command *']            some cases only

Only public names are used, so that files may move: ``rarefy.*``, ``rarefy.tasks``, and ``python -m rarefy``. Networks
are three small ones of this file (residuals, groups, squeeze and excite, concatenation; attention; a plain one),
trained by a bare loop on scikit-learn's digits, and torchvision's ResNet-18 and MobileNetV2 with random weights.
Of each case are compared ``graph.json`` (without times of a clock in its history), ``weights.safetensors``, the files
of the runtimes, the answers on stored inputs, and all weights after two steps of training; of evaluations the numbers;
of command lines the exit code, stdout and stderr (without clocks), and the folders they wrote. ``load`` wants of each
stored folder the same answers, the same file of the runtime, the same training, and of a stored report the same page.

Left out is what a clock decides: ``speedup=``, ``gate=latency``, ``mixed:latency``, and the manifests. The budgets of
    ``compress`` here ask for no speed.

``--check`` exits 1 where anything differs, is missing or failed.
"""

# ruff: noqa: E402 (threads are limited before numpy is imported)
from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # sums hang on the number of threads
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "140", "PYTHONHASHSEED": "0", "NO_COLOR": "1"}

import argparse
import contextlib
import copy
import difflib
import fnmatch
import functools
import hashlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy.tasks import Classification

CLOCKS = re.compile(
    r"seconds|timing|latency|speedup|per_second|data_share|memory|allocation_s|timed|environment|wall|cpu_s|peak", re.I
)
CLOCK_LINES = re.compile(r"second|latency|speed|faster|slower|memory|data share|timing|\bms\b|as fast", re.I)
PARTS = ("graph", "weights", "file", "answers", "trained", "facts")  # columns of the table, of a case
SAID = ("exit", "stdout", "stderr")  # of a command line
DIGITS: Mapping[str, Any] = {"train": "sklearn:digits", "val": "sklearn:digits", "mean": 0.5, "std": 0.5}
SHORT: Mapping[str, Any] = {"batch_size": 64, "validate_every": 0, "device": "cpu", "progress": False}
QUIET: Mapping[str, Any] = {"progress": False}
RESULTS, COMMANDS = "results.json", "commands.json"


def train(*given: Any, **options: Any) -> Any:
    """``rarefy.train``, wherever it is."""
    found = getattr(rarefy, "train", None) or importlib.import_module("rarefy.distilling").train
    return found(*given, **options)


# ------------------------------------------------------------------ networks and data


def _normed(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)
    )


class Mixed(nn.Module):
    """A residual, a grouped and a depthwise convolution, squeeze and excite, a concatenation."""

    def __init__(self, width: int = 24):
        super().__init__()
        wide = 2 * width
        self.stem = _normed(1, width)
        self.one, self.two = _normed(width, width), _normed(width, width)
        self.grouped = _normed(width, wide, groups=4)
        self.expand = _normed(wide, 2 * wide, 1)
        self.depthwise = _normed(2 * wide, 2 * wide, groups=2 * wide)
        self.project = _normed(2 * wide, wide, 1)
        self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
        self.left, self.right = _normed(wide, width, 1), _normed(wide, width)
        self.head = nn.Linear(wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        x = F.max_pool2d(F.relu(self.two(F.relu(self.one(x))) + x), 2)
        x = F.relu(self.grouped(x))
        x = self.project(F.relu6(self.depthwise(F.hardswish(self.expand(x))))) + x
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions one behind the other."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.ModuleList(
            [_normed(1, width), _normed(width, width), _normed(width, width), _normed(width, 2 * width)]
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            x = F.max_pool2d(x, 2) if index == 1 else x
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(count, tokens, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Attentive(nn.Module):
    """A small vision transformer: 16 tokens, three blocks."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


EXAMPLE, PHOTO = torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 64, 64)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (torch.from_numpy(found.images).float()[:, None] / 16 - 0.5) / 0.5, torch.from_numpy(found.target).long()


@functools.cache
def _trained(kind: type[nn.Module]) -> nn.Module:
    """By a loop of its own: a case that differs is not differing because of the training it starts from."""
    torch.manual_seed(0)
    model = kind().train()
    images, labels = digits()
    attentive = kind is Attentive
    optimizer: torch.optim.Optimizer
    optimizer = (
        torch.optim.AdamW(model.parameters(), 3e-3) if attentive else torch.optim.SGD(model.parameters(), 0.1, 0.9)
    )
    for epoch in range(4 if attentive else 2):
        for rows in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def net(kind: type[nn.Module] = Mixed) -> Any:
    """A captured network of this file, trained."""
    return rarefy.capture(copy.deepcopy(_trained(kind)), EXAMPLE)


def untrained(kind: type[nn.Module] = Mixed) -> Any:
    torch.manual_seed(1)
    return rarefy.capture(kind(), EXAMPLE)


def vision(name: str) -> Any:
    """A network of torchvision, random weights, statistics of batch norm that are not the initial ones."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    for _, value in model.named_buffers():
        if value.dim() == 1:
            value.copy_(torch.rand_like(value) + 0.5)
    return rarefy.capture(model.eval(), PHOTO)


def task(**options: Any) -> Classification:
    return Classification(**{**DIGITS, "augment": "crop=1", **options})


def photos() -> Classification:
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (64, 3, 64, 64), dtype=np.uint8), np.arange(64) % 10
    return Classification(train=(images, labels), val=(images, labels), augment="flip", mean=0.5, std=0.25)


def noise(shape: Sequence[int], count: int = 16) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------ cases

Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """``make``: a working folder -> a graph, or facts (a dictionary). ``runtimes``: that it is exported for."""

    make: Make
    runtimes: tuple[str, ...] = ("onnxruntime",)


def _pruned(kind: type[nn.Module] = Mixed, **options: Any) -> Case:
    target = {} if {"keep", "macs", "params"} & options.keys() else {"macs": 0.5}
    return Case(
        lambda work: rarefy.prune(
            net(kind), **target, task=task(), device="cpu", checkpoint=work / "training", **QUIET, **options
        )
    )


def _masked(**options: Any) -> Case:
    return Case(lambda _: rarefy.mask(net(), task=task(), **options))


def _quantized(kind: type[nn.Module] = Mixed, runtime: str = "onnxruntime", **options: Any) -> Case:
    return Case(
        lambda _: rarefy.quantize(net(kind), task(), images=32, runtime=runtime, **QUIET, **options), (runtime,)
    )


def _taught(loss: str, kind: type[nn.Module] = Mixed, **options: Any) -> Case:
    return Case(
        lambda work: rarefy.distill(untrained(kind), net(kind), task(), loss=loss, **{**SHORT, "steps": 4, **options})
    )


def _learned(**options: Any) -> Case:
    return Case(
        lambda work: train(untrained(), task(), **{**SHORT, "steps": 4, "checkpoint": work / "training", **options})
    )


def _in_codes(quantizing: Mapping[str, Any], **options: Any) -> Case:
    """Quantization-aware training."""

    def make(_: Path) -> Any:
        coded = rarefy.quantize(net(), task(), images=32, **QUIET, **quantizing)
        return rarefy.distill(coded, net(), task(), **{**SHORT, "steps": 4, "lr": 0.01, **options})

    return Case(make)


def _vision(name: str, do: str, runtime: str = "onnxruntime", **options: Any) -> Case:
    def make(_: Path) -> Any:
        if do == "prune":
            return rarefy.prune(vision(name), **QUIET, **options)
        return rarefy.quantize(
            vision(name), batches=list(noise((3, 64, 64)).split(8)), runtime=runtime, **QUIET, **options
        )

    return Case(make, (runtime,))


def _compressed(work: Path) -> Any:
    """The result of compress, started twice: the second time it finds everything done."""
    steps = [{"do": "prune", "macs": 0.5, "round_to": 8}, {"do": "distill", "steps": 40, "batch_size": 64, "lr": 0.05}]
    common: dict[str, Any] = {
        "budget": rarefy.Budget(max_drop=0.5, size=1_000_000),
        "steps": steps,
        "corruptions": ("fog",),
        "device": "cpu",
        **QUIET,
    }
    rarefy.compress(net(Plain), task(), workdir=work / "run", **common)
    return rarefy.compress(net(Plain), task(), workdir=work / "run", **common)


def _coded_result(work: Path) -> Any:
    budget = rarefy.Budget(max_drop=0.9)
    return rarefy.compress(
        net(Plain),
        task(),
        budget=budget,
        steps=[{"do": "quantize", "images": 32}],
        corruptions=(),
        workdir=work / "run",
        **QUIET,
    )


def _two_teachers(work: Path) -> Any:
    return rarefy.distill(
        untrained(),
        [(2.0, net()), (1.0, net(Plain))],
        task(augment="none"),
        loss="kl",
        cache=work / "cache",
        **{**SHORT, "steps": 30},
    )


def _resumed(work: Path) -> Any:
    """A training that a validation stops in the middle, and that goes on."""

    class Stop(Exception):
        pass

    def stop(_: Any) -> float:
        raise Stop

    common: dict[str, Any] = {
        **SHORT,
        "steps": 30,
        "validate_every": 1,
        "checkpoint": work / "training",
        "checkpoint_seconds": 0.0,
    }
    with contextlib.suppress(Stop):
        train(untrained(), task(), validate=stop, **common)
    return train(untrained(), task(), validate=lambda _: 0.5, **common)


def _evaluated(_: Path) -> dict[str, Any]:
    found = rarefy.evaluate(
        rarefy.prune(net(), macs=0.5),
        task(),
        reference=net(),
        corruptions=("fog", "jpeg"),
        limit=128,
        device="cpu",
        **QUIET,
    )
    return found.to_json()


def _measured(_: Path) -> dict[str, Any]:
    facts = rarefy.measure({"before": net(), "after": rarefy.quantize(net(), task(), images=32, **QUIET)}, repeats=3)
    return {
        name: {
            "keys": sorted(of),
            **{key: value for key, value in sorted(of.items()) if not isinstance(value, (dict, list))},
        }
        for name, of in facts.items()
    }


def _parity(runtime: str) -> Case:
    def make(work: Path) -> dict[str, Any]:
        small = rarefy.quantize(net(), task(), images=32, runtime=runtime, **QUIET)
        return dict(rarefy.export(small, work / f"model{_suffix(runtime)}", runtime=runtime, inputs=digits()[0][:32]))

    return Case(make)


def _public(_: Path) -> dict[str, Any]:
    """All that ``import rarefy`` offers, and that each comes first in a process without the others."""
    names = sorted(name for name in rarefy.__all__ if name not in ("train",))  # train became public later
    program = (
        "import os, sys, torch\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            exec(f'from {name.rpartition(chr(46))[0]} import {name.rpartition(chr(46))[2]}')\n"
        "        except BaseException as error:\n"
        "            print(name, repr(error), flush=True)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    print(name, os.waitpid(child, 0)[1], flush=True)\n"
    )
    listed = [
        *(f"rarefy.{name}" for name in names),
        "rarefy.tasks.Classification",
        "rarefy.demo.Net",
        "rarefy.demo.model",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *listed],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
        timeout=300,
    )
    return {"names": names, "said": done.stdout.splitlines(), "stderr": done.stderr[-500:]}


def cases() -> dict[str, Case]:
    every_loss = ("at", "dist", "dkd", "kl", "lskd", "mlkd", "mse", "reviewkd", "rkd", "skd", "wkd")
    found: dict[str, Case] = {
        "capture mixed": Case(lambda _: net()),
        "capture attentive": Case(lambda _: net(Attentive)),
        # prune
        "prune magnitude": _pruned(),
        "prune magnitude:p=1 local": _pruned(criterion="magnitude:p=1,reduce=max", ranking="local"),
        "prune isomorphic round_to": _pruned(ranking="isomorphic", round_to=8),
        "prune keep floor ignore": _pruned(keep=0.5, floor=0.3, ignore=("stem*",)),
        "prune params sample": _pruned(params=0.5, select="sample:temperature=0.5"),
        "prune taylor": _pruned(criterion="taylor:batches=2"),
        "prune taylor fisher loss": _pruned(criterion="taylor:batches=1,form=fisher", ranking="loss"),
        "prune hessian": _pruned(criterion="hessian:batches=3"),
        "prune hessian group loss": _pruned(criterion="hessian:group=true,batches=2", ranking="loss"),
        "prune bn_scale": _pruned(criterion="bn_scale", ignore=("squeeze",)),
        "prune fpgm": _pruned(criterion="fpgm"),
        "prune activation": _pruned(criterion="activation:batches=2,statistic=variance"),
        "prune random": _pruned(criterion="random"),
        "prune repair": _pruned(repair=True),
        "prune attention dims": _pruned(Attentive),
        "prune attention heads": _pruned(Attentive, heads="whole", criterion="taylor:batches=2"),
        "prune iterative": _pruned(schedule="iterative:rounds=2,epochs=1"),
        "prune group_sparse": _pruned(schedule="group_sparse:epochs=1"),
        "prune joint": _pruned(schedule="joint:steps=12,batch_size=64,images=32"),
        "prune joint int4 shrink": _pruned(
            Plain, schedule="joint:steps=20,batch_size=64,images=32,shrink=0.2,weights=int4"
        ),
        "prune resnet18": _vision("resnet18", "prune", macs=0.5),
        "prune mobilenet_v2": _vision("mobilenet_v2", "prune", macs=0.5, ranking="isomorphic", round_to=8),
        # mask
        "mask 2:4": _masked(sparsity="2:4"),
        "mask 0.5": _masked(sparsity=0.5, ignore=("head",)),
        "mask wanda": _masked(sparsity=0.5, criterion="wanda:images=32"),
        # train
        "train sgd": _learned(),
        "train adamw ema mixup": _learned(
            optimizer="adamw", ema=0.9, mixup=0.2, cutmix=0.5, clip=1.0, label_smoothing=0.1, accumulate=2
        ),
        "train bf16 best": _learned(precision="bf16", validate_every=1, keep="best", steps=40),
        "train resumed": Case(_resumed),
        "train sparse": Case(lambda _: train(rarefy.mask(net(), sparsity="2:4"), task(), **SHORT, steps=4)),
        # distil
        **{f"distill {loss}": _taught(loss) for loss in every_loss},
        "distill lskd + 50*mse": _taught("lskd + 50*mse:on=stages", freeze=0.5, loss_warmup=0.5),
        "distill dot": _taught("kl", dot=0.05),
        "distill no labels": _taught("kl", hard_weight=0.0),
        "distill two teachers cache": Case(_two_teachers),
        "distill attention": _taught("lskd + mse", Attentive, optimizer="adamw"),
        **{
            f"distill student {student}": Case(
                lambda _, student=student, kind=kind: rarefy.distill(
                    student, net(kind), task(), **{**SHORT, "steps": 2}
                )
            )
            for student, kind in (
                ("copy:fresh=true", Mixed),
                ("depth:keep=0.67,images=32", Attentive),
                ("pruned:keep=0.5", Mixed),
                ("width:keep=0.5", Mixed),
            )
        },
        "distill int8": _in_codes({}),
        "distill int4 live norm": _in_codes({"weights": "int4"}, live_norm="yes", freeze=0.25),
        # quantise
        "quantize": _quantized(),
        "quantize attention": _quantized(Attentive),
        "quantize smooth": _quantized(Attentive, smooth=0.5),
        "quantize plain options": _quantized(
            equalize=False, correct_bias=False, weight_calibration="percentile:percent=99.9", ignore=("head",)
        ),
        **{
            f"quantize {rule}": _quantized(calibration=rule)
            for rule in ("minmax", "entropy", "moving_average", "percentile")
        },
        **{
            f"quantize int4 {rule}": _quantized(weights="int4", rounding=rule)
            for rule in ("nearest", "gptq", "gptaq", "adaround:steps=10", "brecq:steps=6", "descent", "stochastic")
        },
        "quantize by layer": _quantized(weights="int4;stem*=int8;head=float", activations="uint8"),
        "quantize uint4": _quantized(activations="uint4"),
        "quantize mixed:bits": _quantized(weights="mixed:bits=4,choices=2/4/8/float"),
        "quantize mixed:bitops": _quantized(weights="mixed:bitops=0.5,choices=4/8"),
        "quantize mixed:size": _quantized(weights="mixed:size=20000,choices=2/4/8"),
        "quantize weights alone": _quantized(weights="int4:group=32", activations="float"),
        # ONNX has none
        "quantize weights alone mxfp4": Case(
            lambda _: rarefy.quantize(net(Attentive), weights="mxfp4", activations="float"), ()
        ),
        "quantize pruned": Case(lambda _: rarefy.quantize(rarefy.prune(net(), macs=0.5), task(), images=32, **QUIET)),
        "quantize for openvino": _quantized(runtime="openvino"),
        "quantize attention for openvino": _quantized(Attentive, runtime="openvino"),
        "quantize for inductor": _quantized(runtime="inductor"),
        "quantize resnet18": _vision("resnet18", "quantize"),
        "quantize mobilenet_v2": _vision("mobilenet_v2", "quantize"),
        "quantize mobilenet_v2 for openvino": _vision("mobilenet_v2", "quantize", "openvino"),
        # all of it
        "compress": Case(_compressed),
        "compress quantize": Case(_coded_result),
        # facts
        "evaluate": Case(_evaluated),
        "measure": Case(_measured),
        "parity onnxruntime": _parity("onnxruntime"),
        "parity openvino": _parity("openvino"),
        "public names": Case(_public),
    }
    return found


# ------------------------------------------------------------------ what is kept of a case


def _suffix(runtime: str) -> str:
    return ".zip" if runtime == "inductor" else ".onnx"


def _place(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", name)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _clockless(value: Any) -> Any:
    """JSON without what a clock said: under such a key only that it is there."""
    if isinstance(value, Mapping):
        return {key: None if CLOCKS.search(str(key)) else _clockless(item) for key, item in value.items()}
    return [_clockless(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shape(value: Any) -> Any:
    """JSON with kinds in place of values."""
    if isinstance(value, Mapping):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and value:
        return [_shape(value[0])]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def _graph_sha(folder: Path) -> str:
    return _sha(json.dumps(_clockless(json.loads((folder / "graph.json").read_text()))).encode())


def _state_sha(graph: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(graph.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    return digest.hexdigest()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _input_shape(graph: Any) -> tuple[int, ...]:
    return tuple(graph.meta["inputs"][0]["shape"])[-3:]


def _answers(graph: Any, inputs: Tensor) -> np.ndarray:
    with torch.no_grad():
        return graph.eval()(inputs).numpy()


def _steps_on(graph: Any) -> str:
    """The weights after two more steps, or why there are none."""
    data = photos() if _input_shape(graph)[0] == 3 else task()
    try:
        return _state_sha(train(graph, data, **{**SHORT, "batch_size": 16}, steps=2, lr=0.01))
    except Exception as error:
        return _told(error)


def _exported(graph: Any, runtime: str, folder: Path) -> Path:
    path = folder / f"{runtime}{_suffix(runtime)}"
    rarefy.export(graph, path, runtime=runtime, compare=False)
    return path


def _file_sha(path: Path) -> str:
    """Of an archive, its members without the manifest."""
    if path.suffix != ".zip":
        return _sha(path.read_bytes())
    import zipfile

    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder)
        names = sorted(name for name in archive.namelist() if name not in ("graph.json", "manifest.json"))
        return _sha(
            json.dumps([_graph_sha(Path(folder)), *((name, _sha(archive.read(name))) for name in names)]).encode()
        )


def kept(case: Case, target: Path) -> dict[str, Any]:
    """Make it, save it to ``target``, and say what it is."""
    with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        work = Path(place)
        made = case.make(work)
        if isinstance(made, dict):
            return {"facts": _clockless(json.loads(json.dumps(made, default=str)))}
        facts: dict[str, Any] = {}
        if hasattr(made, "report"):  # of compress
            made.save(target / "result")
            files = {path.name: path for path in (target / "result").iterdir()}
            facts = {
                "facts": {
                    "graph": _graph_sha(target / "result"),
                    "weights": _sha(files["weights.safetensors"].read_bytes()),
                    "model": _sha(files["model.onnx"].read_bytes()),
                    "files": sorted(files),
                    "report": _shape(made.report),
                    "kept": [(step.get("do") or step.get("name"), step.get("kept")) for step in made.report["steps"]],
                }
            }
            made = made.graph
        inputs = noise(_input_shape(made)) if _input_shape(made)[0] == 3 else digits()[0][:16]
        answers = _answers(made, inputs)
        exported = {runtime: _exported(made, runtime, work) for runtime in case.runtimes}
        np.save(work / "inputs.npy", inputs.numpy())
        np.save(work / "outputs.npy", answers)
        files = {path.name: path for path in (work / "inputs.npy", work / "outputs.npy", *exported.values())}
        rarefy.save(made, target / "model", files=files)
        return {
            "graph": _graph_sha(target / "model"),
            "weights": _sha((target / "model" / "weights.safetensors").read_bytes()),
            "file": {runtime: _file_sha(path) for runtime, path in exported.items()},
            "answers": _sha(answers.tobytes()),
            "trained": _steps_on(rarefy.load(target / "model")),
            **facts,
        }


def loaded(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What this tree makes of a stored folder, as far as it is not what the tree that wrote it made of it."""
    graph = rarefy.load(folder / "model")
    inputs, outputs = (np.load(folder / "model" / f"{which}.npy") for which in ("inputs", "outputs"))
    found: dict[str, Any] = {
        "answers": "same" if np.array_equal(_answers(graph, torch.from_numpy(inputs)), outputs) else "differs"
    }
    with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        shas = {runtime: _file_sha(_exported(graph, runtime, Path(place))) for runtime in entry["file"]}
        found["file"] = "same" if shas == entry["file"] else "differs"
        rarefy.save(graph, Path(place) / "again")
        found["graph"] = "same" if _graph_sha(Path(place) / "again") == entry["graph"] else "differs"
        found["weights"] = (
            "same"
            if _sha((Path(place) / "again" / "weights.safetensors").read_bytes()) == entry["weights"]
            else "differs"
        )
        report = folder / "result" / "report.json"
        if report.exists():
            rarefy.report(json.loads(report.read_text()), Path(place) / "report.html")
            same = (Path(place) / "report.html").read_bytes() == (folder / "result" / "report.html").read_bytes()
            found["facts"] = "same" if same else "differs"
    found["trained"] = "same" if _steps_on(graph) == entry["trained"] else "differs"
    return found


# ------------------------------------------------------------------ command lines

NETS = """
import torch
from torch import nn

def digits():
    def block(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
    torch.manual_seed(0)
    body = (block(1, 16), block(16, 16), nn.MaxPool2d(2), block(16, 32))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

def none():
    return "a model"
"""
RECIPE = """
model = "original"
output = "ran"
[data]
train = "sklearn:digits"
val = "sklearn:digits"
[budget]
max_drop = "90%"
[[step]]
do = "mask"
sparsity = "2:4"
"""
VERBS = (
    *("compress", "run", "prune", "mask", "distill", "quantize", "evaluate", "measure", "export"),
    *("report", "sign", "verify", "keygen", "list", "doctor", "demo"),
)
ON, OUT, NET = "--data sklearn:digits", "-o out", "nets:digits --input 1,8,8"
# "~": kinds in place of values; "!": a byte of that file is changed. Each starts from what those before left.
LINES = (
    "--version",
    "--help",
    *(f"{verb} --help" for verb in VERBS),
    "list",
    "list rounding",
    "list --json",
    "~doctor --json",
    f"prune {NET} --explain --json",
    f"prune {NET} --macs 0.5 -o pruned --json",
    f"prune {NET} --keep 0.5 --criterion taylor:batches=2 {ON} -o taylor",
    f"mask {NET} --sparsity 2:4 -o masked",
    f"distill nets:digits {ON} --augment crop=1 --steps 20 --batch-size 64 --device cpu -o original",
    f"distill pruned --teacher original {ON} --steps 3 --batch-size 64 --loss kl --device cpu -o taught --json",
    f"quantize original {ON} --images 32 -o int8 --json",
    f"quantize original {ON} --images 32 --explain",
    f"evaluate int8 --reference original {ON} --device cpu",
    f"evaluate int8 --reference original --runtime onnxruntime --limit 64 {ON} --json",
    f"evaluate pruned --reference original --max-drop 0.1% {ON}",
    "export int8 -o int8.onnx",
    f"~export int8 --certify c.json {ON} --limit 64 -o c.onnx --json",
    "~measure int8 --reference original --repeats 3 --json",
    f"~compress original {ON} --step 'prune macs=0.5' --step 'distill steps=20 batch_size=64' --max-drop 90% --device "
    "cpu -o small --json",
    "~run recipe.toml --json",
    "~report small -o small.html --json",
    "keygen my.key",
    "sign small --key my.key",
    "verify small --key my.key.pub",
    "!small/weights.safetensors",
    "verify small --key my.key.pub",
    "measure small",
    "~prune rarefy.demo:model --input 1,8,8 --keep 0.5 -o demo --json",
    # bad input
    "frobnicate",
    f"prune {NET} --frob 3 {OUT}",
    "measure",
    f"prune {NET} --keep 0.5",
    f"distill nets:digits {ON} --epochs many {OUT}",
    "list colours",
    f"prune nothing --keep 0.5 {OUT}",
    f"prune timm:resnet1888 --keep 0.5 {OUT}",
    f"prune nolab.nets:Net --keep 0.5 {OUT}",
    f"prune nets:none --keep 0.5 {OUT}",
    f"prune nets:digits --input 3,8,8 --keep 0.5 {OUT}",
    f"prune nets:digits --keep 0.5 {OUT}",
    f"prune {NET} {OUT}",
    f"prune {NET} --keep 0.5 --macs 0.5 {OUT}",
    f"prune {NET} --keep 1.5 {OUT}",
    f"prune {NET} --keep 0.5 --criterion magnitud {OUT}",
    f"prune {NET} --keep 0.5 --criterion taylor:size=3 {OUT}",
    f"prune {NET} --keep 0.5 --criterion taylor {OUT}",
    f"prune {NET} --keep 0.5 --ranking best {OUT}",
    f"prune {NET} --keep 0.5 --weights none.pt {OUT}",
    "evaluate nets:digits",
    "evaluate nets:digits --data tfrecord:x",
    f"evaluate nets:digits {ON} --corruptions rain",
    f"evaluate nets:digits {ON} --std 0",
    f"distill nets:digits {ON} --teacher nets:digits --loss kll {OUT}",
    f"distill nets:digits {ON} --optimizer adam {OUT}",
    f"distill nets:digits {ON} --batch-size 5000 --epochs 1 {OUT}",
    f"quantize nets:digits {ON} --rounding neerest {OUT}",
    f"quantize nets:digits {ON} --weight-grid int99 {OUT}",
    f"quantize int8 {ON} {OUT}",
    f"compress nets:digits {ON} --max-drop little {OUT}",
    f"compress nets:digits {ON} --step 'prune mac=0.5' {OUT}",
    "run none.toml",
    f"prune {NET} --keep 0.5 -o notes",
    "export original -o model.exe",
    "verify original --key nets.py",
)


def _environment() -> dict[str, str]:
    """This process's, with the tree that it imports in front."""
    tree = str(Path(rarefy.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [tree, os.environ.get("PYTHONPATH")]))}


def _said(text: str, line: str, place: Path) -> Any:
    """What the command of that line printed, comparable: no clocks, no paths, no trailing blanks."""
    text = text.replace(str(place.resolve()), "HERE").replace(str(place), "HERE")
    try:
        found = json.loads(text)
    except ValueError:
        lines = [one.rstrip() for one in text.splitlines()]
        if "--help" in line or line.startswith("list"):  # nothing was done
            return lines
        return [clock[0] if (clock := CLOCK_LINES.search(one)) and re.search(r"\d", one) else one for one in lines]
    whole = line.startswith("list")
    return json.dumps(
        _shape(found) if line.startswith("~") else found if whole else _clockless(found), indent=1
    ).splitlines()


def commands(folder: Path, only: Sequence[str], tell: Callable[[str, str, float], None]) -> dict[str, Any]:
    place = folder / "commands"
    shutil.rmtree(place, ignore_errors=True)
    (place / "notes").mkdir(parents=True)
    (place / "notes" / "mine.txt").write_text("years of work")
    (place / "nets.py").write_text(NETS)
    (place / "recipe.toml").write_text(RECIPE)
    found: dict[str, Any] = {}
    for number, line in enumerate(LINES):
        if line.startswith("!"):
            file = place / line[1:]
            if file.exists():
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)
            continue
        name = f"command {number:02d} {line.lstrip('~')}"
        if not _wanted(name, only):
            continue
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "rarefy", *shlex.split(line.lstrip("~"))],
                capture_output=True,
                text=True,
                check=False,
                cwd=place,
                env=_environment(),
                timeout=300,
            )
            found[name] = {
                "exit": done.returncode,
                "stdout": _said(done.stdout, line, place),
                "stderr": _said(done.stderr, "", place),
            }
            said = f"exit {done.returncode}"
        except Exception as error:
            found[name] = {"failed": _told(error)}
            said = f"failed: {_told(error)}"
        tell(name, said, time.perf_counter() - begun)
    for path in sorted(place.glob("*/graph.json")):
        home = path.parent
        shas = {
            file.name: _sha(file.read_bytes())
            for file in sorted(home.iterdir())
            if file.suffix in (".safetensors", ".onnx")
        }
        found[f"folder {home.name}"] = {
            "graph": _graph_sha(home),
            "files": sorted(file.name for file in home.iterdir()),
            **shas,
        }
    for path in sorted(place.glob("*.onnx")):
        found[f"file {path.name}"] = {"sha256": _sha(path.read_bytes())}
    return found


# ------------------------------------------------------------------ the three parts


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch.fnmatch(name, glob) for glob in only)


def _tell(name: str, said: str, seconds: float) -> None:
    print(f"{seconds:6.1f} s  {name}: {said}", file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {
        name: metadata.version(name)
        for name in ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "scikit-learn")
    }


def save(folder: Path, only: Sequence[str]) -> int:
    """Everything, into ``folder``; how many cases failed."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, entries, failed = time.perf_counter(), dict[str, Any](), 0
    for name, case in cases().items():
        if not _wanted(name, only):
            continue
        began = time.perf_counter()
        target = folder / "cases" / _place(name)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        torch.manual_seed(0)
        try:
            entries[name] = kept(case, target)
            said = (
                "made"
                if ":" not in str(entries[name].get("trained", ""))
                else f"made; trained: {entries[name]['trained']}"
            )
        except Exception as error:
            entries[name] = {"failed": _told(error)}
            failed += 1
            said = f"failed: {_told(error)}"
        _tell(name, said, time.perf_counter() - began)
        (folder / RESULTS).write_text(json.dumps({"versions": _versions(), "cases": entries}, indent=1))
    said_by = commands(folder, only, _tell)
    failed += sum("failed" in one for one in said_by.values())
    (folder / COMMANDS).write_text(json.dumps(said_by, indent=1))
    digest = _sha(json.dumps([entries, said_by], sort_keys=True).encode())
    seconds = f"{time.perf_counter() - begun:.0f}"
    _table(
        ("what", "count"),
        [
            ("cases", len(entries)),
            ("command lines, folders, files", len(said_by)),
            ("failed", failed),
            ("seconds", seconds),
        ],
    )
    counts = {"cases": len(entries), "commands": len(said_by), "failed": failed}
    print(json.dumps({"bench": "same_results", "did": "save", **counts, "digest": digest, "versions": _versions()}))
    return failed


def _same(one: Mapping[str, Any], other: Mapping[str, Any], part: str) -> str:
    if part not in one and part not in other:
        return ""
    return "same" if one.get(part) == other.get(part) else "differs"


def _difference(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _difference(one.get(key), other.get(key), f"{where}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _difference(*pair, f"{where}[{index}]")
    elif one != other:
        yield f"{where.lstrip('.')}: {str(one)[:120]} != {str(other)[:120]}"


def _why(name: str, part: str, one: Mapping[str, Any], other: Mapping[str, Any], folders: Sequence[Path]) -> list[str]:
    """The first few lines of what is different."""
    if part in ("stdout", "stderr"):
        return [
            line
            for line in difflib.unified_diff(one[part], other[part], lineterm="", n=0)
            if not line.startswith(("---", "+++", "@@"))
        ][:6]
    if part == "graph" and not name.startswith("folder "):
        files = [folder / "cases" / _place(name) / "model" / "graph.json" for folder in folders]
        if all(file.exists() for file in files):
            return list(_difference(*(_clockless(json.loads(file.read_text())) for file in files)))[:3]
    return list(_difference(one.get(part), other.get(part), part))[:3]


def compare(before: Path, after: Path, only: Sequence[str]) -> tuple[int, int]:
    """The table; how many rows there are, and how many have something that is not the same."""
    stored = [[json.loads((folder / file).read_text()) for file in (RESULTS, COMMANDS)] for folder in (before, after)]
    if stored[0][0]["versions"] != stored[1][0]["versions"]:
        print(f"other packages: {stored[0][0]['versions']} and {stored[1][0]['versions']}", file=sys.stderr)
    rows, wrong, notes = 0, 0, []
    for which, columns, label in ((0, PARTS, "case"), (1, None, "command line")):
        olds, news = (one[which]["cases"] if which == 0 else one[which] for one in stored)
        lines = []
        for name in filter(lambda name: _wanted(name, only), {**olds, **news}):
            one, other = olds.get(name), news.get(name)
            parts = columns or SAID
            if which and not name.startswith("command "):
                parts = ("made",)
                one, other = ({"made": value} if value is not None else None for value in (one, other))
            if one is None or other is None:
                cells = ["missing"] * len(parts)
            elif "failed" in one or "failed" in other:
                cells = ["failed"] * len(parts)
                notes += [
                    f"{name}: {side}: {value['failed']}"
                    for side, value in (("before", one), ("after", other))
                    if "failed" in value
                ]
            else:
                cells = [_same(one, other, part) for part in parts]
                for part, cell in zip(parts, cells, strict=True):
                    if cell == "differs":
                        notes += [f"{name}: {part}: {line}" for line in _why(name, part, one, other, (before, after))]
            rows += 1
            wrong += any(cell not in ("same", "") for cell in cells)
            lines.append((name, *cells, *[""] * (len(columns or SAID) - len(cells))))
        _table((label, *(columns or SAID)), lines)
    for note in notes:
        print(note)
    return rows, wrong


def load(folder: Path, only: Sequence[str]) -> tuple[int, int]:
    entries = json.loads((folder / RESULTS).read_text())["cases"]
    lines, wrong = [], 0
    for name, entry in entries.items():
        place = folder / "cases" / _place(name)
        if not _wanted(name, only) or not (place / "model").exists():
            continue
        began = time.perf_counter()
        try:
            found = loaded(entry, place)
        except Exception as error:
            found = dict.fromkeys(PARTS, "failed")
            _tell(name, _told(error), time.perf_counter() - began)
        cells = [found.get(part, "") for part in PARTS]
        bad = any(cell not in ("same", "") for cell in cells)
        wrong += bad
        _tell(name, "not the same" if bad else "same", time.perf_counter() - began)
        lines.append((name, *cells))
    _table(("loaded", *PARTS[:-1], "report"), lines)
    return len(lines), wrong


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    shown = [tuple(map(str, row)) for row in (columns, *rows)]
    shown = [(row[0][:90], *row[1:]) for row in shown]
    widths = [max(len(row[index]) for row in shown) for index in range(len(columns))]
    for number, row in enumerate(shown):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=("save", "compare", "load"))
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="one; two for compare: before and after"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="such cases and command lines; may be repeated"
    )
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if len(given.folders) != (2 if given.do == "compare" else 1):
        parser.error("compare takes two folders, save and load take one")
    torch.set_num_threads(1)
    print(f"rarefy of {Path(rarefy.__file__).resolve().parents[1]}", file=sys.stderr, flush=True)
    if given.do == "save":
        wrong = save(given.folders[0].resolve(), given.only)
    else:
        rows, wrong = (
            compare(*given.folders, given.only)
            if given.do == "compare"
            else load(given.folders[0].resolve(), given.only)
        )
        wrong = max(wrong, int(not rows))  # nothing that is compared proves nothing
        print(
            json.dumps(
                {"bench": "same_results", "did": given.do, "rows": rows, "not_the_same": wrong, "versions": _versions()}
            )
        )
    if wrong:
        print(f"falls short: {wrong} {'failed' if given.do == 'save' else 'not the same'}", file=sys.stderr)
    return 1 if given.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
