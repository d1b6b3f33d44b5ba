"""What the runtime cuda remembers holds for the networks that it was found for; what a GPU refuses is one line. On a
machine without a GPU: plans are the graph itself, and times are said."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rarefy import capture, quantize
from rarefy.errors import InputError
from rarefy.runtimes import _cuda_refusals, cuda

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        answers: Tensor = self.head(x.mean((2, 3)))
        return answers


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.head(F.relu(self.first(x)))
        return answers


def int8(stride: int = 1, seed: int = 0, times: float = 1.0) -> fx.GraphModule:
    """times: of the answers, as larger weights of the head make them."""
    torch.manual_seed(seed)
    model = Small(stride).eval()
    with torch.no_grad():
        model.head.weight.mul_(times)
        model.head.bias.mul_(times)
    return quantize(capture(model, X), batches=[X], runtime="cuda", progress=False)


def few_bits(scale: float = 1.0) -> fx.GraphModule:
    torch.manual_seed(0)
    graph = quantize(
        capture(Wide().eval(), torch.randn(2, 64)), weights="int4", activations="float", progress=False
    )  # fmt: skip
    for name, value in graph.named_buffers():
        if name.endswith("_scale"):
            value.mul_(scale)
    return graph


class Machine:
    """Stands for a GPU: plans answer as the graph does, in half precision if asked; what was timed is counted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.timed = folder, 0
        self.ms = {"int8": 2.0, "float16": 1.0}
        self.failure: BaseException | None = None

    def integer(self, graph: fx.GraphModule, given: list[Tensor], *_: object) -> Callable[..., list[Tensor]]:
        if self.failure is not None:
            raise self.failure
        return lambda *some: [graph(*some)]

    def half(self, graph: fx.GraphModule, given: list[Tensor]) -> Callable[..., list[Tensor]]:
        return lambda *some: [graph(*some).half().float()]  # infinite beyond 65,504

    def faster(self, integer: Any, half: Any, given: list[Tensor]) -> tuple[str, dict[str, float]]:
        self.timed += 1
        sound = bool(half(*given)[0].isfinite().all())
        return ("float16" if sound and self.ms["float16"] < self.ms["int8"] else "int8"), dict(self.ms)

    def run(self, graph: fx.GraphModule, x: Tensor = X) -> tuple[str, Tensor]:
        """Saved, opened anew and called: what it ran in, and the answer."""
        session = cuda.Session(cuda.Cuda().export(graph, self.folder / "model.cuda"))
        (answer,) = session.on_gpu(x)
        (ran,) = session.ran.values()
        return str(ran["form"]), answer


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path)
    library = SimpleNamespace(__version__="1", backend_version=lambda: 1)
    program = SimpleNamespace(
        Integer=made.integer, Half=made.half, faster=made.faster, integers_of=lambda graph: graph
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "rarefy.runtimes._cuda_program", program)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "devices_of", lambda _: [torch.device("cpu")])
    monkeypatch.setattr(cuda, "needs", lambda *_: library)
    monkeypatch.setattr(cuda, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield made


@pytest.mark.parametrize(("ms", "form"), [((2.0, 1.0), "float16"), ((1.0, 2.0), "int8")])
def test_what_was_the_faster_is_remembered_for_other_weights_too(
    machine: Machine, ms: tuple[float, float], form: str
) -> None:
    machine.ms = {"int8": ms[0], "float16": ms[1]}
    assert [machine.run(int8(seed=seed))[0] for seed in (0, 1, 0)] == [form] * 3 and machine.timed == 1


def test_weights_that_half_precision_cannot_hold_are_never_run_in_it(machine: Machine) -> None:
    large = int8(times=1e7)
    assert large(X).isfinite().all() and large(X).abs().max() > 65504
    assert machine.run(int8())[0] == "float16"
    form, answer = machine.run(large)
    assert form == "int8" and answer.equal(large(X)) and machine.timed == 2
    assert machine.run(int8(seed=1))[0] == "float16" and machine.timed == 2


def test_what_large_weights_decided_is_remembered_for_them_alone(machine: Machine) -> None:
    large = int8(times=1e7)
    assert [machine.run(large)[0] for _ in range(2)] == ["int8", "int8"] and machine.timed == 1
    assert machine.run(int8())[0] == "float16" and machine.timed == 2


@pytest.mark.parametrize("other", ["stride", "batch", "layout"])
def test_another_network_or_input_is_timed_anew(machine: Machine, other: str) -> None:
    machine.run(int8())
    x = {"batch": X[:2], "layout": X.contiguous(memory_format=torch.channels_last)}.get(other, X)
    machine.run(int8(stride=2 if other == "stride" else 1), x)
    assert machine.timed == 2


def test_packed_weights_and_those_that_no_kernel_reads_do_not_decide_for_each_other(machine: Machine) -> None:
    """Their scales alone differ."""
    machine.ms = {"int8": 1.0, "float16": 2.0}
    x = torch.randn(2, 64)
    assert [machine.run(few_bits(scale), x)[0] for scale in (1.0, 1e-6, 1.0, 1e-6)] == [
        "few bits", "int8", "few bits", "int8",
    ]  # fmt: skip
    assert machine.timed == 2


MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 1 GiB"


def wrapped() -> Exception:
    """As torch.compile raises it."""
    error = RuntimeError("backend='inductor' raised:\nOutOfMemoryError")
    error.__cause__ = torch.OutOfMemoryError(MEMORY)
    return error


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError(MEMORY), RuntimeError("CUDA error: out of memory\nsome more"), wrapped()]
)
@pytest.mark.parametrize(("count", "way"), [(4, "give a smaller batch"), (1, "free memory that others hold")])
def test_too_little_memory_is_one_line_and_no_reason_to_run_in_half_precision(
    machine: Machine, failure: Exception, count: int, way: str
) -> None:
    machine.failure = failure
    with pytest.raises(
        InputError, match=rf"a batch of {count} does not fit into the GPU's memory \(.+\); {way}"
    ) as told:
        machine.run(int8(), X[:count])
    assert "\n" not in str(told.value)


@pytest.mark.filterwarnings("ignore:.*no plan in int8")
def test_a_plan_that_fails_is_told_and_not_remembered(machine: Machine) -> None:
    machine.failure = RuntimeError("a driver's fault\nmore of it")
    graph = int8()
    with pytest.warns(UserWarning, match=r"no plan in int8 \(a driver's fault\); it runs in float16"):
        assert machine.run(graph)[0] == "float16"
    machine.failure, machine.ms = None, {"int8": 1.0, "float16": 2.0}
    assert machine.run(graph)[0] == "int8" and machine.timed == 1


OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RuntimeError(OLD), r"is too old \(found version 11040\)\); install a newer NVIDIA driver"),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "install a newer NVIDIA driver"),
        (RuntimeError("Found no NVIDIA driver on your system.\nPlease check"), "use --runtime onnxruntime or openvino"),
        (AssertionError("Torch not compiled with CUDA enabled"), "pip install torch --index-url https://"),
        (None, r"torch finds no GPU\); use --runtime onnxruntime"),
    ],
)
def test_no_gpu_or_too_old_a_driver(raised: Exception | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr(torch.cuda, "init", begin)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=rf"^cuda: no usable NVIDIA GPU \(.*{told}") as found:
        _cuda_refusals.devices_of("0")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "capabilities", "told"),
    [
        ("0", [(7, 5)], "GPU 0 is older than Ampere .*; use --runtime inductor:device=cuda"),
        ("all", [(9, 0), (7, 0)], "GPU 1 is older than Ampere"),
        ("1", [(9, 0)], "devices=1: there is one GPU, number 0"),
        ("7", [(9, 0), (8, 0)], "devices=7: there are 2 GPUs, 0 to 1"),
    ],
)
def test_gpus_that_are_too_old_or_not_there(
    text: str, capabilities: list[tuple[int, int]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capabilities[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    with pytest.raises(InputError, match=f"^cuda: {told}"):
        _cuda_refusals.devices_of(text)
    if text == "0":
        capabilities[0] = (8, 0)
        assert _cuda_refusals.devices_of(text) == [torch.device("cuda", 0)]
