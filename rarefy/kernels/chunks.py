"""A kernel on a few images at a time, on a CPU.

What lies between its steps then stays in the cache, and is not mapped anew at each use.

ResNet-56 in integers, 200 images at once, one thread: 4.1 ms an image in place of 12.4, for the same codes; in float
3.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PIECE = 2**18  # numbers a thread works on at a time


def by_images(compute: Callable[..., Tensor], read: Sequence[Tensor], numbers: int) -> Tensor:
    """``compute(*read)``.

    read: tensors of as many images, along their first axis. numbers: that an image takes on the way.
    """
    first = read[0]
    if not first.dim() or not runs_on_cpu(first):
        return compute(*read)
    most = max(1, PIECE * torch.get_num_threads() // max(1, numbers))
    if len(first) <= most:
        return compute(*read)
    return torch.cat([compute(*parts) for parts in zip(*(one.split(most) for one in read), strict=True)])


def runs_on_cpu(x: Tensor) -> bool:
    """Now, and not in a trace."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor) and not torch.compiler.is_compiling()
