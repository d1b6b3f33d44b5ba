"""The smallest form of a folder: symbols at their entropy, of each tensor what takes the fewest bytes, and back."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from rarefy.artifact import folder as folder_
from rarefy.artifact.coding import joined, rans, text
from rarefy.artifact.words import STORES
from rarefy.errors import FormatError, InputError
from rarefy.graph.capture import capture


def drawn(sizes: list[int], ranges: list[int], seed: int) -> tuple[np.ndarray, list[int], list]:
    draw = np.random.default_rng(seed)
    parts = [np.minimum(draw.geometric(0.4, size) - 1, most - 1).astype(np.uint8) for size, most in zip(sizes, ranges)]
    tables = [rans.frequencies(np.bincount(part, minlength=most)) for part, most in zip(parts, ranges)]
    return np.concatenate([np.empty(0, np.uint8), *parts]), sizes, tables


def coded(symbols: np.ndarray, lengths: list[int], tables: list) -> np.ndarray:
    return np.frombuffer(rans.encode(symbols, lengths, list(range(len(tables))), tables), np.uint8)


runs = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 256)), max_size=5)


@hypothesis.given(runs=runs, seed=st.integers(0, 2**31))
@hypothesis.settings(deadline=None, max_examples=60)
def test_symbols_and_tables_come_back(runs, seed):
    symbols, lengths, tables = drawn([one for one, _ in runs], [one for _, one in runs], seed)
    data = coded(symbols, lengths, tables)
    assert np.array_equal(rans.decode(data, lengths, list(range(len(tables))), tables), symbols)
    whole = rans.written_tables(tables)
    back, position = rans.read_tables(np.frombuffer(whole + b"more", np.uint8), len(tables))
    assert position == len(whole) and all(map(np.array_equal, back, tables))
    assert all(int(table.sum()) == rans.SHARES for table in tables)


def test_it_comes_near_the_entropy_of_each_kind():
    """4 bytes of 4,096 symbols are the columns'; a share of 1/4096 that is wrong by half costs below 0.1 %."""
    draw = np.random.default_rng(0)
    parts = [(draw.random(40_000) < 0.1).astype(np.uint8), draw.integers(0, 9, 40_000).astype(np.uint8)]
    tables = [rans.frequencies(np.bincount(part)) for part in parts]
    shares = [np.bincount(part) / len(part) for part in parts]
    entropy = sum(-(share * np.log2(share)).sum() * 40_000 / 8 for share in shares)
    spent = len(rans.encode(np.concatenate(parts), [40_000, 40_000], [0, 1], tables))
    assert entropy < spent < 1.001 * entropy + 4 * (80_000 / 4096 + 1)


@pytest.mark.parametrize("most", [2, 256])
def test_decoding_takes_memory_in_proportion(most):
    symbols, lengths, tables = drawn([1_000_000], [most], 1)
    data = coded(symbols, lengths, tables)
    tracemalloc.start()
    try:
        found = rans.decode(data, lengths, [0], tables)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, symbols)
    assert peak <= 2.1 * len(symbols) + 1.1 * len(data) + 200_000


def test_golden_bytes():
    """One column: 1 0 1 of shares 1024 and 3072, by the formula."""
    table = np.array([1024, 3072])
    x = 1 << 16
    for symbol in (1, 0, 1):
        f, c = (1024, 0) if symbol == 0 else (3072, 1024)
        x = x // f * 4096 + c + x % f
    assert rans.encode(np.array([1, 0, 1], np.uint8), [3], [0], [table]) == x.to_bytes(4, "little")
    assert rans.written_tables([table]) == bytes([1, 0x80 | 8, 0, 0x80 | 24, 0])


def test_few_bytes_hold_few_symbols():
    zeros, table = np.zeros(10**6, np.uint8), rans.frequencies(np.array([10**6, 0]))
    data = np.frombuffer(rans.encode(zeros, [10**6], [0], [table]), np.uint8)
    assert len(data) == -(-(10**6) // rans.LARGEST_RATIO)
    assert not rans.decode(data, [10**6], [0], [table]).any()
    with pytest.raises(FormatError, match="256 to 1"):
        rans.decode(data, [2**40], [0], [table])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-2], "cut off|end where"),
        (lambda data: np.append(data, np.uint8(0)), "end where"),
        (lambda data: np.append(data, data[-2:]), "end where"),
        (lambda data: np.concatenate((np.zeros(4, np.uint8), data[4:])), "below 65536"),
        (lambda data: np.concatenate((data[:3] ^ np.uint8(1), data[3:])), "cut off|end where"),
        (lambda data: data[:3], "cut off"),
    ],
)
def test_other_streams_are_refused(change, words):
    symbols, lengths, tables = drawn([3000], [16], 0)
    with pytest.raises(FormatError, match=words):
        rans.decode(change(coded(symbols, lengths, tables)), lengths, [0], tables)


@pytest.mark.parametrize(
    "data", [b"", b"\x01", b"\x01\x80", b"\x00\x9f\x7f", b"\x00\x81\x80\x00", b"\x01\xa0\x00\x80\x00", b"\x00\xa1\x00"]
)
def test_other_tables_are_refused(data):
    with pytest.raises(FormatError, match="frequencies of table 0"):
        rans.read_tables(np.frombuffer(data, np.uint8), 1)


# ------------------------------------------------------------------------------------------------------------- tensors

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64]
WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def there_and_back(values: dict[str, torch.Tensor], bits: dict[str, int] | None = None) -> tuple[dict, dict, int]:
    entries = {name: {"shape": list(value.shape)} for name, value in values.items()}
    parts = joined.joined(values, bits or {}, entries)
    dtypes = {name: value.dtype for name, value in values.items()}
    for name, entry in entries.items():
        joined.check_entry(entry, dtypes[name], name)
    plain = sum(joined.plain_bytes(entry, dtypes[name]) for name, entry in entries.items())
    assert plain == parts["plain"].numel()
    back = joined.separated(parts["coded"].numpy(), parts["plain"].numpy(), entries, dtypes)
    return (
        back,
        {name: entry.get("stored") for name, entry in entries.items()},
        sum(one.numel() for one in parts.values()),
    )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
    return one.dtype is other.dtype and one.shape == other.shape and torch.equal(*bits)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 5), (40, 3, 3, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_to_the_bit(dtype, shape):
    torch.manual_seed(0)
    dense = (50 * torch.randn(shape)).to(dtype)
    thin = torch.where(torch.rand(shape) < 0.8, torch.zeros(shape), 50 * torch.randn(shape)).to(dtype)
    few = (torch.rand(shape) * 3).round().to(dtype)
    values = {"dense": dense, "few": few, "ones": torch.ones(shape).to(dtype), "thin": thin}
    back, _, _ = there_and_back(values)
    assert all(same(back[name], value) for name, value in values.items())


def test_each_tensor_is_stored_in_its_smallest_way():
    torch.manual_seed(0)
    book = torch.randn(16)
    values = {
        "dense": torch.randn(50, 50),
        "sparse": torch.where(torch.rand(50, 50) < 0.9, 0.0, torch.randn(50, 50)),
        "shared": book[torch.randint(16, (50, 50))],
        "ones": torch.ones(500),
        "codes": (1.2 * torch.randn(50, 50)).round().clamp(-4, 3).to(torch.int8),
        "tiny": torch.tensor([1, -2], dtype=torch.int8),
        "special": torch.tensor([0.0, -0.0, float("nan"), float("inf")]).repeat(100),
    }
    values["turned"] = values["shared"].reshape(10, 10, 5, 5).to(memory_format=torch.channels_last)
    back, stored, size = there_and_back(values, {"codes": 3, "tiny": 3})
    assert all(same(back[name], value) for name, value in values.items())
    assert stored == {
        "dense": None, "sparse": "sparse", "shared": "codebook", "ones": "codebook", "codes": "coded",
        "tiny": "coded", "special": "codebook", "turned": "codebook",
    }  # fmt: skip
    floats, zeros = 4 * 2500 + 4 * int((values["sparse"] != 0).sum()), 2500 * 0.4690 / 8
    ideal = floats + zeros + 2 * (64 + 2500 * 4 / 8) + 2500 * 3 / 8 + 4 + 400 * 2 / 8 + 16
    assert size < 1.01 * ideal + 150
    _, alone, _ = there_and_back({"tiny": values["tiny"]}, {"tiny": 3})
    assert alone == {"tiny": "packed"}  # a table would take more than it


def test_many_kinds_share_255_tables():
    draw = np.random.default_rng(0)
    values = {
        f"t{index}": torch.from_numpy(draw.binomial(100, (index + 1) / 400, 5000).astype(np.int8))
        for index in range(300)
    }
    back, stored, size = there_and_back(values)
    assert all(torch.equal(back[name], value) for name, value in values.items())
    assert set(stored.values()) == {"coded"} and size < 300 * 5000 * 0.7


# ------------------------------------------------------------------------------------------------------------- folders


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.tied = self.conv.weight
        with torch.no_grad():
            self.conv.weight.copy_((self.conv.weight * 20).round() / 20)
            self.head.weight.flatten()[::2].zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)) + self.tied.sum())


def net() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    graph = capture(Net().eval(), torch.zeros(2, 1, 8, 8))
    graph.meta["sparse"] = ["head.weight"]
    return graph


@pytest.mark.parametrize("store", STORES)
def test_a_folder_of_each_kind_loads_trains_on_and_is_saved_alike(store, tmp_path):
    graph = net()
    folder_.save(graph, tmp_path / "one", store=store)
    loaded = folder_.load(tmp_path / "one")
    assert all(same(value, loaded.state_dict()[name]) for name, value in graph.state_dict().items())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(graph(x), loaded(x)) and loaded.conv.weight.requires_grad
    folder_.save(loaded, tmp_path / "two")  # as it was
    assert folder_.content_hash(tmp_path / "one") == folder_.content_hash(tmp_path / "two")
    content = folder_.content_of(graph, store=store)
    assert content.hash == folder_.content_hash(tmp_path / "one")
    assert content.weight_bytes == os.path.getsize(tmp_path / "one" / "weights.safetensors")
    schema = json.loads((tmp_path / "one" / "manifest.json").read_text())["schema"]
    assert schema == (2 if store == "smallest" else 1)
    folder_.save(loaded, tmp_path / "three", store="readable")
    folder_.save(graph, tmp_path / "four")
    assert folder_.content_hash(tmp_path / "three") == folder_.content_hash(tmp_path / "four")


def test_smallest_is_the_smallest(tmp_path):
    sizes = {store: folder_.content_of(net(), store=store) for store in STORES}
    assert sizes["smallest"].weight_bytes < sizes["readable"].weight_bytes <= sizes["fastest"].weight_bytes
    assert 4 * sizes["smallest"].graph_bytes < sizes["readable"].graph_bytes


def test_another_store_is_refused():
    with pytest.raises(InputError, match="store='tiny' is none of readable, smallest, fastest"):
        folder_.content_of(net(), store="tiny")


def test_a_text_is_unfolded_within_its_bound():
    whole = b'{"a": 1}' * 1000
    assert text.unfolded(text.folded(whole), "g") == whole and text.unfolded(whole, "g") == whole
    for data in (text.folded(whole)[:-3], text.folded(whole) + b"x", text.MAGIC, text.folded(b"")):
        with pytest.raises(FormatError, match="zstandard frame"):
            text.unfolded(data, "g")


def test_fastest_leaves_nothing_to_decode(tmp_path: Path) -> None:
    entries = json.loads((folder_.save(net(), tmp_path / "f", store="fastest") / "graph.json").read_text())["tensors"]
    assert not any("stored" in entry for entry in entries.values())
