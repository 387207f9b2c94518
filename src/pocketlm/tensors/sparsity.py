"""Which connections of a matrix go, and what those that stay make of it.

    method          a connection counts     compared over       what stays
    magnitude       |w|                     the matrix          as it was
    wanda           |w| · ‖x‖₂              each row            as it was
    wanda_absorbed  |w| · ‖x‖₂              each row            absorbs what goes, column by column
    sparsegpt       w² / [H⁻¹]              128 columns         absorbs what goes, column by column

With a pattern n:m all compare inside every m neighbours of a row, of which n stay.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.tensors.elimination import Replace, eliminate, inverse_factor

BLOCK = 128  # columns that SparseGPT chooses among at once
OUTLIER = 5.0  # times the mean, above which OWL calls a connection an outlier
REACH = 0.08  # half of what the sparsities of OWL's blocks spread over


@dataclass(frozen=True)
class Sparsity:
    """How many weights of a matrix become zero, and where they may lie.

    Attributes:
        share: Of all weights, in [0, 1).
        group: Neighbours in a row of which exactly this share goes, m of a pattern n:m; anywhere where 0.
    """

    share: float
    group: int = 0

    def gone(self, count: int) -> int:
        """Return how many of `count` weights become zero."""
        return round(self.share * count)


def sparsity_of(share: float | None, pattern: str | None) -> Sparsity:
    """Return what a share and a pattern such as `2:4` (2 of every 4 neighbours stay) ask for together.

    Raises:
        BadInputError: Neither is given, the share is not in (0, 1), the pattern is none, or the two contradict.
    """
    if share is not None and not 0 < share < 1:
        raise BadInputError(f"The sparsity is a share of the weights, and {share:g} is none. Give one between 0 and 1")
    if pattern is None:
        if share is None:
            raise BadInputError("How many connections go is not said. Give a sparsity such as 0.5, or a pattern (2:4)")
        return Sparsity(share)
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    kept, group = map(int, found.groups()) if found else (1, 0)
    if kept >= group:
        raise BadInputError(f"`{pattern}` is no pattern. Give n:m, the n weights of every m that stay, such as 2:4")
    if share is not None and abs(1 - kept / group - share) > 1e-6:
        raise BadInputError(
            f"The pattern {pattern} makes {1 - kept / group:g} of the weights zero, not {share:g}. Give one of the two"
        )
    return Sparsity(1 - kept / group, group)


def strongest(scores: Tensor, gone: int) -> Tensor:
    """Return a mask that is False for the `gone` lowest scores of each row and True for the others."""
    weakest = scores.argsort(dim=1, stable=True)[:, :gone]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, weakest, False)


def _keep(scores: Tensor, sparsity: Sparsity, by_row: bool) -> Tensor:
    pieces = scores.reshape(-1, sparsity.group or (scores.shape[1] if by_row else scores.numel()))
    return strongest(pieces, sparsity.gone(pieces.shape[1])).reshape(scores.shape)


def magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `weight`, (rows, columns), without its smallest entries."""
    return weight.where(_keep(weight.abs(), sparsity, by_row=False), 0)


def wanda(weight: Tensor, loudness: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `weight` without the entries that matter least on their inputs, row by row.

    Wanda (https://arxiv.org/abs/2306.11695): a connection counts |w| · ‖x‖₂.

    Args:
        weight: (rows, columns).
        loudness: (columns,), ‖x‖₂ of each input over the calibration tokens; any common factor.
        sparsity: What goes.
    """
    return weight.where(_keep(weight.abs() * loudness, sparsity, by_row=True), 0)


def sparsegpt(weight: Tensor, factor: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `weight` with entries removed from left to right, each absorbed by the columns to its right.

    SparseGPT (https://arxiv.org/abs/2301.00774), algorithm 1: what goes is chosen for 128 columns at a time, over all
    rows; with a pattern inside every group of m columns. Weights come to the choice as the errors before left them.

    Args:
        weight: (rows, columns).
        factor: (columns, columns), from `inverse_factor`.
        sparsity: What goes.
    """
    rows = len(weight)
    width = sparsity.group or BLOCK
    # A removed weight costs w² / U_cc² after the columns to its right have absorbed what they can.
    costs = factor.diagonal().square().reciprocal()

    def choose(rest: Tensor, start: int) -> Replace:
        scores = (rest[:width].square() * costs[start : start + width, None]).T
        if sparsity.group:
            keep = strongest(scores, sparsity.gone(width))
        else:  # counted from the first column on, so that the shares of the blocks add up exactly
            gone = sparsity.gone(rows * (start + scores.shape[1])) - sparsity.gone(rows * start)
            keep = strongest(scores.reshape(1, -1), gone).reshape(scores.shape)
        columns_kept = keep.T.contiguous()
        return lambda columns, c: columns.where(columns_kept[c : c + 1], 0)

    return eliminate(weight, factor, choose, width)


def absorbed(weight: Tensor, keep: Tensor, factor: Tensor) -> Tensor:
    """Return `weight` without what a mask chosen beforehand removes, each entry absorbed by the columns to its right.

    Args:
        weight: (rows, columns).
        keep: (rows, columns) bool.
        factor: (columns, columns), from `inverse_factor`.
    """
    columns_kept = keep.T.contiguous()
    return eliminate(
        weight, factor, lambda _, start: lambda columns, c: columns.where(columns_kept[start + c, None], 0), BLOCK
    )


def _each_absorbed(weights: Sequence[Tensor], gram: Tensor, sparsity: Sparsity) -> list[Tensor]:
    factor, loudness = inverse_factor(gram), gram.diagonal().sqrt()
    return [absorbed(weight, _keep(weight.abs() * loudness, sparsity, by_row=True), factor) for weight in weights]


def _each_sparsegpt(weights: Sequence[Tensor], gram: Tensor, sparsity: Sparsity) -> list[Tensor]:
    factor = inverse_factor(gram)
    return [sparsegpt(weight, factor, sparsity) for weight in weights]


Prune = Callable[[Sequence[Tensor], Tensor, Sparsity], list[Tensor]]
"""From matrices that read the same inputs, (rows, columns) each, and the sum of x xᵀ to the pruned matrices."""

METHODS: dict[str, Prune] = {
    "magnitude": lambda weights, gram, sparsity: [magnitude(weight, sparsity) for weight in weights],
    "wanda": lambda weights, gram, sparsity: [wanda(weight, gram.diagonal().sqrt(), sparsity) for weight in weights],
    "wanda_absorbed": _each_absorbed,
    "sparsegpt": _each_sparsegpt,
}


def outlier_share(scores: Sequence[Tensor]) -> float:
    """Return the share of connections that count more than `OUTLIER` times the mean.

    Args:
        scores: |w| · ‖x‖₂ of every matrix of a block, of any shapes.
    """
    everything = torch.cat([each.flatten() for each in scores])
    return (everything > OUTLIER * everything.mean()).float().mean().item()


def owl(shares: Sequence[float], sparsity: float) -> list[float]:
    """Return a sparsity for each block: fewer connections go where more of them are outliers; the mean is kept.

    Outlier-weighed layer-wise sparsity (https://arxiv.org/abs/2310.05175): what is kept is linear in the share of
    outliers and spreads over 2 · `REACH`; less where that would leave [0, 1).

    Args:
        shares: Of outliers, per block.
        sparsity: The mean.
    """
    outliers = torch.tensor(shares, dtype=torch.float64)
    scaled = (outliers - outliers.min()) / (outliers.max() - outliers.min()).clamp_min(1e-30)
    change = (scaled.mean() - scaled) * 2 * REACH
    lowest, highest = -change.min().item(), change.max().item()
    room = min(1.0, sparsity / max(lowest, 1e-30), 0.999 * (1 - sparsity) / max(highest, 1e-30))
    return (sparsity + room * change).clamp_min(0).tolist()
