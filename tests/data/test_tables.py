"""Labels in words, tables of pictures, arrays in files, and what a function returns for both splits."""

from __future__ import annotations

import sys
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import bounded
from pictures import picture, stacked
from PIL import Image
from torch.utils.data import TensorDataset

from rarefy.data.images import ImageData
from rarefy.data.targets import in_words
from rarefy.errors import DataError
from rarefy.tasks.classification import Classification

WORDS = ("mouse", "cat", "dog")
SHADE = {"cat": 10, "dog": 120, "mouse": 240}  # a class's pictures are of one shade, so that a picture tells its label


def shaded(name: str) -> Image.Image:
    return Image.new("RGB", (8, 8), (SHADE[name],) * 3)


def table(folder: Path, rows: Sequence[tuple[str, ...]], head: tuple[str, ...] | None, divider: str = ",") -> str:
    """The last cell of each row names its class. Pictures lie in images/, by the first cell that ends like one."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in rows:
        file = next(cell for cell in row if cell.startswith("p"))
        shaded(row[-1]).save(folder / "images" / (file if file.endswith(".png") else f"{file}.png"))
    lines = [divider.join(row) for row in [*([head] if head else []), *rows]]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"csv:{folder / 'labels.csv'}"


def told(task: Classification, split: str = "val") -> list[str]:
    """The class of each picture by its label; it must be that of its shade."""
    parts = list(task.data.images(split, 4))
    images, labels = torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])
    names = task.class_names
    assert names is not None
    by_label = [names[label] for label in labels.tolist()]
    shades = [min(SHADE, key=lambda name: abs(SHADE[name] - 255 * float(image.mean()))) for image in images]
    assert by_label == shades
    return by_label


@pytest.mark.parametrize(
    ("head", "form"),
    [
        (("file", "label"), "p{}.png"), (("image_id", "breed"), "p{}"), (None, "p{}.png"),
        (("path", "anything"), "images/p{}.png"), (("image", "class"), "p{}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("divider", [",", ";", "\t"])
def test_a_table_of_pictures(tmp_path: Path, head: tuple[str, ...] | None, form: str, divider: str) -> None:
    rows = [(form.format(index), WORDS[index % 3]) for index in range(6)]
    for _, word in rows:  # pictures lie in images/, whatever the cell says
        assert word in SHADE
    named = [(Path(file).name, word) for file, word in rows]
    source = table(tmp_path, named, head, divider)
    lines = [divider.join(row) for row in [*([head] if head else []), *rows]]
    (tmp_path / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    task = Classification(val=source)
    assert task.class_names == ("cat", "dog", "mouse")
    assert told(task) == [word for _, word in rows]


@pytest.mark.parametrize(
    "form", ["images\\p{}.png", "./images/p{}.png", "data/mine/images/p{}.png", "C:\\images\\p{}.png"]
)
def test_a_table_made_elsewhere_names_its_pictures(tmp_path: Path, form: str) -> None:
    source = table(tmp_path, [(f"p{index}.png", word) for index, word in enumerate(WORDS)], None)
    lines = [f"{form.format(index)},{word}" for index, word in enumerate(WORDS)]
    for head in ([], ["filename,class"]):
        (tmp_path / "labels.csv").write_text("\r\n".join([*head, *lines]), encoding="utf-8-sig")
        assert told(Classification(val=source)) == list(WORDS)


def test_a_table_of_a_column_a_class(tmp_path: Path) -> None:
    source = table(tmp_path, [(f"p{index}.png", word) for index, word in enumerate(WORDS)], None)
    head = ",file,cat,dog,mouse\n"  # as pandas writes one, with the rows' numbers
    one = [f"{10 + row},p{row}.png,{row == 1:d},{row == 2:d},{row == 0:d}\n" for row in range(3)]
    (tmp_path / "labels.csv").write_text(head + "".join(one), encoding="utf-8")
    task = Classification(val=source)
    assert task.class_names == ("cat", "dog", "mouse") and told(task) == list(WORDS)
    (tmp_path / "labels.csv").write_text("file,cat,dog\np0.png,1.0,1.0\np1.png,0.0,0.0\n", encoding="utf-8")
    several = Classification(val=source)
    assert several.multilabel and several.class_names == ("cat", "dog")
    assert stacked(several)[1].tolist() == [[1, 1], [0, 0]]
    (tmp_path / "labels.csv").write_text("file,cat,dog\np0.png,1,2\np1.png,0,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="which column holds the labels"):
        Classification(val=source).length("val")


def test_arrays_as_users_hand_them_over() -> None:
    pixels = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    wanted, labels = stacked(Classification(val=(pixels, [0, 1, 2]), mean=0, std=1))
    turned = Classification(val=(pixels[::-1], np.arange(3)[::-1]), mean=0, std=1)
    assert torch.equal(stacked(turned)[0], wanted.flip(0)) and stacked(turned)[1].tolist() == [2, 1, 0]
    for images in (list(pixels), [torch.from_numpy(one) for one in pixels]):
        listed = Classification(val=(images, [0, 1, 2]), mean=0, std=1)
        assert torch.equal(stacked(listed)[0], wanted) and torch.equal(stacked(listed)[1], labels)
    with pytest.raises(DataError, match=r"several shapes, \(8, 8\) and \(8, 9\); give a list of \(image, label\)"):
        Classification(val=([np.zeros((8, 8)), np.zeros((8, 9))], [0, 1])).length("val")
    pair = (pixels[0], 1)  # two items, no images and labels
    assert stacked(Classification(val=[pair, pair], mean=0, std=1))[1].tolist() == [1, 1]


def test_a_table_is_cut_in_two_or_divided_by_a_column(tmp_path: Path) -> None:
    rows = [(f"p{index}.png", WORDS[index % 3]) for index in range(30)]
    source = table(tmp_path / "plain", rows, ("file", "label"))
    task = Classification(train=source, val=source)
    assert (task.length("train"), task.length("val")) == (24, 6)
    split = [(f"p{index}.png", "TEST" if index % 5 == 0 else "train", WORDS[index % 3]) for index in range(30)]
    source = table(tmp_path / "split", split, ("file", "split", "label"))
    task = Classification(train=source, val=source)
    assert (task.length("train"), task.length("val")) == (24, 6)
    assert told(task) == [word for _, where, word in split if where == "TEST"]


def test_numbers_of_a_table_are_class_indices(tmp_path: Path) -> None:
    rows = [(f"p{index}.png", str(index)) for index in (11, 2, 0)]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(map(",".join, rows)), encoding="utf-8")
    for file, _ in rows:
        picture(1, 8, 8).save(tmp_path / file)
    task = Classification(val=f"csv:{tmp_path / 'labels.csv'}")
    assert task.class_names is None
    assert stacked(task)[1].tolist() == [11, 2, 0]


@pytest.mark.parametrize(
    ("text", "asked", "words"),
    [
        ("file,label\np0.png,cat\npX.png,dog\n", "", r"1 of 2 pictures are not below .*'pX\.png'"),
        ("a,b\nx,y\n", "", r"no column names pictures below .*\?image=COLUMN"),
        ("file,a,b\np0.png,cat,1\n", "", r"which column holds the labels\? Say \?label=COLUMN, of file, a, b"),
        ("file,label\np0.png,\n", "", "1 of 1 rows have no label"),
        ("file,label\np0.png,cat\np1.png\n", "", "row 3 has not 2 cells"),
        ("file\np0.png\n", "", "fewer than two columns"),
        ("file,label\np0.png,cat\n", "?label=kind", "no column 'kind'; have file, label"),
        ("file,label\np0.png,cat\n", "?labels=kind", "unknown option 'labels'; have image and label"),
    ],
)
def test_a_table_that_does_not_say_it_is_refused(tmp_path: Path, text: str, asked: str, words: str) -> None:
    picture(1, 8, 8).save(tmp_path / "p0.png")
    picture(2, 8, 8).save(tmp_path / "p1.png")
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as raised:
        Classification(val=f"csv:{tmp_path / 'labels.csv'}{asked}").length("val")
    assert "\n" not in str(raised.value)


def test_a_column_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    source = table(tmp_path, [("p0.png", "x", "cat"), ("p1.png", "y", "dog")], ("file", "a", "b"))
    assert told(Classification(val=f"{source}?label=b&image=file")) == ["cat", "dog"]


def test_pictures_without_classes_beside_a_table_are_told_of_it(tmp_path: Path) -> None:
    source = table(tmp_path, [("p0.png", "cat"), ("p1.png", "dog")], ("file", "label"))
    with pytest.raises(DataError, match=f"give {source}, or images:"):
        Classification(val=f"imagefolder:{tmp_path}").length("val")
    assert told(Classification(val=source)) == ["cat", "dog"]  # as advised
    assert Classification(train=f"images:{tmp_path / 'images'}").length("train") == 2


def test_words_as_labels_are_classes_in_order() -> None:
    assert in_words(["b", "a", "b"]) == ([1, 0, 1], ("a", "b"))
    assert in_words(np.array(["b", "a"], dtype=object)) == ([1, 0], ("a", "b"))
    assert in_words(["10", "2"]) == ([10, 2], None)
    assert in_words(["01", "2"]) == ([0, 1], ("01", "2"))
    assert in_words([1, 2]) is in_words(np.arange(2)) is in_words([]) is in_words(["a", 1]) is None


def test_words_of_both_splits_are_numbered_alike() -> None:
    def part(words: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([np.asarray(shaded(word)) for word in words]), np.array(words)

    task = Classification(train=part(("mouse", "cat", "dog")), val=part(("mouse", "dog")), mean=0, std=1)
    assert told(task) == ["mouse", "dog"]
    assert told(task, "train") == ["mouse", "cat", "dog"]
    lists = Classification(val=[(shaded(word), word) for word in WORDS])
    assert told(lists) == list(WORDS)
    with pytest.raises(DataError, match="class 'mouse' is in val and not in train"):
        Classification(train=part(("cat", "dog")), val=part(("cat", "mouse"))).length("val")


def test_words_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number, words in enumerate((("mouse", "cat"), ("dog", "cat"))):
        images = []
        for word in words:
            shaded(word).save(tmp_path / "one.png")
            images.append((tmp_path / "one.png").read_bytes())
        parquet.write_table(
            pa.table({"image": images, "label": list(words)}), tmp_path / f"part-{number}.parquet", row_group_size=1
        )
    task = Classification(val=f"parquet:{tmp_path}")
    assert task.class_names == ("cat", "dog", "mouse")
    assert told(task) == ["mouse", "cat", "dog", "cat"]


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("x_train", "y_train", "x_test", "y_test"), (6, 3)),
        (("train_images", "train_labels", "test_images", "test_labels"), (6, 3)),
        (("images", "labels"), (4, 2)), (("X", "y"), (4, 2)), (("arr_0", "arr_1"), (4, 2)),
    ],
)  # fmt: skip
def test_arrays_of_a_file(tmp_path: Path, names: tuple[str, ...], sizes: tuple[int, int]) -> None:
    arrays: dict[str, np.ndarray] = {}
    for place in range(0, len(names), 2):
        labels = np.arange(6 if place == 0 else 3) % 2
        arrays |= {names[place]: (labels[:, None, None] + np.zeros((1, 8, 8))).astype(np.uint8),
                   names[place + 1]: labels[:, None]}  # fmt: skip
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    source = f"npz:{tmp_path / 'd.npz'}"
    task = Classification(train=source, val=source)
    assert (task.length("train"), task.length("val")) == sizes
    images, labels = stacked(task, "train")
    assert torch.equal((images.mean((1, 2, 3)) > images.mean()).long(), labels)


def test_a_file_of_other_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", weight=np.zeros(3))
    with pytest.raises(
        DataError, match=r"holds weight, and none is called as images are; write np\.savez\(FILE, x_train"
    ):
        Classification(val=f"npz:{tmp_path / 'd.npz'}").length("val")
    np.savez(tmp_path / "d.npz", images=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="can't be read"):
        Classification(val=f"npz:{tmp_path / 'd.npz'}").length("val")
    (tmp_path / "d.npz").write_bytes(b"no")
    with pytest.raises(DataError, match="can't be read"):
        Classification(val=f"npz:{tmp_path / 'd.npz'}").length("val")


@pytest.mark.parametrize("whole", [b"(1, 8, 8), }", b"'descr'", b"|u1"])
def test_a_damaged_header_of_an_array_is_refused(tmp_path: Path, whole: bytes) -> None:
    """NumPy reads it as Python's words, with what that raises."""
    file = tmp_path / "d.npz"
    np.savez(file, images=np.zeros((1, 8, 8), np.uint8))
    with zipfile.ZipFile(file) as archive:
        data = archive.read("images.npy")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", data.replace(whole, b"(" * len(whole)))
    with pytest.raises(DataError, match=r"can't be read \(.*write it again by np\.savez"):
        Classification(val=f"npz:{file}").length("val")


def test_a_bomb_in_place_of_an_array_is_not_unpacked(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w") as to,
    ):
        for _ in range(8):
            to.write(bytes(2**25))
    with bounded(64 * 2**20, 5), pytest.raises(DataError, match="images is no array"):
        Classification(val=f"npz:{tmp_path / 'd.npz'}").length("val")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_labels_without_a_sign_are_class_indices(dtype: type[np.generic]) -> None:
    images = np.zeros((2, 1, 8, 8), np.uint8)
    source = ImageData(val=(images, np.array([0, 1], dtype))).source("val")
    assert source.labels is not None and source.labels.tolist() == [0, 1]
    if dtype is np.uint64:
        with pytest.raises(DataError, match="of image 1 is not a class index"):
            ImageData(val=(images, np.array([0, 2**63], dtype))).source("val")


def test_arrays_in_another_order_of_bytes_are_read(tmp_path: Path) -> None:
    images = np.linspace(0, 1, 128).reshape(2, 1, 8, 8)
    other = ">" if sys.byteorder == "little" else "<"
    np.savez(tmp_path / "d.npz", images=images.astype(f"{other}f4"), labels=np.arange(2).astype(f"{other}i4"))
    ((found, labels),) = ImageData(val=f"npz:{tmp_path / 'd.npz'}", mean=0, std=1).batches("val", 2)
    assert torch.equal(found, torch.from_numpy(images).float()) and labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "given",
    [
        lambda a, b: {"train": a, "test": b}, lambda a, b: {"train": a, "validation": b, "test": a},
        lambda a, b: (a, b),
        lambda a, b: (TensorDataset(*map(torch.from_numpy, a)), TensorDataset(*map(torch.from_numpy, b))),
    ],
)  # fmt: skip
def test_a_function_returns_both_splits(monkeypatch: pytest.MonkeyPatch, given: Callable[..., object]) -> None:
    train, val = ((np.zeros((count, 3, 8, 8), np.uint8), np.arange(count) % 2) for count in (6, 4))
    module = types.ModuleType("own_data")
    module.both = lambda: given(train, val)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_data", module)
    data = ImageData(train="own_data:both", val="own_data:both")
    assert (data.length("train"), data.length("val")) == (6, 4)


def test_a_pair_of_samples_is_no_pair_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_data")
    samples = ((np.zeros((8, 8, 3), np.uint8), 0), (np.ones((8, 8, 3), np.uint8), 1))
    module.pair = lambda: samples  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_data", module)
    assert Classification(val="own_data:pair").length("val") == 2


def test_labels_from_one_are_told() -> None:
    images = np.zeros((4, 3, 8, 8), np.uint8)
    with pytest.raises(DataError, match=r"count labels from 0 \(labels - 1\)"):
        Classification(val=(images, np.array([1, 2, 3, 3]))).check(3)
    with pytest.raises(DataError, match="a model for these classes$"):
        Classification(val=(images, np.array([0, 2, 3, 3]))).check(3)


@pytest.mark.parametrize(
    ("name", "form"), [("d.csv", "csv"), ("d.npz", "npz"), ("d.parquet", "parquet"), ("", "imagefolder")]
)
def test_a_path_without_its_form_is_told_it(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / name if name else tmp_path
    if name:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=f"give {form}:{path}"):
        Classification(val=str(path)).length("val")
