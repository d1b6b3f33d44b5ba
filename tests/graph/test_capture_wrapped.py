"""Models inside of others' hands: compiled, data parallel, under parametrizations, masks and autocast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import rarefy
from rarefy.errors import CaptureError
from rarefy.graph.capture import capture
from rarefy.graph.macs import layer_macs


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def compiled_in_place() -> nn.Module:
    model = body()
    model.compile()
    return model


def compiled_within() -> nn.Module:
    model = body()
    return nn.Sequential(torch.compile(model[0]), model[1], nn.DataParallel(model[2]))  # type: ignore[arg-type]


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(body()),  # type: ignore[return-value]
    "compiled in place": compiled_in_place,
    "compiled and parallel within": compiled_within,
    "data parallel": lambda: nn.DataParallel(body()),
    "both": lambda: nn.DataParallel(torch.compile(body())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.filterwarnings("ignore")
def test_what_only_wraps_a_model_leaves_no_word_in_its_names(kind: str) -> None:
    graph, plain = capture(WRAPPED[kind](), torch.randn(2, 3, 8, 8)), body()
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(graph(x), plain(x), atol=1e-6)
    assert set(graph.state_dict()) == set(plain.state_dict())
    assert not any("module" in node.meta.get("stack", "") for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_torchscript_is_refused() -> None:
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(torch.jit.trace(body(), torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore")
def test_a_part_that_is_a_program_of_torchscript_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.BatchNorm2d(4)), torch.jit.script(nn.Conv2d(4, 2, 1)))
    with pytest.raises(CaptureError, match="1 is a program of TorchScript.*put the nn.Module"):
        capture(model.eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore")
def test_every_convolution_has_its_own_operator() -> None:
    """Of a traced part, and of a program that was taken apart, there is one operator for all of them."""
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), nn.Conv2d(6, 6, 3, groups=6)]
    torch.manual_seed(0)
    model, x = nn.Sequential(*layers).eval(), torch.randn(3, 3, 8, 8)
    line = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 2, 3, 2, output_padding=1)).eval()
    parts = torch.jit.trace(nn.Sequential(*layers), x)
    free = ({0: torch.export.Dim.DYNAMIC},)
    for made, exact, given in (
        (nn.Sequential(parts), model, x),
        (torch.export.export(model, (x,), dynamic_shapes=free).run_decompositions(), model, x),
        (torch.export.export(line, (x[..., 0],), dynamic_shapes=free).run_decompositions(), line, x[..., 0]),
    ):
        graph = capture(made, given)
        assert torch.allclose(graph(given[:2]), exact(given[:2]), atol=1e-6)
        kinds = {str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"}
        assert kinds <= {"conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"}


def test_an_exported_program_is_a_model() -> None:
    model, x = body(), torch.randn(3, 3, 8, 8)
    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=free)
    for one in (program, program.module()):
        graph = rarefy.capture(one, x)
        assert torch.allclose(graph(x[:2]), model(x[:2]), atol=1e-6)
        assert set(graph.state_dict()) == set(model.state_dict())
        assert rarefy.prune(graph, keep=0.5)(x).shape == (3, 2, 6, 6)
    with pytest.raises(CaptureError, match=r"for batches of 3 only; export it again with dynamic_shapes="):
        rarefy.capture(torch.export.export(model, (x,)), x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def masked(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def parametrized(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        masked,
        parametrized,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_others_make_is_stored_as_it_is(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), wrap(nn.Conv2d(4, 4, 1)), nn.Flatten(), wrap(nn.Linear(144, 3)))
    graph = capture(model.eval(), torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(graph(x), model(x), atol=1e-5)
    assert set(graph.state_dict()) == {f"{index}.{name}" for index in (0, 1, 3) for name in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in graph.parameters()) and len(layer_macs(graph)) == 3


def test_a_parametrized_layer_that_is_called_twice_has_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = parametrizations.spectral_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice().eval()
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.allclose(graph(x), model(x), atol=1e-6) and set(graph.state_dict()) == {"layer.weight", "layer.bias"}


def test_a_tensor_that_more_than_the_parametrization_reads_stays() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = parametrizations.spectral_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x @ self.layer.parametrizations.weight.original

    model = Penalised().eval()
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    assert "layer.parametrizations.weight.original" in graph.state_dict()


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x).softmax(1)
            z = self.linear(y)
            with torch.no_grad():
                total = self.linear(y).sum()
            with torch.autocast("cpu", enabled=False):
                exact = self.linear(y.float())
        return z * total + exact


def test_autocast_around_a_part_is_its_types_in_so_many_words() -> None:
    model = Regions().eval()
    graph = capture(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    found, wanted = graph(x), model(x)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert any(node.target is torch.ops.aten.to.dtype for node in graph.graph.nodes)


def test_batch_norm_under_autocast_keeps_its_statistics(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
            self.norm.running_var.mul_(1.7)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.norm(self.conv(x)).relu()
            return self.head(x.float().mean((2, 3)))

    model, x = Half().eval(), torch.randn(3, 3, 8, 8)
    graph = capture(model, x)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(rarefy.load(rarefy.save(graph, tmp_path / "saved"))(x), graph(x))
    with pytest.raises(rarefy.RarefyError, match="without torch.autocast, or as model.float"):
        rarefy.export(graph, tmp_path / "half.onnx", inputs=x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_recurrent_layer_takes_any_batch(kind: type[nn.Module], options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = kind(4, 6, batch_first=True, **options).eval()
    graph = capture(model, torch.randn(2, 5, 4))
    for batch in (1, 7):
        x = torch.randn(batch, 5, 4)
        found, wanted = graph(x), model(x)
        assert torch.allclose(found[0], wanted[0], atol=1e-6) and type(found) is type(wanted)
