"""docs/accepts.md: every row of what is taken, and of what is refused, has a check here, and every check a row."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boxed
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rarefy
from rarefy.errors import RarefyError
from rarefy.graph.history import records
from rarefy.models.fitting import fit, told
from rarefy.models.load import graph_of, load
from rarefy.models.source import Source
from rarefy.models.weights import load_weights
from rarefy.tasks import Classification, Detection

PAGE = Path(__file__).resolve().parents[1] / "docs" / "accepts.md"
X, IDS = torch.randn(4, 3, 8, 8), torch.randint(0, 9, (4, 5))
LABELS = torch.arange(12) % 3
PICTURES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
CHECKS: dict[str, Callable[[Path], None]] = {}


def rows() -> list[str]:
    """The first cell of each row that is no heading."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] != "what" and not set(cells[0]) <= {"-"}:
            assert len(cells) == 2 and all(cells), line
            found.append(cells[0])
    return found


def accepts(row: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def put(check: Callable[[Path], None]) -> Callable[[Path], None]:
        assert row not in CHECKS, row
        CHECKS[row] = check
        return check

    return put


def test_every_row_has_a_check_and_every_check_a_row() -> None:
    assert len(rows()) == len(set(rows())) >= 40
    assert set(rows()) == set(CHECKS)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("row", rows())
def test_row(row: str, tmp_path: Path) -> None:
    CHECKS[row](tmp_path)


# -- networks


class Net(nn.Module):
    """answer: of logits and features, what it returns."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any] = lambda logits, features: logits, classes: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head, self.answer = nn.Linear(8, classes), answer

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).relu()
        return self.answer(self.head(features.mean((2, 3))), features)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> Any:
        hidden = self.embedding(input_ids)
        hidden = hidden if attention_mask is None else hidden * attention_mask[..., None]
        return {"logits": self.head(hidden.mean(1)), **({"past": Cache()} if use_cache else {})}


class Cache:
    """No tensor, no container."""


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class ModelOutput(OrderedDict[str, Any]):
    """As transformers' is: a dictionary whose items are attributes."""


def net() -> nn.Module:
    return Net().eval()


def answers(graph: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), model(*inputs), atol=1e-4, rtol=1e-4)


def goes_through(graph: Any, *inputs: Tensor) -> None:
    """Smaller, then int8, near the float answers."""
    small = rarefy.prune(graph, keep=0.5)
    assert records(small)[-1]["facts"]["reached"]["params"] < 0.9
    integer = rarefy.quantize(small, batches=[inputs], progress=False)
    assert records(integer)[-1]["facts"]["layers"]
    with torch.no_grad():
        wanted, got = small(*inputs), integer(*inputs)
    assert float((got - wanted).norm() / wanted.norm()) < 0.2


def task_of(labels: Any = LABELS, **options: Any) -> Classification:
    return Classification(train=(PICTURES, labels), val=(PICTURES, labels), **options)


def judged(model: nn.Module, task: Classification) -> None:
    graph = rarefy.capture(model, (3, 8, 8))
    trained = rarefy.distill(graph, graph, task, epochs=1, batch_size=6, progress=False)
    assert rarefy.evaluate(trained, task, progress=False).samples == 12


def refused(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(RarefyError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value).strip()


# -- a model


@accepts("a module")
def _(_: Path) -> None:
    answers(rarefy.capture(net(), X), net(), X)
    goes_through(rarefy.prune(net(), inputs=X, keep=1.0), X)


@accepts("a function, a class or a module of yours")
def _(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        source = (
            "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 2)\n"
        )
        (folder / "accepted_nets.py").write_text(f"{source}def made():\n    return Mine()\nthere = Mine()\n")
        for name in ("Mine", "made", "there"):
            assert load(f"accepted_nets:{name}").model(torch.randn(1, 4)).shape == (1, 2)


@accepts("a model of timm or torchvision")
def _(_: Path) -> None:
    pytest.importorskip("timm")
    assert load("timm:test_resnet?num_classes=7").model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    pytest.importorskip("torchvision")
    assert load("torchvision:squeezenet1_1", classes=4).model(torch.randn(1, 3, 64, 64)).shape == (1, 4)


@accepts("a folder saved by rarefy")
def _(folder: Path) -> None:
    rarefy.save(rarefy.capture(net(), X), folder / "saved")
    answers(load(str(folder / "saved")).model, net(), X)


@accepts("an exported program")
def _(folder: Path) -> None:
    free = {0: torch.export.Dim.DYNAMIC}
    torch.export.save(torch.export.export(net(), (X,), dynamic_shapes=(free,)), folder / "model.pt2")
    answers(graph_of(load(str(folder / "model.pt2"))), net(), X)
    program = torch.export.export(net(), (X,), dynamic_shapes=(free,))
    for one in (program, program.module()):
        answers(rarefy.capture(one, X), net(), X)


@accepts("an ONNX file")
def _(folder: Path) -> None:
    rarefy.export(net(), folder / "model.onnx", inputs=X, compare=False)
    for text in (f"onnx:{folder}/model.onnx", str(folder / "model.onnx")):
        graph = graph_of(load(text))
        answers(graph, net(), X)
        goes_through(graph, X)


@accepts("DataParallel, DDP, torch.compile around it")
def _(_: Path) -> None:
    for model in (nn.DataParallel(net()), torch.compile(net())):
        graph = rarefy.capture(model, X)
        assert set(graph.state_dict()) <= set(net().state_dict())
        answers(graph, net(), X)


@accepts("float16, bfloat16, float64")
def _(folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        graph = rarefy.capture(net().to(dtype), X)
        assert next(graph.parameters()).dtype == dtype and graph(X.to(dtype)).dtype == dtype
    assert rarefy.export(net().half(), folder / "half.onnx", inputs=X.half())["passed"]
    refused(r"float\(\)", lambda: rarefy.export(net().bfloat16(), folder / "half.onnx", inputs=X.bfloat16()))


@accepts("weight norm, spectral norm, other parametrizations")
def _(_: Path) -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = Net()
        wrap(model.body[3])
        graph = rarefy.capture(model.eval(), X)
        assert "body.3.weight" in graph.state_dict()
        answers(graph, model, X)
        goes_through(graph, X)


class With(Net):
    """Net, with something done to its features."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.change = change
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.change(self, self.body(x).relu()).mean((2, 3)))


def as_it_is(change: Callable[[Any, Tensor], Tensor], **parts: Any) -> Any:
    model = With(change, **parts).eval()
    graph = rarefy.capture(model, X)
    answers(graph, model, torch.randn(3, 3, 8, 8))
    goes_through(graph, X)
    return graph


@accepts("tied weights, one module used several times, parameter lists, lazy layers that have run")
def _(_: Path) -> None:
    one = nn.Conv2d(8, 8, 1)
    other = nn.Conv2d(8, 8, 1)
    other.weight = one.weight
    graph = as_it_is(lambda net, x: net.other(net.one(net.one(x))), one=one, other=other)
    assert sum(one.shape == (8, 8, 1, 1) for one in graph.parameters()) == 1
    rows = nn.ParameterList([nn.Parameter(torch.rand(8, 1, 1)) for _ in range(2)])
    as_it_is(lambda net, x: x * net.rows[0] + net.rows[1], rows=rows)
    lazy = nn.LazyConv2d(8, 1)
    lazy(torch.randn(1, 8, 4, 4))
    as_it_is(lambda net, x: net.lazy(x), lazy=lazy)


@accepts("names that a graph can't have: `in`, `class`, `graph`, `skip 1`")
def _(folder: Path) -> None:
    names = {"in": "in_", "class": "class_", "graph": "graph_", "skip 1": "skip_1", "__x": "_x", "a-b": "a-b"}
    parts = nn.ModuleDict({name: nn.Conv2d(8, 8, 1) for name in names})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.inside, self.head = nn.Parameter(torch.rand(8, 1, 1)), parts, Net()
            self.graph = nn.DataParallel(nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            features = self.head.body(self.graph(x)) * self.code
            for part in self.inside.values():
                features = part(features).relu()
            return self.head.head(features.mean((2, 3)))

    model = Named().eval()
    graph = rarefy.capture(model, X)
    spelled = names | {"graph": "graph"}  # which is taken at the top alone
    assert {f"inside.{name}.weight" for name in spelled.values()} | {"graph_.weight", "code_"} <= set(
        graph.state_dict()
    )
    answers(graph, model, X)
    goes_through(graph, X)
    rarefy.save(graph, folder / "saved")
    answers(load(str(folder / "saved")).model, model, X)
    both = nn.Sequential(OrderedDict([("a b", nn.Conv2d(3, 8, 3)), ("a_b", nn.Conv2d(8, 8, 3))]))
    refused("a b.weight and a_b.weight would both be a_b.weight", lambda: rarefy.capture(both, X))


@accepts("graphs of `torch.fx`, feature extractors of torchvision")
def _(_: Path) -> None:
    plain = nn.Sequential(OrderedDict(body=nn.Conv2d(3, 8, 3), head=nn.ReLU()))
    traced = torch.fx.symbolic_trace(plain)
    vars(traced).pop("meta")  # as torchvision's
    answers(rarefy.capture(traced, X), plain, X)
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    features = extraction.create_feature_extractor(Net().eval(), {"body.2": "low", "head": "high"})
    graph = rarefy.capture(features, X)
    with torch.no_grad():
        torch.testing.assert_close(graph(X), features(X))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid()))


@accepts("hooks, `torch.autograd.Function`, checkpointing, parts traced by `torch.jit.trace`")
def _(_: Path) -> None:
    hooked = nn.Conv2d(8, 8, 1)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    as_it_is(lambda net, x: Swish.apply(net.hooked(x)), hooked=hooked)
    again = torch.utils.checkpoint.checkpoint
    as_it_is(lambda net, x: again(net.part, x, use_reentrant=False), part=nn.Conv2d(8, 8, 1))
    as_it_is(lambda net, x: net.traced(x), traced=torch.jit.trace(nn.Conv2d(8, 8, 1), torch.randn(1, 8, 4, 4)))


def changed(net: Any, x: Tensor) -> Tensor:
    x = net.part(x)
    x[:, 0].mul_(2).add_(1)
    x[x < -1] = 0.0
    return x.relu_()


@accepts("changes in place: `relu_`, `x[:, 0] *= 2`, `x[mask] = 0`")
def _(_: Path) -> None:
    as_it_is(changed, part=nn.Conv2d(8, 8, 1))

    def unclear(net: Any, x: Tensor) -> Tensor:
        first = x[:, :1].mul_(2)
        x.add_(1)
        return x + first

    refused("both are read later; write it without in-place", lambda: rarefy.capture(With(unclear).eval(), X))


@accepts("buffers that `forward` writes to")
def _(_: Path) -> None:
    def counted(net: Any, x: Tensor) -> Tensor:
        net.seen.add_(1)
        return x

    model = With(counted)
    model.register_buffer("seen", torch.zeros(1))
    answers(rarefy.capture(model.eval(), X), net(), X)
    assert float(model.seen) == 0


@accepts("`torch.autocast` around a part")
def _(_: Path) -> None:
    def half(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.part(x).float()

    model = With(half, part=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))).eval()
    assert torch.equal(rarefy.capture(model, X)(X), model(X))


@accepts("a model in `train()`, or with its inputs laid out as channels last")
def _(_: Path) -> None:
    model = With(lambda net, x: nn.functional.dropout2d(x, 0.5, net.training)).train()
    graph = rarefy.capture(model, X.to(memory_format=torch.channels_last))
    assert model.training and model.body[1].training
    answers(graph, model.eval(), X)
    assert not torch.equal(graph.train()(X), graph(X))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[0][:, -1])


@accepts("recurrent layers (GRU, LSTM, RNN)")
def _(_: Path) -> None:
    for kind in (nn.GRU, nn.LSTM, nn.RNN):
        steps = torch.randn(4, 6, 8)
        small = rarefy.prune(Recurrent(kind).eval(), inputs=steps, keep=0.5)
        assert records(small)[-1]["facts"]["reached"]["params"] < 0.7 and small(steps).shape == (4, 3)


@accepts("Conv1d and Conv3d")
def _(_: Path) -> None:
    for conv, shape in ((nn.Conv1d, (4, 2, 16)), (nn.Conv3d, (4, 2, 4, 6, 6))):
        torch.manual_seed(0)
        model = nn.Sequential(conv(2, 8, 3), nn.ReLU(), conv(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
        inputs = torch.randn(shape)
        model(inputs)
        graph = rarefy.quantize(rarefy.capture(model.eval(), inputs), batches=[inputs], progress=False)
        assert len(records(graph)[-1]["facts"]["layers"]) == 3


# -- inputs


@accepts("a tensor, an array")
def _(_: Path) -> None:
    for example in (X, X[:1], X.numpy(), X.double().numpy()):
        answers(rarefy.capture(net(), example), net(), X)


@accepts("a shape")
def _(_: Path) -> None:
    answers(rarefy.capture(net(), (3, 8, 8)), net(), X)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.table, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.Linear(16, 5)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.image(image)).mean((2, 3)), torch.relu(self.table(table))], 1))


@accepts("several")
def _(folder: Path) -> None:
    pair = (X, torch.randn(4, 4))
    graph = rarefy.capture(Two().eval(), pair)
    answers(graph, Two().eval(), *pair)
    goes_through(graph, *pair)
    assert rarefy.export(graph, folder / "two.onnx", inputs=pair)["passed"]


@accepts("by name")
def _(_: Path) -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    graph, model = rarefy.capture(Words().eval(), inputs), Words().eval()
    mask = torch.randint(0, 2, IDS.shape)
    wanted = model(IDS, mask, use_cache=False)["logits"]
    torch.testing.assert_close(graph(attention_mask=mask, input_ids=IDS)["logits"], wanted)


@accepts("a constant among them")
def _(_: Path) -> None:
    graph = rarefy.capture(Words().eval(), {"input_ids": IDS, "use_cache": False})
    assert list(graph(IDS)) == ["logits"]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        x = x / 255 if x.dtype == torch.uint8 else x
        x = x if mask is None else torch.where(mask, x, 0.0)
        return self.net(x) if scale is None else self.net(x) * scale


@accepts("optional ones")
def _(_: Path) -> None:
    model, scale = Masked().eval(), torch.rand(4, 1)
    answers(rarefy.capture(model, (X, None)), model, X)
    wanted = model(X, scale=scale)
    torch.testing.assert_close(rarefy.capture(model, {"x": X, "scale": scale})(X, scale), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rarefy.capture(model, (X, None, scale))(X, scale), wanted, atol=1e-4, rtol=1e-4)


@accepts("bool masks, int64, uint8")
def _(_: Path) -> None:
    model, mask = Masked().eval(), torch.rand(4, 1, 8, 8) > 0.5
    answers(rarefy.capture(model, (X, mask)), model, X, mask)
    answers(rarefy.capture(model, PICTURES), model, PICTURES)
    assert rarefy.capture(model, PICTURES).meta["inputs"][0]["dtype"] == "uint8"


@accepts("lists and dictionaries of tensors, of several sizes")
def _(_: Path) -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, images: list[Tensor], more: dict[str, Tensor]) -> list[Tensor]:
            return [self.net(x) for x in (*images, more["last"])]

    model, large = Sides().eval(), torch.randn(4, 3, 12, 12)
    graph = rarefy.capture(model, ([X, large], {"last": X}))
    for one, other in zip(graph(X, large, X), model([X, large], {"last": X}), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


class Sized(Net):
    """Reads its input's size in forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu()
        return self.head(y.sum((2, 3)) / (y.shape[2] * y.shape[3]))


@accepts("another height and width than the example's")
def _(_: Path) -> None:
    larger = torch.randn(2, 3, 12, 10)
    answers(rarefy.capture(net(), X), net(), larger)  # nothing of it reads a size
    sized = Sized().eval()
    graph = rarefy.capture(sized, X)
    with torch.no_grad():
        try:
            got = graph(larger)
        except RarefyError as error:
            assert "\n" not in str(error)
        else:
            torch.testing.assert_close(got, sized(larger), atol=1e-4, rtol=1e-4)


# -- outputs


@accepts("a tensor, a tuple, a list")
def _(_: Path) -> None:
    for kind in (tuple, list):
        model = Net(lambda logits, features, kind=kind: kind((logits, features))).eval()
        got = rarefy.capture(model, X)(X)
        assert type(got) is kind and len(got) == 2


@accepts("a dictionary, a dataclass, a ModelOutput")
def _(_: Path) -> None:
    makers: list[Callable[[Tensor, Tensor], Any]] = [
        lambda logits, features: {"logits": logits, "features": features},
        lambda logits, features: Answer(logits),
        lambda logits, features: ModelOutput(logits=logits),
    ]
    for answer in makers:
        judged(Net(answer).eval(), task_of())


@accepts("several, of which one is the classifier's")
def _(_: Path) -> None:
    judged(Net(lambda logits, features: {"features": features, "scores": logits}).eval(), task_of(output="scores"))


@accepts("states of a recurrent layer, numbers, names, None among them")
def _(folder: Path) -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.GRU(8, 4, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> dict[str, Any]:
            steps, states = self.steps(x)
            return {"logits": steps[:, -1], "states": states, "kind": "gru", "loss": None, "count": 2}

    graph, steps = rarefy.capture(States().eval(), torch.randn(4, 6, 8)), torch.randn(3, 6, 8)
    got = graph(steps)
    assert got["states"].shape == (2, 3, 4) and (got["kind"], got["loss"], got["count"]) == ("gru", None, 2)
    assert rarefy.export(graph, folder / "states.onnx", inputs=steps)["passed"]


@accepts("one logit")
def _(_: Path) -> None:
    judged(Net(classes=1).eval(), task_of(torch.arange(12) % 2))


@accepts("probabilities (softmax or sigmoid inside)")
def _(_: Path) -> None:
    judged(Net(lambda logits, features: logits.softmax(1)).eval(), task_of())
    judged(Net(lambda logits, features: logits.sigmoid(), classes=1).eval(), task_of(torch.arange(12) % 2))


@accepts("several labels an image")
def _(_: Path) -> None:
    labels = (torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) < 0.6).long()
    task = task_of(labels)
    judged(net(), task)
    assert task.metric().name == "map"


@accepts("maps of pixels, features, boxes")
def _(folder: Path) -> None:
    model = Net(lambda logits, features: (features, [features.mean(1)])).eval()
    small = rarefy.prune(rarefy.capture(model, X), keep=0.5)
    integer = rarefy.quantize(small, batches=[X], progress=False)
    assert rarefy.export(integer, folder / "maps.onnx", inputs=X)["passed"]


# -- a checkpoint


def state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {name: torch.rand_like(one) if one.is_floating_point() else one for name, one in net().state_dict().items()}


def under(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state().items()}


def loads(folder: Path, *contents: object, suffix: str = "") -> None:
    for content in contents:
        torch.save(content, folder / "file.pth")
        model = net()
        load_weights(model, f"{folder / 'file.pth'}{suffix}")
        assert all(torch.equal(value, state()[name]) for name, value in model.state_dict().items())


@accepts("a state dict")
def _(folder: Path) -> None:
    loads(folder, state())
    save_file(state(), folder / "file.safetensors")
    model = net()
    load_weights(model, folder / "file.safetensors")
    assert torch.equal(model.head.weight, state()["head.weight"])


@accepts("weights in several files")
def _(folder: Path) -> None:
    parts = {"a.safetensors": {}, "b.safetensors": {}}  # type: dict[str, dict[str, Tensor]]
    for index, (name, value) in enumerate(state().items()):
        parts[list(parts)[index % 2]][name] = value
    for name, part in parts.items():
        save_file(part, folder / name)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(where).replace(chr(39), chr(34))}}}')
    model = net()
    load_weights(model, folder / "model.safetensors.index.json")
    assert torch.equal(model.head.weight, state()["head.weight"])


@accepts("Lightning, DDP, FSDP, torch.compile")
def _(folder: Path) -> None:
    lightning = {"state_dict": under("model."), "epoch": 1, "pytorch-lightning_version": "2.1"}
    loads(folder, lightning, under("module."), under("_fsdp_wrapped_module."), under("_orig_mod."))


@accepts("under a key: `model`, `net`, `params`, `state_dict` ...")
def _(folder: Path) -> None:
    loads(folder, *({key: state(), "epoch": 3, "acc": 0.9} for key in ("model", "net", "params", "state_dict")))


@accepts("an average (SWA, EMA)")
def _(folder: Path) -> None:
    plain = {name: torch.zeros_like(value) for name, value in state().items()}
    loads(folder, {"n_averaged": torch.tensor(3), **under("module.")}, {"state_dict": plain, "state_dict_ema": state()})


@accepts("the student of a distiller")
def _(folder: Path) -> None:
    teacher = {f"teacher.{name}": torch.ones(2) for name in state()}
    loads(folder, {**under("student."), **teacher}, suffix="?prefix=student.")
    loads(folder, {**under("student."), **teacher})


# -- a data set


def pictures(*folders: Path, each: int = 5) -> None:
    for folder in folders:
        folder.mkdir(parents=True)
        for index in range(each):
            Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(folder / f"{index}.png")


@accepts("a folder a class")
def _(folder: Path) -> None:
    for train, val in (
        ("train", "val"),
        ("Train", "Test"),
        ("training_set", "test_set"),
        ("images/train", "images/val"),
    ):
        root = folder / train.replace("/", "_")
        pictures(*(root / split / name for split in (train, val) for name in ("cats", "dogs")))
        task = Classification(train=f"imagefolder:{root}", val=f"imagefolder:{root}")
        assert task.class_names == ("cats", "dogs") and task.data.length("val") == 10


@accepts("one lone `train`, or classes alone")
def _(folder: Path) -> None:
    pictures(*(folder / "lone" / "train" / name for name in ("cats", "dogs")), folder / "bare/a", folder / "bare/b")
    for root in ("lone", "bare"):
        task = Classification(train=f"imagefolder:{folder / root}", val=f"imagefolder:{folder / root}")
        assert task.classes == 2 and (task.data.length("train"), task.data.length("val")) == (8, 2)


@accepts("pictures without labels")
def _(folder: Path) -> None:
    pictures(folder / "unlabelled")
    task = Classification(train=f"images:{folder / 'unlabelled'}", size=8)
    graph = rarefy.capture(net(), X)
    assert records(rarefy.quantize(graph, task, images=5, progress=False))
    rarefy.distill(graph, graph, task, epochs=1, batch_size=5, hard_weight=0.0, progress=False)


@accepts("arrays and tensors")
def _(_: Path) -> None:
    arrays = (PICTURES, PICTURES.permute(0, 2, 3, 1).numpy(), PICTURES / 255)
    batches = [next(iter(Classification(val=(one, LABELS)).data.batches("val", 12)))[0] for one in arrays]
    assert (
        all(torch.allclose(one, batches[0], atol=1e-5) for one in batches)
        and batches[0].shape == X[:1].expand(12, 3, 8, 8).shape
    )
    assert Classification(val=(PICTURES[:, 0], LABELS)).data.input_shape == (1, 8, 8)


@accepts("whole numbers of another type")
def _(_: Path) -> None:
    for dtype in (np.int64, np.uint16, np.int32):
        task = Classification(val=(PICTURES.numpy().astype(dtype), LABELS))
        assert torch.equal(
            next(iter(task.data.batches("val", 12)))[0], next(iter(task_of().data.batches("val", 12)))[0]
        )


@accepts("pictures that EXIF marks as turned")
def _(folder: Path) -> None:
    mark = Image.Exif()
    mark[0x0112] = 6
    for index in range(3):
        (folder / f"c{index}").mkdir()
        lying = Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
        lying.save(folder / f"c{index}" / "a.jpg", **({"exif": mark} if index < 2 else {}))
    fitted = fit(Source("mine:net", net()), Classification(val=f"imagefolder:{folder}"), {"val"})
    assert fitted.task.data.input_shape == (3, 8, 12)
    assert "2 pictures looked at are marked as turned (EXIF): read as they lie, not turned" in str(told(fitted))


@accepts("a table of pictures and labels")
def _(folder: Path) -> None:
    pictures(folder / "some")
    files = sorted((folder / "some").iterdir())
    rows = [f"{file.name},{'ab'[place % 2]}" for place, file in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]), encoding="utf-8")
    task = Classification(val=f"csv:{folder / 'labels.csv'}")
    assert task.class_names == ("a", "b") and task.length("val") == len(files)


@accepts("arrays in a file of NumPy")
def _(folder: Path) -> None:
    np.savez(
        folder / "d.npz",
        x_train=PICTURES.numpy(),
        y_train=LABELS.numpy(),
        x_test=PICTURES[:3].numpy(),
        y_test=LABELS[:3],
    )
    task = Classification(train=f"npz:{folder / 'd.npz'}", val=f"npz:{folder / 'd.npz'}")
    assert (task.length("train"), task.length("val"), task.classes) == (12, 3, 3)


@accepts("labels in words")
def _(_: Path) -> None:
    words = [("mouse", "cat", "dog")[label] for label in LABELS.tolist()]
    task = Classification(train=(PICTURES, words), val=(PICTURES[:1], words[:1]))
    assert task.class_names == ("cat", "dog", "mouse")
    assert next(iter(task.data.batches("val", 1)))[1].tolist() == [2]


def both() -> dict[str, object]:
    return {"train": (PICTURES, LABELS), "test": (PICTURES[:3], LABELS[:3])}


@accepts("a function that returns both splits")
def _(_: Path) -> None:
    task = Classification(train=f"{__name__}:both", val=f"{__name__}:both")
    assert (task.length("train"), task.length("val")) == (12, 3)


@accepts("a map-style data set")
def _(folder: Path) -> None:
    pictures(folder / "some")
    files = sorted((folder / "some").iterdir())
    images = [files, [Image.open(file) for file in files], [np.asarray(Image.open(file)) for file in files]]
    for kind in images:
        task = Classification(val=[(image, index % 2) for index, image in enumerate(kind)], size=8)
        assert len(next(iter(task.data.batches("val", 5)))[1]) == 5


@accepts("scikit-learn's digits")
def _(_: Path) -> None:
    pytest.importorskip("sklearn")
    assert Classification(train="sklearn:digits", val="sklearn:digits").classes == 10


@accepts("batches to calibrate on")
def _(_: Path) -> None:
    graph = rarefy.capture(net(), X)
    loader = DataLoader(TensorDataset(X, torch.zeros(4)), 2)
    for batches in ([X], [X.numpy()], [X.double()], [{"pixel_values": X}], [(X, torch.zeros(4))], loader):
        assert records(rarefy.quantize(graph, batches=batches, progress=False))[-1]["facts"]["layers"]


# -- refused


@accepts("a program of TorchScript")
def _(_: Path) -> None:
    refused("TorchScript", lambda: rarefy.capture(torch.jit.trace(net(), X), X))


@accepts("a part in TorchScript that can't be traced")
def _(_: Path) -> None:
    part = torch.jit.script(nn.Conv2d(8, 8, 1))
    refused("part is a program of TorchScript", lambda: rarefy.capture(With(lambda net, x: net.part(x), part=part), X))


@accepts("lazy layers that have not run")
def _(_: Path) -> None:
    lazy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())
    refused(r"lazy layers that have no weights yet \(1\); run it on an example", lambda: rarefy.capture(lazy, X))


@accepts("a batch that `forward` makes a number of")
def _(_: Path) -> None:
    model = With(lambda net, x: x.reshape(int(x.shape[0]), 8, -1, 2))
    refused(r"number of its batch at .*x.shape\[0\] or -1", lambda: rarefy.capture(model, X))


@accepts("a branch or a shape that hangs on the data")
def _(_: Path) -> None:
    changes: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: x if x.mean() > 0 else -x,
        lambda net, x: x.flatten(1)[:, : 8 * int(x.abs().sum() > 0), None, None],
        lambda net, x: torch.from_numpy(x.numpy()),
    ]
    for change in changes:
        text = "test_accepts.py:.*tensor operations, or .*core="
        refused(text, lambda: rarefy.capture(With(change), X))  # noqa: B023


@accepts("an operator that saved graphs don't hold (FFT is one that they do)")
def _(folder: Path) -> None:
    spectrum = rarefy.capture(With(lambda net, x: torch.fft.fft2(x).real).eval(), X)
    answers(rarefy.load(rarefy.save(spectrum, folder / "spectrum")), spectrum, X)

    def unpooled(net: Any, x: Tensor) -> Tensor:
        return nn.functional.max_unpool2d(*nn.functional.max_pool2d(x, 2, return_indices=True), 2)

    graph = rarefy.capture(With(unpooled).eval(), X)
    refused(r"max_unpool2d.*export\(\) writes such a graph", lambda: rarefy.save(graph, folder / "unpooled"))
    assert rarefy.export(graph, folder / "unpooled.onnx", inputs=X)["passed"]


@accepts("bfloat16 in an ONNX file")
def _(folder: Path) -> None:
    def half(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.part(x).float()

    graph = rarefy.capture(With(half, part=nn.Conv2d(8, 8, 1)).eval(), X)
    refused("without torch.autocast", lambda: rarefy.export(graph, folder / "half.onnx", inputs=X))


@accepts("a cache among the answers (GPT-2)")
def _(_: Path) -> None:
    refused("use_cache=False", lambda: rarefy.capture(Words().eval(), {"input_ids": IDS}))


@accepts("an example without a batch axis")
def _(_: Path) -> None:
    refused(r"inputs\[None\]", lambda: rarefy.capture(net(), X[0]))


@accepts("a pickled module")
def _(folder: Path) -> None:
    torch.save(nn.Linear(2, 2), folder / "whole.pth")
    refused(r"torch.save\(model.state_dict\(\)", lambda: load_weights(net(), folder / "whole.pth"))


@accepts("a checkpoint of another network")
def _(folder: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pth")
    refused("head|body", lambda: load_weights(net(), folder / "other.pth"))


@accepts("several outputs and none called logits")
def _(_: Path) -> None:
    model = Net(lambda logits, features: {"features": features, "scores": logits}).eval()
    refused("features, scores", lambda: rarefy.evaluate(rarefy.capture(model, X), task_of(), progress=False))


@accepts("a label without an output")
def _(_: Path) -> None:
    refused("at least 4 outputs", lambda: rarefy.evaluate(net(), task_of(torch.arange(12) % 4), progress=False))


@accepts("a folder without pictures")
def _(folder: Path) -> None:
    (folder / "empty").mkdir()
    task = Classification(val=f"imagefolder:{folder / 'empty'}")
    refused("one folder a class", lambda: task.data.length("val"))


@accepts("calibration batches with NaN")
def _(_: Path) -> None:
    graph = rarefy.capture(net(), X)
    refused("finite|NaN", lambda: rarefy.quantize(graph, batches=[torch.full_like(X, float("nan"))], progress=False))


@accepts("calibration batches of whole numbers for a network of floats")
def _(_: Path) -> None:
    graph = rarefy.capture(net(), X)
    refused(re.escape(".float() / 255"), lambda: rarefy.quantize(graph, batches=[PICTURES], progress=False))


@accepts("an operator of ONNX without a rule")
def _(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    made = onnx.helper
    node = made.make_node("Det", ["x"], ["y"])
    info = [made.make_tensor_value_info(name, 1, shape) for name, shape in (("x", ["n", 3, 3]), ("y", ["n"]))]
    graph = made.make_graph([node], "g", info[:1], info[1:])
    onnx.save(made.make_model(graph, opset_imports=[made.make_opsetid("", 17)]), folder / "det.onnx")
    refused("Det.*extract_model", lambda: load(str(folder / "det.onnx")))


@accepts("half precision to be quantised")
def _(_: Path) -> None:
    graph = rarefy.capture(net().half(), X.half())
    refused(r"float\(\)", lambda: rarefy.quantize(graph, batches=[X.half()], progress=False))


# -- boxes


def detecting(**options: Any) -> tuple[Tensor, Tensor]:
    task = Detection(detector="yolox:classes=3,size=32/32", augment="none", **options)
    return next(iter(task.batches("val", 4)))


def holds_the_box(targets: Tensor, kind: int = 0) -> None:
    assert targets[0, 0, 4] == kind and torch.allclose(targets[0, 0, :4] / (32 / 40), torch.tensor([8.0, 6, 20, 15]))


@accepts("boxes as COCO has them")
def _(folder: Path) -> None:
    holds_the_box(detecting(val=boxed.coco(folder, {"a.png": [(8, 6, 20, 15, 1)]})[0])[1], 1)


@accepts("boxes as YOLO has them")
def _(folder: Path) -> None:
    holds_the_box(detecting(val=boxed.yolo(folder, {"val/a.png": ["0 0.35 0.35 0.3 0.3"]}))[1])
    polygon = "0 0.2 0.2 0.5 0.2 0.5 0.5 0.2 0.5"
    holds_the_box(detecting(val=boxed.yolo(folder / "polygons", {"val/a.png": [polygon]}))[1])


@accepts("boxes as Pascal VOC has them")
def _(folder: Path) -> None:
    holds_the_box(detecting(val=boxed.voc(folder, {"a.png": boxed.voc_object("x", (9, 7, 20, 15))}))[1])


@accepts("boxes of a data set")
def _(folder: Path) -> None:
    class Own:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return Image.new("RGB", (40, 30)), {"boxes": torch.tensor([[8.0, 6, 20, 15]]), "labels": torch.tensor([1])}

    holds_the_box(detecting(val=Own())[1])


@accepts("wrong boxes, with `--strict`")
def _(folder: Path) -> None:
    text = boxed.coco(folder, {"a.png": [(30, 6, 50, 15, 1)]})[0]
    refused("1 boxes that reach out of their picture.*a.png", lambda: detecting(val=text, strict=True))
    assert detecting(val=text)[1][0, 0, 2] == 32


@accepts("boxes for a classifier")
def _(folder: Path) -> None:
    text = boxed.coco(folder, {"a.png": [(8, 6, 20, 15, 1)]})[0]
    refused("--task detection", lambda: Classification(val=text).classes)
