"""explain(): the noise told is that of the answers, more bits make less of it, and every operator in float has its
reason."""

from __future__ import annotations

import math

import pytest
import torch
from networks import WithoutKernels
from torch import nn

import rarefy
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.quantization.explain import IMAGES, explain
from rarefy.quantization.quantize import quantize
from rarefy.reports import facts, report, view


@pytest.fixture(scope="module")
def graph() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return capture(WithoutKernels().eval(), torch.randn(2, 3, 16, 16))


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return list(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(16))


def test_noise_of_the_last_layer_is_that_of_the_answers(
    graph: torch.fx.GraphModule, batches: list[torch.Tensor]
) -> None:
    small = quantize(graph, batches=batches, progress=False)
    rows = {row["name"]: row for row in explain(small)["layers"]}
    x = batches[0][:IMAGES]
    with torch.no_grad():
        wanted, got = graph(x), small(x)
    expected = 10 * math.log10(float((wanted - wanted.mean(0)).square().sum() / (wanted - got).square().sum()))
    assert rows["head"]["sqnr_db"] == pytest.approx(expected, abs=0.05)
    assert rows["stem"]["sqnr_db"] > 25
    assert (rows["stem"]["bits"], rows["stem"]["grid"], rows["stem"]["activation_grid"]) == (8, "int8", "uint8")
    low, high = rows["stem"]["range"]
    assert low < 0 < high <= float(torch.cat(batches).max()) + 1e-6
    rough = {
        row["name"]: row
        for row in explain(quantize(graph, batches=batches, weights="int8;inner=int3", progress=False))["layers"]
    }
    assert (
        rough["stem"]["sqnr_db"] == pytest.approx(rows["stem"]["sqnr_db"])
        and rough["inner"]["sqnr_db"] < rows["inner"]["sqnr_db"] - 10
    )


def test_each_operator_in_float_has_its_reason(graph: torch.fx.GraphModule, batches: list[torch.Tensor]) -> None:
    why = {row["name"]: row["why"] for row in explain(quantize(graph, batches=batches, progress=False))["float"]}
    assert why.pop("conv_transpose1d") == "the runtime has no integer kernel for conv_transpose1d"
    said = sorted(set(why.values()))
    assert "the runtime has no integer kernel for erf" in said and "this form of add has no integer kernel" in said
    assert any(one.startswith("reads ") and one.endswith("which is in float") for one in said)
    found = explain(quantize(graph, batches=batches, ignore=["inn*"], weights="int8;head=float", progress=False))
    rows = {row["name"]: row for row in found["float"]}
    assert rows["inner"]["why"] == "ignored: inn*" and rows["inner"]["sqnr_db"] > 20
    assert rows["head"]["why"] == "weights=float for this layer"
    assert [row["name"] for row in found["layers"]] == ["stem"]


def test_a_convolution_whose_weight_hangs_on_the_input_stays_float(batches: list[torch.Tensor]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.weight, self.head = (
                nn.Conv2d(3, 8, 3),
                nn.Parameter(torch.randn(8, 8, 3, 3)),
                nn.Linear(8, 5),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head(nn.functional.conv2d(x, self.weight * x.mean()).mean((2, 3)))

    torch.manual_seed(0)
    found = explain(quantize(capture(Masked().eval(), batches[0]), batches=batches, progress=False))
    why = {row["name"]: row["why"] for row in found["float"]}
    assert [row["name"] for row in found["layers"]] == ["stem", "head"]
    assert [reason for name, reason in why.items() if "conv2d" in name] == ["its weight is computed, not stored"]


def test_a_layer_is_in_one_of_the_two_tables(graph: torch.fx.GraphModule, batches: list[torch.Tensor]) -> None:
    for options in ({}, {"ignore": ["*"]}, {"ignore": ["stem"]}):
        try:
            small = quantize(graph, batches=batches, progress=False, **options)
        except InputError:
            assert options == {"ignore": ["*"]}
            continue
        found = explain(small)
        integer, floats = ({row["name"] for row in found[key]} for key in ("layers", "float"))
        assert not integer & floats and {"stem", "inner", "conv_transpose1d", "head"} <= integer | floats


def test_a_saved_model_and_weights_alone_are_explained(
    graph: torch.fx.GraphModule, batches: list[torch.Tensor], tmp_path
) -> None:
    small = quantize(graph, batches=batches, progress=False)
    rarefy.save(small, tmp_path / "small")
    assert explain(rarefy.load(tmp_path / "small")) == explain(small)
    rows = explain(quantize(graph, activations="float", weights="int4:group=4", progress=False))["layers"]
    assert {row["grid"] for row in rows} == {"int4:group=4"} and {row["sqnr_db"] for row in rows} == {None}
    with pytest.raises(InputError, match="not quantised"):
        explain(graph)


def test_the_report_names_the_noisiest_layers(graph: torch.fx.GraphModule, batches: list[torch.Tensor]) -> None:
    small = quantize(graph, batches=batches, weights="int8;inner=int2", ignore=["head"], progress=False)
    told = facts.told_by(small.meta["history"])
    shown = view.view(told)["layers"]
    rows = [row for key in ("layers", "float") for row in explain(small)[key] if row["sqnr_db"] is not None]
    noisiest = min((row for row in rows if row in explain(small)["layers"]), key=lambda row: row["sqnr_db"])
    assert shown["worst"][0] == (noisiest["name"], f"{noisiest['sqnr_db']:.1f} dB")
    page = report.html(told)
    assert "noisiest outputs" in page and "ignored: head" in page
