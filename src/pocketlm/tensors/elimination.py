"""Optimal Brain Surgeon, column by column.

The columns of W are replaced from left to right. Replacing a column by something cheaper makes an error; the
columns to its right can absorb that error, and the Gram matrix of the inputs says how.

    W      |■■■■■■■■|■■■c····|········|      ■ replaced   · not yet replaced
            ---------block---          -> inside the block the error is pushed at once,
                             --------  -> to the right of it once per block, as one matrix product
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pocketlm.errors import PocketlmError
from pocketlm.tensors.formats import Format, Quantized, fit_scales
from pocketlm.tensors.formats.block import ratio, storable

REFIT_ROWS = 1024  # rows whose normal equations are in memory together
MOST_TENFOLDS = 8  # of damping, after which a Gram matrix is not one

Replace = Callable[[Tensor, int], Tensor]
"""`replace(column, c) -> column`: the cheap version of column `c` of a block, (rows,)."""

Choose = Callable[[Tensor, Tensor, int], Replace]
"""`choose(block, factor, start) -> replace`: look at a block of columns before they are replaced."""


def ridge(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Return what to add to the diagonal of a Gram matrix: a share of its mean, or of 1 where that is zero."""
    mean = gram.diagonal().mean()
    return damping * torch.where(mean == 0, 1.0, mean)


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Return the upper-triangular U with (G + λI)⁻¹ = UᵀU, where λ = damping · mean(diag G).

    Damping grows tenfold until the Cholesky factors exist, as in GPTQ's reference implementation.

    Args:
        gram: (columns, columns) float32, the sum of x xᵀ over calibration tokens.
        damping: Share of the mean diagonal that is added to the diagonal.

    Raises:
        PocketlmError: The matrix has NaN or infinite entries.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for growth in range(MOST_TENFOLDS):
        lower, failed = torch.linalg.cholesky_ex(gram + ridge(gram, damping * 10**growth) * eye)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise PocketlmError(
        "The inputs of a layer overflow or are not numbers, so it cannot be quantized. "
        "Check that the model answers sensibly before it is compressed"
    )


@torch.no_grad()
def eliminate(weight: Tensor, factor: Tensor, choose: Choose, block: int) -> Tensor:
    """Replace every column of `weight`, keeping W X as close as possible to what it was.

    The recursion of GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1) and SparseGPT
    (https://arxiv.org/abs/2301.00774, algorithm 1). The result does not depend on `block` where `choose` does not.

    Args:
        weight: (rows, columns) float32.
        factor: (columns, columns), from `inverse_factor`.
        choose: What "cheap" means; called once per block with the block as the errors so far have left it,
            (rows, block), the factor's corner for it, and the index of its first column.
        block: Columns between two updates of everything to the right.
    """
    # Columns are rows here: each one is then contiguous in memory, which is what the inner loop touches.
    work = weight.T.contiguous().clone()
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        corner = factor[start:stop, start:stop]
        replace = choose(work[start:stop].T, corner, start)
        errors = torch.empty_like(work[start:stop])
        for c in range(stop - start):
            column = work[start + c]
            cheap = replace(column, c)
            errors[c] = (column - cheap) / corner[c, c]
            work[start + c + 1 : stop].addr_(corner[c, c + 1 :], errors[c], alpha=-1)
            work[start + c] = cheap
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return work.T.contiguous()


def group_order(importance: Tensor, group: int) -> Tensor:
    """Return the column order of activation ordering that leaves every group of columns in one piece.

    Groups by their largest importance, columns by importance inside their group, both descending.

    Args:
        importance: (columns,), the diagonal of the Gram matrix.
        group: Columns that share a scale and so must stay neighbours.
    """
    grouped = importance.reshape(-1, group)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    columns = inside + group * torch.arange(len(grouped), device=importance.device)[:, None]
    return columns[grouped.amax(1).argsort(descending=True, stable=True)].reshape(-1)


@torch.no_grad()
def gptq(weight: Tensor, gram: Tensor, form: Format, damping: float = 0.01) -> Quantized:
    """Choose codes column by column so that the rounding errors cancel in the layer's output.

    GPTQ (https://arxiv.org/abs/2210.17323) with activation order kept inside blocks, a searched scale per block
    taken from the already compensated weights, and at the end all scales of a row re-solved together in the Gram
    matrix's metric.

    Args:
        weight: (rows, columns).
        gram: (columns, columns) float32, the sum of x xᵀ over calibration tokens.
        form: Any block format.
        damping: As in `inverse_factor`.
    """
    weight = weight.float()
    rows, columns = weight.shape
    order = group_order(gram.diagonal(), form.block)
    factor = inverse_factor(gram[order][:, order], damping)
    table = form.table()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // form.block, device=weight.device)

    def choose(block: Tensor, corner: Tensor, start: int) -> Replace:
        # An error in column c costs e² / U_cc² after the columns to its right have absorbed what they can.
        scale = fit_scales(block.contiguous(), corner.diagonal().square().reciprocal(), form)
        scales[:, order[start] // form.block] = scale
        places = order[start : start + form.block]

        def replace(column: Tensor, c: int) -> Tensor:
            code = form.nearest(ratio(column, scale))
            codes[places[c]] = code
            return table[code.long()] * scale

        return replace

    eliminate(weight[:, order], factor, choose, form.block)
    return refit_scales(weight, Quantized(form, codes.T.contiguous(), scales), gram, damping)


@torch.no_grad()
def refit_scales(weight: Tensor, quantized: Quantized, gram: Tensor, damping: float = 0.01) -> Quantized:
    """Re-solve the scales of each row by least squares on the layer's output, codes fixed.

    With Q the row's levels spread over its blocks, s = (QᵀGQ)⁻¹QᵀGw minimises (w - Qs)ᵀG(w - Qs). Rows that fp16
    rounding makes worse keep the scales they had.

    Args:
        weight: (rows, columns) float32, what should have been stored.
        quantized: Codes and scales to start from.
        gram: (columns, columns) float32.
        damping: Share of the mean diagonal added to the diagonal, as when the codes were chosen.
    """
    form, block = quantized.format, quantized.format.block
    metric = gram + ridge(gram, damping) * torch.eye(len(gram), device=gram.device)
    table = form.table()
    fitted = []
    for codes, rows in zip(quantized.codes.split(REFIT_ROWS), weight.split(REFIT_ROWS), strict=True):
        by_block = table[codes.long()].unflatten(1, (-1, block))
        normal, target = [], []
        for g in range(by_block.shape[1]):
            reach = by_block[:, g] @ metric[g * block : (g + 1) * block]  # levels seen through the metric
            normal.append((reach.unflatten(1, (-1, block)) * by_block).sum(2))
            target.append((reach * rows).sum(1))
        equations = torch.stack(normal, 1)  # (rows, blocks, blocks)
        diagonal = equations.diagonal(dim1=1, dim2=2)
        diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True).clamp_min(1e-20))
        fitted.append(torch.linalg.solve_ex(equations, torch.stack(target, 1))[0])
    scales = storable(torch.nan_to_num(torch.cat(fitted), nan=0.0))
    refit = Quantized(form, quantized.codes, scales)
    better = output_errors(weight, refit.decode(), metric) < output_errors(weight, quantized.decode(), metric)
    return Quantized(form, quantized.codes, torch.where(better[:, None], scales, quantized.scales))


def output_errors(weight: Tensor, cheap: Tensor, gram: Tensor) -> Tensor:
    """Return ‖(w - w')X‖² of each row, (rows,), from the Gram matrix alone."""
    change = weight.float() - cheap.float()
    return ((change @ gram) * change).sum(1)
