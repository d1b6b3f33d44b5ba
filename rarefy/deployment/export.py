"""export(): the file that a runtime runs, put in place only when it is whole, and compared with the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rarefy import plugins
from rarefy.deployment.runtime import Runtime
from rarefy.errors import InputError
from rarefy.graph.capture import as_graph
from rarefy.graph.nodes import example_inputs
from rarefy.system.files import replacing


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    runtime: Runtime | str = "onnxruntime",
    inputs: Tensor | Sequence[Tensor] | None = None,
    compare: bool = True,
) -> dict[str, Any]:
    """Write ``model`` for ``runtime`` to ``path``, and say how its answers differ from the model's.

    path: a file there is replaced, and stays as it was if anything fails.
    runtime: a choice of ``rarefy.runtimes``, as an object or as text.
    inputs: an example batch: needed where ``model`` is not captured yet, and what is compared on (else random numbers).
    compare: False returns an empty dictionary.

    Returns a ``rarefy.deployment.runtime.Parity``. Raises InputError for a layer the runtime can't run.
    """
    chosen: Runtime = plugins.resolve("runtimes", runtime)
    graph = as_graph(model, inputs).eval()
    if compare and len(graph.meta["inputs"]) != 1:
        raise InputError(
            f"export: a model of {len(graph.meta['inputs'])} inputs is written, but not compared; pass compare=False"
        )
    with replacing(path) as partial:
        chosen.export(graph, partial)
        if not compare:
            return {}
        given = (inputs,) if isinstance(inputs, Tensor) else inputs
        return dict(chosen.compare(graph, partial, (given or example_inputs(graph, batch=8))[0]))
