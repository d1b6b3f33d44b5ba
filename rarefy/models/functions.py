"""Models of the user's own code: ``package.module:name``.

The name is that of a function that returns a module, of a module class, or of a module.
"""

from __future__ import annotations

import re

from torch import nn

from rarefy.errors import InputError, first_line
from rarefy.models.source import FORMS, Request, Source, input_shape_of, near, parameters_of
from rarefy.system.dependencies import own_module


def function(request: Request) -> Source | None:
    """``package.module:name?option=value``."""
    text, classes = request.text, request.classes
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(\?.*)?", text):
        return None
    name, options = request.name_and_options()
    target = imported(request.prefix, name, text)
    if isinstance(target, nn.Module):
        if options or classes is not None:
            raise InputError(f"{text}: is a module already made; leave out --classes and the options after '?'")
        return Source(text, target, input_shape_of(target))
    if not callable(target):
        raise InputError(f"{text}: is a {type(target).__name__}; name a function that returns a torch.nn.Module")
    if classes is not None:
        parameters = parameters_of(target)
        taken = next((key for key in ("num_classes", "classes", "n_classes") if key in parameters), None)
        if taken is None:
            raise InputError(
                f"{text}: takes no num_classes, so --classes can't be passed on; leave it out, or add that parameter"
            )
        options[taken] = classes
    model = request.make(lambda: target(**options))
    if not isinstance(model, nn.Module):
        raise InputError(f"{text}: returned a {type(model).__name__}; it must return a torch.nn.Module")
    return Source(text, model, input_shape_of(model))


def imported(module: str, name: str, text: str) -> object:
    """What ``package.module:name`` names; the working directory is searched too."""
    try:
        home = own_module(module)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        meant = f"{module[:-3].replace('/', '.')}:{name}" if module.endswith(".py") else ""
        way = f"a module goes without its ending, {meant}" if meant else f"give {FORMS}"
        raise InputError(f"{text}: no module {error.name!r} here or installed; {way}") from error
    except Exception as error:
        raise InputError(
            f"{text}: importing {module} failed: {type(error).__name__}: {first_line(error)}; mend that module"
        ) from error
    try:
        return getattr(home, name)
    except AttributeError as error:
        public = [key for key in vars(home) if not key.startswith("_")]
        raise InputError(f"{text}: {module} has no {name!r}{near(name, public)}") from error
