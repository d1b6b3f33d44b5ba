"""Which of a model's outputs a task reads, and what it says of each class: logits, whatever the network ends in.

A model may answer with a tensor, or with several by name or place. The one that is read is named by the task
(``output="logits"``, ``"output_1"``, a path such as ``"out.aux"``), or is the only one, or the one called ``logits``.

===================================  =================================================================================
the tensor                           logits (N, classes) that have the same cross-entropy and the same answers
===================================  =================================================================================
logits (N, classes)                  as they are
one logit z (N, 1) or (N,)           (0, z): softmax of the two is (1 - sigmoid z, sigmoid z), and their cross-entropy
                                     is the binary one
probabilities p of a softmax         log p
probabilities p of sigmoids          log p - log (1 - p), then as above
===================================  =================================================================================

Whether a network ends in a softmax or a sigmoid its graph says (``signature.last_operators``). Of a file in a runtime
nobody says it, and its answers must do: rows of 0 to 1 that sum to 1, or a single output of 0 to 1, are probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rarefy.errors import CaptureError
from rarefy.graph import signature
from rarefy.tasks.metric import OutputError, Outputs

Ending = Literal["logits", "softmax", "sigmoid"]

_ENDINGS: dict[str, Ending] = {
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax", "special_softmax"), "softmax"),
    **dict.fromkeys(("sigmoid", "special_expit", "hardsigmoid"), "sigmoid"),
}
_LEAST = 2.0**-60  # of a probability: its logarithm is -41.6
_ONE = 1e-2  # how far from 1 probabilities may sum to, in half precision or through codes


def chosen(outputs: Outputs, name: str | None) -> Outputs:
    """The output that is read. Raises OutputError, which lists the names, where that is not clear."""
    if isinstance(outputs, (Tensor, str)):
        return outputs
    try:
        pairs = list(signature.leaves(signature.plain(outputs)))
    except CaptureError as error:
        raise OutputError(f"returns a {type(outputs).__name__}; a classifier returns logits (N, classes)") from error
    pairs = [(path, value) for path, value in pairs if isinstance(value, (Tensor, str))]
    names = signature.named([path for path, _ in pairs])
    by_name = dict(pairs) | dict(zip(names, (value for _, value in pairs), strict=True))
    wanted = name if name is not None else names[0] if len(names) == 1 else "logits"
    if wanted in by_name:
        return by_name[wanted]
    have = ", ".join(names) or f"a {type(outputs).__name__} without tensors"
    if name is not None:
        raise OutputError(f"has no output {name!r}; it has {have}")
    raise OutputError(
        f"returns a {type(outputs).__name__} of several outputs ({have}); say which is the classifier's: "
        f"Classification(output={_said(names)}) (--read)"
    )


def _said(names: Sequence[str]) -> str:
    return repr(names[0]) if names else "NAME"


def ending(makers: Outputs, name: str | None) -> Ending | None:
    """What the network ends in, by the operators that make its outputs; None where they are not known."""
    operator = chosen(makers, name)
    return _ENDINGS.get(operator, "logits") if isinstance(operator, str) and operator else None


def guessed(values: Tensor) -> Ending:
    """The same, by the answers (N, classes) alone."""
    if not len(values) or not bool(((values >= 0) & (values <= 1)).all()):
        return "logits"
    if values.shape[1] == 1:
        return "sigmoid"
    return "softmax" if bool(((values.sum(1) - 1).abs() < _ONE).all()) else "logits"


def logits_of(values: Outputs, ends_in: Ending, pairs: bool = True) -> Tensor:
    """Logits (N, classes) of answers (N, classes), (N, 1) or (N,). pairs: of one output both classes'.

    Raises OutputError for another shape.
    """
    if isinstance(values, Tensor) and values.dim() > 2 and all(size == 1 for size in values.shape[2:]):
        values = values.flatten(1)
    if isinstance(values, Tensor) and values.dim() == 1:
        values = values.unsqueeze(1)
    if not isinstance(values, Tensor) or values.dim() != 2 or not values.shape[1]:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise OutputError(
            f"returns {got}; a classifier returns logits (N, classes): name the part that does with core="
        )
    if ends_in == "softmax":
        return values.float().clamp_min(_LEAST).log()
    if ends_in == "sigmoid":
        values = values.float()
        values = values.clamp_min(_LEAST).log() - (1 - values).clamp_min(_LEAST).log()
    return torch.cat([torch.zeros_like(values), values], 1) if pairs and values.shape[1] == 1 else values


class Guess:
    """What a model ends in that nobody knows but by its answers; the first batch decides."""

    def __init__(self) -> None:
        self._ending: Ending | None = None

    def of(self, values: Tensor) -> Ending:
        """values: (N, classes). Raises OutputError where later answers are not of the kind of the first."""
        if self._ending is None:
            self._ending = guessed(values)
        elif self._ending != "logits" and guessed(values) != self._ending:
            raise OutputError(
                f"answers with what looks like probabilities of a {self._ending} in some batches and not in others; "
                "evaluate it beside its graph (reference=), which says what it ends in"
            )
        return self._ending


class Told:
    """Says once that a model's answers are probabilities."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, ends_in: Ending | None) -> None:
        if ends_in not in (None, "logits", *self._said):
            self._said.add(str(ends_in))
            logging.getLogger("rarefy").warning(
                "the model answers with probabilities (a %s is in it): their logarithms are taken for logits", ends_in
            )
