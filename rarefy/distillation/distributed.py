"""Training in several processes (``torchrun``): they end together, and batch norm is that of the whole batch.

Every process reads the whole batch from the task, and takes its share of it. Mean and variance of a batch norm are
those of the whole batch, over all processes, as one process with all of it would have (unless ``sync_norm="no"``):

    m = Σ_p Σ x / n,  v = Σ_p Σ (x - m)² / n        n: images and places of all processes

Two sums a layer are exchanged, forwards, and their gradients backwards (the gradient of a sum over processes is the sum
of theirs; DDP then takes the mean of the weights' gradients). Two passes, because E x² - m² loses digits.
``torch.nn.SyncBatchNorm`` is a module and for GPUs alone; this is a node of the graph. Given up: the time of the
exchange.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from rarefy.errors import WorkerLost
from rarefy.graph.nodes import argument
from rarefy.tasks.metric import Outputs

aten = torch.ops.aten


def accelerator_of(device: torch.device | str | None, logits: bool) -> Accelerator:
    """What knows of torchrun. A run of one process uses it for nothing else, and leaves its global state alone.

    device: where to compute; None: on the GPU, if there is one.
    logits: every parameter has a share in the loss, so none is waited for in vain.
    """
    on_cpu = torch.device(device).type == "cpu" if device is not None else not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not logits)
    there = _grouped()
    accelerator = Accelerator(cpu=on_cpu and several, kwargs_handlers=[ddp])
    if not there and _grouped() and torch.distributed.get_backend() == "gloo":
        atexit.register(_end_group)
    return accelerator


def _end_group() -> None:
    """Gloo's threads let go of tensors after the call that waited for them has gone on.

    One that does so while the interpreter ends aborts the process.
    """
    gc.collect()  # what trained with the group holds it
    if _grouped():
        torch.distributed.destroy_process_group()


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def all_or_none(accelerator: Accelerator, checkpoint: str | Path | None) -> Iterator[None]:
    """Where one of several processes ends, the others' next exchange fails, or torchrun ends them: a line says so."""
    if accelerator.num_processes == 1:
        yield
        return
    again = (
        f"start it again the same way, and it goes on from {checkpoint}"
        if checkpoint is not None
        else "pass checkpoint= to lose less"
    )
    lost = WorkerLost(
        f"process {accelerator.process_index} of {accelerator.num_processes}: another one ended, so this one does too; "
        f"{again}"
    )

    def told_to_end(*_: object) -> None:
        raise lost

    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, told_to_end) if mine else None
    try:
        yield
    except RuntimeError as error:
        if not re.search("gloo|nccl|Connection (reset|closed)|peer", str(error), re.IGNORECASE):
            raise
        raise lost from error
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def synchronised(graph: fx.GraphModule) -> fx.GraphModule:
    """``graph``, changed in place, whose batch norms in training look at the batches of all processes."""
    for node in graph.graph.nodes:
        if node.target is aten.batch_norm.default and not isinstance(argument(node, "training"), bool):
            node.target = batch_norm
    graph.recompile()
    return graph


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    fast: bool,
) -> Tensor:
    """As ``aten.batch_norm``; every process has as many images."""
    if not training:
        return torch.batch_norm(x, weight, bias, mean, variance, False, momentum, eps, fast)
    channels = [1, -1, *[1] * (x.dim() - 2)]
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1] * torch.distributed.get_world_size()
    number = x.float()
    batch_mean: Tensor = _Sum.apply(number.sum(axes)) / count
    centred = number - batch_mean.view(channels)
    batch_variance: Tensor = _Sum.apply(centred.square().sum(axes)) / count
    with torch.no_grad():
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        variance.lerp_((batch_variance * (count / max(count - 1, 1))).to(variance.dtype), momentum)
    y = centred * torch.rsqrt(batch_variance + eps).view(channels)
    y = y if weight is None else y * weight.view(channels)
    return (y if bias is None else y + bias.view(channels)).to(x.dtype)


def wrapped(objective: nn.Module, accelerator: Accelerator) -> nn.Module:
    """What exchanges gradients, where there are several processes. The teachers, which have none, are left alone."""
    if accelerator.num_processes > 1:
        tensors = [*objective.named_parameters(), *objective.named_buffers()]
        fixed = [name for name, _ in tensors if name.startswith("teachers.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, fixed)
    module: nn.Module = accelerator.prepare_model(objective, device_placement=False)
    return module


def agree(*models: nn.Module, accelerator: Accelerator) -> None:
    """Buffers become those of the first process; with ``sync_norm="no"`` running statistics are each one's own."""
    for model in models if accelerator.num_processes > 1 else ():
        for tensor in model.buffers():
            torch.distributed.broadcast(tensor, 0)


def shared_out(model: nn.Module, inputs: Tensor, accelerator: Accelerator) -> Outputs:
    """What ``model`` says of a batch, in its order; each process asks it for as large a share, and tells the others."""
    world, count = accelerator.num_processes, len(inputs)
    if world == 1:
        return model(inputs)
    rows = torch.arange(accelerator.process_index, -(-count // world) * world, world)
    outputs = model(inputs[rows.clamp(max=count - 1)])

    def whole(part: Tensor) -> Tensor:
        """(rows, ...) of this process -> (count, ...)"""
        each: Tensor = accelerator.gather(part.float() if part.is_floating_point() else part)
        return each.view(world, len(rows), *part.shape[1:]).transpose(0, 1).flatten(0, 1)[:count]

    return pytree.tree_map_only(Tensor, whole, outputs)


class _Sum(torch.autograd.Function):
    """Over the processes."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(gradient)
        return gradient
