"""capture(): a user's ``nn.Module`` becomes a graph, the one representation every step works on.

``torch.export`` traces the model to ATen operators (``conv2d``, ``batch_norm``, ``linear``, ...). What comes back is an
``fx.GraphModule``: an ordinary ``nn.Module`` with the original parameter names, that trains, runs under DDP and
``torch.compile``, and has a plain ``state_dict``. After the trace, this file

* makes in-place operators functional (``canonical.make_functional``), so that a pass may move or drop any node;
* stores weights under weight norm, w = g v / |v| (arXiv 1602.07868), as they are (``fold.fold_weight_norm``), so that
  they leave and are rounded as any other (further training is of w);
* lets batch norm and dropout read the module's own ``training`` flag (a ``get_attr`` node of that name), so that
  ``train()`` and ``eval()`` work as they do on any module, with no recompilation;
* clones the parameters (the caller's model is left alone) and shares those the original shares;
* keeps the batch size free, and writes the input's shape to ``graph.meta["inputs"]``, so that an example can be made
  again.

Given up: behaviour that exists only in training and is not an operator of the graph (stochastic depth, auxiliary
heads) is not captured: the trace is of the model in ``eval()``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rarefy.errors import CaptureError, first_line
from rarefy.graph.canonical import make_functional
from rarefy.graph.fold import fold_weight_norm
from rarefy.graph.layers import TRAINING_FLAG
from rarefy.graph.nodes import Value, argument, attribute, dtype_name, finish, is_graph, set_argument, set_attribute

aten = torch.ops.aten

# Left by the trace for its own checks; nothing computes with them.
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


# Left by the trace, and yield what they read.
_SAME = {aten.lift_fresh_copy.default, aten.detach_.default, aten.alias.default}


def capture(model: nn.Module, inputs: Tensor | Sequence[Tensor], *, core: str | None = None) -> fx.GraphModule:
    """The graph of ``model``.

    inputs: one example input, or a tuple of them, batch first (any batch size from 1; it stays free in the graph).
    core: dotted name of the submodule to capture instead of the whole model, for models whose rest can't be captured
        (box decoding, NMS); ``inputs`` are still those of the whole model.

    A graph is returned as a copy. Raises CaptureError, which names the user's line and the way out.
    """
    if is_graph(model):
        return copy.deepcopy(model)
    examples = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    was_training = {module: module.training for module in model.modules()}
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
        for module, training in was_training.items():
            module.training = training
    make_functional(graph)
    fold_weight_norm(graph)
    _read_training_flag(graph)
    graph.meta["inputs"] = [
        {"shape": list(example.shape[1:]), "dtype": dtype_name(example.dtype)} for example in examples
    ]
    graph.meta["core"] = core
    finish(graph)
    return graph.eval()


def as_graph(model: nn.Module, inputs: Tensor | Sequence[Tensor] | None = None) -> fx.GraphModule:
    """A graph of ``model`` for a step to work on: a graph is copied, any other module captured from ``inputs``."""
    if is_graph(model):
        return copy.deepcopy(model)
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
    seen: list[tuple[Value, ...]] = []
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


def _for_signature(model: nn.Module, free: Sequence[object]) -> Sequence[object]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    takes_all = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    return (free,) if takes_all else free


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
    return (
        f"{type(model).__name__} can't be captured{where}: {first_line(error, 300)}; "
        "change that line to tensor operations, or compress the part that is tensors only with core='name.of.submodule'"
    )


def _plain(unlifted: fx.GraphModule, exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The same nodes without pytree code: positional tensors in, a tensor or plain containers out, own parameters."""
    _inline_regions(unlifted)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    clones: dict[int, Tensor] = {}
    for node in unlifted.graph.nodes:
        if node.op == "call_function" and node.target in _CHECKS:
            continue
        if node.op == "output":
            leaves = pytree.tree_leaves(node.args[0])
            flat = [copied[value] if isinstance(value, fx.Node) else value for value in leaves]
            graph.output(_plain_containers(pytree.tree_unflatten(flat, exported.call_spec.out_spec)))
            continue
        if node.op == "call_function" and node.target in _SAME:
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
                    f"{node.target}: the trace kept a {type(original).__name__}; "
                    "compress a part with core='name.of.submodule'"
                )
            tensors[node.target] = _clone(original, clones)
    root = nn.Module()
    for name, value in tensors.items():
        set_attribute(root, name, value)
    module = fx.GraphModule(root if tensors else {}, graph)
    module.meta = {}
    return module


def _inline_regions(module: fx.GraphModule) -> None:
    """``with torch.no_grad():`` and ``with torch.autocast(..., enabled=False):`` around a part: the part itself.

    What comes out of ``no_grad`` is detached, so that gradients stop there as in the model. The trace keeps such a part
    as an operator on a submodule. Autocast that is on would change what the part computes, and stays for the error.
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


def _plain_containers(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _plain_containers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain_containers(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
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


def _read_training_flag(graph: fx.GraphModule) -> None:
    """The trace is of eval mode, so a flag that is False there is one that train() would turn on."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in TRAINING_FLAG]
    switched = [node for node in nodes if argument(node, TRAINING_FLAG[node.target]) is False]
    if not switched:
        return
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flag = graph.graph.get_attr("training")
    for node in switched:
        set_argument(node, TRAINING_FLAG[node.target], flag)
