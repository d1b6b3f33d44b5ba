"""The processor: its instructions, cores and memory, and the compiler beside it.

The processor decides what int8 is worth. An 8-bit product needs a sum in 32 bits. With VNNI (or AMX, or Arm's dot
product) one instruction does both, exactly. Without, AVX2 and AVX-512 first add pairs of products in 16 bits
(``vpmaddubsw``), which saturates where both weights are large, and needs three instructions: int8 then gains little
over float, and may change answers.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

# name -> what the flag is called in /proc/cpuinfo (x86, then Arm)
_FLAGS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx_vnni": ("avx_vnni",),
    "avx512_vnni": ("avx512_vnni",),
    "amx_int8": ("amx_int8",),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "dot_product": ("asimddp",),
    "int8_matmul": ("i8mm",),
}
_EXACT_INT8 = ("avx_vnni", "avx512_vnni", "amx_int8", "dot_product", "int8_matmul")


def exact_int8() -> bool | None:
    """Does this processor sum 8-bit products exactly? None where the system does not say."""
    flags = cpu_flags()
    return None if flags is None else any(flags.get(name) for name in _EXACT_INT8)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call; None where there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def cpu_flags() -> dict[str, bool] | None:
    """Which of the instructions that matter here this processor has; None where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _flags_without_proc()
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    have = set(line.partition(":")[2].split())
    return {name: any(flag in have for flag in flags) for name, flags in _FLAGS.items()}


def _flags_without_proc() -> dict[str, bool] | None:
    """On macOS every Apple processor has the dot product; elsewhere torch says how wide its vectors are."""
    import torch

    if sys.platform == "darwin" and platform.machine() == "arm64":
        return {name: name == "dot_product" for name in _FLAGS}
    wide = torch.backends.cpu.get_cpu_capability()
    return {"avx2": wide in ("AVX2", "AVX512"), "avx512": wide == "AVX512"} if wide.startswith("AVX") else None


def name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
