"""repair(): what pruning broke, mended on a few hundred images, without labels and without training.

Both networks run side by side, node by node over all images at once, so that each layer is mended on what the mended layers before it yield, in
one pass:

* **Reconstruction** (He et al., arXiv 1707.06168). A convolution or linear layer behind anything that was cut gets the weights whose output is nearest
  the original layer's, on the channels that are left:

      min over D, b  of  || (W + D) X + b - Y ||^2 + r g ||D||^2

  W: the pruned weights, X: patches of what the layer now reads (K numbers each), Y: the original's output, g: mean of X^2. D is the solution of K linear
  equations in float64, for each group of a grouped convolution apart. b goes into the bias, or without one into the running mean of the batch norm that
  follows; with neither it is 0. The ridge r is chosen from ``RIDGES`` by the error on every fourth image, which the fit did not see; where none lowers
  that error, the layer stays as it is. Then all images are fitted with it.
* **Batch norm** gets the exact mean and variance, over all images, of what it now reads.

A quarter of the images judges, so a layer is not made worse on images of the same kind. Given up: layers whose weight several nodes read, and
transposed convolutions, are left alone; and so is the shortcut of a residual block, whose lost channels only the layers behind it can make up for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.errors import CheckFailed, DataError, InputError
from rarefy.graph import im2col
from rarefy.graph.capture import as_graph
from rarefy.graph.layers import layer_name, weighted
from rarefy.graph.nodes import attribute, device_of, is_tensor, set_attribute, share_copy
from rarefy.graph.shapes import shapes
from rarefy.pruning.records import followed
from rarefy.system.progress import track

aten = torch.ops.aten

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_JUDGE = 4  # every so many images, one judges


def repair(
    graph: fx.GraphModule,
    original: nn.Module,
    data: Any,
    *,
    images: int = 512,
    batch_size: int = 64,
    batchnorm: bool = True,
    reconstruct: bool = True,
    memory: float = 4e9,
    seed: int = 0,
    progress: bool = False,
) -> fx.GraphModule:
    """A new graph: ``graph`` with weights and statistics mended to answer like ``original``; both are left as they are.

    graph: what ``prune`` made of ``original`` (channels are matched by its record).
    data: a task (images of its training split, no labels), or batches (N, ...) of inputs.
    images: how many, 512 as usual.  batch_size: of those that a task gives.
    batchnorm: re-estimate batch norm.  reconstruct: solve layers again.
    memory: bytes that activations may take; where they do not fit, fewer images are used (the record says how many).

    The record in ``meta["history"]`` holds, for each layer, the share of the output's variance that was wrong before and after (on the images that judge)
    and the ridge. Raises InputError where ``graph`` was not pruned from ``original``, DataError without enough images, CheckFailed for NaN.
    """
    if images < 8 or batch_size < 1 or not memory > 0:
        raise InputError(
            f"images={images}, batch_size={batch_size}, memory={memory}: repair needs at least 8 images, and positive numbers"
        )
    if not (batchnorm or reconstruct):
        raise InputError("repair: batchnorm and reconstruct are both off; leave at least one on")
    kept = kept_channels(graph, original)
    small, wide = share_copy(graph).eval(), share_copy(as_graph(original)).eval()
    fits = int(memory // max(_peak(small) + _peak(wide), 1))
    if fits < 8:
        raise InputError(
            f"repair: memory={memory:.3g} bytes hold the activations of {fits} images; raise it to at least {8 * memory / max(fits, 1):.2g}"
        )
    batches = _batches(small, data, min(images, fits), batch_size, seed)
    run = _Repair(small, wide, batches, kept, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        run.all(batchnorm, reconstruct, progress)
    small.train(graph.training)
    small.meta = {**graph.meta, "history": [*graph.meta.get("history", [])]}
    small.meta["history"].append(
        {
            "step": "repair",
            "options": {"images": images, "batchnorm": batchnorm, "reconstruct": reconstruct, "seed": seed},
            "facts": {"images": run.images, "reconstructed": run.layers, "reestimated": run.norms},
        }
    )
    return small


def kept_channels(graph: fx.GraphModule, original: nn.Module) -> dict[str, Tensor]:
    """Weight name -> positions of the original's output channels that are left, int64; layers that lost none are left out.

    Raises InputError where the records of pruning do not lead from ``original`` to ``graph``.
    """
    begun = len(original.meta.get("history", [])) if isinstance(original, fx.GraphModule) else 0
    records = [record["facts"] for record in graph.meta.get("history", [])[begun:] if record.get("step") == "prune"]
    if not records:
        raise InputError(
            "repair: the graph has no record of pruning that the original has not; pass what prune() returned, and what it was given"
        )
    found = followed(records)
    wide = dict(original.named_parameters(remove_duplicate=False))
    for name, weight in graph.named_parameters(remove_duplicate=False):
        first = records[0]["channels"].get(name)
        if first is not None and (
            name not in wide
            or first[0] not in wide[name].shape
            or len(found.get(name, range(first[0]))) not in weight.shape
        ):
            raise InputError(
                f"repair: {name}: the original is not what the graph was pruned from; pass the model that prune() was given"
            )
    return found


# ------------------------------------------------------------------------------------------------------------------ running


class _Stream:
    """A graph run node by node over all batches; a value is let go after its last reader."""

    def __init__(self, graph: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]):
        self.graph, self.batches = graph, batches
        self.values: dict[fx.Node, list[Any]] = {}
        self.left = {node: len(node.users) for node in graph.graph.nodes}
        self.inputs = iter(range(len(batches[0])))

    def run(self, node: fx.Node) -> list[Any]:
        """The node's value for each batch."""
        if node.op == "placeholder":
            place = next(self.inputs)
            made = [batch[place] for batch in self.batches]
        elif node.op == "get_attr":
            made = [attribute(self.graph, node)] * len(self.batches)
        else:
            made = [self._call(node, index) for index in range(len(self.batches))]
        if node.users:
            self.values[node] = made
        for source in node.all_input_nodes:
            self.left[source] -= 1
            if not self.left[source]:
                self.values.pop(source, None)
        return made

    def _call(self, node: fx.Node, index: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self.values[source][index])
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Repair:
    """layers: one a weight that was looked at; norms: the batch norms that got new statistics."""

    def __init__(
        self,
        small: fx.GraphModule,
        wide: fx.GraphModule,
        batches: list[tuple[Tensor, ...]],
        kept: dict[str, Tensor],
        generator: torch.Generator,
    ):
        self.small, self.wide, self.kept, self.generator = small, wide, kept, generator
        self.ours, self.theirs = _Stream(small, batches), _Stream(wide, batches)
        self.images = sum(len(batch[0]) for batch in batches)
        starts = itertools.accumulate((len(batch[0]) for batch in batches), initial=0)
        self.judges = [
            torch.arange(start, start + len(batch[0])) % _JUDGE == _JUDGE - 1
            for start, batch in zip(starts, batches, strict=False)
        ]
        self.axes = _image_axes(small)
        self.layers: list[dict[str, Any]] = []
        self.norms: list[str] = []

    def all(self, batchnorm: bool, reconstruct: bool, progress: bool) -> None:
        waiting = iter(self.wide.graph.nodes)
        last = {node.name for node in self.wide.graph.nodes}
        changed = _changed(self.small, self.wide)
        for node in track(list(self.small.graph.nodes), None, "repair", progress):
            if node.op == "output":
                return
            layer = reconstruct and node in changed and node in self.axes and _alone(self.small, node)
            theirs: list[Any] | None = None
            if node.name in last and (layer or node.op == "placeholder"):
                for other in waiting:
                    theirs = self.theirs.run(other)
                    if other.name == node.name:
                        break
            if layer and theirs is not None:
                self._reconstruct(node, theirs)
            if batchnorm and node in changed and node.target is aten.batch_norm.default and _alone(self.small, node, 3):
                self._reestimate(node)
            self.ours.run(node)

    def _replace(self, node: Any, value: Tensor) -> None:
        """A new tensor in the place of the one that ``node`` reads, of its type; the old one is left as it is."""
        old = attribute(self.small, node)
        value = value.to(dtype=old.dtype, device=old.device)
        value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        set_attribute(self.small, str(node.target), value)
        if node in self.ours.values:
            self.ours.values[node] = [value] * len(self.ours.batches)

    def _reestimate(self, node: fx.Node) -> None:
        """Mean and variance (unbiased, as batch norm keeps it) a channel, over images and positions."""
        sums, count = torch.zeros((), dtype=torch.float64), 0
        for value in self.ours.values[node.args[0]]:  # type: ignore[index]
            flat = value.transpose(0, 1).flatten(1).double()
            sums = sums.to(flat.device) + torch.stack((flat.sum(1), flat.square().sum(1)))
            count += flat.shape[1]
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp_min(0) * count / max(count - 1, 1)
        self._replace(node.args[3], mean)
        self._replace(node.args[4], variance)
        self.norms.append(str(node.args[3].target).rpartition(".")[0])  # type: ignore[union-attr]

    def _reconstruct(self, node: fx.Node, theirs: list[Tensor]) -> None:
        weight = attribute(self.small, node.args[1]).detach()
        bias_node = node.args[2] if len(node.args) > 2 else None
        norm = _norm_behind(self.small, node) if bias_node is None else None
        shifts = norm is not None or (bias_node is not None and _alone(self.small, node, 2))
        axis = -1 if node.target is aten.linear.default else 1
        kept = self.kept.get(str(node.args[1].target))  # type: ignore[union-attr]
        groups = im2col.groups_of(node)
        own = weight.reshape(groups, weight.shape[0] // groups, -1)
        bias = None if bias_node is None else attribute(self.small, bias_node).detach()
        fit, judge = _Normal(own, bias), _Normal(own, bias)
        sources = self.ours.values[node.args[0]]  # type: ignore[index]
        for source, wanted, judges in zip(sources, theirs, self.judges, strict=True):
            source, wanted = (value.movedim(self.axes[node], 0) for value in (source, wanted))
            wanted = wanted if kept is None else wanted.index_select(axis, kept.to(wanted.device))
            x, y = _pairs(node, source, wanted, weight.shape, groups, self.generator)
            judges = judges.repeat_interleave(len(x) // len(judges)).to(
                x.device
            )  # (windows of an image lie side by side)
            fit.add(x[~judges], y[~judges])
            judge.add(x[judges], y[judges])
        where = layer_name(node)
        if not math.isfinite(judge.total + fit.total):
            raise CheckFailed(f"{where}: yields NaN or infinity on the images; check the weights and the normalisation")
        before = judge.error(None, None)
        best: tuple[float, float | None] = (before, None)
        for ridge in RIDGES:
            change, shift = fit.solve(ridge, shifts)
            best = min(best, (judge.error(change, shift), ridge), key=lambda found: found[0])
        scale = max(judge.variance, 1e-30)
        self.layers.append({"name": where, "wrong_before": before / scale, "wrong": best[0] / scale, "ridge": best[1]})
        if best[1] is None:
            return
        fit.merge(judge)
        change, shift = fit.solve(best[1], shifts)
        self._replace(node.args[1], (own.double() + change).reshape(weight.shape))
        if shift is not None and bias is not None:
            self._replace(bias_node, bias.double() + shift)
        elif shift is not None and norm is not None:
            self._replace(norm.args[3], attribute(self.small, norm.args[3]).double() - shift)


# ------------------------------------------------------------------------------------------------------------ least squares


class _Normal:
    """Normal equations of the change D (groups, outputs, K) of a layer's weights, summed over batches in float64.

    gram: (groups, K, K) sum x x'; cross: (groups, outputs, K) sum e x', e the error of the weights as they are; sums of both; total: sum e^2.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        groups, outputs, inputs = weight.shape
        self.weight, self.bias = weight, bias
        self.gram = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=weight.device)
        self.cross = torch.zeros(groups, outputs, inputs, dtype=torch.float64, device=weight.device)
        self.x, self.e, self.y = (
            self.cross.new_zeros(groups, inputs),
            self.cross.new_zeros(groups, outputs),
            self.cross.new_zeros(groups, outputs),
        )
        self.around: Tensor | None = None
        self.squares = self.total = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (N, groups, K, places); y: (N, groups, outputs, places)."""
        x, y = (value.permute(1, 2, 0, 3).flatten(2).float() for value in (x, y))  # (groups, K or outputs, samples)
        e = y - self.weight.float() @ x
        if self.bias is not None:
            e = e - self.bias.float().reshape(len(e), -1, 1)
        # Around the first batch's mean, so that products in float32 keep what varies; then moved back in float64.
        self.around = x.mean(2, keepdim=True) if self.around is None else self.around
        near, far = x - self.around, self.around.double()
        moved, sum_e = near.double().sum(2, keepdim=True), e.double().sum(2)
        self.gram += (near @ near.mT).double() + far @ moved.mT + moved @ far.mT + x.shape[2] * far @ far.mT
        self.cross += (e @ near.mT).double() + sum_e.unsqueeze(2) @ far.mT
        self.x, self.e, self.y = self.x + x.double().sum(2), self.e + sum_e, self.y + y.double().sum(2)
        self.total += float(e.double().square().sum())
        self.squares += float(y.double().square().sum())
        self.count += x.shape[2]

    def merge(self, other: _Normal) -> None:
        for name in ("gram", "cross", "x", "e", "y", "total", "squares", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def variance(self) -> float:
        """Of the wanted outputs, a sample (summed over outputs)."""
        return (self.squares - float(self.y.square().sum()) / max(self.count, 1)) / max(self.count, 1)

    def solve(self, ridge: float, shifts: bool) -> tuple[Tensor, Tensor | None]:
        """D (groups, outputs, K), and the shift (outputs,) of the output, if there may be one. Equations that can't be solved ask for no change."""
        count = max(self.count, 1)
        mean_x, mean_e = self.x / count, self.e / count
        gram, cross = self.gram / count, self.cross / count
        if shifts:
            gram = gram - mean_x.unsqueeze(2) * mean_x.unsqueeze(1)
            cross = cross - mean_e.unsqueeze(2) * mean_x.unsqueeze(1)
        size = gram.shape[-1]
        level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        damped = gram + (ridge * level).view(-1, 1, 1) * torch.eye(size, dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        change = torch.cholesky_solve(cross.mT, factor).mT if not bool(failed.any()) else torch.zeros_like(cross)
        return change, (mean_e - (change @ mean_x.unsqueeze(2)).squeeze(2)).reshape(-1) if shifts else None

    def error(self, change: Tensor | None, shift: Tensor | None) -> float:
        """Mean over samples of |e - D x - shift|^2, summed over outputs."""
        total = self.total
        if change is not None:
            total += float(((change @ self.gram) * change).sum() - 2 * (change * self.cross).sum())
        if shift is not None:
            own = shift.reshape(self.e.shape)
            moved = self.e if change is None else self.e - (change @ self.x.unsqueeze(2)).squeeze(2)
            total += float(self.count * own.square().sum() - 2 * (own * moved).sum())
        return max(total, 0.0) / max(self.count, 1)


def _image_axes(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """For the output of each layer, the axis that grows with the number of images; layers that have not one such axis are left out."""
    two, three = shapes(graph, 2), shapes(graph, 3)
    found = {}
    for node in filter(weighted, graph.graph.nodes):
        grows = [
            axis
            for axis, (one, other) in enumerate(zip(two[node].shape, three[node].shape, strict=True))
            if one != other
        ]
        if len(grows) == 1 and grows[0] < two[node].dim() - 1 and (grows[0] == 0 or node.target is aten.linear.default):
            found[node] = grows[0]
    return found


def _pairs(
    node: fx.Node, source: Tensor, wanted: Tensor, shape: Sequence[int], groups: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the layer reads, (N, groups, K, places), and what it should make of it, (N, groups, outputs, places), at places drawn once a batch."""
    place = im2col.draw(im2col.plane(node, source, shape), generator, source.device)
    return im2col.unfold(node, source, shape, groups, place), im2col.outputs(node, wanted, groups, place)


# ------------------------------------------------------------------------------------------------------------------- graphs


def _alone(graph: fx.GraphModule, node: fx.Node, place: int = 1) -> bool:
    """Is the stored tensor at that place of the arguments read by this node only, under one name?"""
    source = node.args[place]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    tensor = attribute(graph, source)
    readers = {
        user
        for other in graph.graph.nodes
        if other.op == "get_attr" and attribute(graph, other) is tensor
        for user in other.users
    }
    names = [
        name
        for name, value in [
            *graph.named_parameters(remove_duplicate=False),
            *graph.named_buffers(remove_duplicate=False),
        ]
        if value is tensor
    ]
    return len(readers) == 1 and len(names) == 1


def _norm_behind(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The batch norm that alone reads ``node`` and has running statistics of its own."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    found = (
        reader is not None
        and reader.target is aten.batch_norm.default
        and reader.args[0] is node
        and _alone(graph, reader, 3)
    )
    return reader if found else None


def _changed(small: fx.GraphModule, wide: fx.GraphModule) -> set[fx.Node]:
    """Nodes of the small graph whose input is not the original's: behind a parameter of another size, but for the layers that only make less."""
    found: set[fx.Node] = set()
    for node in small.graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in found for source in node.all_input_nodes) or _reads_less(small, wide, node):
            found.add(node)
    return found


def _reads_less(small: fx.GraphModule, wide: fx.GraphModule, node: fx.Node) -> bool:
    """A layer of which input channels are gone. One that only makes fewer outputs makes those as before, and so does batch norm."""
    if not weighted(node) or im2col.groups_of(node) > 1:
        return False
    name = str(node.args[1].target)  # type: ignore[union-attr]
    try:
        return bool(attribute(small, name).shape[1] < attribute(wide, name).shape[1])
    except AttributeError:
        return True


def _peak(graph: fx.GraphModule) -> int:
    """Bytes of the activations of one sample that are alive at once."""
    found = shapes(graph, 1)
    left = {node: len(node.users) for node in graph.graph.nodes}
    size = {
        node: sum(
            item.numel() * item.element_size()
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if is_tensor(item)
        )
        for node, value in found.items()
        if node.op not in ("get_attr", "output")
    }
    alive = most = 0
    for node in graph.graph.nodes:
        alive += size.get(node, 0)
        most = max(most, alive)
        for source in node.all_input_nodes:
            left[source] -= 1
            if not left[source]:
                alive -= size.get(source, 0)
    return most


def _batches(graph: fx.GraphModule, data: Any, images: int, batch_size: int, seed: int) -> list[tuple[Tensor, ...]]:
    """At most ``images`` samples. Raises DataError where there are fewer than 8, InputError for another shape."""
    device = device_of(graph)
    given: Iterable[Any] = (
        data if not hasattr(data, "inputs") else data.inputs("train", images, batch_size, seed=seed, device=device)
    )
    batches = list(_limited(given, images, device))
    shape = [spec["shape"] for spec in graph.meta["inputs"]]
    for batch in batches:
        if [list(value.shape[1:]) for value in batch] != shape:
            found = [list(value.shape) for value in batch]
            raise InputError(f"repair: a batch of shape {found}; the model takes (N, {', '.join(map(str, shape[0]))})")
    count = sum(len(batch[0]) for batch in batches)
    if count < 8:
        raise DataError(f"repair: {count} images are too few; give at least 8 (512 are a good number)")
    return batches


def _limited(batches: Iterable[Any], images: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    left = images
    for batch in batches:
        values = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        yield tuple(value[:left].to(device) for value in values)
        left -= len(values[0])
        if left <= 0:
            return
