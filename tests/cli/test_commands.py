"""The command line: every verb from text, results on stdout, exit codes, nothing else on stderr."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor, nn

import rarefy
from rarefy import plugins
from rarefy.cli import main, options, terminal
from rarefy.compression import environment, recipe, steps
from rarefy.errors import GoalMissed, InputError, SignatureRefused

COMMANDS = [
    "compress",
    "prune",
    "mask",
    "cluster",
    "distill",
    "quantize",
    "evaluate",
    "predict",
    "measure",
    "export",
    "report",
    "sign",
    "verify",
    "keygen",
    "run",
    "list",
    "doctor",
    "demo",
    "init",
    "front",
    "worker",
    "compare",
    "card",
    "push",
    "pull",
]
HERE = __name__


class Tiny(nn.Module):
    """Two convolutions for digits of (1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


class Sized(Tiny):
    """Of as many classes as asked."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(16, num_classes)


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """stdout of that command line; stderr must be empty when it went well."""
    returned = main.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert returned == code, err
    assert code or err == "", err
    return out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(run(capsys, *arguments, "--json"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model saved by the command line, pruned without data."""
    folder = tmp_path_factory.mktemp("saved") / "small"
    assert main.run(["prune", f"{HERE}:Tiny", "--input", "1,8,8", "--keep", "0.5", "-o", str(folder)]) == 0
    return folder


def test_all_commands_are_there_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    group = typer.main.get_command(main.app)
    assert sorted(group.commands) == sorted(COMMANDS)  # type: ignore[attr-defined]
    for command in COMMANDS:
        assert "Usage: rarefy" in run(capsys, command, "--help")
    assert run(capsys) == run(capsys, "--help")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == f"rarefy {rarefy.__version__}\n"


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from rarefy.cli.main import run; run(['compress', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", list(steps.VERBS))
def test_every_option_of_a_verb_is_an_option_of_its_command(verb: str) -> None:
    names = {
        "quantize": {"weights": "weight_grid", "activations": "activation_grid"},
        "prune": {"batch": "batch_size"},
        "distill": {"training": "preset"},
    }
    renamed = names.get(verb, {})
    command = typer.main.get_command(main.app).commands[verb]  # type: ignore[attr-defined]
    have = {parameter.name: parameter for parameter in command.params}
    for name, field in recipe._verb_options(verb).model_fields.items():
        assert renamed.get(name, name) in have, f"{verb} has no --{name.replace('_', '-')}"
        parameter = have[renamed.get(name, name)]
        assert parameter.required == field.is_required(), f"{verb} --{name}: required by one of command and verb only"
        if parameter.required:
            continue
        given = parameter.default
        assert given == field.default or not (given or field.default), (
            f"{verb} --{name}: default {given!r}, the verb's is {field.default!r}"
        )


def test_every_option_of_the_task_is_an_option_of_its_commands() -> None:
    renamed = {"size": "image_size", "output": "read"}
    fields = {field.name for field in dataclasses.fields(options.DataOptions)}
    assert {renamed.get(name, name) for name in recipe._task_options("classification").model_fields} <= fields


def test_public_names_are_all_there() -> None:
    for name in rarefy.__all__:
        assert getattr(rarefy, name) is not None
    assert set(dir(rarefy)) == set(rarefy.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = rarefy.prun


# ------------------------------------------------------------------ verbs


def test_prune_explains_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = as_json(capsys, "prune", f"{HERE}:Tiny", "--input", "1,8,8", "--explain")
    assert found["groups"] and all(group["channels"] > 0 and "[" in group["members"][0] for group in found["groups"])
    assert any("output of the network" in why for why in found["frozen"].values())
    assert main.run(["prune", f"{HERE}:Tiny", "--input", "1,8,8", "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "leave together" in shown and "output of the network" in shown
    assert not list(tmp_path.iterdir())
    assert main.run(["prune", f"{HERE}:Tiny", "--input", "1,8,8", "--keep", "0.5"]) == 2
    assert "pass -o PATH" in capsys.readouterr().err


def test_prune_measures_saves_and_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = as_json(capsys, "prune", f"{HERE}:Tiny", "--input", "1,8,8", "--macs", 0.5, "-o", tmp_path / "small")
    assert found["step"] == "prune" and found["options"]["macs"] == 0.5
    full = sum(parameter.numel() for parameter in Tiny().parameters())
    graph = rarefy.load(tmp_path / "small")
    assert found["parameters"] == sum(parameter.numel() for parameter in graph.parameters()) < full
    assert graph(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_prune_repairs_with_data(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    found = as_json(
        capsys, "prune", saved, "--keep", 0.5, "--repair", "--data", "sklearn:digits", "-o", tmp_path / "mended"
    )
    assert found["options"]["repair"] is True
    (record,) = [one for one in rarefy.load(tmp_path / "mended").meta["history"][-1:] if one["step"] == "prune"]
    assert record["facts"]["repair"]["images"] == 512 and record["facts"]["repair"]["reconstructed"]
    assert main.run(["prune", str(saved), "--keep", "0.5", "--repair", "-o", str(tmp_path / "none")]) == 2
    assert "repair=True needs images: pass task=" in capsys.readouterr().err


def test_a_verb_takes_a_saved_folder(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    before = as_json(capsys, "measure", saved)[str(saved)]
    again = as_json(capsys, "prune", saved, "--keep", 0.5, "-o", tmp_path / "smaller")
    assert again["parameters"] < before["parameters"]


def test_distill_with_and_without_a_teacher(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    data = ("--data", "sklearn:digits", "--augment", "none", "--batch-size", 256, "--steps", 3)
    found = as_json(capsys, "distill", saved, *data, "-o", tmp_path / "trained")
    assert found["step"] == "train" and found["options"]["steps"] == 3
    found = as_json(
        capsys,
        "distill",
        saved,
        *data,
        "--teacher",
        tmp_path / "trained",
        "--loss",
        "kl:temperature=2",
        "-o",
        tmp_path / "taught",
    )
    assert found["step"] == "distill" and "kl" in found["options"]["loss"]
    assert not (tmp_path / "taught.work").exists()
    teachers = ("--teacher", f"3*{tmp_path / 'trained'}", "--teacher", saved, "--cache", tmp_path / "cache")
    found = as_json(
        capsys, "distill", saved, *data, *teachers, "--preset", "patient", "--lr", 0.2, "-o", tmp_path / "by two"
    )
    options = found["options"]
    assert options["shares"] == [0.75, 0.25] and list((tmp_path / "cache").iterdir())
    assert (options["epochs"], options["mixup"], options["lr"], options["steps"]) == (
        200,
        0.2,
        0.2,
        3,
    )  # the preset's, but for what was said
    assert not torch.equal(
        rarefy.load(tmp_path / "taught").get_parameter("one.weight"), rarefy.load(saved).get_parameter("one.weight")
    )


def test_evaluate(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    found = as_json(
        capsys,
        "evaluate",
        saved,
        "--data",
        "sklearn:digits",
        "--reference",
        saved,
        "--corruptions",
        "fog,jpeg",
        "--limit",
        100,
    )
    assert found["samples"] == 100 and found["agreement"] == 1.0 and found["drop"]["value"] == 0.0
    assert set(found["robustness"]) == {"fog", "jpeg"}
    text = run(capsys, "evaluate", saved, "--data", "sklearn:digits", "--reference", saved, "--max-drop", "0.5%")
    assert "top-1 accuracy" in text and "agreement" in text


def test_classes_are_for_whichever_of_two_models_is_built(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    found = as_json(
        capsys,
        "evaluate",
        saved,
        "--data",
        "sklearn:digits",
        "--reference",
        f"{HERE}:Sized",
        "--classes",
        10,
        "--limit",
        20,
    )
    assert found["reference"]["samples"] == 20


def test_input_says_the_size_of_image_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "val" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20), number, np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "val" / "a" / "0.png").write_bytes(b"not an image")
    options = ("--val", f"imagefolder:{tmp_path}/val", "--channels", 1, "--input", "1,8,8", "--skip-unreadable")
    found = as_json(capsys, "evaluate", f"{HERE}:Tiny", *options)
    assert found["samples"] == 11 and found["unreadable"]["count"] == 1
    assert any("10 outputs, the data has 2 classes" in warning for warning in found["warnings"])
    shown = run(capsys, "evaluate", f"{HERE}:Tiny", *options)
    assert "left out of val" in shown and f"warning: {HERE}:Tiny: 10 outputs" in shown


def test_evaluate_exits_1_for_too_large_a_drop(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    run(
        capsys,
        "distill",
        saved,
        "--data",
        "sklearn:digits",
        "--augment",
        "none",
        "--batch-size",
        64,
        "--epochs",
        4,
        "--lr",
        0.2,
        "-o",
        trained,
    )
    assert (
        main.run(["evaluate", str(saved), "--data", "sklearn:digits", "--reference", str(trained), "--max-drop", "1%"])
        == 1
    )
    out, err = capsys.readouterr()
    assert "top-1 accuracy" in out and err.count("\n") == 1 and "more than 1" in err


def test_quantize_explains_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("quantize", saved, "--data", "sklearn:digits", "--images", 32)
    found = as_json(capsys, *given, "--explain", "--ignore", "*head*")
    assert found["layers"] and all(row["bits"] == 8 and row["sqnr_db"] > 10 for row in found["layers"])
    assert all(row["why"] for row in found["float"])
    assert main.run([*map(str, given), "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "in integers" in shown and "output, dB" in shown and found["layers"][0]["name"] in shown
    assert not list(tmp_path.iterdir())
    assert main.run([*map(str, given)]) == 2
    assert "pass -o PATH" in capsys.readouterr().err


def test_weights_alone_are_quantised_without_data(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    found = as_json(
        capsys,
        "quantize",
        saved,
        "--activation-grid",
        "float",
        "--weight-grid",
        "int4:group=16",
        "-o",
        tmp_path / "int4",
    )
    assert found["step"] == "quantize" and {fact["bits"] for fact in found["facts"]["layers"]} == {4}


def test_quantize_export_and_measure(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    found = as_json(capsys, "quantize", saved, "--data", "sklearn:digits", "--images", 32, "-o", tmp_path / "int8")
    assert found["step"] == "quantize"
    found = as_json(capsys, "export", tmp_path / "int8", "-o", tmp_path / "int8.onnx")
    assert found["size_bytes"] == (tmp_path / "int8.onnx").stat().st_size and "agreement" in found["parity"]
    both = as_json(capsys, "measure", tmp_path / "int8", "--reference", saved, "--repeats", 5)
    assert both[str(tmp_path / "int8")]["size_bytes"] < both[str(saved)]["size_bytes"]
    assert (
        "faster" in (text := run(capsys, "measure", tmp_path / "int8", "--reference", saved, "--repeats", 5))
        or "slower" in text
        or "unchanged" in text
    )
    found = as_json(
        capsys, "evaluate", tmp_path / "int8", "--data", "sklearn:digits", "--runtime", "onnxruntime", "--limit", 50
    )
    assert found["samples"] == 50


def test_keygen_sign_verify(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    keys = as_json(capsys, "keygen", tmp_path / "my.key")
    run(capsys, "sign", saved, "--key", keys["private"])
    assert "as they were signed" in run(capsys, "verify", saved, "--key", keys["public"])
    weights = saved / "weights.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main.run(["verify", str(saved), "--key", keys["public"]]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        weights.write_bytes(content)


def test_report_of_a_folder_measured_again(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    facts = as_json(
        capsys,
        "report",
        saved,
        "--data",
        "sklearn:digits",
        "--reference",
        saved,
        "--limit",
        64,
        "-o",
        tmp_path / "r.html",
    )
    assert (
        facts["after"]["evaluation"]["samples"] == 64 and facts["before"]["parameters"] == facts["after"]["parameters"]
    )
    assert "<!doctype html>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == facts


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "list")
    assert set(found) == set(plugins.KINDS) and len(found) >= 5
    assert {"name", "summary", "options"} == set(found["criteria"][0])
    assert "lskd" in run(capsys, "list", "losses") and "magnitude" not in run(capsys, "list", "losses")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "doctor")
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu"]["usable_cores"] >= 1
    assert torch.__version__ in run(capsys, "doctor")


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: None if name in ("onnx", "timm") else known(name))
    monkeypatch.setattr(environment.cpu, "cpu_flags", lambda: {"avx2": True, "avx512": False, "avx512_vnni": False})
    said = " ".join(environment.examine()["advice"])
    assert "onnx missing: pip install 'rarefy[onnx]'" in said and "rarefy[vision]" in said
    assert "no VNNI" in said and "saturate" in said


# ------------------------------------------------------------------ failing


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def explode(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(environment, "examine", explode)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("a: b; do c"), 2, "rarefy: a: b; do c"),
        (GoalMissed("too slow"), 1, "rarefy: too slow"),
        (SignatureRefused("changed"), 1, "rarefy: changed"),
        (KeyboardInterrupt(), 2, "rarefy: interrupted; nothing that existed was changed"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/some/file"),
            2,
            "rarefy: /some/file: Permission denied; check the path",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "rarefy: the disk is full"),
        (OSError(errno.EFBIG, "File too large", "/x"), 2, "rarefy: the disk is full"),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0: file "
                "write failed"
            ),
            2,
            "rarefy: the disk is full",
        ),
        (MemoryError(), 2, "rarefy: out of memory; end other programs, or take a smaller model"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "rarefy: out of memory"),
        (ZeroDivisionError("division\nby zero"), 70, "division by zero; this is a bug of rarefy's: --debug"),
        (InputError("bad \x1b[31mname\x07\nhere"), 2, r"rarefy: bad \x1b[31mname\x07 here"),
    ],
)
def test_every_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    failing(monkeypatch, error)
    assert main.run(["doctor"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and "Traceback" not in err and "\x1b" not in err


def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ZeroDivisionError("no"))
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        assert main.run(arguments) == 70
        err = capsys.readouterr().err
        assert "Traceback" in err and err.splitlines()[-1].startswith("rarefy: ZeroDivisionError at test_commands.py:")


def test_a_full_disk_is_recognised_through_causes() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert "disk is full" in terminal.explain(error)[0]


def test_output_to_a_closed_pipe_is_no_error() -> None:
    program = [sys.executable, "-m", "rarefy", "list"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_grouped_gives_typer_each_field() -> None:
    parameters = inspect.signature(options.grouped(_with_group)).parameters
    assert (
        next(iter(parameters)) == "model"
        and "weights" in parameters
        and "extra" in parameters
        and "group" not in parameters
    )
    packed, extra = options.grouped(_with_group)(model="m", weights="w", classes=None, input=None, core=None, extra=3)
    assert (packed.model, packed.weights, extra) == ("m", "w", 3)


def _with_group(group: options.ModelOptions, extra: int = 1) -> Any:
    return group, extra
