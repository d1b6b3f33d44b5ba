import operator

import pytest
import torch
from torch import fx

from rarefy.artifact import allowlist
from rarefy.artifact.allowlist import ANY, LIST, NUMBER, TENSOR, TENSORS, check_call, function_named, name_of
from rarefy.errors import FormatError

aten = torch.ops.aten


def overloads():
    for name in sorted(allowlist.ATEN):
        _, packet, overload = name.split(".")
        if overload in getattr(getattr(aten, packet, None), "overloads", list)():
            yield getattr(getattr(aten, packet), overload)


def test_names_come_back():
    for target in [*overloads(), *(function for function, _ in allowlist.FUNCTIONS.values())]:
        assert function_named(name_of(target)) is target


def test_nothing_in_the_list_reads_files_or_unwritten_memory():
    for overload in overloads():
        kinds = {str(argument.real_type) for argument in overload._schema.arguments}
        assert "Storage" not in kinds and not any("torch.classes" in kind for kind in kinds), overload
        assert "file" not in " ".join(argument.name for argument in overload._schema.arguments), overload
    forbidden = "from_file set resize empty empty_like new_empty empty_strided sparse_coo_tensor data as_strided"
    assert not set(forbidden.split()) & {name.split(".")[1] for name in allowlist.ATEN}


@pytest.mark.parametrize(
    "target", [aten.relu_.default, aten.add.out, aten.from_file.default, aten.empty.memory_format, torch.load, exec, 3]
)
def test_what_is_not_in_the_list_has_no_name(target):
    with pytest.raises(FormatError, match="calls"):
        name_of(target)


@pytest.fixture
def nodes():
    graph = fx.Graph()
    kinds = dict(zip("tsnla", (TENSOR, TENSORS, NUMBER, LIST, ANY), strict=True))
    made = {letter: graph.placeholder(letter) for letter in kinds}
    return made, {node: kinds[letter] for letter, node in made.items()}


def test_calls_of_the_schema_pass(nodes):
    (t, s, n, _, a), yields = nodes[0].values(), nodes[1]
    inf = float("inf")
    for target, args, kwargs, kind in [
        (aten.conv2d.default, (t, t, None, [2, 2], [1, 1], [1, 1], 4), {}, TENSOR),
        (aten.conv2d.padding, (t, t, None, [1, 1], "same"), {}, TENSOR),
        (aten.batch_norm.default, (t, t, t, None, None, True, 0.1, 1e-5, True), {}, TENSOR),
        (aten.add.Tensor, (t, 1), {"alpha": 2}, TENSOR),
        (aten.mul.Tensor, (t, n), {}, TENSOR),
        (aten.masked_fill.Scalar, (t, t, -inf), {}, TENSOR),
        (aten.view.default, (t, [n, -1, 3]), {}, TENSOR),
        (aten.slice.Tensor, (t, 1, 0, 2**63 - 1), {}, TENSOR),
        (aten.index.Tensor, (t, [None, t]), {}, TENSOR),
        (aten.chunk.default, (t, 2, 1), {}, TENSORS),
        (aten.max.dim, (t, 1), {}, TENSORS),
        (aten.cat.default, ([t, a],), {}, TENSOR),
        (aten.cat.default, (s, 1), {}, TENSOR),
        (
            aten.zeros.default,
            ([n, 3],),
            {"dtype": torch.float32, "device": torch.device("cpu"), "layout": torch.strided},
            TENSOR,
        ),
        (aten.clone.default, (t,), {"memory_format": torch.channels_last}, TENSOR),
        (aten.adaptive_avg_pool2d.default, (t, 1), {}, TENSOR),
        (aten.upsample_nearest2d.vec, (t, None, [2.0, 2.0]), {}, TENSOR),
        (aten.sym_size.int, (t, 0), {}, NUMBER),
        (operator.getitem, (s, 1), {}, TENSOR),
        (operator.mul, (n, 3), {}, NUMBER),
        (operator.pow, (n, 2), {}, NUMBER),
    ]:
        assert check_call(target, args, kwargs, yields) == kind, target


@pytest.mark.parametrize("largest", [allowlist.WIDEST, -allowlist.WIDEST])
@pytest.mark.parametrize(
    ("target", "argument", "before"),
    [
        (aten.max_pool2d.default, "kernel_size", ()),
        (aten.max_pool2d.default, "padding", ([2, 2], [1, 1])),
        (aten.max_pool2d.default, "dilation", ([2, 2], [1, 1], [0, 0])),
        (aten.pad.default, "pad", ()),
        (aten.conv_transpose2d.input, "output_padding", ("t", None, [1, 1], [0, 0])),
    ],
)
def test_what_a_window_spans_is_bounded(nodes, target, argument, before, largest):
    (t, *_), yields = nodes[0].values(), nodes[1]
    args = (t, *(t if value == "t" else value for value in before))
    assert argument in allowlist._SPANS and target._schema.arguments[len(args)].name == argument
    assert check_call(target, (*args, [1, largest]), {}, yields) == TENSOR
    with pytest.raises(FormatError, match=f"{argument} = .* is too large"):
        check_call(target, (*args, [1, largest + (1 if largest > 0 else -1)]), {}, yields)


@pytest.mark.parametrize(
    ("target", "argument", "before"),
    [
        (aten.zeros.default, "size", ()),
        (aten.unflatten.int, "sizes", ("t", 0)),
        (aten.reshape.default, "shape", ("t",)),
        (aten.repeat.default, "repeats", ("t",)),
        (aten.tile.default, "dims", ("t",)),
        (aten.adaptive_avg_pool2d.default, "output_size", ("t",)),
    ],
)
def test_the_product_of_sizes_is_bounded(nodes, target, argument, before):
    (t, *_), yields = nodes[0].values(), nodes[1]
    args = tuple(t if value == "t" else value for value in before)
    assert argument in allowlist._SIZES and target._schema.arguments[len(args)].name == argument
    assert check_call(target, (*args, [2, allowlist.MOST_ELEMENTS // 2]), {}, yields) == TENSOR
    with pytest.raises(FormatError, match=f"{argument} = .* is too large"):
        check_call(target, (*args, [2, allowlist.MOST_ELEMENTS // 2 + 1]), {}, yields)


def test_other_calls_are_refused(nodes):
    (t, s, n, several, _), yields = nodes[0].values(), nodes[1]
    for target, args, kwargs, words in [
        (aten.relu.default, (), {}, "lacks its argument 'self'"),
        (aten.relu.default, (t, t), {}, "takes 1 arguments, not 2"),
        (aten.relu.default, (t,), {"x": 1}, "no argument 'x'"),
        (aten.relu.default, (t,), {"self": t}, "no argument 'self' twice"),
        (aten.relu.default, ("x",), {}, "self must be Tensor"),
        (aten.relu.default, (s,), {}, "self must be Tensor"),
        (aten.relu.default, (None,), {}, "self must be Tensor"),
        (aten.softmax.int, (t, 1.0), {}, "dim must be int"),
        (aten.softmax.int, (t, True), {}, "dim must be int"),
        (aten.softmax.int, (t, t), {}, "dim must be int"),
        (aten.softmax.int, (t, 1, "float32"), {}, "dtype must be"),
        (aten.cat.default, (t,), {}, "tensors must be"),
        (aten.view.default, (t, ["3"]), {}, "size must be"),
        (aten.zeros.default, ([2**16, 2**16],), {}, "too large"),
        (aten.constant_pad_nd.default, (t, [2**17]), {}, "too large"),
        (aten.arange.default, (1e300,), {}, "too large"),
        (operator.getitem, (t, 0), {}, "element of a list"),
        (operator.getitem, (s, "x"), {}, "whole number"),
        (operator.mul, (several, 10**9), {}, "takes numbers, not the list l"),
        (operator.mul, ("x", 10**9), {}, "takes numbers, not 'x'"),
        (operator.pow, (n, n), {}, "exponent"),
        (operator.add, (n,), {}, "takes 2 arguments, not 1"),
    ]:
        with pytest.raises(FormatError, match=words) as refusal:
            check_call(target, args, kwargs, yields)
        assert "\n" not in str(refusal.value)
