"""Codebooks: formats that store the index of a vector of magnitudes instead of one code per weight.

Comparing with every vector is slow. So the space of magnitudes is cut into cells, the few vectors nearest to each
cell's middle are tabulated once, and only those are compared. What that loses against all vectors is below 2 % of
the squared error (tests/test_formats.py).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import torch
from torch import Tensor

# By the dimensions of the vectors: cells per dimension, candidates per cell, how far above the smallest magnitude the
# first cell ends, and at which part of the largest one the last cell begins.
_CELLS = {4: (12, 6, 0.0, 0.97), 8: (4, 16, 0.4, 0.87)}
_AT_ONCE = 1 << 13  # cells or vectors that are compared together


@dataclass(frozen=True, eq=False)
class Codebook:
    """Which vectors of signed levels a format can store.

    Attributes:
        magnitudes: Magnitudes that occur, ascending; the levels are these with both signs.
        vectors: (n, size) int64, indices into `magnitudes`.
        length: Weights that are chosen together: a multiple of the vectors' size.
        even: Whether the number of minus signs among these weights is even, because the last sign is not stored.
    """

    magnitudes: tuple[float, ...]
    vectors: Tensor
    length: int
    even: bool

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of single weights, ascending."""
        return (*(-magnitude for magnitude in reversed(self.magnitudes)), *self.magnitudes)

    @property
    def size(self) -> int:
        """Dimensions of a vector."""
        return self.vectors.shape[1]

    def nearest(self, ratios: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return codes (uint8, indices into `levels`) of a vector near each vector: mostly the nearest.

        Args:
            ratios: (..., n) with n a multiple of `length`, in units of the levels.
            importance: The weight of each squared error, shaped like `ratios`; all equal where None.
        """
        index, negative = [], []
        heavy = repeat(None) if importance is None else importance.reshape(-1, self.length).split(_AT_ONCE)
        for part, weight in zip(ratios.reshape(-1, self.length).split(_AT_ONCE), heavy, strict=False):
            minus = part < 0
            if self.even:
                minus = _with_even_signs(minus, part if weight is None else part * part * weight)
            sizes = torch.where(minus, -part, part).reshape(-1, self.size)
            index.append(self._among_candidates(sizes, None if weight is None else weight.reshape(-1, self.size)))
            negative.append(minus)
        return self.codes(torch.cat(index), torch.cat(negative)).reshape(ratios.shape)

    def _among_candidates(self, sizes: Tensor, importance: Tensor | None) -> Tensor:
        cells, low, width = self._cells
        digits = ((sizes - low) / width).ceil_().clamp_(0, cells - 1)
        place = (digits @ (cells ** torch.arange(self.size)).float()).to(torch.int64)
        candidates = self._candidates[place]
        distances = torch.nn.functional.embedding(candidates, self._table).sub_(sizes[:, None]).square_()
        if importance is not None:
            distances *= importance[:, None]
        return candidates.gather(1, distances.sum(2).argmin(1, keepdim=True)).squeeze(1)

    def index(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return which vector each part of the codes is, (n, parts) int64, and which weights are negative, (n, m).

        Args:
            codes: (n, m) uint8, all of them allowed vectors.
        """
        count = len(self.magnitudes)
        negative = codes < count
        magnitudes = torch.where(negative, count - 1 - codes.to(torch.int16), codes.to(torch.int16) - count)
        keys = (magnitudes.reshape(len(codes), -1, self.size).long() * self._places).sum(-1)
        return self._by_key[keys], negative

    def codes(self, index: Tensor, negative: Tensor) -> Tensor:
        """Return the codes of vectors and signs, the inverse of `index`."""
        magnitudes, count = self.vectors.to(torch.uint8)[index].reshape(negative.shape), len(self.magnitudes)
        return torch.where(negative, count - 1 - magnitudes, count + magnitudes)

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self.magnitudes)[self.vectors]

    @cached_property
    def _places(self) -> Tensor:
        return len(self.magnitudes) ** torch.arange(self.size)

    @cached_property
    def _by_key(self) -> Tensor:
        keys = (self.vectors * self._places).sum(1)
        table = torch.full((len(self.magnitudes) ** self.size,), -1, dtype=torch.int64)
        table[keys] = torch.arange(len(keys))
        return table

    @property
    def _cells(self) -> tuple[int, float, float]:
        """How many cells a dimension has, where the first one ends and how wide the others are."""
        cells, _, above, part = _CELLS[self.size]
        low = self.magnitudes[0] + above
        return cells, low, (part * self.magnitudes[-1] - low) / (cells - 2)

    @cached_property
    def _candidates(self) -> Tensor:
        cells, low, width = self._cells
        middles = (torch.arange(cells) - 0.5) * width + low
        middles[0] = max(0.0, middles[0].item())
        norms = self._table.square().sum(1) / 2
        nearest = []
        for place in torch.arange(cells**self.size).split(_AT_ONCE):
            point = middles[place[:, None] // cells ** torch.arange(self.size) % cells]
            nearest.append((point @ self._table.T - norms).topk(_CELLS[self.size][1], 1).indices.to(torch.int32))
        return torch.cat(nearest)


def _with_even_signs(negative: Tensor, cost: Tensor) -> Tensor:
    """Flip the sign of the weight that matters least where the number of minus signs is odd."""
    odd = negative.sum(1, keepdim=True) % 2 == 1
    least = cost.abs().argmin(1, keepdim=True)
    return negative.scatter(1, least, negative.gather(1, least) ^ odd)
