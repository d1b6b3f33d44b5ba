"""TensorRT: the Q/DQ ONNX file that it runs in integers throughout, on NVIDIA's GPUs.

TensorRT takes the pairs of a file as they are and melts them into its kernels where they stand as it wants; where
they do not, it runs that part in float and says nothing. So the file is held against its rules before it is handed out
(``rarefy.deployment.tensorrt_rules``): symmetric int8 activations, weights by channel, no pair between a convolution
and the sum it ends in, one scale at a concatenation, biases in float. A model is placed that way when it is quantised
for it:

    rarefy quantize MODEL --runtime tensorrt

What is not in codes is float32 in the file: build the engine with ``trtexec --onnx=FILE --fp16`` (before release 11) to
have it in half precision. TensorRT's libraries are not on PyPI's own index, so rarefy does not run it: the file's
answers are compared in ONNX Runtime, with its products on codes (``_tensorrt_sums``), else as the file says.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx

from rarefy.deployment import parity
from rarefy.deployment.onnx import file
from rarefy.deployment.runtime import CARRIERS, PLANAR, Capabilities, Inputs, Kernel, Parity, Runtime, Session
from rarefy.deployment.tensorrt_rules import Finding, findings
from rarefy.errors import InputError
from rarefy.graph.fold import fold
from rarefy.graph.lowering import is_decoded, to_numbers
from rarefy.graph.nodes import argument, attribute, finish, set_attribute
from rarefy.kernels import is_quantised
from rarefy.runtimes._tensorrt_sums import on_codes
from rarefy.runtimes.onnxruntime import OnnxRuntime
from rarefy.system.dependencies import needs

aten = torch.ops.aten
OPERATORS = torch.ops.rarefy

SHOWN = 3  # findings in a message


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """TensorRT's ONNX file, for NVIDIA's GPUs: checked against its rules, compared in ONNX Runtime, not run here.

    Quantise for it: it takes symmetric grids alone, and pairs where its kernels want them.
    """

    suffix = ".onnx"
    decoded = False
    package = "onnxruntime"  # that compares its files
    threads = 0
    why_not = "TensorRT is not run by rarefy: build the engine with trtexec --onnx=FILE"
    capabilities = Capabilities(
        layers=PLANAR,
        joins=frozenset({aten.add.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default}),
        carriers=CARRIERS,
        clips=frozenset(),
        float_result=PLANAR,
        centered=True,
        residuals=True,
        has_threads=False,
        runs=False,
    )

    @property
    def weight_bits(self) -> int:
        """Tensor cores add in 32 bits."""
        return 8

    @property
    def floats(self) -> tuple[TensorRT, ...]:
        """Ways to run a float network."""
        return (self,)

    def export(self, graph: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
        """Write ``graph`` (in eval mode) as an ONNX file. Raises InputError where the file breaks TensorRT's rules."""
        file.write(_profiled(graph), path, zero_points=False)
        found = findings(needs("onnx").load(os.fspath(path)))
        if found:
            os.remove(path)
            raise InputError(_refusal(path, found))
        return Path(path)

    def open(self, path: str | os.PathLike[str]) -> Session:
        """TensorRT is not run by rarefy."""
        raise InputError(
            f"{path}: TensorRT's libraries are not on PyPI, so rarefy does not run its files: "
            f"trtexec --onnx={path} builds and times the engine; onnxruntime opens the file, too"
        )

    def compare(
        self,
        graph: fx.GraphModule,
        path: str | os.PathLike[str],
        inputs: Inputs,
        batch: int = 32,
        on: Runtime | None = None,
    ) -> Parity:
        """Parity of ``graph`` and its file, run by ``on`` (None: ONNX Runtime), its products taken on codes."""
        reader = on or OnnxRuntime(threads=1)
        model = needs("onnx").load(os.fspath(path))
        on_codes(model)

        def tapped(names: Sequence[str]) -> Session:
            return parity.opened_with(model, names, path, reader)

        return parity.compare(_paired(graph), path, inputs, reader, batch, tapped)

    def kernel_times(self, path: str | os.PathLike[str], inputs: Inputs, seconds: float = 1.5) -> list[Kernel]:
        """None."""
        raise InputError("tensorrt: rarefy does not run TensorRT and tells no times of kernels; use onnxruntime")


def _refusal(path: str | os.PathLike[str], found: list[Finding]) -> str:
    told = "; ".join(str(one) for one in found[:SHOWN])
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{path}: TensorRT would not run it in integers throughout: {told}{more}; quantise the model with "
        "--runtime tensorrt"
    )


def _paired(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy in numbers whose branches are decoded where a sum reads them."""
    graph = to_numbers(graph) if is_quantised(graph) else fold(graph)
    _round_padded(graph)
    return finish(graph)


def _profiled(graph: fx.GraphModule) -> fx.GraphModule:
    """The same, its biases floats."""
    graph = _paired(graph)
    for node in list(graph.graph.nodes):
        if node.target not in PLANAR or not is_decoded(argument(node, "bias")):
            continue
        decoding = argument(node, "bias")
        codes, scale = argument(decoding, "q"), argument(decoding, "scale")
        name = f"{codes.target}_numbers"
        numbers = attribute(graph, codes).double() * attribute(graph, scale).double()
        set_attribute(graph, name, numbers.float())
        with graph.graph.inserting_before(node):
            node.replace_input_with(decoding, graph.graph.get_attr(name))
    return finish(graph)


def _round_padded(graph: fx.GraphModule) -> None:
    """A pair behind the padding of a branch that a sum reads, on the grid that it has: it changes no number."""
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.pad.default)):
        sums = [user for user in node.users if user.target is aten.add.Tensor]
        source = node
        while source.target in CARRIERS or source.target is aten.pad.default:
            source = source.args[0]
        if not sums or not is_decoded(source) or argument(node, "mode") != "constant" or argument(node, "value"):
            continue
        rounding = argument(source, "q")
        pair = (rounding.target, source.target) == (OPERATORS.quantize.default, OPERATORS.dequantize.default)
        if pair and rounding.args[1:3] == source.args[1:3]:
            with graph.graph.inserting_after(node):
                codes = graph.graph.call_function(
                    OPERATORS.quantize.default, (node, *rounding.args[1:]), dict(rounding.kwargs)
                )
            with graph.graph.inserting_after(codes):
                decoded = graph.graph.call_function(
                    OPERATORS.dequantize.default, (codes, *source.args[1:]), dict(source.kwargs)
                )
            for total in sums:
                total.replace_input_with(node, decoded)
