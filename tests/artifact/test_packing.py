import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from rarefy.artifact.coding.packing import (
    LARGEST_RATIO,
    WIDTHS,
    code_range,
    entropy_decode,
    entropy_encode,
    pack,
    packed_size,
    unpack,
)
from rarefy.errors import FormatError, InputError

shapes = st.lists(st.integers(0, 7), max_size=4)
codings = {
    "bits": st.sampled_from(WIDTHS),
    "dtype": st.sampled_from([torch.int8, torch.uint8]),
    "shape": shapes,
    "seed": st.integers(0, 2**31),
}


def random_codes(shape, bits, dtype, seed):
    low, high = code_range(bits, dtype)
    return (
        torch.from_numpy(np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int16))
        .to(dtype)
        .reshape(tuple(shape))
    )


@hypothesis.given(**codings)
@hypothesis.settings(deadline=None, max_examples=300)
def test_unpack_gives_back_every_code(bits, dtype, shape, seed):
    codes = random_codes(shape, bits, dtype, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(codes.numel() * bits / 8),)
    back = unpack(packed, bits, shape, dtype)
    assert back.dtype == dtype and back.shape == codes.shape and torch.equal(back, codes)


@hypothesis.given(**codings)
@hypothesis.settings(deadline=None, max_examples=100)
def test_packed_bytes_are_the_bit_stream_of_the_docstring(bits, dtype, shape, seed):
    codes = random_codes(shape, bits, dtype, seed)
    stream = sum((code % 2**bits) << (index * bits) for index, code in enumerate(codes.flatten().tolist()))
    assert bytes(pack(codes, bits).tolist()) == stream.to_bytes(packed_size(codes.numel(), bits), "little")


def test_golden_bytes():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.int8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 3).tolist() == [0xD1, 0x08]
    assert pack(torch.tensor([-1, -8, 7], dtype=torch.int8), 4).tolist() == [0x8F, 0x07]
    assert pack(torch.tensor([[-2], [1]], dtype=torch.int8), 2).tolist() == [0b0110]


@pytest.mark.parametrize("order", [(2, 3, 1, 0), (0, 2, 3, 1)])
def test_codes_need_not_be_contiguous(order):
    codes = random_codes((3, 5, 2, 7), 3, torch.int8, 0).permute(order)
    assert torch.equal(unpack(pack(codes, 3), 3, codes.shape, torch.int8), codes)


@hypothesis.given(**codings)
@hypothesis.settings(deadline=None, max_examples=200)
def test_entropy_coding_is_exact(bits, dtype, shape, seed):
    codes = random_codes(shape, bits, dtype, seed)
    frame = entropy_encode(codes, bits)
    assert torch.equal(entropy_decode(frame, bits, shape, dtype), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_entropy_coding_comes_near_the_entropy(bits):
    """Huffman's redundancy is below p_max + 0.086 bits a symbol (Gallager 1978); a symbol here is 8 // bits codes."""
    high = 2 ** (bits - 1) - 1
    codes = torch.from_numpy(np.random.default_rng(0).normal(0, high / 3, 300_000).round().clip(-high, high)).to(
        torch.int8
    )
    share = torch.bincount(codes.to(torch.int64) + 128).double() / codes.numel()
    share = share[share > 0]
    entropy = float(-(share * share.log2()).sum())
    symbols = 8 // bits
    spent = 8 * entropy_encode(codes, bits).numel() / codes.numel()
    assert entropy <= spent <= entropy + (float(share.max()) ** symbols + 0.086) / symbols + 0.01
    assert spent < bits


def test_a_code_that_needs_more_bits_is_refused():
    for code, dtype in ((8, torch.int8), (-9, torch.int8), (16, torch.uint8)):
        with pytest.raises(InputError, match=f"{code}.*4 bits"):
            pack(torch.tensor([0, code], dtype=dtype), 4)
    with pytest.raises(InputError, match="int8 or uint8"):
        pack(torch.tensor([1]), 4)
    with pytest.raises(InputError, match="2 to 8"):
        pack(torch.tensor([1], dtype=torch.int8), 1)


def test_wrong_lengths_and_loose_bits_are_refused():
    packed = pack(torch.ones(5, dtype=torch.int8), 3)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed.to(torch.int16), packed.reshape(1, -1)):
        with pytest.raises(FormatError, match="5 codes of 3 bits take 2 bytes"):
            unpack(wrong, 3, (5,), torch.int8)
    loose = packed.clone()
    loose[-1] |= 0x80
    with pytest.raises(FormatError, match="not zero"):
        unpack(loose, 3, (5,), torch.int8)


def test_frames_that_lie_are_refused():
    frame = entropy_encode(random_codes((64,), 4, torch.int8, 0), 4)
    with pytest.raises(FormatError, match="claims 32 bytes"):
        entropy_decode(frame, 4, (66,), torch.int8)
    with pytest.raises(FormatError, match="not a whole zstandard frame"):
        entropy_decode(frame[:-3], 4, (64,), torch.int8)
    with pytest.raises(FormatError, match="not a whole zstandard frame"):
        entropy_decode(torch.cat([frame, frame]), 4, (64,), torch.int8)
    with pytest.raises(FormatError, match="not a whole zstandard frame"):
        entropy_decode(torch.zeros(40, dtype=torch.uint8), 4, (64,), torch.int8)
    with pytest.raises(FormatError, match=f"{LARGEST_RATIO} to 1"):
        entropy_decode(frame, 4, (2**40,), torch.int8)
    wide = entropy_encode(torch.tensor([7], dtype=torch.int8), 4)
    with pytest.raises(FormatError, match="3 bits"):
        entropy_decode(wide, 3, (1,), torch.int8)


def test_a_ratio_that_decoding_refuses_is_not_written():
    assert entropy_encode(torch.zeros(10_000_000, dtype=torch.int8), 4) is None
