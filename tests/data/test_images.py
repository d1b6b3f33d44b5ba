"""Images: what comes out of each kind of source, exact resume, and every way the data can be wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture, stacked, write_folder
from PIL import Image

from rarefy.data import formats
from rarefy.data.augmentation import Augmentation, shifted
from rarefy.data.images import ImageData
from rarefy.data.targets import Numbers
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification


def test_digits_are_split_by_class_and_the_same_each_time() -> None:
    task = Classification(train="sklearn:digits", val="sklearn:digits")
    assert (task.classes, task.input_shape) == (10, (1, 8, 8))
    assert task.length("train") + task.length("val") == 1797
    _, targets = stacked(task, "val", batch_size=100)
    _, rest = stacked(task, "train", batch_size=100)
    per_class = torch.bincount(torch.cat([targets, rest]))
    assert torch.equal(torch.bincount(targets), (per_class / 5).round().long())
    again = Classification(val="sklearn:digits")
    assert again.fingerprint("val") == task.fingerprint("val") != task.fingerprint("train")
    images = {
        tuple(row)
        for row in (task.denormalize(stacked(task, "train", batch_size=99)[0]) * 255).round().flatten(1).int().tolist()
    }
    held = [
        tuple(row)
        for row in (task.denormalize(stacked(task, "val", batch_size=99)[0]) * 255).round().flatten(1).int().tolist()
    ]
    assert not images & set(held)


def test_uint8_arrays_are_normalised_as_torchvision_does_and_not_copied() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    task = Classification(val=(images, np.arange(7)))
    inputs, targets = stacked(task)
    plain = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    assert torch.equal(inputs, torch.stack([plain(image) for image in images]))
    assert targets.tolist() == list(range(7))
    assert task.data.source("val").images.data_ptr() == torch.from_numpy(images).data_ptr()  # type: ignore[union-attr]
    assert torch.allclose(task.normalize(task.denormalize(inputs)), inputs, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 9), (1, 8, 9)),
        ((5, 8, 9, 3), (3, 8, 9)),
        ((5, 3, 8, 9), (3, 8, 9)),
        ((5, 8, 9, 1), (1, 8, 9)),
        ((5, 10, 8, 9), (10, 8, 9)),
    ],
)
def test_layout_of_arrays_is_recognised(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    task = Classification(val=(np.zeros(shape, dtype=np.uint8), np.zeros(5, dtype=np.int64)))
    assert task.input_shape == expected
    assert stacked(task)[0].shape == (5, *expected)


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    from torchvision import transforms

    root = write_folder(tmp_path / "data")
    plain = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = datasets.ImageFolder(str(root), plain)
    task = Classification(val=f"imagefolder:{root}", size=32, crop=32 / 36)
    inputs, targets = stacked(task)
    assert targets.tolist() == expected.targets
    assert torch.equal(inputs, torch.stack([expected[index][0] for index in range(len(expected))]))
    assert task.class_names == ("cat", "dog")
    dataset = Classification(val=datasets.ImageFolder(str(root)), size=32, crop=32 / 36)
    assert torch.equal(stacked(dataset)[0], inputs) and dataset.class_names == task.class_names
    with pytest.raises(DataError, match="normalised already"):
        stacked(Classification(val=expected))
    assert torch.equal(stacked(Classification(val=expected, mean=0.0, std=1.0))[0], inputs)


def test_a_folder_with_train_and_val_is_entered_and_val_takes_the_labels_of_train(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "train", ("ant", "bee", "cow"))
    write_folder(tmp_path / "data" / "val", ("bee", "cow"), each=2)
    text = f"imagefolder:{tmp_path / 'data'}"
    task = Classification(train=text, val=text, size=16)
    assert (task.length("train"), task.length("val"), task.classes) == (12, 4, 3)
    assert stacked(task, "val")[1].tolist() == [1, 1, 2, 2]


def test_one_folder_for_both_splits_is_cut_in_two(tmp_path: Path) -> None:
    text = f"imagefolder:{write_folder(tmp_path / 'data', each=10)}"
    task = Classification(train=text, val=text, size=16)
    assert torch.bincount(stacked(task, "train")[1]).tolist() == [8, 8]
    assert torch.bincount(stacked(task, "val")[1]).tolist() == [2, 2]
    assert Classification(val=text, size=16).length("val") == 20


def test_images_without_class_folders_calibrate_and_do_not_train(tmp_path: Path) -> None:
    for index in range(5):
        picture(index, 30, 30).save(tmp_path / f"{index}.png")
    task = Classification(train=f"imagefolder:{tmp_path}", size=16)
    assert [len(batch) for batch in task.inputs("train", 4, 3)] == [3, 1]
    assert torch.cat(list(task.inputs("train", 99, 2))).shape == (5, 3, 16, 16)
    with pytest.raises(DataError, match="no labels"):
        next(task.batches("train", 2))
    with pytest.raises(DataError, match="no labels"):
        _ = task.classes
    assert "classes" not in task.describe()


def test_functions_with_and_without_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def both(split):\n    n = {'train': 6, 'val': 4}[split]\n"
        "    return np.zeros((n, 8, 8), 'uint8'), np.arange(n) % 2\n"
        "def one():\n    return np.zeros((20, 8, 8), 'uint8'), np.arange(20) % 2\n"
        "def fails():\n    raise RuntimeError('disk on fire')\n"
        "def nothing():\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = Classification(train="mine:both", val="mine:both")
    assert (task.length("train"), task.length("val")) == (6, 4)
    task = Classification(train="mine:one", val="mine:one")
    assert (task.length("train"), task.length("val")) == (16, 4)
    for name, message in (("fails", "disk on fire"), ("nothing", "NoneType"), ("absent", "imported")):
        with pytest.raises(DataError, match=message):
            Classification(val=f"mine:{name}").length("val")
    sys.modules.pop("mine")


def test_torchvision_datasets_are_read_where_they_lie(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match="nothing is downloaded"):
        Classification(val=f"torchvision:CIFAR10?root={tmp_path}").length("val")
    with pytest.raises(DataError, match="CIFAR10"):
        Classification(val=f"torchvision:CIFAR11?root={tmp_path}").length("val")
    with pytest.raises(DataError, match="options after"):
        Classification(val=f"torchvision:CIFAR10?root={tmp_path}&colour=red").length("val")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = np.random.default_rng(count).integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28)) + pixels
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (2049, count)) + bytes(range(count))
        )
    text = f"torchvision:MNIST?root={tmp_path}"
    task = Classification(train=text, val=text)
    assert (task.length("train"), task.length("val"), task.input_shape, task.classes) == (6, 4, (1, 28, 28), 10)
    assert stacked(Classification(val=f"{text}&train=true"))[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_datasets_of_pil_images_arrays_tensors_and_paths(tmp_path: Path) -> None:
    image = picture(3, 32, 32)
    path = tmp_path / "a.png"
    image.save(path)
    array = np.asarray(image)
    kinds = [image, array, torch.from_numpy(array.transpose(2, 0, 1).copy()), path, str(path)]
    results = [stacked(Classification(val=[(kind, 1)], size=32, crop=1.0))[0] for kind in kinds]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    grey = picture(3, 32, 32, "L")
    assert stacked(Classification(val=[(grey, 0)], size=32, channels=1))[0].shape == (1, 1, 32, 32)
    tensors = [(torch.rand(3, 8, 8), torch.tensor(label)) for label in (0, 4)]
    task = Classification(val=tensors)
    assert (task.classes, task.input_shape) == (5, (3, 8, 8))


def test_a_loader_and_items_that_are_dictionaries() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8))
    labels = torch.arange(6) % 3
    plain = stacked(Classification(val=(images, labels)))
    pairs = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    named = [{"image": image, "label": int(label), "id": "x"} for image, label in pairs]
    for form in (loader, named, [{"pixel_values": one["image"], "labels": one["label"]} for one in named]):
        found = stacked(Classification(val=form))
        assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
    with pytest.raises(DataError, match="a dictionary of picture, and none is called image"):
        stacked(Classification(val=[{"picture": images[0]}]))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_file_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    picture(0, 20, 20, mode).save(tmp_path / "a" / ("x.tif" if mode == "CMYK" else "x.png"))
    inputs, _ = stacked(Classification(val=f"imagefolder:{tmp_path}", size=16))
    assert inputs.shape == (1, 3, 16, 16)


def test_sixteen_bit_files_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "a" / "x.png")
    task = Classification(val=f"imagefolder:{tmp_path}", size=16, crop=1.0, channels=1)
    assert torch.equal(
        (task.denormalize(stacked(task)[0]) * 255).round().int().flatten(),
        torch.from_numpy(levels.astype(np.int32) >> 8).flatten(),
    )


def test_a_file_of_floats_is_not_taken_for_black(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "a" / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif \(holds floats"):
        stacked(Classification(val=f"imagefolder:{tmp_path}", size=16))


@pytest.fixture
def folder_task(tmp_path: Path) -> Classification:
    text = f"imagefolder:{write_folder(tmp_path / 'data', each=6)}"
    return Classification(train=text, val=text.replace("/data", "/./data"), size=16)


@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_any_step_can_be_resumed_and_the_global_state_is_left_alone(kind: str, folder_task: Classification) -> None:
    task = folder_task if kind == "folder" else Classification(train="sklearn:digits")
    options: dict[str, Any] = {"limit": 12, "shuffle_seed": 5, "augment": True, "epoch": 3}
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    whole = list(task.batches("train", 3, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert len(whole) == task.steps("train", 3, limit=12, augment=True) == 4
    for start in range(5):
        rest = list(task.batches("train", 3, start=start, **options))
        assert len(rest) == 4 - start
        for (x, y), (x2, y2) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)
    other = next(task.batches("train", 3, **{**options, "epoch": 4}))
    assert not torch.equal(other[0], whole[0][0])


def test_erased_squares_lie_everywhere_and_are_the_same_after_a_resume() -> None:
    images = np.full((400, 3, 12, 10), 255, np.uint8)
    task = Classification(train=(images, np.zeros(400, np.int64)), augment="erase=5")
    x = stacked(task, "train", batch_size=100, shuffle_seed=0, augment=True)[0]
    erased = (x == 0).all(1)
    assert torch.equal(erased, (x == 0).any(1)) and torch.equal(
        x[~erased.unsqueeze(1).expand_as(x)].unique(), stacked(task, "train")[0].unique()
    )
    areas = erased.sum((1, 2))
    assert areas.max() == 25 and areas.min() == 9  # a square around a corner shows 3 by 3 of it
    assert erased.float().mean(0).min() > 0.03
    rest = torch.cat([part for part, _ in task.batches("train", 100, shuffle_seed=0, augment=True, start=2)])
    assert torch.equal(rest, x[200:])
    assert not (stacked(task, "train")[0] == 0).any()  # evaluation erases nothing


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_change_nothing(folder_task: Classification) -> None:
    in_process = stacked(folder_task, "train", shuffle_seed=1, augment=True)
    by_workers = stacked(
        Classification(train=folder_task.train, size=16, workers=2), "train", shuffle_seed=1, augment=True
    )
    assert torch.equal(in_process[0], by_workers[0]) and torch.equal(in_process[1], by_workers[1])


def test_shuffling_visits_every_image_once_and_order_is_kept_without_it() -> None:
    task = Classification(train=(np.arange(23, dtype=np.uint8).repeat(4).reshape(23, 1, 2, 2), np.arange(23)))
    assert stacked(task, "train")[1].tolist() == list(range(23))
    shuffled = stacked(task, "train", shuffle_seed=0)[1].tolist()
    assert shuffled != list(range(23)) and sorted(shuffled) == list(range(23))
    assert len(list(task.batches("train", 5, augment=True))) == 4
    assert len(list(task.batches("train", 5))) == 5 == task.steps("train", 5)


def test_limit_is_nested_and_not_a_prefix() -> None:
    task = Classification(val=(np.zeros((100, 1, 2, 2), np.uint8), np.arange(100) // 10))
    few, more = (stacked(task, limit=limit)[1].tolist() for limit in (20, 50))
    assert len(few) == 20 and len(set(few)) > 5
    assert all(few.count(label) <= more.count(label) for label in range(10))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.booleans(), st.integers(0, 99))
def test_shift_and_mirror_equal_the_loop(count: int, height: int, width: int, pad: int, flip: bool, seed: int) -> None:
    images = torch.randint(
        1, 256, (count, 2, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    done = shifted(images, Augmentation(cropped=True, crop=pad, flip=flip), torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    for one, around in zip(done, padded, strict=True):
        allowed = [around[:, y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
        allowed += [window.flip(2) for window in allowed] if flip else []
        assert any(torch.equal(one, window) for window in allowed)


def test_shifts_reach_all_offsets_and_mirror_half() -> None:
    images = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 1] = 1
    done = (
        shifted(images, Augmentation(cropped=True, crop=1), torch.Generator().manual_seed(0)).flatten(1).float().mean(0)
    )
    # each of nine places has probability 1/9: five standard deviations of a mean of 4000
    assert (done - 1 / 9).abs().max() < 5 * (1 / 9 * 8 / 9 / 4000) ** 0.5
    images[:] = 0
    images[:, 0, 0, 0] = 1
    mirrored = shifted(images, Augmentation(flip=True), torch.Generator().manual_seed(0))[:, 0, 0, 2].float().mean()
    assert abs(float(mirrored) - 0.5) < 5 * (0.25 / 4000) ** 0.5


def test_calibration_images_are_prepared_as_for_evaluation_and_chosen_by_seed() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    task = Classification(train=(images, np.zeros(30, np.int64)))
    first, again, other = (torch.cat(list(task.inputs("train", 8, 3, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = stacked(task, "train")[0]
    assert all(any(torch.equal(one, candidate) for candidate in whole) for one in first)
    assert len({tuple(one.flatten().tolist()) for one in first}) == 8


def test_arrays_are_resized_and_grey_becomes_colour() -> None:
    images = np.full((4, 1, 8, 8), 51, np.uint8)
    task = Classification(val=(images, np.zeros(4, np.int64)), size=12, channels=3, mean=0.0, std=1.0)
    assert torch.allclose(stacked(task)[0], torch.full((4, 3, 12, 12), 0.2))


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, two = write_folder(tmp_path / "one"), write_folder(tmp_path / "two")
    prints = [Classification(val=f"imagefolder:{root}").fingerprint("val") for root in (one, two)]
    assert prints[0] == prints[1] and len(prints[0]) == 64
    with (two / "dog" / "1.png").open("ab") as file:
        file.write(b"\0")
    assert Classification(val=f"imagefolder:{two}").fingerprint("val") != prints[0]
    images = np.zeros((3, 1, 2, 2), np.uint8)
    labels = [Classification(val=(images, np.array(values))).fingerprint("val") for values in ([0, 1, 2], [0, 1, 1])]
    assert labels[0] != labels[1]


ZEROS = np.zeros((4, 1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither train nor val"),
        ({"val": "imagefolder:/no/such/place"}, "no such folder"),
        ({"val": "digits"}, "not a data source"),
        ({"val": "sklearn:iris"}, "only sklearn:digits"),
        ({"val": "nowhere.at:all"}, "can't be imported"),
        ({"val": 3}, "not a data source"),
        ({"val": []}, "no images"),
        ({"val": (ZEROS, np.arange(3))}, "4 images but 3 labels"),
        ({"val": (ZEROS, np.array([0, 1, -1, 2]))}, "label -1 of image 2"),
        ({"val": (ZEROS, np.array([0, 1, 0.5, 2]))}, "label 0.5 of image 2"),
        ({"val": (ZEROS, np.eye(4))}, "argmax"),
        ({"val": (ZEROS, np.array([b"a", b"b", b"c", b"d"]))}, "labels can't be read"),
        ({"val": (ZEROS, np.arange(4)), "class_count": 3}, "label 3 of image 3 is out of range"),
        ({"val": (np.zeros((4, 8), np.uint8), np.arange(4))}, "shape"),
        ({"val": (np.zeros((4, 0, 8, 8), np.uint8), np.arange(4))}, "no pixel"),
        ({"val": (np.full((4, 1, 8, 8), np.nan, np.float32), np.arange(4))}, "4 of 4 images hold NaN"),
        ({"val": (np.full((4, 1, 8, 8), 7.0), np.arange(4))}, "divide by 255"),
        ({"val": (np.full((4, 1, 8, 8), 700), np.arange(4))}, "leave 0..255"),
        ({"val": (ZEROS, np.arange(4)), "mean": (0.1, 0.2), "std": 1.0}, "mean has 2 values"),
        ({"val": (np.zeros((4, 3, 8, 8), np.uint8), np.arange(4)), "channels": 1}, "3 channels, channels=1"),
        ({"val": (ZEROS, np.arange(4)), "std": 0.0}, "positive"),
        ({"val": (ZEROS, np.arange(4)), "crop": 0.0}, "crop=0.0"),
        ({"val": (ZEROS, np.arange(4)), "size": 0}, "size=0"),
        ({"val": (ZEROS, np.arange(4)), "augment": "spin"}, "'spin' is not"),
        ({"val": (ZEROS, np.arange(4)), "augment": "crop=many"}, "'crop=many' is not"),
        ({"val": (ZEROS, np.arange(4)), "augment": "erase=0"}, "'erase=0' is not"),
        ({"val": (ZEROS, np.arange(4)), "interpolation": "sinc"}, "sinc"),
        ({"val": (ZEROS, np.arange(4)), "workers": -1}, "workers=-1"),
        ({"val": [(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 9), 1)], "size": None}, None),
        ({"val": [(torch.zeros(3, 8, 8), 0), (torch.zeros(2, 8, 8), 1)]}, "2 channels where 3"),
        ({"val": [(torch.zeros(3, 8, 8), b"cat")]}, "label b'cat'"),
        ({"val": [("text is no image", 0)], "size": 8}, "1 of 1 images can't be read"),
        ({"val": [({"image": 1}, 0)], "size": 8}, "yields a dict"),
        ({"val": [(torch.full((3, 8, 8), 9.0), 0)]}, "normalised already"),
    ],
)
def test_wrong_data_is_told_in_one_line(options: dict[str, Any], message: str | None) -> None:
    if message is None:  # different sizes are resized to the first one's
        assert stacked(Classification(**options))[0].shape == (2, 3, 8, 8)
        return
    with pytest.raises(DataError, match=message) as caught:
        list(Classification(**options).batches("val", 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda task: task.batches("train", 2), "no train data"),
        (lambda task: task.batches("test", 2), "no split 'test'"),
        (lambda task: task.batches("val", 0), "batch size 0"),
        (lambda task: task.batches("val", 2, limit=0), "limit=0"),
        (lambda task: task.batches("val", 9, augment=True), "less than one batch"),
        (lambda task: task.inputs("val", 0, 2), "at least 1"),
        (lambda task: task.check(3), "at least 4 outputs, this one has 3"),
    ],
)
def test_wrong_calls_are_told_at_the_call(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(Classification(val=(ZEROS, np.arange(4))))


def test_folders_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither class folders nor images"):
        Classification(val=f"imagefolder:{tmp_path / 'empty'}").length("val")
    root = write_folder(tmp_path / "data")
    (root / "eel").mkdir()
    (root / ".cache").mkdir()
    with pytest.raises(DataError, match=r"class folder .*eel .1 of 3 are empty"):
        Classification(val=f"imagefolder:{root}").length("val")
    with pytest.raises(DataError, match="is a file"):
        Classification(val=f"imagefolder:{root / 'cat' / '1.png'}").length("val")
    other = write_folder(tmp_path / "other", ("cat", "fox"))
    (root / "eel").rmdir()
    with pytest.raises(DataError, match="'fox' is in val and not in train"):
        Classification(train=f"imagefolder:{root}", val=f"imagefolder:{other}").length("val")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_files_are_counted_and_the_first_named_or_left_out(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path / "data", each=6)
    whole = (root / "cat" / "2.jpg").read_bytes()
    (root / "cat" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "3.png").write_bytes(b"")
    (root / "dog" / "5.png").write_bytes(b"<html>not found</html>" * 20)
    text = f"imagefolder:{root}"
    with pytest.raises(
        DataError, match=r"(?i)3 of 12 images can.t be read, the first is .*cat.2\.jpg .*truncated"
    ) as caught:
        stacked(Classification(val=text, size=16, workers=workers))
    assert "\n" not in str(caught.value)
    task = Classification(val=text, size=16, workers=workers, strict=False)
    inputs, targets = stacked(task)
    assert inputs.shape[0] == 9 and torch.bincount(targets).tolist() == [5, 4]
    assert task.describe()["val"]["unreadable"]["count"] == 3


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    task = Classification(val=f"imagefolder:{root}", size=16)
    assert task.length("val") == 8
    (root / "dog" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        task.fingerprint("val")
    with pytest.raises(DataError, match="1 of 8 images can't be read"):
        stacked(task)


# -- what no other test would notice


def test_rows_are_the_images_of_the_batches_from_the_first_epoch_on() -> None:
    task = Classification(train=(np.zeros((40, 1, 4, 4), np.uint8), np.arange(40)), augment="none")
    rows = task.rows("train", 8, shuffle_seed=3)
    assert rows is not None
    labels = [targets for _, targets in task.batches("train", 8, shuffle_seed=3, augment=True)]
    assert [row.tolist() for row in rows] == [batch.tolist() for batch in labels]
    other = task.rows("train", 8, shuffle_seed=3, epoch=2)
    assert other is not None and other[0].tolist() != rows[0].tolist()


def test_images_of_different_kinds_are_named_in_order() -> None:
    mixed = [(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 8, 8, dtype=torch.uint8), 1)]
    for dataset in (mixed, mixed[::-1]):
        with pytest.raises(DataError, match=r"kinds \(\(3, 8, 8\) torch.float32 and \(3, 8, 8\) torch.uint8\)"):
            list(Classification(val=dataset).batches("val", 2))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int16])
def test_whole_numbers_of_any_type_may_be_black_and_white(dtype: type) -> None:
    images = np.array([0, 255, 17, 0], dtype=dtype).reshape(4, 1, 1, 1)
    task = Classification(val=(images, np.arange(4)), mean=0.0, std=1.0)
    assert (stacked(task)[0].flatten() * 255).round().tolist() == [0, 255, 17, 0]


def test_the_refusal_that_says_most_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That a split is not there (ValueError) says less than that its files are not (RuntimeError), in any order."""
    datasets = pytest.importorskip("torchvision.datasets")

    def refusing(**refusals: Exception) -> type:
        class Pictures:
            def __init__(self, root: str, split: str):
                raise refusals[split]

        return Pictures

    absent, incomplete = ValueError("no such split"), RuntimeError("files are missing")
    for first, second in ((incomplete, absent), (absent, incomplete)):
        monkeypatch.setattr(datasets, "Pictures", refusing(train=first, trainval=second), raising=False)
        with pytest.raises(DataError, match="files are missing"):
            Classification(train=f"torchvision:Pictures?root={tmp_path}").length("train")


def test_numbers_are_targets_of_any_source() -> None:
    """(N, K) floats, known beforehand or found in each item, come out as they are."""
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 4, 4), dtype=np.uint8)
    numbers = np.random.default_rng(1).normal(size=(10, 2)).astype(np.float32)
    items = [(torch.from_numpy(image), pair) for image, pair in zip(images, numbers, strict=True)]
    for source in ((images, numbers), items):
        data = ImageData(val=source, targets=Numbers(), mean=0.0, std=1.0)
        assert torch.equal(torch.cat([targets for _, targets in data.batches("val", 4)]), torch.from_numpy(numbers))
        assert data.labelled("val") and len(data.fingerprint("val")) == 64
    numbers[3, 1] = np.nan
    for source in ((images, numbers), items):
        with pytest.raises(DataError, match="a target is NaN"):
            list(ImageData(val=source, targets=Numbers()).batches("val", 4))


def test_images_are_what_batches_normalise() -> None:
    data = ImageData(val="sklearn:digits")
    for (images, labels), (inputs, targets) in zip(data.images("val", 100), data.batches("val", 100), strict=True):
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        assert torch.equal(data.normalize(images), inputs) and torch.equal(labels, targets)


def test_a_new_form_of_data_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grey.py").write_text(
        "import numpy as np\n"
        "def read(text, rest, split):\n    count = int(rest)\n"
        "    return (np.full((count, 1, 4, 4), 99, 'uint8'), np.arange(count) % 2), False\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    task = Classification(train="grey:20", val="grey:20")
    assert (task.length("train"), task.length("val")) == (16, 4)
