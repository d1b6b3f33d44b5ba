"""Codes to bytes without gaps, and entropy coding where it pays; sparse weights without their zeros.

Code i of a tensor in row-major order fills bits [i b, (i+1) b) of a little-endian bit stream, where bit j of the stream
is bit j % 8 of byte j // 8, the lowest first. Signed codes are cut to their b lowest bits (two's complement). The
stream ends with the last code; what is left of its last byte is zero. So n codes take exactly ceil(n b / 8) bytes:

    4 bits, codes 1 2 3      bytes 0x21 0x03
    3 bits, codes 1 2 3 4    bytes 0xd1 0x08

Eight codes fill b whole bytes, so eight lanes of shifts on 64-bit words do it for every b from 2 to 8.

Entropy coding (Deep Compression, 1510.00149): the codes of a trained layer are bell-shaped, so their entropy is below b
bits. zstandard's Huffman coder gets within 0.06 bits of it when no code straddles a byte, so the codes are packed at
the next of 2, 4 or 8 bits before they go in. Level 1: higher levels search for repeats, which codes don't have, and end
larger. Given up: an arithmetic coder, which would save that 0.06 and decode a hundred times slower.

Sparse weights: one bit an element says whether it is there, then come the values that are. At 2:4 the indices of N:M
kernels take as many bits (2 of 2 bits in 4 weights), at 4:8 more (12 in 8), and what the best code would save (3 in 4)
is 1.5 % of float32: one form is enough.

    0, 1.5, 0, -2 in float32     bytes 0x0a, then 00 00 c0 3f  00 00 00 c0
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from torch import Tensor

from rarefy.errors import FormatError, InputError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)

# Decoded bytes a stored byte may stand for: real codes stay below 10, and few bytes can't ask for gigabytes.
LARGEST_RATIO = 256

# Width at which codes go to the entropy coder, by their own width.
_WHOLE = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return -(-count * bits // 8)


def code_range(bits: int, dtype: torch.dtype) -> tuple[int, int]:
    """Lowest and highest code of that width: int8 holds signed codes, uint8 unsigned ones."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype == torch.int8 else (0, 2**bits - 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes`` (any shape, int8 or uint8) as uint8 (packed_size,).

    Raises InputError for a code that needs more bits.
    """
    _check(codes.dtype, bits)
    flat = codes.detach().cpu().contiguous().reshape(-1)
    low, high = code_range(bits, codes.dtype)
    if flat.numel() and (int(flat.min()) < low or int(flat.max()) > high):
        raise InputError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits ({low} to {high})")
    lanes = np.zeros((-(-flat.numel() // 8), 8), np.uint8)
    lanes.reshape(-1)[: flat.numel()] = flat.view(torch.uint8).numpy()
    lanes &= 2**bits - 1
    words = np.zeros(len(lanes), "<u8")
    for lane in range(8):
        words |= lanes[:, lane].astype("<u8") << np.uint64(lane * bits)
    stream = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return torch.from_numpy(stream[: packed_size(flat.numel(), bits)].copy())


def unpack(packed: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The codes ``pack`` was given, of ``shape`` and ``dtype`` (int8 or uint8).

    Raises FormatError if ``packed`` (uint8, 1 axis) is not exactly as long as ``shape`` asks, or ends in bits that are
    not zero.
    """
    _check(dtype, bits)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_size(count, bits):
        raise FormatError(f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {packed.numel()}")
    if count * bits % 8 and int(packed[-1]) >> (count * bits % 8):
        raise FormatError(f"the last byte of {count} codes of {bits} bits ends in bits that are not zero")
    groups = -(-count // 8)
    words = np.zeros((groups, 8), np.uint8)
    stream = np.zeros(groups * bits, np.uint8)
    stream[: packed.numel()] = packed.cpu().numpy()
    words[:, :bits] = stream.reshape(groups, bits)
    values = words.view("<u8").reshape(-1)
    lanes = np.empty((groups, 8), np.uint8)
    for lane in range(8):
        lanes[:, lane] = (values >> np.uint64(lane * bits)) & np.uint64(2**bits - 1)
    codes = torch.from_numpy(lanes.reshape(-1)[:count])
    if dtype == torch.int8:  # shifted up and down again, so that the sign bit fills the rest
        codes = (codes << (8 - bits)).view(torch.int8) >> (8 - bits)
    return codes.reshape(tuple(shape))


def entropy_encode(codes: Tensor, bits: int) -> Tensor | None:
    """``codes`` (int8 or uint8) as a zstandard frame, uint8 (n,); None if ``entropy_decode`` would refuse its ratio."""
    stream = pack(codes, _WHOLE[bits]).numpy().tobytes()
    frame = zstandard.ZstdCompressor(level=1, write_content_size=True, write_checksum=False).compress(stream)
    if len(stream) > LARGEST_RATIO * len(frame):
        return None
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def entropy_decode(frame: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The codes ``entropy_encode`` was given. What the frame claims is checked before any memory is taken.

    Raises FormatError for a frame that is not one, that holds another number of bytes than ``shape`` asks, or codes
    beyond ``bits``.
    """
    _check(dtype, bits)
    size = packed_size(math.prod(shape), _WHOLE[bits])
    if frame.dtype != torch.uint8 or frame.dim() != 1:
        raise FormatError("entropy-coded codes are stored as bytes in one axis")
    data = frame.cpu().numpy().tobytes()
    if size > LARGEST_RATIO * len(data):
        raise FormatError(
            f"{size} bytes of codes in {len(data)}: more than {LARGEST_RATIO} to 1, which no saved model has"
        )
    try:
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed != size:
            raise FormatError(f"the zstandard frame claims {claimed} bytes, the shape {list(shape)} takes {size}")
        stream = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"not a whole zstandard frame ({error})") from error
    codes = unpack(torch.from_numpy(np.frombuffer(stream, np.uint8).copy()), _WHOLE[bits], shape, dtype)
    low, high = code_range(bits, dtype)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise FormatError(
            f"codes from {int(codes.min())} to {int(codes.max())} in a tensor of {bits} bits ({low} to {high})"
        )
    return codes


def sparse_size(value: Tensor) -> int:
    """Bytes that ``sparse_pack`` takes."""
    return packed_size(value.numel(), 1) + value.element_size() * int(_present(value).sum())


def sparse_pack(value: Tensor) -> Tensor:
    """``value`` (any shape and dtype) as uint8 (sparse_size,).

    That is ceil(n / 8) bytes of bits, bit i % 8 of byte i // 8 being 1 where element i of
    the row-major order has a bit that is not 0 (so -0.0 and NaN come back); then those elements, in order.
    """
    present = _present(value)
    bits = torch.from_numpy(np.packbits(present.numpy(), bitorder="little"))
    return torch.cat((bits, _bytes(value)[present].reshape(-1)))


def sparse_unpack(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor ``sparse_pack`` was given.

    It takes at most 8 times the element's bytes for a byte of ``packed``, and its length is compared with the bits
    before that.

    Raises FormatError if ``packed`` (uint8, 1 axis) is not exactly what ``sparse_pack`` writes for a tensor of that
    shape.
    """
    count = math.prod(shape)
    size = packed_size(count, 1)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < size:
        raise FormatError(f"{count} sparse weights take {size} bytes at least, not {packed.numel()}")
    stream = packed.cpu().contiguous()
    bits = stream[:size].numpy()
    present = np.unpackbits(bits, count=count, bitorder="little")
    stored = int(present.sum())
    if packed.numel() != size + stored * dtype.itemsize:
        raise FormatError(
            f"{stored} of {count} sparse weights take {size + stored * dtype.itemsize} bytes, not {packed.numel()}"
        )
    if count % 8 and int(bits[-1]) >> (count % 8):
        raise FormatError(f"the last byte of {count} sparse weights' bits ends in bits that are not zero")
    values = stream[size:].reshape(stored, dtype.itemsize)
    if stored and not bool((values != 0).any(1).all()):
        raise FormatError("a zero is stored among the sparse weights that are there")
    whole = torch.zeros(count, dtype.itemsize, dtype=torch.uint8)
    whole[torch.from_numpy(present.view(np.bool_))] = values
    return whole.reshape(-1).view(dtype).reshape(tuple(shape))


def _bytes(value: Tensor) -> Tensor:
    """(elements, bytes of one) uint8, in row-major order."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).reshape(value.numel(), value.element_size())


def _present(value: Tensor) -> Tensor:
    """(elements,) bool: has it a bit that is not 0?"""
    return (_bytes(value) != 0).any(1)


def _check(dtype: torch.dtype, bits: int) -> None:
    if dtype not in (torch.int8, torch.uint8):
        raise InputError(f"codes are int8 or uint8, not {dtype}")
    if bits not in WIDTHS:
        raise InputError(f"codes of {bits} bits: choose 2 to 8")
