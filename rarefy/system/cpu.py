"""What this machine can do for rarefy, what is missing, and the line that brings it.

The processor decides what int8 is worth. An 8-bit product needs a sum in 32 bits. With VNNI (or AMX, or Arm's dot product) one
instruction does both, exactly. Without, AVX2 and AVX-512 first add pairs of products in 16 bits (``vpmaddubsw``), which saturates
where both weights are large, and needs three instructions: int8 then gains little over float, and may change answers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

# extra -> distributions it brings
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "vision": ("torchvision", "timm"),
    "sign": ("model-signing", "pyOpenSSL"),
    "demo": ("scikit-learn",),
}
_CORE = ("torch", "numpy", "safetensors", "scipy", "accelerate", "pillow", "pydantic")

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


def examine() -> dict[str, Any]:
    """What there is: ``python``, ``cpu``, ``memory_bytes``, ``torch``, ``gpus``, ``runtimes``, ``packages``, and ``advice`` in sentences."""
    import torch

    from rarefy import plugins

    packages = {name: _version(name) for name in (*_CORE, *(name for names in EXTRAS.values() for name in names))}
    flags = cpu_flags()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "usable_cores": _usable_cores(), "flags": flags},
        "memory_bytes": _memory(),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads(), "vector": torch.backends.cpu.get_cpu_capability()},
        "gpus": _gpus(torch),
        "runtimes": {name: _version(plugins.choice_class("runtimes", name).package) for name in plugins.available("runtimes")},
        "packages": packages,
        "advice": _advice(flags, packages, _gpus(torch)),
    }


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


def _advice(flags: dict[str, bool] | None, packages: dict[str, str | None], gpus: list[dict[str, Any]]) -> list[str]:
    said = []
    for extra, names in EXTRAS.items():
        missing = [name for name in names if packages[name] is None]
        if missing:
            said.append(f"{', '.join(missing)} missing: pip install 'rarefy[{extra}]'")
    if flags is None:
        said.append("this system does not say which instructions the processor has; trust the latencies that `rarefy measure` finds")
    elif not any(flags.get(name) for name in _EXACT_INT8):
        said.append(
            "no VNNI: int8 gains little over float here, and sums of two products of 8 by 8 bits saturate; weights are quantised to 7 bits, where none can "
            "(onnxruntime:vnni=yes if the file is for a machine with VNNI); quantise with --gate latency"
        )
    elif not flags.get("amx_int8") and not flags.get("dot_product"):
        said.append("VNNI: int8 layers run exactly, and about two to three times as fast as float ones")
    if compiler() is None:
        said.append("no C++ compiler: the runtime inductor can't compile; install g++ (macOS: clang++), or name one in CXX")
    if not gpus:
        said.append("no GPU: training runs on the processor; keep epochs low, or train on another machine and quantise here")
    return said


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "compute_capability": capability, "memory_bytes": properties.total_memory})
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
