import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from networks import ConvNormLinear
from safetensors import safe_open
from torch import nn

from rarefy.artifact import folder as folder_
from rarefy.artifact.words import STORES
from rarefy.errors import FormatError, InputError
from rarefy.graph.capture import capture
from rarefy.graph.nodes import finish, set_attribute
from rarefy.system import files

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "densenet121": torchvision.models.densenet121,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "swin_t": torchvision.models.swin_t,
    "vit": lambda: torchvision.models.VisionTransformer(
        image_size=64, patch_size=32, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, dropout=0.1
    ),
}


def small(seed=0):
    torch.manual_seed(seed)
    return capture(ConvNormLinear(), torch.zeros(2, 1, 5, 5))


def with_codes(bits, dtype=torch.int8):
    """A graph with a buffer of codes whose histogram is bell-shaped."""

    class Coded(nn.Module):
        def __init__(self):
            super().__init__()
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype == torch.int8 else (0, 2**bits - 1)
            codes = torch.randn(33, 31, 3) * (high - low) / 6 + (high + low) / 2
            self.register_buffer("codes", codes.round().clamp(low, high).to(dtype))

        def forward(self, x):
            return x + self.codes.to(torch.float32).sum((1, 2))

    torch.manual_seed(1)
    return capture(Coded(), torch.zeros(2, 33))


def step(graph, x):
    """A training step, dropout included."""
    torch.manual_seed(3)
    graph.train()
    optimizer = torch.optim.SGD([parameter for parameter in graph.parameters() if parameter.requires_grad], lr=0.1)
    nn.functional.cross_entropy(graph(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()
    return graph.eval()


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert sorted(first) == sorted(second)  # the order of a state_dict is the modules', that of a file the names'
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_and_trains_on(family, tmp_path):
    torch.manual_seed(0)
    graph = capture(FAMILIES[family](), torch.zeros(2, 3, 64, 64))
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(graph(x), loaded(x))
    assert loaded.code == graph.code and loaded.meta == graph.meta and not loaded.training
    assert [node.meta["stack"] for node in loaded.graph.nodes] == [
        node.meta.get("stack", "") for node in graph.graph.nodes
    ]
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in graph.named_parameters()]
    assert all(a.requires_grad == b.requires_grad for a, b in zip(graph.parameters(), loaded.parameters(), strict=True))
    assert_same(step(graph, x), step(loaded, x))
    with torch.no_grad():
        assert torch.equal(graph(x), loaded(x))


def test_the_graph_saved_is_left_alone(tmp_path):
    graph = small()
    code, state = graph.code, {name: value.clone() for name, value in graph.state_dict().items()}
    graph.train()
    folder_.save(graph, tmp_path / "model")
    assert graph.training and graph.code == code
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


def test_a_loaded_graph_owns_its_memory(tmp_path):
    folder = folder_.save(small(), tmp_path / "model")
    loaded = folder_.load(folder)
    before = (folder / "weights.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(7)
    assert (folder / "weights.safetensors").read_bytes() == before
    (folder / "weights.safetensors").write_bytes(b"")
    assert all(bool((parameter == 7).all()) for parameter in loaded.parameters())


def test_a_loaded_graph_is_saved_as_the_same_bytes(tmp_path):
    first = folder_.save(small(), tmp_path / "first")
    second = folder_.save(folder_.load(first), tmp_path / "second")
    for name in ("graph.json", "weights.safetensors", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_tied_frozen_and_unsaved_tensors_stay_so(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.one.bias.requires_grad_(False)
            self.register_buffer("kept", torch.ones(4))
            self.register_buffer("lost", torch.full((4,), 2.0))

        def forward(self, x):
            return self.two(self.one(x)) * self.kept + self.lost

    torch.manual_seed(0)
    graph = capture(Tied(), torch.zeros(2, 4))
    set_attribute(graph, "two.weight", graph.one.weight)  # one parameter of two names
    graph._non_persistent_buffers_set.add("lost")
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    assert loaded.one.weight is loaded.two.weight and len(list(loaded.parameters())) == 3
    assert not loaded.one.bias.requires_grad and loaded.two.bias.requires_grad
    assert not isinstance(loaded.kept, nn.Parameter) and torch.equal(loaded.lost, torch.full((4,), 2.0))
    assert list(loaded.state_dict()) == list(graph.state_dict()) and "lost" not in loaded.state_dict()
    x = torch.randn(3, 4)
    assert_same(step(graph, x), step(loaded, x))
    assert loaded.one.weight is loaded.two.weight


def test_every_dtype_shape_and_layout(tmp_path):
    values = {
        "flag": torch.tensor([True, False]),
        "byte": torch.tensor([0, 255], dtype=torch.uint8),
        "long": torch.tensor([[-(2**62)]]),
        "short": torch.arange(5, dtype=torch.int16),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "five": torch.randn(4).to(torch.float8_e5m2),
        "waves": torch.randn(3, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "turned": torch.randn(3, 5).t(),
        "viewed": torch.randn(6)[2:4],
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    graph = small()
    for name, value in values.items():
        set_attribute(graph, f"some.{name}_", value)
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    for name, value in values.items():
        back = getattr(loaded.some, f"{name}_")
        assert back.dtype == value.dtype and back.shape == value.shape
        assert torch.equal(
            back.contiguous().view(-1).view(torch.uint8), value.contiguous().view(-1).view(torch.uint8)
        ), name
    assert loaded.some.last_.is_contiguous(memory_format=torch.channels_last) and not loaded.some.last_.is_contiguous()


def test_every_kind_of_argument_and_output(tmp_path):
    class Odd(nn.Module):
        def forward(self, x, y):
            batch = x.shape[0]
            mask = torch.arange(batch * 3, device=x.device).reshape(batch, 3) % 2 == 0
            filled = x.masked_fill(mask, -float("inf")).clamp(min=-1e30)
            parts = torch.chunk(torch.einsum("bi,bj->bij", filled, y), 3, dim=1)
            scattered = torch.zeros(batch, 3, dtype=torch.float64).index_add(1, torch.tensor([0, 2]), y[:, :2].double())
            return {
                "b": [parts[0], (x[:, None, ::2], None)],
                "a": scattered.to(x.dtype, memory_format=torch.preserve_format),
                "n": 3,
            }

    graph = capture(Odd(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    one, other = graph(x, y), loaded(x, y)
    assert list(one) == list(other) == ["b", "a", "n"] and other["n"] == 3
    assert torch.equal(one["a"], other["a"]) and torch.equal(one["b"][0], other["b"][0])
    assert (
        isinstance(other["b"][1], tuple) and torch.equal(one["b"][1][0], other["b"][1][0]) and other["b"][1][1] is None
    )


def test_meta_comes_back(tmp_path):
    graph = small()
    graph.meta["core"] = "backbone"
    facts = {"kept": [1, 2], "loss": float("nan"), "best": -float("inf"), "rate": 1e-17, "none": None, "text": "ü\n"}
    graph.meta["history"] = [{"step": "prune", "options": {"keep": 0.5}, "facts": facts}]
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    back = loaded.meta["history"][0]["facts"]
    assert math.isnan(back.pop("loss")) and facts.pop("loss") and back == facts
    assert loaded.meta["core"] == "backbone" and loaded.meta["inputs"] == graph.meta["inputs"]


# ---------------------------------------------------------------------------------------- without pickle, without class


def test_no_file_is_a_pickle_and_none_is_read(tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    folder = folder_.save(small(), tmp_path / "model")
    folder_.load(folder)
    assert {path.name for path in folder.iterdir()} == {"graph.json", "weights.safetensors", "manifest.json"}
    json.loads((folder / "graph.json").read_text())
    json.loads((folder / "manifest.json").read_text())
    with safe_open(folder / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(small().state_dict())


def test_it_loads_where_the_class_does_not_exist(tmp_path):
    graph = small()
    folder = folder_.save(graph, tmp_path / "model")
    program = f"""
import sys, torch
from rarefy.artifact import folder as artifact
torch.set_num_threads(1)
graph = artifact.load({str(folder)!r})
assert "test_folder" not in sys.modules and "torchvision" not in sys.modules
print(graph(torch.linspace(-1, 1, 75).reshape(3, 1, 5, 5)).tolist())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == graph(torch.linspace(-1, 1, 75).reshape(3, 1, 5, 5)).tolist()


# -------------------------------------------------------------------------------------------------------- bytes on disk


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("make", [small, lambda: with_codes(5), lambda: with_codes(8, torch.uint8)])
def test_the_content_of_a_graph_is_that_of_its_folder(make, store, tmp_path):
    graph = make()
    if "codes" in dict(graph.named_buffers()):
        graph.meta["bits"] = {"codes": 5}
        graph.meta["bits"] = {"codes": 8} if graph.codes.dtype == torch.uint8 else graph.meta["bits"]
    else:
        graph.meta["sparse"] = ["linear.weight"]
        graph.get_parameter("linear.weight").data[:2] = 0
    found = folder_.content_of(graph, store=store)
    folder = folder_.save(graph, tmp_path / "model", store=store)
    assert found.hash == folder_.content_hash(folder) == folder_.read_manifest(folder)["content"]
    sizes = [(folder / name).stat().st_size for name in ("graph.json", "weights.safetensors")]
    assert [found.graph_bytes, found.weight_bytes] == sizes


def test_a_graph_that_can_not_be_saved_has_no_content():
    graph = small()
    graph.meta["note"] = object()
    with pytest.raises(InputError, match="graph.meta.note: a value of type object is not JSON"):
        folder_.content_of(graph)
    with pytest.raises(InputError, match="^a ConvNormLinear is not a graph; capture\\(\\) it first$"):
        folder_.content_of(ConvNormLinear())


def test_golden_bytes(tmp_path):
    """The format does not change by accident: bytes fixed by hand, on a graph made by hand."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    linear = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    clamped = graph.call_function(torch.ops.aten.clamp.default, (linear, -float("inf")), {"max": 6.0})
    converted = graph.call_function(
        torch.ops.aten._to_copy.default, (clamped,), {"dtype": torch.float64, "device": torch.device("cpu")}
    )
    graph.output((converted,))
    root = nn.Module()
    root.weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    module = torch.fx.GraphModule(root, graph)
    module.meta = {"inputs": [{"shape": [2], "dtype": "float32"}], "core": None}
    linear.meta["stack"] = "fc"
    folder = folder_.save(module, tmp_path / "model")
    assert (folder / "graph.json").read_text() == (
        '{\n"format":"rarefy",\n"schema":1,\n'
        '"meta":{"core":null,"inputs":[{"dtype":"float32","shape":[2]}]},\n'
        '"nodes":[\n'
        '{"name":"x","op":"placeholder","target":"x"},\n'
        '{"name":"weight","op":"get_attr","target":"weight"},\n'
        '{"args":[{"node":"x"},{"node":"weight"}],"name":"linear_default","op":"call_function","stack":"fc",'
        '"target":"aten.linear.default"},\n'
        '{"args":[{"node":"linear_default"},{"float":"-inf"}],"kwargs":{"max":6.0},"name":"clamp_default",'
        '"op":"call_function",'
        '"target":"aten.clamp.default"},\n'
        '{"args":[{"node":"clamp_default"}],"kwargs":{"device":{"device":"cpu"},"dtype":{"dtype":"float64"}},'
        '"name":"_to_copy_default","op":"call_function","target":"aten._to_copy.default"},\n'
        '{"args":[{"tuple":[{"node":"_to_copy_default"}]}],"name":"output","op":"output"}\n'
        '],\n"tensors":{\n'
        '"weight":{"dtype":"float32","kind":"parameter","requires_grad":true,"shape":[1,2]}\n'
        "}\n}\n"
    )
    data = (folder / "weights.safetensors").read_bytes()
    header = b'{"weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    assert data == (64).to_bytes(8, "little") + header.ljust(64) + bytes.fromhex("0000803f000000c0")
    assert folder_.content_hash(folder) == "b820357a7b86cc4f373df782da5002f82832c74d0edd672d28ce1ce658ad501f"


def test_the_same_graph_gives_the_same_bytes_in_another_process(tmp_path, monkeypatch):
    hostile = str(ROOT / "tests" / "hostile")
    there = str(tmp_path / "there")
    program = f"import sys; sys.path.insert(0, {hostile!r}); import bad_folders; bad_folders.good_folder({there!r})"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(hostile)
    import bad_folders

    bad_folders.good_folder(tmp_path / "here")
    assert folder_.content_hash(tmp_path / "here") == folder_.content_hash(tmp_path / "there")
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert folder_.content_hash(tmp_path / "here") != folder_.content_hash(folder_.save(small(1), tmp_path / "other"))


def test_the_hash_is_of_the_model_not_of_what_was_measured(tmp_path):
    one = folder_.save(small(), tmp_path / "one", manifest={"timing": {"seconds": 1.5}}, files={"report.html": b"1"})
    two = folder_.save(small(), tmp_path / "two", manifest={"timing": {"seconds": 2.5}}, files={"report.html": b"2"})
    assert folder_.content_hash(one) == folder_.content_hash(two) == folder_.read_manifest(one)["content"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_codes_take_their_bits(bits, dtype, tmp_path):
    graph = with_codes(bits, dtype)
    graph.meta["bits"] = {"codes": bits}
    count = graph.codes.numel()
    stored = {}
    for store in ("fastest", "readable"):
        folder = folder_.save(graph, tmp_path / store, store=store)
        loaded = folder_.load(folder)
        assert (
            loaded.codes.dtype == dtype
            and torch.equal(loaded.codes, graph.codes)
            and loaded.meta["bits"] == {"codes": bits}
        )
        with safe_open(folder / "weights.safetensors", "pt") as file:
            stored[store] = file.get_tensor("codes")
    assert stored["fastest"].nbytes == -(-count * bits // 8)
    assert stored["readable"].nbytes < stored["fastest"].nbytes
    if bits == 8:
        assert torch.equal(stored["fastest"], graph.codes)  # as any reader of safetensors expects them


def test_codes_that_entropy_coding_would_enlarge_stay_as_they_are(tmp_path):
    graph = with_codes(8)
    graph.codes.copy_(torch.randint(-128, 128, graph.codes.shape))
    folder = folder_.save(graph, tmp_path / "model")
    with safe_open(folder / "weights.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("codes"), graph.codes)


def test_bits_that_do_not_fit_and_bits_of_nothing(tmp_path):
    graph = with_codes(8)
    graph.meta["bits"] = {"codes": 3, "gone": 4}
    with pytest.raises(InputError, match="codes: codes from .* do not fit 3 bits"):
        folder_.save(graph, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    graph.meta["bits"] = {"codes": 8, "gone": 4}
    graph.meta["sparse"] = ["gone"]
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    assert loaded.meta["bits"] == {"codes": 8} and loaded.meta["sparse"] == []


def test_a_quantised_graph(tmp_path):
    pytest.importorskip("rarefy.kernels", reason="the quantization operators are not there")
    graph = small()
    operators = torch.ops.rarefy
    with torch.no_grad():
        scale = graph.linear.weight.abs().amax(1) / 7
        codes = (graph.linear.weight / scale[:, None]).round().to(torch.int8)
    for name, value in {"codes": codes, "scale": scale, "zero": torch.zeros(3, dtype=torch.int8)}.items():
        set_attribute(graph, f"linear.weight_{name}", value.clone())
    old = next(node for node in graph.graph.nodes if node.target == "linear.weight")
    with graph.graph.inserting_before(old):
        parts = [graph.graph.get_attr(f"linear.weight_{name}") for name in ("codes", "scale", "zero")]
    linear = next(iter(old.users))
    with graph.graph.inserting_before(linear):
        old.replace_all_uses_with(graph.graph.call_function(operators.dequantize.default, (*parts, 0)))
        scale, zero = parts[1], parts[2]
        one = graph.graph.call_function(torch.ops.aten.select.int, (scale, 0, 0))
        none = graph.graph.call_function(torch.ops.aten.select.int, (zero, 0, 0))
        args = (linear.args[0], one, none, None, -128, 127, torch.int8)
        quantised = graph.graph.call_function(operators.quantize.default, args)
        linear.update_arg(0, graph.graph.call_function(operators.dequantize.default, (quantised, one, none, None)))
    graph = finish(graph)
    graph.meta["bits"] = {"linear.weight_codes": 4}
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    x = torch.randn(4, 1, 5, 5)
    assert torch.equal(graph(x), loaded(x)) and loaded.code == graph.code


# ------------------------------------------------------------------------------------------------------------- manifest


def test_the_manifest_lists_every_file_and_what_it_was_given(tmp_path):
    import hashlib

    (tmp_path / "model.onnx").write_bytes(b"onnx" * 100)
    given = {
        "recipe": {"keep": 0.5},
        "seeds": [1, 2],
        "measurements": {"drop": float("inf"), "pair": (1, 2)},
        "environment": {"cpu": "x"},
    }
    files = {"report.html": b"<html>", "model.onnx": tmp_path / "model.onnx"}
    folder = folder_.save(small(), tmp_path / "model", manifest=given, files=files)
    manifest = folder_.read_manifest(folder)
    assert manifest["files"].keys() == {"graph.json", "weights.safetensors", "report.html", "model.onnx"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert manifest["recipe"] == given["recipe"] and manifest["measurements"] == {"drop": float("inf"), "pair": [1, 2]}
    assert manifest["environment"]["cpu"] == "x" and manifest["environment"]["torch"] == torch.__version__
    assert manifest["schema"] == 1 and folder_.is_artifact(folder)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".hidden", "graph.json", "Manifest.JSON", "model.sig", "a" * 200, "a\nb"]
)
def test_a_further_file_can_not_be_anywhere(name, tmp_path):
    with pytest.raises(InputError, match="can't be a file of the folder"):
        folder_.save(small(), tmp_path / "model", files={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_is_no_json_is_refused(tmp_path):
    for manifest, words in (
        ({"a": {"b": [torch.tensor(1)]}}, r"manifest\.a\.b\[0\]: a value of type Tensor is not JSON"),
        ({"a": {1: 2}}, r"manifest\.a: the key 1"),
        ({"files": {}}, "'files' is written by save"),
        ({"environment": "linux"}, "not a dictionary"),
    ):
        with pytest.raises(InputError, match=words):
            folder_.save(small(), tmp_path / "model", manifest=manifest)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_at_load(tmp_path):
    folder = folder_.save(small(), tmp_path / "model")
    for name in ("graph.json", "weights.safetensors"):
        whole = (folder / name).read_bytes()
        for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
            (folder / name).write_bytes(damaged)
            with pytest.raises(
                FormatError, match=f"{name}: differs from what manifest.json lists.*copy the folder again"
            ):
                folder_.load(folder)
        (folder / name).write_bytes(whole)
    folder_.load(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FormatError, match="no such folder"):
        folder_.load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="not a rarefy folder"):
        folder_.load(tmp_path)
    assert not folder_.is_artifact(tmp_path)


# -------------------------------------------------------------------------------------------------------- what can't be


def test_a_module_is_not_a_graph(tmp_path):
    with pytest.raises(InputError, match=r"ConvNormLinear is not a graph; capture\(\) it first"):
        folder_.save(ConvNormLinear(), tmp_path / "model")


def test_what_load_would_refuse_is_not_saved(tmp_path):
    graph = small()
    output = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        empty = graph.graph.call_function(torch.ops.aten.empty.memory_format, ([3],))
        empty.meta["stack"] = "head.mask"
        added = graph.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0], empty))
    output.args = (added,)
    with pytest.raises(InputError, match=r"can't be saved: head\.mask: calls aten\.empty\.memory_format"):
        folder_.save(finish(graph), tmp_path / "model")
    graph = small()
    set_attribute(graph, "wide", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(InputError, match="wide: a tensor of torch.complex128"):
        folder_.save(graph, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- atomic


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    folder_.save(small(), tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for name, words in (
        ("file", "is a file"),
        ("folder", "not a rarefy folder"),
        ("model", "'notes.txt', which rarefy did not write"),
    ):
        with pytest.raises(InputError, match=words):
            folder_.save(small(1), tmp_path / name)
    assert contents(tmp_path) == before


def test_an_older_folder_and_an_empty_one_are_replaced(tmp_path):
    folder = tmp_path / "deep" / "model"
    folder_.save(small(), folder, files={"report.html": b"old"})
    (folder / "model.sig").write_text("{}")
    folder_.save(small(1), folder)
    assert {path.name for path in folder.iterdir()} == {"graph.json", "weights.safetensors", "manifest.json"}
    assert_same(folder_.load(folder), small(1))
    (tmp_path / "empty").mkdir()
    assert_same(folder_.load(folder_.save(small(), tmp_path / "empty")), small())
    (tmp_path / "link").symlink_to(folder)
    folder_.save(small(2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(folder_.load(folder), small(2))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_can_be_saved_with_its_own_files(tmp_path):
    folder = folder_.save(small(), tmp_path / "model", files={"report.html": b"old"})
    folder_.save(folder_.load(folder), folder, files={"report.html": folder / "report.html"})
    assert (folder / "report.html").read_bytes() == b"old"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize(
    "place",
    [
        "safetensors.torch.save_file",
        "rarefy.system.files._sync",
        "rarefy.system.files._exchanged",
        "shutil.copyfileobj",
    ],
)
def test_a_save_that_fails_leaves_what_was_there(error, place, tmp_path, monkeypatch):
    folder = folder_.save(small(), tmp_path / "model", files={"report.html": b"old"})
    (tmp_path / "x").touch()
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        folder_.save(small(1), folder, files={"x": tmp_path / "x"})
    assert contents(tmp_path) == before
    assert_same(folder_.load(folder), small())


def test_a_save_is_on_the_disk_before_it_takes_its_place_and_its_place_is_after(tmp_path, monkeypatch):
    done = []
    sync, exchanged = os.fsync, files._exchanged

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("parent" if path == tmp_path else "folder" if path.parent == tmp_path else path.name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(files, "_exchanged", lambda one, other: done.append("rename") or exchanged(one, other))
    folder = folder_.save(small(), tmp_path / "model")
    done.clear()
    folder_.save(small(1), folder, files={"report.html": b"new"})
    assert set(done[:4]) == {"graph.json", "weights.safetensors", "manifest.json", "report.html"}
    assert done[4:] == ["folder", "rename", "parent"]


def test_without_an_exchange_of_folders_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    folder = folder_.save(small(), tmp_path / "model")
    folder_.save(small(1), folder)
    assert_same(folder_.load(folder), small(1))
    rename = Path.rename

    def fail(self, target):
        if ".part" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        folder_.save(small(2), folder)
    assert_same(folder_.load(folder), small(1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    folder = folder_.save(small(), tmp_path / "model")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(InputError, match="can't be written.*what was there before is unchanged"):
            folder_.save(small(1), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    folder, more = folder_.save(small(), tmp_path / "model"), tmp_path / "more.bin"
    more.write_bytes(b"x" * 3_000_000)
    before = contents(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: (asked.append(place), Usage)[1])
    asked, Usage = [], shutil._ntuple_diskusage(10**9, 10**9, 2_990_000)
    for target in (folder, tmp_path / "not" / "there"):
        with pytest.raises(InputError, match=r"the model takes 3\.\d+ MB of disk, 2\.99 MB are free; .*is unchanged"):
            folder_.save(small(1), target, files={"notes.txt": b"x" * 1000, "more.bin": more})
    assert asked[0] == folder and contents(tmp_path) == before and not (tmp_path / "not").exists()
    Usage = shutil._ntuple_diskusage(0, 0, 0)  # of a file system that does not say
    folder_.save(small(1), folder, files={"more.bin": more})


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    folder = folder_.save(small(), tmp_path / "model")
    other = folder_.save(small(1), tmp_path / "other")
    allowed = {folder_.content_hash(folder), folder_.content_hash(other)}
    program = """
import sys
from rarefy.artifact import folder as artifact
graphs = [artifact.load(sys.argv[2]), artifact.load(sys.argv[1])]
print("ready", flush=True)
while True:
    for graph in graphs:
        artifact.save(graph, sys.argv[1])
"""
    command = [sys.executable, "-c", program, str(folder), str(other)]
    for delay in (0.001, 0.02, 0.05, 0.11):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        folder_.load(folder)
        assert folder_.content_hash(folder) in allowed


def test_a_name_with_a_hyphen_is_kept(tmp_path):
    """As torchvision's RegNet has them: trunk_output.block1.block1-0."""
    net = nn.Sequential()
    net.add_module("block1-0", nn.Linear(4, 3))
    graph = capture(net, torch.randn(2, 4))
    loaded = folder_.load(folder_.save(graph, tmp_path / "model"))
    assert dict(loaded.named_parameters()).keys() == {"block1-0.weight", "block1-0.bias"}
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), graph(x))
