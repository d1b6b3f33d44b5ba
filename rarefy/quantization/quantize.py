"""quantize(): weights and activations on integer grids, chosen on a few unlabelled images, without training.

In order, each on the one graph:

1. ``prepared``: batch norm is folded, operators are written in one form (``rarefy.graph.fold``), norms smoothed.
2. ``formats_of``: which values become integers, from the runtime's table (``placement``), and on which grid each of
   them and each layer's weights are (``formats``, ``mixed_precision``).
3. ``calibrated``: channels are equalised where that is exact and held-out images gain (``transforms``); the
   calibration images run once, and
   every such value streams into a histogram (``observers``).
   Gradients tell what noise on each value costs the answers (``sensitivity``); layers around values that 8 bits can't
   hold stay in float (``transforms/noisy_layers``).
4. ``placed``: the calibration rule chooses each range: affine, unsigned, one scale a tensor, and 0 is always a code;
   what does not pay goes back to float (``latency_gate``), the rest is put into the graph (``qdq``).
5. ``rounded``: layer by layer, on what the rounded layers before it yield (``rounding_pass``), the weights, symmetric,
   one scale an output channel, are rounded by the rounding rule, and the means mended (``transforms/bias_correction``).
6. ``recorded``: layers are written as what an integer kernel computes (``rarefy.graph.lowering``), and it is told.

What is simulated is what runs: round half to even, saturation, and clips done by the grid's end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from rarefy import plugins
from rarefy.deployment.description import graph_for, remember
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError, first_line
from rarefy.graph import history
from rarefy.graph.canonical import simplify
from rarefy.graph.fold import fold, normed
from rarefy.graph.layers import check_globs, layer_name, names, weighted
from rarefy.graph.lowering import to_integers
from rarefy.graph.nodes import device_of, dtype_name, finish, is_graph, on_device, share_copy
from rarefy.kernels import is_quantised
from rarefy.quantization import explain, formats, latency_gate, mixed_precision, qdq
from rarefy.quantization.choices import Choices
from rarefy.quantization.observers import ByAnswers, Calibration, Images, Observed, observe
from rarefy.quantization.options import Options
from rarefy.quantization.placement import Placement, place
from rarefy.quantization.rounding_pass import MEMORY, OfBlocks, Rounding, RoundingPass, images_of_rounding
from rarefy.quantization.sensitivity import sensitivities
from rarefy.quantization.transforms import channel_scales, noisy_layers, smoothquant, unlike_channels, weight_only
from rarefy.system.memory import release
from rarefy.system.progress import track
from rarefy.tasks.detector import capture
from rarefy.tasks.task import Task, settled

SENSED = 128  # images, at most, that tell what noise of each value costs
SMOOTHED = 32  # images that tell how large a norm's channels get
TOGETHER = 8  # of them at once


def quantize(
    model: nn.Module,
    task: Task | None = None,
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    batches: Iterable[Tensor | tuple[Tensor, ...]] | None = None,
    images: int = 128,
    batch_size: int = 16,
    weights: str | formats.Format | Mapping[str, str] | mixed_precision.Mixed = "int8",
    activations: str | formats.Format | Mapping[str, str] = "uint8",
    calibration: str | Calibration = "sensitivity",
    weight_calibration: str | Calibration | None = None,
    rounding: str | Rounding = "narrow",
    runtime: str | Runtime = "onnxruntime",
    ignore: Sequence[str] = (),
    equalize: bool = True,
    correct_bias: bool = True,
    smooth: float | None = None,
    gate: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> fx.GraphModule:
    """The graph of ``model`` in integers, for inference on ``runtime``; ``model`` is left as it is.

    task: where calibration images come from (its training split; labels are not read); or batches: inputs (N, ...),
        in tuples or by name, with labels behind them or without, as a data loader yields them.
    inputs: an example batch, where ``model`` is not captured yet and no task says what it takes.
    images, batch_size: so many calibration images, so many at a time.
    weights, activations: number formats, ``"int8"``, ``"uint8"``, ``"int4"``; or a layer, by globs of names, of which
        the last that matches holds: ``"int4;stem.*=int8;head=float"``, ``{"*": "int4", "head": "float"}``; activations
        by their own names or those of layers that read them. weights="mixed:bits=4": widths chosen a layer
        (``mixed_precision``). activations="float": weights alone, in any format, without images (``weight_only``).
    calibration, weight_calibration: rules for ranges of activations and for scales of weights, as in ``calibration/``;
        None: minmax at 8 bits, where clipping the largest weights costs more than it saves, else mse.
    rounding: the rule for weights, as in ``rounding/``. seed: of what it draws, and of the images chosen.
    ignore: globs of layer names that stay float; one that matches nothing is an error, as in weights and activations.
    equalize: channels of values between layers brought to one range (``transforms/equalize``), and the noisiest carried
        twice where others are dead (``transforms/split_channels``), where that is exact and lowers the noise.
    correct_bias: what rounding weights moves in the mean goes out of the biases, where two halves of the images agree
        (``transforms/bias_correction``); block reconstruction does that in its own objective.
    smooth: SmoothQuant before linear layers that read a norm, with this alpha, such as 0.5; None: not done.
    gate: "latency" times each stretch of layers in integers and in float on the runtime, and keeps only what pays
        (``latency_gate``); where nothing does, the model comes back in float, and its history says so.
    device: where it is calculated, "cuda" say; None: where the model is. The result lies where the model does, and its
        codes are those of any other device but where a sum's last bits decide a tie.

    Raises InputError for a contradiction, DataError without images, CheckFailed where the float model yields NaN.
    """
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    options = Options(
        images, batch_size, weights, activations, calibration, weight_calibration, rounding, runtime, ignored, equalize,
        correct_bias, smooth, gate, seed, device, progress,
    )  # fmt: skip
    choices = Choices.of(options)
    task = settled(task, model)
    graph = graph_for(model, inputs, task)
    home = device_of(graph)
    there = on_device(graph, home if device is None else _device(device))
    return remember(on_device(_quantized(there, task, inputs, batches, choices), home), task)


def _device(device: str | torch.device) -> torch.device:
    """Raises InputError for a text that is no device, and one that is not there."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={device}: torch can't use it ({first_line(error)}); leave device out") from error
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def _quantized(
    model: nn.Module,
    task: Task | None,
    inputs: Tensor | Sequence[Tensor] | None,
    batches: Iterable[Tensor | tuple[Tensor, ...]] | None,
    choices: Choices,
) -> fx.GraphModule:
    """``quantize``, its texts understood."""
    options = choices.options
    if options.activations == formats.FLOAT:
        if choices.mixed is not None or options.gate is not None:
            raise InputError(
                "activations=float: mixed widths and the gate look at integer layers; "
                "write a format such as int4:group=32"
            )
        return weight_only.quantize_weights(
            model, inputs, choices.weights, choices.weight_calibration, choices.rounding, options.ignore, options.seed
        )
    grid = choices.grid()
    graph, norms = prepared(model, inputs, choices)
    images = Images(graph, task, batches, options.seed)
    smoothed = None
    if options.smooth is not None:
        few = zip(*(one.split(TOGETHER) for one in images.first(SMOOTHED)), strict=True)
        smoothed = smoothquant.smooth(graph, few, options.smooth)
    if options.equalize:
        channel_scales.open_up(graph)
    plan = formats_of(graph, images, grid, choices)
    plan, evened = evened_out(graph, images, plan, choices)
    observed = calibrated(graph, images, plan, choices)
    release()
    plan = without_noisy(graph, observed, plan, choices)
    float_graph = share_copy(graph)
    plan, ranges = placed(graph, observed, plan, grid, choices)
    layers, learned = rounded(graph, float_graph, observed, plan, choices)
    release()
    noise = explain.noise(float_graph, graph, observed.batches)
    bias_undone = [fact["name"] for fact in layers if fact.pop("bias_undone", False)]
    told = zip(plan.placement.layers, layers, strict=True)
    undone = plan.verdict["undone"] if plan.verdict else ()
    facts = {
        "layers": [{**fact, "sqnr_db": noise[node.name]} for node, fact in told],
        "images_of_rounding": sum(len(batch[0]) for batch in observed.batches) if choices.walks else 0,
        **{**evened, "batch_norm": norms},
        **({"noisy": list(plan.noisy)} if plan.noisy else {}),
        "undone": {
            "ranges": [one.name for one, seen in observed.histograms.items() if seen.cost and seen.cost.undone],
            "bias": bias_undone,
        },
        **({} if smoothed is None else {"smoothed": smoothed}),
        **({} if plan.allocation is None else {"allocation": plan.allocation}),
        **explain.floats(float_graph, plan.placement, plan.unassigned, undone, noise),
        "ranges": {node.name: [end * learned.get(node.name, 1.0) for end in ends] for node, ends in ranges.items()},
        **({} if plan.verdict is None else {"gate": plan.verdict}),
        **({"timing": plan.timing} if plan.timing else {}),
    }
    return recorded(graph, plan.weights, facts, choices)


@dataclasses.dataclass(frozen=True)
class Formats:
    """Which numbers of a graph are on which grid.

    weights: of layers by their names. layers: the grid of each integer layer's weights. values: that of each rounded
    value. left_out: globs of what stays float; unassigned: layers that ``weights`` leaves in float. allocation,
    verdict: what choosing widths and the gate found; timing: what they measured.
    """

    weights: formats.Assignment
    layers: Mapping[fx.Node, formats.Grid]
    values: Mapping[fx.Node, formats.Grid]
    placement: Placement
    left_out: Sequence[str]
    unassigned: Collection[fx.Node]
    allocation: mixed_precision.Facts | None
    timing: Mapping[str, object]
    verdict: latency_gate.Verdict | None = None
    noisy: Sequence[str] = ()


def prepared(
    model: nn.Module, inputs: Tensor | Sequence[Tensor] | None, choices: Choices
) -> tuple[fx.GraphModule, list[str]]:
    """A graph of float32 with all folded that can be, operators in one form; and the layers that had batch norm."""
    if is_quantised(model):
        raise InputError("the model is quantised already; start from its float original")
    graph = share_copy(model) if isinstance(model, fx.GraphModule) and is_graph(model) else capture(model, inputs)
    for name, tensor in graph.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(
                f"quantize: {name} is {dtype_name(tensor.dtype)}, and codes are made of float32; capture model.float()"
            )
    norms = normed(graph)
    graph = simplify(fold(graph), choices.runtime.capabilities.whole)  # folding copies
    qdq.free_names(graph)
    check_globs(
        graph,
        ignore=choices.options.ignore,
        weights=[glob for glob, _ in choices.weights.rules],
        activations=[glob for glob, _ in choices.activations.rules],
    )
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return graph, norms


def formats_of(graph: fx.GraphModule, images: Images, grid: formats.Grid, choices: Choices) -> Formats:
    """The grid of each value and weight that can be integer; such layers get a bias of their own. grid: of activations.

    Raises InputError where there is none, or one that integer kernels don't take.
    """
    options, runtime = choices.options, choices.runtime
    weights, allocation = choices.weights, None
    timing: dict[str, object] = {}
    if choices.mixed is not None:
        begun = time.monotonic()
        batch = images.first(choices.mixed.images)
        open_to = place(graph, runtime.capabilities, options.ignore).layers
        weights, allocation, measured = mixed_precision.allocate(
            graph, open_to, batch, choices.mixed, grid, runtime, options.ignore
        )
        timing["allocation"] = time.monotonic() - begun
        if measured:
            timing["latency"] = measured
    layers = {node: weights.of(names(node)) for node in graph.graph.nodes if weighted(node)}
    unassigned = [node for node, format in layers.items() if format is None]
    left_out = [*options.ignore, *map(layer_name, unassigned)]
    placement = place(graph, runtime.capabilities, left_out)
    if not placement.layers:
        raise InputError(
            f"no layer can be quantised for {plugins.describe(runtime)}; ignore={list(options.ignore)} and "
            f"weights={weights} leave none, or the model has no convolution or linear layer"
        )
    grids = {node: qdq.weight_grid(node, layers[node], runtime.weight_bits) for node in placement.layers}
    for node in placement.layers:
        qdq.own_bias(graph, node)
    values = qdq.value_grids(placement, choices.activations)
    return Formats(weights, grids, values, placement, left_out, unassigned, allocation, timing)


def calibrated(graph: fx.GraphModule, images: Images, plan: Formats, choices: Choices) -> Observed:
    """One pass over the calibration images: how large the values get, and what the layers make in the mean."""
    options = choices.options
    total = math.ceil(options.images / options.batch_size) if images.are_drawn else None
    batches = track(images.read(options.images, options.batch_size), total, "calibrate", options.progress)
    kept = min(images_of_rounding(graph, plan.layers, choices.rounding), MEMORY / 2 / images.bytes_each)
    found = observe(
        graph,
        plan.placement.values,
        images.pieces(batches),
        plan.placement.layers if options.correct_bias else (),
        lambda samples: choices.walks and samples <= kept,
    )
    if isinstance(choices.calibration, ByAnswers):
        release()  # gradients need as much again
        held = images.in_gradients
        few = itertools.islice(images.pieces(found.batches, held), images.sensed(SENSED) // held)
        for node, cost in sensitivities(
            graph, found.histograms, few, torch.Generator().manual_seed(options.seed)
        ).items():
            found.histograms[node].cost = cost
    return found


def without_noisy(graph: fx.GraphModule, observed: Observed, plan: Formats, choices: Choices) -> Formats:
    """The plan without layers around values that cost too much in 8 bits."""
    if not isinstance(choices.calibration, ByAnswers) or any(grid.bits < 7 for grid in plan.values.values()):
        return plan
    ranges = qdq.ranges(plan.placement, observed.histograms, choices.calibration, plan.values)
    left = noisy_layers.noisy(graph, plan.placement, ranges, plan.values, observed.histograms)
    if not left:
        return plan
    left_out = [*plan.left_out, *left]
    placement = place(graph, choices.runtime.capabilities, left_out)
    if not placement.layers or not set(placement.values) <= observed.histograms.keys():
        return plan
    values = qdq.value_grids(placement, choices.activations)
    return dataclasses.replace(plan, placement=placement, values=values, left_out=left_out, noisy=left)


def placed(
    graph: fx.GraphModule, observed: Observed, plan: Formats, grid: formats.Grid, choices: Choices
) -> tuple[Formats, qdq.Ranges]:
    """Grids put into the graph, but where they don't pay; and the range of each. grid: of activations in general."""
    rule, options, runtime = choices.calibration, choices.options, choices.runtime
    ranges = qdq.ranges(plan.placement, observed.histograms, rule, plan.values)
    if options.gate is not None:
        by_name = {value.name: span for value, span in ranges.items()}
        verdict, timed = latency_gate.judge(
            graph, plan.placement, by_name, plan.left_out, runtime, grid, options.progress
        )
        placement = place(graph, runtime.capabilities, [*plan.left_out, *verdict["undone"]])
        values = qdq.value_grids(placement, choices.activations)
        ranges = qdq.ranges(placement, observed.histograms, rule, values)
        timing = {**plan.timing, "gate": timed}
        plan = dataclasses.replace(plan, placement=placement, values=values, verdict=verdict, timing=timing)
    qdq.insert(graph, plan.placement, ranges, plan.values)
    return plan, ranges


def rounded(
    graph: fx.GraphModule, float_graph: fx.GraphModule, observed: Observed, plan: Formats, choices: Choices
) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Codes in place of weights and biases; facts of each layer, and value -> what its scale was multiplied by."""
    options, layers = choices.options, plan.placement.layers
    generator = torch.Generator().manual_seed(options.seed)
    run = RoundingPass(graph, float_graph, observed, choices.rounding, options.correct_bias, generator)
    read = {value.name: grid for value, grid in plan.values.items()}
    facts: list[dict[str, object]] = []
    bits: dict[str, int] = {}
    blocks = run.blocks(layers)
    for index, block in enumerate(track(blocks, len(blocks), "round", options.progress and choices.walks)):
        grids = [plan.layers[node] for node in block]
        rules = [choices.weight_rule(grid) for grid in grids]
        after = blocks[index + 1][0] if index + 1 < len(blocks) else None
        for node, grid, fact in zip(block, grids, run.round(block, grids, rules, after), strict=True):
            activations = read[qdq.value_name(node)]
            told = {"activation_bits": activations.bits, "grid": str(grid), "activation_grid": str(activations)}
            facts.append({**fact, **told})
            bits[qdq.codes_name(node)] = grid.bits
        if options.correct_bias and not isinstance(choices.rounding, OfBlocks):
            for node, fact in zip(block, facts[-len(block) :], strict=True):
                fact["bias_undone"] = not run.correct(node)
    if any(count < 8 for count in bits.values()):
        graph.meta["bits"] = {name: count for name, count in bits.items() if count < 8}
    return facts, run.learned


def evened_out(
    graph: fx.GraphModule, images: Images, plan: Formats, choices: Choices
) -> tuple[Formats, dict[str, int]]:
    """Channels of values brought to one range; the plan of the graph then, and how many of each kind were.

    Its functions of numbers are open (``channel_scales``).
    """
    if not choices.options.equalize:
        return plan, dict.fromkeys(("equalized", "doubled", "scaled", "relieved"), 0)
    equalized, doubled = unlike_channels.equalized(graph, images, plan.values, plan.layers)
    scaled = channel_scales.settle(graph)
    plan = replaced(graph, plan, choices)
    relieved = unlike_channels.relieved(graph, images, plan.placement, plan.values, plan.layers)
    told = {"equalized": equalized, "doubled": doubled, "scaled": scaled, "relieved": relieved}
    return replaced(graph, plan, choices) if relieved else plan, told


def replaced(graph: fx.GraphModule, plan: Formats, choices: Choices) -> Formats:
    """The plan of a graph to which operators on numbers came."""
    placement = place(graph, choices.runtime.capabilities, plan.left_out)
    return dataclasses.replace(plan, placement=placement, values=qdq.value_grids(placement, choices.activations))


def recorded(
    graph: fx.GraphModule, weights: formats.Assignment, facts: Mapping[str, object], choices: Choices
) -> fx.GraphModule:
    """``graph`` as integer kernels compute it, with what was asked for and what came of it.

    weights: as in the end assigned.
    """
    graph = to_integers(finish(graph))
    options = {field.name: getattr(choices.options, field.name) for field in dataclasses.fields(Options)}
    options |= {"weights": str(weights), "activations": str(choices.activations), "ignore": list(options["ignore"])}
    for name in ("calibration", "weight_calibration", "rounding", "runtime"):
        choice = getattr(choices, name)
        options[name] = None if choice is None else plugins.describe(choice)
    told = {name: value for name, value in options.items() if name not in ("batch_size", "device", "progress")}
    history.append(graph, "quantize", told, facts)
    return graph.eval()
