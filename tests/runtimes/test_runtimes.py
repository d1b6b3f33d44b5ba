"""Every runtime: what is exported runs, answers like the graph, is compared layer by layer, and tells the time of its
kernels."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from networks import GatedWithTokens, PaddedNorm, TwoAnswers, UnevenDepthwise
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rarefy import plugins
from rarefy.artifact import folder
from rarefy.errors import FormatError, InputError
from rarefy.evaluation import measure
from rarefy.evaluation.certify import certify
from rarefy.graph.capture import capture
from rarefy.quantization.quantize import quantize
from rarefy.system import cpu

RUNTIMES = plugins.available("runtimes")


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def graph(batches: list[Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(GatedWithTokens().eval(), batches[0])


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Any:
    found = plugins.resolve("runtimes", request.param)
    if found.capabilities.has_threads:
        found = plugins.resolve("runtimes", f"{request.param}:threads=1")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip(found.package)
    if request.param == "inductor" and cpu.compiler() is None:
        pytest.skip("torch.compile needs a C++ compiler")
    return found


def opens(runtime: Any) -> None:
    if not runtime.capabilities.runs:
        pytest.skip(f"{plugins.name_of(runtime)} writes files and runs none")


def test_float_model_runs_at_any_batch_and_answers_like_the_graph(
    runtime: Any, graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    opens(runtime)
    assert importlib.import_module(runtime.package) is not None
    session = runtime.open(runtime.export(graph, tmp_path / f"model{runtime.suffix}"))
    assert session.threads == 1
    for size in (1, 5, 1) if runtime.suffix == ".zip" else (1, 5, 8, 1):  # each is compiled, which takes seconds there
        found = session(batches[0][:size])
        assert found.shape == (size, 10)
        assert torch.allclose(found, graph(batches[0][:size]), atol=1e-4)


def test_integer_model_is_compared_and_a_wrong_layer_is_named(
    runtime: Any, graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    small = quantize(graph, batches=batches, runtime=runtime, progress=False)
    first, second = (runtime.export(small, tmp_path / f"{name}{runtime.suffix}") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    found = runtime.compare(small, first, torch.cat(batches))
    assert (
        found["passed"] and found["ulp"] <= 1 and found["first_diverging_layer"] is None and found["agreement"] > 0.99
    )
    assert len(found["layers"]) >= 8
    wrong = copy.deepcopy(small)
    dict(wrong.named_buffers())["depthwise.bias_codes"].add_(10_000)
    broken = runtime.compare(wrong, first, batches[0])
    assert not broken["passed"] and broken["first_diverging_layer"].startswith("depthwise")


def test_kernel_times_name_every_kernel_once(
    runtime: Any, graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    if not runtime.capabilities.has_kernel_times:
        with pytest.raises(InputError, match="tells no times of kernels; use onnxruntime"):
            runtime.kernel_times(tmp_path / "none", batches[0])
        return
    kernels = runtime.kernel_times(runtime.export(graph, tmp_path / f"model{runtime.suffix}"), batches[0], seconds=0.1)
    assert len({name for name, *_ in kernels}) == len(kernels) > 5
    assert all(
        us >= 0 and all(isinstance(size, int) for shape in shapes for size in shape) for _, _, shapes, us in kernels
    )
    assert any([16, 3, 3, 3] in shapes for _, _, shapes, _ in kernels)
    assert sum(us for *_, us in kernels) > 10


def test_a_file_that_is_none_is_refused(runtime: Any, tmp_path: Path) -> None:
    opens(runtime)
    broken = tmp_path / f"broken{runtime.suffix}"
    broken.write_bytes(b"\x08not a model")
    with pytest.raises(FormatError, match=r"broken\S*: .* can't open it"):
        runtime.open(broken)


def test_measured_by_name(runtime: Any, graph: fx.GraphModule) -> None:
    opens(runtime)
    found = measure.measure({"a": graph}, runtime=runtime, repeats=5, memory=True)["a"]
    assert found["latency_ms"]["runtime"] == plugins.describe(runtime).partition(":")[0]
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] < 500e6


def test_openvino_keeps_integers_together(graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path) -> None:
    """Activations melt into the layers before them, and all nine layers but the head's sums yield codes or are
    integer."""
    pytest.importorskip("openvino")
    runtime = plugins.resolve("runtimes", "openvino:threads=1")
    small = quantize(graph, batches=batches, runtime=runtime, progress=False)
    found = runtime.integer_islands(runtime.export(small, tmp_path / "model.onnx"), batches[0])
    assert found["integer"]["Convolution"] == 5 and found["integer"]["FullyConnected"] == 5
    assert "Convolution" not in found["float"] and "FullyConnected" not in found["float"]


SIGNALLED = """
import gc, signal, sys
import torch
from rarefy import plugins

runtime = plugins.resolve("runtimes", "openvino:threads=1")
sessions = [runtime.open(sys.argv[1]) for _ in range(2)]
for session in sessions:
    session(torch.zeros(1, 3, 32, 32))
session = None
while sessions:  # in the order they were made
    del sessions[0]
    gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_is_handled_after_openvino_sessions_are_gone(graph: fx.GraphModule, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = plugins.resolve("runtimes", "openvino").export(graph, tmp_path / "m.onnx")
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(path)],
        env=known,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_in_bf16_is_another_precision(graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match="choose f32 or bf16"):
        plugins.resolve("runtimes", "openvino:precision=fp16")
    runtime = plugins.resolve("runtimes", "openvino:threads=1,precision=bf16")
    found = runtime.open(runtime.export(graph, tmp_path / "model.onnx"))(batches[0])
    assert torch.allclose(found, graph(batches[0]), atol=0.05)


def test_certificate_names_runtimes_file_and_first_layer(
    graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    """One file, read by two runtimes: ONNX Runtime's tile of 16 channels included."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    small = quantize(graph, batches=batches, progress=False)
    writer = plugins.resolve("runtimes", "onnxruntime:threads=1")
    path = writer.export(small, tmp_path / "model.onnx")
    found = certify(small, path, runtime=writer, also=["openvino:threads=1"], inputs=torch.cat(batches))
    assert found["runtimes"].keys() == {"onnxruntime:threads=1", "openvino:threads=1"}
    assert found["passed"] and found["first_diverging_layer"] is None
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(len(one["layers"]) >= 8 and one["ulp"] <= 1 and one["version"] for one in found["runtimes"].values())
    assert json.loads(json.dumps(found)) == found
    dict(small.named_buffers())["depthwise.bias_codes"].add_(10_000)
    broken = certify(small, path, runtime=writer, also=["openvino:threads=1"], inputs=batches[0])
    assert not broken["passed"] and broken["first_diverging_layer"].startswith("depthwise")
    assert all(one["first_diverging_layer"].startswith("depthwise") for one in broken["runtimes"].values())


def test_depthwise_layers_are_written_as_wide_as_the_kernels_tiles(batches: list[Tensor], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    graph = capture(UnevenDepthwise().eval(), batches[0])
    small = quantize(graph, batches=batches, progress=False)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    path = runtime.export(small, tmp_path / "model.onnx")
    layers = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    groups = [next((one.i for one in node.attribute if one.name == "group"), 1) for node in layers]
    assert sorted(group for group in groups if group > 1) == [24, 32]  # what is put beside others stays as it is
    assert tuple(dict(small.named_buffers())["first.weight_codes"].shape) == (24, 1, 3, 3)  # and so does the graph
    found = runtime.compare(small, path, torch.cat(batches))
    assert found["passed"] and found["ulp"] == 0, found
    assert torch.allclose(runtime.open(path)(batches[1]), small(batches[1]), atol=1e-6)


def test_all_outputs_are_compared(runtime: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 8, 8)
    small = quantize(capture(TwoAnswers().eval(), inputs), batches=[inputs], runtime=runtime, progress=False)
    path = runtime.export(small, tmp_path / f"model{runtime.suffix}")
    found = runtime.compare(small, path, inputs)
    assert found["passed"] and found["largest_difference"] < 0.1
    small.get_buffer("second.bias_codes").add_(1_000_000)
    broken = runtime.compare(
        small, path, inputs
    )  # all of its numbers moved alike, so that the largest stays where it is
    least = 0.5 if plugins.name_of(runtime) == "litert" else 1  # its answers are codes: they end where the grid does
    assert broken["largest_difference"] > least and broken["agreement"] == 0 and not broken["passed"]


def test_a_single_number_is_compared_as_a_number(tmp_path: Path) -> None:
    """Of one output the largest is always the same."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    inputs = torch.randn(8, 5)
    graph = capture(nn.Linear(5, 1), inputs)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    path = runtime.export(graph, tmp_path / "model.onnx")
    assert runtime.compare(graph, path, inputs)["passed"]
    graph.get_parameter("bias").data.add_(1.0)
    assert not runtime.compare(graph, path, inputs)["passed"]


def test_maps_are_compared_by_their_differences(tmp_path: Path) -> None:
    """Where the largest number of a map stands says nothing: of a map of equals it is chance."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Softmax(1)).eval()
    nn.init.normal_(net[2].weight, std=1e-4)
    inputs = torch.randn(8, 3, 8, 8)
    graph = capture(net, inputs)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")
    path = runtime.export(graph, tmp_path / "model.onnx")
    assert runtime.compare(graph, path, inputs)["passed"]
    graph.get_parameter("2.bias").data.add_(torch.randn(8))
    broken = runtime.compare(graph, path, inputs)
    assert not broken["passed"] and broken["agreement"] == 0


def test_a_value_that_a_runtime_gives_in_another_shape_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    inputs = torch.randn(8, 16, 5, 5)
    small = quantize(capture(PaddedNorm().eval(), inputs), batches=[inputs], progress=False)
    path = plugins.resolve("runtimes", "onnxruntime").export(small, tmp_path / "model.onnx")
    found = certify(small, path, also=["openvino"], inputs=inputs)
    own, other = found["runtimes"].values()
    assert found["passed"] and "unread" not in own
    assert {layer["value"] for layer in other["layers"]} | set(other.get("unread", ())) == {
        layer["value"] for layer in own["layers"]
    }


def test_inductor_multiplies_codes_and_reads_a_saved_folder(
    graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    """Layers become oneDNN's integer ones, the weights packed; a folder is as good as the file; no GPU, no other member
    and no packed file are taken."""
    runtime = plugins.resolve("runtimes", "inductor:threads=1")
    small = quantize(graph, batches=batches, runtime=runtime, progress=False)
    session = runtime.open(folder.save(small, tmp_path / "small"))
    called = [str(node.target) for node in session.graph.graph.nodes if node.op == "call_function"]
    assert (
        sum("qconv_pointwise" in name for name in called) == 5
        and sum("qlinear_pointwise" in name for name in called) == 5
    )
    assert not any(name.startswith("rarefy") for name in called)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch finds no GPU"):
            plugins.resolve("runtimes", "inductor:device=cuda").open(tmp_path / "small")
    for name, kind in (("more", zipfile.ZIP_STORED), ("packed", zipfile.ZIP_DEFLATED)):
        path = runtime.export(small, tmp_path / "small.zip")
        with zipfile.ZipFile(path) as file:
            members = {one: file.read(one) for one in file.namelist()}
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", kind) as file:
            for member, content in (*members.items(), *([("../out", b"x")] if name == "more" else [])):
                file.writestr(member, content)
        with pytest.raises(FormatError, match="not the three files"):
            runtime.open(tmp_path / f"{name}.zip")
    assert not (tmp_path.parent / "out").exists()


def test_exact_integer_operators_are_plain_ones_to_a_compiler(
    graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    """What is compiled on CUDA: the same answers to the bit, uncompiled."""
    from rarefy.runtimes.inductor import _compilable

    small = quantize(graph, batches=batches, runtime="inductor", progress=False)
    plain = _compilable(small, (), exact=True)
    assert not any(
        "rarefy" in str(node.target) and isinstance(node.target, torch._ops.OpOverload) for node in plain.graph.nodes
    )
    assert torch.equal(plain(batches[0]), small(batches[0]))


class Gated(nn.Module):
    """SiLU as one operator, and as the product that files of other tools have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = self.body(x)
        x = x * torch.sigmoid(x)
        return self.head(x).mean((2, 3))


def test_silu_between_roundings_is_one_operator_of_onnx_runtime(tmp_path: Path) -> None:
    """And of ONNX's own where nothing is rounded, or another runtime reads the file."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    exact = capture(Gated().eval(), images[:2])
    small = quantize(exact, batches=[images], progress=False, equalize=False)
    runtime = plugins.resolve("runtimes", "onnxruntime:threads=1")

    def kinds(model: fx.GraphModule, writer: Any) -> list[str]:
        file = writer.export(model, tmp_path / f"{plugins.describe(writer)[:4]}.onnx")
        return [node.op_type for node in onnx.load(file).graph.node]

    written = kinds(small, runtime)
    assert written.count("QuickGelu") == 2 and "Sigmoid" not in written
    assert runtime.compare(small, tmp_path / "onnx.onnx", images)["ulp"] <= 1
    assert kinds(exact, runtime).count("Sigmoid") == 2
    assert "QuickGelu" not in kinds(small, plugins.resolve("runtimes", "openvino"))


class Sum(nn.Module):
    """A sum whose branches are a convolution and another sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.more = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)])
        self.relu, self.last = nn.ReLU(), nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.more[0](x)
        x = self.more[1](x) + x
        return self.head(self.last(self.relu(x)).relu().mean((2, 3)))


def test_openvino_s_convolutions_and_sums_are_followed_to_the_last_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own sequence a graph makes its codes; by the simulation's some of a million are the next ones."""
    pytest.importorskip("openvino")
    torch.manual_seed(1)
    x = torch.randn(4, 3, 64, 64)
    runtime = plugins.resolve("runtimes", "openvino:threads=1")
    small = quantize(capture(Sum().eval(), x), batches=[x], runtime=runtime, progress=False)
    path = runtime.export(small, tmp_path / "model.onnx")
    found = runtime.compare(small, path, x)
    shares = {layer["value"]: layer["share"] for layer in found["layers"] if layer["value"] != "x"}  # of numbers
    assert found["passed"] and found["evaluated"] == 1.0
    assert len(shares) >= 5 and sum(share > 0 for share in shares.values()) == 0, shares
    monkeypatch.setattr(sys.modules[type(runtime).__module__], "ROUNDINGS", {})
    assert any(layer["share"] for layer in runtime.compare(small, path, x)["layers"] if layer["value"] != "x")
