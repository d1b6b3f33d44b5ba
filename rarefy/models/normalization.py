"""Normalisation of a trained network that nobody states: the usual one that the network shows it learned with.

No checkpoint holds mean and std, and a wrong pair costs accuracy without a word. Two things tell, on labelled images:

* **Batch norm.** Its running mean and variance are those of what it saw in training. Under the right normalisation
  what it sees now is distributed so, too: least is the Kullback-Leibler divergence of the two Gaussians, a channel's
  mean over all layers. Images are looked at as they are, and shifted with black edges, as trainings vary small ones
  (an eighth of black changes the variance by more than CIFAR-10's std differs from ImageNet's).
* **The loss**, where there is no batch norm or it does not tell clearly. A smaller std makes every logit larger, which
  lowers the loss of a network that has learned its images by heart, whatever it was trained with. So logits are
  compared at the temperature that suits each best.

Nothing is said of a network that does not know its classes under any of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy.data.augmentation import Augmentation, shifted
from rarefy.data.items import Split
from rarefy.data.normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

_TRIED, _TRIED_LARGE = 256, 64  # images that a normalisation is tried on; of more than 64x64 pixels
_AVERAGED = 8  # times as many give the mean and deviation of images that small
_NEAR = 0.02  # of mean and deviation: nearer ones are the same by another count
_CLEARLY = 0.98  # of the loss of the one before: less is chance
_KNOWN = 0.8  # of the loss of guessing: a model above it has learned nothing
_ALIKE = 0.2  # divergence of the best: above it batch norm does not hold what these images give (frozen, of others)
_APART = 1.5  # times the best's divergence: a nearer one is left to the loss
_TEMPERATURES = torch.linspace(-0.4, 0.4, 17).exp()  # more than what the usual deviations differ by
_Batches = Collection[tuple[Tensor, Tensor]]
Usual = tuple[tuple[float, ...], tuple[float, ...], str]  # mean, std, name
# The first is what is usual, so that it stays where the network does not tell.
_USUAL: dict[int, list[Usual]] = {
    1: [((0.5,), (0.5,), "0.5"), ((0.0,), (1.0,), "none"), ((0.1307,), (0.3081,), "MNIST's")],
    3: [
        (IMAGENET_MEAN, IMAGENET_STD, "ImageNet's"), ((0.0,) * 3, (1.0,) * 3, "none"), ((0.5,) * 3, (0.5,) * 3, "0.5"),
        ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), "CIFAR-10's"),
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201), "CIFAR-10's, in common use"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class _Tried:
    """loss: of what the network answers. divergence: of what its batch norms see, None without one."""

    usual: Usual
    loss: float
    divergence: float | None


def learned(model: nn.Module, task: Classification) -> Usual | None:
    """Mean, std and who says so, in words; None where the network does not know the task's classes under any."""
    split: Split = "train" if task.data.train is not None and task.data.labelled("train") else "val"
    _, height, width = task.data.input_shape
    count, more = (_TRIED, _AVERAGED) if height * width <= 64 * 64 else (_TRIED_LARGE, 1)
    try:
        batches = list(task.data.images(split, 64, limit=count * more))
        guessing = math.log(max(2, task.classes))
    except DataError:  # without labels, or normalised already
        return None
    if any(targets is None for _, targets in batches):
        return None
    candidates = _candidates(torch.cat([images.transpose(0, 1).flatten(1) for images, _ in batches], 1))
    batches = batches[:: max(1, len(batches) * 64 // count)]  # in order of class, mostly
    try:
        tried = [_try(model, task, batches, one, guessing) for one in candidates]
    except Exception:  # told when the model is captured or judged
        return None
    known = [one for one in tried if one.loss < _KNOWN * guessing]
    if not known:
        return None
    best, rivals = _best(known)
    seen = sum(len(images) for images, _ in batches)
    by = "its batch norms say so" if best.divergence is not None and best.divergence <= _ALIKE else "by its loss"
    said = f"{best.usual[2]}: of {len(tried)} in use it fits the model best, on {seen} images, {by}"
    if rivals:
        said += f"; {' and '.join(rivals)} as well: pass --mean and --std if you know them"
    return *best.usual[:2], said


def _best(known: Sequence[_Tried]) -> tuple[_Tried, list[str]]:
    """That which fits best, and the names of those that can't be told from it."""
    least = min((one.divergence for one in known if one.divergence is not None), default=math.inf)
    if least <= _ALIKE:
        known = [one for one in known if one.divergence is not None and one.divergence <= _APART * least]
    best = known[0]
    for one in known[1:]:
        best = one if one.loss < _CLEARLY * best.loss else best
    return best, [one.usual[2] for one in known if one is not best and _CLEARLY * one.loss <= best.loss]


def _candidates(pixels: Tensor) -> list[Usual]:
    """pixels: (C, all of them), from 0 to 1."""
    channels = len(pixels)
    zeros, ones, halves = ((value,) * channels for value in (0.0, 1.0, 0.5))
    own = tuple(pixels.mean(1).tolist()), tuple(pixels.std(1).clamp(min=1e-3).tolist())
    known = _USUAL.get(channels, [(halves, halves, "0.5"), (zeros, ones, "none")])
    new = all(max(abs(a - b) for pair in zip(own, one) for a, b in zip(*pair)) > _NEAR for one in known)
    return [
        *known,
        *[(*own, "the images' own")] * new,
        (zeros, tuple(one / 255 for one in ones), "none, from 0 to 255"),
    ]


def _try(model: nn.Module, task: Classification, batches: _Batches, usual: Usual, guessing: float) -> _Tried:
    normal, seen = Normalization(usual[0], usual[1]), _Seen(model)
    with torch.no_grad(), seen:
        loss = _loss(task, ((model(normal(images)), targets) for images, targets in batches))
        divergence = seen.divergence()
        if divergence is not None and loss < _KNOWN * guessing:
            draw, moved = torch.Generator().manual_seed(0), Augmentation(cropped=True, flip=False)
            for images, _ in batches:
                model(normal(shifted(images, moved, draw)))
            divergence = min(divergence, seen.divergence() or math.inf)
    return _Tried(usual, loss, divergence)


def _loss(task: Classification, answered: Iterable[tuple[object, Tensor]]) -> float:
    """The mean loss at the temperature that makes it least; where several labels are true at once as it is."""
    if task.multilabel:
        losses = [(float(task.loss(outputs, targets)), len(targets)) for outputs, targets in answered]
        return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    pairs = [(task.logits(outputs).double(), targets) for outputs, targets in answered]
    logits, targets = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    return min(float(F.cross_entropy(logits / float(one), targets)) for one in _TEMPERATURES)


class _Seen:
    """What the batch norms of a model see while this is entered: a count, a sum and a sum of squares a channel."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        self._sums: dict[_BatchNorm, list[Tensor]] = {}

    def __enter__(self) -> None:
        self._handles = [layer.register_forward_pre_hook(self._add) for layer in self.layers]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().transpose(0, 1).flatten(1).double()  # (channels, all else)
        of = [torch.tensor(values.shape[1]), values.sum(1), values.square().sum(1)]
        self._sums[layer] = [a + b for a, b in zip(self._sums[layer], of, strict=True)] if layer in self._sums else of

    def divergence(self) -> float | None:
        """Of what was seen since the last time from what the layers hold: a channel's, the mean over layers."""
        told = []
        for layer, (count, total, squares) in self._sums.items():
            if layer.running_mean is None or layer.running_var is None:
                continue
            mean, held = total / count, layer.running_var.double() + layer.eps
            variance = (squares / count - mean.square()).clamp(min=0) + layer.eps
            ratio = variance / held
            told.append((ratio + (mean - layer.running_mean).square() / held - 1 - ratio.log()).mean() / 2)
        self._sums = {}
        return float(torch.stack(told).mean()) if told else None
