"""The block formats of GGUF files that scale each block by itself; blocks of 32 or 64 weights suit narrow models.

Layouts as in ggml's ggml-common.h; the gguf package's decoder and the engine's are the judges (tests/test_formats.py).

    row    |■■■■ block ■■■■|■■■■ block ■■■■|...        weight = d * level (+ m)
    bytes  |d|(m)|codes....|d|(m)|codes....|...        d, m: fp16
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pocketlm.tensors.formats.block import Format

# The sixteen levels of IQ4_NL, closer together near zero where most weights are.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The FP4 numbers (E2M1), doubled as ggml has them.
FP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
_FP4_BITS = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)  # sign, two of exponent, one of mantissa

Bytes = Callable[[Tensor], Tensor]


def fp16_bytes(scales: Tensor) -> Tensor:
    """Return (blocks, n) float32 as (blocks, 2 n) bytes."""
    return scales.half().contiguous().view(torch.uint8)


def from_fp16_bytes(data: Tensor) -> Tensor:
    """Return (blocks, 2 n) bytes as (blocks, n) float32."""
    return data.contiguous().view(torch.float16).float()


def ones(codes: Tensor, groups: int, count: int = 1) -> Tensor:
    """Return the steps of a format that has none, (blocks, groups, count)."""
    return torch.ones(len(codes), groups, count, dtype=torch.int16, device=codes.device)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Byte j holds weight j in its low half and weight j + n/2 in its high half."""
    low, high = codes.chunk(2, dim=1)
    return low | (high << 4)


def unpack_nibbles(data: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.cat([data & 15, data >> 4], dim=1)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack (blocks, n) zeros and ones eight to a byte, lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8).unflatten(1, (-1, 8)) << places).sum(2, dtype=torch.uint8)


def unpack_bits(data: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[:, :, None] >> places) & 1).flatten(1)


def pack_fives(codes: Tensor) -> Tensor:
    """The fifth bits of 32 weights first, eight to a byte, then the nibbles."""
    return torch.cat([pack_bits(codes >> 4), pack_nibbles(codes & 15)], dim=1)


def unpack_fives(data: Tensor) -> Tensor:
    """The inverse of `pack_fives`."""
    return unpack_nibbles(data[:, 4:]) | (unpack_bits(data[:, :4]) << 4)


def pack_pairs(codes: Tensor) -> Tensor:
    """Four 2-bit codes to a byte, neighbours together, lowest first."""
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(1, (-1, 4)) << places).sum(2, dtype=torch.uint8)


def unpack_pairs(data: Tensor) -> Tensor:
    """The inverse of `pack_pairs`."""
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device)
    return ((data[:, :, None] >> places) & 3).flatten(1)


def pack_neighbours(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, neighbours together, lowest first."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_neighbours(data: Tensor) -> Tensor:
    """The inverse of `pack_neighbours`."""
    return torch.stack([data & 15, data >> 4], 2).flatten(1)


def pack_quarters(codes: Tensor) -> Tensor:
    """2-bit codes of 128 weights in 32 bytes: byte j holds weights j, j + 32, j + 64, j + 96."""
    halves = codes.reshape(-1, 4, 32).transpose(1, 2).reshape(-1, 128)
    return pack_pairs(halves).reshape(len(codes), -1)


def unpack_quarters(data: Tensor) -> Tensor:
    """The inverse of `pack_quarters`."""
    return unpack_pairs(data).reshape(-1, 32, 4).transpose(1, 2).reshape(len(data), -1)


def _pack_signed(codes: Tensor) -> Tensor:
    # Code 0 is level -127; the file holds the level itself as a signed byte.
    return (codes.to(torch.int16) - 127).to(torch.int8).view(torch.uint8)


def _unpack_signed(data: Tensor) -> Tensor:
    return (data.contiguous().view(torch.int8).to(torch.int16) + 127).to(torch.uint8)


def _scale_first(scales: int, pack_codes: Bytes, codes: Tensor, stored: Tensor, steps: Tensor) -> Tensor:
    return torch.cat([fp16_bytes(stored.reshape(len(codes), scales)), pack_codes(codes)], 1)


def _unpack_scale_first(scales: int, unpack_codes: Bytes, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stored = from_fp16_bytes(data[:, : 2 * scales]).reshape(len(data), 1, scales)
    codes = unpack_codes(data[:, 2 * scales :])
    return codes, stored, ones(codes, 1, scales)


def _simple(name: str, block: int, levels: tuple[float, ...], pack_codes: Bytes, unpack_codes: Bytes) -> Format:
    code_bytes = pack_codes(torch.zeros(1, block, dtype=torch.uint8)).shape[1]
    pack, unpack = partial(_scale_first, 1, pack_codes), partial(_unpack_scale_first, 1, unpack_codes)
    return Format(name, block, 2 + code_bytes, levels, pack, unpack)


def _with_minimum(name: str, levels: tuple[float, ...], pack_codes: Bytes, unpack_codes: Bytes) -> Format:
    code_bytes = pack_codes(torch.zeros(1, 32, dtype=torch.uint8)).shape[1]
    pack, unpack = partial(_scale_first, 2, pack_codes), partial(_unpack_scale_first, 2, unpack_codes)
    return Format(name, 32, 4 + code_bytes, levels, pack, unpack, offset="minimum")


# ---- FP4 ----


def _to_fp4_bits(codes: Tensor) -> Tensor:
    return torch.tensor(_FP4_BITS, dtype=torch.uint8, device=codes.device)[codes.long()]


def _from_fp4_bits(bits: Tensor) -> Tensor:
    table = torch.full((16,), _FP4_BITS.index(0), dtype=torch.uint8)  # 8 is minus zero
    table[list(_FP4_BITS)] = torch.arange(len(_FP4_BITS), dtype=torch.uint8)
    return table.to(bits.device)[bits.long()]


# A scale of MXFP4 is one byte e for 2^(e - 128), halved because the levels are doubled.
_E8M0 = torch.cat([2.0**-128 * torch.ones(1), 2.0 ** (torch.arange(1, 255, dtype=torch.float64) - 128).float()])
# A scale of NVFP4 is an unsigned E4M3 number, halved likewise; 0x7F stands for zero.
_E4M3_SMALL = [mantissa * 2.0**-9 for mantissa in range(8)]
_E4M3_OTHER = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
_E4M3 = torch.tensor(_E4M3_SMALL + _E4M3_OTHER) * 0.5
_E4M3_TABLE = _E4M3[:-1]


def _around(table: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of an ascending table next above and next below each |scale|, the nearer first."""
    sizes = scales.abs()
    above = torch.searchsorted(table, sizes).clamp_max(len(table) - 1)
    below = (above - 1).clamp_min(0)
    high, low = table[above], table[below]
    nearer = (high - sizes) <= (sizes - low)
    return torch.where(nearer, high, low), torch.where(nearer, low, high)


def _pack_mxfp4(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    exponents = torch.searchsorted(_E8M0, scales.reshape(-1, 1)).to(torch.uint8)
    return torch.cat([exponents, pack_nibbles(_to_fp4_bits(codes))], 1)


def _unpack_mxfp4(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _from_fp4_bits(unpack_nibbles(data[:, 1:]))
    return codes, _E8M0[data[:, 0].long().clamp_max(254)].reshape(-1, 1, 1), ones(codes, 1)


def _pack_nvfp4(codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    numbers = torch.searchsorted(_E4M3_TABLE, scales.reshape(-1, 4)).to(torch.uint8)
    nibbles = pack_nibbles(_to_fp4_bits(codes).reshape(-1, 16)).reshape(len(codes), -1)
    return torch.cat([numbers, nibbles], 1)


def _unpack_nvfp4(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    numbers = data[:, :4].long()
    # The sign is ignored, except that 0xFF is not zero.
    scales = torch.where(numbers == 0x7F, 0.0, _E4M3[numbers & 0x7F])
    codes = _from_fp4_bits(unpack_nibbles(data[:, 4:].reshape(-1, 8))).reshape(len(data), -1)
    return codes, scales[:, :, None], ones(codes, 4)


# ---- ternary ----


# TQ1_0 stores five ternary digits in a byte as a fraction: 32 bytes with 5 x 32 weights, 16 bytes with 5 x 16 and 4
# bytes with 4 x 4. A digit is read off by multiplying with a power of three and taking what overflows the byte.
_TRITS = ((32, 5), (16, 5), (4, 4))


def _pack_trits(codes: Tensor) -> Tensor:
    parts, start = [], 0
    for width, count in _TRITS:
        digits = codes[:, start : start + width * count].reshape(len(codes), count, width).to(torch.int32)
        number = sum(digits[:, i] * 3 ** (4 - i) for i in range(count))
        parts.append(((number * 256 + 242) // 243).to(torch.uint8))
        start += width * count
    return torch.cat(parts, 1)


def _unpack_trits(data: Tensor) -> Tensor:
    parts, start = [], 0
    for width, count in _TRITS:
        stored = data[:, start : start + width].to(torch.int32)
        parts += [((stored * 3**i & 255) * 3 >> 8).to(torch.uint8) for i in range(count)]
        start += width
    return torch.cat(parts, 1)


def _scale_last(pack_codes: Bytes, codes: Tensor, stored: Tensor, steps: Tensor) -> Tensor:
    return torch.cat([pack_codes(codes), fp16_bytes(stored.reshape(-1, 1))], 1)


def _unpack_scale_last(unpack_codes: Bytes, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = unpack_codes(data[:, :-2])
    return codes, from_fp16_bytes(data[:, -2:]).reshape(-1, 1, 1), ones(codes, 1)


def _ternary(name: str, block_bytes: int, pack_codes: Bytes, unpack_codes: Bytes) -> Format:
    pack, unpack = partial(_scale_last, pack_codes), partial(_unpack_scale_last, unpack_codes)
    return Format(name, 256, block_bytes, (-1, 0, 1), pack, unpack)


Q1_0 = _simple("Q1_0", 128, (-1, 1), pack_bits, unpack_bits)
Q2_0 = _simple("Q2_0", 64, (-1, 0, 1, 2), pack_pairs, unpack_pairs)
Q4_0 = _simple("Q4_0", 32, tuple(range(-8, 8)), pack_nibbles, unpack_nibbles)
IQ4_NL = _simple("IQ4_NL", 32, IQ4_NL_LEVELS, pack_nibbles, unpack_nibbles)
Q5_0 = _simple("Q5_0", 32, tuple(range(-16, 16)), pack_fives, unpack_fives)
Q8_0 = _simple("Q8_0", 32, tuple(range(-127, 128)), _pack_signed, _unpack_signed)
Q4_1 = _with_minimum("Q4_1", tuple(range(16)), pack_nibbles, unpack_nibbles)
Q5_1 = _with_minimum("Q5_1", tuple(range(32)), pack_fives, unpack_fives)
MXFP4 = Format("MXFP4", 32, 17, FP4_LEVELS, _pack_mxfp4, _unpack_mxfp4, storable=partial(_around, _E8M0), signed=False)
NVFP4 = Format(
    "NVFP4", 64, 36, FP4_LEVELS, _pack_nvfp4, _unpack_nvfp4, span=16, storable=partial(_around, _E4M3_TABLE),
    signed=False,
)  # fmt: skip
TQ1_0 = _ternary("TQ1_0", 54, _pack_trits, _unpack_trits)
TQ2_0 = _ternary("TQ2_0", 66, pack_quarters, unpack_quarters)
