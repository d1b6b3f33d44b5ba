"""Names of an ONNX file: each stands for one thing, and inputs and outputs have the model's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rarefy import capture, export, quantize
from rarefy.deployment.onnx import file as file_module
from rarefy.graph.signature import input_names, returned

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


class Named(nn.Module):
    """A buffer of that name on the top module, beside operators, weights and an output."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer(name, torch.full((1, 3, 1, 1), 0.45))
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.conv((x - getattr(self, self.name)) * 4.0))
        return self.head(features.mean((2, 3)))


def names_of(file: object) -> list[str]:
    """Every tensor that the file defines, in order."""
    graph = file.graph  # type: ignore[attr-defined]
    made = [name for node in graph.node for name in node.output if name]
    return [*(one.name for one in graph.input), *(one.name for one in graph.initializer), *made]


@pytest.mark.parametrize(
    "name", ["mean", "sub", "sub_1", "relu", "conv2d", "linear", "x", "x_1", "output", "constant_0", "conv", "shift"]
)
@pytest.mark.parametrize("integer", [False, True], ids=["float", "int8"])
def test_a_name_stands_for_one_thing(name: str, integer: bool, tmp_path) -> None:
    if name == "conv":  # a layer has it; one inside it is tried
        model: nn.Module = Named("shift")
        model.conv.register_buffer("weight_1", torch.ones(1))
    else:
        model = Named(name)
    x = torch.rand(2, 3, 8, 8)
    graph = capture(model.eval(), x)
    if integer:
        graph = quantize(graph, batches=[x], progress=False)
    assert export(graph, tmp_path / "names.onnx", inputs=x)["passed"]
    file = onnx.load(tmp_path / "names.onnx")
    onnx.checker.check_model(file, full_check=True)
    names = names_of(file)
    assert len(set(names)) == len(names)
    assert [one.name for one in file.graph.input] == ["x"] and [one.name for one in file.graph.output] == ["output"]


def test_a_weight_that_is_stored_otherwise_does_not_take_anothers_name(tmp_path) -> None:
    """Transposed, a weight is called ``weight_transposed``: so may be another tensor of the model."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.weight_transposed = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + nn.functional.linear(x, self.weight_transposed.mT)

    for shape in ((2, 4), (2, 6, 4)):
        parity = export(Transposed(), tmp_path / "model.onnx", inputs=torch.randn(shape))
        assert parity["passed"] and parity["largest_difference"] < 1e-5


class Answers(nn.Module):
    """Image and table in; what ``form`` makes of logits, features and the table out."""

    def __init__(self, form) -> None:
        super().__init__()
        self.conv, self.head, self.form = nn.Conv2d(3, 4, 3), nn.Linear(8, 5), form
        self.register_buffer("prior", torch.ones(1, 5))

    def forward(self, image: Tensor, table: Tensor) -> object:
        features = torch.cat([self.conv(image).relu().mean((2, 3)), table], 1)
        return self.form(self.head(features), features, table, self.prior)


FORMS = {
    "tensor": (lambda y, f, t, p: y, ["output"]),
    "tuple": (lambda y, f, t, p: (y, f), ["output_0", "output_1"]),
    "dict": (lambda y, f, t, p: {"logits": y, "features": f}, ["logits", "features"]),
    "nested": (lambda y, f, t, p: {"logits": y, "hidden": (f, f * 2)}, ["logits", "hidden_0", "hidden_1"]),
    "twice": (lambda y, f, t, p: {"logits": y, "again": y}, ["logits", "again"]),
    "an input": (lambda y, f, t, p: {"logits": y, "table": t}, ["logits", "table_1"]),
    "a constant": (lambda y, f, t, p: {"logits": y, "prior": p}, ["logits", "prior"]),
    "a view": (lambda y, f, t, p: (y.flatten(1), y.split(2, 1)[0]), ["output_0", "output_1"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_outputs_have_the_models_names(form: str, tmp_path) -> None:
    make, names = FORMS[form]
    inputs = torch.randn(3, 3, 8, 8), torch.randn(3, 4)
    graph = capture(Answers(make).eval(), inputs)
    path = file_module.write(graph, tmp_path / "named.onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == input_names(graph) == ["image", "table"]
    assert [one.name for one in session.get_outputs()] == names
    found = session.run(None, {"image": inputs[0].numpy(), "table": inputs[1].numpy()})
    exact = list(torch.utils._pytree.tree_leaves(graph(*inputs)))
    for ours, theirs in zip(exact, found, strict=True):
        assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5)


def test_torchs_exporter_is_told_the_names(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    graph = capture(
        Answers(lambda y, f, t, p: {"logits": torch.atan(y), "features": f}).eval(),
        (torch.randn(3, 3, 8, 8), torch.randn(3, 4)),
    )
    file = onnx.load(file_module.write(graph, tmp_path / "named.onnx"))
    assert [one.name for one in file.graph.input] == ["image", "table"]
    assert [one.name for one in file.graph.output] == ["logits", "features"]


def test_names_that_the_capture_recorded_go_before_those_of_the_graph() -> None:
    graph = capture(nn.Linear(4, 3), torch.randn(2, 4))
    assert (input_names(graph), [name for name, _ in returned(graph)]) == (["input"], ["output"])
    graph.meta["names"] = {"inputs": ["tokens"], "outputs": ["scores"]}
    assert (input_names(graph), [name for name, _ in returned(graph)]) == (["tokens"], ["scores"])
