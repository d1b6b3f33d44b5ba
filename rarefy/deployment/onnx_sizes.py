"""The sizes of every value of an ONNX file, found without running it and in bounded memory.

ONNX's own ``infer_shapes(data_prop=True)`` writes down each element of whatever is of one axis, so that one ``Range``
or ``Expand`` takes gigabytes. Here each operator's sizes are asked of ONNX alone, and the few numbers that sizes are
read from (``Shape``, ``Gather``, ``Concat``...) are calculated by its reference, for values of at most ``LARGE``
elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.deployment.onnx.writer import CONTRIB
from rarefy.errors import FormatError, first_line
from rarefy.system.dependencies import needs

Foreign = Any  # a message of protobuf's
Array = NDArray[np.generic]

LARGE = 4096  # elements of a value that no size is read from
CALCULATED = frozenset(
    "Add Cast Ceil Concat Div Equal Expand Floor Gather Greater Identity Less Max Min Mod Mul Neg Range ReduceMax "
    "ReduceMin ReduceProd ReduceSum Reshape Slice Squeeze Sub Transpose Unsqueeze Where".split()
)


def sizes_of(library: ModuleType, model: Foreign, samples: int, where: str) -> dict[str, tuple[int | None, ...]]:
    """Of every value of the file for so many samples; None for a size that only running it would tell.

    library: onnx. Raises FormatError where the file contradicts itself.
    """
    types, values = _given(library, model, samples)
    reference = needs("onnx.reference").ReferenceEvaluator
    versions = {one.domain: one.version for one in model.opset_import}
    for node in model.graph.node:
        try:
            made = _types_made(library, model, node, types, values, versions)
            types.update(made)
            for name, array in _calculated(reference, node, made, types, values, versions).items():
                values[name] = library.numpy_helper.from_array(array, name)
        except Exception as error:
            raise FormatError(
                f"{where}: contradicts itself at {node.name[:80]!r} ({first_line(error, 200)}); export it again "
                "[onnx-sizes]"
            ) from error
    return {name: sizes for name, one in types.items() if (sizes := shape_of(one)) is not None}


def shape_of(kind: Foreign) -> tuple[int | None, ...] | None:
    """kind: a TypeProto. None where not even the count of axes is known."""
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(one.dim_value if one.HasField("dim_value") else None for one in tensor.shape.dim)


def _given(library: ModuleType, model: Foreign, samples: int) -> tuple[dict[str, Foreign], dict[str, Foreign]]:
    """(types of inputs and constants, the small constants)."""
    types, values = {}, {}
    for one in model.graph.initializer:
        types[one.name] = library.helper.make_tensor_type_proto(one.data_type, list(one.dims))
        if math.prod(one.dims) <= LARGE:
            values[one.name] = one
    for one in model.graph.input:
        if one.name not in types:
            kind = types[one.name] = type(one.type).FromString(one.type.SerializeToString())
            for place, size in enumerate(kind.tensor_type.shape.dim):
                if not size.HasField("dim_value"):
                    size.dim_value = samples if place == 0 else 1
    return types, values


def _types_made(
    library: ModuleType,
    model: Foreign,
    node: Foreign,
    types: Mapping[str, Foreign],
    values: Mapping[str, Foreign],
    versions: Mapping[str, int],
) -> dict[str, Foreign]:
    if node.domain == CONTRIB:  # of which ONNX knows no sizes: they keep their input's
        return {node.output[0]: types[node.input[0]]}
    domain = "" if node.domain == "ai.onnx" else node.domain
    schema = library.defs.get_schema(node.op_type, versions.get(domain, versions.get("ai.onnx", 1)), domain)
    taken = {name: types[name] for name in node.input if name}
    known = {name: values[name] for name in taken if name in values}
    made: dict[str, Foreign] = library.shape_inference.infer_node_outputs(
        schema, node, taken, known, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    return made


def _calculated(
    reference: Foreign,
    node: Foreign,
    made: Mapping[str, Foreign],
    types: Mapping[str, Foreign],
    values: Mapping[str, Foreign],
    versions: Mapping[str, int],
) -> dict[str, Array]:
    """The numbers of a small value made of small ones; of whole numbers and truths alone, of which sizes are made."""
    if len(node.output) != 1 or node.output[0] not in made:
        return {}
    name = node.output[0]
    shape = shape_of(made[name])
    if shape is None or None in shape or math.prod(size or 0 for size in shape) > LARGE:
        return {}
    if node.op_type == "Shape":
        sizes = shape_of(types[node.input[0]]) or (None,)
        options = {one.name: one.i for one in node.attribute}
        sizes = sizes[options.get("start", 0) : options.get("end", len(sizes))]
        return {} if None in sizes else {name: np.array(sizes, np.int64)}
    if node.op_type not in CALCULATED or any(one not in values for one in node.input if one):
        return {}
    helper = needs("onnx.numpy_helper")
    inputs = {one: helper.to_array(values[one]) for one in node.input if one}
    if any(one.dtype.kind not in "iub" for one in inputs.values()):
        return {}
    (found,) = reference(node, opsets=dict(versions)).run(None, inputs)
    return {name: np.asarray(found)} if np.asarray(found).dtype.kind in "iub" else {}
