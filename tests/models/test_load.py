"""Model sources and weights: every form loads, and nothing of a hostile file is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.errors import CaptureError, FormatError, InputError, RarefyError
from rarefy.models import checkpoint, load, weights
from rarefy.models import source as source_


class Small(nn.Module):
    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


MADE = Small()
NOT_A_MODEL = 3


def small(num_classes: int = 3) -> nn.Module:
    return Small(num_classes)


def plain() -> nn.Module:
    return Small()


def number() -> int:
    return 3


def broken() -> nn.Module:
    raise RuntimeError("no luck\ntoday")


HERE = __name__


class Marker:
    """Unpickling it leaves a mark."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def exported(path: Path, free: bool = True) -> Path:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if free else None
    torch.export.save(torch.export.export(Small().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


def rezipped(path: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name.partition("/")[2], content))
        for name, content in (extra or {}).items():
            archive.writestr(f"{root}/{name}", content)
    return path


@pytest.mark.parametrize(
    "text",
    [
        f"{HERE}:small", f"{HERE}:Small", f"{HERE}:MADE", f"{HERE}:small?num_classes=3",
        "torchvision:resnet18?num_classes=3", "timm:resnet10t?num_classes=3", "torchvision:googlenet?num_classes=3",
    ],
)  # fmt: skip
def test_every_form_loads_and_captures(text: str) -> None:
    source = load.load(text)
    assert not source.model.training
    graph = load.graph_of(source, (3, 64, 64))
    assert graph(torch.randn(5, 3, 64, 64)).shape == (5, 3)


def test_what_the_maker_says_of_the_input() -> None:
    assert load.load("timm:resnet10t").shape == (3, 176, 176)
    assert load.load("timm:resnet10t").preprocessing["mean"] == (0.485, 0.456, 0.406)
    assert load.load("timm:resnet10t?in_chans=1").shape == (1, 176, 176)
    assert "mean" not in load.load("timm:resnet10t?in_chans=1").preprocessing
    assert load.load("torchvision:mobilenet_v3_small").shape == (3, 224, 224)


def test_classes_reach_the_model() -> None:
    for text in (f"{HERE}:small", "torchvision:resnet18", "timm:resnet10t"):
        graph = load.graph_of(load.load(text, classes=7), (3, 32, 32))
        assert graph(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_nothing_is_downloaded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert "backbone" in dict(load.load("torchvision:ssdlite320_mobilenet_v3_large").model.named_children())


def test_the_same_model_every_time_and_no_seed_touched() -> None:
    before = torch.get_rng_state()
    first, second = load.load(f"{HERE}:small"), load.load(f"{HERE}:small")
    assert torch.equal(first.model.conv.weight, second.model.conv.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worked_here.py").write_text("import torch\ndef net(): return torch.nn.Flatten()\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert isinstance(load.load("worked_here:net").model, nn.Flatten)


@pytest.mark.parametrize(
    ("text", "classes", "said"),
    [
        ("nothing", None, "no such model; give timm:NAME, torchvision:NAME,"),
        ("a/b/c", None, "no such model"),
        ("", None, "no such model"),
        ("timm:resnet1888", None, "timm has no model 'resnet1888'; the nearest are resnet18"),
        ("torchvision:rsnet18", None, "the nearest are resnet18"),
        ("timm:resnet18?nonsense=1", None, "making it failed: TypeError"),
        ("timm:resnet18?nonsense", None, "'nonsense' is no option; write ?name=value"),
        ("nopackage.here:net", None, "no module 'nopackage' here or installed"),
        ("nofile.py:net", None, "a module goes without its ending, nofile:net"),
        (f"{HERE}:smal", None, f"{HERE} has no 'smal'; the nearest are small"),
        (f"{HERE}:NOT_A_MODEL", None, "is a int; name a function that returns a torch.nn.Module"),
        (f"{HERE}:number", None, "returned a int; it must return a torch.nn.Module"),
        (f"{HERE}:broken", None, "making it failed: RuntimeError: no luck; check"),
        (f"{HERE}:plain", 5, "takes no num_classes, so --classes can't be passed on"),
        (f"{HERE}:MADE", 5, "is a module already made; leave out --classes"),
        ("missing.pt2", None, "no such file"),
    ],
)
def test_no_such_source(text: str, classes: int | None, said: str) -> None:
    with pytest.raises(InputError) as raised:
        load.load(text, classes=classes)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_and_a_folder_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="weights with --weights"):
        load.load(str(tmp_path / "weights.safetensors"))
    with pytest.raises(FormatError, match=r"no graph\.json in that folder"):
        load.load(str(tmp_path))


def test_a_wrong_input_shape_is_told_as_such() -> None:
    with pytest.raises(
        CaptureError, match=r"does not take an input of 1x8x8 \(.*\); it takes 3x8x8: pass --channels 3 --image-size 8"
    ):
        load.graph_of(load.load(f"{HERE}:small"), (1, 8, 8))
    with pytest.raises(InputError, match="pass --input"):
        load.graph_of(load.load(f"{HERE}:small"))


# ------------------------------------------------------------------ weights


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {name: value.clone() for name, value in Small().state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    ],
)
def test_checkpoints(tmp_path: Path, state: dict[str, Tensor], wrap: Any) -> None:
    torch.save(wrap(state), tmp_path / "w.pt")
    source = load.load(f"{HERE}:small", weights=tmp_path / "w.pt")
    assert all(torch.equal(value, state[name]) for name, value in source.model.state_dict().items())
    assert source.weights == str(tmp_path / "w.pt")


def test_safetensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    source = load.load(f"{HERE}:small", weights=tmp_path / "w.safetensors")
    assert torch.equal(source.model.state_dict()["conv.weight"], state["conv.weight"])


def changed(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    state = dict(state)
    if what == "missing":
        del state["conv.bias"]
    elif what == "unexpected":
        state["conv2.bias"] = torch.zeros(1)
    elif what == "shape":
        state["conv.weight"] = torch.zeros(4, 3, 5, 5)
    elif what == "classes":
        state |= {"head.weight": torch.zeros(9, 4), "head.bias": torch.zeros(9)}
    elif what == "nan":
        state["conv.weight"] = state["conv.weight"].clone()
        state["conv.weight"].view(-1)[7] = torch.nan
    elif what == "inf":
        state["head.bias"] = torch.full((3,), torch.inf)
    return state


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "conv.bias is missing there"),
        ("unexpected", "conv2.bias is not in the model"),
        ("shape", "conv.weight is 4x3x5x5 there and 4x3x3x3 in the model"),
        ("classes", "head.weight is 9x4 there and 3x4 in the model (and 1 more); pass --classes"),
        ("nan", "conv.weight holds 1 values that are NaN or infinite"),
        ("inf", "head.bias holds 3 values that are NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, state: dict[str, Tensor], what: str, said: str) -> None:
    save_file(changed(state, what), tmp_path / "w.safetensors")
    with pytest.raises(InputError) as raised:
        load.load(f"{HERE}:small", weights=tmp_path / "w.safetensors")
    assert said in str(raised.value) and str(tmp_path / "w.safetensors") in str(raised.value)


def test_huge_finite_weights_are_not_called_infinite() -> None:
    model = Small()
    with torch.no_grad():
        model.conv.weight.fill_(torch.finfo(torch.float32).max)
    weights.check_finite(source_.Source("x", model))


def test_pickled_code_in_weights_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for name, write in (
        ("zip.pt", lambda path: torch.save({**state, "x": Marker(tmp_path / "mark")}, path)),
        (
            "old.pt",
            lambda path: torch.save(
                {**state, "x": Marker(tmp_path / "mark")}, path, _use_new_zipfile_serialization=False
            ),
        ),
        ("raw.pkl", lambda path: path.write_bytes(pickle.dumps(Marker(tmp_path / "mark")))),
    ):
        write(tmp_path / name)
        with pytest.raises(FormatError, match=r"safetensors"):
            load.load(f"{HERE}:small", weights=tmp_path / name)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.safetensors", b"", "is no safetensors file"),
        ("w.safetensors", b"\xff" * 100, "is no safetensors file"),
        ("w.pt", b"", "is no checkpoint torch can read"),
        ("w.pt", b"hello world, I am no checkpoint", "is no checkpoint|holds more than tensors"),
        ("w.pt", b"PK\x03\x04" + b"\0" * 50, "is no checkpoint torch can read"),
    ],
)
def test_broken_weights(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=said):
        checkpoint.entries(tmp_path / name)


def test_weights_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(FormatError, match="no named tensors"):
        checkpoint.entries(tmp_path / "w.pt")
    torch.save(torch.zeros(3), tmp_path / "t.pt")
    with pytest.raises(FormatError, match="no named tensors"):
        checkpoint.entries(tmp_path / "t.pt")


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        checkpoint.entries(tmp_path / "w.pt")
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.entries(tmp_path)


# ------------------------------------------------------------------ .pt2


def test_an_exported_program(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2")
    source = load.load(str(path))
    assert source.shape == (3, 8, 8)
    graph = load.graph_of(source)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(graph(x), torch.export.load(path).module()(x))
    assert {name for name, _ in graph.named_parameters()} == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    graph.train()
    outputs = graph(x).shape[1]
    assert load.load(str(path), classes=outputs).shape == (3, 8, 8)
    with pytest.raises(InputError, match=f"outputs of {outputs}, not 99; leave out --classes"):
        load.load(str(path), classes=99)


def test_an_exported_program_of_one_batch_size(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="for batches of 2 only"):
        load.load(str(exported(tmp_path / "m.pt2", free=False)))


def pickled(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Marker(mark),), buffer)
    return buffer.getvalue()


def with_target(content: bytes, target: str) -> bytes:
    program = json.loads(content)
    program["graph_module"]["graph"]["nodes"][0]["target"] = target
    return json.dumps(program).encode()


def with_expression(content: bytes, expression: str) -> bytes:
    text = content.decode()
    assert '"expr_str": "' in text

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: expression if key == "expr_str" else change(item) for key, item in value.items()}
        return [change(item) for item in value] if isinstance(value, list) else value

    return json.dumps(change(json.loads(text))).encode()


ATTACKS: dict[str, Callable[[Path], tuple[Callable[[str, bytes], bytes], dict[str, bytes]]]] = {
    "sample inputs": lambda mark: (
        lambda name, content: pickled(mark) if name.startswith("data/sample_inputs") else content,
        {},
    ),
    "old weights": lambda mark: (lambda name, content: content, {"data/weights/model.pt": pickled(mark)}),
    "pickled weight": lambda mark: (
        lambda name, content: (
            content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            if name.endswith("weights_config.json")
            else pickled(mark)
            if name == "data/weights/weight_0"
            else content
        ),
        {},
    ),
    "custom object": lambda mark: (
        lambda name, content: (
            json.dumps(
                {
                    "config": {
                        "o": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
                    }
                }
            ).encode()
            if name.endswith("constants_config.json")
            else content
        ),
        {"data/constants/opaque_obj_0": pickle.dumps(Marker(mark))},
    ),
    "operator": lambda mark: (
        lambda name, content: with_target(content, "torch.os.mkdir") if name.startswith("models/") else content,
        {},
    ),
    "expression": lambda mark: (
        lambda name, content: (
            with_expression(content, f"__import__('os').mkdir('{mark}')") if name.startswith("models/") else content
        ),
        {},
    ),
    "attribute in expression": lambda mark: (
        lambda name, content: with_expression(content, "Symbol.mro()") if name.startswith("models/") else content,
        {},
    ),
    "compiled code": lambda mark: (lambda name, content: content, {"data/aotinductor/model/x.so": b"\x7fELF"}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_exported_program_is_refused_and_not_run(tmp_path: Path, attack: str) -> None:
    change, extra = ATTACKS[attack](tmp_path / "mark")
    path = rezipped(exported(tmp_path / "m.pt2"), change, extra)
    with pytest.raises(FormatError, match=r"save it again with torch\.export\.save"):
        load.load(str(path))
    assert not (tmp_path / "mark").exists()


def test_an_archive_with_two_roots_or_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/models/model.json", b"{}")
    with pytest.raises(FormatError, match="not laid out"):
        load.load(str(path))
    path = exported(tmp_path / "n.pt2")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(FormatError, match="not laid out"):
        load.load(str(path))


def test_a_damaged_exported_program(tmp_path: Path) -> None:
    whole = exported(tmp_path / "m.pt2").read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2], whole[:200] + b"\0" * 50 + whole[250:]):
        (tmp_path / "m.pt2").write_bytes(content)
        with pytest.raises(RarefyError) as raised:
            load.load(str(tmp_path / "m.pt2"))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("checkpoint_path={file}", "checkpoint_path names a file, an address or code"),
        ("checkpoint_path=weights", "checkpoint_path names a file"),
        ("checkpoint_path=0", "checkpoint_path names a file"),
        ("pretrained_cfg=a1_in1k", "pretrained_cfg names a file"),
        ("pretrained_cfg_overlay=x", "pretrained_cfg_overlay names a file"),
        ("cache_dir={file}", "cache_dir names a file"),
        ("feature_cls=hook", "feature_cls names a file"),
        ("trust_remote_code=true", "trust_remote_code names a file"),
        ("pretrained={file}", "pretrained takes a number, true, false or none, not "),
        ("weights=DEFAULT", "weights takes a number"),
        ("anything={file}", "anything takes a number"),
        ("out_indices=__import__('os')", "out_indices takes a number"),
        ("act_layer={file}", "act_layer takes a name out of the library's own table"),
        ("act_layer=torch.nn.ReLU", "act_layer takes a name"),
        ("act_layer=https://x.example/y", "act_layer takes a name"),
        ("norm_layer=..", "norm_layer takes a name"),
    ],
)
def test_an_option_of_timm_names_no_file_no_address_and_no_code(option: str, said: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(OPENS_A_FILE.replace(b"PLACE", str(tmp_path / "ran").encode()))
    with pytest.raises(InputError) as raised:
        load.load(f"timm:test_resnet?{option.format(file=bad)}")
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert "package.module:function" in str(raised.value) and not (tmp_path / "ran").exists()


# A pickle that makes the file PLACE.
OPENS_A_FILE = b"cbuiltins\nopen\n(S'PLACE'\nS'w'\ntR."


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/tmp/model", "/tmp/model", "a/b", "x:y"]
)
def test_a_model_of_timm_is_a_name_and_no_place(name: str) -> None:
    with pytest.raises(InputError, match="is a place, not a name of timm's; .*--weights FILE.safetensors"):
        load.load(f"timm:{name}")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("weights=/tmp/bad.pth", "weights takes a name out of the library's own table, not '/tmp/bad.pth'"),
        ("weights=https://x.example/y.pth", "weights takes a name"),
        ("weights=a.b.c", "weights takes a name"),
        ("weights=nonsense", "making it failed"),
        ("weights_backbone=../x", "weights_backbone takes a name"),
        ("norm_layer=torch", "norm_layer takes a number, true, false or none"),
        ("root=/tmp", "root names a file"),
    ],
)
def test_an_option_of_torchvision_names_no_file_either(option: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        load.load(f"torchvision:resnet18?{option}")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_words_that_a_library_looks_up_are_passed_on() -> None:
    made = load.load("timm:test_resnet?act_layer=gelu&global_pool=max&drop_rate=0.1&num_classes=4").model
    assert any("GELU" in type(module).__name__ for module in made.modules())
    assert load.load("timm:test_resnet?global_pool=&num_classes=0").model(torch.randn(1, 3, 64, 64)).dim() == 4
