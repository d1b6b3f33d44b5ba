"""Recipes: TOML, the command line's text and Python say the same; what is wrong is told with its key."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.compression import recipe, steps
from rarefy.distillation.options import Training
from rarefy.errors import InputError

WHOLE = """
model = "timm:resnet18"
weights = "best.safetensors"
classes = 7
input = "3,64,64"
output = "small/"
runtime = "onnxruntime"
seed = 3

[data]
train = "imagefolder:data/train"
val = "imagefolder:data/val"
size = 64
mean = [0.5, 0.5, 0.5]

[budget]
max_drop = "0.5%"
speedup = 3

[[step]]
do = "prune"
macs = 0.5
criterion = "taylor:batches=20"
ignore = ["fc", "layer1.*"]

[[step]]
do = "distill"
epochs = 3
loss = "lskd + 50*mse:on=stages"

[[step]]
do = "quantize"
"""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_whole_recipe(written: Any) -> None:
    asked = recipe.read(written(WHOLE))
    assert (asked.model, asked.weights, asked.classes, asked.input, asked.seed) == (
        "timm:resnet18",
        "best.safetensors",
        7,
        (3, 64, 64),
        3,
    )
    assert asked.data == {
        "train": "imagefolder:data/train",
        "val": "imagefolder:data/val",
        "size": 64,
        "mean": (0.5, 0.5, 0.5),
    }
    assert asked.budget == {"max_drop": 0.005, "speedup": 3}
    assert [dict(step) for step in asked.steps] == [
        {"do": "prune", "macs": 0.5, "criterion": "taylor:batches=20", "ignore": ("fc", "layer1.*")},
        {"do": "distill", "epochs": 3, "loss": "lskd + 50*mse:on=stages"},
        {"do": "quantize"},
    ]


def test_written_and_read_again(written: Any) -> None:
    asked = recipe.read(written(WHOLE))
    assert recipe.read(written(recipe.write(asked))) == asked


def test_least_recipe(written: Any) -> None:
    asked = recipe.read(written('model = "timm:resnet18"'))
    assert asked == recipe.Recipe("timm:resnet18")
    assert recipe.write(asked) == 'model = "timm:resnet18"\n'


@given(st.text(min_size=1))
def test_any_text_survives(text: str) -> None:
    content = recipe.write(recipe.Recipe(model=text, output=text))
    assert tomllib.loads(content) == {"model": text, "output": text}


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("prune macs=0.5 criterion=taylor:batches=20", {"do": "prune", "macs": 0.5, "criterion": "taylor:batches=20"}),
        (
            "prune keep=0.5 round-to=8 ignore=fc,layer1.* check=false",
            {"do": "prune", "keep": 0.5, "round_to": 8, "ignore": ("fc", "layer1.*"), "check": False},
        ),
        ("distill epochs=3 'loss=lskd + 50*mse'", {"do": "distill", "epochs": 3, "loss": "lskd + 50*mse"}),
        ("quantize", {"do": "quantize"}),
    ],
)
def test_a_step_as_text(text: str, step: dict[str, Any]) -> None:
    assert recipe.step(text) == step
    assert recipe.step(step) == step


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seed = 3", "sead = 3"), "recipe.toml: unknown key 'sead'; did you mean 'seed'? have model, weights, "),
        (("seed = 3", "seed = -3"), "recipe.toml: seed = -3: should be greater than or equal to 0"),
        (("seed = 3", 'seed = "many"'), "recipe.toml: seed = 'many': should be a valid integer"),
        (('model = "timm:resnet18"', ""), "recipe.toml: key 'model' is missing; add model = ..."),
        (("size = 64", "sise = 64"), "recipe.toml: [data]: unknown key 'sise'; did you mean 'size'?"),
        (("size = 64", 'size = "big"'), "recipe.toml: [data]: size = 'big': should be a valid integer"),
        (("speedup = 3", "spedup = 3"), "recipe.toml: [budget]: unknown key 'spedup'; did you mean 'speedup'?"),
        (
            ('max_drop = "0.5%"', 'max_drop = "a bit"'),
            "recipe.toml: [budget] max_drop: 'a bit' is no share; write 0.5% or 0.005",
        ),
        (('max_drop = "0.5%"', "max_drop = 0.5"), "recipe.toml: [budget] max_drop: 0.5 would be 50 %"),
        (
            ('do = "prune"', 'do = "prun"'),
            "recipe.toml: step 1: do = 'prun' is no step; have prune, mask, cluster, distill, quantize",
        ),
        (("macs = 0.5", "mac = 0.5"), "recipe.toml: step 1 (prune): unknown key 'mac'; did you mean 'macs'?"),
        (
            ("macs = 0.5", "macs = 0.5\nkeep = 0.5"),
            "recipe.toml: step 1 (prune): give one of keep, macs, params, speedup; got keep, macs",
        ),
        (("macs = 0.5", ""), "recipe.toml: step 1 (prune): give one of keep, macs, params, speedup; got none"),
        (("macs = 0.5", 'macs = "half"'), "recipe.toml: step 1 (prune): macs = 'half': should be a valid number"),
        (("taylor:batches=20", "tailor"), "recipe.toml: step 1 (prune): criterion: criteria: unknown choice 'tailor'"),
        (("taylor:batches=20", "taylor:batch=20"), "unknown option 'batch=20'; have batch_size, batches"),
        (("epochs = 3", "epoch = 3"), "recipe.toml: step 2 (distill): unknown key 'epoch'; did you mean 'epochs'?"),
        (("lskd + 50*mse:on=stages", "x*lskd"), "recipe.toml: step 2 (distill): loss: "),
        (
            ('runtime = "onnxruntime"', 'runtime = "onnxruntim"'),
            "recipe.toml: runtime: runtimes: unknown choice 'onnxruntim'",
        ),
        (('input = "3,64,64"', 'input = "3,-1"'), "give positive sizes"),
        (("seed = 3", "seed = "), "recipe.toml: is no TOML: "),
        (("[data]", "[data"), "recipe.toml: is no TOML: "),
    ],
)
def test_what_is_wrong_is_told_with_its_key(written: Any, change: tuple[str, str], said: str) -> None:
    assert change[0] in WHOLE
    with pytest.raises(InputError) as raised:
        recipe.read(written(WHOLE.replace(*change)))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_recipe_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        recipe.read(tmp_path / "none.toml")
    with pytest.raises(InputError, match="is a folder, not a plain file"):
        recipe.read(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(InputError, match="is no text in UTF-8"):
        recipe.read(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("text", "value"), [("0.5%", 0.005), ("0.5 %", 0.005), (0.005, 0.005), ("0", 0.0), ("50%", 0.5), ("0.19", 0.19)]
)
def test_shares(text: Any, value: float) -> None:
    assert recipe.share(text, "here") == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "100%", "0.5", "2", "nan", "inf", "%", "", "one"])
def test_no_shares(text: str) -> None:
    with pytest.raises(InputError, match=r"here: .*(write 0\.5%|write 50%)"):
        recipe.share(text, "here")


@pytest.mark.parametrize(
    ("text", "value"), [("2MB", 2_000_000), ("500 kB", 500_000), ("1.5MiB", 1_572_864), (1234, 1234), ("12B", 12)]
)
def test_sizes(text: Any, value: int) -> None:
    assert recipe.size(text, "here") == value


@pytest.mark.parametrize("text", ["-2MB", "0", "2 miles", "MB", "", "nan", "1.2.3MB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="here: "):
        recipe.size(text, "here")


@pytest.mark.parametrize("verb", list(steps.VERBS))
def test_a_step_has_the_verbs_own_options(verb: str) -> None:
    """No option of a verb is out of a recipe's reach, but for the objects of the run."""
    given = steps.GIVEN | recipe.OBJECTS
    fields = set(recipe._verb_options(verb).model_fields)
    for parameter in inspect.signature(steps.VERBS[verb].function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in {*given, "training"}:
            assert parameter.name in fields
    if verb == "distill":
        assert {field.name for field in dataclasses.fields(Training)} - given | {"training"} <= fields
        assert recipe.step("distill training=fast lr=0.1") == {"do": "distill", "training": "fast", "lr": 0.1}
