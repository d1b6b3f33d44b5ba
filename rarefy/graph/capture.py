"""capture(): a user's ``nn.Module`` becomes a graph, the one representation every step works on.

``torch.export`` traces the model to ATen operators (``conv2d``, ``batch_norm``, ``linear``, ...). What comes back is an
``fx.GraphModule``: an ordinary ``nn.Module`` with the original parameter names, that trains, runs under DDP and
``torch.compile``, and has a plain ``state_dict``. After the trace, this file

* makes in-place operators functional, so that a pass may move or drop any node;
* stores weights under weight norm, w = g v / |v| (arXiv 1602.07868), as they are, so that they leave and are rounded as any other (further training is of w);
* lets batch norm and dropout read the module's own ``training`` flag (a ``get_attr`` node of that name), so that
  ``train()`` and ``eval()`` work as they do on any module, with no recompilation;
* clones the parameters (the caller's model is left alone) and shares those the original shares;
* keeps the batch size free, and writes the input's shape to ``graph.meta["inputs"]``, so that an example can be made again.

Given up: behaviour that exists only in training and is not an operator of the graph (stochastic depth, auxiliary heads) is not
captured: the trace is of the model in ``eval()``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.errors import CaptureError
from rarefy.graph.nodes import attribute, dtype_name, finish, is_graph, set_attribute

aten = torch.ops.aten

# Operators with a flag that says whether the module is training, and the flag's place among the arguments.
TRAINING_FLAG = {
    aten.batch_norm.default: 5,
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
}

# Left by the trace for its own checks; nothing computes with them.
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def capture(model: nn.Module, inputs: Tensor | Sequence[Tensor], *, core: str | None = None) -> fx.GraphModule:
    """The graph of ``model``.

    inputs: one example input, or a tuple of them, batch first (any batch size from 1; it stays free in the graph).
    core: dotted name of the submodule to capture instead of the whole model, for models whose rest can't be captured (box
        decoding, NMS); ``inputs`` are still those of the whole model.

    A graph is returned as a copy. Raises CaptureError, which names the user's line and the way out.
    """
    if is_graph(model):
        return copy.deepcopy(model)  # type: ignore[return-value]
    examples = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    was_training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        if core is not None:
            model, examples = _core(model, core, examples)
        examples = tuple(_at_least_two(example) for example in examples)
        exported = _export(model, examples)
        unlifted = exported.module(check_guards=False)
        graph = _plain(unlifted, exported)
        _share_as(graph, model)
    finally:
        root = model
        for name, module in root.named_modules():
            if name in was_training:
                module.training = was_training[name]
    _make_functional(graph)
    _fold_weight_norm(graph)
    _read_training_flag(graph)
    graph.meta["inputs"] = [
        {"shape": list(example.shape[1:]), "dtype": dtype_name(example.dtype)} for example in examples
    ]
    graph.meta["core"] = core
    finish(graph)
    return graph.eval()


def as_graph(model: nn.Module, inputs: Tensor | Sequence[Tensor] | None = None) -> fx.GraphModule:
    """A private graph of ``model`` for a step to work on: a graph is copied, any other module captured from ``inputs``."""
    if is_graph(model):
        return copy.deepcopy(model)  # type: ignore[return-value]
    if inputs is None:
        raise CaptureError(
            f"{type(model).__name__} is not captured yet; pass inputs= (an example batch), or capture() it first"
        )
    return capture(model, inputs)


def _core(model: nn.Module, core: str, examples: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    try:
        submodule = model.get_submodule(core)
    except AttributeError as error:
        names = ", ".join(name for name, _ in model.named_children())
        raise CaptureError(f"core={core!r}: no such submodule; have {names}") from error
    seen: list[tuple[Any, ...]] = []
    handle = submodule.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        with torch.no_grad():
            model(*examples)
    finally:
        handle.remove()
    if not seen:
        raise CaptureError(f"core={core!r}: the model never calls it on this input")
    if not all(isinstance(argument, Tensor) for argument in seen[0]):
        raise CaptureError(
            f"core={core!r}: takes something else than tensors; choose a submodule that takes tensors only"
        )
    return submodule, seen[0]


def _at_least_two(example: Tensor) -> Tensor:
    """A batch of one would be taken for a constant by the trace."""
    if example.dim() == 0:
        raise CaptureError("an example input has no batch axis; give it the shape (batch, ...)")
    return example if example.shape[0] > 1 else example.expand(2, *example.shape[1:]).contiguous()


def _export(model: nn.Module, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in examples)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one opaque operator, and inference only
    try:
        with _quiet():
            return torch.export.export(model, examples, dynamic_shapes=_for_signature(model, free))
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _for_signature(model: nn.Module, free: tuple[dict[int, Any], ...]) -> Any:
    parameters = list(inspect.signature(model.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (free,)
    return free


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the trace logs and prints on the way (a whole graph, where it fails) is not for the user; the error is."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _explain(model: nn.Module, error: Exception) -> str:
    """What, the user's line, and the way out, in one line."""
    inside = os.path.dirname(torch.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((inside, os.path.dirname(__file__)))
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{type(model).__name__} can't be captured{where}: {why[:300]}; "
        "change that line to tensor operations, or compress the part that is tensors only with core='name.of.submodule'"
    )


def _plain(unlifted: fx.GraphModule, exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The same nodes without pytree code: positional tensors in, a tensor or plain containers out, own parameters."""
    _inline_regions(unlifted)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Any] = {}
    clones: dict[int, Tensor] = {}
    for node in unlifted.graph.nodes:
        if node.op == "call_function" and node.target in _CHECKS:
            continue
        if node.op == "output":
            flat = [
                copied[value] if isinstance(value, fx.Node) else value for value in pytree.tree_leaves(node.args[0])
            ]
            spec = exported.call_spec.out_spec
            graph.output(_plain_containers(pytree.tree_unflatten(flat, spec)))
            continue
        if node.op == "call_function" and node.target in (
            aten.lift_fresh_copy.default,
            aten.detach_.default,
            aten.alias.default,
        ):
            copied[node] = copied[node.args[0]]
            continue
        if node.op == "call_module":
            raise CaptureError(
                f"the trace kept a call to submodule {node.target!r}; compress a part with core='name.of.submodule'"
            )
        copied[node] = graph.node_copy(node, lambda value: copied[value])
        copied[node].meta = {"stack": _user_line(node)}
        if node.op == "get_attr":
            original = attribute(unlifted, node.target)
            if not isinstance(original, Tensor):
                raise CaptureError(
                    f"{node.target}: the trace kept a {type(original).__name__}; compress a part with core='name.of.submodule'"
                )
            tensors[node.target] = _clone(original, clones)
    module = fx.GraphModule({}, graph) if not tensors else fx.GraphModule(_tree_of(tensors), graph)
    module.meta = {}
    return module


def _inline_regions(module: fx.GraphModule) -> None:
    """``with torch.no_grad():`` and ``with torch.autocast(..., enabled=False):`` around a part of the model: the part itself.

    What comes out of ``no_grad`` is detached, so that gradients stop there as in the model. The trace keeps such a part as an operator on a
    submodule. Autocast that is on would change what the part computes, and stays for the error.
    """
    graph = module.graph
    for node in list(graph.nodes):
        held = (
            [part for part in node.args if isinstance(part, fx.Node) and part.op == "get_attr"]
            if node.op == "call_function"
            else []
        )
        regions = [part for part in held if isinstance(attribute(module, part), fx.GraphModule)]
        if len(regions) != 1 or str(node.target) not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        settings, operands = node.args[: node.args.index(regions[0])], node.args[node.args.index(regions[0]) + 1 :]
        if str(node.target) == "wrap_with_autocast" and settings[2]:
            continue
        region = attribute(module, regions[0])
        _inline_regions(region)
        copied = dict(zip((inner for inner in region.graph.nodes if inner.op == "placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(region.graph, copied)  # type: ignore[arg-type]
            assert isinstance(outputs, (list, tuple))
            if str(node.target) == "wrap_with_set_grad_enabled" and not settings[0]:
                outputs = [
                    graph.call_function(aten.detach.default, (one,)) if isinstance(one, fx.Node) else one
                    for one in outputs
                ]
        for user in list(node.users):  # the region returns a tuple, of which only getitem reads
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index,arg-type]
            graph.erase_node(user)
        graph.erase_node(node)
        if not regions[0].users:
            graph.erase_node(regions[0])


def _clone(original: Tensor, clones: dict[int, Tensor]) -> Tensor:
    if id(original) not in clones:
        copied = original.detach().clone()
        clones[id(original)] = (
            nn.Parameter(copied, original.requires_grad) if isinstance(original, nn.Parameter) else copied
        )
    return clones[id(original)]


def _tree_of(tensors: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name, value in tensors.items():
        set_attribute(root, name, value)
    return root


def _plain_containers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_containers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            tuple(_plain_containers(item) for item in value)
            if isinstance(value, tuple)
            else [_plain_containers(item) for item in value]
        )
    if value is None or isinstance(value, (fx.Node, int, float, bool, str)):
        return value
    raise CaptureError(
        f"the model returns a {type(value).__name__}; return tensors, tuples, lists or dictionaries of them"
    )


def _user_line(node: fx.Node) -> str:
    """The deepest module that made the node: ``layer1.0.conv1``; its name for messages and reports."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _share_as(graph: fx.GraphModule, model: nn.Module) -> None:
    """Parameters that are one in the model are one in the graph."""
    names: dict[int, str] = {}
    kept = dict(graph.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in kept:
            continue
        first = names.setdefault(id(parameter), name)
        if first != name:
            set_attribute(graph, name, attribute(graph, first))


def _make_functional(graph: fx.GraphModule) -> None:
    """``relu_(x)`` -> ``relu(x)``, and whoever read the changed ``x`` afterwards reads the result.

    A change to a slice of a tensor is written back to that tensor (``slice_scatter``), as often as it was sliced.
    """
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or node.target in TRAINING_FLAG:
            continue
        where = node.meta.get("stack") or node.name
        changed = node.args[0]
        operator, (node.target, node.args) = node.target, _functional(graph, node, where)

        def is_late(user: fx.Node, at: fx.Node = node) -> bool:
            return order.get(user, -1) > order[at]

        changed.replace_all_uses_with(node, delete_user_cb=is_late)
        settled, value = {changed}, node
        while _is_view(changed):
            base = changed.args[0]
            scatter = _SCATTER.get(changed.target)
            others = [
                user for alias in _views_of(base) if alias not in settled for user in alias.users if is_late(user)
            ]
            if not others:
                break
            if scatter is None:
                raise CaptureError(
                    f"{where}: {operator} changes a tensor through {changed.target}, and it is read later; "
                    "write it without in-place assignment (torch.cat, torch.where), or capture another part with core="
                )
            with graph.graph.inserting_after(value):
                value = graph.graph.call_function(scatter, (base, value, *changed.args[1:]))
            order[value] = order[node]
            base.replace_all_uses_with(value, delete_user_cb=is_late)
            settled.add(base)
            changed = base
        stale = [
            alias
            for alias in _views_of(changed)
            if alias not in settled and any(map(is_late, alias.users)) and order[alias] < order[node]
        ]
        if stale:
            raise CaptureError(
                f"{where}: {operator} changes a tensor that {stale[0].name} also views, and both are read later; write it without in-place assignment"
            )


# view operator -> the operator that writes the changed view back
_SCATTER = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def _functional(graph: fx.GraphModule, node: fx.Node, where: str) -> tuple[Any, tuple[Any, ...]]:
    """Operator and arguments that return what the in-place ``node`` would have left in its first argument."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.split("::")[1]
    if name == "copy_":  # x.copy_(y) makes x equal y, in x's shape and type
        with graph.graph.inserting_before(node):
            shaped = graph.graph.call_function(aten.expand_as.default, (node.args[1], node.args[0]))
        return aten.type_as.default, (shaped, node.args[0])
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None:
        raise CaptureError(f"{where}: {target} has no form that returns a new tensor; capture another part with core=")
    return overload, node.args


def _views_of(node: fx.Node) -> list[fx.Node]:
    """Nodes that may share memory with ``node``: what it is a view of, and the views of that."""
    root = node
    while root.op == "call_function" and _is_view(root):
        root = root.args[0]  # type: ignore[assignment]
    found, queue = [], [root]
    while queue:
        current = queue.pop()
        found.append(current)
        queue.extend(user for user in current.users if _is_view(user) and user.args and user.args[0] is current)
    return found


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    first = target._schema.arguments[0] if target._schema.arguments else None
    return bool(first is not None and first.alias_info is not None and not first.alias_info.is_write)


def _fold_weight_norm(graph: fx.GraphModule) -> None:
    """The weight that direction v and length g make, in place of both, unless something else reads one of them."""
    made: dict[Any, str] = {}
    taken = {
        name
        for name, _ in (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    }
    for node in graph.graph.find_nodes(op="call_function", target=aten._weight_norm.default):
        direction, length = node.args[:2]
        if any(
            source.op != "get_attr" or any(user.args != node.args for user in source.users)
            for source in node.all_input_nodes
        ):
            continue
        v, g = attribute(graph, direction), attribute(graph, length)
        key = (id(v), id(g), node.args[2:])
        if key not in made:
            name = re.sub(r"parametrizations\.(\w+)\.original1$|_v$", r"\1", str(direction.target))
            made[key] = name if name not in taken else f"{name}_normed"
            with torch.no_grad():
                weight = node.target(v, g, *node.args[2:])
            set_attribute(graph, made[key], nn.Parameter(weight, v.requires_grad or g.requires_grad))
        with graph.graph.inserting_before(node):
            stored = graph.graph.get_attr(made[key])
        stored.meta = {"stack": node.meta.get("stack", "")}
        node.replace_all_uses_with(stored)
        graph.graph.erase_node(node)


def _read_training_flag(graph: fx.GraphModule) -> None:
    """The trace is of eval mode, so a flag that is False there is one that train() would turn on."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in TRAINING_FLAG]
    switched = [node for node in nodes if node.args[TRAINING_FLAG[node.target]] is False]
    if not switched:
        return
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flag = graph.graph.get_attr("training")
    for node in switched:
        node.update_arg(TRAINING_FLAG[node.target], flag)
