"""The batches of a training: mixed, as the networks want them, from any step of any epoch; and what the val split says.

What a batch holds depends on the seed, the epoch and the step alone, so a resumed run sees what an undisturbed one
would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from rarefy.data.augmentation import mix
from rarefy.distillation.checkpoint import Point
from rarefy.distillation.distributed import shared_out
from rarefy.distillation.options import Training
from rarefy.errors import InputError
from rarefy.graph.nodes import is_graph
from rarefy.graph.shapes import activation_bytes
from rarefy.system.memory import available, samples_at_once
from rarefy.tasks.metric import shown, worth
from rarefy.tasks.task import Task, fitted


class Batches:
    """Batches of the train split.

    per_epoch: how many an epoch has; what fills no batch is left out. channels_last: pictures lie so in memory.
    """

    def __init__(self, task: Task, training: Training, device: torch.device, channels_last: bool):
        self.task, self.training, self.device, self.channels_last = task, training, device, channels_last
        images = task.data.length("train")
        self.per_epoch = images // training.batch_size
        if not self.per_epoch:
            raise InputError(
                f"batch_size={training.batch_size} is above the {images} training images; pass a smaller one"
            )

    def of_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(inputs (N, channels, H, W), targets) from that step on. Raises InputError where the data ends early."""
        training = self.training
        batches = self.task.data.batches(
            "train",
            training.batch_size,
            shuffle_seed=training.seed,
            augment=True,
            epoch=epoch,
            start=start,
            device=self.device,
            labelled=training.hard_weight > 0,
        )
        step = start
        for inputs, targets in batches:
            if targets is not None and (training.mixup or training.cutmix):
                targets = self.task.soft(targets)
            yield mix(
                inputs,
                targets,
                mixup=training.mixup,
                cutmix=training.cutmix,
                seed=training.seed,
                step=epoch * self.per_epoch + step,
            )
            step += 1
        raise InputError(
            f"the data ended at step {step} of epoch {epoch}, {self.per_epoch} were announced; task.length is wrong"
        )

    @property
    def layout(self) -> torch.memory_format:
        """Of pictures and networks in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def laid_out(self, inputs: Tensor) -> Tensor:
        """Pictures in the networks' layout."""
        if self.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs


class Validation:
    """How good a model is on the val split, by the caller's number, which should rise, or by the task's metric."""

    def __init__(
        self,
        task: Task,
        validate: Callable[[fx.GraphModule], float] | None,
        batches: Batches,
        bf16: bool,
        accelerator: Accelerator,
    ):
        self.task, self.validate, self.batches = task, validate, batches
        self.bf16, self.accelerator = bf16, accelerator

    def value(self, model: fx.GraphModule) -> float | None:
        """The number; None where there is nothing to look at. The model is in eval mode afterwards."""
        data, device = self.task.data, self.batches.device
        model.eval()
        if self.validate is not None:
            value = float(self.validate(model))
            model.eval()
            return value
        if data.val is None:
            return None
        metric = fitted(self.task, model).metric()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            for inputs, targets in data.batches("val", self.batches.training.batch_size, device=device):
                metric.add(shared_out(model, self.batches.laid_out(inputs), self.accelerator), targets)
        return metric.value()

    def better(self, value: float, other: float) -> bool:
        """Is this number the better one?"""
        way = "higher" if self.validate is not None else self.task.metric().better
        return worth(value, way) > worth(other, way)

    def shown(self, curve: Sequence[Point]) -> str:
        """The last number, as the progress bar tells it."""
        value = curve[-1]["val"] if curve else None
        if value is None:
            return ""
        return f", val {shown(value, '%' if self.validate is not None else self.task.metric().unit)}"


def outgrows(model: nn.Module, images: int, accelerator: Accelerator) -> bool:
    """Would a CPU's memory not hold what so many images leave for a backward pass? It swaps before it fails."""
    free = available()
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1 or free is None or not is_graph(model):
        return False
    return images > 1 and images > samples_at_once(activation_bytes(model)[1], free // 2)
