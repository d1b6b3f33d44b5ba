"""No operator of the list does harm, whatever a file gives it: arguments are drawn, and run in processes that may die.

``operator_draws.py`` is what runs there. What happens to a draw is counted; a signal, a wish for more memory than
``load`` allows, an argument that changed, or two answers to one question are faults, and each is told with the words
by which it is drawn again.
"""

import collections
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rarefy.artifact import allowlist
from rarefy.errors import FormatError
from rarefy.kernels import OPERATORS

CHILD = Path(__file__).with_name("operator_draws.py")
DEATHS = 5  # of one operator, after which it is left
STUCK, EACH = 300, 0.05  # seconds of a process, and more of each draw, by the clock: a draw is ended by the processor's


def overloads():
    """Every overload of the list that this torch has, and our own."""
    found = [str(one) for one in OPERATORS]
    for name in allowlist.ATEN:
        _, packet, overload = name.split(".")
        if overload in getattr(getattr(torch.ops.aten, packet, None), "overloads", list)():
            found.append(name)
    return sorted(found)


def survey(names, seed, count, *options):
    """({overload: what happened, how often}, [(overload, draw, fault)])."""
    tally, faults = collections.defaultdict(collections.Counter), []
    left = [(name, 0) for name in names]
    while left:
        given = "".join(f"{name} {first}\n" for name, first in left)
        command = [sys.executable, str(CHILD), str(seed), str(count), *options]
        child = subprocess.run(
            command, input=given, capture_output=True, text=True, check=False, timeout=STUCK + EACH * count * len(left)
        )
        draw = None
        for line in child.stdout.splitlines():
            what, *rest = json.loads(line)
            if what == "draw":
                draw = rest
            elif what == "done":
                tally[draw[0]][rest[0]] += 1
                faults += [(*draw, rest[0])] if rest[0] not in ("ran", "raised", "refused") else []
                draw = None
        if not child.returncode:
            break
        assert draw is not None and child.returncode < 0, child.stderr[-2000:]
        name, index = draw
        faults.append((name, index, signal.Signals(-child.returncode).name))
        place = [one for one, _ in left].index(name)
        again = index + 1 < count and sum(one == name and two.startswith("SIG") for one, _, two in faults) < DEATHS
        left = [(name, index + 1)] * again + left[place + 1 :]
    return tally, faults


def test_every_row_of_the_list_is_an_operator():
    rows = {name.rpartition(".")[0] for name in allowlist.ATEN}
    known = {name.rpartition(".")[0] for name in overloads()}
    assert len(rows - known) <= 3, rows - known  # that an older or a newer torch does not have
    for name in overloads():
        assert not allowlist.function_named(name)._schema.is_mutable, name


def test_every_rule_is_one():
    from rarefy.artifact.operators import rules as shaped

    static = {"statistics", "stored", "none", "formula"}
    for name, rules in allowlist.ATEN.items():
        for argument, rule in rules.items():
            assert rule in static or rule in shaped.RULES or "/" in rule or rule.replace("-", "").isdigit(), (
                name,
                rule,
            )
            if name in overloads():
                schema = allowlist.function_named(name)._schema
                assert argument in {one.name for one in schema.arguments}, (name, argument)


def test_drawn_arguments_do_no_harm():
    tally, faults = survey(overloads(), 0, 6)
    assert not faults, faults
    assert set(tally) == set(overloads())
    ran = [name for name, counts in tally.items() if counts["ran"] or counts["raised"]]
    assert len(ran) > 0.7 * len(tally)  # what is always refused is not tried


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_drawn_arguments_do_no_harm(seed):
    tally, faults = survey(overloads()[seed - 1 :: 8], seed, 400)
    assert not faults, faults
    never = [name for name, counts in tally.items() if not counts["ran"]]
    assert len(never) < 0.05 * len(tally), never


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param("aten._stack.default", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("aten.to.prim_dtype", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("aten.native_batch_norm.default", "changes what it is given", marks=pytest.mark.slow),
        ("aten.instance_norm.default", "changes what it is given"),
        pytest.param("aten.lstm.input", "SIGSEGV", marks=pytest.mark.slow),
        pytest.param("aten.grid_sampler.default", "answers differ", marks=pytest.mark.slow),
        ("aten.zeros.default", "wants memory"),
    ],
)
def test_the_draws_find_what_they_are_for(name, fault):
    """Without the list and its rules, the same draws of operators that do harm (what memory holds is chance: slow)."""
    _, faults = survey([name], 1, 150, "unchecked")
    assert any(found.startswith(fault) for _, _, found in faults), faults


@pytest.mark.parametrize(
    "name",
    [
        "native_batch_norm.default",
        "_native_batch_norm_legit_no_training.default",
        "_batch_norm_no_update.default",
        "_weight_norm.default",
        "to.prim_dtype",
        "to.prim_Device",
        "_stack.default",
        "remainder.int",
        "lcm.default",
        "gcd.int",
        "lstm.data",
        "as_strided.default",
        "multinomial.default",
        "bincount.default",
        "nonzero.default",
        "unique_dim.default",
        "linalg_svd.default",
        "embedding_bag.default",
        "histc.default",
        "item.default",
        "resize.default",
        "set.source_Tensor",
        "empty.memory_format",
        "from_file.default",
        "add.out",
        "relu_.default",
    ],
)
def test_what_does_harm_is_not_in_the_list(name):
    with pytest.raises(FormatError, match="which is not in the list of operators a saved graph may call"):
        allowlist.function_named(f"aten.{name}")
