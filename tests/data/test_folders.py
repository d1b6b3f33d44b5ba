"""Folders of pictures as people have them: what lies above the classes is no class, and junk is no picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, stacked

from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

NAMES = ("cats", "dogs", "mice")


def fill(folder: Path, names: tuple[str, ...] = NAMES, each: int = 5) -> Path:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            picture(label * 50 + index, 16, 16).save(folder / name / f"{index}.png")
    return folder


def task_of(root: Path) -> Classification:
    return Classification(train=f"imagefolder:{root}", val=f"imagefolder:{root}", size=16)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"), ("Train", "Test"), ("TRAIN", "VAL"), ("training_set", "test_set"), ("training", "testing"),
        ("train", "valid"), ("train", "validation"), ("images/train", "images/val"), ("trainset", "testset"),
        ("Training", "Validation"), ("train_data", "test_data"), ("seg_train/seg_train", "seg_test/seg_test"),
        ("dataset/images/train", "dataset/images/val"), ("train", "dev"), ("train images", "test images"),
        ("train/images", "val/images"), ("train-set", "eval-set"),
    ],
)  # fmt: skip
def test_split_folders_are_entered_whatever_they_are_called(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / train, each=6)
    fill(tmp_path / val, each=2)
    task = task_of(tmp_path)
    assert task.class_names == NAMES
    assert (task.length("train"), task.length("val")) == (18, 6)
    assert stacked(task, "val")[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_val_goes_before_test_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "train", each=6)
    fill(tmp_path / "test", each=3)
    fill(tmp_path / "val", each=2)
    fill(tmp_path / "unlabelled", ("all",), each=9)
    task = task_of(tmp_path)
    assert (task.class_names, task.length("train"), task.length("val")) == (NAMES, 18, 6)


@pytest.mark.parametrize("split", ["train", "Training", "images/train", "test", "data/train_set"])
def test_a_lone_split_is_cut_in_two_where_both_are_asked_of_it(tmp_path: Path, split: str) -> None:
    fill(tmp_path / split, each=10)
    task = task_of(tmp_path)
    assert (task.class_names, task.length("train"), task.length("val")) == (NAMES, 24, 6)
    assert not set(map(str, _files(task, "train"))) & set(map(str, _files(task, "val")))
    assert Classification(val=f"imagefolder:{tmp_path}", size=16).length("val") == 30


def _files(task: Classification, split: str) -> list[object]:
    source = task.data.source(split)  # type: ignore[arg-type]
    return [source.item(index)[0] for index in range(len(source))]  # type: ignore[union-attr]


def test_a_contest_s_test_folder_without_classes_is_not_judged_on(tmp_path: Path) -> None:
    fill(tmp_path / "train", each=10)
    (tmp_path / "test").mkdir()
    for index in range(7):
        picture(index, 16, 16).save(tmp_path / "test" / f"{index}.png")
    task = task_of(tmp_path)
    assert (task.class_names, task.length("train"), task.length("val")) == (NAMES, 24, 6)
    (tmp_path / "empty" / "train").mkdir(parents=True)


def test_classes_that_hold_the_splits(tmp_path: Path) -> None:
    for name in NAMES:
        fill(tmp_path / name, ("train",), each=4)
        fill(tmp_path / name, ("test",), each=2)
    task = task_of(tmp_path)
    assert (task.class_names, task.length("train"), task.length("val")) == (NAMES, 12, 6)


def test_one_folder_around_the_classes(tmp_path: Path) -> None:
    fill(tmp_path / "PetImages")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    (tmp_path / "readme.txt").write_text("pets")
    assert task_of(tmp_path).class_names == NAMES
    assert "the folder" in str(task_of(tmp_path).data.source("val").notes)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "train"), ("bus", "car", "train"), ("invalid", "valid"), ("crash_test", "steam_train"),
        ("test", "tube"),
        ("trainers", "testers"), ("fine_tune", "pre_train"),
    ],
)  # fmt: skip
def test_classes_with_names_like_splits_stay_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert task_of(fill(tmp_path / "data", names)).class_names == tuple(sorted(names))


def test_one_class_stays_one_and_is_told(tmp_path: Path) -> None:
    fill(tmp_path, ("cats",))
    task = task_of(tmp_path)
    assert task.class_names == ("cats",)
    assert any("only one class, cats: give the folder above the classes" in note for note in task.data.notes)


@pytest.mark.parametrize("ending", ["gif", "GIF", "jfif", "JPE", "tiff", "webp", "bmp", "pgm"])
def test_endings_of_pictures(tmp_path: Path, ending: str) -> None:
    fill(tmp_path, each=2)
    (tmp_path / "cats" / "0.png").unlink()
    form = {"gif": "GIF", "jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM"}.get(ending.lower(), ending.upper())
    mode = "L" if ending == "pgm" else "RGB"
    picture(7, 16, 16, mode).save(tmp_path / "cats" / f"0.{ending}", format=form)
    images, labels = stacked(Classification(val=f"imagefolder:{tmp_path}", mean=0, std=1))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    wanted = torch.from_numpy(np.asarray(picture(7, 16, 16, mode).convert("RGB")).copy()).permute(2, 0, 1) / 255
    assert (images[0] - wanted).abs().mean() < (0.05 if ending.lower() in ("gif", "jfif", "jpe", "webp") else 1e-6)


def test_pictures_of_other_forms_are_left_out_with_a_word(tmp_path: Path) -> None:
    fill(tmp_path, each=2)
    for name in ("a.heic", "b.HEIC", "c.avif", "notes.txt", ".d.heic"):
        (tmp_path / "cats" / name).write_bytes(b"x")
    task = Classification(val=f"imagefolder:{tmp_path}")
    assert task.length("val") == 6
    assert "val: 3 files of forms that are not read (.avif, .heic) are left out" in task.data.notes


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.heic", "b.heic", "c.txt"), "it holds 2 of .heic, 1 of .txt: save them as .png, or delete it"),
        (("a", "b"), r"its files have no ending: add that of their form \(.jpg, .png\)"),
        (("train-0.parquet",), "it holds .parquet files: give parquet:"),
        (("0.tar",), "it holds .tar files: give tar:"), ((), "fill or delete it"),
    ],
)  # fmt: skip
def test_a_class_without_pictures_says_what_it_holds(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    fill(tmp_path, ("cats", "dogs"))
    (tmp_path / "mice").mkdir()
    for name in names:
        (tmp_path / "mice" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=words):
        Classification(val=f"imagefolder:{tmp_path}").length("val")


def test_what_systems_leave_in_folders_is_no_picture_and_no_class(tmp_path: Path) -> None:
    root = fill(tmp_path / "data")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".hidden.png"):
        (root / "cats" / name).write_bytes(b"\0")
        (root / name).write_bytes(b"\0")
    for junk in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".cache"):
        for place in (root, root / "cats", tmp_path):
            (place / junk).mkdir()
            picture(1, 16, 16).save(place / junk / "0-checkpoint.png")
    task = Classification(val=f"imagefolder:{root}", size=16)
    assert (task.class_names, task.length("val")) == (NAMES, 15)
    assert Classification(val=f"images:{tmp_path}", size=16).length("val") == 15


def test_images_at_any_depth_below_a_class(tmp_path: Path) -> None:
    fill(tmp_path / "cats", ("black", "white"), each=2)
    fill(tmp_path / "dogs", ("big", "small"), each=3)
    task = task_of(tmp_path)
    assert (task.class_names, task.length("train") + task.length("val")) == (("cats", "dogs"), 10)


@pytest.mark.parametrize(("sizes", "held"), [((1, 1, 2), [0, 0, 1]), ((2, 3, 10), [1, 1, 2]), ((1, 7, 8), [0, 1, 2])])
def test_of_few_pictures_a_class_some_are_held_out(tmp_path: Path, sizes: tuple[int, ...], held: list[int]) -> None:
    for name, count in zip(NAMES, sizes, strict=True):
        fill(tmp_path, (name,), each=count)
    task = task_of(tmp_path)
    labels = torch.bincount(stacked(task, "val")[1], minlength=3)
    assert labels.tolist() == held
    assert torch.bincount(stacked(task, "train")[1], minlength=3).tolist() == [
        count - out for count, out in zip(sizes, held, strict=True)
    ]


def test_a_class_that_is_judged_on_no_picture_is_told(tmp_path: Path) -> None:
    fill(tmp_path, ("cats", "dogs"), each=5)
    fill(tmp_path, ("mice",), each=1)
    assert any("mice" in note and "judged" in note for note in task_of(tmp_path).data.notes)


def test_nothing_left_to_judge_on_is_refused_with_the_way_out(tmp_path: Path) -> None:
    fill(tmp_path, each=1)
    with pytest.raises(DataError, match=r"no class has two images .*; pass --train and --val"):
        task_of(tmp_path).length("val")


# ------------------------------------------------------------------ arrays in files


def test_channels_beyond_three_come_as_arrays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("field", "forest"):
        (tmp_path / name).mkdir()
        for index in range(5):
            bands = random.integers(0, 256, (6, 12, 12), dtype=np.uint8)
            np.save(tmp_path / name / f"{index}.npy", bands if name == "field" else bands.transpose(1, 2, 0))
    task = Classification(train=f"imagefolder:{tmp_path}", val=f"imagefolder:{tmp_path}")
    assert (task.input_shape, task.class_names) == ((6, 12, 12), ("field", "forest"))
    assert stacked(task, "train")[0].shape == (8, 6, 12, 12)


def test_an_array_that_is_pickled_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "a" / "1.npy", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"1 of 2 images can't be read, the first is .*0\.npy"):
        stacked(Classification(val=f"imagefolder:{tmp_path}", size=4))
