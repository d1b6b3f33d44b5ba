"""sent(): a tensor on the run's device, without the host waiting for a GPU to get there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU takes it when it gets there, and the host goes on.

    (From pageable memory a copy waits for all that the GPU has to do before.)
    """
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and tensor.device.type == "cpu"
        else tensor.to(device)
    )
