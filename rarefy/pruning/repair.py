"""repair(): what pruning broke, mended on a few hundred images, without labels and without training.

Both networks run side by side, node by node over all images at once, so that each layer is mended on what the mended
layers before it yield, in one pass:

* **Reconstruction** (He et al., arXiv 1707.06168). A convolution or linear layer behind anything that was cut gets the
  weights whose output is nearest the original layer's, on the channels that are left:

      min over D, b  of  || (W + D) X + b - Y ||^2 + r g ||D||^2

  W: the pruned weights, X: patches of what the layer now reads (K numbers each), Y: the original's output, g: mean of
  X^2. D is the solution of K linear equations in float64, for each group of a grouped convolution apart. b goes into
  the bias, or without one into the running mean of the batch norm that follows; with neither it is 0. The ridge r is
  chosen from ``RIDGES`` by the error on every fourth image, which the fit did not see; where none lowers that error,
  the layer stays as it is. Then all images are fitted with it.
* **Batch norm** gets the exact mean and variance, over all images, of what it now reads.

A quarter of the images judges, so a layer is not made worse on images of the same kind. Given up: layers whose weight
several nodes read, and transposed convolutions, are left alone; and so is the shortcut of a residual block, whose lost
channels only the layers behind it can make up for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from rarefy.errors import CheckFailed, DataError, InputError
from rarefy.graph import history, im2col
from rarefy.graph.capture.batches import Arranger, each
from rarefy.graph.interpreter import Rule, call, steps
from rarefy.graph.layers import layer_name, weighted
from rarefy.graph.nodes import Value, argument, attribute, device_of, is_tensor, set_attribute, share_copy
from rarefy.graph.shapes import shapes
from rarefy.pruning.least_squares import NormalEquations
from rarefy.pruning.records import followed
from rarefy.system.progress import track
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task

Batches = Iterable[Tensor | Sequence[Tensor]]

aten = torch.ops.aten

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_JUDGE = 4  # every so many images, one judges


def repair(
    graph: fx.GraphModule,
    original: nn.Module,
    data: Task | Batches,
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

    The record in ``meta["history"]`` holds, for each layer, the share of the output's variance that was wrong before
    and after (on the images that judge) and the ridge. Raises InputError where ``graph`` was not pruned from
    ``original``, DataError without enough images, CheckFailed for NaN.
    """
    if images < 8 or batch_size < 1 or not memory > 0:
        raise InputError(
            f"images={images}, batch_size={batch_size}, memory={memory}: repair needs at least 8 images, and positive "
            "numbers"
        )
    if not (batchnorm or reconstruct):
        raise InputError("repair: batchnorm and reconstruct are both off; leave at least one on")
    kept = kept_channels(graph, original)
    small, wide = share_copy(graph).eval(), share_copy(capture(original)).eval()
    fits = int(memory // max(_peak(small) + _peak(wide), 1))
    if fits < 8:
        raise InputError(
            f"repair: memory={memory:.3g} bytes hold the activations of {fits} images; raise it to at least "
            f"{8 * memory / max(fits, 1):.2g}"
        )
    batches = _batches(small, data, min(images, fits), batch_size, seed)
    run = Repair(small, wide, batches, kept, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        run.all(batchnorm, reconstruct, progress)
    small.train(graph.training)
    small.meta = dict(graph.meta)
    options = {"images": images, "batchnorm": batchnorm, "reconstruct": reconstruct, "seed": seed}
    facts = {"images": run.images, "reconstructed": run.layers, "reestimated": run.norms}
    history.append(small, "repair", options, facts)
    return small


def kept_channels(graph: fx.GraphModule, original: nn.Module) -> dict[str, Tensor]:
    """Weight name -> positions of the original's output channels that are left, int64; layers that lost none are left
    out.

    Raises InputError where the records of pruning do not lead from ``original`` to ``graph``.
    """
    records = [record["facts"] for record in history.since(graph, original) if record.get("step") == "prune"]
    if not records:
        raise InputError(
            "repair: the graph has no record of pruning that the original has not; pass what prune() returned, and "
            "what it was given"
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
                f"repair: {name}: the original is not what the graph was pruned from; pass the model that prune() was "
                "given"
            )
    return found


# ------------------------------------------------------------------------------------------------------------ running

Values = list[Value]  # what a node yields, one a batch


class Repair:
    """Both networks side by side over all batches; a layer of the small one is mended just before it runs.

    layers: one a weight that was looked at.  norms: the batch norms that got new statistics.
    """

    def __init__(
        self,
        small: fx.GraphModule,
        original: fx.GraphModule,
        batches: list[tuple[Tensor, ...]],
        kept: Mapping[str, Tensor],
        generator: torch.Generator,
    ):
        self.small, self.batches, self.kept, self.generator = small, batches, kept, generator
        self.images = sum(len(batch[0]) for batch in batches)
        starts = itertools.accumulate((len(batch[0]) for batch in batches), initial=0)
        self.judges = [
            torch.arange(start, start + len(batch[0])) % _JUDGE == _JUDGE - 1
            for start, batch in zip(starts, batches, strict=False)
        ]
        self.axes = _image_axes(small)
        self.changed = _changed(small, original)
        self.names = {node.name for node in original.graph.nodes}
        self.theirs = self._run(original, functools.partial(self._called, original))
        self.layers: list[dict[str, object]] = []
        self.norms: list[str] = []

    def all(self, batchnorm: bool, reconstruct: bool, progress: bool) -> None:
        def mended(node: fx.Node, live: Mapping[fx.Node, Value]) -> Values:
            if node in self.changed:
                if reconstruct and node in self.axes and node.name in self.names and _alone(self.small, node, "weight"):
                    self._reconstruct(node, live)
                if batchnorm and _has_statistics(self.small, node):
                    self._reestimate(node, live)
            return self._called(self.small, node, live)

        for _ in track(self._run(self.small, mended), None, "repair", progress):
            pass

    def _run(self, graph: fx.GraphModule, rule: Rule) -> Iterator[tuple[fx.Node, Value]]:
        """Each node and what it yields, a list with one value a batch."""
        *nodes, _ = graph.graph.nodes
        inputs = [node for node in nodes if node.op == "placeholder"]
        live: dict[fx.Node, Value] = dict(zip(inputs, map(list, zip(*self.batches, strict=True)), strict=True))
        return steps(graph, nodes, live, rule)

    def _called(self, graph: fx.GraphModule, node: fx.Node, live: Mapping[fx.Node, Value]) -> Values:
        """Stored tensors are read as they are now."""
        stored = {source: attribute(graph, source) for source in node.all_input_nodes if source.op == "get_attr"}
        others = [source for source in node.all_input_nodes if source.op != "get_attr"]
        count = len(self.batches)
        return [call(node, stored | {source: live[source][index] for source in others}) for index in range(count)]

    def _replace(self, node: fx.Node, value: Tensor) -> None:
        """A new tensor in the place of the one that ``node`` reads, of its type; the old one is left as it is."""
        old = attribute(self.small, node)
        value = value.to(dtype=old.dtype, device=old.device)
        value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        set_attribute(self.small, str(node.target), value)

    def _reestimate(self, node: fx.Node, live: Mapping[fx.Node, Value]) -> None:
        """Mean and variance (unbiased, as batch norm keeps it) a channel, over images and positions."""
        sums, count = torch.zeros((), dtype=torch.float64), 0
        for value in live[argument(node, "input")]:
            flat = value.transpose(0, 1).flatten(1).double()
            sums = sums.to(flat.device) + torch.stack((flat.sum(1), flat.square().sum(1)))
            count += flat.shape[1]
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp_min(0) * count / max(count - 1, 1)
        stored = argument(node, "running_mean")
        self._replace(stored, mean)
        self._replace(argument(node, "running_var"), variance)
        self.norms.append(str(stored.target).rpartition(".")[0])

    def _reconstruct(self, node: fx.Node, live: Mapping[fx.Node, Value]) -> None:
        """New weights, and a new bias or mean, where they lower the error on the images that judge."""
        reads, bias_node = argument(node, "weight"), argument(node, "bias")
        weight = attribute(self.small, reads).detach()
        norm = _norm_behind(self.small, node) if bias_node is None else None
        shifts = norm is not None or (bias_node is not None and _alone(self.small, node, "bias"))
        groups = im2col.groups_of(node)
        flat = weight.reshape(groups, weight.shape[0] // groups, -1)
        bias = None if bias_node is None else attribute(self.small, bias_node).detach()
        fit, judge = self._equations(node, live, flat, bias, weight.shape)
        where = layer_name(node)
        if not math.isfinite(judge.total + fit.total):
            raise CheckFailed(f"{where}: yields NaN or infinity on the images; check the weights and the normalisation")
        before = judge.error(None, None)
        best: tuple[float, float | None] = (before, None)
        for ridge in RIDGES:
            best = min(best, (judge.error(*fit.solve(ridge, shifts)), ridge), key=lambda pair: pair[0])
        scale = max(judge.variance, 1e-30)
        self.layers.append({"name": where, "wrong_before": before / scale, "wrong": best[0] / scale, "ridge": best[1]})
        if best[1] is None:
            return
        fit.merge(judge)
        change, shift = fit.solve(best[1], shifts)
        self._replace(reads, (flat.double() + change).reshape(weight.shape))
        if shift is not None and bias is not None:
            self._replace(bias_node, bias.double() + shift)
        elif shift is not None and norm is not None:
            mean = argument(norm, "running_mean")
            self._replace(mean, attribute(self.small, mean).double() - shift)

    def _equations(
        self, node: fx.Node, live: Mapping[fx.Node, Value], weight: Tensor, bias: Tensor | None, shape: Sequence[int]
    ) -> tuple[NormalEquations, NormalEquations]:
        """Of the images that fit, and of those that judge; weight: (groups, outputs, K), stored as ``shape``."""
        axis = -1 if node.target is aten.linear.default else 1
        kept = self.kept.get(str(argument(node, "weight").target))
        fit, judge = NormalEquations(weight, bias), NormalEquations(weight, bias)
        theirs = next(value for other, value in self.theirs if other.name == node.name)
        for source, wanted, judges in zip(live[argument(node, "input")], theirs, self.judges, strict=True):
            source, wanted = (value.movedim(self.axes[node], 0) for value in (source, wanted))
            wanted = wanted if kept is None else wanted.index_select(axis, kept.to(wanted.device))
            x, y = _pairs(node, source, wanted, shape, len(weight), self.generator)
            # Windows of an image lie side by side.
            judges = judges.repeat_interleave(len(x) // len(judges)).to(x.device)
            fit.add(x[~judges], y[~judges])
            judge.add(x[judges], y[judges])
        return fit, judge


def _image_axes(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """For the output of each layer, the axis that grows with the number of images; not of layers with several or
    none."""
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
    """What the layer reads, (N, groups, K, places), and what it should make of it, (N, groups, outputs, places), at
    places drawn once a batch."""
    place = im2col.draw(im2col.plane(node, source, shape), generator, source.device)
    return im2col.unfold(node, source, shape, groups, place), im2col.outputs(node, wanted, groups, place)


# ------------------------------------------------------------------------------------------------------------- graphs


def _alone(graph: fx.GraphModule, node: fx.Node, name: str) -> bool:
    """Is the stored tensor that is this argument read by this node only, under one name?"""
    source = argument(node, name)
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    tensor = attribute(graph, source)
    stored = [other for other in graph.graph.nodes if other.op == "get_attr" and attribute(graph, other) is tensor]
    named = (graph.named_parameters(remove_duplicate=False), graph.named_buffers(remove_duplicate=False))
    names = [name for name, value in itertools.chain(*named) if value is tensor]
    return len({user for other in stored for user in other.users}) == 1 and len(names) == 1


def _has_statistics(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Is it a batch norm with running statistics of its own?"""
    return node.target is aten.batch_norm.default and _alone(graph, node, "running_mean")


def _norm_behind(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The batch norm that alone reads ``node`` and has running statistics of its own."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    found = reader is not None and _has_statistics(graph, reader) and argument(reader, "input") is node
    return reader if found else None


def _changed(small: fx.GraphModule, wide: fx.GraphModule) -> set[fx.Node]:
    """Nodes of the small graph whose input is not the original's: behind a parameter of another size, but for the
    layers that only make less."""
    found: set[fx.Node] = set()
    for node in small.graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in found for source in node.all_input_nodes) or _reads_less(small, wide, node):
            found.add(node)
    return found


def _reads_less(small: fx.GraphModule, wide: fx.GraphModule, node: fx.Node) -> bool:
    """A layer of which input channels are gone.

    One that only makes fewer outputs makes those as before, and so does batch norm.
    """
    if not weighted(node) or im2col.groups_of(node) > 1:
        return False
    name = str(argument(node, "weight").target)
    try:
        return bool(attribute(small, name).shape[1] < attribute(wide, name).shape[1])
    except AttributeError:
        return True


def _peak(graph: fx.GraphModule) -> int:
    """Bytes of the activations of one sample that are alive at once."""
    sizes = shapes(graph, 1)
    *nodes, output = graph.graph.nodes
    live = {node: sizes[node] for node in nodes if node.op == "placeholder"}
    running = steps(graph, nodes, live, lambda node, _: sizes[node], output.all_input_nodes)
    peak: int = max(
        sum(
            item.numel() * item.element_size()
            for node, value in live.items()
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if node.op != "get_attr" and is_tensor(item)
        )
        for _ in running
    )
    return peak


def _batches(
    graph: fx.GraphModule, data: Task | Batches, images: int, batch_size: int, seed: int
) -> list[tuple[Tensor, ...]]:
    """At most ``images`` samples. Raises DataError where there are fewer than 8, InputError for another shape."""
    device = device_of(graph)
    given = (
        data.data.inputs("train", images, batch_size, seed=seed, device=device)
        if not isinstance(data, Iterable)
        else data
    )
    batches = list(_limited(map(Arranger(graph, "repair: a batch"), each(given, "repair")), images))
    count = sum(len(batch[0]) for batch in batches)
    if count < 8:
        raise DataError(f"repair: {count} images are too few; give at least 8 (512 are a good number)")
    return batches


def _limited(batches: Iterable[tuple[Tensor, ...]], images: int) -> Iterator[tuple[Tensor, ...]]:
    left = images
    for values in batches:
        yield tuple(value[:left] for value in values)
        left -= len(values[0])
        if left <= 0:
            return
