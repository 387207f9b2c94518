"""What a number format is: codes for levels, groups of weights that share a scale, blocks of bytes.

    weight = a * level[code] + b          a, b: one of each per group

    block   |--------------------------- packed together ---------------------------|
    span    |------ shares stored scales ------|------ shares stored scales ------|      scales: d, or d and e
    group   |-- shares a, b --|-- shares a, b --|-- ...                                  a = d * step, b = e * step

In the simple formats block, span and group are the same and all steps are 1. The K-types have spans of 256 with
groups of 16 or 32. Formats with an `offset` have b: its own scale e ("minimum"), or d once more ("zero", an integer
zero point). Formats with a `codebook` allow only some vectors of levels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from pocketlm.tensors.formats.codebook import Codebook

FP16_MAX = 65504.0
_LARGEST = torch.finfo(torch.float32).max


def storable_fp16(scales: Tensor) -> Tensor:
    """Round scales to finite fp16 numbers."""
    return scales.clamp(-FP16_MAX, FP16_MAX).half().float()


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: Its name, in GGUF where GGUF has it, such as `Q4_0`.
        block: Weights that are packed together; a row's length must divide by it.
        block_bytes: Bytes of one block, scales included.
        levels: What each code stands for, ascending.
        pack: From (blocks, block) uint8 codes, (blocks, spans, scales) float32 and (blocks, groups, scales) int16
            steps to (blocks, block_bytes) uint8.
        unpack: The inverse.
        span: Weights that share stored scales; `block` where 0.
        group: Weights that share steps; `span` where 0.
        steps: What a step may be; (1,) where there are none.
        offset: Whether weights have an added b, and which scale it is counted in.
        offset_steps: What the step of the offset may be.
        storable: Rounds scales to what the file can hold, perhaps in several ways, nearest first.
        signed: Whether a scale may be negative.
        codebook: Which vectors of levels exist; all where None.
    """

    name: str
    block: int
    block_bytes: int
    levels: tuple[float, ...]
    pack: Callable[[Tensor, Tensor, Tensor], Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    span: int = 0
    group: int = 0
    steps: tuple[int, ...] = (1,)
    offset: Literal["", "minimum", "zero"] = ""
    offset_steps: tuple[int, ...] = (1,)
    storable: Callable[[Tensor], tuple[Tensor, ...]] = lambda scales: (storable_fp16(scales),)
    signed: bool = True
    codebook: Codebook | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "span", self.span or self.block)
        object.__setattr__(self, "group", self.group or self.span)

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

    @property
    def vector(self) -> int:
        """How many neighbouring weights are chosen together."""
        return self.codebook.length if self.codebook else 1

    @property
    def scales(self) -> int:
        """Stored scales per span."""
        return 2 if self.offset == "minimum" else 1

    @property
    def has_zero(self) -> bool:
        """Whether every group can hold weights that are exactly zero, whatever its scales."""
        zeros = {-step for step in self.offset_steps} if self.offset == "zero" else {0.0}
        return self.codebook is None and self.offset != "minimum" and zeros <= set(self.levels)

    def fits(self, columns: int) -> bool:
        """Whether rows of this length can be stored."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row."""
        return columns // self.block * self.block_bytes

    def table(self) -> Tensor:
        """The levels as a float32 tensor."""
        return torch.tensor(self.levels, dtype=torch.float32)

    @property
    def consecutive(self) -> bool:
        """Whether the levels are consecutive integers, so that rounding finds the nearest."""
        return len(self.levels) - 1 == self.levels[-1] - self.levels[0]

    def nearest(self, ratios: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return the code (uint8) of the level nearest to each (weight - b) / a.

        Args:
            ratios: Of any shape; the last dimension divides by `vector`.
            importance: The weight of each squared error; only where weights are chosen together does it matter.
        """
        if self.codebook:
            return self.codebook.nearest(ratios, importance)
        if self.consecutive:
            low = self.levels[0]
            return ratios.round().clamp_(low, self.levels[-1]).sub_(low).to(torch.uint8)
        if _has_half_steps(self.levels):
            return _codes_by_half_steps(self.levels)[_half_steps(ratios, self.levels)]
        return torch.bucketize(ratios, _middles(self.levels)).to(torch.uint8)

    def codes_of(self, levels: Tensor) -> Tensor:
        """Return the codes (uint8) of numbers that are levels."""
        if self.consecutive:
            return (levels - self.levels[0]).to(torch.uint8)
        return torch.bucketize(levels, _middles(self.levels)).to(torch.uint8)

    def snap(self, ratios: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return the nearest level itself (float32) for each (weight - b) / a."""
        if self.consecutive and not self.codebook:
            return ratios.round().clamp_(self.levels[0], self.levels[-1])
        if not self.codebook and _has_half_steps(self.levels):
            return _levels_by_half_steps(self.levels)[_half_steps(ratios, self.levels)]
        return self.table()[self.nearest(ratios, importance).long()]


# Integer levels have their midpoints on half integers, so the half step that a ratio falls in decides its level: one
# look-up instead of a search among the midpoints.
@cache
def _has_half_steps(levels: tuple[float, ...]) -> bool:
    return all(level == round(level) for level in levels) and levels[-1] - levels[0] < 1000


def _half_steps(ratios: Tensor, levels: tuple[float, ...]) -> Tensor:
    low, high = 2 * levels[0], 2 * levels[-1]
    return (ratios * 2).ceil_().clamp_(low, high).sub_(low).to(torch.int32)


@cache
def _middles(levels: tuple[float, ...]) -> Tensor:
    table = torch.tensor(levels, dtype=torch.float32)
    return (table[1:] + table[:-1]) / 2


@cache
def _codes_by_half_steps(levels: tuple[float, ...]) -> Tensor:
    places = torch.arange(2 * levels[0], 2 * levels[-1] + 1) / 2
    return torch.bucketize(places, _middles(levels)).to(torch.uint8)


@cache
def _levels_by_half_steps(levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32)[_codes_by_half_steps(levels).long()]


@dataclass(frozen=True)
class Quantized:
    """A weight matrix on a format's grid, before packing.

    Attributes:
        format: The format.
        codes: (rows, columns) uint8.
        scales: (rows, spans, scales) float32, each a number that the file can hold.
        steps: (rows, groups, 1 or 2) int16: the multiplier of a, then that of b where the format has an offset.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    steps: Tensor

    def decode(self) -> Tensor:
        """Return the weights, (rows, columns) float32, bit for bit as the engine decodes them."""
        form = self.format
        a, b = effective(form, self.scales, self.steps)
        levels = form.table()[self.codes.long()].unflatten(1, (-1, form.group))
        weights = levels * a[:, :, None]
        return (weights if b is None else weights + b[:, :, None]).flatten(1)

    def rows(self, rows: slice) -> "Quantized":
        """Return some of the rows."""
        return Quantized(self.format, self.codes[rows], self.scales[rows], self.steps[rows])


def effective(form: Format, scales: Tensor, steps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a and b of every group, (rows, groups) float32 each; b is None where the format has no offset.

    Args:
        form: The format.
        scales: (rows, spans, scales).
        steps: (rows, groups, 1 or 2).
    """
    spread = scales.repeat_interleave(form.span // form.group, dim=1)
    a = spread[..., 0] * steps[..., 0]
    return a, spread[..., -1] * steps[..., 1] if form.offset else None


def inverse_scale(a: Tensor) -> Tensor:
    """Return 1 / a; where a is zero every code decodes alike, and the inverse is zero too."""
    return torch.where(a == 0, 0.0, a.reciprocal()).clamp_(-_LARGEST, _LARGEST)


@dataclass(frozen=True)
class Packed:
    """A weight matrix as the bytes of a file.

    Attributes:
        format: The format.
        rows: (rows, bytes per row) uint8.
        shape: (rows, columns) of the weights.
    """

    format: Format
    rows: Tensor
    shape: tuple[int, int]


def pack(quantized: Quantized) -> Packed:
    """Lay codes, scales and steps out as bytes."""
    form, (rows, columns) = quantized.format, quantized.codes.shape
    blocks = rows * columns // form.block
    data = form.pack(
        quantized.codes.reshape(blocks, -1),
        quantized.scales.reshape(blocks, -1, quantized.scales.shape[-1]),
        quantized.steps.reshape(blocks, -1, quantized.steps.shape[-1]),
    )
    return Packed(form, data.reshape(rows, -1), (rows, columns))


def unpack(packed: Packed) -> Quantized:
    """Read codes, scales and steps back from bytes."""
    form, (rows, columns) = packed.format, packed.shape
    codes, scales, steps = form.unpack(packed.rows.reshape(-1, form.block_bytes))
    return Quantized(
        form,
        codes.reshape(rows, columns),
        scales.reshape(rows, columns // form.span, -1),
        steps.reshape(rows, columns // form.group, -1),
    )
