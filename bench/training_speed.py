"""What the training loop costs beside the passes it makes: images a second against a bare PyTorch loop, and with the
teacher's answers cached.

    python bench/training_speed.py [--check]                    ResNet-56 teaches ResNet-20, CIFAR-10, on a CPU
    python bench/training_speed.py --device cuda [--check]      on a GPU: the loop compiled as it is by itself, the bare
    loop with the same compiler

The bare loop has the same networks, pictures, augmentation, loss, precision, memory layout and optimizer, and nothing
else: no checks, records, schedule, seeds or progress; its teacher is folded as ours is, so that only the loop differs.
The three take turns in one run, ``--repeats`` times, each timed over ``--steps`` steps after one that warms up; what
counts is the median of the ratios within a turn. The cache is filled before it is timed, and augmentation is off for
it, as it must be to help from the second epoch on; it is compared with the same run without it. On a GPU, whose runs
are short, checks and a lost turn weigh most: --steps 300 or more.

``--check`` exits 1 where the loop is below 95 % of the bare one, or the cache below 1.3 times; 2 where there is no
data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import real_data
from rarefy import capture
from rarefy.cli.terminal import show_table
from rarefy.distillation.distill import distill
from rarefy.distillation.losses.kl import Kl
from rarefy.distillation.teachers import frozen
from rarefy.errors import DataError
from rarefy.graph.features import tapped
from rarefy.tasks.classification import Classification

EXAMPLE = torch.zeros(2, 3, 32, 32)
LEAST_SHARE, LEAST_CACHED = 0.95, 1.3
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


class Bare(nn.Module):
    """Both passes and the loss, as one piece for the compiler, as in the loop."""

    def __init__(self, student: fx.GraphModule, teacher: fx.GraphModule, bf16: bool):
        super().__init__()
        self.student, self.teacher, self.bf16, self.loss = student, teacher, bf16, Kl()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.student(inputs)
            with torch.no_grad():
                taught, _ = self.teacher(inputs)
        outputs, taught = outputs.float(), taught.float()
        return F.cross_entropy(outputs, targets) + self.loss(outputs, taught, targets, {})


def bare(student: fx.GraphModule, teacher: fx.GraphModule, task: Classification, given: argparse.Namespace) -> float:
    """Images a second of the loop that a user would write."""
    device, bf16 = torch.device(given.device), given.device == "cuda"
    place = {"device": device, "memory_format": torch.channels_last}
    model = Bare(capture(student, EXAMPLE).to(**place), frozen(tapped(teacher, []), bf16).to(**place), bf16)
    model.student.train()
    step: Any = torch.compile(model, mode="reduce-overhead", dynamic=False) if given.compile else model
    learned = list(model.student.parameters())
    groups = [
        {"params": [one for one in learned if one.dim() > 1]},
        {"params": [one for one in learned if one.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True, fused=True)
    done, epoch, begun = 0, 0, 0.0
    while done <= given.steps:
        for inputs, targets in task.batches(
            "train", given.batch_size, shuffle_seed=0, augment=True, epoch=epoch, device=device
        ):
            if done == given.warm:
                _wait(device)
                begun = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            if given.compile:
                torch.compiler.cudagraph_mark_step_begin()
            step(inputs.contiguous(memory_format=torch.channels_last), targets).backward()
            optimizer.step()
            done += 1
            if done == given.warm + given.steps:
                _wait(device)
                return given.steps * given.batch_size / (time.perf_counter() - begun)
        epoch += 1
    raise AssertionError("unreachable")


def ours(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    task: Classification,
    given: argparse.Namespace,
    cache: Path | None = None,
) -> tuple[float, float]:
    """(images a second, the loader's share) of the loop, from the task's own clock: the time between the batch after
    the warm-up and the end."""
    timed = Timed(task, given.warm, torch.device(given.device))
    result = distill(
        student,
        teacher,
        timed,
        loss="kl",
        steps=given.warm + given.steps,
        batch_size=given.batch_size,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        device=given.device,
        compile="reduce-overhead" if given.compile else "no",
        validate_every=0,
        cache=cache,
        progress=False,
    )
    _wait(torch.device(given.device))
    seconds = time.perf_counter() - timed.begun
    return given.steps * given.batch_size / seconds, result.meta["history"][-1]["facts"]["timing"]["data_share"]


class Timed:
    """The task, and when it was asked for the batch after the warm-up."""

    def __init__(self, task: Classification, warm: int, device: torch.device):
        self.task, self.warm, self.device, self.begun = task, warm, device, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batches(self, split: Any, batch_size: int, **options: Any) -> Any:
        counted = split == "train" and options.get("augment", False)
        for step, batch in enumerate(self.task.batches(split, batch_size, **options)):
            if counted and step == self.warm and not self.begun:
                _wait(self.device)
                self.begun = time.perf_counter()
            yield batch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--batch-size", type=int, help="default: 64 on a CPU, 512 on a GPU")
    option("--steps", type=int, help="timed, in each turn; default: 20 on a CPU, 400 on a GPU")
    option("--warm", type=int, help="before that; default: 1 on a CPU, 20 on a GPU")
    option("--repeats", type=int, default=5)
    option("--student", type=int, choices=real_data.DEPTHS, default=20, help="its depth")
    option("--teacher", type=int, choices=real_data.DEPTHS, default=56, help="its depth")
    option(
        "--no-compile",
        dest="compile",
        action="store_const",
        const=False,
        help="neither loop is compiled (on a CPU none is)",
    )
    option("--check", action="store_true")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    given.batch_size = given.batch_size or (512 if cuda else 64)
    given.steps, given.warm = given.steps or (400 if cuda else 20), given.warm or (20 if cuda else 1)
    given.compile = cuda if given.compile is None else given.compile
    return given


def main() -> int:
    given = arguments()
    try:
        images, labels = real_data.cifar10("train")
        student, teacher = (capture(real_data.resnet_cifar(depth), EXAMPLE) for depth in (given.student, given.teacher))
    except DataError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 2 if given.check else 0
    count = len(images) if given.device == "cuda" else (given.warm + given.steps) * given.batch_size
    task = Classification(train=(images[:count], labels[:count]), augment="crop=4,flip")
    still = Classification(train=(images[:count], labels[:count]), augment="none")
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="rarefy-bench-") as folder:
        distill(
            student,
            teacher,
            still,
            loss="kl",
            steps=1,
            batch_size=given.batch_size,
            device=given.device,
            compile="no",
            validate_every=0,
            cache=folder,
            progress=False,
        )
        for turn in range(given.repeats):
            order = ("bare", "loop", "still", "cached")
            found: dict[str, float] = {}
            for name in order if turn % 2 == 0 else reversed(order):  # so that neither is always the first
                if name == "bare":
                    found[name] = bare(student, teacher, task, given)
                else:
                    found[name], share = ours(
                        student,
                        teacher,
                        task if name == "loop" else still,
                        given,
                        Path(folder) if name == "cached" else None,
                    )
                    found[f"{name} data"] = share
                torch.compiler.reset()
                print(f"{turn + 1}/{given.repeats} {name}: {found[name]:,.0f} images/s", file=sys.stderr, flush=True)
            turns.append(found)
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    ratios = {
        "loop": statistics.median(turn["loop"] / turn["bare"] for turn in turns),
        "cached": statistics.median(turn["cached"] / turn["still"] for turn in turns),
    }
    rows = [
        ("bare PyTorch", f"{medians['bare']:,.0f}", "", ""),
        ("the loop", f"{medians['loop']:,.0f}", f"{ratios['loop']:.1%} of the bare one", f"{medians['loop data']:.1%}"),
        ("the loop, augmentation off", f"{medians['still']:,.0f}", "", f"{medians['still data']:.1%}"),
        (
            "  and the teacher's answers cached",
            f"{medians['cached']:,.0f}",
            f"{ratios['cached']:.2f}x",
            f"{medians['cached data']:.1%}",
        ),
    ]
    show_table(
        f"ResNet-{given.teacher} teaches ResNet-{given.student}, batch {given.batch_size}, {given.device}, "
        f"{given.repeats} turns of {given.steps} steps",
        ["", "images/s", "", "loading"], rows,
    )  # fmt: skip
    told = {name: value for name, value in vars(given).items() if name != "check"}
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(
        json.dumps(
            {
                "bench": "training_speed",
                "torch": torch.__version__,
                "device": device,
                "options": told,
                "ratios": ratios,
                "images_per_second": medians,
                "turns": turns,
            }
        )
    )
    short = []
    if ratios["loop"] < LEAST_SHARE:
        short.append(f"the loop is at {ratios['loop']:.1%} of the bare one, below {LEAST_SHARE:.0%}")
    if ratios["cached"] < LEAST_CACHED:
        short.append(f"the cache gives {ratios['cached']:.2f}x, below {LEAST_CACHED}x")
    for one in short:
        print(f"falls short: {one}", file=sys.stderr)
    return 1 if given.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
