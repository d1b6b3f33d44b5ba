"""An example comes as users have it, an answer as the original gives it, and both have the model's names."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import CaptureError
from rarefy.graph.capture import capture
from rarefy.graph.nodes import example_inputs
from rarefy.graph.signature import input_names, output_names


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


IMAGE = torch.randn(2, 3, 16, 16)
FORMS = {
    "tensor": IMAGE,
    "one image": IMAGE[:1],
    "list": [IMAGE],
    "dict": {"input": IMAGE},
    "array": IMAGE.numpy(),
    "array of float64": IMAGE.numpy().astype(np.float64),
    "array in a dict": {"input": IMAGE[:1].numpy()},
    "bytes": (IMAGE * 10).to(torch.uint8),
    "float64": IMAGE.double(),
    "shape": (3, 16, 16),
    "shape with a batch": (1, 3, 16, 16),
    "torch.Size": IMAGE.shape,
    "shape in a tuple": ((3, 16, 16),),
    "shape in a dict": {"input": (4, 3, 16, 16)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_input_gives_the_same_graph(form: str) -> None:
    model = convolutional()
    graph = capture(model, FORMS[form])
    x = torch.randn(3, 3, 16, 16)
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    assert torch.equal(graph(input=x), graph(x))
    assert graph.meta["inputs"] == [{"shape": [3, 16, 16], "dtype": "float32"}]
    assert graph.meta["names"] == {"inputs": ["input"], "outputs": ["output"]}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (IMAGE[0], r"the example \(3, 16, 16\) has no batch axis; give it one"),
        (torch.randn(2, 4, 16, 16), r"does not take this example \(input \(2, 4, 16, 16\) float32\).*expected input"),
        ("picture.png", "a str is no example; pass a tensor, an array, a shape"),
        (None, "a NoneType is no example"),
        ({"input": None}, "hold no tensor"),
        ({"image": IMAGE}, r"unexpected keyword argument 'image'; pass what Sequential.forward\(input\) takes"),
        (np.array(["a"]), "an array of <U1 is no tensor"),
        (torch.tensor(1.0), "no batch axis"),
    ],
)
def test_an_example_that_can_not_be_is_refused_in_a_line(inputs: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words) as refused:
        capture(convolutional(), inputs)
    assert "\n" not in str(refused.value) and "tensor operations" not in str(refused.value)


def test_a_picture_that_a_network_of_convolutions_takes_as_it_is_has_no_batch_axis_either() -> None:
    with pytest.raises(CaptureError, match="no batch axis"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inputs", [IMAGE, (3, 16, 16), IMAGE.numpy()])
def test_a_model_in_another_precision_is_captured_in_it(dtype: torch.dtype, inputs: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(dtype)
    graph = capture(model, inputs)
    x = torch.randn(3, 3, 16, 16, dtype=dtype)
    assert torch.equal(graph(x), model(x)) and graph.meta["inputs"][0]["dtype"] == str(dtype)[6:]


class Tokens(nn.Module):
    """A text classifier as transformers writes them: everything by keyword, optional, and returned by name."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any] = lambda logits, hidden: {"logits": logits}):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head, self.answer = (
            nn.Embedding(50, 8),
            nn.Linear(8, 6),
            nn.Linear(6, 2),
            answer,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: bool = True) -> Any:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return self.answer(self.head(self.body(hidden.mean(1) * (2 if scale else 1))), hidden)


def test_inputs_by_name_and_constants_among_them() -> None:
    model = Tokens().eval()
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    graph = capture(model, {"input_ids": ids, "attention_mask": mask, "scale": False})
    assert input_names(graph) == ["input_ids", "attention_mask"] and output_names(graph) == ["logits"]
    ids, mask = torch.randint(0, 50, (5, 7)), torch.randint(0, 2, (5, 7))
    wanted = model(ids, mask, scale=False)["logits"]
    assert torch.allclose(graph(ids, mask)["logits"], wanted)
    assert torch.allclose(graph(attention_mask=mask, input_ids=ids)["logits"], wanted)
    first, second = example_inputs(graph, batch=64)
    assert int(first.min()) >= 0 and 0 < int(first.max()) < 50 and bool((second == 1).all())


@pytest.mark.parametrize("inputs", [(7,), (2, 7), {"input_ids": (2, 7)}])
def test_a_shape_is_whole_numbers_where_the_model_reads_those(inputs: Any) -> None:
    graph = capture(Tokens().eval(), inputs)
    assert graph.meta["inputs"] == [{"shape": [7], "dtype": "int64"}]


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Any = None
    layers: int = 3


class Named(collections.OrderedDict):  # type: ignore[type-arg]
    """A dictionary with attributes, as transformers' ModelOutput is."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


Pair = collections.namedtuple("Pair", "logits hidden")
ANSWERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], type, list[str]]] = {
    "tensor": (lambda logits, hidden: logits, Tensor, ["output"]),
    "tuple": (lambda logits, hidden: (logits, hidden), tuple, ["output_0", "output_1"]),
    "list": (lambda logits, hidden: [logits, [hidden]], list, ["output_0", "output_1_0"]),
    "dict": (lambda logits, hidden: {"logits": logits, "class": hidden}, dict, ["logits", "class_"]),
    "dataclass": (lambda logits, hidden: Answer(logits, (hidden, None)), Answer, ["logits", "hidden_0"]),
    "named dictionary": (lambda logits, hidden: Named(logits=logits, hidden=hidden), Named, ["logits", "hidden"]),
    "named tuple": (lambda logits, hidden: Pair(logits, {"a": hidden}), Pair, ["logits", "hidden_a"]),
    "nested": (lambda logits, hidden: {"out": Answer(logits), "n": 2}, dict, ["out_logits"]),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.allclose(one, other)
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return all(map(same, one, other)) if isinstance(one, (list, tuple)) else bool(one == other)


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_comes_as_the_original_gives_it(kind: str, tmp_path: Path) -> None:
    answer, container, names = ANSWERS[kind]
    model = Tokens(answer).eval()
    graph = capture(model, torch.randint(0, 50, (2, 7)))
    ids = torch.randint(0, 50, (5, 7))
    for one in (graph, copy.deepcopy(copy.deepcopy(graph)), rarefy.prune(graph, keep=0.5, criterion="random")):
        found = one(ids)
        assert isinstance(found, container) and output_names(one) == names
    assert same(graph(ids), model(ids))
    loaded = rarefy.load(rarefy.save(graph, tmp_path / "saved"))
    assert isinstance(loaded(ids), (dict, list, tuple, Tensor)) and output_names(loaded) == names
    assert input_names(loaded) == ["input_ids"]


def test_a_cache_among_the_answers_is_refused_with_the_way_out() -> None:
    class DynamicCache:
        """No tensor and no container, like transformers'."""

    class Decoder(Tokens):
        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
            logits = self.head(self.body(self.embedding(input_ids)))
            return {"logits": logits, **({"past_key_values": DynamicCache()} if use_cache else {})}

    ids = torch.randint(0, 50, (2, 7))
    with pytest.raises(CaptureError, match="returns a DynamicCache as past_key_values.*use_cache=False"):
        capture(Decoder().eval(), ids)
    model = Decoder().eval()
    graph = capture(model, {"input_ids": ids, "use_cache": False})
    assert torch.allclose(graph(ids)["logits"], model(ids, use_cache=False)["logits"])


def test_an_answer_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns a object as hidden; return tensors, tuples, lists, dictionaries"):
        capture(Tokens(lambda logits, hidden: Answer(logits, object())).eval(), torch.randint(0, 50, (2, 7)))


def test_several_inputs_of_any_number_have_names_of_their_own() -> None:
    class Sum(nn.Module):
        def forward(self, *parts: Tensor, scales: dict[str, Tensor]) -> Tensor:
            return sum(parts) * scales["a"]  # type: ignore[return-value]

    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match="missing 1 required keyword-only argument: 'scales'"):
        capture(Sum(), (x, x))

    class Two(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return parts[0] - parts[1]

    class Nested(nn.Module):
        def forward(self, features: list[Tensor], where: dict[str, Tensor]) -> Tensor:
            return features[0] - features[1] * where["x"]

    y = torch.randn(3, 4)
    assert input_names(two := capture(Two(), (x, x))) == ["parts_0", "parts_1"]
    assert torch.equal(two(y, 2 * y), -y)
    nested = capture(Nested(), ([x, x], {"x": x}))
    assert input_names(nested) == ["features_0", "features_1", "where_x"]
    assert torch.allclose(nested(y, y, y), y - y * y)
