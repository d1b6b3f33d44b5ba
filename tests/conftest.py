"""What every test may rely on: few threads, fixed seeds, and the real data where it lies."""

from __future__ import annotations

import os

# Before torch and numpy are imported: several test processes share the cores.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

# No deadline (machines differ), the same examples in every run, none kept from run to run.
settings.register_profile("rarefy", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("rarefy")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


# Files that take minutes begin first (``make test`` gives each process whole files in this order), so that none of them
# is begun when the other process has nothing left to do.
LONG = ("test_resume.py", "test_docs.py", "test_doors.py", "test_folder.py", "test_compress.py", "test_bad_input.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds_and_globals() -> Iterator[None]:
    """Each test starts from the same seeds and leaves torch's global settings as it found them; one that leaves
    gradients off has found a bug."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the libraries under test use it)
    torch.manual_seed(0)
    threads, dtype, deterministic = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    recording = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert recording, "gradients are off after the test: no_grad() was left open, perhaps across a yield"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and weights: $RAREFY_DATA, else shared/data beside the checkout. Skips where there is
    none."""
    named = os.environ.get("RAREFY_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {'$RAREFY_DATA' if named else '$RAREFY_DATA is not set and'} {folder} is no folder")
    return folder
