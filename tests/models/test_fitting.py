"""What a task's images become for a model, where nobody says: from the model, the images, or the question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import picture
from torch import Tensor, nn

from rarefy.data.augmentation import Augmentation, shifted
from rarefy.data.images import ImageData
from rarefy.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from rarefy.errors import InputError
from rarefy.models.fitting import fit, fit_module, told
from rarefy.models.source import Source
from rarefy.tasks.classification import Classification


def flat(channels: int, size: int) -> nn.Module:
    """Of that size only."""
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * size * size, 2))


def pooled(channels: int) -> nn.Module:
    """Of any size."""
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def folder(root: Path, *sizes: tuple[int, int], mode: str = "L", each: int = 4) -> str:
    for label in range(2):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        for index, (width, height) in enumerate(sizes * each):
            picture(label * 90 + index, width, height, mode).save(root / f"class{label}" / f"{index}.png")
    return f"imagefolder:{root}"


def source(model: nn.Module, **options: Any) -> Source:
    return Source("mine:net", model.eval(), **options)


def shape_of(model: nn.Module, text: str, stated: dict[str, Any] | None = None, **given: Any) -> tuple[int, ...]:
    task = Classification(val=text, **given)
    return fit(source(model, **(stated or {})), task, {"val", *given}).task.data.input_shape


@pytest.mark.parametrize(
    ("model", "sizes", "mode", "expected"),
    [
        (lambda: flat(1, 28), [(28, 28)], "L", (1, 28, 28)),
        (lambda: flat(1, 28), [(28, 28)], "RGB", (1, 28, 28)),  # colour is made grey
        (lambda: flat(3, 28), [(28, 28)], "L", (3, 28, 28)),
        (lambda: pooled(1), [(28, 28)], "L", (1, 28, 28)),
        (lambda: pooled(3), [(28, 28)], "L", (3, 28, 28)),
        (lambda: pooled(1), [(30, 20)], "RGB", (1, 20, 30)),
        (lambda: flat(1, 28), [(32, 32)], "L", (1, 28, 28)),  # it takes no other size
        (lambda: flat(3, 64), [(90, 80), (70, 60)], "RGB", (3, 64, 64)),
        (lambda: pooled(3), [(300, 260), (240, 250)], "RGB", (3, 224, 224)),
    ],
)
def test_the_model_and_the_pictures_say_size_and_channels(
    tmp_path: Path,
    model: Callable[[], nn.Module],
    sizes: list[tuple[int, int]],
    mode: str,
    expected: tuple[int, int, int],
) -> None:
    text = folder(tmp_path, *sizes, mode=mode, each=1)
    assert shape_of(model(), text) == expected


def test_what_the_user_says_holds(tmp_path: Path) -> None:
    text = folder(tmp_path, (28, 28))
    assert shape_of(pooled(1), text, size=20, channels=1) == (1, 20, 20)
    given = Classification(val=text, mean=0.1, std=0.2, crop=0.5, interpolation="nearest")
    stated = source(pooled(1), preprocessing={"mean": (0.3,), "std": (0.3,), "crop": 0.9, "interpolation": "bicubic"})
    found = fit(stated, given, {"val", "mean", "std", "crop", "interpolation"})
    assert isinstance(found.task, Classification)
    assert (found.task.mean, found.task.std, found.task.crop, found.task.interpolation) == (0.1, 0.2, 0.5, "nearest")
    assert found.options == {"channels": 1}


def test_small_pictures_of_several_sizes_are_asked_for(tmp_path: Path) -> None:
    text = folder(tmp_path, (28, 28), (30, 26), each=1)
    with pytest.raises(InputError, match=r"these are of several, up to 28x28; pass --image-size|up to 30x26; pass"):
        shape_of(pooled(1), text)
    assert shape_of(pooled(1), text, size=28) == (1, 28, 28)


def test_the_maker_s_word_on_size_crop_and_normalisation(tmp_path: Path) -> None:
    text = folder(tmp_path, (300, 280), (290, 310), mode="RGB", each=1)
    stated = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "size": 96, "crop": 0.95, "interpolation": "bicubic"}
    found = fit(source(pooled(3), shape=(3, 96, 96), preprocessing=stated), Classification(val=text), {"val"})
    data = found.task.data
    assert data.input_shape == (3, 96, 96) and found.options == stated
    assert isinstance(data, ImageData)
    assert (data.preparation.crop, data.interpolation, data.normalization.mean) == (0.95, "bicubic", (0.1, 0.2, 0.3))
    line = told(found)
    assert line is not None and "images of 3x96x96 (size the model's" in line and "crop 0.95 (the model's)" in line
    assert "minus 0.1, 0.2, 0.3, over 0.4, 0.5, 0.6 (the model's); 2 classes: class0, class1" in line


def test_prepared_pictures_are_not_cropped_whatever_the_maker_does(tmp_path: Path) -> None:
    text = folder(tmp_path, (97, 97), mode="RGB", each=1)
    found = fit(source(pooled(3), shape=(3, 96, 96), preprocessing={"size": 96, "crop": 0.875}),
                Classification(val=text), {"val"})  # fmt: skip
    assert found.task.data.preparation.crop == pytest.approx(96 / 97)  # type: ignore[attr-defined]


def test_arrays_keep_their_size_and_grey_ones_are_repeated() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12), dtype=np.uint8)
    task = Classification(val=(images, np.arange(8) % 2))
    assert fit(source(pooled(3)), task, {"val"}).task.data.input_shape == (3, 12, 12)
    assert fit(source(pooled(1)), task, {"val"}).task.data.input_shape == (1, 12, 12)
    stated = source(pooled(3), shape=(3, 64, 64), preprocessing={"size": 64})
    assert fit(stated, task, {"val"}).task.data.input_shape == (3, 12, 12)


def test_a_module_in_python_gets_the_same_and_is_left_as_it_was(tmp_path: Path) -> None:
    text, model = folder(tmp_path, (28, 28)), pooled(1).train()
    assert fit_module(model, Classification(val=text)).data.input_shape == (1, 28, 28)
    assert fit_module(model, Classification(val=text, size=16)).data.input_shape == (1, 16, 16)
    assert model.training and all(module.training for module in model.modules())


# ------------------------------------------------------------------ normalisation


def trained(mean: float, std: float, images: Tensor, labels: Tensor) -> nn.Module:
    """A linear model of one feature that knows how bright its classes are, normalised so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = (images.float() / 255 - mean) / std
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def bright() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    labels = np.arange(80) % 4
    images = (labels * 50 + 40)[:, None, None] + random.integers(-15, 15, (80, 6, 6))
    return torch.from_numpy(images.astype(np.uint8)).unsqueeze(1), torch.from_numpy(labels)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (0.1307, 0.3081), (0.0, 1 / 255)])
def test_trained_weights_say_how_images_were_normalised(mean: float, std: float, bright: tuple[Tensor, Tensor]) -> None:
    images, labels = bright
    task = Classification(train=(images, labels), val=(images, labels))
    found = fit(source(trained(mean, std, images, labels), weights="w.pth"), task, {"train", "val"})
    assert found.task.data.normalization.mean == pytest.approx((mean,))  # type: ignore[attr-defined]
    assert found.task.data.normalization.std == pytest.approx((std,))  # type: ignore[attr-defined]
    assert "it fits the model best, on 80 images" in str(told(found))


def test_weights_that_know_nothing_and_images_without_labels_say_nothing(bright: tuple[Tensor, Tensor]) -> None:
    images, labels = bright
    torch.manual_seed(0)
    for model, data in (
        (pooled(1), (images, labels)),  # not trained
        (trained(0.0, 1.0, images, labels), (images, None)),
    ):
        found = fit(source(model, weights="w.pth"), Classification(val=data), {"val"})
        assert "mean" not in found.options
    plain = fit(source(trained(0.0, 1.0, images, labels)), Classification(val=(images, labels)), {"val"})
    assert "mean" not in plain.options  # no weights of a file


CIFAR = (0.4914, 0.4822, 0.4465)


@pytest.fixture(scope="module")
def noisy() -> tuple[Tensor, Tensor]:
    """Three pictures under noise, which a network learns by heart."""
    random = np.random.default_rng(0)
    labels = np.arange(180) % 3
    images = random.integers(0, 255, (3, 3, 12, 12))[labels] * 0.25 + random.integers(0, 255, (180, 3, 12, 12)) * 0.75
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


def convolutional(mean: Any, std: Any, data: tuple[Tensor, Tensor], norm: bool, vary: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    optimizer, draw = torch.optim.Adam(model.parameters(), 0.01), torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (mean, std))
    for _ in range(12):
        for chosen in torch.randperm(180, generator=draw).split(30):
            images = data[0][chosen].float() / 255
            images = shifted(images, Augmentation(cropped=True, flip=True), draw) if vary else images
            loss = nn.functional.cross_entropy(model((images - mean) / std), data[1][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("vary", [False, True])
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3), (CIFAR, (0.247, 0.2435, 0.2616)),
        (CIFAR, (0.2023, 0.1994, 0.201)),
    ],
)  # fmt: skip
def test_batch_norm_tells_apart_what_the_loss_does_not(
    mean: tuple[float, ...], std: tuple[float, ...], vary: bool, noisy: tuple[Tensor, Tensor]
) -> None:
    model = convolutional(mean, std, noisy, norm=True, vary=vary)
    found = fit(source(model, weights="w.pth"), Classification(train=noisy, val=noisy), {"train", "val"})
    assert (found.options["mean"], found.options["std"]) == (mean, std)
    assert "on 180 images, its batch norms say so" in found.why["mean"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batch_norm_that_saw_other_images_does_not_tell_but_the_loss(noisy: tuple[Tensor, Tensor]) -> None:
    model = convolutional((0.5,) * 3, (0.5,) * 3, noisy, norm=True)
    first = model.get_submodule("1")
    assert isinstance(first, nn.BatchNorm2d) and first.running_var is not None
    with torch.no_grad():  # the same function, as of a network whose statistics were frozen
        first.weight.mul_(3)
        first.running_var.add_(first.eps).mul_(9).sub_(first.eps)
    found = fit(source(model, weights="w.pth"), Classification(val=noisy), {"val"})
    assert found.options["mean"] == (0.5,) * 3
    assert "by its loss" in found.why["mean"]


def test_what_the_loss_can_not_tell_apart_is_told(bright: tuple[Tensor, Tensor]) -> None:
    class Blind(nn.Module):
        """Its answers hang on which pixel is brighter, which no normalisation changes."""

        def forward(self, x: Tensor) -> Tensor:
            return 9 * torch.stack([x[:, 0, 0, 0] > x[:, 0, 0, 1], x[:, 0, 0, 0] <= x[:, 0, 0, 1]], 1).float()

    images, _ = bright
    labels = (images[:, 0, 0, 0] <= images[:, 0, 0, 1]).long()
    found = fit(source(Blind(), weights="w.pth"), Classification(val=(images, labels)), {"val"})
    assert found.options["mean"] == (0.5,)  # the usual one
    assert "none and MNIST's" in found.why["mean"] and "pass --mean and --std if you know them" in found.why["mean"]


def test_what_was_said_of_normalisation_is_not_tried(bright: tuple[Tensor, Tensor]) -> None:
    images, labels = bright
    task = Classification(val=(images, labels), mean=0.3, std=0.3)
    assert fit(source(trained(0.0, 1.0, images, labels), weights="w"), task, {"val", "mean", "std"}).options == {}
