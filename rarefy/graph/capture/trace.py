"""capture(): the trace, and what is made of it.

``torch.export`` traces the model to ATen operators (``conv2d``, ``batch_norm``, ``linear``, ...). What comes back is an
``fx.GraphModule``: an ordinary ``nn.Module`` with the original parameter names, that trains, runs under DDP and
``torch.compile``, and has a plain ``state_dict``. After the trace, this file

* makes in-place operators functional (``canonical.make_functional``), so that a pass may move or drop any node;
* stores weights that others make as they are: under weight norm, w = g v / |v| (arXiv 1602.07868), spectral norm (arXiv
  1802.05957) or any other parametrization, and under masks (``fold.fold_parametrizations``), so that they leave and are
  rounded as any other (further training is of w);
* lets batch norm and dropout read the module's own ``training`` flag (a ``get_attr`` node of that name), so that
  ``train()`` and ``eval()`` work as they do on any module, with no recompilation;
* clones the parameters (the caller's model is left alone) and shares those the original shares;
* leaves ``torch.compile``, ``DataParallel`` and DDP out, and their words out of the names;
* keeps the batch size free, and other sizes where the model allows it (``sizes.py``), and writes what the graph takes
  and returns to its meta (``signature.py``), so that an example can be made again.

Given up: behaviour that exists only in training and is not an operator of the graph (stochastic depth, auxiliary
heads) is not captured: the trace is of the model in ``eval()``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rarefy.errors import CaptureError
from rarefy.graph import signature
from rarefy.graph.canonical import make_functional, spell_convolutions
from rarefy.graph.capture.examples import Call, Inputs, call_of, check_batch_axis, same_call
from rarefy.graph.capture.lengths import free_lengths
from rarefy.graph.capture.messages import explain, tell_of_written
from rarefy.graph.capture.regions import inline
from rarefy.graph.capture.sizes import free_sizes
from rarefy.graph.capture.spelling import spell, spell_name, spell_names, tell_of_names
from rarefy.graph.capture.wrapped import Buffers, Wrapper, inner_name, switched_off, unwrapped
from rarefy.graph.fold import fold_parametrizations
from rarefy.graph.layers import TRAINING_FLAG
from rarefy.graph.nodes import (
    Value,
    argument,
    arguments,
    attribute,
    dtype_name,
    finish,
    is_graph,
    set_argument,
    set_attribute,
)

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


def capture(model: nn.Module | ExportedProgram, inputs: Inputs, *, core: str | None = None) -> fx.GraphModule:
    """The graph of ``model``.

    inputs: an example, batch first (any batch size; it stays free in the graph): a tensor, an array, a shape such as
        ``(3, 224, 224)``; a tuple of them for several inputs, or a dictionary by argument name.
    core: dotted name of the submodule to capture instead of the whole model, for models whose rest can't be captured
        (box decoding, NMS); ``inputs`` are still those of the whole model.

    A graph is returned as a copy. It takes tensors, by place or by name, and returns what the model returns. Raises
    CaptureError, which names the user's line and the way out.
    """
    if is_graph(model):
        return copy.deepcopy(model)
    model = unwrapped(model)
    was_training = {module: module.training for module in model.modules()}
    buffers = Buffers(model)
    try:
        switched_off(model)
        with torch.compiler.set_stance("force_eager"):  # parts that were compiled run as they are
            call = call_of(model, inputs)
            if core is not None:
                model, call = _core(model, core, call)
            buffers.restore()
            flat = _Flat(model, call)
            graph = _graph_of(flat, _export(flat), core)
            graph.meta["sizes"] = free_sizes(model, graph, call)
    finally:
        for module, training in was_training.items():
            module.training = training
        buffers.restore()
    signature.attach(graph, flat.returned.classes)
    return graph


def _graph_of(flat: _Flat, exported: ExportedProgram, core: str | None) -> fx.GraphModule:
    """The graph of a trace, finished but for what it takes beside the example."""
    graph, call = _plain(flat, exported), flat.call
    _share_as(graph, flat.model)
    tell_of_written(flat.model, make_functional(graph))
    spell_convolutions(graph)
    fold_parametrizations(graph)
    _as_batch_norm(graph, aten._native_batch_norm_legit_no_training.default)
    _read_training_flag(graph)
    _as_batch_norm(graph, aten.instance_norm.default)
    graph.meta["inputs"] = [_described(tensor) for tensor in call.tensors]
    graph.meta["core"] = core
    outputs = signature.output_names(graph, flat.returned.classes)
    graph.meta["names"] = {"inputs": call.names, "outputs": outputs}
    finish(graph)
    return graph.eval()


def as_graph(model: nn.Module | ExportedProgram, inputs: Inputs | None = None) -> fx.GraphModule:
    """A graph of ``model`` for a step to work on: a graph is copied, any other module captured from ``inputs``."""
    if is_graph(model):
        return copy.deepcopy(model)
    if inputs is None:
        raise CaptureError(
            f"{type(model).__name__} is not captured yet; pass inputs= (an example batch), or capture() it first"
        )
    return capture(model, inputs)


def _described(tensor: Tensor) -> dict[str, Value]:
    """An input without its batch; of whole numbers also the least and the most, of which examples are made again."""
    about: dict[str, Value] = {"shape": list(tensor.shape[1:]), "dtype": dtype_name(tensor.dtype)}
    if not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() and bool(tensor.any()):
        about["range"] = [int(tensor.min()), int(tensor.max())]
    return about


def _core(model: nn.Module, core: str, call: Call) -> tuple[nn.Module, Call]:
    try:
        submodule = model.get_submodule(core)
    except AttributeError as error:
        names = ", ".join(name for name, _ in model.named_children())
        raise CaptureError(f"core={core!r}: no such submodule; have {names}") from error
    seen: list[tuple[tuple[Value, ...], dict[str, Value]]] = []
    handle = submodule.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, dict(kwargs))), with_kwargs=True
    )
    try:
        call.run(model)
    finally:
        handle.remove()
    if not seen:
        raise CaptureError(f"core={core!r}: the model never calls it on this input")
    args, kwargs = seen[0]
    if not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise CaptureError(
            f"core={core!r}: takes something else than tensors; choose a submodule that takes tensors only"
        )
    return submodule, same_call(submodule, args, kwargs)


class _Returned:
    """What the model returned in the trace, in plain containers, and their classes: no attribute of a module, which the
    trace would set back."""

    outputs: Value = None
    classes: dict[str, type]


class _Flat(Wrapper):
    """A model as a function of tensors that returns tensors."""

    def __init__(self, model: nn.Module, call: Call):
        super().__init__(model)
        self.call, self.returned = call, _Returned()

    def forward(self, *tensors: Tensor) -> list[Value]:
        args, kwargs = self.call.arguments(tensors)
        self.returned.classes = {}
        self.returned.outputs = signature.plain(self.model(*args, **kwargs), self.returned.classes)
        return [value for _, value in signature.leaves(self.returned.outputs) if _is_traced(value)]


def _is_traced(value: object) -> bool:
    return isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def _export(flat: _Flat) -> ExportedProgram:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one opaque operator, and inference only
    try:
        return _traced(flat)
    except CaptureError:
        raise
    except Exception as error:
        check_batch_axis(flat.model, flat.call)
        raise CaptureError(explain(flat.model, error, lambda: _traced(flat))) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _traced(flat: _Flat) -> ExportedProgram:
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in flat.call.tensors)
    with _quiet(), free_lengths(flat):
        return torch.export.export(flat, tuple(flat.call.tensors), dynamic_shapes=(free,))


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


def _plain(flat: _Flat, exported: ExportedProgram) -> fx.GraphModule:
    """The same nodes without pytree code: positional tensors in, a tensor or plain containers out, own parameters."""
    tell_of_names(flat.model)
    spell_names(exported)
    unlifted = exported.module(check_guards=False)
    inline(unlifted)
    spell(unlifted)
    wrappers = _wrappers(flat)
    names = iter(flat.call.names)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    clones: dict[int, Tensor] = {}
    for node in unlifted.graph.nodes:
        if node.op == "call_function" and node.target in _CHECKS:
            continue
        if node.op == "output":
            returned = iter(pytree.tree_leaves(node.args[0]))
            graph.output(_filled(flat.returned.outputs, returned, copied))
            continue
        if node.op == "call_function" and node.target in _SAME:
            copied[node] = copied[node.args[0]]
            continue
        if node.op == "call_module":
            raise CaptureError(
                f"the trace kept a call to submodule {node.target!r}; compress a part with core='name.of.submodule'"
            )
        if node.op == "placeholder":
            copied[node] = graph.placeholder(next(names))
            continue
        copied[node] = graph.node_copy(node, lambda value: copied[value])
        copied[node].meta = {"stack": _bare(_user_line(node), wrappers)}
        if node.op == "get_attr":
            original = attribute(unlifted, node.target)
            if not isinstance(original, Tensor):
                raise CaptureError(
                    f"{node.target}: the trace kept a {type(original).__name__}; "
                    "compress a part with core='name.of.submodule'"
                )
            copied[node].target = _bare(node.target, wrappers)
            tensors[str(copied[node].target)] = _clone(original, clones)
    root = nn.Module()
    for name, value in tensors.items():
        set_attribute(root, name, value)
    module = fx.GraphModule(root if tensors else {}, graph)
    module.meta = {}
    return module


def _filled(outputs: Value, returned: Iterator[Value], copied: Mapping[fx.Node, fx.Node]) -> Value:
    """``outputs`` with what the trace returned in place of its tensors."""
    if isinstance(outputs, dict):
        return {key: _filled(value, returned, copied) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        items = [_filled(value, returned, copied) for value in outputs]
        return tuple(items) if isinstance(outputs, tuple) else items
    if not _is_traced(outputs):
        return outputs
    value = next(returned)
    return copied[value] if isinstance(value, fx.Node) else value


def _wrappers(model: nn.Module) -> dict[str, str]:
    """Of each module that only wraps another: its name -> the name of its inside."""
    named = model.named_modules()
    return {spell_name(name, whole=False): inside for name, module in named if (inside := inner_name(module))}


def _bare(name: str, wrappers: Mapping[str, str]) -> str:
    """A dotted name as a graph spells it, without the words of what only wraps a module."""
    place, bare = "", []
    for part in spell_name(name, whole=False).split("."):
        if wrappers.get(place) != part:
            bare.append(part)
        place = f"{place}.{part}" if place else part
    return spell_name(".".join(bare))


def _clone(original: Tensor, clones: dict[int, Tensor]) -> Tensor:
    if id(original) not in clones:
        copied = original.detach().clone()
        clones[id(original)] = (
            nn.Parameter(copied, original.requires_grad) if isinstance(original, nn.Parameter) else copied
        )
    return clones[id(original)]


def _user_line(node: fx.Node) -> str:
    """The deepest module that made the node: ``layer1.0.conv1``; its name for messages and reports."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _share_as(graph: fx.GraphModule, model: nn.Module) -> None:
    """Parameters that are one in the model are one in the graph."""
    wrappers = _wrappers(model)
    names: dict[int, str] = {}
    kept = dict(graph.named_parameters(remove_duplicate=False))
    for long, parameter in model.named_parameters(remove_duplicate=False):
        name = _bare(long, wrappers)
        if name not in kept:
            continue
        first = names.setdefault(id(parameter), name)
        if first != name:
            set_attribute(graph, name, attribute(graph, first))


def _as_batch_norm(graph: fx.GraphModule, kind: Callable[..., Value]) -> None:
    """A normalization by stored statistics in the one form whose lengths torch compares before it reads. In place.

    ``_native_batch_norm_legit_no_training`` (of a decomposed ``.pt2``) does not compare them, and ``instance_norm``
    writes its statistics back, where they were to be read alone.
    """
    for node in graph.graph.find_nodes(op="call_function", target=kind):
        given = arguments(node)
        statistics = [given["running_mean"], given["running_var"]]
        if None in statistics or given.get("use_input_stats") or any(user.args[1:] != (0,) for user in _parts(node)):
            continue
        with graph.graph.inserting_before(node):
            norm = graph.graph.call_function(
                aten.batch_norm.default,
                (
                    *(given[name] for name in ("input", "weight", "bias")),
                    *(*statistics, False, given["momentum"], given["eps"], False),
                ),
            )
        norm.meta = dict(node.meta)
        for reader in _parts(node) or [node]:
            reader.replace_all_uses_with(norm)
            graph.graph.erase_node(reader)
        if not node._erased:
            graph.graph.erase_node(node)


def _parts(node: fx.Node) -> list[fx.Node]:
    """Who takes an element out of the several that a node yields."""
    return [user for user in node.users if user.target is operator.getitem and user.args[0] is node]


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
