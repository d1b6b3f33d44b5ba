"""ONNX Runtime on the CPU: ONNX files with QuantizeLinear/DequantizeLinear pairs, which it fuses into integer kernels.

What the capability table rests on (measured on an AVX-512 VNNI CPU): unsigned activations with signed weights are the fast grid (signed/signed
is as slow as float); convolution, linear, add, multiply, concatenate, average pooling and sigmoid have integer kernels (QLinearConv, QGemm,
QLinearAdd, ...); max pooling and reshapes move codes. HardSwish and HardSigmoid have none, so that the gate is written as an integer
addition that saturates (``rarefy.quantizing``), and a mean over the plane must be GlobalAveragePool (ReduceMean has none).

Width: its integer convolution handles 16 output channels at a time and the rest one by one, so that fewer than 16 cost more than 16 (3x3,
16 channels in, 32x32: 37 us for 8 out, 25 us for 16). Such a layer, where only convolutions read it, is written with zero filters up to 16, and
its readers with zero weights for them: the same answers.

The file: opset 20, batch free, int8 codes as initialisers, no metadata, so that the same graph gives the same bytes.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import rarefy.kernels  # noqa: F401  registers torch.ops.rarefy
from rarefy.capturing import attribute, example_inputs, set_attribute
from rarefy.errors import FormatError, InputError, MissingDependency
from rarefy.lowering import is_decoded, to_integers, to_numbers
from rarefy.placing import Capabilities

aten = torch.ops.aten
OPSET = 20
TILE = 16  # output channels of an integer convolution that are computed together

# Nodes of an optimised file that compute with integers, or only move or convert values.
_MOVING = {
    "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Gather", "MaxPool",
    "Shape", "Flatten", "Identity", "Cast", "Pad", "ReorderInput", "ReorderOutput", "Expand", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime, CPU. threads: of one operator; 0 is one a core."""

    threads: int = 0

    suffix = ".onnx"
    capabilities = Capabilities(
        layers=frozenset({aten.conv2d.default, aten.conv2d.padding, aten.linear.default}),
        joins=frozenset(
            {
                aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default,
                aten.sigmoid.default, aten.hardsigmoid.default,
            }
        ),
        carriers=frozenset(
            {
                aten.max_pool2d.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default,
                aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default, aten.slice.Tensor,
                aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
            }
        ),
        paddings=frozenset({aten.pad.default}),
        clips=frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}),
        float_result=frozenset({aten.linear.default}),
    )  # fmt: skip

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as an ONNX file. Raises InputError for an operator ONNX has no form of."""
        onnx = _needs("onnx")
        try:
            model = _translated(_widened(to_numbers(graph)))
        except Exception as error:
            why = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise InputError(
                f"the graph can't be written as ONNX: {why[:300]}; leave that layer out with core=, or choose another runtime"
            ) from error
        _tidy(onnx, model)
        target = Path(path)
        target.write_bytes(model.SerializeToString(deterministic=True))
        return target

    def open(self, path: str | os.PathLike[str]) -> Session:
        """The file, ready to run."""
        return Session(path, self.threads)

    def kernel_times(
        self, path: str | os.PathLike[str], inputs: Tensor, seconds: float = 1.5
    ) -> list[tuple[str, str, list[list[int]], float]]:
        """The kernels of one run, in order: name, operator, sizes of all it reads and makes, microseconds (median of the quiet runs of ``seconds``).

        A name is the same in files of other widths, if ONNX Runtime makes the same kernels of them.
        """
        with tempfile.TemporaryDirectory() as folder:
            session = Session(path, self.threads, profile=Path(folder) / "profile")
            begun = time.perf_counter()
            runs = 0
            while runs < 15 or (time.perf_counter() - begun < seconds and runs < 300):
                session(inputs)
                runs += 1
            events = json.loads(Path(session.session.end_profiling()).read_bytes())
        suffix = "_kernel_time"
        kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)]
        kernels.sort(key=lambda event: event["ts"])
        by_run = [kernels[start : start + len(kernels) // runs] for start in range(0, len(kernels), len(kernels) // runs)][3:]
        totals = [sum(event["dur"] for event in run) for run in by_run]
        calm = max(1.1 * min(totals), sorted(totals)[4])  # a slower run was disturbed by another process
        by_run = [run for run, total in zip(by_run, totals, strict=True) if total <= calm]
        found, seen = [], collections.Counter[str]()
        for events in zip(*by_run, strict=True):
            about = events[0]["args"]
            shapes = [shape for tensor in (*about["input_type_shape"], *about["output_type_shape"]) for shape in tensor.values()]
            name = events[0]["name"].removesuffix(suffix).partition("_token_")[0]
            seen[name] += 1
            found.append(
                (f"{name}#{seen[name]}", str(about["op_name"]), shapes, float(statistics.median(event["dur"] for event in events)))
            )
        return found

    def compare(self, graph: fx.GraphModule, path: str | os.PathLike[str], inputs: Tensor, batch: int = 32) -> dict[str, Any]:
        """Parity of ``graph`` and the file it was exported to.

        agreement: share of equal most likely classes. largest_difference: of the answers. layers: what each rounded value differs by in units of
        the last place (codes) when both start from the file's own inputs of that layer, and the share of codes that differ; ulp: the
        largest of them. first_diverging_layer: the first by more than one unit, which rounding a sum in another order can't explain.
        passed: agreement of at least 99.5 % and no such layer.
        """
        onnx = _needs("onnx")
        model = onnx.load(os.fspath(path))
        graph = to_integers(_widened(to_numbers(graph)))
        seen_by_file = _codes_in(model)
        codes = {_value_name(node): node for node in reversed(list(graph.graph.nodes)) if node.target is torch.ops.rarefy.quantize.default}
        shared = [name for name in reversed(codes) if name in seen_by_file]
        for name in shared:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(seen_by_file[name]))
        with tempfile.TemporaryDirectory() as folder:
            tapped = Path(folder) / "tapped.onnx"
            tapped.write_bytes(model.SerializeToString())
            session = Session(tapped, self.threads)
        tally = {name: [0, 0, 0] for name in shared}
        same = 0
        largest = 0.0
        outputs = len(session.session.get_outputs()) - len(shared)
        for part in inputs.split(batch):
            found = session.session.run(None, {session.name: part.numpy()})
            theirs = torch.from_numpy(found[0])
            runtime_codes = {codes[name]: torch.from_numpy(value) for name, value in zip(shared, found[outputs:], strict=True)}
            with torch.no_grad():
                answer = _first(graph(part))
                for name, difference in _Following(graph, runtime_codes).differences(part):
                    entry = tally[name]
                    entry[0] = max(entry[0], int(difference.max()))
                    entry[1] += int((difference > 0).sum())
                    entry[2] += difference.numel()
            largest = max(largest, float((answer - theirs).abs().max()))
            same += int((answer.flatten(1).argmax(1) == theirs.flatten(1).argmax(1)).sum()) if answer.dim() > 1 else 0
        stacks = {name: codes[name].meta.get("stack") or name for name in shared}
        layers: list[dict[str, Any]] = [
            {"name": stacks[name], "value": name, "difference": entry[0], "share": entry[1] / max(entry[2], 1)}
            for name, entry in tally.items()
        ]
        first = next((layer["name"] for layer in layers if layer["difference"] > 1), None)
        agreement = same / len(inputs)
        return {
            "agreement": agreement,
            "samples": len(inputs),
            "largest_difference": largest,
            "ulp": max((layer["difference"] for layer in layers), default=0),
            "first_diverging_layer": first,
            "layers": layers,
            "passed": agreement >= 0.995 and first is None,
        }

    def integer_islands(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What ONNX Runtime made of the file: integer kernels by type, and float operators fed by and feeding integers (there should be none)."""
        onnx = _needs("onnx")
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            Session(path, 1, optimized=optimized)
            graph = onnx.load(os.fspath(optimized)).graph
        maker = {name: node for node in graph.node for name in node.output}
        readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        islands = [
            f"{node.op_type} {node.name}"
            for node in graph.node
            if node.op_type not in _MOVING
            and not _is_integer(node)
            and any(maker.get(name) is not None and maker[name].op_type == "DequantizeLinear" for name in node.input)
            and any(reader.op_type == "QuantizeLinear" for name in node.output for reader in readers.get(name, ()))
        ]
        kernels: dict[str, int] = {}
        for node in graph.node:
            if _is_integer(node):
                kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
        return {"integer": kernels, "float_islands": islands, "all": sorted({node.op_type for node in graph.node})}


class Session:
    """An opened file: called with a CPU tensor (N, ...), it returns the model's first output as a tensor. ``threads``, ``name`` (of the input)."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, optimized: Path | None = None, profile: Path | None = None):
        runtime = _needs("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
        try:
            self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FormatError(f"{path}: ONNX Runtime can't open it ({str(error).splitlines()[0][:200]})") from error
        self.threads = threads or os.cpu_count() or 1
        self.name = self.session.get_inputs()[0].name

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: inputs.detach().cpu().contiguous().numpy()})[0])


class _Following(fx.Interpreter):
    """Runs a graph, but goes on from the runtime's codes after each rounded value, so that a difference is one layer's own."""

    def __init__(self, graph: fx.GraphModule, codes: dict[fx.Node, Tensor]):
        super().__init__(graph)
        self.codes = codes
        self.found: list[tuple[str, Tensor]] = []

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        theirs = self.codes.get(node)
        if theirs is None:
            return value
        self.found.append((_value_name(node), (value.to(torch.int32) - theirs.to(torch.int32)).abs()))
        return theirs

    def differences(self, inputs: Tensor) -> list[tuple[str, Tensor]]:
        self.run(inputs)
        return self.found


def _needs(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(package, "onnx") from error


def _widened(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with zero filters where a layer is narrower than the tile; answers as ``graph`` does."""
    wide = copy.deepcopy(graph).eval()
    for node in wide.graph.nodes:
        readers = _convolutions_reading(node) if _is_integer_convolution(node) else []
        channels = attribute(wide, node.args[1].args[0]).shape[0] if readers else TILE
        if channels >= TILE:
            continue
        for parameter in (node.args[1], node.args[2]):
            codes, scale, zero = parameter.args[:3]
            _grow(wide, codes, 0, TILE - channels)
            _grow(wide, scale, 0, TILE - channels, like_first=True)  # a bias's scale must stay that of the products
            _grow(wide, zero, 0, TILE - channels)
        for reader in readers:
            _grow(wide, reader.args[1].args[0], 1, TILE - channels)
    return wide


def _is_integer_convolution(node: fx.Node) -> bool:
    if node.target is not aten.conv2d.default or len(node.args) < 3:
        return False
    return all(map(is_decoded, node.args[:3])) and node.args[6:7] in ((), (1,))


def _convolutions_reading(node: fx.Node) -> list[fx.Node]:
    """The integer convolutions that read what ``node`` yields, if nothing else does."""
    for target in (torch.ops.rarefy.quantize.default, torch.ops.rarefy.dequantize.default):
        if len(node.users) != 1 or next(iter(node.users)).target is not target:
            return []
        node = next(iter(node.users))
    readers = list(node.users)
    return readers if all(_is_integer_convolution(reader) and reader.args[0] is node for reader in readers) else []


def _grow(graph: fx.GraphModule, source: fx.Node, axis: int, by: int, like_first: bool = False) -> None:
    """Append ``by`` positions along ``axis``: zeros, or copies of the first."""
    tensor = attribute(graph, source)
    first = tensor.narrow(axis, 0, 1).expand([by if dim == axis else size for dim, size in enumerate(tensor.shape)])
    set_attribute(graph, str(source.target), torch.cat([tensor, first if like_first else torch.zeros_like(first)], axis))


def _first(answer: Any) -> Tensor:
    while not isinstance(answer, Tensor):
        answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
    return answer


def _translated(graph: fx.GraphModule) -> Any:
    """The ONNX model, by torch's exporter, with our two operators as ONNX's."""
    _needs("onnxruntime")
    _needs("onnxscript")
    import onnxscript

    operators = getattr(onnxscript, f"opset{OPSET}")

    def quantized(x: Any, scale: Any, zero_point: Any, axis: Any, qmin: int, qmax: int, dtype: int) -> Any:
        return operators.QuantizeLinear(x, scale, zero_point) if axis is None else operators.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantized(q: Any, scale: Any, zero_point: Any, axis: Any) -> Any:
        return (
            operators.DequantizeLinear(q, scale, zero_point)
            if axis is None
            else operators.DequantizeLinear(q, scale, zero_point, axis=axis)
        )

    examples = example_inputs(graph)
    with _quiet():
        program = torch.onnx.export(
            graph.cpu(),
            examples,
            dynamo=True,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
            custom_translation_table={
                torch.ops.rarefy.quantize.default: quantized,
                torch.ops.rarefy.dequantize.default: dequantized,
            },
        )
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def _tidy(onnx: Any, model: Any) -> None:
    """Global pooling by its name; no metadata; the batch axis named."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in [*graph.value_info, *graph.input]}
    for node in graph.node:
        if node.op_type == "ReduceMean" and len(node.input) == 2 and node.input[1] in constants:
            axes = sorted(int(axis) for axis in onnx.numpy_helper.to_array(constants[node.input[1]]).reshape(-1))
            keeps = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
            if keeps and (axes == [-2, -1] or (axes == [2, 3] and ranks.get(node.input[0], 4) == 4)):
                node.op_type = "GlobalAveragePool"
                del node.input[1:], node.attribute[:]
    _melt_padding(onnx, graph, constants)
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in read]:
        graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]
    for item in [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        del item.metadata_props[:]
        item.doc_string = ""
    for info in graph.input:
        info.type.tensor_type.shape.dim[0].dim_param = "batch"
    for info in graph.output:
        dims = info.type.tensor_type.shape.dim
        if len(dims) and dims[0].dim_param:
            dims[0].dim_param = "batch"
    model.producer_name, model.producer_version = "rarefy", ""


def _melt_padding(onnx: Any, graph: Any, constants: dict[str, Any]) -> None:
    """Zeros around the plane that only convolutions read become the convolutions' own padding."""
    for pad in [node for node in graph.node if node.op_type == "Pad" and node.input[1] in constants]:
        mode = next((attribute.s.decode() for attribute in pad.attribute if attribute.name == "mode"), "constant")
        sizes = [int(size) for size in onnx.numpy_helper.to_array(constants[pad.input[1]]).reshape(-1)]
        value = pad.input[2] if len(pad.input) > 2 else ""
        zero = not value or (value in constants and not onnx.numpy_helper.to_array(constants[value]).any())
        readers = [node for node in graph.node if pad.output[0] in node.input]
        plain = all(node.op_type == "Conv" and node.input[0] == pad.output[0] for node in readers)
        if mode != "constant" or not zero or not plain or len(sizes) != 8 or any(sizes[:2] + sizes[4:6]) or min(sizes) < 0:
            continue
        around = sizes[2:4] + sizes[6:8]
        for node in readers:
            present = {attribute.name: attribute for attribute in node.attribute}
            own = list(present["pads"].ints) if "pads" in present else [0] * 4
            for name in ("pads", "auto_pad"):
                if name in present:
                    node.attribute.remove(present[name])
            node.attribute.append(onnx.helper.make_attribute("pads", [one + two for one, two in zip(own, around, strict=True)]))
            node.input[0] = pad.input[0]
        graph.node.remove(pad)


def _value_name(node: fx.Node) -> str:
    """``conv2d_3`` for the node that quantises with ``quantization.conv2d_3.scale``."""
    return str(node.args[1].target).split(".")[1]


def _codes_in(model: Any) -> dict[str, str]:
    """Value name -> the first tensor of codes made with its scale."""
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1].startswith("quantization."):
            found.setdefault(node.input[1].split(".")[1], node.output[0])
    return found


def _is_integer(node: Any) -> bool:
    return node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QMoE", "QAttention"))
