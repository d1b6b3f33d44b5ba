"""The grid of whatever makes codes, read off its node."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from rarefy import kernels
from rarefy.kernels import makes_codes, qparams, value_of

OPERATORS = torch.ops.rarefy
MAKERS = ["quantize", "linear_codes", "add", "mul", "mean", "avg_pool2d"]
MAKERS += [f"conv{axes}d_codes" for axes in (1, 2, 3)]


def node_of(name: str, keywords: bool) -> fx.Node:
    """A node of the operator: each tensor a ``get_attr`` of its argument's name, every other argument its place."""
    graph = fx.Graph(fx.GraphModule(torch.nn.Module(), fx.Graph()))
    operator = getattr(OPERATORS, name).default
    given: dict[str, object] = {}
    for place, argument in enumerate(operator._schema.arguments):
        tensor = isinstance(argument.type, torch.TensorType)
        given[argument.name] = (
            graph.create_node("get_attr", f"quantization.relu_{place}.{argument.name}") if tensor else place
        )
    late = {key: given.pop(key) for key in ("qmin", "qmax", "dtype") if keywords and key in given}
    return graph.call_function(
        operator, tuple(given.values()) if not late else tuple(given.values())[: min(len(given), len(given))], late
    )


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_the_grid_is_the_one_that_the_result_is_on(name: str, keywords: bool) -> None:
    """Not that of an operand, whose scale and zero point an operator on codes reads as well."""
    node = node_of(name, keywords and name != "quantize")
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    found = qparams(node)
    assert str(found.scale.target) == f"quantization.relu_{names.index('scale')}.scale"
    assert str(found.zero_point.target).endswith(".zero_point")
    assert (found.qmin, found.qmax) == (names.index("qmin"), names.index("qmax"))
    assert found.value == f"relu_{names.index('scale')}"


def test_every_operator_makes_codes_or_is_refused() -> None:
    for operator in kernels.OPERATORS:
        node = node_of(operator._opname, False)
        assert makes_codes(node) == (operator._opname in MAKERS)
        if not makes_codes(node):
            with pytest.raises(ValueError, match="makes no codes"):
                qparams(node)


def test_a_value_is_named_by_its_scale() -> None:
    assert value_of("quantization.conv2d_3.scale") == "conv2d_3"
