"""A block format: `block` weights in a row share one fp16 scale, and each weight is a level times that scale.

row    |■■■■ block ■■■■|■■■■ block ■■■■|...        weight = levels[code] * scale
bytes  |d|codes........|d|codes........|...        d: the scale as fp16
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# How far from "the extreme weight sits exactly on the extreme level" the scale search looks. Below 1 the extreme
# weights are clipped so that the many small ones get a finer grid.
SEARCH = (0.72, 0.80, 0.86, 0.91, 0.955, 1.0, 1.05, 1.1)
# Bound on rows searched together, so that a 49,152-row embedding does not need gigabytes.
ROWS_AT_ONCE = 4096
FP16_MAX = 65504.0
# A block whose largest weight is below this rounds to zero in every format; dividing by it could overflow.
NEGLIGIBLE = 1e-20
# With more levels than this the grid is so fine that clipping never pays.
SEARCHED_LEVELS = 64


@dataclass(frozen=True)
class Format:
    """One block format.

    Attributes:
        name: Its name in GGUF, such as `Q4_0`.
        block: Weights that share a scale; a row's length must divide by it.
        block_bytes: Bytes of one block, scale included.
        levels: What each code stands for in units of the scale, ascending.
        pack_codes: (blocks, block) uint8 codes to (blocks, block_bytes - 2) uint8.
        unpack_codes: The inverse.
    """

    name: str
    block: int
    block_bytes: int
    levels: tuple[float, ...]
    pack_codes: Callable[[Tensor], Tensor]
    unpack_codes: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

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

    def nearest(self, ratios: Tensor) -> Tensor:
        """Return the code (uint8) of the level nearest to each weight / scale, of any shape."""
        if self.consecutive:
            low = self.levels[0]
            return ratios.round().clamp_(low, self.levels[-1]).sub_(low).to(torch.uint8)
        return _codes_by_half_steps(self.levels)[_half_steps(ratios, self.levels)]

    def snap(self, ratios: Tensor) -> Tensor:
        """Return the nearest level itself (float32) for each weight / scale."""
        if self.consecutive:
            return ratios.round().clamp_(self.levels[0], self.levels[-1])
        return _levels_by_half_steps(self.levels)[_half_steps(ratios, self.levels)]


# Integer levels have their midpoints on half integers, so the half step that a ratio falls in decides its level: one
# look-up instead of a search among the midpoints.
def _half_steps(ratios: Tensor, levels: tuple[float, ...]) -> Tensor:
    low, high = 2 * levels[0], 2 * levels[-1]
    return (ratios * 2).ceil_().clamp_(low, high).sub_(low).to(torch.int32)


@cache
def _codes_by_half_steps(levels: tuple[float, ...]) -> Tensor:
    table = torch.tensor(levels, dtype=torch.float32)
    places = torch.arange(2 * levels[0], 2 * levels[-1] + 1) / 2
    return torch.bucketize(places, (table[1:] + table[:-1]) / 2).to(torch.uint8)


@cache
def _levels_by_half_steps(levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32)[_codes_by_half_steps(levels).long()]


@dataclass(frozen=True)
class Quantized:
    """A weight matrix on a format's grid, before packing.

    Attributes:
        format: The format.
        codes: (rows, columns) uint8.
        scales: (rows, columns / block) float32, each exactly an fp16 number.
    """

    format: Format
    codes: Tensor
    scales: Tensor

    def decode(self) -> Tensor:
        """Return the weights, (rows, columns) float32, bit for bit as the engine decodes them."""
        levels = self.format.table()[self.codes.long()]
        return (levels.unflatten(1, (-1, self.format.block)) * self.scales[:, :, None]).flatten(1)


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
    """Lay codes and scales out as bytes."""
    form, (rows, columns) = quantized.format, quantized.codes.shape
    scales = quantized.scales.reshape(-1, 1).half().view(torch.uint8)
    codes = form.pack_codes(quantized.codes.reshape(-1, form.block))
    return Packed(form, torch.cat([scales, codes], 1).reshape(rows, -1), (rows, columns))


def unpack(packed: Packed) -> Quantized:
    """Read codes and scales back from bytes."""
    form, (rows, columns) = packed.format, packed.shape
    blocks = packed.rows.reshape(-1, form.block_bytes)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = form.unpack_codes(blocks[:, 2:])
    return Quantized(form, codes.reshape(rows, columns), scales.reshape(rows, -1))


def storable(scales: Tensor) -> Tensor:
    """Round scales to what the file can hold: fp16, finite."""
    return scales.clamp(-FP16_MAX, FP16_MAX).half().float()


@torch.no_grad()
def fit_scales(weights: Tensor, importance: Tensor, form: Format) -> Tensor:
    """Return one scale per row for blocks of weights, by search and closed-form refit.

    For each candidate scale the codes are taken by rounding, then the scale that is best for those codes,
    s = Σ h w l / Σ h l², is computed; the candidate whose refitted error Σ h (w - s l)² is lowest wins. Both
    signs are tried where the levels are lopsided, so that the extreme weight can sit on the longer side.
    (The search of ggml's quantizers, there over a different grid.)

    Args:
        weights: (rows, block) float32.
        importance: (block,) or (rows, block), non-negative; the weight h of each squared error.
        form: The format; weights has its block length.

    Returns:
        (rows,) float32, each exactly an fp16 number.
    """
    if len(weights) > ROWS_AT_ONCE:
        parts = zip(weights.split(ROWS_AT_ONCE), importance.expand_as(weights).split(ROWS_AT_ONCE), strict=True)
        return torch.cat([fit_scales(part, weight, form) for part, weight in parts])
    table = form.table()
    peak = weights.gather(1, weights.abs().argmax(1, keepdim=True))
    peak = torch.where(peak.abs() < NEGLIGIBLE, 0.0, peak)
    ends = (table[0], table[-1]) if table[0] != -table[-1] else (table[0],)
    tiny = torch.finfo(torch.float32).tiny
    best_score = weights.new_full((len(weights), 1), -1.0)
    best = torch.zeros_like(peak)
    weighted = weights * importance
    importance = importance.expand_as(weights)
    for end in ends:
        for factor in SEARCH if len(form.levels) <= SEARCHED_LEVELS else (1.0,):
            levels = form.snap(weights * ratio(end, factor * peak))
            cross = (weighted * levels).sum(1, keepdim=True)
            norm = (importance * levels.square_()).sum(1, keepdim=True).clamp_min_(tiny)
            score = cross.square() / norm
            better = score > best_score
            best_score = torch.where(better, score, best_score)
            best = torch.where(better, cross / norm, best)
    return storable(best.squeeze(1))


def ratio(weights: Tensor, scales: Tensor) -> Tensor:
    """Divide weights by scales; where a scale is zero every code decodes to zero, and the ratio is zero too."""
    return torch.where(scales == 0, 0.0, weights / scales)


@torch.no_grad()
def round_to_nearest(weight: Tensor, form: Format, importance: Tensor | None = None) -> Quantized:
    """Quantize each block on its own: scale by search, codes by rounding.

    Args:
        weight: (rows, columns).
        form: The format.
        importance: (columns,) weight of each column's squared error; all equal where None.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(-1, form.block)
    if importance is None:
        spread = torch.ones_like(blocks[:1])
    else:
        spread = importance.float().reshape(1, -1, form.block).expand(rows, -1, -1).reshape(blocks.shape)
    scales = fit_scales(blocks, spread.expand_as(blocks), form)
    codes = form.nearest(ratio(blocks, scales[:, None]))
    return Quantized(form, codes.reshape(rows, columns), scales.reshape(rows, -1))
