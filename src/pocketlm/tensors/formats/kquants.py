"""The K-types of GGUF files, and IQ4_XS: 256 weights share fp16 scales, groups of 16 or 32 have small integer steps.

Layouts as in ggml's ggml-common.h; the gguf package's decoder and the engine's are the judges (tests/test_formats.py).

    span   |■■ group ■■|■■ group ■■|...                weight = (d * step) * level (- dmin * step of the minimum)

A minimum is taken off by the engines and added here, so the second scale is e = -dmin.
"""

import torch
from torch import Tensor

from pocketlm.tensors.formats.block import Format
from pocketlm.tensors.formats.ggml import (
    IQ4_NL_LEVELS,
    Bytes,
    fp16_bytes,
    from_fp16_bytes,
    pack_bits,
    pack_neighbours,
    pack_nibbles,
    pack_pairs,
    pack_quarters,
    unpack_bits,
    unpack_neighbours,
    unpack_nibbles,
    unpack_pairs,
    unpack_quarters,
)

SPAN = 256


def in_parts(width: int, each: Bytes, data: Tensor) -> Tensor:
    """Apply a packing to every `width` columns of (blocks, n)."""
    return each(data.reshape(-1, width)).reshape(len(data), -1)


def pack_eighths(bits: Tensor) -> Tensor:
    """One bit of 256 weights in 32 bytes: byte j holds weights j, j + 32, j + 64, ..."""
    return pack_bits(bits.reshape(-1, 8, 32).transpose(1, 2).reshape(len(bits), -1))


def unpack_eighths(data: Tensor) -> Tensor:
    """The inverse of `pack_eighths`."""
    return unpack_bits(data).reshape(-1, 32, 8).transpose(1, 2).reshape(len(data), -1)


def _bytes(steps: Tensor) -> Tensor:
    return steps.to(torch.uint8)


def _one_scale(scales: Tensor) -> Tensor:
    return fp16_bytes(scales.reshape(-1, 1))


def _two_scales(scales: Tensor) -> Tensor:
    d, e = scales.reshape(-1, 2).unbind(1)
    return fp16_bytes(torch.stack([d, -e], 1))


def _from_two_scales(data: Tensor) -> Tensor:
    d, dmin = from_fp16_bytes(data).unbind(1)
    return torch.stack([d, -dmin], 1)[:, None]


# ---- steps ----


# Q3_K, 16 steps of 6 bits in 12 bytes: the low nibbles of steps j and j + 8 in byte j, then the high two bits of steps
# j, j + 4, j + 8, j + 12 in byte 8 + j.
def _pack_16_sixes(steps: Tensor) -> Tensor:
    high = (steps >> 4).reshape(-1, 4, 4).transpose(1, 2)
    return torch.cat([pack_nibbles(steps & 15), pack_pairs(high.flatten(1))], 1)


def _unpack_16_sixes(data: Tensor) -> Tensor:
    high = unpack_pairs(data[:, 8:]).reshape(-1, 4, 4).transpose(1, 2).flatten(1)
    return unpack_nibbles(data[:, :8]) | high << 4


# Q4_K and Q5_K, 8 steps and 8 minima of 6 bits in 12 bytes:
#   byte j      6 bits of step j       and in its upper two bits the upper two of step j + 4       (j = 0..3)
#   byte 4 + j  6 bits of minimum j    and in its upper two bits the upper two of minimum j + 4
#   byte 8 + j  4 bits of step j + 4   and above them 4 bits of minimum j + 4
def _pack_8_sixes_twice(steps: Tensor) -> Tensor:
    first, last = steps.transpose(1, 2).chunk(2, dim=2)
    whole = first | last >> 4 << 6
    return torch.cat([whole.flatten(1), last[:, 0] & 15 | last[:, 1] << 4], 1)


def _unpack_8_sixes_twice(data: Tensor) -> Tensor:
    whole, low = data[:, :8].reshape(-1, 2, 4), data[:, 8:]
    last = torch.stack([low & 15, low >> 4], 1) | whole >> 6 << 4
    return torch.cat([whole & 63, last], 2).transpose(1, 2).to(torch.int16)


# ---- blocks ----


def _pack_q2(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    return torch.cat([pack_neighbours(_bytes(steps).flatten(1)), pack_quarters(codes), _two_scales(scales)], 1)


def _unpack_q2(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steps = unpack_neighbours(data[:, :16]).unflatten(1, (16, 2)).to(torch.int16)
    return unpack_quarters(data[:, 16:80]), _from_two_scales(data[:, 80:]), steps


def _pack_q3(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    sixes = _pack_16_sixes(_bytes(steps[:, :, 0] + 32))
    return torch.cat([pack_eighths(codes >> 2), pack_quarters(codes & 3), sixes, _one_scale(scales)], 1)


def _unpack_q3(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = unpack_quarters(data[:, 32:96]) | unpack_eighths(data[:, :32]) << 2
    steps = _unpack_16_sixes(data[:, 96:108]).to(torch.int16) - 32
    return codes, from_fp16_bytes(data[:, 108:])[:, :, None], steps[:, :, None]


def _pack_q4(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    sixes = _pack_8_sixes_twice(_bytes(steps))
    return torch.cat([_two_scales(scales), sixes, in_parts(64, pack_nibbles, codes)], 1)


def _unpack_q4(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = in_parts(32, unpack_nibbles, data[:, 16:])
    return codes, _from_two_scales(data[:, :4]), _unpack_8_sixes_twice(data[:, 4:16])


def _pack_q5(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    head, nibbles = _pack_q4(codes & 15, scales, steps).tensor_split([16], 1)
    return torch.cat([head, pack_eighths(codes >> 4), nibbles], 1)


def _unpack_q5(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, steps = _unpack_q4(torch.cat([data[:, :16], data[:, 48:]], 1))
    return codes | unpack_eighths(data[:, 16:48]) << 4, scales, steps


def _pack_q6(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    low = in_parts(128, pack_nibbles, codes & 15)
    step = steps[:, :, 0].to(torch.int8).view(torch.uint8)
    return torch.cat([low, pack_quarters(codes >> 4), step, _one_scale(scales)], 1)


def _unpack_q6(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = in_parts(64, unpack_nibbles, data[:, :128]) | unpack_quarters(data[:, 128:192]) << 4
    steps = data[:, 192:208].contiguous().view(torch.int8).to(torch.int16)
    return codes, from_fp16_bytes(data[:, 208:])[:, :, None], steps[:, :, None]


# IQ4_XS, 8 steps of 6 bits: the upper two bits of all in 16 bits, then the low nibbles of neighbours together.
def _pack_iq4(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    step = _bytes(steps[:, :, 0] + 32)
    sixes = torch.cat([pack_pairs(step >> 4), pack_neighbours(step & 15)], 1)
    return torch.cat([_one_scale(scales), sixes, in_parts(32, pack_nibbles, codes)], 1)


def _unpack_iq4(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    steps = (unpack_neighbours(data[:, 4:8]) | unpack_pairs(data[:, 2:4]) << 4).to(torch.int16) - 32
    codes = in_parts(16, unpack_nibbles, data[:, 8:])
    return codes, from_fp16_bytes(data[:, :2])[:, :, None], steps[:, :, None]


_FOUR_BITS, _SIX_BITS, _SIGNED_SIX_BITS = tuple(range(16)), tuple(range(64)), tuple(range(-32, 32))

Q2_K = Format(
    "Q2_K", SPAN, 84, (0, 1, 2, 3), _pack_q2, _unpack_q2,
    group=16, steps=_FOUR_BITS, offset="minimum", offset_steps=_FOUR_BITS,
)  # fmt: skip
Q3_K = Format("Q3_K", SPAN, 110, tuple(range(-4, 4)), _pack_q3, _unpack_q3, group=16, steps=_SIGNED_SIX_BITS)
Q4_K = Format(
    "Q4_K", SPAN, 144, tuple(range(16)), _pack_q4, _unpack_q4,
    group=32, steps=_SIX_BITS, offset="minimum", offset_steps=_SIX_BITS,
)  # fmt: skip
Q5_K = Format(
    "Q5_K", SPAN, 176, tuple(range(32)), _pack_q5, _unpack_q5,
    group=32, steps=_SIX_BITS, offset="minimum", offset_steps=_SIX_BITS,
)  # fmt: skip
Q6_K = Format("Q6_K", SPAN, 210, tuple(range(-32, 32)), _pack_q6, _unpack_q6, group=16, steps=tuple(range(-128, 128)))
IQ4_XS = Format("IQ4_XS", SPAN, 136, IQ4_NL_LEVELS, _pack_iq4, _unpack_iq4, group=32, steps=_SIGNED_SIX_BITS)
