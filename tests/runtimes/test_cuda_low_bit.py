"""Networks whose weights alone have codes, as CUDA runs them: packed weights where the kernel has a form of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

from rarefy import capture, quantize
from rarefy.kernels.low_bit import linear
from rarefy.runtimes import _cuda_low_bit as low_bit
from rarefy.runtimes import cuda
from rarefy.runtimes._cuda_islands import in_half


class Layers(nn.Module):
    """Linear layers of several sizes, one without a bias, one over places, one that the kernel can't read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(200, 264), nn.Linear(264, 40, bias=False)
        self.odd, self.head = nn.Linear(40, 41), nn.Linear(41, 10)  # 41 inputs are no multiple of 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.head(self.odd(x).sigmoid().mean(1))


def small(weights: str, **more: object) -> fx.GraphModule:
    graph = capture(Layers().eval(), torch.randn(2, 3, 200))
    return quantize(graph, weights=weights, activations="float", progress=False, **more)  # type: ignore[arg-type]


def read(graph: fx.GraphModule) -> list[tuple[int, int]]:
    """Bits and outputs of the layers that read packed weights."""
    return [(node.args[5], node.args[6]) for node in graph.graph.nodes if node.target is linear.LOW_BIT_LINEAR]


@pytest.mark.parametrize(
    ("weights", "bits"),
    [("int4", 4), ("uint4", 4), ("int3", 3), ("int2", 2), ("int4:group=128", 4), ("uint4:group=256", 4),
     ("int3:group=128", 3), ("uint2:group=128", 2)],
)  # fmt: skip
def test_layers_of_few_bits_answer_as_the_graph_does(weights: str, bits: int) -> None:
    graph, x = small(weights), torch.randn(2, 3, 200)
    assert low_bit.weights_alone(graph)
    packed = low_bit.packed(graph, 2)
    assert packed is not None and read(packed) == [(bits, 264), (bits, 40), (bits, 41)]
    wanted, found = graph(x), packed(x)
    # scales have 11 bits in place of 24
    assert (found - wanted).norm() <= 2.0**-10 * wanted.norm() and not found.equal(wanted)
    assert graph(x).equal(wanted)  # is left as it was
    assert (in_half(packed)(x) - wanted).norm() <= 3e-3 * wanted.norm()


def test_mixed_bits_and_layers_left_out() -> None:
    graph = small("int8;second=int4;odd=int2:group=64;first=int3")
    packed = low_bit.packed(graph, 2)
    assert packed is not None and read(packed) == [(3, 264), (4, 40)]
    x = torch.randn(2, 3, 200)
    assert torch.allclose(packed(x), graph(x), rtol=1e-2, atol=1e-3)


def test_what_no_kernel_reads_stays() -> None:
    assert low_bit.packed(small("int4:group=32"), 2) is None
    assert low_bit.packed(small("int8"), 2) is None
    assert low_bit.packed(small("int4"), linear.FEW) is None  # three places a sample: too many rows
    tiny = small("int4")
    for name, value in tiny.named_buffers():
        if name.endswith("_scale"):
            value.mul_(1e-6)  # float16 has no such steps
    assert low_bit.packed(tiny, 2) is None
    data = [torch.randn(4, 3, 200)]
    graph = capture(Layers().eval(), data[0])
    assert not low_bit.weights_alone(quantize(graph, batches=data, progress=False, correct_bias=False))
    assert not low_bit.weights_alone(graph)


@pytest.mark.parametrize("faster", ["int8", "float16"])  # as `faster` calls what it is given first and second
def test_a_session_keeps_the_faster_form_and_remembers_it(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pytest.importorskip("rarefy.runtimes._cuda_program", reason="triton is not installed")
    graph, x = small("int4"), torch.randn(2, 3, 200)
    monkeypatch.setattr(program, "Half", lambda given, _: given)
    monkeypatch.setattr(program, "faster", lambda *_: (faster, {"int8": 1.0, "float16": 2.0}))
    session = object.__new__(cuda.Session)
    session.graph, session.path, session.ran = graph, "small", {}
    session.memory = SimpleNamespace(forms={}, save=lambda: None)  # type: ignore[assignment]
    for _ in range(2):  # the second time from memory
        made = session._planned([x], ("shape",))
        assert bool(read(made)) == (faster == "int8") and (made is graph) == (faster == "float16")
        (form,) = session.memory.forms.values()
        assert form["form"] == ("few bits" if faster == "int8" else "float16")
        assert session.ran["shape",] == form
    monkeypatch.setattr(program, "Half", lambda given, _: given if given is graph else 1 / 0)
    session.memory.forms.clear()
    with pytest.warns(UserWarning, match="no plan in few bits .division by zero"):
        assert session._planned([x], ("another",)) is graph
    monkeypatch.setattr(low_bit, "packed", lambda *_: None)  # too many rows, say
    monkeypatch.setattr(session, "integer", lambda _: (_ for _ in ()).throw(RuntimeError("no plan")))
    session.memory.forms.clear()
    with pytest.warns(UserWarning, match="no plan in int8"):
        assert session._planned([x], ("other",)) is graph


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int4:group=128", "int3", "uint2:group=128"])
def test_on_a_gpu_the_runtime_answers_as_the_graph_does(weights: str, tmp_path: Path) -> None:
    from rarefy.runtimes import _cuda_program as program
    from rarefy.runtimes.cuda import Cuda

    graph, x = small(weights), torch.randn(2, 3, 200)
    packed = low_bit.packed(graph, 2, torch.device("cuda"))
    assert packed is not None
    given = [x.cuda()]
    (found,) = program.Half(packed, given)(*given)
    assert (found.cpu() - graph(x)).norm() <= 3e-3 * graph(x).norm()
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    session = Cuda().open(Cuda().export(graph, tmp_path / "small"))
    for rows in (x, torch.randn(64, 3, 200)):
        assert (session(rows) - graph(rows)).norm() <= 3e-3 * graph(rows).norm()
    assert {one["form"] for one in session.ran.values()} <= {"few bits", "float16", "int8"}
