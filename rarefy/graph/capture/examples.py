"""Example inputs in the forms that users have: tensors, arrays, shapes, dictionaries of them.

A shape, ``(3, 16, 16)`` or ``(1, 3, 16, 16)``, stands for an input of that shape: normal numbers of the model's own
float type, or zeros of int64 where the model reads those. Numbers of a type that the model does not take (float64
of an array, float32 for a model in half precision) are handed to it in its own. A dictionary holds keyword arguments.
What is no tensor among the inputs (``use_cache=False``) is a constant of the graph.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.errors import CaptureError, first_line
from rarefy.graph.nodes import Value, device_of
from rarefy.graph.signature import named

Shape = tuple[int, ...]
Input = Tensor | np.ndarray | Shape
Inputs = Input | Sequence[Value] | Mapping[str, Value]


@dataclasses.dataclass(frozen=True)
class Call:
    """How a model is called: its arguments, flat. leaves: all values in them; names: of those that are tensors."""

    leaves: list[Value]
    spec: pytree.TreeSpec
    names: list[str]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def arguments(self, tensors: Sequence[Value]) -> tuple[tuple[Value, ...], dict[str, Value]]:
        """Arguments and keyword arguments, with these in place of the tensors."""
        given = iter(tensors)
        flat = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        return tuple(args), kwargs

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        changed = [change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return dataclasses.replace(self, leaves=changed)

    def run(self, model: nn.Module) -> Value:
        args, kwargs = self.arguments(self.tensors)
        with torch.no_grad():
            return model(*args, **kwargs)


def call_of(model: nn.Module, inputs: Inputs) -> Call:
    """The call that ``inputs`` stand for. Raises CaptureError where the model takes none such."""
    failed: Exception | None = None
    for args, kwargs in _readings(model, inputs):
        call = _flat(model, args, kwargs).mapped(_at_least_two)
        try:
            call.run(model)
            return call
        except CaptureError:
            raise
        except Exception as error:  # whatever a model's own code raises for a type or shape that it does not take
            failed = failed or error
    assert failed is not None
    call = _flat(model, *next(iter(_readings(model, inputs))))
    if _runs(model, call.mapped(lambda tensor: tensor[None].expand(2, *tensor.shape))):
        raise CaptureError(_no_batch(model, call)) from failed
    shapes = ", ".join(
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
        for name, tensor in zip(call.names, call.tensors, strict=True)
    )
    raise CaptureError(
        f"{type(model).__name__} does not take this example ({shapes}): {first_line(failed)}; "
        f"pass what {type(model).__name__}.forward{_signature(model)} takes, batch first"
    ) from failed


def same_call(model: nn.Module, args: tuple[Value, ...], kwargs: Mapping[str, Value]) -> Call:
    """A call that was seen, of a part of a model."""
    return _flat(model, args, kwargs).mapped(_at_least_two)


def check_batch_axis(model: nn.Module, call: Call) -> None:
    """Raises CaptureError where the example is one picture, which the model takes, too: there is no batch to be free.

    Called where the first axis could not be left free.
    """
    if all(tensor.dim() in (1, 2, 3) for tensor in call.tensors) and _runs(
        model, call.mapped(lambda tensor: tensor[None].expand(2, *tensor.shape))
    ):
        raise CaptureError(_no_batch(model, call))


def _no_batch(model: nn.Module, call: Call) -> str:
    shape = tuple(call.tensors[0].shape)
    sizes = ", ".join(map(str, shape))
    return (
        f"{type(model).__name__}: the example {shape} has no batch axis; give it one, of any size: ({1}, {sizes}), "
        "for example inputs[None]"
    )


def _readings(model: nn.Module, inputs: Inputs) -> Iterator[tuple[tuple[Value, ...], dict[str, Value]]]:
    """(arguments, keyword arguments) that may be meant, the likeliest first."""
    device, own = device_of(model), _float_type(model)
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif _is_shape(inputs) or isinstance(inputs, (Tensor, np.ndarray)):
        args = (inputs,)
    elif isinstance(inputs, (list, tuple)):
        args = tuple(inputs)
    else:
        raise CaptureError(
            f"inputs: a {type(inputs).__name__} is no example; pass a tensor, an array, a shape such as (3, 224, 224), "
            "a tuple of them, or a dictionary by argument name"
        )
    if not any(isinstance(leaf, (Tensor, np.ndarray)) or _is_shape(leaf) for leaf in _leaves((args, kwargs))):
        raise CaptureError("inputs: hold no tensor; pass an example, or a shape such as (3, 224, 224)")
    shaped = any(map(_is_shape, _leaves((args, kwargs))))
    for batched in (True, False) if shaped else (True,):
        for whole in (False, True) if shaped else (False,):
            made = _map((args, kwargs), lambda leaf: _made(leaf, own, device, batched, whole))  # noqa: B023
            yield made
            if not whole:
                yield _map(made, lambda leaf: _as_own(leaf, own))


def _made(leaf: Value, own: torch.dtype, device: torch.device, batched: bool, whole: bool) -> Value:
    """A tensor of what stands for one. batched: take a shape of two or four axes as one with a batch; whole: zeros."""
    if isinstance(leaf, np.ndarray):
        try:
            return torch.as_tensor(np.ascontiguousarray(leaf)).clone().to(device)
        except TypeError as error:
            raise CaptureError(f"inputs: an array of {leaf.dtype} is no tensor; pass numbers") from error
    if isinstance(leaf, Tensor):
        return leaf.to(device)
    if not _is_shape(leaf):
        return leaf
    has_batch = (len(leaf) in (2, 4, 5)) == batched
    shape = (2, *leaf[1:]) if has_batch else (2, *leaf)
    if whole:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, own)


def _as_own(leaf: Value, own: torch.dtype) -> Value:
    """Floats, and bytes, in the model's own float type."""
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.dtype == torch.uint8):
        return leaf.to(own)
    return leaf


def _is_shape(leaf: object) -> bool:
    return (
        isinstance(leaf, (tuple, list, torch.Size))
        and 0 < len(leaf) <= 5
        and all(type(size) is int and size > 0 for size in leaf)
    )


def _leaves(value: Value) -> list[Value]:
    return pytree.tree_leaves(value, is_leaf=_is_shape)


def _map(value: Value, change: Callable[[Value], Value]) -> Value:
    return pytree.tree_map(change, value, is_leaf=_is_shape)


def _flat(model: nn.Module, args: tuple[Value, ...], kwargs: Mapping[str, Value]) -> Call:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    seen: set[int] = set()
    for index, leaf in enumerate(leaves):  # the trace takes one tensor in two places for one input
        leaves[index] = leaf.clone() if isinstance(leaf, Tensor) and id(leaf) in seen else leaf
        seen.add(id(leaf))
    paths = []
    own = _parameters(model, len(args))
    for path, leaf in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]:
        if not isinstance(leaf, Tensor):
            continue
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path[1:]]
        first = own[int(parts[0])] if path[0].idx == 0 else parts[0]  # type: ignore[attr-defined]
        paths.append(".".join([first, *parts[1:]]))
    return Call(leaves, spec, named(paths, "input"))


def _parameters(model: nn.Module, count: int) -> list[str]:
    """What the model calls its first ``count`` arguments."""
    try:
        given = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        given = []
    names: list[str] = []
    for one in given:
        if one.kind is inspect.Parameter.VAR_POSITIONAL:
            left = count - len(names)
            names += [one.name] if left == 1 else [f"{one.name}_{index}" for index in range(left)]
        elif one.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names.append(one.name)
    return [*names, *(f"input_{index}" for index in range(len(names), count))]


def _signature(model: nn.Module) -> str:
    try:
        names = [one.name for one in inspect.signature(model.forward).parameters.values() if one.default is one.empty]
    except (TypeError, ValueError):
        return "(...)"
    return f"({', '.join(names)})"


def _float_type(model: nn.Module) -> torch.dtype:
    types = [one.dtype for one in model.parameters() if one.is_floating_point()]
    return max(set(types), key=types.count) if types else torch.get_default_dtype()


def _at_least_two(example: Tensor) -> Tensor:
    """A batch of one would be taken for a constant by the trace."""
    if example.dim() == 0:
        raise CaptureError("an example input has no batch axis; give it the shape (batch, ...)")
    return example if example.shape[0] != 1 else example.expand(2, *example.shape[1:]).contiguous()


def _runs(model: nn.Module, call: Call) -> bool:
    try:
        call.run(model)
    except Exception:
        return False
    return True
