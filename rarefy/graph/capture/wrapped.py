"""What only wraps a model: ``torch.compile``, ``DataParallel``, DDP; and models that are programs already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.lazy import LazyModuleMixin

from rarefy.errors import CaptureError


class Wrapper(nn.Module):
    """One of our own around a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def unwrapped(model: nn.Module | ExportedProgram) -> nn.Module:
    """What ``torch.compile``, ``DataParallel`` or DDP were given, or the module of an exported program.

    Raises CaptureError for what can't be traced.
    """
    if isinstance(model, ExportedProgram):
        return _of_program(model)
    while (inner := inner_name(model)) is not None:
        model = model.get_submodule(inner)
    lazy = [name for name, module in model.named_modules() if _has_no_weights(module)]
    if lazy:
        raise CaptureError(
            f"{type(model).__name__} has lazy layers that have no weights yet ({lazy[0]}); run it on an example once, "
            "model(example), or load its weights"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is a program of TorchScript, which can't be traced; capture the nn.Module that it "
            "was made of"
        )
    return model


def _has_no_weights(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _of_program(program: ExportedProgram) -> nn.Module:
    signature = program.graph_signature
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in signature.user_inputs and isinstance(value, Tensor) and isinstance(value.shape[0], int):
            raise CaptureError(
                f"the program was exported for batches of {value.shape[0]} only; "
                "export it again with dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
            )
    module = program.module(check_guards=False)
    for name in ("train", "eval"):  # they refuse; the graph that is made of it has working ones
        vars(module).pop(name, None)
    return module


def inner_name(module: nn.Module) -> str | None:
    """Name of the module that another only wraps."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "_orig_mod"
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return "module" if isinstance(module, parallel) else "model" if isinstance(module, Wrapper) else None


def switched_off(model: nn.Module) -> None:
    """``eval()``, also of the module of an exported program, which refuses it: it has one mode."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False


class Buffers:
    """What a model's buffers held, for a model that writes to them whenever it runs."""

    def __init__(self, model: nn.Module):
        self._held = [
            (module, name, buffer, buffer.detach().clone(), None if buffer.is_inference() else buffer._version)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """The model is as it was."""
        with torch.no_grad():
            for module, name, buffer, numbers, version in self._held:
                module._buffers[name] = buffer
                if version is not None and buffer._version != version:
                    buffer.copy_(numbers)
