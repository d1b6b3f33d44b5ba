"""evaluate(): how good a classifier is, how sure that is, and how much worse than its reference.

One pass over the data: a batch is decoded once and every model runs on it, so all numbers are of the same images.

**Top-1** with its 95 % Wilson interval (Wilson, JASA 1927), z = 1.96::

    centre (p + z^2/2n) / (1 + z^2/n),   half (z / (1 + z^2/n)) sqrt(p (1-p)/n + z^2/4n^2)

**Drop** against the reference is paired. With b images only the reference gets right and c only the model, drop = (b - c) / n: positive is
worse. Its interval is Bonett and Price's (J. Educ. Behav. Stat. 37, 2012), recommended by Fagerland et al. (Stat. Med. 33, 2014): Wald's after
one image is added to b and to c, so it stays honest where no image is judged differently (then +-2.8/n)::

    b' = (b+1)/(n+2),  c' = (c+1)/(n+2):   b' - c'  +-  z sqrt((b' + c' - (b' - c')^2) / (n+2))

**Calibration error**: ECE over 15 equal bins of confidence (Guo et al., arXiv 1706.04599), sum_bins (n_bin/n) |accuracy - confidence|.
**Top-5** of min(5, outputs). **Worst class**: lowest top-1 among the classes with at least one image (of equals the one with most images), with
its number of images beside it. **Agreement**: share of images to which model and reference give the same answer. **Robustness**: top-1 under
corruptions (``tasks/corruptions.py``) at severities 1, 3, 5.

Equal logits: the lowest index is the answer, so a model that says nothing is not counted right by chance. An image whose outputs hold NaN or
infinity counts as wrong, in top-1, top-5 and agreement alike, takes no part in the calibration error, and is counted in ``nonfinite``: a broken model
gets a low score and a visible reason, so that a gate can refuse it, and not an exception in the middle of a run.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.errors import DataError, InputError
from rarefy.evaluation.accuracy import Evaluation, _correct, _Tally
from rarefy.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, fits
from rarefy.graph.nodes import device_of
from rarefy.system.progress import track

Model = nn.Module | Callable[[Tensor], Tensor]


def evaluate(
    model: Model,
    task: Any,
    *,
    reference: Model | None = None,
    split: str = "val",
    batch_size: int = 64,
    limit: int | None = None,
    corruptions: Sequence[str] | Literal["all"] = (),
    severities: Sequence[int] = (1, 3, 5),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Judge ``model`` on ``task``, and against ``reference`` where one is given.

    model, reference: modules, or callables from (N, C, H, W) float32 to logits (N, classes), such as a runtime's session. Modules are run in eval mode and
    left as they were; where ``device`` is not the module's, a copy is moved. device: None is the model's own; callables get their inputs there, or on the
    CPU where none is given.
    corruptions: names, or "all" that the images' channels allow; they depend on the seed and the batch size. limit: so many images only.
    Raises DataError where model and data do not fit, InputError for unknown corruptions.
    """
    began = time.perf_counter()
    names = _names(corruptions, severities, task)
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(_runner(one, device)) for one in (model, reference) if one is not None]
        tallies = [_Tally() for _ in runners]
        home = torch.device(device) if device is not None else runners[0].device
        batches = task.batches(split, batch_size, limit=limit, device=home)
        total = task.steps(split, batch_size, limit=limit)
        with torch.no_grad():
            for step, (inputs, targets) in enumerate(track(batches, total, f"evaluate {split}", progress)):
                images = task.denormalize(inputs) if names else inputs
                for runner, tally in zip(runners, tallies, strict=True):
                    tally.add(runner(inputs), targets, task)
                for name, severity in ((name, severity) for name in names for severity in severities):
                    changed = task.normalize(corrupt(images, name, severity, _seed(seed, step, name, severity)))
                    for runner, tally in zip(runners, tallies, strict=True):
                        right = _correct(runner(changed), targets)
                        of = tally.corrupted.setdefault(name, {})
                        of[severity] = of.get(severity, 0) + int(right.sum())
    seconds = time.perf_counter() - began
    about = (task.class_names, limit is None)
    if not tallies[0].right:
        raise DataError(
            f"{task!r}: no image of {split} could be read, so there is nothing to evaluate; repair the data"
        )
    if reference is None:
        return tallies[0].evaluation(seconds, *about)
    of_model, of_reference = tallies
    return of_model.evaluation(seconds, *about, of_reference)


class _Runner:
    """A model as a function from a batch anywhere to logits, with errors in a line."""

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device

    def __call__(self, inputs: Tensor) -> Tensor:
        who = type(self.model).__name__
        try:
            outputs = self.model(inputs.to(self.device))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{who}: {self.device} is out of memory at batch size {len(inputs)}; pass a smaller one"
            ) from error
        except (RuntimeError, ValueError, TypeError) as error:
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
            raise DataError(
                f"{who}: can't be run on inputs of shape {tuple(inputs.shape)} ({why}); does the task's size or channels fit the model?"
            ) from error
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[0] != len(inputs):
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise DataError(
                f"{who}: returns {got} for {len(inputs)} images; a classifier returns logits ({len(inputs)}, classes)"
            )
        return outputs.float()


@contextlib.contextmanager
def _runner(model: Model, device: torch.device | str | None) -> Iterator[_Runner]:
    """The model ready to run in eval mode; afterwards each of its modules is as it was."""
    if not isinstance(model, nn.Module):
        yield _Runner(model, torch.device(device or "cpu"))
        return
    own = device_of(model)
    home = own if device is None else torch.device(device)
    if home.type != own.type or (home.index is not None and home.index != own.index):
        yield _Runner(copy.deepcopy(model).to(home).eval(), home)
        return
    was_training = [(module, module.training) for module in model.modules()]
    try:
        yield _Runner(model.eval(), own)
    finally:
        for module, training in was_training:
            module.training = training


def _names(corruptions: Sequence[str] | str, severities: Sequence[int], task: Any) -> list[str]:
    if corruptions == "all":
        return [name for name in CORRUPTIONS if fits(name, task.input_shape[0])]
    names = [corruptions] if isinstance(corruptions, str) else list(corruptions)
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(f"corruption: unknown name {name!r}; have all, {', '.join(CORRUPTIONS)}")
        if not fits(name, task.input_shape[0]):
            raise InputError(
                f"{name}: is not defined for images of {task.input_shape[0]} channels; leave it out, or say all"
            )
    if names and not set(severities) <= set(SEVERITIES):
        raise InputError(f"severities={list(severities)}: have 1 to 5")
    return names


def _seed(seed: int, step: int, name: str, severity: int) -> int:
    entropy = [seed % 2**63, step, severity, *name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
