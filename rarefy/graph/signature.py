"""What a graph takes and returns: the names of its inputs and outputs, and outputs in the containers of the original.

``capture`` writes it to the graph's meta, which is saved with it:

    inputs   [{shape, dtype}]: of each input, without the batch; range: least and most of an example of whole numbers
    names    {inputs: [...], outputs: [...]}: the original's argument names, and what its outputs are called: the keys
             of a dictionary or the fields of a dataclass, else ``output``, or ``output_0``, ``output_1``, ...
    sizes    of each input, of each axis behind the batch: what its size must be a multiple of, or null: it is that of
             ``shape``. A graph of before has none, and refuses nothing

``attach`` gives the module what a program of nodes can't hold: answers come back in the very classes of the original
(a dataclass, a named tuple, transformers' ``ModelOutput``). A graph from a folder has dictionaries and tuples in their
place: a class is code, and a folder brings none.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.errors import CaptureError, InputError
from rarefy.graph.nodes import Value, operator_name
from rarefy.graph.shapes import check_lstms

Classes = Mapping[str, type]  # path of a container among the outputs -> its class in the original


def input_names(graph: fx.GraphModule) -> list[str]:
    """Name of each input, in order; of graphs that were made before names were kept, as their nodes are called."""
    names = graph.meta.get("names", {}).get("inputs")
    return list(names) if names else [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]


def output_names(graph: fx.GraphModule, classes: Classes | None = None) -> list[str]:
    """Name of each tensor that comes out, in order. classes: of the original's containers, where they are known."""
    (output,) = graph.graph.find_nodes(op="output")
    paths = [path for path, value in leaves(output.args[0], classes=classes) if isinstance(value, fx.Node)]
    names = graph.meta.get("names", {}).get("outputs")
    return list(names) if names and len(names) == len(paths) else named(paths)


def returned(graph: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    """(name, node) of each value that comes out, in order; a value may come twice."""
    (output,) = graph.graph.find_nodes(op="output")
    nodes = [value for _, value in leaves(output.args[0]) if isinstance(value, fx.Node)]
    return list(zip(output_names(graph), nodes, strict=True))


def plain(outputs: Value, classes: dict[str, type] | None = None, path: str = "") -> Value:
    """The same values in dictionaries, lists and tuples. classes: is filled with what else there was, by its path.

    Raises CaptureError for an object of another kind.
    """
    kept: Callable[[Value, str], Value] = functools.partial(_plain_item, classes, path)
    if isinstance(outputs, Mapping):
        found: Value = {key: kept(value, str(key)) for key, value in outputs.items()}
        ordinary = type(outputs) is dict
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        fields = (field.name for field in dataclasses.fields(outputs))
        found, ordinary = {name: kept(getattr(outputs, name), name) for name in fields}, False
    elif isinstance(outputs, tuple):
        names: Iterable[str] = getattr(outputs, "_fields", None) or map(str, range(len(outputs)))
        found = tuple(kept(value, name) for name, value in zip(names, outputs, strict=True))
        ordinary = type(outputs) is tuple
    elif isinstance(outputs, list):
        found, ordinary = [kept(value, str(index)) for index, value in enumerate(outputs)], type(outputs) is list
    elif outputs is None or isinstance(
        outputs, (Tensor, fx.Node, int, float, bool, str, torch.SymInt, torch.SymFloat, torch.SymBool)
    ):
        return outputs
    else:
        raise CaptureError(_unreadable(outputs, path))
    if classes is not None and not ordinary:
        classes[path] = type(outputs)
    return found


def _plain_item(classes: dict[str, type] | None, path: str, value: Value, name: str) -> Value:
    return plain(value, classes, f"{path}.{name}" if path else name)


def _unreadable(value: object, path: str) -> str:
    kind, where = type(value).__name__, f" as {path}" if path else ""
    if "Cache" in kind or path.startswith("past_key_values"):
        return (
            f"the model returns a {kind}{where}, which is no tensor; switch it off with use_cache=False, among the "
            "inputs (a dictionary) or in the model's config"
        )
    return (
        f"the model returns a {kind}{where}; return tensors, tuples, lists, dictionaries or dataclasses of them, or "
        "capture the part that does with core="
    )


def leaves(outputs: Value, path: str = "", classes: Classes | None = None) -> Iterator[tuple[str, Value]]:
    """(path, value) of all that is in plain containers, in order: ``("hidden_states.0", tensor)``.

    classes: those of the original, whose named tuples have words for their places.
    """
    if not isinstance(outputs, (dict, list, tuple)):
        yield path, outputs
        return
    fields: Sequence[object] = getattr((classes or {}).get(path), "_fields", None) or range(len(outputs))
    pairs = outputs.items() if isinstance(outputs, dict) else zip(fields, outputs, strict=True)
    for key, value in pairs:
        yield from leaves(value, f"{path}.{key}" if path else str(key), classes)


def tensors(outputs: Value) -> list[Tensor]:
    """All tensors that a model or a graph returned, in order, whatever containers they are in."""
    return [value for _, value in leaves(plain(outputs)) if isinstance(value, Tensor)]


def named(paths: Sequence[str], whole: str = "output") -> list[str]:
    """Names for values at these paths, each an identifier of its own: ``hidden_states.0`` -> ``hidden_states_0``."""
    names: list[str] = []
    for path in paths:
        text = f"{whole}_{path}" if path[:1].isdigit() else path or whole
        name = re.sub(r"\W", "_", text.replace(".", "_"), flags=re.ASCII).lstrip("_") or whole
        name = f"{name}_" if keyword.iskeyword(name) else f"{whole}_{name}" if name[0].isdigit() else name
        count = 1
        unique = name
        while unique in names:
            unique, count = f"{name}_{count}", count + 1
        names.append(unique)
    return names


def last_operators(graph: fx.GraphModule) -> Value:
    """The graph's outputs, with the name of the operator that makes the numbers of each in its place ("softmax")."""
    (output,) = graph.graph.find_nodes(op="output")
    return fx.node.map_arg(output.args[0], _maker)


def _maker(node: fx.Node) -> str:
    while operator_name(node) in _SAME_NUMBERS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return operator_name(node)


# Operators that yield the numbers that they are given, laid out otherwise, or rounded.
_SAME_NUMBERS = frozenset(
    "view reshape flatten squeeze unsqueeze select slice permute transpose contiguous clone alias detach to _to_copy "
    "type_as quantize dequantize".split()
)


class Makers(TorchDispatchMode):
    """While a model runs, notes which operator makes each tensor: ``last_operators`` of what is no graph."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[Value, ...] = (), kwargs: Value = None
    ) -> Value:
        result = func(*args, **(kwargs or {}))
        name = func._opname
        if name in _SAME_NUMBERS and args:
            name = self._names.get(id(args[0]), "")
        for value in result if isinstance(result, (tuple, list)) else (result,):
            self._names[id(value)] = name
        return result

    def of(self, outputs: Value) -> Value:
        """The outputs, with names in place of tensors."""
        return pytree.tree_map(
            lambda value: self._names.get(id(value), "") if isinstance(value, Tensor) else value, outputs
        )


def refusal(graph: fx.GraphModule, index: int, shape: Sequence[int]) -> str | None:
    """Why the graph does not take an input of that shape, batch first, in a line; None where it does."""
    spec, sizes = graph.meta["inputs"][index]["shape"], graph.meta.get("sizes")
    name = input_names(graph)[index]
    takes = f"{name}: the graph takes ({', '.join(['N', *map(str, taken(graph, index))])})"
    if len(shape) == len(spec) and sizes is not None:
        return f"{takes}, and got {tuple(shape)}, which has no batch axis; give it one, as in {name}[None]"
    if len(shape) != len(spec) + 1:
        return f"{takes}, and got {tuple(shape)}" if sizes is not None else None
    multiples = sizes[index] if sizes is not None else [1] * len(spec)
    for given, size, multiple in zip(shape[1:], spec, multiples, strict=True):
        if given != size and (multiple is None or given % multiple or not given):
            other = ", ".join(map(str, shape[1:]))
            return f"{takes}, and got {tuple(shape)}; capture the model with an example of that size: ({other})"
    return None


def taken(graph: fx.GraphModule, index: int) -> list[int | str]:
    """What the sizes of an input may be, behind the batch: a number, ``any``, or ``multiple of 32``."""
    spec = graph.meta["inputs"][index]["shape"]
    multiples = (graph.meta.get("sizes") or [[None] * len(spec)] * (index + 1))[index]
    words = {None: None, 1: "any"}
    return [
        size if multiple is None else words.get(multiple) or f"multiple of {multiple}"
        for size, multiple in zip(spec, multiples, strict=True)
    ]


def fix_sizes(graph: fx.GraphModule) -> None:
    """From now on the graph takes inputs of the example's sizes alone: a pass has written them into it."""
    if "sizes" in graph.meta:
        graph.meta["sizes"] = [[None] * len(spec["shape"]) for spec in graph.meta["inputs"]]


def attach(graph: fx.GraphModule, classes: Classes | None = None) -> None:
    """From now on the module, and each copy of it, answers in the original's containers, and refuses other sizes."""
    hooks = functools.partial(_register, classes or {})
    hooks(graph)
    graph._register_deepcopy_hook(hooks)


def _register(classes: Classes, graph: nn.Module) -> None:
    graph.register_forward_pre_hook(_check, with_kwargs=True)
    if classes:
        graph.register_forward_hook(functools.partial(_restore, classes))


def _check(graph: nn.Module, args: tuple[Value, ...], kwargs: Mapping[str, Value]) -> None:
    """Raises InputError for an input of a size that is not in the graph."""
    if torch.compiler.is_compiling() or not isinstance(graph, fx.GraphModule):
        return
    given = dict(enumerate(args))
    if kwargs:
        given |= {index: kwargs[name] for index, name in enumerate(input_names(graph)) if name in kwargs}
    if len(given) == len(graph.meta["inputs"]) and all(isinstance(value, Tensor) for value in given.values()):
        check_lstms(graph, [given[index] for index in sorted(given)])
    if graph.meta.get("sizes") is None:
        return
    for index, value in given.items():
        if isinstance(value, Tensor) and index < len(graph.meta["inputs"]):
            reason = refusal(graph, index, value.shape)
            if reason is not None:
                raise InputError(reason)


def _restore(classes: Classes, graph: nn.Module, args: tuple[Value, ...], outputs: Value) -> Value:
    if torch.compiler.is_compiling():
        return outputs
    return _restored(outputs, classes, "")


def _restored(outputs: Value, classes: Classes, path: str) -> Value:
    if not isinstance(outputs, (dict, list, tuple)):
        return outputs
    kind = classes.get(path)
    at = f"{path}." if path else ""
    if isinstance(outputs, dict):
        values = {key: _restored(value, classes, f"{at}{key}") for key, value in outputs.items()}
        if kind is None:
            return values
        try:
            return kind(**values) if dataclasses.is_dataclass(kind) else kind(values)
        except (TypeError, ValueError):  # it is made in another way
            return values
    names = getattr(kind, "_fields", None) or range(len(outputs))
    items = [_restored(value, classes, f"{at}{name}") for name, value in zip(names, outputs, strict=True)]
    if kind is not None and hasattr(kind, "_make"):
        return kind._make(items)
    return items if isinstance(outputs, list) else tuple(items)
