from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Task(Protocol):
    """What the loop asks of a task (rarefy/tasks)."""

    @property
    def train(self) -> Any: ...
    @property
    def val(self) -> Any: ...
    @property
    def classes(self) -> int: ...
    @property
    def input_shape(self) -> tuple[int, int, int]: ...
    def length(self, split: Any) -> int: ...
    def batches(
        self, split: Any, batch_size: int, *, shuffle_seed: int | None = None, augment: bool = False, epoch: int = 0, start: int = 0,
        device: torch.device | str = "cpu", labelled: bool = True,
    ) -> Iterator[tuple[Tensor, Any]]: ...  # fmt: skip
    def rows(
        self, split: Any, batch_size: int, *, shuffle_seed: int | None = None, epoch: int = 0
    ) -> Sequence[Tensor] | None:
        """Which images each training batch holds, if an image is the same picture in every epoch; asked for by the cache of a teacher's answers alone."""
        ...

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor: ...
    def fingerprint(self, split: Any) -> str: ...
    def describe(self) -> dict[str, Any]: ...
