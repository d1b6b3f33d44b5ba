"""One interpreter: the module's own answers, values let go after their last reader, and every way to step in."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import fx, nn

from rarefy.graph.capture import capture
from rarefy.graph.interpreter import Resumable, call, in_lockstep, needed, run, steps, values
from rarefy.graph.nodes import operator_name, share_copy

aten = torch.ops.aten


class Small(nn.Module):
    """A list of values (chunk), a value read twice in one node (p * p), one read late (h), a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.a(x)
        p, q = h.chunk(2, 1)
        return {"product": p * p - q, "sum": self.b(h).relu() + h}


@pytest.fixture
def graph() -> fx.GraphModule:
    return capture(Small(), torch.randn(2, 4))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4)


def named(graph: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph.graph.nodes if operator_name(node) == name)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_yields_what_the_module_does_and_shows_every_node_once(graph: fx.GraphModule, x: torch.Tensor) -> None:
    seen: list[tuple[fx.Node, object]] = []
    assert_equal(run(graph, [x], see=lambda node, value: seen.append((node, value))), graph(x))
    assert [node for node, _ in seen] == list(graph.graph.nodes)[:-1]
    shown = dict(seen)
    assert shown[named(graph, "chunk")] == [
        shown[node] for node in graph.graph.nodes if operator_name(node) == "getitem"
    ]
    assert next(value for node, value in seen if node.op == "placeholder") is x
    assert all(value is graph.get_parameter(str(node.target)) for node, value in seen if node.op == "get_attr")


def test_gradients_are_the_callers(graph: fx.GraphModule, x: torch.Tensor) -> None:
    run(graph, [x])["sum"].sum().backward()
    assert graph.get_parameter("a.weight").grad is not None
    with torch.no_grad():
        assert not run(graph, [x])["sum"].requires_grad


def test_a_value_is_let_go_after_its_last_reader_and_a_dead_one_at_once(graph: fx.GraphModule, x: torch.Tensor) -> None:
    relu = named(graph, "relu")
    with graph.graph.inserting_after(relu):
        dead = graph.graph.call_function(aten.neg.default, (relu,))
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    begun: list[fx.Node] = []

    def watch(node: fx.Node, live: object) -> object:
        begun.append(node)
        gc.collect()
        for other in nodes[: nodes.index(node)]:
            if (
                other.name in alive and other is not nodes[nodes.index(node) - 1]
            ):  # the step's own, until the next begins
                due = any(user.op == "output" or nodes.index(user) >= nodes.index(node) for user in other.users)
                assert (alive[other.name]() is not None) == due, f"{other.name} at {node.name}"
        value = call(node, live)  # type: ignore[arg-type]
        if isinstance(value, torch.Tensor) and operator_name(node) != "getitem":
            alive[node.name] = weakref.ref(value)
        return value

    with torch.no_grad():
        run(graph, [x], instead=watch)
    assert begun == nodes and dead in nodes and dead.name in alive


def test_a_rule_may_change_a_value_or_what_a_node_reads(graph: fx.GraphModule, x: torch.Tensor) -> None:
    relu, add = named(graph, "relu"), named(graph, "add")

    def double(node: fx.Node, live: dict[fx.Node, torch.Tensor]) -> object:
        value = call(node, live)
        return 2 * value if node is relu else value

    def without(node: fx.Node, live: dict[fx.Node, torch.Tensor]) -> object:
        return call(node, {**live, relu: torch.zeros_like(live[relu])} if node is add else live)

    with torch.no_grad():
        exact = graph(x)["sum"]
        h = nn.functional.linear(x, graph.get_parameter("a.weight"), graph.get_parameter("a.bias"))
        assert torch.allclose(run(graph, [x], instead=double)["sum"], 2 * exact - h, atol=1e-6)
        assert torch.equal(run(graph, [x], instead=without)["sum"], h)


def test_only_what_values_put_in_place_leave_to_do_runs(graph: fx.GraphModule, x: torch.Tensor) -> None:
    seen: list[str] = []
    h = torch.randn(5, 8)
    linear = named(graph, "linear")
    found = run(graph, [], see=lambda node, _: seen.append(node.name), instead={linear: h})
    assert "x" not in seen and "a_weight" not in seen and seen.count("relu") == 1
    p, q = h.chunk(2, 1)
    assert torch.equal(found["product"], p * p - q)
    assert torch.equal(
        found["sum"], nn.functional.linear(h, graph.get_parameter("b.weight"), graph.get_parameter("b.bias")).relu() + h
    )
    with pytest.raises(TypeError, match="input 'x' is not given"):
        run(graph, [])


@pytest.mark.parametrize("name", ["chunk", "getitem", "relu", "add"])
def test_a_run_stops_anywhere_and_is_continued(graph: fx.GraphModule, x: torch.Tensor, name: str) -> None:
    until = named(graph, name)
    nodes = list(graph.graph.nodes)
    first: list[fx.Node] = []
    rest: list[fx.Node] = []
    live = run(graph, [x], see=lambda node, _: first.append(node), until=until)
    assert first == nodes[: nodes.index(until)]
    assert live.keys() == {node for node in first if any(user not in first for user in node.users)}
    assert_equal(run(graph, [], see=lambda node, _: rest.append(node), instead=live), graph(x))
    assert not {node for node in rest if node not in live} & set(first)
    assert run(graph, [x], until=nodes[0]) == {}


def test_steps_take_a_part_of_a_graph_and_keep_what_they_are_told(graph: fx.GraphModule, x: torch.Tensor) -> None:
    linear, relu = named(graph, "linear"), named(graph, "relu")
    part = needed(list(graph.graph.nodes), [relu], {linear})
    assert linear in part and not any(node.op == "placeholder" or "a." in str(node.target) for node in part)
    assert [node.name for node in part if node.op == "call_function"] == ["linear", "linear_1", "relu"]
    live: dict[fx.Node, object] = {linear: torch.randn(3, 8)}
    assert [node for node, _ in steps(graph, part, live, keep={relu})] == part
    assert live.keys() == {relu}


def test_values_of_an_iterator_leave_the_callers_mode_alone(graph: fx.GraphModule, x: torch.Tensor) -> None:
    names = []
    for node, value in values(graph, [x]):
        assert torch.is_grad_enabled()
        assert node.op == "get_attr" or isinstance(value, list) or not value.requires_grad
        names.append(node.name)
    assert names == [node.name for node in graph.graph.nodes if node.op != "output"]
    begun = values(graph, [x])
    with torch.no_grad():
        next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()


def test_two_graphs_in_lockstep_meet_by_name_and_see_a_change_in_place(graph: fx.GraphModule, x: torch.Tensor) -> None:
    other = share_copy(graph)
    with other.graph.inserting_before(named(other, "relu")):  # a node that the first graph does not have
        other.graph.call_function(aten.neg.default, (named(other, "linear"),))
    met = []
    for name, exact, value in in_lockstep(graph, other, ["linear", "relu", "add"], (x,)):
        met.append(name)
        assert torch.equal(exact, value) == (name != "add")
        if name == "relu":
            value.add_(1)
    assert met == ["linear", "relu", "add"]


def test_a_resumable_run_gives_each_place_its_values_and_never_moves_back(graph: fx.GraphModule) -> None:
    batches = [(torch.randn(size, 4),) for size in (3, 3, 1)]
    for memory in (0, 1000, 10**6):
        resumed = Resumable(graph, batches, memory, torch.device("cpu"))
        for name in ("linear", "relu", "add"):
            node = named(graph, name)
            with torch.no_grad():
                wanted = [dict(values(graph, batch))[node] for batch in batches]
            found = [value for (value,) in resumed.run(node.next, (node,))]
            assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
        place = resumed.at
        assert (place is None) == (memory == 0)
        list(resumed.run(named(graph, "chunk"), ()))
        assert resumed.at is place
