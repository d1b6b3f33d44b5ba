"""Each operator of the table, written as ONNX and run in ONNX Runtime at another batch size, against the graph in
PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import OfParameters, Recurrent, Stepped
from torch import Tensor, nn

from rarefy import capture
from rarefy.deployment.onnx import file as file_module
from rarefy.deployment.onnx.file import write
from rarefy.deployment.onnx.model import FAMILIES, ROWS, onnx_model, operators
from rarefy.deployment.onnx.writer import Untranslated
from rarefy.errors import InputError
from rarefy.graph.fold import fold_constants

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

PLANE, TOKENS = (6, 9, 7), (10, 12)  # (channels, height, width), (positions, width)


def pooled(x: Tensor, m: OfParameters) -> Tensor:
    return F.adaptive_avg_pool2d(x, (4, 3)) + F.adaptive_avg_pool2d(x, (1, 1))


def places(x: Tensor, m: OfParameters) -> Tensor:
    """Where the largest of each window stands, in its own plane."""
    found = F.max_pool2d(x, 3, 2, 1, return_indices=True)[1], F.adaptive_max_pool2d(x, (3, 1), return_indices=True)[1]
    return torch.cat([one.flatten(1) for one in found], 1).to(x)


def counted(x: Tensor, m: OfParameters) -> Tensor:
    """Sizes that are products of the batch."""
    n, _, h, w = x.shape
    return (x.reshape(n * 2, 3, h, w) * 2).sum(1).reshape(n, 2, h, w)


def scattered(x: Tensor, m: OfParameters) -> Tensor:
    x = x.clone()
    x[:, 2:4] = x[:, :2] * 2
    x[:, -1] = 0.0
    return x


def table(x: Tensor, m: OfParameters) -> Tensor:
    """A table of relative positions, gathered by two indices, from parameters alone."""
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    return x[:, :3, :4] + m.w[rows, columns]


def attention(x: Tensor, m: OfParameters) -> Tensor:
    queries, keys, values = F.linear(x, m.w).reshape(x.shape[0], 10, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.ones(10, 10, dtype=torch.bool).tril(2)
    together = F.scaled_dot_product_attention(queries, keys, values, mask) + F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True
    )
    return together.transpose(1, 2).flatten(2)


def with_token(x: Tensor, m: OfParameters) -> Tensor:
    token = m.w[:1, :].expand(x.shape[0], 1, -1)
    return torch.cat([token, x], 1)[:, 0] + x.new_zeros(x.shape[0], 1)


def windows(x: Tensor, m: OfParameters) -> Tensor:
    x = torch.roll(F.pad(x, (0, 1, 0, 1))[:, :, :8, :8], (-1, 2), (2, 3))
    batch, channels = x.shape[:2]
    x = x.view(batch, channels, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, channels)
    return x.softmax(1).view(batch, 2, 2, 16 * channels)


ON_PLANES: dict[str, Callable[[Tensor, OfParameters], Tensor]] = {
    "arithmetic": lambda x, m: torch.add(x, x.exp(), alpha=0.5) / (1 - x.abs()) - 2 * x.square().sqrt(),
    "comparison": lambda x, m: torch.where(x > 0, x, -1.0) + (x <= 0.5).float() + x.masked_fill(x == 0, 3.0),
    "clips": lambda x, m: F.relu6(4 * x) + F.hardtanh(x) + x.clamp(min=-0.5) + x.clamp_min(0.1) + x.clamp(max=0.7),
    "gates": lambda x, m: (
        F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.hardswish(x) + F.hardsigmoid(x) + F.mish(x)
    ),
    "units": lambda x, m: (
        F.elu(x, 0.7) + F.leaky_relu(x, 0.1) + F.prelu(x, m.a) + F.softplus(x) + F.glu(torch.cat([x, x], 1), 1)
    ),
    "norms": lambda x, m: F.group_norm(x, 3, m.a, m.b) + F.batch_norm(x, m.a.detach(), m.b.detach() + 1, m.b, m.a),
    "average": lambda x, m: F.avg_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "ceiling": lambda x, m: F.avg_pool2d(x, 2, 2, ceil_mode=True) + F.max_pool2d(x, 2, 2, ceil_mode=True),
    "larger": lambda x, m: F.avg_pool2d(x, 40, ceil_mode=True) + F.max_pool2d(x, (30, 7), ceil_mode=True),
    "divisor": lambda x, m: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive": pooled,
    "largest": lambda x, m: (
        F.max_pool2d(x, 3, 1, 1) + x.amax(1, keepdim=True) + x.max(1, keepdim=True)[0] + F.adaptive_max_pool2d(x, 1)
    ),
    "places": places,
    "counted": counted,
    "nearest": lambda x, m: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x, m: (
        F.interpolate(x, (13, 4), mode="bilinear") + F.interpolate(x, (13, 4), mode="bilinear", align_corners=True)
    ),
    "bicubic": lambda x, m: F.interpolate(x, (13, 11), mode="bicubic"),
    "statistics": lambda x, m: (
        x.mean((2, 3), keepdim=True) + x.var(1, keepdim=True) + x.std((2, 3), keepdim=True) + x.sum()
    ),
    "length": lambda x, m: F.normalize(x, dim=1) + x.norm(dim=2, keepdim=True) + x.logsumexp(1, keepdim=True),
    "wrapped": lambda x, m: F.pad(x, (1, 2, 0, 1), "circular") + F.pad(x, (2, 1, 1, 0), "circular"),
    "uneven": lambda x, m: F.adaptive_max_pool2d(x, (4, 3)),
    "middle": lambda x, m: x.median(1)[0] + x.kthvalue(2, 1)[0] + x.median(2, keepdim=True)[0][:, 0],
    "order": lambda x, m: (
        x.sort(1)[0]
        + x.sort(2, descending=True)[0]
        + x.argsort(3)
        + torch.msort(x.transpose(0, 1)).transpose(0, 1)
        + sum(torch.aminmax(x, dim=1, keepdim=True))
    ),
    "running": lambda x, m: x.cumprod(3) + x.cummax(2)[0] + x.cummin(1)[0],
    "margins": lambda x, m: (
        F.pad(x, (1, 2, 0, 1), value=0.5) + F.pad(x, (1, 2, 0, 1), "reflect") + F.pad(x, (2, 1, 1, 0), "replicate")
    ),
    "shuffle": lambda x, m: (
        F.channel_shuffle(x, 3) + F.pixel_unshuffle(F.pixel_shuffle(torch.cat([x, x], 1), 2), 2)[:, :6]
    ),
    "patches": lambda x, m: F.unfold(x, 3, padding=1, stride=2),
    "folded": lambda x, m: F.fold(F.unfold(x, 3, padding=1, stride=2), (9, 7), 3, padding=1, stride=2),
    "windowed": lambda x, m: x.unfold(2, 4, 2).unfold(3, 3, 2).flatten(2),
    "turned": lambda x, m: (
        x.flip(2) + x.transpose(1, 2).movedim(1, 2) + x.permute(0, 3, 1, 2).swapaxes(2, 3).permute(0, 3, 2, 1)
    ),
    "repeated": lambda x, m: x.repeat(1, 2, 1, 1) + x.repeat_interleave(2, 1) + x.tile((2, 1, 1)),
    "parts": lambda x, m: (
        sum(x.chunk(3, 1)) + sum(x.split(2, 1)) + x.split((2, 4), 1)[0] + x.narrow(1, 1, 2) + x[:, 1:5:2]
    ),  # type: ignore[operator, return-value]
    "scattered": scattered,
    "windows": windows,
    "transposed": lambda x, m: F.conv_transpose2d(
        x, m.w[:6, :4, None, None].expand(6, 4, 3, 3), stride=2, padding=1, output_padding=1
    ),
    "same": lambda x, m: F.conv2d(x, m.w[:6, :6, None, None].expand(6, 6, 4, 3), padding="same", dilation=2),
    "ordered": lambda x, m: x.topk(3, 1)[0] + x.cumsum(1)[:, :3] + x.argmax(1, keepdim=True),
    "sampled": lambda x, m: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
}
ON_TOKENS: dict[str, Callable[[Tensor, OfParameters], Tensor]] = {
    "attention": attention,
    "with_token": with_token,
    "table": table,
    "products": lambda x, m: (
        x @ m.w + torch.einsum("bij,jk->bik", x, m.w) + torch.baddbmm(x, x @ x.transpose(1, 2), x, beta=0.5, alpha=2)
    ),
    "layer_norm": lambda x, m: F.layer_norm(x, (12,)) + F.rms_norm(x, (12,), m.w[0]) + F.layer_norm(x, (10, 12)),
    "softmax": lambda x, m: x.softmax(-1) + x.log_softmax(1),
    "heads": lambda x, m: (
        x.unflatten(2, (3, 4)).flatten(2) + torch.stack([x, 2 * x], 1).squeeze().select(1, 1) + x.unsqueeze(1)[:, 0]
    ),
    "gathered": lambda x, m: (
        x[:, [3, 0, -1]] + x.index_select(1, torch.tensor([1, 2, 2])) + x.gather(1, x[:, :3].abs().long().clamp(max=9))
    ),
    "one_hot": lambda x, m: F.one_hot(x.abs().long().clamp(max=6), 12).to(x).sum(2) @ m.w,
    "triangles": lambda x, m: x.tril(-1) + x.triu(1) + torch.full_like(x, 2.0) + torch.zeros_like(x) + torch.arange(12),
    "average": lambda x, m: F.avg_pool1d(x, 2) + F.conv1d(x, m.w[:10, :10, None]).unflatten(2, (6, 2))[..., 0],
    "powers": lambda x, m: (
        x.abs().pow(1.5)
        + x**2
        + torch.lerp(x, 2 * x, 0.3)
        + torch.addcmul(x, x, x, value=0.1)
        + torch.rsub(x, 1, alpha=2)
    ),
}
CASES = [(name, PLANE, case) for name, case in ON_PLANES.items()] + [
    (name, TOKENS, case) for name, case in ON_TOKENS.items()
]


def ran(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The answers of the table's file and of the model, to a batch of five; it was captured with two."""
    graph = fold_constants(capture(model.eval(), torch.randn(2, *shape)))
    file = onnx_model(onnx, graph)
    onnx.checker.check_model(file, full_check=True)
    x = torch.randn(5, *shape)
    session = runtime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        exact = graph(x)
    return [torch.from_numpy(one) for one in session.run(None, {session.get_inputs()[0].name: x.numpy()})], (
        [exact] if isinstance(exact, Tensor) else list(exact)
    )


@pytest.mark.parametrize(("name", "shape", "case"), CASES, ids=[f"{case[0]}-{len(case[1])}d" for case in CASES])
def test_an_operator_is_the_same_in_onnx(name: str, shape: tuple[int, ...], case: Callable[..., Tensor]) -> None:
    found, exact = ran(OfParameters(case, shape), shape)
    assert found[0].shape == exact[0].shape and found[0].dtype == exact[0].dtype
    assert torch.allclose(found[0], exact[0], rtol=1e-4, atol=2e-5)


def test_an_operator_has_one_row() -> None:
    named = [one for family in FAMILIES for names in family.ROWS for one in operators(names)]
    assert len(named) == len(set(named)) == len(ROWS)


RECURRENT = {
    "one": {}, "both": {"bidirectional": True, "num_layers": 2}, "no bias": {"bias": False}, "two": {"num_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", RECURRENT.values(), ids=RECURRENT)
def test_recurrent_gates_are_put_in_the_order_of_onnx(kind: str, options: dict[str, int]) -> None:
    """Answers and last states, from a state of its own."""
    for one, other in zip(*ran(Recurrent(kind, **options), TOKENS), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_a_projected_recurrent_layer_is_one_whose_answers_are_projected(options: dict[str, int]) -> None:
    for one, other in zip(*ran(Recurrent("LSTM", begins=False, proj_size=3, **options), TOKENS), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
    with pytest.raises(InputError, match="a projection that begins with a state of its own"):
        ran(Recurrent("LSTM", proj_size=3, **options), TOKENS)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_is_one_step(kind: type[nn.RNNCellBase]) -> None:
    (found,), (exact,) = ran(Stepped(kind), (3, 5))
    assert torch.allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveMaxPool1d(4),
        nn.AdaptiveMaxPool3d((2, 3, 1)),
        nn.AdaptiveAvgPool3d((2, 3, 4)),
        nn.AdaptiveAvgPool1d(4),
    ],
)
def test_adaptive_pooling_with_windows_of_several_sizes(pool: nn.Module) -> None:
    (found,), (exact,) = ran(pool, (3, 9) if "1d" in type(pool).__name__ else (3, 5, 7, 6))
    assert torch.allclose(found, exact, atol=1e-6)


def test_what_no_exporter_has_is_named(tmp_path: Path) -> None:
    graph = capture(OfParameters(lambda x, m: x.mode(1)[0], TOKENS).eval(), torch.randn(2, *TOKENS))
    with pytest.raises(InputError, match="aten.mode.default has no row"):
        write(graph, tmp_path / "mode.onnx")


def test_several_outputs_and_one_that_is_the_input() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.layer(x)
            return {"all": [y, y.mean(1)], "x": x}

    graph = capture(Several(), torch.randn(2, *TOKENS))
    file = onnx_model(onnx, fold_constants(graph))
    assert [
        [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in file.graph.output
    ] == [["batch", 10, 3], ["batch", 3], ["batch", 10, 12]]


def test_an_operator_without_a_row_goes_through_torchs_exporter(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    assert torch.ops.aten.atan.default not in ROWS
    graph = capture(OfParameters(lambda x, m: torch.atan(x), TOKENS), torch.randn(2, *TOKENS))
    with pytest.raises(Untranslated, match="atan"):
        onnx_model(onnx, graph)
    x = torch.randn(5, *TOKENS)
    session = runtime.InferenceSession(
        str(file_module.write(graph, tmp_path / "atan.onnx")), providers=["CPUExecutionProvider"]
    )
    assert torch.allclose(
        torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), x.atan(), atol=1e-6
    )
    assert issubclass(Untranslated, InputError)


def test_torchs_optimiser_is_not_believed(tmp_path) -> None:
    """Two clips of one value with bounds of their own: it writes a file in which the second reads what nothing
    makes."""
    pytest.importorskip("onnxscript")

    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, bound in {"low": -0.5, "high": 1.0, "lower": -2.0, "higher": 0.5}.items():
                self.register_buffer(name, torch.tensor(bound))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.atan(x) * 2
            return torch.clamp(x, self.low, self.high) + torch.clamp(x, self.lower, self.higher).flip(1)

    graph, x = capture(Clips(), torch.randn(2, *TOKENS)), torch.randn(5, *TOKENS)
    session = runtime.InferenceSession(
        str(file_module.write(graph, tmp_path / "clips.onnx")), providers=["CPUExecutionProvider"]
    )
    assert torch.allclose(
        torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), graph(x), atol=1e-6
    )


def test_the_file_is_the_model_written_piece_by_piece(tmp_path, monkeypatch) -> None:
    """Sizes of one to four bytes in protobuf's format, and the graph as it was, which shares its tensors with the
    folded one."""
    graph = capture(
        nn.Sequential(nn.Linear(12, 1), nn.Linear(1, 600), nn.Linear(600, 1000)).requires_grad_(True),
        torch.randn(2, *TOKENS),
    )
    before = {name: (value, value.clone()) for name, value in graph.state_dict(keep_vars=True).items()}
    whole: list[bytes] = []
    stored = file_module._stored

    def seen(model, path):
        whole.append(model.SerializeToString(deterministic=True))
        return stored(model, path)

    monkeypatch.setattr(file_module, "_stored", seen)
    path = file_module.write(graph, tmp_path / "model.onnx")
    assert onnx.load(path).SerializeToString(deterministic=True) == whole[0]
    assert path.stat().st_size == len(whole[0]) > 2**21
    after = graph.state_dict(keep_vars=True)
    assert all(
        after[name] is value and value.requires_grad and torch.equal(value, old)
        for name, (value, old) in before.items()
    )


def test_more_weights_than_a_file_holds_are_refused_before_it_is_written(tmp_path, monkeypatch) -> None:
    graph = capture(nn.Linear(12, 3), torch.randn(2, *TOKENS))
    monkeypatch.setattr(file_module, "LARGEST", 4 * (36 + 3))  # bytes: just enough
    file_module.write(graph, tmp_path / "enough.onnx")
    monkeypatch.setattr(file_module, "LARGEST", 4 * (36 + 3) - 1)
    with pytest.raises(InputError, match=r"weight.*protobuf.*quantise or prune"):
        file_module.write(graph, tmp_path / "more.onnx")
    assert not (tmp_path / "more.onnx").exists()


def test_constants_are_computed_once_and_a_computed_weight_is_a_weight() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    model = nn.Sequential(Standardised(6, 8, 3), nn.ReLU(), nn.Dropout())
    graph = capture(model, torch.randn(2, *PLANE))
    folded = fold_constants(graph)
    assert [str(node.target) for node in folded.graph.nodes if node.op == "call_function"] == [
        "aten.conv2d.default", "aten.relu.default", "aten.dropout.default",
    ]  # fmt: skip
    assert all(name.startswith("0.") for name in folded.state_dict())
    x = torch.randn(3, *PLANE)
    assert torch.equal(graph(x), folded(x))
