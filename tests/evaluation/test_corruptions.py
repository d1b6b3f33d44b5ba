"""Corruptions: shape, range and seed; each against its definition."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from rarefy.errors import InputError
from rarefy.evaluation.corruptions import CORRUPTIONS, SMALL, corrupt, fits


@pytest.mark.parametrize("name", list(CORRUPTIONS))
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 3, 33, 21), (2, 1, 16, 16), (1, 3, 72, 64)])
def test_corruptions_keep_shape_and_range_and_follow_the_seed(name: str, shape: tuple[int, ...]) -> None:
    if not fits(name, shape[1]):
        with pytest.raises(InputError, match="channels"):
            corrupt(torch.rand(shape), name, 1)
        return
    images = torch.rand(shape)
    before = images.clone()
    for severity in range(1, 6):
        done = corrupt(images, name, severity, 7)
        assert done.shape == images.shape and done.dtype == images.dtype
        assert float(done.min()) >= 0 and float(done.max()) <= 1
        assert torch.equal(done, corrupt(images, name, severity, torch.Generator().manual_seed(7)))
    assert not torch.equal(done, images)
    assert torch.equal(images, before)
    whole = corrupt((images * 255).to(torch.uint8), name, 3, 7)
    assert whole.dtype == torch.uint8


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_the_strongest_changes_more_than_the_weakest(name: str) -> None:
    image = torch.from_numpy(np.asarray(picture(1, 96, 96)).copy()).permute(2, 0, 1).unsqueeze(0) / 255
    weak, strong = (float((corrupt(image, name, severity) - image).abs().mean()) for severity in (1, 5))
    assert strong > weak > 0


def test_noise_has_the_stated_moments() -> None:
    images = torch.full((4, 3, SMALL, SMALL), 0.5)
    count = images.numel()
    normal = corrupt(images, "gaussian_noise", 1) - images
    assert abs(float(normal.mean())) < 5 * 0.08 / count**0.5
    assert abs(float(normal.std()) - 0.08) < 5 * 0.08 / (2 * count) ** 0.5
    shot = corrupt(images, "shot_noise", 1)  # Poisson(30)/60: mean 0.5, variance 30/3600
    assert abs(float(shot.mean()) - 0.5) < 5 * (30 / 3600 / count) ** 0.5
    impulse = corrupt(images, "impulse_noise", 3)
    for value in (0.0, 1.0):
        assert abs(float((impulse == value).double().mean()) - 0.045) < 5 * (0.045 * 0.955 / count) ** 0.5


def test_blur_keeps_constants_and_is_the_gaussian() -> None:
    assert torch.allclose(corrupt(torch.full((1, 3, 20, 20), 0.3), "gaussian_blur", 5), torch.tensor(0.3), atol=1e-6)
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    blurred = corrupt(point, "gaussian_blur", 5)[0, 0]  # sigma 1
    weights = torch.exp(-0.5 * torch.arange(-4, 5.0) ** 2)
    weights /= weights.sum()
    assert torch.allclose(blurred[6:15, 6:15], weights[:, None] * weights[None, :], atol=1e-6)


def test_brightness_and_saturation_equal_those_of_hsv() -> None:
    import colorsys

    pixels = torch.rand(64, 3)
    pixels[0] = 0
    pixels[1] = 0.4
    images = pixels.T.reshape(1, 3, 8, 8)
    brighter = [
        colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1))
        for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in pixels.tolist())
    ]
    assert torch.allclose(corrupt(images, "brightness", 5), torch.tensor(brighter).T.reshape(1, 3, 8, 8), atol=1e-5)
    stronger = [
        colorsys.hsv_to_rgb(h, min(s * 2.5 + 0.2, 1), v)
        for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in pixels.tolist())
    ]
    assert torch.allclose(corrupt(images, "saturate", 5), torch.tensor(stronger).T.reshape(1, 3, 8, 8), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "severity", "quality"), [((32, 32), 1, 80), ((32, 32), 5, 40), ((80, 64), 3, 15), ((29, 27), 5, 40)]
)
def test_jpeg_is_what_a_jpeg_library_makes(size: tuple[int, int], severity: int, quality: int) -> None:
    image = picture(5, *size)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    expected = np.asarray(Image.open(buffer)).astype(np.float64)
    images = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0)
    ours = corrupt(images, "jpeg", severity)[0].permute(1, 2, 0).numpy().astype(np.float64)
    # the library rounds in between (colour conversion, transform) and fills partial blocks its own way:
    # within two levels on average
    assert np.abs(ours - expected).mean() < 2
    assert np.abs(np.asarray(image) - expected).mean() > 0


def test_corruption_requests_that_make_no_sense() -> None:
    for name, severity, shape, message in (
        ("frost", 1, (1, 3, 8, 8), "unknown name 'frost'"),
        ("fog", 6, (1, 3, 8, 8), "severity 6"),
        ("fog", 1, (3, 8, 8), "shape"),
    ):
        with pytest.raises(InputError, match=message):
            corrupt(torch.rand(shape), name, severity)
