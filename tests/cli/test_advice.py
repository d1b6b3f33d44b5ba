"""What a message advises can be done: an option that it names is one of the verb that it is raised under."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import typer

import rarefy
from rarefy.cli import main, terminal

ROOT = Path(rarefy.__file__).parent
COMMANDS = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
WRITES_ONLY = {"init"}  # what it is told goes into a recipe: nothing is loaded
OPTIONS = {
    verb: {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    for verb, command in COMMANDS.items()
}
VERB = {"list_choices": "list", "run_recipe": "run", "report_command": "report"}  # function -> its verb
GLOBAL = {"--debug", "--help", "--version"}
NAMED = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def messages(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(outermost function, options that a text in a ``raise`` of it names)."""
    found = []
    for top in ast.iter_child_nodes(tree):
        name = getattr(top, "name", "")
        for node in ast.walk(top):
            if not isinstance(node, ast.Raise):
                continue
            texts = [
                one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
            found += [(name, NAMED.findall(text)) for text in texts if NAMED.search(text)]
    return found


FILES = {str(path.relative_to(ROOT)): messages(ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))}
TOLD = [(file, function, options) for file, found in FILES.items() for function, options in found]


def verbs_under(file: str, function: str) -> list[str]:
    """The verbs that a message may be raised under: its own, or those that load models, or data; else not known."""
    verb = VERB.get(function, function)
    if file.startswith("cli/"):
        if verb in COMMANDS:
            return [verb]
        return []
    if file == "models/fitting.py":  # what is asked where there is data beside the model
        return [name for name, options in OPTIONS.items() if {"--data", "--input"} <= options]
    if file.startswith("models/"):
        takes = {name for name, command in COMMANDS.items() if any(one.name == "model" for one in command.params)}
        return sorted(takes - WRITES_ONLY)
    if file.startswith("data/"):
        return [name for name, options in OPTIONS.items() if "--data" in options and name not in WRITES_ONLY]
    return []


@pytest.mark.parametrize(("file", "function", "options"), TOLD, ids=[f"{file}:{name}" for file, name, _ in TOLD])
def test_an_option_that_a_message_names_is_there(file: str, function: str, options: list[str]) -> None:
    for option in set(options) - GLOBAL:
        assert any(option in known for known in OPTIONS.values()), f"{option}: no verb has it"
        for verb in verbs_under(file, function):
            assert option in OPTIONS[verb], f"{verb} has no {option}"


def test_messages_are_found() -> None:
    """The test above can fail: it sees the messages of the command line and of what lies below it."""
    seen = {option for _, _, options in TOLD for option in options}
    assert {"--input", "--output", "--classes", "--data", "--weights"} <= seen and len(TOLD) > 25


@pytest.mark.parametrize("verb", sorted(COMMANDS))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("out of memory")])
def test_advice_on_memory_and_disk_is_the_verbs_own(verb: str, error: Exception) -> None:
    line, code = terminal.explain(error, [verb, "x"])
    assert code == 2 and set(NAMED.findall(line)) <= OPTIONS[verb] and "; " in line


def test_the_images_size_has_one_name_and_another(tmp_path: Path) -> None:
    from rarefy.compression import recipe

    for verb, options in OPTIONS.items():
        if verb in WRITES_ONLY:
            continue
        assert ("--image-size" in options) == ("--data" in options)
        assert ("--size" in options) == ("--image-size" in options), verb
    assert next(one.name for one in COMMANDS["compress"].params if "--size" in one.opts) == "size"  # of the model
    assert recipe.data_options({"val": "x", "image_size": 32}) == recipe.data_options({"val": "x", "size": 32})
    with pytest.raises(rarefy.RarefyError, match="image_size"):
        recipe.data_options({"size": 32, "image_size": 32})


def test_what_an_input_of_another_shape_is_advised_works() -> None:
    from types import SimpleNamespace

    from rarefy.cli.inputs import agreed_shape
    from rarefy.tasks.classification import Classification

    def shape_of(**options: object) -> tuple[int, ...]:
        return Classification(val="sklearn:digits", **options).data.input_shape  # type: ignore[arg-type]

    task = SimpleNamespace(data=SimpleNamespace(input_shape=shape_of()))
    with pytest.raises(rarefy.RarefyError) as caught:
        agreed_shape((3, 16, 16), task)
    assert str(caught.value).endswith("leave --input out, or pass --image-size 16 --channels 3")
    assert shape_of(size=16, channels=3) == (3, 16, 16) and agreed_shape(None, task) == shape_of()
    with pytest.raises(rarefy.RarefyError, match="leave --input out$"):  # no option makes images that are not square
        agreed_shape((3, 16, 20), task)
