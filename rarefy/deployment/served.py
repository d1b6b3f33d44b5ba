"""The file of a saved folder that a runtime is to run: is it one that rarefy writes, of that model, and does it fit?

A runtime does what a file says, in memory and time of the file's choice. So an ONNX file is read first, and refused
unless its operators are of those that rarefy writes, without graphs within nodes, functions or weights elsewhere; its
inputs are the model's; and what it holds and multiplies, by ONNX's own rules for as many samples as are run at once,
stays in proportion to the model's (``MOST_HELD``, ``MULTIPLE``, as for graph.json; ``MOST_WORK``). A file that falls
short of this is run all the same where it is byte by byte what rarefy writes for the model now; and so alone are files
that can't be read like this (LiteRT's, ExecuTorch's). Other runtimes' files hold a graph of ours, and are read as one.
"""

from __future__ import annotations

import filecmp
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import fx

from rarefy.artifact.operators.trial import MOST_HELD, MULTIPLE
from rarefy.deployment import external_data, onnx_sizes
from rarefy.deployment.onnx.writer import CONTRIB
from rarefy.deployment.runtime import Runtime
from rarefy.errors import FormatError, RarefyError, first_line
from rarefy.graph.macs import count_macs
from rarefy.system.dependencies import needs
from rarefy.system.memory import afford

Foreign = Any  # a message of protobuf's
Shape = Sequence[int]

SAMPLES = 64  # run at once, where nobody says
MOST_NODES, NODES = 1000, 32  # of a file, and so many for each node of the graph
MOST_WORK, WORK = 4 * 10**9, 64  # numbers made and products, and so many for each MAC of the graph
UNREADABLE = (".tflite", ".pte")  # files of which only a writer's own bytes are believed

# What rarefy.deployment.onnx writes, which a test compares.
WRITTEN: Mapping[str, frozenset[str]] = {
    "": frozenset(
        "Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Col2Im Concat Constant Conv "
        "ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand Floor Gather "
        "GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual GridSample GRU HardSigmoid "
        "HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LSTM "
        "MatMul Max MaxPool Min Mish Mod Mul Neg NonMaxSuppression Not OneHot Or PRelu Pad Pow QuantizeLinear Range "
        "Reciprocal ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape "
        "Resize RNN Round ScatterElements ScatterND Shape Sigmoid Sign Sin Slice Softmax Softplus Split Sqrt Squeeze "
        "Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where".split()
    ),
    CONTRIB: frozenset({"QuickGelu"}),
}


def check(file: Path, graph: fx.GraphModule, runtime: Runtime, where: str, samples: int = SAMPLES) -> None:
    """Raises FormatError for a file that is not to be run.

    file: a private copy. graph: the model that it is of. samples: that are run at once. where: for messages.
    """
    suffix = file.suffix.lower()
    if suffix in UNREADABLE:
        if not _is_written_now(file, graph, runtime):
            raise FormatError(
                f"{where}: is not what rarefy writes for this model, and a file of that kind can't be looked through; "
                f"write it anew: `rarefy export FOLDER --runtime ... -o model{suffix}` [served-other]"
            )
    elif suffix == ".onnx":
        try:
            _check_onnx(file, graph, where, samples)
        except FormatError:
            if not _is_written_now(file, graph, runtime):
                raise


def _is_written_now(file: Path, graph: fx.GraphModule, runtime: Runtime) -> bool:
    with tempfile.TemporaryDirectory(prefix="rarefy-") as place:
        try:
            return filecmp.cmp(runtime.export(graph, Path(place) / file.name), file, shallow=False)
        except RarefyError:
            return False


def _check_onnx(file: Path, graph: fx.GraphModule, where: str, samples: int) -> None:
    library = needs("onnx")
    afford(3 * file.stat().st_size, where, "end other programs")
    try:
        model = library.load(str(file), load_external_data=False)
    except Exception as error:  # of protobuf
        raise FormatError(f"{where}: is no ONNX file ({first_line(error)}); export it again [onnx-form]") from error
    external_data.check(library, model, where)
    _check_nodes(library, model, graph, where)
    _check_inputs(model.graph, graph, where)
    found = onnx_sizes.sizes_of(library, model, samples, where)
    known = {
        name: one for name, sizes in found.items() if len(one := [at for at in sizes if at is not None]) == len(sizes)
    }
    _check_sizes(known, model.graph, graph, where, samples)


def _check_nodes(library: ModuleType, model: Foreign, graph: fx.GraphModule, where: str) -> None:
    nodes = model.graph.node
    most = MOST_NODES + NODES * len(graph.graph.nodes)
    if len(nodes) > most:
        raise FormatError(
            f"{where}: has {len(nodes)} nodes, and a file of this model at most {most}; export it again [onnx-nodes]"
        )
    inner = (library.AttributeProto.GRAPH, library.AttributeProto.GRAPHS)
    for node in nodes:
        known = node.op_type in WRITTEN.get("" if node.domain == "ai.onnx" else node.domain, frozenset())
        if not known or any(one.type in inner for one in node.attribute):
            called = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise FormatError(
                f"{where}: {node.name[:80]!r} is an operator {called[:80]!r}, which rarefy does not write; "
                "export the model again [onnx-operator]"
            )
    if model.functions or model.graph.sparse_initializer or model.training_info:
        raise FormatError(
            f"{where}: has functions, sparse weights or a training, which rarefy does not write; export the model "
            "again [onnx-operator]"
        )


def _check_inputs(given: Foreign, graph: fx.GraphModule, where: str) -> None:
    stored = {one.name for one in given.initializer}
    found = [onnx_sizes.shape_of(one.type) for one in given.input if one.name not in stored]
    wanted = [(None, *one["shape"]) for one in graph.meta["inputs"]]
    fits = len(found) == len(wanted) and all(
        have is not None and len(have) == len(want) and all(b is None or a in (b, None) for a, b in zip(have, want))
        for have, want in zip(found, wanted)
    )
    if not fits:
        raise FormatError(
            f"{where}: has inputs of {str(found)[:200]}, and the model of {wanted}; export it again [onnx-inputs]"
        )


# --------------------------------------------------------------------------------------------------- memory and time


def _check_sizes(shapes: Mapping[str, Shape], file: Foreign, graph: fx.GraphModule, where: str, samples: int) -> None:
    """What is held at once, and all that is made and multiplied."""
    given = sum(8 * math.prod(shapes[one.name]) for one in file.input if one.name in shapes)
    stored = sum(8 * math.prod(one.dims) for one in file.initializer)
    most, most_work = max(MOST_HELD, MULTIPLE * (given + stored)), MOST_WORK + WORK * samples * count_macs(graph)
    last = {name: place for place, node in enumerate(file.node) for name in node.input}
    returned = {one.name for one in file.output}
    held = work = 0
    live: dict[str, int] = {}
    for place, node in enumerate(file.node):
        for name in filter(None, node.output):
            if name not in shapes or min(shapes[name], default=0) < 0:
                raise FormatError(
                    f"{where}: the size of {name[:80]!r} ({node.op_type}) can't be known before it runs; export it "
                    "again [onnx-sizes]"
                )
            live[name] = 8 * math.prod(shapes[name])  # bytes at most
            held += live[name]
        inside, products = _inside(node, shapes)
        work += products + sum(math.prod(shapes.get(name, ())) for name in (*node.input, *node.output))
        if held + inside > most:
            raise FormatError(
                f"{where}: holds {(held + inside) / 1e9:.3g} GB at once at {node.name[:80]!r} ({node.op_type}), and "
                f"{most / 1e9:.3g} GB are allowed for {samples} samples; pass a smaller --batch-size, or export the "
                "model again [onnx-sizes]"
            )
        if work > most_work:
            raise FormatError(
                f"{where}: calculates {work / 1e9:.3g} G products up to {node.name[:80]!r} ({node.op_type}), out of "
                f"proportion to the model's own ({most_work / 1e9:.3g} G); export it again [onnx-work]"
            )
        for name in {*node.input, *node.output} - returned:
            if last.get(name, place) <= place:
                held -= live.pop(name, 0)


def _inside(node: Foreign, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """(bytes that an operator takes within itself, products that it calculates), about."""
    inputs = [shapes.get(name, ()) for name in node.input]
    made = math.prod(shapes.get(node.output[0], ())) if node.output else 0
    first = math.prod(inputs[0]) if inputs else 0
    match node.op_type:
        case "Conv" if len(inputs) > 1 and inputs[1]:
            each = math.prod(inputs[1][1:])
            images = max(1, inputs[0][0]) * max(1, inputs[1][0])
            return 8 * each * (made // images if images else 0), made * each
        case "ConvTranspose" if len(inputs) > 1 and len(inputs[1]) > 1:
            return 8 * first * math.prod(inputs[1][2:]), first * math.prod(inputs[1][1:])
        case "MatMul" | "Gemm" if inputs and inputs[0]:
            return 0, made * max(inputs[0][-2:])
        case "Einsum":
            return _einsum(node, inputs, made)
        case "MaxPool" | "AveragePool" | "Col2Im":
            kernel = next((math.prod(one.ints) for one in node.attribute if one.name == "kernel_shape"), 1)
            return 0, made * abs(kernel)
        case "LSTM" | "GRU" | "RNN" if inputs and len(inputs) > 2 and inputs[0]:
            return 16 * made, inputs[0][0] * inputs[0][min(1, len(inputs[0]) - 1)] * sum(map(math.prod, inputs[1:3]))
        case "NonMaxSuppression" if len(inputs) > 1 and len(inputs[1]) == 3:
            return 0, math.prod(inputs[1]) * inputs[1][2]
        case "Resize" | "GridSample" | "TopK":
            return 0, 32 * max(first, made)
    return 0, 0


def _einsum(node: Foreign, inputs: Sequence[Shape], made: int) -> tuple[int, int]:
    """Of three tensors and more, all labels together may be made on the way."""
    formula = next((one.s.decode("utf-8", "replace") for one in node.attribute if one.name == "equation"), "")
    sizes = {
        label: size
        for term, shape in zip(formula.partition("->")[0].replace(" ", "").split(","), inputs)
        for label, size in zip(_labels(term, len(shape)), shape)
    }
    products = math.prod(sizes.values())
    return (8 * products if len(inputs) > 2 else 16 * sum(map(math.prod, inputs))), max(products, made)


def _labels(term: str, rank: int) -> Iterator[str]:
    """One a size; ``...`` stands for as many as are left."""
    before, dots, after = term.partition("...")
    yield from before
    if dots:
        yield from (f"...{place}" for place in range(rank - len(before) - len(after)))
    yield from after
