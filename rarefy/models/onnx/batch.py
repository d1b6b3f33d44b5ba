"""A batch of any size for a file that was written for one.

Exporters write the batch of the example into the file: into the inputs' sizes, into Reshapes (``[1, 80, 1600]``), into
constants that are joined to what has a batch. The nodes are run on tensors without numbers for the file's own batch and
for one three times as large, side by side; where a Reshape's sizes hold the batch, that one follows its input
(``Step.free``), and a constant that is concatenated is repeated. Which axis is the batch's is seen by its size: it is
the one that differs. At the end a batch of two is computed, and must be what each image gives alone: a file
that mixes its images is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rarefy.errors import CaptureError, InputError, first_line
from rarefy.graph.nodes import Value
from rarefy.models.onnx.arithmetic import TYPES
from rarefy.models.onnx.network import Network, computed
from rarefy.models.onnx.step import Step, numbers
from rarefy.system.quiet import quiet

WIDER = 3
TOLERANCE = 1e-3  # of the largest number: another order of adding up
LARGEST = 2**33  # bytes of one tensor: a damaged or a hostile file
MOST_POOLED = 10**10  # numbers that windows of pooling read, an image


def settle(network: Network, specs: Sequence[tuple[Sequence[int | None], int]]) -> None:
    """Free the batch of a network whose inputs have these sizes and ONNX types.

    Where other sizes are free too, this waits for the first inputs.

    Raises CaptureError where the batch can't be freed, InputError for a node that does not run.
    """
    if any(size is None for sizes, _ in specs for size in sizes[1:]):
        network.settle = lambda given: settle(
            network, [([own[0], *seen[1:]], kind) for (own, kind), seen in zip(specs, given, strict=True)]
        )
        return
    stated = specs[0][0][0]
    if stated is not None:
        _settle(network, specs, stated)
        return
    try:
        _settle(network, specs, 2)
    except InputError:  # it says that the batch is free, and its nodes are for one image all the same
        _settle(network, specs, 1)


def _settle(network: Network, specs: Sequence[tuple[Sequence[int | None], int]], batch: int) -> None:
    for name in network.order:
        network.step(name).free = None
    with quiet("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _side_by_side(network, _examples(specs, batch), _examples(specs, batch * WIDER), batch)
    with torch.no_grad():
        _check(network, specs, batch)


def _examples(specs: Sequence[tuple[Sequence[int | None], int]], batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for sizes, kind in specs:
        shape, dtype = [batch, *(size or 1 for size in sizes[1:])], TYPES[kind]
        if dtype.is_floating_point:
            found.append(torch.rand(shape, generator=generator).to(dtype))
        else:
            found.append(torch.ones(shape, dtype=dtype))
    return found


def _side_by_side(network: Network, one: Sequence[Tensor], many: Sequence[Tensor], batch: int) -> None:
    lives: list[dict[str, Value]] = [dict(zip(network.input_names, inputs)) for inputs in (one, many)]
    compared = 0
    for name in network.order:
        step = network.step(name)
        small, large = (network.operands(step, live) for live in lives)
        try:
            found = computed(step, small)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{step.label}: does not run ({first_line(error)}); check the file with ONNX Runtime"
            ) from error
        for value in found.values():
            if isinstance(value, Tensor) and value.nbytes > LARGEST:
                raise InputError(f"{step.label}: makes a tensor of {value.nbytes / 1e9:.0f} GB; the file is damaged")
            if isinstance(value, Tensor) and step.kind in ("MaxPool", "AveragePool"):
                compared += value.numel() * abs(math.prod(step.get("kernel_shape", [])))
        if compared > MOST_POOLED * batch:
            raise InputError(
                f"{step.label}: windows of {step.get('kernel_shape', [])} read {compared / 1e9:.0f} G numbers up to "
                "here; no model needs as much, the file is damaged: export it again"
            )
        if step.kind in _FREE:
            step.free = _FREE[step.kind](step, small, large, next(iter(found.values())))
        try:
            wide = computed(step, large)
        except Exception as error:
            raise CaptureError(
                f"{step.label}: is fixed to a batch of {batch} ({first_line(error)}); "
                "export the model with a free batch axis: torch.onnx.export(..., dynamic_shapes=({0: 'batch'},))"
            ) from error
        lives[0].update(found)
        lives[1].update(wide)


def _moved(small: Value, large: Value) -> int | None:
    """The one axis whose size follows the batch."""
    if not isinstance(small, Tensor) or not isinstance(large, Tensor) or small.dim() != large.dim():
        return None
    axes = [axis for axis, (one, two) in enumerate(zip(small.shape, large.shape)) if one != two]
    return axes[0] if len(axes) == 1 else None


def _reshape(step: Step, small: Sequence[Value], large: Sequence[Value], result: Value) -> Value:
    """The size that holds the batch follows the input's."""
    axis = _moved(small[0], large[0])
    shape = small[1] if len(small) > 1 else np.array(step.get("shape", []))
    if axis is None or not isinstance(shape, np.ndarray) or not isinstance(result, Tensor):
        return None
    before = math.prod(small[0].shape[:axis])
    places = [place for place in range(result.dim()) if math.prod(result.shape[:place]) == before]
    size = small[0].shape[axis]
    places = [place for place in places if result.shape[place] % size == 0 or size % result.shape[place] == 0]
    if not places:
        return None
    place = axis if axis in places else places[0]
    sizes = numbers(shape)
    if sizes[place] == -1 or (sizes[place] == 0 and place == axis) or (len(large) > 1 and large[1] is not small[1]):
        return None  # free already
    return partial(_resized, axis=axis, place=place, had=size, gave=result.shape[place], sizes=tuple(sizes))


def _resized(
    x: Tensor, _: Value = None, *, axis: int, place: int, had: int, gave: int, sizes: tuple[int, ...]
) -> Value:
    new = list(sizes)
    new[place] = x.shape[axis] * (gave // had) if gave % had == 0 else x.shape[axis] // (had // gave)
    found = np.empty(len(new), object)
    found[:] = new
    return x, found


def _concat(step: Step, small: Sequence[Value], large: Sequence[Value], result: Value) -> Value:
    """What has the file's batch only is repeated for the others'."""
    moved = [_moved(one, two) for one, two in zip(small, large)]
    axis = next((one for one in moved if one is not None), None)
    if axis is None or None not in moved or axis == step.axis(result.dim()):
        return None
    return partial(_repeated, axis=axis, source=moved.index(axis), still=[one is None for one in moved])


def _repeated(*inputs: Value, axis: int, source: int, still: Sequence[bool]) -> Value:
    size = inputs[source].shape[axis]
    return [
        value.expand(*value.shape[:axis], size, *value.shape[axis + 1 :]) if fixed and value.shape[axis] == 1 else value
        for value, fixed in zip(inputs, still)
    ]


_FREE = {"Reshape": _reshape, "Concat": _concat}


def _check(network: Network, specs: Sequence[tuple[Sequence[int | None], int]], batch: int) -> None:
    """A batch of two must be what each image gives alone."""
    alone = [_examples(specs, batch, seed) for seed in (1, 2)]
    both = _outputs(network, [torch.cat(pair) for pair in zip(*alone)])
    singles = [_outputs(network, inputs) for inputs in alone]
    for name, one, two, joined in zip(network.output_names, *singles, both):
        axis = _moved(one, joined)
        wanted = torch.cat([one, two], axis) if axis is not None and joined.shape[axis] == 2 * one.shape[axis] else None
        if wanted is None or not torch.allclose(
            joined.double(), wanted.double(), rtol=TOLERANCE, atol=TOLERANCE * _size(wanted), equal_nan=True
        ):
            raise CaptureError(
                f"output {name!r} does not answer each image of a batch on its own (the file has one of {batch}); "
                "export the model with a free batch axis: torch.onnx.export(..., dynamic_shapes=({0: 'batch'},))"
            )


def _size(value: Tensor) -> float:
    return float(value.double().abs().nan_to_num(posinf=0).max()) if value.numel() else 0.0


def _outputs(network: Network, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = network(*inputs)
    return list(found) if isinstance(found, tuple) else [found]
