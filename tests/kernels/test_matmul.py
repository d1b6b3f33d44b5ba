"""Products of two activations in integers: queries and keys are rounded, whatever form attention has; probabilities and
what is not asked for stay float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import ChunkedAttention, UnboundAttention
from torch import Tensor, fx

from rarefy import plugins
from rarefy.artifact import folder
from rarefy.distillation.qat import to_codes, to_trainable
from rarefy.graph.canonical import simplify
from rarefy.graph.capture import capture
from rarefy.graph.fold import fold
from rarefy.graph.layers import layer_name
from rarefy.graph.lowering import to_integers, to_numbers
from rarefy.graph.nodes import attribute
from rarefy.kernels.quantize import dequantize
from rarefy.quantization.placement import place
from rarefy.quantization.quantize import quantize

aten = torch.ops.aten
PRODUCT = torch.ops.rarefy.matmul.default


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return list(torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(0)).split(16))


@pytest.fixture(scope="module", params=[UnboundAttention, ChunkedAttention])
def graph(request: pytest.FixtureRequest, batches: list[Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(request.param().eval(), batches[0])


@pytest.fixture(scope="module")
def small(graph: fx.GraphModule, batches: list[Tensor]) -> fx.GraphModule:
    return quantize(graph, batches=batches, runtime="openvino", progress=False)


def products(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is PRODUCT]


def test_attention_in_parts_answers_as_one_operator(graph: fx.GraphModule, batches: list[Tensor]) -> None:
    simpler = simplify(fold(graph))
    assert not any(node.target is aten.scaled_dot_product_attention.default for node in simpler.graph.nodes)
    assert torch.allclose(simpler(batches[0]), graph(batches[0]), atol=1e-6)


def test_queries_and_keys_have_grids_of_their_own_around_zero(
    small: fx.GraphModule, graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    (product,) = products(small)
    grids = [[attribute(small, source) for source in product.args[at : at + 2]] for at in (2, 4)]
    assert all(zero.dtype == torch.int8 and int(zero) == 0 for _, zero in grids)
    placement = place(simplify(fold(graph)), plugins.resolve("runtimes", "openvino").capabilities)
    assert [layer_name(layer) for layer in placement.layers] == ["qkv", "out"] and len(placement.centered) == 2
    assert not any(
        value.target is aten.linear.default for value in placement.values
    )  # rounded as a whole, parts would be rounded twice
    assert not set(placement.values) & set(placement.carried)
    noise = (small(batches[0]) - graph(batches[0])).square().mean() / graph(batches[0]).var()
    assert noise < 1e-3


def test_the_product_is_that_of_the_numbers_and_its_sums_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
        for shape in ((2, 3, 7, 64), (2, 3, 64, 5))
    )
    one, steps = torch.zeros((), dtype=torch.int8), (torch.tensor(0.03), torch.tensor(0.5))
    found = PRODUCT(a, b, steps[0], one, torch.tensor(1.0), one) / steps[0]
    assert torch.equal(found.round().long(), a.long() @ b.long())
    numbers = dequantize(a, steps[0], one, None).double() @ dequantize(b, steps[1], one, None).double()
    assert torch.allclose(PRODUCT(a, b, steps[0], one, steps[1], one).double(), numbers, rtol=1e-5, atol=1e-4)


def test_forms_training_and_folder_keep_the_answers(
    small: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    x, wanted = batches[0], small(batches[0])
    numbers = to_numbers(small)
    assert not products(numbers) and torch.allclose(numbers(x), wanted, atol=1e-5)
    assert len(products(to_integers(numbers))) == 1
    assert torch.equal(folder.load(folder.save(small, tmp_path / "small"))(x), wanted)
    learns = to_trainable(small)
    assert torch.allclose(learns(x), wanted, atol=1e-4)
    learns(x).square().sum().backward()
    assert torch.equal(to_codes(small, learns)(x), wanted)


def test_the_file_agrees(small: fx.GraphModule, batches: list[Tensor], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    runtime = plugins.resolve("runtimes", "openvino:threads=1")
    found = runtime.compare(small, runtime.export(small, tmp_path / "model.onnx"), torch.cat(batches))
    assert found["ulp"] <= 1 and found["first_diverging_layer"] is None and len(found["layers"]) >= 4


def test_left_out_by_name_and_where_the_runtime_has_none(
    graph: fx.GraphModule, batches: list[Tensor], small: fx.GraphModule
) -> None:
    assert not products(quantize(graph, batches=batches, runtime="onnxruntime", progress=False))
    (product,) = place(simplify(fold(graph)), plugins.resolve("runtimes", "openvino").capabilities).products
    assert not products(quantize(graph, batches=batches, runtime="openvino", ignore=[product.name], progress=False))
    low = quantize(graph, batches=batches, runtime="openvino", activations="uint4", progress=False)
    assert (low(batches[0]) - graph(batches[0])).square().mean() > (
        small(batches[0]) - graph(batches[0])
    ).square().mean()
