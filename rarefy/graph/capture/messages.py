"""What a trace tells: why a model can't be captured, and what of it a graph leaves out."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rarefy.errors import first_line

_GUARD = re.compile(r"^eval Eq\(.*\) \[guard added\] \((.+?):(\d+) in ")
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"


def explain(model: nn.Module, error: Exception, trace: Callable[[], object]) -> str:
    """What, the user's line, and the way out, in one line. trace: makes the same error again."""
    kind = type(model).__name__
    if "specialized it to be a constant" in str(error):
        return (
            f"{kind} can't be captured: forward makes a number of its batch{_place(trace)}, by int(), a loop over the "
            "images, a comparison or a fixed view; write x.shape[0] or -1 in its place, or compress the part that "
            "does without with core='name.of.submodule'"
        )
    scripts = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripts:
        return (
            f"{kind} can't be captured: {scripts[0]} is a program of TorchScript ({first_line(error, 100)}); "
            "put the nn.Module that it was made of in its place"
        )
    inside = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inside)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return (
        f"{kind} can't be captured{where}: {first_line(error, 300)}; "
        "change that line to tensor operations, or compress the part that is tensors only with core='name.of.submodule'"
    )


def _place(trace: Callable[[], object]) -> str:
    """Where a size became a number, which the trace says to its log alone."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(_SYMBOLS)
    passed_on, log.propagate = log.propagate, False
    log.isEnabledFor = lambda level: True  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        trace()
    except Exception:  # the one that is being told of
        pass
    finally:
        log.removeHandler(handler)
        log.propagate = passed_on
        del log.isEnabledFor
    places = [found for line in seen if (found := _GUARD.match(line)) and not _is_of_torch(found[1])]
    return f" at {os.path.basename(places[-1][1])}:{places[-1][2]}" if places else ""


def _is_of_torch(file: str) -> bool:
    return os.path.exists(os.path.join(os.path.dirname(torch.__file__), file))


def tell_of_written(model: nn.Module, names: Sequence[str]) -> None:
    """A graph keeps no state: what forward writes to the model's buffers is left out."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logging.getLogger("rarefy").warning(
            "%s writes to its buffers in forward (%s%s), also in eval(); the graph reads what they hold now, and "
            "writes nothing to them",
            type(model).__name__,
            ", ".join(names[:3]),
            more,
        )
