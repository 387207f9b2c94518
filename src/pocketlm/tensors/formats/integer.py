"""Integers of 2 to 8 bits and FP8 with a scale per group of weights or per row, as compressed-tensors stores them.

    int4-g32       weight = scale * level             levels -8 to 7, a scale per 32 weights
    int4-g32-asym  weight = scale * (level - zero)    levels and zeros 0 to 15
    int8-row       a scale per row
    fp8-row        the levels are the 253 finite numbers of E4M3

The block is a whole row, so that sizes are those of the stored tensors:

    row    |codes, one stream of bits up to a 32-bit word|scales, bfloat16|zeros, a stream of bits up to a byte|

The words of codes are those of `weight_packed` in a compressed-tensors folder, or for FP8 the bytes of `weight`.
"""

import re
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from pocketlm.errors import BadInputError
from pocketlm.tensors.formats.block import Format

# compressed-tensors stores scales in the dtype of the model and multiplies in it: bfloat16 here.
DTYPE = torch.bfloat16
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_NAME = re.compile(r"(?:int(?P<bits>\d)|fp8)-(?:g(?P<group>\d+)|row)(?P<asym>-asym)?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """What the name of one of these formats says.

    Attributes:
        kind: Whether levels are integers or E4M3 numbers.
        bits: Of a code.
        group: Weights that share a scale; None where the whole row does.
        symmetric: Whether there are no zero points.
    """

    kind: Literal["int", "float"]
    bits: int
    group: int | None
    symmetric: bool


def scheme_of(name: str) -> Scheme:
    """Return what a name such as `int4-g32-asym`, `int8-row` or `fp8-row` says.

    Raises:
        BadInputError: It is not the name of such a format.
    """
    found = _NAME.fullmatch(name)
    if name not in NAMES or not found:
        raise BadInputError(
            f"Unknown integer format `{name}`. Names are such as int4-g32, int4-g64-asym, int8-row or fp8-row, with "
            f"{', '.join(map(str, BITS))} bits and groups of {', '.join(map(str, GROUPS))}; fp8 has no -asym"
        )
    group = int(found["group"]) if found["group"] else None
    return Scheme("int" if found["bits"] else "float", int(found["bits"] or 8), group, not found["asym"])


NAMES = tuple(
    f"{kind}-{group}{zero}"
    for kind in ("fp8", *(f"int{bits}" for bits in reversed(BITS)))
    for group in ("row", *(f"g{group}" for group in reversed(GROUPS)))
    for zero in ("", "-asym")
    if not (kind == "fp8" and zero)
)
"""The names of all formats."""


@cache
def integer_format(name: str, columns: int) -> Format:
    """Return the format of this name for rows of `columns` weights.

    Raises:
        BadInputError: There is no such format, or its groups do not divide the row.
    """
    scheme = scheme_of(name)
    if scheme.group and columns % scheme.group:
        raise BadInputError(
            f"{name} needs rows that divide by {scheme.group}; these have {columns} weights. "
            f"Use {name.replace(f'g{scheme.group}', 'row')}, or 16 bits"
        )
    layout = Layout(scheme, columns)
    top = 2**scheme.bits
    if scheme.kind == "float":
        levels, reach = E4M3, 512
    elif scheme.symmetric:
        levels, reach = tuple(range(-top // 2, top // 2)), top // 2
    else:
        levels, reach = tuple(range(top)), top
    signed = scheme.kind == "int" and scheme.symmetric
    return Format(
        name,
        columns,
        layout.row_bytes,
        levels,
        layout.pack,
        layout.unpack,
        span=scheme.group or columns,
        offset="" if scheme.symmetric else "zero",
        offset_steps=(1,) if scheme.symmetric else tuple(range(1 - top, 1)),
        storable=partial(_storable, reach, signed),
        signed=signed,
    )


def _storable(reach: int, signed: bool, scales: Tensor) -> tuple[Tensor, ...]:
    # No product with a level may overflow either.
    most = torch.finfo(DTYPE).max / reach
    return (scales.nan_to_num(0.0).clamp(-most if signed else 0.0, most).to(DTYPE).float(),)


# ---- bytes ----


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a row are."""

    scheme: Scheme
    columns: int

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.columns // (self.scheme.group or self.columns)

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes: whole words, but for FP8 a byte each."""
        return self.columns if self.scheme.kind == "float" else stream_bytes(self.columns, self.scheme.bits, 4)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        zeros = 0 if self.scheme.symmetric else stream_bytes(self.groups, self.scheme.bits, 1)
        return self.code_bytes + DTYPE.itemsize * self.groups + zeros

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the bytes of the codes, the scales in their dtype, and the bytes of the zeros where there are any."""
        sizes = [self.code_bytes, DTYPE.itemsize * self.groups]
        codes, scales, zeros = map(_compact, rows.split([*sizes, rows.shape[1] - sum(sizes)], 1))
        return codes, scales.view(DTYPE), None if self.scheme.symmetric else zeros

    def pack(self, codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
        """Lay rows out as bytes."""
        bits = self.scheme.bits
        data = _to_e4m3_bytes(codes) if self.scheme.kind == "float" else pack_stream(codes, bits, 4)
        parts = [data, _compact(scales.flatten(1).to(DTYPE)).view(torch.uint8)]
        if not self.scheme.symmetric:
            parts.append(pack_stream(-steps[..., 1], bits, 1))
        return torch.cat(parts, 1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read codes, scales and steps from rows."""
        bits = self.scheme.bits
        data, scales, zeros = self.split(rows)
        codes = _from_e4m3_bytes(data) if self.scheme.kind == "float" else unpack_stream(data, bits, self.columns)
        steps = torch.ones(*scales.shape, 1, dtype=torch.int16, device=rows.device)
        if zeros is not None:
            zero = unpack_stream(zeros, bits, self.groups).to(torch.int16)
            steps = torch.cat([steps, -zero[..., None]], 2)
        return codes, scales.float()[..., None], steps


def stream_bytes(count: int, bits: int, unit: int) -> int:
    """Return the bytes of `count` codes, up to a whole number of units of so many bytes."""
    return -(-count * bits // (8 * unit)) * unit


def pack_stream(codes: Tensor, bits: int, unit: int) -> Tensor:
    """Pack (rows, n) codes one after the other into bytes, lowest bits first, up to whole units of bytes."""
    count = codes.shape[1]
    eights = pad(codes.long(), (0, -count % 8)).unflatten(1, (-1, 8))  # eight codes fill whole bytes
    places = bits * torch.arange(8, device=codes.device)
    data = (eights << places).sum(2).view(torch.uint8).unflatten(1, (-1, 8))[:, :, :bits].flatten(1)
    return _compact(pad(data, (0, stream_bytes(count, bits, unit) - data.shape[1])))


def unpack_stream(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_stream`: (rows, count) uint8."""
    eights = -(-count // 8)
    parts = pad(data, (0, eights * bits - data.shape[1])).unflatten(1, (eights, bits))
    places = bits * torch.arange(8, device=data.device)
    codes = (_compact(pad(parts, (0, 8 - bits))).view(torch.int64) >> places) & (2**bits - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def _compact(data: Tensor) -> Tensor:
    # `contiguous` would leave the stride of a single row as it is, and `view` as a wider type trips over it.
    return data.clone(memory_format=torch.contiguous_format)


# The finite numbers of E4M3 in ascending order, and which byte stands for each. Byte 0x80, minus zero, is not written.
_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_BYTES = torch.cat([torch.arange(0xFE, 0x80, -1), torch.arange(0x7F)]).to(torch.uint8)
E4M3: tuple[float, ...] = tuple(_NUMBERS[_BYTES.long()].tolist())


def _to_e4m3_bytes(codes: Tensor) -> Tensor:
    return _BYTES.to(codes.device)[codes.long()]


def _from_e4m3_bytes(data: Tensor) -> Tensor:
    table = torch.full((256,), E4M3.index(0.0), dtype=torch.uint8)
    table[_BYTES.long()] = torch.arange(len(E4M3)).to(torch.uint8)
    return table.to(data.device)[data.long()]
