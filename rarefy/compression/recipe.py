"""A recipe in TOML: the same verbs and the same words as in Python and on the command line.

::

    model = "timm:resnet18"             # any source of rarefy.models.load
    weights = "best.safetensors"
    output = "small/"
    runtime = "onnxruntime"
    seed = 0

    [data]                              # the options of the task
    train = "imagefolder:data/train"
    val = "imagefolder:data/val"

    [budget]                            # the options of Budget
    max_drop = "0.5%"
    speedup = 3

    [[step]]                            # in this order; the options of the verb
    do = "prune"
    macs = 0.5
    criterion = "taylor:batches=20"

    [[step]]
    do = "distill"
    epochs = 3

    [[step]]
    do = "quantize"

Without a ``[[step]]`` the usual recipe is taken. Paths are relative to the working directory, as on the command line.

What keys a step may have is not written down a second time: it is read from the verb's own signature and the
dataclasses of its options, and checked by pydantic with ``extra="forbid"``, so that a misspelt key is an error that
names the key and what there is. Arguments that are objects of the run (the model, the teacher, the device, ...) are the
runner's, not the recipe's (``rarefy.compression.steps``). Text that names a choice (``"taylor:batches=20"``) is
resolved when the recipe is read: what can't work is told before anything is trained.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, create_model

from rarefy import plugins
from rarefy.compression.budget import Budget
from rarefy.errors import InputError
from rarefy.models import source
from rarefy.system import strict_toml
from rarefy.system.options import options_of
from rarefy.tasks.task import Task

Table = Mapping[str, Any]  # of TOML: values by name
Options = dict[str, Any]  # checked
Hint = Any  # an annotation

MOST_STEPS = 100
# Objects, which no text says, beside what the runner hands to a verb.
OBJECTS = frozenset({"inputs", "batches", "validate", "checkpoint_seconds"})

# option, or verb and option -> kind of choice its text names
CHOICES = {
    "criterion": "criteria",
    "mask criterion": "saliency",
    "schedule": "schedules",
    "select": "selection",
    "loss": "losses",
    "student": "students",
    "rounding": "rounding",
    "calibration": "calibration",
    "weight_calibration": "calibration",
    "runtime": "runtimes",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do, checked: options by name, as the task, ``Budget`` and the verbs take them.

    steps: ``{"do": "prune", "macs": 0.5, ...}`` in order; empty: the usual recipe.
    """

    model: str
    weights: str | None = None
    classes: int | None = None
    input: tuple[int, ...] | None = None
    core: str | None = None
    task: str = "classification"
    data: Table = dataclasses.field(default_factory=dict)
    budget: Table = dataclasses.field(default_factory=dict)
    steps: Sequence[Table] = ()
    runtime: str = "onnxruntime"
    output: str | None = None
    seed: int = 0
    device: str | None = None
    store: str | None = None


def read(path: str | Path) -> Recipe:
    """The recipe in that file. Raises InputError, which names the key and the way out."""
    file = Path(path)
    if not os.path.exists(file):
        raise InputError(f"{file}: no such recipe; give the path of a TOML file")
    return check(strict_toml.read(file), where=str(file))


def check(content: Table, where: str = "recipe") -> Recipe:
    """A recipe from the tables of a TOML file. Raises InputError."""
    top = _validated(_Top, content, where)
    data = data_options(top.pop("data"), f"{where}: [data]", top["task"])
    budget = _in_numbers(top.pop("budget"), f"{where}: [budget]")
    budget = _validated(_options("Budget", Budget), budget, f"{where}: [budget]") if budget else {}
    if len(top["step"]) > MOST_STEPS:
        raise InputError(f"{where}: has {len(top['step']):,} steps, {MOST_STEPS} at most; write fewer")
    listed = tuple(step(item, f"{where}: step {index}") for index, item in enumerate(top.pop("step"), 1))
    shape = top.pop("input")
    if shape is not None:
        top["input"] = source.parse_shape(shape if isinstance(shape, str) else ",".join(map(str, shape)))
    choice("runtime", top["runtime"], f"{where}: runtime")
    return Recipe(**top, data=data, budget=budget, steps=listed)


def step(content: Table | str, where: str = "step") -> Options:
    """One step, checked: ``{"do": "prune", "macs": 0.5}``, or as text, ``"prune macs=0.5 criterion=magnitude"``."""
    if isinstance(content, str):
        content = _step_of_text(content, where)
    from rarefy.compression.steps import VERBS

    verb = content.get("do")
    if verb not in VERBS:
        raise InputError(f"{where}: do = {verb!r} is no step; have {', '.join(VERBS)}")
    asked = {key: value for key, value in content.items() if key != "do"}
    options = _validated(_verb_options(verb), asked, f"{where} ({verb})")
    for name, value in options.items():
        choice(f"{verb} {name}" if f"{verb} {name}" in CHOICES else name, value, f"{where} ({verb}): {name}")
    targets = [name for name in ("keep", "macs", "params", "speedup") if name in options]
    if verb == "prune" and len(targets) != 1:
        raise InputError(
            f"{where} (prune): give one of keep, macs, params, speedup; got {', '.join(targets) or 'none'}"
        )
    return {"do": verb, **options}


def choice(option: str, value: object, where: str) -> None:
    """Is the text a choice of the kind that the option takes? Raises InputError."""
    kind = CHOICES.get(option)
    if kind is None or not isinstance(value, str):
        return
    try:
        if option == "loss":  # a weighted sum of choices
            from rarefy.distillation import objective

            objective.terms(value)
        elif option == "student":  # or the source of a model
            from rarefy.distillation import teachers

            teachers.student_kind(value)
        else:
            plugins.resolve(kind, value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def write(recipe: Recipe) -> str:
    """The recipe as TOML; ``read`` gives it back. What is at its default is left out."""
    lines = []
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if field.name in ("data", "budget", "steps") or value == field.default:
            continue
        lines.append(f"{field.name} = {_toml(value)}")
    for name in ("data", "budget"):
        table = {key: value for key, value in getattr(recipe, name).items() if value is not None}
        if table:
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    for item in recipe.steps:
        lines += ["", "[[step]]", *(f"{key} = {_toml(value)}" for key, value in item.items() if value is not None)]
    return "\n".join(lines) + "\n"


def data_options(content: Table, where: str = "data", task: str = "classification") -> Options:
    """The options of a task, checked; ``image_size`` is ``size``, as the command line has it. Raises InputError."""
    if "image_size" in content and "size" not in content:
        content = {("size" if name == "image_size" else name): value for name, value in content.items()}
    return _validated(_task_options(task), content, where)


def make_task(data: Table, task: str = "classification") -> Task:
    """The task of that name, with its data."""
    made: Task = plugins.task_class(task)(**data)
    return made


def share(text: str | float, where: str) -> float:
    """``"0.5%"`` or ``0.005`` -> 0.005. Raises InputError, also for a bare number that was surely meant in percent."""
    raw = str(text).strip()
    try:
        value = float(raw.removesuffix("%").strip()) / (100 if raw.endswith("%") else 1)
    except ValueError:
        raise InputError(f"{where}: {raw!r} is no share; write 0.5% or 0.005") from None
    if not 0 <= value < 1:
        raise InputError(f"{where}: {raw} is not between 0 and 100 %; write 0.5% or 0.005")
    if value >= 0.2 and not raw.endswith("%"):
        raise InputError(
            f"{where}: {raw} would be {100 * value:g} %; write {100 * value:g}% if that is meant, or {raw}%"
        )
    return value


def size(text: str | float, where: str) -> int:
    """``"2MB"``, ``"500 kB"``, ``"1.5MiB"`` or a number of bytes -> bytes."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(text))
    try:
        value = int(float(found[1]) * units[found[2].lower()])  # type: ignore[index]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise InputError(f"{where}: {str(text)[:40]!r} is no size; write 2MB, 500kB or a number of bytes") from None
    if value <= 0:
        raise InputError(f"{where}: {str(text)!r} is no bytes at all; write 2MB, 500kB or a number of bytes")
    return value


def _in_numbers(budget: Table, where: str) -> Options:
    parsers = {"max_drop": share, "size": size}
    return {
        key: parsers[key](value, f"{where} {key}") if key in parsers and value is not None else value
        for key, value in budget.items()
    }


class _Top(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)

    model: str
    weights: str | None = None
    classes: PositiveInt | None = None
    input: str | list[int] | None = None
    core: str | None = None
    task: str = "classification"
    data: Options = {}
    budget: Options = {}
    step: list[Options] = []
    runtime: str = "onnxruntime"
    output: str | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    device: str | None = None
    store: Literal["readable", "smallest", "fastest"] | None = None


def _task_options(task: str) -> type[BaseModel]:
    known = plugins.task_class(task)
    return _options(known.__name__, known)


def _verb_options(verb: str) -> type[BaseModel]:
    from rarefy.compression.steps import GIVEN, REPLACED, VERBS

    return _options(verb, VERBS[verb].function, GIVEN | OBJECTS, REPLACED)


def _options(
    name: str,
    function: Callable[..., object],
    given: AbstractSet[str] = frozenset(),
    replaced: AbstractSet[str] = frozenset(),
) -> type[BaseModel]:
    """A pydantic model of what ``function`` takes as text, numbers and lists of them.

    given: what is no key. replaced: what may be left out, whatever the function says.
    """
    fields: Options = {}
    for option, (annotation, default) in options_of(function).items():
        if option in given:
            continue
        hint = str if option in CHOICES else _plain(annotation)
        default = None if option in replaced else ... if default is inspect.Parameter.empty else default
        fields[option] = (Annotated[hint, BeforeValidator(_split)] if _is_list(hint) else hint, default)
    return create_model(name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _plain(hint: Hint) -> Hint:
    """What of an annotation can stand in a TOML file."""
    if hint in (int, float, bool, str, type(None), dict):
        return hint
    origin: object = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kept = [plain for plain in map(_plain, arguments) if plain is not None]
        return typing.Union[tuple(kept)] if kept else str  # noqa: UP007 (made from a list)
    if origin is Literal:
        return hint
    if origin is tuple:
        items = tuple(argument if argument is Ellipsis else _plain(argument) for argument in arguments)
        return tuple[items]  # type: ignore[valid-type]
    if origin in (list, Sequence, Iterable):
        return tuple[_plain(arguments[0]), ...]  # type: ignore[misc]
    if origin in (dict, Mapping):
        return dict
    return str  # the text that names an object


def _is_list(hint: Hint) -> bool:
    return tuple in (typing.get_origin(part) for part in (hint, *typing.get_args(hint)))


def _split(value: object) -> object:
    """``ignore=fc,layer1.*`` on the command line, ``ignore = ["fc", "layer1.*"]`` in TOML."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _step_of_text(text: str, where: str) -> Options:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{where}: {text!r}: {error}; write 'prune macs=0.5'") from error
    if not words:
        raise InputError(f"{where}: is empty; write 'prune macs=0.5'")
    verb, *options = words
    content: Options = {"do": verb}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"{where}: {option!r} is no option; write '{verb} name=value name=value'")
        content[key.replace("-", "_")] = source.parse_value(value)
    return content


def _validated(model: type[BaseModel], content: Table, where: str) -> Options:
    try:
        checked = model.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error, model)}") from error
    given = checked.model_fields_set if model is not _Top else set(model.model_fields)
    return {name: getattr(checked, name) for name in model.model_fields if name in given}


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else "it"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    have = list(model.model_fields)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, have, n=1)
        return f"unknown key {key!r}{more}; {f'did you mean {near[0]!r}? ' if near else ''}have {', '.join(have)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing{more}; add {key} = ..."
    alternatives = [item for item in error.errors(include_url=False) if item["loc"][:1] == first["loc"][:1]]
    wanted = " or ".join(dict.fromkeys(_wanted(item) for item in alternatives))
    return f"{key} = {repr(first['input'])[:80]}: {wanted}; mend that value"


def _wanted(item: Table) -> str:
    return str(item["msg"][0].lower() + item["msg"][1:]).removeprefix("input ").replace("input should be", "should be")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    return f'"{"".join(map(_escaped, str(value)))}"'


def _escaped(character: str) -> str:
    plain = character >= " " and character != "\x7f"
    return _ESCAPES.get(character) or (character if plain else f"\\u{ord(character):04x}")


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
