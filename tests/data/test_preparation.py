"""What size, channels and crop images get where nobody says: of pictures that are prepared, their own."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import picture, stacked
from PIL import Image

from rarefy.data.items import channels_first
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification


def folder(root: Path, *sizes: tuple[int, int], mode: str = "RGB", each: int = 2) -> str:
    for label in range(2):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        for index, (width, height) in enumerate(sizes * each):
            picture(label * 90 + index, width, height, mode).save(root / str(label) / f"{index}.png")
    return f"imagefolder:{root}"


def read(task: Classification) -> tuple[tuple[int, int, int], float]:
    return task.data.preparation.shape, task.data.preparation.crop


@pytest.mark.parametrize(
    ("sizes", "options", "shape", "crop"),
    [
        ([(28, 28)], {}, (3, 28, 28), 1.0),
        ([(28, 28)], {"channels": 1}, (1, 28, 28), 1.0),
        ([(30, 20)], {}, (3, 20, 30), 1.0),
        ([(224, 224)], {}, (3, 224, 224), 1.0),
        ([(32, 32), (40, 40)], {}, (3, 224, 224), 0.875),
        ([(300, 300)], {}, (3, 224, 224), 0.875),
        ([(227, 227)], {"size": 224}, (3, 224, 224), 224 / 227),
        ([(227, 240)], {"size": 224}, (3, 224, 224), 224 / 227),
        ([(224, 224)], {"size": 224}, (3, 224, 224), 1.0),
        ([(28, 28)], {"size": 224}, (3, 224, 224), 1.0),
        ([(256, 256)], {"size": 224}, (3, 224, 224), 0.875),
        ([(32, 32), (40, 40)], {"size": 32}, (3, 32, 32), 0.875),
        ([(227, 227)], {"size": 224, "crop": 0.875}, (3, 224, 224), 0.875),
        ([(28, 28)], {"crop": 0.9}, (3, 28, 28), 0.9),
    ],
)
def test_pictures_of_one_size_are_taken_as_they_are(
    tmp_path: Path, sizes: list[tuple[int, int]], options: dict[str, Any], shape: tuple[int, int, int], crop: float
) -> None:
    task = Classification(val=folder(tmp_path, *sizes), **options)
    assert read(task) == (shape, pytest.approx(crop))
    assert stacked(task)[0].shape[1:] == shape
    told = task.describe()
    assert (told["input"], told["crop"]) == (list(shape), pytest.approx(crop))


@pytest.mark.parametrize("size", [(28, 28), (30, 20), (1, 9)])
def test_their_own_size_means_their_own_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    task = Classification(val=folder(tmp_path, size), mean=0.0, std=1.0)
    files = sorted(tmp_path.rglob("*.png"))
    plain = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    assert torch.equal((stacked(task)[0] * 255).round().to(torch.uint8), plain)


def test_a_crop_that_fits_enlarges_nothing(tmp_path: Path) -> None:
    """227x227 to 224x224 is the centre, pixel by pixel."""
    task = Classification(val=folder(tmp_path, (37, 37)), size=34, mean=0.0, std=1.0)
    files = sorted(tmp_path.rglob("*.png"))
    plain = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    assert torch.equal((stacked(task)[0] * 255).round().to(torch.uint8), plain[:, :, 2:36, 2:36])


@pytest.mark.parametrize(
    ("mode", "grey"),
    [("L", True), ("1", True), ("LA", True), ("I;16", True), ("RGB", False), ("P", False), ("RGBA", False)],
)
def test_grey_pictures_are_known_by_their_headers(tmp_path: Path, mode: str, grey: bool) -> None:
    (tmp_path / "a").mkdir()
    image = Image.fromarray(np.zeros((8, 8), np.uint16)) if mode == "I;16" else picture(0, 8, 8, mode)
    image.save(tmp_path / "a" / "0.png")
    assert Classification(val=f"imagefolder:{tmp_path}").data.preparation.grey is grey


def test_pictures_in_shards_and_in_lists_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index in range(3):
            content = io.BytesIO()
            picture(index, 20, 20).save(content, "PNG")
            for name, data in ((f"{index}.png", content.getvalue()), (f"{index}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert read(Classification(val=f"tar:{tmp_path / 'a.tar'}")) == ((3, 20, 20), 1.0)
    folder(tmp_path / "data", (18, 18))
    paths = [(path, 0) for path in sorted((tmp_path / "data").rglob("*.png"))]
    assert read(Classification(val=paths)) == ((3, 18, 18), 1.0)
    assert read(Classification(val=[(picture(seed, 18, 18), 0) for seed in range(3)])) == ((3, 18, 18), 1.0)


def test_a_broken_picture_does_not_hide_the_others_size(tmp_path: Path) -> None:
    text = folder(tmp_path, (28, 28))
    (tmp_path / "0" / "0.png").write_bytes(b"no picture")
    assert read(Classification(val=text, strict=False)) == ((3, 28, 28), 1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 28, 28, 6), (5, 6, 28, 28)), ((5, 6, 28, 28), (5, 6, 28, 28)), ((5, 48, 64, 6), (5, 6, 48, 64)),
        ((5, 6, 48, 64), (5, 6, 48, 64)), ((5, 10, 8, 9), (5, 10, 8, 9)), ((5, 3, 3, 3), (5, 3, 3, 3)),
        ((5, 4, 4, 1), (5, 1, 4, 4)), ((5, 2, 32, 32), (5, 2, 32, 32)), ((5, 32, 32, 2), (5, 2, 32, 32)),
        ((5, 3, 480, 4), (5, 3, 480, 4)), ((5, 7, 9), (5, 1, 7, 9)), ((5, 13, 64, 64), (5, 13, 64, 64)),
    ],
)  # fmt: skip
def test_channels_are_found_where_they_stand(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    numbers = torch.arange(int(np.prod(shape))).view(shape)
    found = channels_first(numbers)
    assert tuple(found.shape) == expected and found.data_ptr() == numbers.data_ptr()
    arrays = Classification(val=(numbers.remainder(256).to(torch.uint8), torch.zeros(5, dtype=torch.int64)))
    assert arrays.input_shape == expected[1:]
    items = Classification(val=[(one, 0) for one in numbers.remainder(256).to(torch.uint8)])
    assert items.input_shape == expected[1:] and stacked(items)[0].shape == expected


def test_arrays_of_a_dataset_may_have_channels_first_or_last() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    last = stacked(Classification(val=[(image, 0) for image in images]))[0]
    first = stacked(Classification(val=[(image.transpose(2, 0, 1), 0) for image in images]))[0]
    assert torch.equal(last, first) and last.shape == (4, 3, 28, 28)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.full((4, 1, 8, 8), 40000, np.uint16), r"of 16 bits: images / 65535"),
        (np.full((4, 8, 8), 200.0), r"divide by 255"),
        (np.full((4, 8, 8), -0.3), r"mean=0, std=1 if they are normalised already"),
    ],
)
def test_numbers_out_of_range_get_the_way_out(images: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=said):
        stacked(Classification(val=(images, np.arange(4))))


def test_orientation_in_a_file_is_left_alone_as_torchvision_does(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "a").mkdir()
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    picture(0, 20, 12).save(tmp_path / "a" / "0.jpg", exif=tags, quality=95)
    ours = (stacked(Classification(val=f"imagefolder:{tmp_path}", mean=0.0, std=1.0))[0][0] * 255).round()
    theirs = torch.from_numpy(np.array(datasets.ImageFolder(str(tmp_path))[0][0])).permute(2, 0, 1)
    assert torch.equal(ours, theirs.float())
