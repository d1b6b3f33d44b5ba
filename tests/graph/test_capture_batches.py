"""Batches come as users have them, and what loses or guesses something is refused with a way out that works."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import rarefy
from rarefy.errors import InputError
from rarefy.graph.capture import capture
from rarefy.graph.capture.batches import Arranger, each

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


@pytest.fixture(scope="module")
def graph() -> Any:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), (3, 8, 8))


class Listed(Dataset[tuple[Tensor, int]]):
    """A map-style data set: no batches, no iterator."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IMAGES[index], int(LABELS[index])


FORMS: dict[str, Any] = {
    "list": [IMAGES],
    "tuples of one": [(IMAGES,)],
    "tensor": IMAGES,
    "array": IMAGES.numpy(),
    "arrays": [IMAGES.numpy()],
    "arrays of float64": [IMAGES.numpy().astype(np.float64)],
    "float64": [IMAGES.double()],
    "dictionary": {"input": IMAGES},
    "dictionaries": [{"input": IMAGES}],
    "of another name": [{"pixel_values": IMAGES, "labels": LABELS}],
    "dictionaries in tuples": [({"pixel_values": IMAGES},)],
    "pairs": [(IMAGES, LABELS)],
    "lists": [[IMAGES, LABELS]],
    "loader of pairs": DataLoader(TensorDataset(IMAGES, LABELS), 4),
    "loader of images": DataLoader(TensorDataset(IMAGES), 4),
    "generator": (image for image in IMAGES.split(2)),
    "without a batch": list(IMAGES),
    "data set": Listed(),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_are_the_same_images(form: str, graph: Any) -> None:
    arranged = [Arranger(graph, "batch")(batch) for batch in each(FORMS[form], "batches")]
    found = torch.cat([inputs[0] for inputs in arranged])
    assert all(len(inputs) == 1 for inputs in arranged)
    assert found.dtype == torch.float32 and torch.equal(found, IMAGES)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((255 * IMAGES).to(torch.uint8), r"input holds uint8, the model reads float32.*\[x.float\(\) / 255 for x in"),
        ((255 * IMAGES).long(), "input holds int64"),
        (IMAGES[:, :2], r"of shape \[6, 2, 8, 8\] for input: the model takes \(N, 3, 8, 8\)"),
        ((IMAGES, LABELS, LABELS), r"3 parts for 1 input \(input\).*as in \[input for input, _0, _1 in loader\]"),
        (
            {"a": IMAGES, "b": IMAGES},
            r"keys a, b for the inputs input.*\[{'input': batch\['a'\]} for batch in loader\]",
        ),
        ("images/", "a str is no input"),
        (object(), "a object is no input"),
    ],
)
def test_what_is_no_batch_is_refused_in_a_line(batch: Any, words: str, graph: Any) -> None:
    with pytest.raises(InputError, match=words) as refused:
        Arranger(graph, "calibration batch")(batch)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("batches", [3, "images/", None])
def test_what_holds_no_batches_is_refused(batches: Any) -> None:
    with pytest.raises(InputError, match="holds no batches; pass a list of tensors"):
        each(batches, "batches")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.linear(self.embedding(ids)) * scale[..., None]


def test_several_inputs_are_taken_by_place_or_by_name() -> None:
    two = capture(Two(), {"ids": torch.randint(0, 9, (2, 5)), "scale": torch.ones(2, 5)})
    ids, scale = torch.randint(0, 9, (3, 5)), torch.rand(3, 5)
    given: list[Any] = [(ids, scale), [ids.int(), scale.double()], {"scale": scale, "ids": ids, "labels": ids}]
    for batch in given:
        found = Arranger(two, "batch")(batch)
        assert found[0].dtype == torch.int64 and torch.equal(found[0], ids) and torch.equal(found[1], scale)
    with pytest.raises(InputError, match="1 parts for 2 inputs"):
        Arranger(two, "batch")(ids)
    with pytest.raises(InputError, match="ids holds float32, the model reads int64, which can't hold them"):
        Arranger(two, "batch")((scale, scale))


def test_labels_that_are_left_out_are_told_once(graph: Any, caplog: pytest.LogCaptureFixture) -> None:
    arranged = Arranger(graph, "calibration batch")
    with caplog.at_level(logging.WARNING, "rarefy"):
        for _ in range(3):
            arranged((IMAGES, LABELS))
    assert [record.getMessage() for record in caplog.records if record.name == "rarefy"] == [
        "calibration batch: batches hold more than the model's input; the last of each, its labels, is left out"
    ]


def test_quantize_gives_the_same_codes_whatever_the_form(graph: Any) -> None:
    quantized = [rarefy.quantize(graph, batches=FORMS[form], progress=False) for form in ("list", "float64", "tensor")]
    for other in quantized[1:]:
        assert all(map(torch.equal, quantized[0].state_dict().values(), other.state_dict().values()))
    with pytest.raises(InputError, match="calibration batch: input holds uint8"):
        rarefy.quantize(graph, batches=[(255 * IMAGES).to(torch.uint8)], progress=False)
