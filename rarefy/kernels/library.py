"""Where operators of our own are registered: ``torch.ops.rarefy``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

GRID = "Tensor scale, Tensor zero_point, int qmin, int qmax, ScalarType dtype"  # of an operator that makes codes

FUNCTIONS: dict[object, Callable[..., Tensor]] = {}  # of each operator, what it was made of

_library = torch.library.Library("rarefy", "FRAGMENT")


def operator(
    arguments: str, kernel: Callable[..., Tensor], shape: Callable[..., Tensor] | None = None, name: str = ""
) -> torch._ops.OpOverload:
    """``torch.ops.rarefy.NAME.default`` of the function ``kernel``, which runs on every device.

    arguments: as a schema has them.
    shape: what it yields for tensors without numbers; None: the kernel can tell.
    name: of the operator; that of the function unless given.
    """
    name = name or kernel.__name__
    _library.define(f"{name}({arguments}) -> Tensor")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rarefy::{name}", kernel if shape is None else shape)
    registered: torch._ops.OpOverload = getattr(torch.ops.rarefy, name).default
    FUNCTIONS[registered] = kernel
    return registered


def define(
    schema: str,
    reference: Callable[..., object],
    shape: Callable[..., object],
    cuda: Callable[..., object] | None = None,
) -> torch._ops.OpOverload:
    """An operator that is not for saved graphs: ``reference`` says what it yields, ``cuda`` is its form on a GPU.

    A GPU without Triton takes the reference.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rarefy::{name}", shape)
    if cuda is not None and torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
        _library.impl(name, _there(cuda), "CUDA")
    registered: torch._ops.OpOverload = getattr(torch.ops.rarefy, name).default
    return registered


def _there(kernel: Callable[..., object]) -> Callable[..., object]:
    """``kernel`` on the GPU where its first argument lies, which need not be the current one."""

    def run(x: Tensor, *given: object, **named: object) -> object:
        with torch.cuda.device_of(x):
            return kernel(x, *given, **named)

    return run
