from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

from rarefy.system import cpu
from rarefy.system.cpu import _EXACT_INT8, _cpu_name, _memory, _usable_cores, compiler

# extra -> distributions it brings
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "vision": ("torchvision", "timm"),
    "sign": ("model-signing", "pyOpenSSL"),
    "demo": ("scikit-learn",),
}
_CORE = ("torch", "numpy", "safetensors", "scipy", "accelerate", "pillow", "pydantic")


def examine() -> dict[str, Any]:
    """What there is: ``python``, ``cpu``, ``memory_bytes``, ``torch``, ``gpus``, ``runtimes``, ``packages``, and ``advice`` in sentences."""
    import torch

    from rarefy import plugins

    packages = {name: _version(name) for name in (*_CORE, *(name for names in EXTRAS.values() for name in names))}
    flags = cpu.cpu_flags()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "usable_cores": _usable_cores(), "flags": flags},
        "memory_bytes": _memory(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "vector": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": _gpus(torch),
        "runtimes": {
            name: _version(plugins.choice_class("runtimes", name).package) for name in plugins.available("runtimes")
        },
        "packages": packages,
        "advice": _advice(flags, packages, _gpus(torch)),
    }


def _advice(flags: dict[str, bool] | None, packages: dict[str, str | None], gpus: list[dict[str, Any]]) -> list[str]:
    said = []
    for extra, names in EXTRAS.items():
        missing = [name for name in names if packages[name] is None]
        if missing:
            said.append(f"{', '.join(missing)} missing: pip install 'rarefy[{extra}]'")
    if flags is None:
        said.append(
            "this system does not say which instructions the processor has; trust the latencies that `rarefy measure` finds"
        )
    elif not any(flags.get(name) for name in _EXACT_INT8):
        said.append(
            "no VNNI: int8 gains little over float here, and sums of two products of 8 by 8 bits saturate; weights are quantised to 7 bits, where none can "
            "(onnxruntime:vnni=yes if the file is for a machine with VNNI); quantise with --gate latency"
        )
    elif not flags.get("amx_int8") and not flags.get("dot_product"):
        said.append("VNNI: int8 layers run exactly, and about two to three times as fast as float ones")
    if compiler() is None:
        said.append(
            "no C++ compiler: the runtime inductor can't compile; install g++ (macOS: clang++), or name one in CXX"
        )
    if not gpus:
        said.append(
            "no GPU: training runs on the processor; keep epochs low, or train on another machine and quantise here"
        )
    return said


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(
            {"name": properties.name, "compute_capability": capability, "memory_bytes": properties.total_memory}
        )
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
