"""Workers that die, or have no shared memory, end in a line or do without: nobody waits for them without end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from rarefy.errors import DataError
from rarefy.tasks import Classification

COUNT = 12


class Images:
    """(8, 8) images of their number; what ``fault`` says happens to the eighth in a worker."""

    def __init__(self, fault: str = ""):
        self.fault = fault

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == 7 and get_worker_info() is not None:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "left":
                os._exit(3)
        return np.full((8, 8), index, np.uint8), index % 2


def seen(fault: str = "", workers: int = 2) -> list[int]:
    task = Classification(val=Images(fault), workers=workers, mean=0.0, std=1.0)
    batches: Any = task.data.images("val", 3)
    return [round(float(image.mean()) * 255) for images, _ in batches for image in images]


@pytest.mark.parametrize("fault", ["killed", "left"])
def test_a_worker_that_dies_is_told_in_a_line(fault: str) -> None:
    with pytest.raises(DataError, match="a worker stopped .*; pass fewer workers, or workers=0") as raised:
        seen(fault)
    assert "\n" not in str(raised.value)


def test_full_shared_memory_is_gone_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert seen() == list(range(COUNT))


def test_what_a_worker_posts_lies_in_shared_memory_already() -> None:
    """Left to the queue's own thread, a failure there is dropped, and waited for without end."""
    from torch.utils.data import _utils

    from rarefy.data.decoding import Batch, _posted

    batch = Batch(torch.zeros(2, 1, 8, 8), torch.zeros(2), {})
    assert _posted(batch).images is batch.images and not batch.images.is_shared()
    _utils.worker._worker_info = _utils.worker.WorkerInfo(id=0, num_workers=1, seed=0, dataset=None)
    try:
        posted = _posted(batch)
    finally:
        _utils.worker._worker_info = None
    assert posted.images is not None and posted.images.is_shared() and posted.labels.is_shared()


def test_no_room_for_locks_means_no_workers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing, "Lock", full)
    with caplog.at_level(logging.WARNING, "rarefy"):
        assert seen("killed") == list(range(COUNT))
    assert "no workers can be started (No space left on device): this process decodes" in caplog.text


def test_workers_that_cannot_be_started_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.data import decoding

    def refuse(self: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(decoding.DataLoader, "__iter__", refuse)
    with pytest.raises(DataError, match="can't be started .*; pass fewer workers, or workers=0"):
        seen()
