"""Bounds of options that several criteria have."""

from __future__ import annotations


def check_reduce(reduce: str) -> None:
    """Raises ValueError."""
    if reduce not in ("mean", "sum", "max"):
        raise ValueError(f"reduce={reduce!r} is not mean, sum or max")


def check_counts(**counts: int) -> None:
    """Raises ValueError where one is below 1."""
    if min(counts.values()) < 1:
        *names, last = (f"{name}={count}" for name, count in counts.items())
        raise ValueError(f"{', '.join(names)} and {last} must be at least 1")
