"""Pictures and folders of pictures, and what a task yields, for the tests of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rarefy.tasks.classification import Classification


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth random colours, so that JPEG and resizing change little."""
    draw = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 4) -> Path:
    for label, name in enumerate(classes):
        (root / name / "deep").mkdir(parents=True)
        for index in range(each):
            where = root / name / ("deep" if index == 0 else ".")
            picture(100 * label + index, 40 + index, 50 - index).save(
                where / f"{index}.{'png' if index % 2 else 'jpg'}"
            )
    return root


def stacked(task: Classification, split: str = "val", **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*task.batches(split, options.pop("batch_size", 3), **options), strict=True)
    return torch.cat(inputs), torch.cat(targets)
