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
from pocketlm.tensors.formats import Format, Quantized, effective, fit_scales, fit_steps, inverse_scale

GPTQ_ROWS = 16384  # rows whose codes are chosen together
REFIT_NUMBERS = 1 << 18  # of the weights whose normal equations are made together: they stay in the CPU's cache
# Of the way to the original's output. All of it is too far: what the layer reads has noise, on which least squares
# shrinks the weights, in every block again. On the reference model a quarter lowers the KL, the whole multiplies it.
DRIFT_SHARE = 0.25
LEAST_GAIN = 1e-5  # of the terms whose difference it is
DESCENTS = 2  # over all columns: on other text 8 % less output error at 2 bits, 6 % at 4; two more take 1 %
DESCENT_COLUMNS = 64  # between two products with the whole Gram matrix; a multiple of every vector
MOST_TENFOLDS = 8  # of damping, after which a Gram matrix is not one

Replace = Callable[[Tensor, int], Tensor]
"""`replace(columns, c) -> columns`: the cheap version of the columns from `c` of a group on, (vector, rows)."""

Choose = Callable[[Tensor, int], Replace]
"""`choose(rest, start) -> replace`: look at all columns from `start` on, (columns, rows), before a group goes."""


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
    # Factored from the last column backwards, G + λI = R Rᵀ with R upper-triangular, and U is its inverse: one
    # factorisation and one triangular inverse instead of two factorisations around a full inverse.
    for growth in range(MOST_TENFOLDS):
        damped = gram.flip(0, 1)
        damped.diagonal().add_(ridge(gram, damping * 10**growth))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            del damped  # matrices of wide layers are large: as few of them at a time as can be
            upper = lower.flip(0, 1)
            del lower
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return torch.linalg.solve_triangular(upper, eye, upper=True)
    raise PocketlmError(
        "The inputs of a layer overflow or are not numbers, so it cannot be quantized. "
        "Check that the model answers sensibly before it is compressed"
    )


@torch.no_grad()
def eliminate(weight: Tensor, factor: Tensor, choose: Choose, group: int, vector: int = 1) -> Tensor:
    """Replace every column of `weight`, keeping W X as close as possible to what it was.

    The recursion of GPTQ (https://arxiv.org/abs/2210.17323, algorithm 1) and SparseGPT
    (https://arxiv.org/abs/2301.00774, algorithm 1), here for `vector` columns at a time. The result does not depend on
    `group` where `choose` does not.

    Args:
        weight: (rows, columns) float32.
        factor: (columns, columns), from `inverse_factor`.
        choose: What "cheap" means; called before each group with all columns from there on as the errors so far have
            left them.
        group: Columns between two updates of everything to the right.
        vector: Neighbouring columns that are replaced together.
    """
    # Columns are rows here: each one is then contiguous in memory, which is what the inner loop touches.
    work = weight.T.contiguous().clone()
    for start in range(0, len(work), group):
        stop = min(start + group, len(work))
        replace = choose(work[start:], start)
        # What a column still lacks is added when its turn comes: one product with the errors before it.
        errors = torch.empty_like(work[start:stop])
        corner = factor[start:stop, start:stop]
        for c in range(0, stop - start, vector):
            after = c + vector
            columns = work[start + c : start + after]
            if c:
                columns.addmm_(corner[:c, c:after].T, errors[:c], alpha=-1)
            cheap = replace(columns, c)
            missing = columns - cheap
            if vector == 1:
                errors[c] = missing[0] / corner[c, c]
            else:
                errors[c:after] = torch.linalg.solve_triangular(corner[c:after, c:after].T, missing, upper=False)
            columns.copy_(cheap)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return work.T.contiguous()


def group_order(importance: Tensor, *sizes: int) -> Tensor:
    """Return the column order of activation ordering that leaves groups of columns in one piece, at several levels.

    Spans by their largest importance, inside them groups, inside those columns, all descending.

    Args:
        importance: (columns,), the diagonal of the Gram matrix.
        sizes: Columns that must stay neighbours, from the largest to the smallest, each a multiple of the next.
    """
    order = torch.arange(len(importance), device=importance.device)[None]
    for size in (*sizes, 1):
        pieces = order.unflatten(1, (-1, size))
        ranks = importance[pieces].amax(2).argsort(dim=1, descending=True, stable=True)
        order = pieces.gather(1, ranks[:, :, None].expand_as(pieces)).flatten(0, 1)
    return order.flatten()


@torch.no_grad()
def gptq(
    weight: Tensor,
    gram: Tensor,
    form: Format,
    damping: float = 0.01,
    drift: Tensor | None = None,
    mask: Tensor | None = None,
    descents: int = 0,
) -> Quantized:
    """Choose codes column by column so that the rounding errors cancel in the layer's output.

    GPTQ (https://arxiv.org/abs/2210.17323) with activation order kept inside groups, searched scales taken from the
    already compensated weights, and at the end all scales of a row re-solved together in the Gram matrix's metric.

    Args:
        weight: (rows, columns).
        gram: (columns, columns) float32, the sum of x xᵀ over calibration tokens.
        form: Any format.
        damping: As in `inverse_factor`.
        drift: (columns, columns), the sum of (x̃ - x) xᵀ, where x̃ is what the layer reads in the original model: the
            target is then nearer to the original's output, as in GPTAQ (https://arxiv.org/abs/2504.02692).
        mask: (rows, columns) bool, which weights may be other than zero; the columns to the right absorb what that
            costs. Only for formats that have an exact zero.
        descents: How often to go over all columns again with `descend`, the scales re-solved after each time.
    """
    if mask is not None and not form.has_zero:
        raise ValueError(f"{form.name} has no code that decodes to zero")
    sizes = dict.fromkeys((form.span, form.group, form.vector))
    order = group_order(gram.diagonal(), *(size for size in sizes if size > 1))
    order = order.reshape(-1, form.vector).sort(1).values.flatten()  # a codebook's vectors keep their order
    factor = inverse_factor(gram[order[:, None], order], damping)
    parts = []
    for start in range(0, len(weight), GPTQ_ROWS):  # each row is quantized on its own: a large embedding goes in parts
        rows = slice(start, start + GPTQ_ROWS)
        target = weight[rows].float()
        if drift is not None:
            target = aimed(target, drift, factor, order)
        kept = None if mask is None else mask[rows][:, order].T.contiguous()
        part = refit_scales(target, _gptq_rows(target, factor, order, form, kept), gram, damping)
        for _ in range(descents):
            again = descend(target, part, gram, damping, None if mask is None else mask[rows])
            part = refit_scales(target, again, gram, damping)
        parts.append(part)
    fields = ("codes", "scales", "steps")
    return Quantized(form, *(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def _gptq_rows(weight: Tensor, factor: Tensor, order: Tensor, form: Format, kept: Tensor | None = None) -> Quantized:
    # `kept` is the mask as (columns, rows), in the order of processing.
    rows, columns = weight.shape
    # An error in column c costs e² / U_cc² after the columns to its right have absorbed what they can.
    costs = factor.diagonal().square().reciprocal()
    levels = torch.empty(columns, rows, device=weight.device)
    scales = torch.empty(rows, columns // form.span, form.scales, device=weight.device)
    steps = torch.ones(rows, columns // form.group, 2 if form.offset else 1, dtype=torch.int16, device=weight.device)

    def choose(rest: Tensor, start: int) -> Replace:
        if kept is not None:
            rest = rest.where(kept[start:], 0)  # scales are for what is stored
        span, group = order[start] // form.span, order[start] // form.group
        if start % form.span == 0:
            # Inside a span, groups lie in processing order here and by place in `steps`.
            spread = costs[start : start + form.span].expand(rows, -1)
            scales[:, span] = fit_scales(rest[: form.span].T.contiguous(), spread, form)
        spread = costs[start : start + form.group].expand(rows, -1)
        steps[:, group] = fit_steps(rest[: form.group].T.contiguous(), spread, form, scales[:, span])
        a, b = effective(form, scales[:, span, None], steps[:, group, None].expand(-1, form.span // form.group, -1))
        a, b = a[:, :1].T.contiguous(), None if b is None else b[:, :1].T.contiguous()
        inverse = inverse_scale(a)

        def replace(column: Tensor, c: int) -> Tensor:
            if kept is not None:
                column = column.where(kept[start + c : start + c + 1], 0)
            ratio = (column if b is None else column - b) * inverse
            places = slice(start + c, start + c + form.vector)
            if form.vector == 1:
                level = form.snap(ratio)
            else:
                level = form.snap(ratio.T.contiguous(), costs[places].expand(rows, -1)).T
            levels[places] = level
            return level * a if b is None else level * a + b

        return replace

    eliminate(weight[:, order], factor, choose, form.group, form.vector)
    return Quantized(form, form.codes_of(levels.T[:, order.argsort()]), scales, steps)


@torch.no_grad()
def descend(
    weight: Tensor, quantized: Quantized, gram: Tensor, damping: float = 0.01, mask: Tensor | None = None
) -> Quantized:
    """Choose every code anew, one column after another, each the best for what all other columns now are.

    Coordinate descent on (w - q)ᵀ(G + λI)(w - q), scales fixed: GPTQ decides each column once and never knows what the
    later ones will be. As in QuantEase (https://arxiv.org/abs/2309.01885), here for grids whose scales are re-solved in
    between. The error of no row grows.

    Args:
        weight: (rows, columns) float32, what should have been stored.
        quantized: Codes, scales and steps to start from.
        gram: (columns, columns) float32.
        damping: Share of the mean diagonal added to the diagonal, as when the codes were chosen.
        mask: (rows, columns) bool, which weights may be other than zero.
    """
    form = quantized.format
    metric = gram.clone()
    metric.diagonal().add_(ridge(gram, damping))
    a, b = effective(form, quantized.scales, quantized.steps)
    # Columns are rows here, as in `eliminate`.
    a, b = (part if part is None else part.T.repeat_interleave(form.group, 0) for part in (a, b))
    inverse, now = inverse_scale(a), quantized.decode().T.contiguous()
    errors, levels = weight.T - now, form.table()[quantized.codes.T.long()]
    for start in range(0, len(now), DESCENT_COLUMNS):
        stop = min(start + DESCENT_COLUMNS, len(now))
        pull = metric[start:stop] @ errors
        for column in range(start, stop, form.vector):
            places, inner = slice(column, column + form.vector), slice(column - start, column - start + form.vector)
            corner = metric[places, places]
            old, slope = now[places], pull[inner]
            # The best numbers, were there no grid.
            wanted = old + (slope / corner if form.vector == 1 else torch.linalg.solve(corner, slope))
            if mask is not None:
                wanted = wanted.where(mask[:, places].T, 0)
            ratio = (wanted if b is None else wanted - b[places]) * inverse[places]
            if form.vector == 1:
                level = form.snap(ratio)
            else:
                level = form.snap(ratio.T.contiguous(), corner.diagonal().expand(len(weight), -1)).T
            new = level * a[places] if b is None else level * a[places] + b[places]
            if form.vector > 1:  # a codebook's nearest vector is found without the interplay of its columns
                before, after = (((part - wanted) * (corner @ (part - wanted))).sum(0) for part in (old, new))
                new, level = (torch.where(after < before, *pair) for pair in ((new, old), (level, levels[places])))
            change = new - old
            levels[places] = level
            now[places] = new
            errors[places] -= change
            pull[inner.stop :].addmm_(metric[places, column + form.vector : stop].T, change, alpha=-1)
    return Quantized(form, form.codes_of(levels.T.contiguous()), quantized.scales, quantized.steps)


def aimed(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor, share: float = DRIFT_SHARE) -> Tensor:
    """Return the weights that, on the inputs there are, come closer to W on the inputs there should have been.

    The least-squares answer of min ‖W X̃ - V X‖² + λ‖W - V‖² is V = W + W D (G + λI)⁻¹ with D = Σ (x̃ - x) xᵀ.

    Args:
        weight: W, (rows, columns) float32.
        drift: D, (columns, columns).
        factor: U with (G + λI)⁻¹ = UᵀU, its columns in another order.
        order: That order.
        share: How much of the way to go.
    """
    change = torch.empty_like(weight)
    change[:, order] = (weight @ drift)[:, order] @ factor.T @ factor
    return weight + share * change


@torch.no_grad()
def refit_scales(weight: Tensor, quantized: Quantized, gram: Tensor, damping: float = 0.01) -> Quantized:
    """Re-solve the stored scales of each row by least squares on the layer's output, codes and steps fixed.

    Weights are linear in the scales: with Q their coefficients, s = (QᵀGQ)⁻¹QᵀGw minimises (w - Qs)ᵀG(w - Qs). Rows
    that rounding the scales makes worse keep the scales they had.

    Args:
        weight: (rows, columns) float32, what should have been stored.
        quantized: Codes, scales and steps to start from.
        gram: (columns, columns) float32.
        damping: Share of the mean diagonal added to the diagonal, as when the codes were chosen.
    """
    form = quantized.format
    metric = gram.clone()
    metric.diagonal().add_(ridge(gram, damping))
    seen = weight @ metric
    at_once = max(1, REFIT_NUMBERS // len(gram))
    parts = (slice(start, start + at_once) for start in range(0, len(weight), at_once))
    fitted = [_best_scales(seen[rows], quantized.rows(rows), metric) for rows in parts]
    return Quantized(form, quantized.codes, torch.cat(fitted), quantized.steps)


def coefficients(quantized: Quantized) -> Tensor:
    """Return what each stored scale is multiplied with in each weight, (rows, columns, scales) float32."""
    form = quantized.format
    steps = quantized.steps.float().repeat_interleave(form.group, 1)
    levels = form.table()[quantized.codes.long()]
    first = levels * steps[..., 0]
    match form.offset:
        case "":
            return first[..., None]
        case "zero":
            return (first + steps[..., 1])[..., None]
        case "minimum":
            return torch.stack([first, steps[..., 1]], -1)


def _best_scales(seen: Tensor, quantized: Quantized, metric: Tensor) -> Tensor:
    # `seen` is the target through the metric, (rows, columns). Rows that would be worse keep the scales they have.
    form, span = quantized.format, quantized.format.span
    basis = coefficients(quantized).unflatten(1, (-1, span))
    rows, spans, _, kinds = basis.shape
    target = torch.einsum("rsck,rsc->rsk", basis, seen.unflatten(1, (-1, span)))
    equations = basis.new_zeros(rows, spans, kinds, spans, kinds)
    for place in range(spans):
        columns = slice(place * span, (place + 1) * span)
        for kind in range(kinds):
            # What a change of this scale does, seen through the metric; the equations are symmetric.
            reach = (basis[:, place, :, kind] @ metric[columns, columns.start :]).unflatten(1, (-1, span))
            for other in range(kinds):
                equations[:, place, kind, place:, other] = torch.linalg.vecdot(reach, basis[:, place:, :, other])
    equations = equations.view(rows, spans * kinds, spans * kinds)
    target, half = target.view(rows, -1, 1), equations.triu()
    diagonal = equations.diagonal(dim1=1, dim2=2)
    both = half + half.mT
    both.diagonal(dim1=1, dim2=2).sub_(diagonal)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True).clamp_min(1e-20))
    factor = torch.linalg.cholesky_ex(equations, upper=True)[0]
    solved = torch.cholesky_solve(target, factor, upper=True).view(rows, spans, kinds)
    fitted = form.storable(torch.nan_to_num(solved, nan=0.0))[0]
    # The error is sᵀEs - 2tᵀs and what no scale changes. Less than what float32 rounds away is no gain.
    before, after = (scales.reshape(rows, -1, 1) for scales in (quantized.scales, fitted))
    change = after - before
    difference = (change * (both @ (after + before) - 2 * target)).sum(1, keepdim=True)
    better = difference < -LEAST_GAIN * (change * target).abs().sum(1, keepdim=True)
    return torch.where(better, fitted, quantized.scales)


def output_errors(weight: Tensor, cheap: Tensor, gram: Tensor) -> Tensor:
    """Return ‖(w - w')X‖² of each row, (rows,), from the Gram matrix alone."""
    change = weight.float() - cheap.float()
    return ((change @ gram) * change).sum(1)


def relative_error(weight: Tensor, cheap: Tensor, gram: Tensor) -> float:
    """Return the share of a matrix's output that is error, ‖(w - w')X‖² / ‖wX‖²."""
    whole = output_errors(weight, torch.zeros_like(weight), gram).sum()
    return (output_errors(weight, cheap, gram).sum() / whole.clamp_min(1e-30)).item()
