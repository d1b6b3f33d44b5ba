"""Nodes and tensors of a graph: arguments by name, parameters and buffers by dotted name, and the end of every pass."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from rarefy.system.memory import afford

Value = Any  # what a node yields or reads: a tensor, a number, a list of them; a node where it stands for its value


def is_graph(model: object) -> TypeGuard[fx.GraphModule]:
    """Is this a model that ``capture`` (or ``load``) made?"""
    return isinstance(model, fx.GraphModule) and "inputs" in vars(model).get("meta", {})  # torchvision's have no meta


def share_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that shares its tensors."""
    tensors = itertools.chain(graph.parameters(), graph.buffers())
    copied = copy.deepcopy(graph, {id(tensor): tensor for tensor in tensors})
    copied.train(graph.training)
    return copied


def on_device(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph where it is there already, else a copy; tensors that its operators make are made there, too."""
    if device_of(graph) == device:
        return graph
    moved = copy.deepcopy(graph).to(device)
    for node in moved.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    moved.recompile()
    return moved


def example_inputs(graph: fx.GraphModule, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the captured shape, on the graph's device: normal for floats; integers between the least and the
    most of the example that the graph was captured with, zeros where there was none."""
    generator = torch.Generator().manual_seed(seed)
    device = device_of(graph)
    made = []
    for spec in graph.meta["inputs"]:
        dtype = getattr(torch, spec["dtype"])
        shape = (batch, *spec["shape"])
        if math.prod(shape) > 2**26:
            afford(8 * math.prod(shape), f"an example of shape {list(shape)}", "capture the model at a smaller size")
        if dtype.is_floating_point:
            value = torch.randn(shape, generator=generator)
        else:
            least, most = spec.get("range", (0, 0))
            value = torch.randint(least, most + 1, shape, generator=generator)
        made.append(value.to(device=device, dtype=dtype))
    return tuple(made)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives (the CPU for a model without any)."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def is_tensor(value: object) -> bool:
    return isinstance(value, (Tensor, FakeTensor))


def attribute(graph: nn.Module, target: Value) -> Value:
    """The parameter, buffer or flag of that dotted name, or that a ``get_attr`` node reads."""
    target = target.target if isinstance(target, fx.Node) else target
    owner, _, name = str(target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def set_attribute(graph: nn.Module, target: str, value: Tensor) -> None:
    """Put a parameter or a buffer at that dotted name, making the modules on the way; replaces what was there."""
    owner, _, name = target.rpartition(".")
    module: nn.Module = graph
    for part in filter(None, owner.split(".")):
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if name in module._parameters and not isinstance(value, nn.Parameter):
        del module._parameters[name]
    if name in module._buffers and isinstance(value, nn.Parameter):
        del module._buffers[name]
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def finish(graph: fx.GraphModule) -> fx.GraphModule:
    """End of every pass: drop nodes and tensors nothing reads, check, recompile."""
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
    graph.delete_all_unused_submodules()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module, nn.Parameter, or buffer.*")
        graph.graph.lint()
    graph.recompile()
    return graph


def arguments(node: fx.Node) -> dict[str, Value]:
    """All arguments of a ``call_function`` node by their names in the operator's schema, defaults filled in."""
    found = dict(_parameters(node.target))
    found.update(zip(found, node.args, strict=False))
    found.update(node.kwargs)
    return found


def argument(node: fx.Node, name: str) -> Value:
    """An argument by its name in the operator's schema, or its default (None where there is none).

    Raises KeyError for a name that the operator does not have.
    """
    parameters = _parameters(node.target)
    default, place = parameters[name], list(parameters).index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, name: str, value: Value) -> None:
    """Set an argument by its name in the operator's schema.

    Raises KeyError for a name that the operator does not have.
    """
    parameters = _parameters(node.target)
    if name not in parameters:
        raise KeyError(name)
    place = list(parameters).index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def argument_name(user: fx.Node, node: fx.Node) -> str:
    """Name of the first argument of ``user`` that is ``node``; "" where it is in a list of them, or none."""
    return next((name for name, value in arguments(user).items() if value is node), "")


def takes(target: Callable[..., Value], name: str) -> bool:
    """Has the operator an argument of that name?"""
    return name in _parameters(target)


@functools.cache
def _parameters(target: Callable[..., Value]) -> dict[str, Value]:
    """Name -> default, in order."""
    if isinstance(target, torch._ops.OpOverload):
        return {parameter.name: parameter.default_value for parameter in target._schema.arguments}
    if target is operator.getitem:
        return {"self": None, "index": None}
    given = inspect.signature(target).parameters.values()
    return {one.name: None if one.default is one.empty else one.default for one in given}


def operator_name(node: fx.Node) -> str:
    """``aten.conv2d.default`` -> ``"conv2d"``; "" for a node that is no ATen operator."""
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "_opname", "") or getattr(node.target, "__name__", "")
    return str(name)
