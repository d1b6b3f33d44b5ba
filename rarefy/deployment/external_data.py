"""Does an ONNX file hold all of its weights? Those of others beside it are files that no manifest lists."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from rarefy.errors import FormatError

DEEPEST = 32  # graphs within graphs


def check(library: ModuleType, model: Any, where: str) -> None:
    """Raises FormatError for a model whose weights lie elsewhere. library: onnx. where: for messages."""
    outside = library.TensorProto.EXTERNAL
    for tensor in _tensors([model.graph, *model.functions], where):
        if tensor.data_location == outside or tensor.external_data:
            raise FormatError(
                f"{where}: the weights {tensor.name[:80]!r} lie in another file, which nothing vouches for; export the "
                "model again [onnx-external]"
            )


def _tensors(graphs: list[Any], where: str, depth: int = 0) -> Iterator[Any]:
    """Every tensor of graphs and functions, and of what lies within their nodes."""
    if depth > DEEPEST:
        raise FormatError(f"{where}: holds graphs more than {DEEPEST} deep [onnx-form]")
    for graph in graphs:
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                yield from _tensors([attribute.g, *attribute.graphs], where, depth + 1)
