"""What a graph of a file asks for is known before it runs: sizes, lengths, memory; and lengths again before an LSTM."""

import json
import math
import operator
import time

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.artifact import folder as folder_
from rarefy.artifact import graph_json, snapshot
from rarefy.artifact.operators import trial
from rarefy.errors import FormatError, InputError
from rarefy.evaluation.evaluate import evaluate
from rarefy.graph import nodes
from rarefy.graph.capture import capture
from rarefy.graph.interpreter import run
from rarefy.graph.shapes import shapes
from rarefy.models.load import graph_of, load
from rarefy.tasks.classification import Classification

X = {"node": "x"}


def n(name):
    return {"node": name}


def graph(*calls, tensors=None, shape=(4, 6, 6), dtype="float32"):
    """The graph that a folder with these calls gives: (target, arguments), each named ``n0``, ``n1``, ...; the last is
    returned. tensors: name -> tensor."""
    tensors = tensors or {}
    nodes = [{"op": "placeholder", "name": "x", "target": "x"}]
    nodes += [{"op": "get_attr", "name": f"t_{name}", "target": name} for name in (*tensors, "training")]
    for place, (target, *args) in enumerate(calls):
        nodes.append({"op": "call_function", "name": f"n{place}", "target": target, "args": args})
    nodes.append({"op": "output", "name": "output", "args": [n(f"n{len(calls) - 1}")]})
    entries = {
        name: {
            "kind": "buffer",
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "persistent": True,
        }
        for name, value in tensors.items()
    }
    meta = {"inputs": [{"shape": list(shape), "dtype": dtype}], "core": None}
    text = json.dumps({"format": "rarefy", "schema": 1, "meta": meta, "nodes": nodes, "tensors": entries})
    return graph_json.build(graph_json.read(text.encode(), "graph.json"), tensors, "graph.json")


def refused(words, *calls, **kwargs):
    with pytest.raises(FormatError, match=words) as refusal:
        graph(*calls, **kwargs)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("graph.json: ")
    assert any(named.search(str(refusal.value)) for named in snapshot.REFUSALS.values()), "docs/format.md has no name"


def test_a_good_graph_is_built_and_runs():
    made = graph(("aten.relu.default", X), ("aten.add.Tensor", n("n0"), 1))
    x = torch.randn(5, 4, 6, 6)
    assert torch.equal(made(x), x.relu() + 1)


SHORT = {"w": torch.ones(3), "m": torch.zeros(4)}
TRAINING = {"node": "t_training"}


@pytest.mark.parametrize(
    "args",
    [
        (X, n("t_w"), None, n("t_m"), n("t_m"), False, 0.1, 1e-5, False),
        (X, None, n("t_w"), n("t_m"), n("t_m"), False, 0.1, 1e-5, False),
        (X, None, None, n("t_w"), n("t_m"), False, 0.1, 1e-5, False),
        (X, None, None, n("t_m"), n("t_w"), TRAINING, 0.1, 1e-5, False),
    ],
)
def test_lengths_of_batch_norm_are_those_of_the_channels(args):
    refused("batch_norm.default does not run on an example", ("aten.batch_norm.default", *args), tensors=SHORT)


def test_statistics_are_written_in_training_alone_and_into_the_graphs_own():
    def call(mean, training):
        return ("aten.batch_norm.default", X, None, None, mean, n("t_m") if mean else None, training, 0.1, 1e-5, False)

    graph(call(n("t_m"), TRAINING), tensors=SHORT)
    graph(call(n("t_m"), False), tensors=SHORT)
    graph(call(None, True))
    refused("training must be false or the module's training flag", call(n("t_m"), True), tensors=SHORT)
    computed = ("aten.mul.Tensor", n("t_m"), 2)
    refused("running_mean must be stored tensors", computed, call(n("n0"), TRAINING), tensors=SHORT)


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        (
            "running_mean must be left out",
            [("aten.instance_norm.default", X, None, None, n("t_m"), n("t_m"), False, 0.1, 1e-5, False)],
        ),
        ("does not run", [("aten.group_norm.default", X, 2, n("t_w"), None, 1e-5, False)]),
        ("does not run", [("aten.layer_norm.default", X, [6], n("t_w"), None, 1e-5, False)]),
        ("does not run", [("aten.layer_norm.default", X, [5], None, None, 1e-5, False)]),
        ("does not run", [("aten.linear.default", X, n("t_w"), None)]),
        ("does not run", [("aten.prelu.default", X, n("t_w"))]),
        ("does not run", [("aten.add.Tensor", X, n("t_w"))]),
        ("does not run", [("aten.cat.default", [X, n("t_w")], 0)]),
        ("does not run", [("aten.view.default", X, [7, 7])]),
        ("interpolation_mode must be a number from 0 to 2", [("aten.grid_sampler.default", X, X, 255, 0, False)]),
        ("lacks its argument 'rounding_mode'", [("aten.div.Scalar_mode", X, 2)]),
        ("equation must be a formula of at most two tensors", [("aten.einsum.default", "i,j,k->ijk", [X, X, X])]),
        ("equation must be str", [("aten.einsum.default", "i\n->i", [X])]),
        ("self must be Tensor, not 3", [("aten.relu.default", 3)]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(words, calls):
    refused(words, *calls, tensors=SHORT)


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        ("needs .* bytes for two samples", [("aten.repeat.default", X, [1000, 100, 10, 10])]),
        ("needs .* bytes for two samples", [("aten.zeros.default", [2**30])]),
        (
            "needs .* bytes for two samples",
            [("aten.repeat.default", X, [100, 10, 1, 1]), ("aten.repeat.default", n("n0"), [1000, 1, 1, 1])],
        ),
        ("needs .* bytes for two samples", [("aten.pad.default", X, [9000, 9000, 9000, 9000])]),
        ("needs .* bytes for two samples", [("aten.adaptive_avg_pool2d.default", X, [30000, 30000])]),
        ("needs .* bytes for two samples", [("aten.upsample_nearest2d.vec", X, [30000, 30000], None)]),
        (
            "query needs .* bytes",
            [
                ("aten.repeat.default", X, [1, 1, 4000, 1]),
                ("aten.scaled_dot_product_attention.default", n("n0"), n("n0"), n("n0")),
            ],
        ),
        (
            "self needs .* bytes",
            [
                ("aten.reshape.default", X, [-1, 1, 1, 144]),
                ("aten.expand.default", n("n0"), [2, 3000, 1, 144]),
                ("aten.reshape.default", X, [1, -1, 144, 1]),
                ("aten.expand.default", n("n2"), [3000, 2, 144, 1]),
                ("aten.unsqueeze.default", n("n1"), 0),
                ("aten.unsqueeze.default", n("n3"), 2),
                ("aten.matmul.default", n("n4"), n("n5")),
            ],
        ),
        (
            "weight needs .* bytes",
            [
                ("aten.pad.default", X, [1000, 1000, 1000, 1000]),
                ("aten.conv2d.default", n("n0"), n("t_k"), None, [1, 1], [0, 0], [1, 1], 1),
            ],
        ),
        (
            "split_size makes more than 4096 tensors",
            [("aten.zeros.default", [100000]), ("aten.split.Tensor", n("n0"), 1)],
        ),
        ("dim makes more than 4096 tensors", [("aten.zeros.default", [100000]), ("aten.unbind.int", n("n0"), 0)]),
        ("chunks is above 4096", [("aten.zeros.default", [100000]), ("aten.chunk.default", n("n0"), 50000, 0)]),
        ("size must be List", [("aten.zeros.default", [1] * 5000)]),
        ("more than 16 axes", [("aten.zeros.default", [1] * 17)]),
    ],
)
def test_memory_is_bounded(words, calls):
    refused(words, *calls, tensors={"k": torch.zeros(1, 4, 30, 30)})


def test_memory_is_held_not_made():
    """A chain of large values, of which two are held at a time, passes; holding them all does not."""
    large = ("aten.repeat.default", X, [50, 10, 10, 10])
    chain = [large, *[("aten.relu.default", n(f"n{place}")) for place in range(8)]]
    graph(*chain)
    chain.append(("aten.stack.default", [n(f"n{place}") for place in range(9)]))
    refused("n[0-9] needs|needs .* bytes", *chain)


def test_a_large_file_may_hold_more():
    calls = [("aten.repeat.default", X, [1, 1, 400, 400])]
    size = 2 * 4 * 2400 * 2400 * 4
    assert size < trial.MOST_HELD
    heavy = {"weight": torch.zeros(2 * 2**20)}
    graph(("aten.repeat.default", X, [1, 1, 700, 700]), tensors=heavy)
    refused("needs", ("aten.repeat.default", X, [1, 1, 700, 700]))
    graph(*calls)


# x (B, 4, 6, 6) beside itself, all with all: (B, B, 4, 6, 6), and three of them
SQUARE = [("aten.unsqueeze.default", X, 0), ("aten.unsqueeze.default", X, 1), ("aten.add.Tensor", n("n0"), n("n1"))]
CUBE = [
    *SQUARE,
    ("aten.unsqueeze.default", n("n2"), 0),
    ("aten.unsqueeze.default", n("n1"), 1),
    ("aten.add.Tensor", n("n3"), n("n4")),
]
# no value grows faster than the batch, but what attention and a broadcast product hold inside does
INSIDE = [
    ("aten.reshape.default", X, [1, 1, -1, 144]),
    ("aten.repeat.default", n("n0"), [1, 8, 1, 1]),
    ("aten.scaled_dot_product_attention.default", n("n1"), n("n1"), n("n1")),
]


@pytest.mark.parametrize(("calls", "fit"), [(SQUARE, 700), (CUBE, 90), (INSIDE, 4100), (SQUARE[:2], 40_000)])
def test_more_samples_than_fit_are_not_run_at_once(calls, fit):
    """Memory that grows faster than the batch: the batch shrinks; what grows as it does stays whole."""
    model = graph(*calls)
    found = trial.samples_within(model, 20_000, 2**28)
    assert fit / 3 < found < fit if fit < 20_000 else found == 20_000
    assert trial.samples_within(model, 2, 2**28) == 2 and trial.samples_within(model, 1, 2**28) == 1


def test_what_no_memory_holds_is_refused_before_it_is_taken(monkeypatch):
    from rarefy.system import memory

    model = graph(*CUBE)
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    with pytest.raises(
        InputError, match=r"a run of the graph on \d+ of its inputs: takes .* GB of memory, .* end other"
    ):
        trial.samples_within(model, 256)
    with pytest.raises(InputError, match="on 256 of its inputs: takes .* pass a smaller batch"):
        trial.check_affordable(model, 256)
    trial.check_affordable(model, 2)
    model.meta["inputs"][0]["shape"] = [2**30]
    with pytest.raises(InputError, match="an example of shape .* capture the model at a smaller size"):
        nodes.example_inputs(model)


@pytest.mark.parametrize("calls", [SQUARE, CUBE, INSIDE])
def test_a_hostile_graph_is_judged_in_parts(calls, monkeypatch):
    """evaluate with a batch of 256, and parity: no run holds more than it may."""
    monkeypatch.setattr(trial.samples_within, "__defaults__", (2**22,))
    model = graph(*calls, ("aten.mean.dim", X, [2, 3]))
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    data = np.random.default_rng(0).integers(0, 256, (300, 4, 6, 6), dtype=np.uint8)
    task = Classification(val=(data, np.arange(300) % 4), mean=0.0, std=1.0)
    found = evaluate(model, task, batch_size=256, progress=False)
    handle.remove()
    assert found.samples == 300 and sum(seen) == 300 and len(seen) > 2
    held = max(trial._tried(model, "", count, math.inf) for count in seen)
    assert held <= max(2**22, trial.GROWTH * trial._tried(model, "", 2, math.inf) * max(seen) / 2)


def test_numbers_computed_from_sizes_have_an_end():
    size = ("aten.sym_size.int", X, 0)
    squared = [("operator.mul", n(f"n{place}"), n(f"n{place}")) for place in range(40)]
    refused("operator.mul makes a number of more than 65536 bits", size, *squared, ("aten.relu.default", X))
    powers = [("operator.pow", n(f"n{place}"), 8) for place in range(8)]
    refused("operator.pow makes a number", size, *powers, ("aten.relu.default", X))
    graph(size, ("operator.sub", n("n0"), 1), *[("operator.mul", n("n1"), 6)] * 3, ("aten.relu.default", X))


def test_whole_numbers_are_not_divided_by_what_may_be_minus_one():
    whole = {
        "tensors": {"w": torch.full((4,), -(2**31), dtype=torch.int32), "o": torch.full((4,), -1, dtype=torch.int32)}
    }
    trunc = [{"node": "t_w"}, {"node": "t_o"}]
    text = "must be a number other than 0 and -1"

    def call(target, *args):
        return {
            "op": "call_function",
            "name": "d",
            "target": target,
            "args": list(args),
            "kwargs": {"rounding_mode": "trunc"},
        }

    def built(*args, mode="trunc"):
        tensors = whole["tensors"]
        nodes = [{"op": "placeholder", "name": "x", "target": "x"}]
        nodes += [{"op": "get_attr", "name": f"t_{name}", "target": name} for name in tensors]
        node = call("aten.div.Tensor_mode" if isinstance(args[1], dict) else "aten.div.Scalar_mode", *args)
        node["kwargs"]["rounding_mode"] = mode
        nodes += [node, {"op": "output", "name": "output", "args": [n("d")]}]
        entry = {"kind": "buffer", "dtype": "int32", "shape": [4], "persistent": True}
        meta = {"inputs": [{"shape": [4], "dtype": "float32"}], "core": None}
        value = {
            "format": "rarefy",
            "schema": 1,
            "meta": meta,
            "nodes": nodes,
            "tensors": dict.fromkeys(tensors, entry),
        }
        return graph_json.build(graph_json.read(json.dumps(value).encode(), "g"), tensors, "g")

    for args in (trunc, (trunc[0], -1), (trunc[0], 0)):
        with pytest.raises(FormatError, match=text):
            built(*args)
    built(trunc[0], 7)
    built(trunc[0], trunc[1], mode="floor")
    built(trunc[0], X)  # a float among them: the answer is one


# ----------------------------------------------------------------------------------------------------------------- LSTM


class Remembers(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.LSTM(4, 5, batch_first=True, **options)
        self.last = nn.Linear(self.layer(torch.zeros(1, 2, 4))[0].shape[-1], 3)

    def forward(self, x):
        return self.last(self.layer(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}, {"proj_size": 2}])
def test_an_lstm_comes_back(options, tmp_path):
    made = capture(Remembers(**options).eval(), torch.zeros(2, 7, 4))
    loaded = folder_.load(folder_.save(made, tmp_path / "model"))
    for batch in (1, 5):
        x = torch.randn(batch, 7, 4)
        assert torch.equal(made(x), loaded(x))
    assert {str(key): value.shape for key, value in shapes(loaded).items() if hasattr(value, "shape")}


def lstm(weights, x="x", states="h"):
    flags = (True, 1, 0.0, False, False, True)
    return ("aten.lstm.input", n(x), [n(f"t_{states}"), n(f"t_{states}")], [n(f"t_{name}") for name in weights], *flags)


STATE = torch.zeros(1, 2, 3)
WEIGHTS = {"a": torch.zeros(12, 6), "b": torch.zeros(12, 3), "c": torch.zeros(12), "h": STATE}


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": torch.zeros(12, 2)},
        {"a": torch.zeros(8, 6)},
        {"a": torch.zeros(12)},
        {"b": torch.zeros(12, 2)},
        {"b": torch.zeros(4, 3)},
        {"c": torch.zeros(2)},
        {"h": torch.zeros(1, 1, 3)},
        {"h": torch.zeros(1, 2, 2)},
        {"h": torch.zeros(2, 3)},
        {"a": torch.zeros(12, 6, dtype=torch.float64)},
    ],
)
def test_short_weights_of_an_lstm_are_refused(wrong):
    graph(lstm("abcc"), shape=(4, 6), tensors=WEIGHTS)
    refused("an LSTM", lstm("abcc"), shape=(4, 6), tensors=WEIGHTS | wrong)


def test_too_few_weights_of_an_lstm_are_refused():
    refused("takes 4 weights, not 2", lstm("ab"), shape=(4, 6), tensors=WEIGHTS)


def test_sizes_that_follow_from_the_batch_are_compared_when_it_runs():
    """Right for the two samples of the trial; for any other number the weight would be too short, or the state."""
    wide = graph(
        ("aten.reshape.default", X, [2, 1, -1]), lstm("abcc", x="n0"), ("operator.getitem", n("n1"), 0),
        shape=(6,), tensors=WEIGHTS,
    )  # fmt: skip
    assert wide(torch.zeros(2, 6)).shape == (2, 1, 3)
    for call in (wide, lambda x: run(wide, (x,)), lambda x: wide(x=x), torch.no_grad()(wide)):
        for _ in range(2):
            with pytest.raises(InputError, match="an LSTM takes .* can't be run on inputs of this shape"):
                call(torch.zeros(8, 6))
    many = graph(lstm("abcc"), ("operator.getitem", n("n0"), 0), shape=(4, 6), tensors=WEIGHTS)
    with pytest.raises(InputError, match="an LSTM takes"):
        many(torch.zeros(5, 4, 6))


# ------------------------------------------------------------------------------- what capture writes in another form


def test_instance_norm_with_statistics_is_batch_norm(tmp_path):
    """torch's operator writes them back; in eval mode the two are one formula."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    before = model[1].running_mean.clone()
    made = folder_.load(folder_.save(capture(model, torch.zeros(2, 3, 8, 8)), tmp_path / "model"))
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(made(x), model(x), atol=1e-6)
    assert torch.equal(dict(made.named_buffers())["1.running_mean"], before)
    made.train()(x)  # as in the model, statistics that are given are not gathered
    assert torch.equal(dict(made.named_buffers())["1.running_mean"], before)


def test_a_decomposed_export_is_saved(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.ConvTranspose2d(4, 2, 3)
    ).eval()
    model[1].running_mean.normal_()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch).run_decompositions()
    torch.export.save(exported, tmp_path / "model.pt2")
    made = graph_of(load(str(tmp_path / "model.pt2")))
    assert not any("no_training" in str(node.target) for node in made.graph.nodes)
    loaded = folder_.load(folder_.save(made, tmp_path / "model"))
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(x), exported.module()(x))


def test_an_and_of_masks_is_saved(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return torch.where((x > 0) & (x < 1) | (x > 2), x, 0.0)

    made = capture(Masked(), torch.zeros(2, 5))
    x = torch.randn(3, 5)
    assert torch.equal(folder_.load(folder_.save(made, tmp_path / "model"))(x), made(x))


def test_arithmetic_on_sizes_is_known_by_name():
    assert trial._NAME_OF[operator.mul] == "operator.mul"


@pytest.mark.parametrize(
    ("dtype", "stride", "width", "passes"),
    [
        ("bfloat16", 3, 4, False),
        ("bfloat16", 3, 6, False),
        ("bfloat16", 3, 7, True),  # two columns
        ("bfloat16", 1, 4, True),
        ("float32", 3, 4, True),
        ("float16", 3, 4, True),
    ],
)
def test_a_convolution_that_some_cpus_misread_is_refused(dtype, stride, width, passes):
    """bfloat16, one column behind a stride: AMX's kernel answers with memory that was never written (torch 2.14)."""
    weight = torch.randn(4, 4, 3, 4).to(getattr(torch, dtype))
    call = ("aten.conv2d.default", X, n("t_w"), None, [1, stride])
    given = {"tensors": {"w": weight}, "shape": (4, 8, width), "dtype": dtype}
    if passes:
        graph(call, **given)
    else:
        refused("in bfloat16 answers with memory that was never written.*save the model in float32", call, **given)


@pytest.mark.parametrize(
    ("shape", "kernel", "places", "dtype", "words"),
    [
        ((3, 1, 8), (8, 3, 2, 2), ([1, 2], [2, 2], [3, 3]), "bfloat16", "meets nothing but padding"),
        ((3, 1, 8), (8, 3, 2, 2), ([1, 2], [2, 2], [3, 3]), "float32", ""),
        ((3, 1, 8), (8, 3, 3, 2), ([1, 2], [2, 2], [2, 3]), "bfloat16", ""),  # the middle row is met
        ((4, 8, 1), (16, 4, 1, 1), ([1, 2], [0, 1], [1, 1]), "float16", "meets nothing but padding"),
        ((4, 8, 1), (16, 4, 1, 1), ([1, 1], [0, 1], [1, 1]), "float16", ""),
        ((3, 1, 8, 8), (16, 3, 2, 2, 2), ([1, 1, 1], [1, 0, 0], [1, 1, 1]), "bfloat16", "never written"),
        ((3, 2, 8, 8), (16, 3, 2, 2, 2), ([1, 1, 1], [1, 0, 0], [1, 1, 1]), "bfloat16", ""),
        ((3, 1, 8, 8), (16, 3, 1, 2, 2), ([1, 1, 1], [1, 0, 0], [1, 1, 1]), "bfloat16", ""),
        ((3, 1), (4, 3, 1), ([2], [1], [1]), "float16", "meets nothing but padding"),
        ((3, 4), (4, 3, 400), ([1], [198], [1]), "float16", "meets nothing"),  # in the first 128 taps
        ((3, 4), (4, 3, 3), ("same", [2]), "float16", ""),
        ((3, 1), (4, 3, 2), ("same", [2]), "float16", "meets nothing"),
    ],
)
def test_a_convolution_that_ends_the_process_on_some_cpus_is_refused(shape, kernel, places, dtype, words):
    """16-bit numbers, oneDNN's kernels for AMX (torch 2.14): a signal where all of an axis is padding."""
    rank = len(kernel) - 2
    weight = torch.randn(kernel).to(getattr(torch, dtype))
    if places[0] == "same":
        call = (f"aten.conv{rank}d.padding", X, n("t_w"), None, [1] * rank, "same", places[1])
    else:
        call = (f"aten.conv{rank}d.default", X, n("t_w"), None, *places)
    given = {"tensors": {"w": weight}, "shape": shape, "dtype": dtype}
    if words:
        refused(f"in {dtype} .*{words}.*save the model in float32", call, **given)
    else:
        graph(call, **given)


@pytest.mark.parametrize(
    ("padding", "dilation", "fits"), [([1, 0], [3, 1], False), ([0, 0], [3, 1], True), ([1, 0], [1, 1], True)]
)
def test_a_transposed_convolution_that_writes_padding_alone_is_refused(padding, dilation, fits):
    weight = torch.randn(4, 5, 3 if dilation[0] == 1 else 2, 1).bfloat16()
    call = ("aten.conv_transpose2d.input", X, n("t_w"), None, [1, 1], padding, [0, 0], 1, dilation)
    given = {"tensors": {"w": weight}, "shape": (4, 1, 4), "dtype": "bfloat16"}
    if fits:
        graph(call, **given)
    else:
        refused("in bfloat16 meets nothing but padding", call, **given)


@pytest.mark.parametrize(
    ("size", "scales", "fits"),
    [
        ([12, 9], [2.0, 1.5], True),
        ([12, 9], [None, None], True),
        ([4, 6], [0.7, 1.0], True),
        ([5, 5], [1.0, 1.7], False),
        ([5, 5], [5e-324, None], False),
        ([5, 5], [None, -1.0], False),
        ([5, 5], [math.inf, None], False),
        ([5, 5], [math.nan, None], False),
    ],
)
@pytest.mark.parametrize("name", ["upsample_nearest2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d"])
def test_scales_that_are_not_the_sizes_are_refused(name, size, scales, fits):
    """torch reads at places times scale, whatever the sizes are."""
    given = [{"float": str(one)} if isinstance(one, float) and not math.isfinite(one) else one for one in scales]
    call = (f"aten.{name}.default", X, size, *([] if "nearest" in name else [False]), *given)
    if fits:
        graph(call)
    else:
        refused("output_size is .* where a scale of|must be|no number", call)


def test_operators_on_shapes_of_their_own_have_an_end(monkeypatch):
    monkeypatch.setattr(trial, "MOST_KINDS", 20)
    graph(*[("aten.exp.default", X)] * 50)
    refused(
        "node n20: .* too large a network: over 20 operators on shapes of their own",
        *[("aten.clamp.default", X, 0, place) for place in range(50)],
    )


def test_lists_of_tensors_are_gone_through_a_bounded_number_of_times(monkeypatch):
    monkeypatch.setattr(trial, "MOST_PIECES", 200)
    split = ("aten.split.Tensor", X, 1, 2)  # six tensors
    joined = ("aten.cat.default", n("n0"), 2)
    graph(split, *[joined] * 25)
    graph(split, *[("operator.getitem", n("n0"), place % 6) for place in range(300)])
    refused("node n28: .* too large a network: its lists hold over 200 tensors together", split, *[joined] * 35)
    refused("node n28: .* its lists hold over 200", *[split] * 35)


def test_items_of_a_long_list_cost_nothing():
    begin = time.process_time()
    graph(
        ("aten.repeat.default", X, [1, 1, 1, 600]),
        ("aten.split.Tensor", n("n0"), 1, 3),
        *[("operator.getitem", n("n1"), place % 3600) for place in range(10_000)],
    )
    assert time.process_time() - begin < 8  # a minute where each goes through the list


def test_a_long_sequence_costs_one_step():
    gru = nn.GRU(4, 6, batch_first=True)
    tensors = {f"w{place}": weight.detach() for place, weight in enumerate(gru._flat_weights)} | {
        "h": torch.zeros(1, 2, 6)
    }
    given = [n(f"t_w{place}") for place in range(4)]
    begin = time.process_time()
    call = ("aten.gru.input", X, n("t_h"), given, True, 1, 0.0, False, False, True)
    graph(call, ("operator.getitem", n("n0"), 0), tensors=tensors, shape=(60_000, 4))
    assert time.process_time() - begin < 5  # torch goes through all the steps, a millisecond each


def test_what_fails_among_fake_tensors_is_one_line(monkeypatch, capfd, caplog):
    """torch logs a traceback of its own."""

    def needs_numbers(node, live):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(trial, "shape_of", needs_numbers)
    graph(("aten.exp.default", X))
    refused("does not run on an example", ("aten.expand.default", X, [2, 3]))
    assert not caplog.records and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("group", [2**31 - 1, 2**62])
@pytest.mark.parametrize("name", ["dequantize", "dequantize_fp4"])
def test_a_group_larger_than_the_weight_takes_no_more_than_it(name, group):
    """Each scale is repeated for its group: as often as there are weights, and not as often as a file says."""
    codes = torch.randint(0, 9, (5, 4), dtype=torch.uint8)
    scale = torch.rand(5, 1)
    if name == "dequantize":
        found, again = (
            torch.ops.rarefy.dequantize(codes, scale, torch.zeros(5, 1, dtype=torch.uint8), 1, size)
            for size in (group, 4)
        )
    else:
        block = torch.full((5, 1), 120, dtype=torch.uint8)
        found, again = (torch.ops.rarefy.dequantize_fp4(codes, block, torch.tensor(1.0), size) for size in (group, 4))
    assert torch.equal(found, again)
