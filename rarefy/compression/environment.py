"""What this machine can do, what is missing, and how to get it: ``rarefy doctor``, and the environment of a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any, TypedDict

from rarefy import plugins
from rarefy.system import cpu

# extra -> distributions it brings
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "vision": ("torchvision", "timm"),
    "sign": ("model-signing", "pyOpenSSL"),
    "demo": ("scikit-learn",),
    "search": ("optuna",),
}
CORE = ("torch", "numpy", "safetensors", "scipy", "accelerate", "pillow", "pydantic")


class Environment(TypedDict):
    """cpu: name, cores, usable_cores, flags (None: the system does not say). torch: version, threads, vector.

    gpus: name, compute_capability, memory_bytes of each. runtimes, packages: version by name; None: not installed.
    advice: what is missing, and how to get it, in sentences.
    """

    python: str
    system: str
    cpu: dict[str, Any]
    memory_bytes: int | None
    torch: dict[str, object]
    gpus: list[dict[str, Any]]
    runtimes: dict[str, str | None]
    packages: dict[str, str | None]
    advice: list[str]


def examine() -> Environment:
    """What there is on this machine."""
    import torch

    names = (*CORE, *(name for names in EXTRAS.values() for name in names))
    packages, flags, gpus = {name: _version(name) for name in names}, cpu.cpu_flags(), _gpus()
    runtimes = plugins.available("runtimes")
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu={"name": cpu.name(), "cores": os.cpu_count(), "usable_cores": cpu.usable_cores(), "flags": flags},
        memory_bytes=cpu.memory_bytes(),
        torch={
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "vector": torch.backends.cpu.get_cpu_capability(),
        },
        gpus=gpus,
        runtimes={name: _version(plugins.choice_class("runtimes", name).package) for name in runtimes},
        packages=packages,
        advice=_advice(flags, packages, bool(gpus)),
    )


def _advice(flags: Mapping[str, bool] | None, packages: Mapping[str, str | None], has_gpu: bool) -> list[str]:
    sentences = []
    for extra, names in EXTRAS.items():
        missing = [name for name in names if packages[name] is None]
        if missing:
            sentences.append(f"{', '.join(missing)} missing: pip install 'rarefy[{extra}]'")
    if flags is None:
        sentences.append(
            "this system does not say which instructions the processor has; "
            "trust the latencies that `rarefy measure` finds"
        )
    elif not cpu.exact_int8():
        sentences.append(
            "no VNNI: int8 gains little over float here, and sums of two products of 8 by 8 bits saturate; "
            "weights are quantised to 7 bits, where none can (onnxruntime:vnni=yes if the file is for a machine "
            "with VNNI); quantise with --gate latency"
        )
    elif not flags.get("amx_int8") and not flags.get("dot_product"):
        sentences.append("VNNI: int8 layers run exactly, and about two to three times as fast as float ones")
    if cpu.compiler() is None:
        sentences.append(
            "no C++ compiler: the runtime inductor can't compile; install g++ (macOS: clang++), or name one in CXX"
        )
    if not has_gpu:
        sentences.append(
            "no GPU: training runs on the processor; keep epochs low, or train on another machine and quantise here"
        )
    return sentences


def _gpus() -> list[dict[str, object]]:
    import torch

    found: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
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
