"""evaluate(): how good a model is on a task, how sure that is, and how much worse than its reference.

One pass over the data: a batch is decoded once and every model runs on it, so all numbers are of the same images, and
differences are paired. What is counted is the task's metric (``rarefy/tasks/metric.py``; of a classifier top-1,
``rarefy/tasks/metrics/accuracy.py``): nothing here knows how outputs are read.

**Robustness**: the metric under corruptions (``corruptions.py``) at severities 1, 3, 5. They change the image as it is;
normalisation is the last thing before the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.artifact.operators.trial import samples_within
from rarefy.data.items import Split
from rarefy.errors import DataError, InputError, first_line
from rarefy.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, fits
from rarefy.evaluation.evaluation import Evaluation, evaluation_of
from rarefy.graph.nodes import device_of, is_graph
from rarefy.graph.shapes import activation_bytes
from rarefy.graph.signature import Makers, plain
from rarefy.system.memory import samples_at_once
from rarefy.system.progress import track
from rarefy.tasks.metric import Metric, OutputError, Outputs, Targets
from rarefy.tasks.task import Data, Task, fitted, settled

Model = nn.Module | Callable[[Tensor], Outputs]


def evaluate(
    model: Model,
    task: Task,
    *,
    reference: Model | None = None,
    split: Split = "val",
    batch_size: int = 64,
    limit: int | None = None,
    corruptions: Sequence[str] | Literal["all"] = (),
    severities: Sequence[int] = (1, 3, 5),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Judge ``model`` on ``task``, and against ``reference`` where one is given.

    model, reference: modules, or callables from (N, C, H, W) float32 to outputs, such as a runtime's session. Modules
    are run in eval mode and left as they were; where ``device`` is not the module's, a copy is moved.
    split: "train" or "val". batch_size: images a run of the model. limit: so many images only.
    corruptions: names, or "all" that the images' channels allow; they depend on the seed and the batch size.
    severities: of 1 to 5.
    device: None is the model's own; callables get their inputs there, or on the CPU where none is given.
    Raises DataError where model and data do not fit, InputError for unknown corruptions.
    """
    began = time.perf_counter()
    task = settled(settled(task, model), reference)
    kinds = _corruptions(corruptions, severities, task)
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(_runner(one, task, device)) for one in (model, reference) if one is not None]
        if not isinstance(model, nn.Module):  # a runtime's session, of a graph that ends like its reference
            runners[0] = _Runner(model, runners[-1].task, runners[0].device)
        home = torch.device(device) if device is not None else runners[0].device
        read = task.data.images if kinds else task.data.batches
        batches = read(split, batch_size, limit=limit, device=home)
        total = task.data.steps(split, batch_size, limit=limit)
        with torch.no_grad():
            for step, (images, targets) in enumerate(track(batches, total, f"evaluate {split}", progress)):
                variants = _variants(task.data, images, kinds, seed, step) if kinds else [(None, images)]
                for kind, inputs in variants:
                    for runner in runners:
                        runner.add(kind, inputs, targets)
    if not runners[0].metric.samples:
        raise DataError(
            f"{task!r}: no image of {split} could be read, so there is nothing to evaluate; repair the data"
        )
    whole, seconds = limit is None, time.perf_counter() - began
    judged = functools.partial(evaluation_of, whole=whole, seconds=seconds)
    if reference is None:
        return judged(runners[0].metric, robustness=runners[0].robustness())
    of_model, of_reference = runners
    return judged(
        of_model.metric,
        robustness=of_model.robustness(),
        difference=of_model.metric.paired(of_reference.metric),
        reference=judged(of_reference.metric, robustness=of_reference.robustness()),
    )


Kind = tuple[str, int] | None  # a corruption and its severity; None: the image as it is


def _variants(data: Data, images: Tensor, kinds: Sequence[Kind], seed: int, step: int) -> Iterator[tuple[Kind, Tensor]]:
    """What the model sees of a batch of images: as they are, and under each corruption."""
    yield None, data.normalize(images)
    for kind in kinds:
        if kind is not None:
            yield kind, data.normalize(corrupt(images, *kind, _seed(seed, step, *kind)))


class _Runner:
    """A model judged on batches anywhere, with errors in a line."""

    def __init__(self, model: Model, task: Task, device: torch.device):
        self.model, self.task, self.device = model, task, device
        if isinstance(model, nn.Module) and is_graph(model):
            self.task = fitted(task, model)
        self.metric = self.task.metric()
        self.corrupted: dict[tuple[str, int], Metric] = {}
        self.at_once: dict[int, int] = {}  # samples of a batch -> those a run, where that is known

    def add(self, kind: Kind, inputs: Tensor, targets: Targets) -> None:
        if kind is not None and kind not in self.corrupted:
            self.corrupted[kind] = self.task.metric()
        try:
            for part, labels in self._parts(inputs, targets):
                outputs = self._outputs(part)
                metric = self.metric if kind is None else self.corrupted[kind]
                metric.add(outputs, labels)
        except OutputError as error:
            raise DataError(f"{type(self.model).__name__}: {error}") from error

    def _parts(self, inputs: Tensor, targets: Targets) -> Iterator[tuple[Tensor, Targets]]:
        """The batch, in parts where the model would hold too much at once."""
        count = self._at_once(len(inputs))
        if count == len(inputs) or not isinstance(targets, (Tensor, list, tuple)):
            yield inputs, targets
            return
        for first in range(0, len(inputs), count):
            yield inputs[first : first + count], targets[first : first + count]

    def _at_once(self, count: int) -> int:
        """So many of a batch are run at once; all of them where that is not known."""
        if not isinstance(self.model, nn.Module) or not is_graph(self.model) or self.device.type != "cpu":
            return count
        if count not in self.at_once:
            fit = min(count, samples_at_once(activation_bytes(self.model)[0]))
            self.at_once[count] = samples_within(self.model, fit)
        return self.at_once[count]

    def _first(self, inputs: Tensor) -> Outputs:
        """The first batch shows what the model ends in."""
        with Makers() as makers:
            outputs = self.model(inputs)
        self.task = fitted(self.task, self.model, makers.of(plain(outputs)))
        self.metric = self.task.metric()
        return outputs

    def robustness(self) -> dict[str, dict[int, float]]:
        values: dict[str, dict[int, float]] = {}
        for (name, severity), metric in self.corrupted.items():
            values.setdefault(name, {})[severity] = metric.value()
        return values

    def _outputs(self, inputs: Tensor) -> Outputs:
        who = type(self.model).__name__
        try:
            if isinstance(self.model, nn.Module) and not is_graph(self.model) and not self.metric.samples:
                return self._first(inputs.to(self.device))
            return self.model(inputs.to(self.device))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{who}: {self.device} is out of memory at batch size {len(inputs)}; pass a smaller one"
            ) from error
        except (RuntimeError, ValueError, TypeError, InputError) as error:
            raise DataError(
                f"{who}: can't be run on inputs of shape {tuple(inputs.shape)} ({first_line(error, 300)}); "
                "does the task's size or channels fit the model?"
            ) from error


@contextlib.contextmanager
def _runner(model: Model, task: Task, device: torch.device | str | None) -> Iterator[_Runner]:
    """The model ready to run in eval mode; afterwards each of its modules is as it was."""
    if not isinstance(model, nn.Module):
        yield _Runner(model, task, torch.device(device or "cpu"))
        return
    present = device_of(model)
    home = present if device is None else torch.device(device)
    if home.type != present.type or (home.index is not None and home.index != present.index):
        yield _Runner(copy.deepcopy(model).to(home).eval(), task, home)
        return
    was_training = [(module, module.training) for module in model.modules()]
    try:
        yield _Runner(model.eval(), task, present)
    finally:
        for module, training in was_training:
            module.training = training


def _corruptions(corruptions: Sequence[str] | str, severities: Sequence[int], task: Task) -> list[tuple[str, int]]:
    """Each corruption at each severity."""
    channels = task.data.input_shape[0]
    names = [corruptions] if isinstance(corruptions, str) else list(corruptions)
    if corruptions == "all":
        names = [name for name in CORRUPTIONS if fits(name, channels)]
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(f"corruption: unknown name {name!r}; have all, {', '.join(CORRUPTIONS)}")
        if not fits(name, channels):
            raise InputError(f"{name}: is not defined for images of {channels} channels; leave it out, or say all")
    if names and not set(severities) <= set(SEVERITIES):
        raise InputError(f"severities={list(severities)}: have 1 to 5")
    return [(name, severity) for name in names for severity in severities]


def _seed(seed: int, step: int, name: str, severity: int) -> int:
    entropy = [seed % 2**63, step, severity, *name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
