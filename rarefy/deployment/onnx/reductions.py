"""Rows of the operators that take axes together: sums, means, extremes, norms, and the order of values."""

from __future__ import annotations

import math
import operator
from functools import partial

import torch
from torch import fx

from rarefy.deployment.onnx.writer import Arguments, Row, Untranslated, Writer


def _axes(w: Writer, g: Arguments) -> list[int]:
    dims, rank = g.get("dim"), w.rank(g["self"])
    dims = [dims] if isinstance(dims, int) else dims
    return sorted(dim % rank for dim in dims) if dims else list(range(rank))


def _reduce(w: Writer, node: fx.Node, g: Arguments, kind: str) -> str:
    name, axes = w.value(g["self"], w.dtype(node)), _axes(w, g)
    if kind == "ReduceMean" and w.rank(g["self"]) == 4 and axes == [2, 3] and g["keepdim"]:
        return w.op("GlobalAveragePool", [name])
    return w.op(kind, [name, w.constant(axes)], keepdims=int(g.get("keepdim", False)))


def _extreme(w: Writer, node: fx.Node, g: Arguments, kind: str) -> list[str]:
    name, keep = w.value(g["self"]), int(g["keepdim"])
    return [
        w.op(f"Reduce{kind}", [name, w.constant([g["dim"]])], keepdims=keep),
        w.op(f"Arg{kind}", [name], axis=g["dim"], keepdims=keep),
    ]


def _place_of(w: Writer, node: fx.Node, g: Arguments, kind: str) -> str:
    if g["dim"] is None:
        raise Untranslated(f"{node.name}: {node.target} over everything")
    return w.op(kind, [w.value(g["self"])], axis=g["dim"], keepdims=int(g["keepdim"]))


def _variance(w: Writer, node: fx.Node, g: Arguments) -> str:
    axes, source, dtype = _axes(w, g), g["self"], w.dtype(node)
    name, over = w.value(source), w.constant(axes)
    count = math.prod(w.fixed(source, axis) for axis in axes)
    away = w.op("Sub", [name, w.op("ReduceMean", [name, over], keepdims=1)])
    sums = w.op("ReduceSum", [w.op("Mul", [away, away]), over], keepdims=int(g["keepdim"]))
    correction = g.get("correction", 1 if g.get("unbiased", True) else 0)
    return w.op("Div", [sums, w.constant(float(count - (1 if correction is None else correction)), dtype)])


def _vector_norm(w: Writer, node: fx.Node, g: Arguments) -> str:
    order = g.get("ord", g.get("p", 2))
    if order not in (1, 2, None):
        raise Untranslated(f"{node.name}: a norm of order {order}")
    kind = "ReduceL1" if order == 1 else "ReduceL2"
    return w.op(kind, [w.value(g["self"]), w.constant(_axes(w, g))], keepdims=int(g["keepdim"]))


def _top(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    options = {"axis": g["dim"], "largest": int(g["largest"]), "sorted": int(g["sorted"])}
    return w.ops("TopK", [w.value(g["self"]), w.vector([g["k"]])], 2, **options)


def _sorted(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    """Equal numbers stay in their order, in ONNX too."""
    axis = g.get("dim", 0) % w.rank(g["self"])
    size = w.constant([w.fixed(g["self"], axis)])
    return w.ops("TopK", [w.value(g["self"]), size], 2, axis=axis, largest=int(g.get("descending", False)), sorted=1)


def _kth(w: Writer, node: fx.Node, g: Arguments) -> list[str]:
    """kthvalue, and median, the lower of the middle two: the last of the k smallest."""
    axis = g["dim"] % w.rank(g["self"])
    k = w.plain(g["k"]) if "k" in g else (w.fixed(g["self"], axis) + 1) // 2
    if k is None:
        raise Untranslated(f"{node.name}: a place that moves with the batch")
    smallest = w.ops("TopK", [w.value(g["self"]), w.constant([k])], 2, axis=axis, largest=0, sorted=1)
    place = w.constant([k - 1] if g["keepdim"] else k - 1)
    return [w.op("Gather", [name, place], axis=axis) for name in smallest]


def _running(w: Writer, node: fx.Node, g: Arguments, kind: str, neutral: float) -> str:
    """A product or an extreme of all up to each place: of the rows of a triangle."""
    source, dtype = g["self"], w.dtype(g["self"])
    axis, shape = g["dim"] % w.rank(source), w.shape(source)
    size = w.fixed(source, axis)
    if size > LONGEST:
        raise Untranslated(f"{node.name}: {kind} running over {size} places, more than {LONGEST}")
    sides = [1] * (len(shape) + 1)
    sides[axis] = sides[axis + 1] = size
    seen = w.constant(torch.ones(size, size).tril().bool().reshape(sides).tolist(), torch.bool)
    apart = w.op("Unsqueeze", [w.value(source, dtype), w.constant([axis])])
    return w.op(kind, [w.op("Where", [seen, apart, w.constant(neutral, dtype)]), w.constant([axis + 1])], keepdims=0)


def _running_extreme(w: Writer, node: fx.Node, g: Arguments, kind: str, neutral: float) -> list[str]:
    if any(user.target is operator.getitem and user.args[1] == 1 for user in node.users):
        raise Untranslated(f"{node.name}: places of a running extreme")
    return [_running(w, node, g, kind, neutral)]


LONGEST = 1024  # of an axis that a triangle is made of
ROWS: dict[str, Row] = {
    "mean.dim mean": partial(_reduce, kind="ReduceMean"),
    "sum.dim_IntList sum": partial(_reduce, kind="ReduceSum"),
    "amax max": partial(_reduce, kind="ReduceMax"),
    "amin min": partial(_reduce, kind="ReduceMin"),
    "prod.dim_int": partial(_reduce, kind="ReduceProd"),
    "logsumexp": partial(_reduce, kind="ReduceLogSumExp"),
    "max.dim": partial(_extreme, kind="Max"),
    "min.dim": partial(_extreme, kind="Min"),
    "argmax": partial(_place_of, kind="ArgMax"),
    "argmin": partial(_place_of, kind="ArgMin"),
    "var.correction var.dim": _variance,
    "std.correction std.dim": lambda w, node, g: w.op("Sqrt", [_variance(w, node, g)]),
    "linalg_vector_norm norm.ScalarOpt_dim": _vector_norm,
    "cumsum": lambda w, node, g: w.op("CumSum", [w.value(g["self"], w.dtype(node)), w.constant(g["dim"])]),
    "cumprod": partial(_running, kind="ReduceProd", neutral=1.0),
    "cummax": partial(_running_extreme, kind="ReduceMax", neutral=-math.inf),
    "cummin": partial(_running_extreme, kind="ReduceMin", neutral=math.inf),
    "topk": _top,
    "sort sort.stable": _sorted,
    "argsort argsort.stable": lambda w, node, g: _sorted(w, node, g)[1],
    "msort": lambda w, node, g: _sorted(w, node, g)[0],
    "median.dim kthvalue": _kth,
    "aminmax": lambda w, node, g: [_reduce(w, g["self"], g, kind) for kind in ("ReduceMin", "ReduceMax")],
}
