"""Choosing scales: search over how the extreme weights are clipped, each candidate's scale refitted in closed form.

For each candidate the levels l are taken by rounding; the scale that is best for them, a = Σ h w l / Σ h l² (with an
offset, the 2 x 2 least squares for a and b), is computed; the candidate with the lowest error Σ h (w - a l - b)² wins.
This is the idea of ggml's quantizers (`make_qx_quants`, `make_qkx2_quants` in ggml-quants.c), over a different grid.

Where groups have integer steps of scales that a span shares, scales and steps are chosen in turns: each group the best
steps near those it wants, then the scales that are best for these levels and steps in the sense of least squares.
"""

import torch
from torch import Tensor

from pocketlm.tensors.formats.block import Format, Quantized, inverse_scale

# How far from "the extreme weight sits exactly on the extreme level" the search looks. Below 1 the extreme weights
# are clipped so that the many small ones get a finer grid.
SEARCH = (0.72, 0.80, 0.86, 0.91, 0.955, 1.0, 1.05, 1.1)
# The same in parts of the distance between two levels, for formats with many of them.
FINE = (-0.5, 0.5)
# With few levels it pays to clip much more.
COARSE_SEARCH = (0.35, 0.45, 0.53, 0.6, 0.66, *SEARCH)
COARSE_LEVELS = 4
# Codebooks and formats with many levels: clipping many weights never pays, and a step is slow.
SHORT_SEARCH = (0.8, 0.9, 1.0, 1.1)
SEARCHED_LEVELS = 64
# Which end of the range an offset leaves in place while the range shrinks: the lowest weight, none, the highest.
SHIFTS = (0.0, 0.5, 1.0)
# How far from "the largest group has the largest step" the search for the scale of steps looks.
SPAN_SEARCH = (0.9, 0.95, 1.0, 1.06)
# How often levels are taken anew for a refitted scale, and scales and steps for each other.
ROUNDS = 2
# Bound on rows searched together, so that a 49,152-row embedding does not need gigabytes.
ROWS_AT_ONCE = 4096
# A group whose largest weight is below this rounds to zero in every format; dividing by it could overflow.
NEGLIGIBLE = 1e-20
# Squares of weights beyond this could overflow. Not even fp16 scales reach it.
HUGE = 1e14
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def round_to_nearest(weight: Tensor, form: Format, importance: Tensor | None = None) -> Quantized:
    """Quantize each span on its own: scales by search, codes by rounding.

    Args:
        weight: (rows, columns).
        form: The format.
        importance: (columns,) weight of each column's squared error; all equal where None.
    """
    rows, columns = weight.shape
    importance = torch.ones(columns) if importance is None else importance.float()
    parts = []
    for part in weight.float().clamp(-HUGE, HUGE).split(max(1, ROWS_AT_ONCE * form.span // columns)):
        spans = part.reshape(-1, form.span)
        spread = importance.reshape(1, -1, form.span).expand(len(part), -1, -1).reshape(spans.shape)
        scales, wanted = _fit_spans(spans, spread, form)
        groups, spread = spans.reshape(-1, form.group), spread.reshape(-1, form.group)
        steps = fit_steps(groups, spread, form, _of_each_group(form, scales), wanted)
        codes = form.nearest(ratios(groups, *_of_groups(scales, steps)), spread)
        parts.append((codes, scales, steps))
    codes, scales, steps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Quantized(
        form,
        codes.reshape(rows, columns),
        scales.reshape(rows, -1, form.scales),
        steps.reshape(rows, -1, steps.shape[-1]),
    )


def _of_groups(scales: Tensor, steps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a and b, (groups, 1), from the (n, scales) of spans or of each group, and (groups, steps)."""
    spread = scales.repeat_interleave(len(steps) // len(scales), 0)
    return spread[:, :1] * steps[:, :1], spread[:, -1:] * steps[:, 1:] if steps.shape[1] > 1 else None


def ratios(weights: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """Return (w - b) / a, in units of the levels; where a is zero every code decodes alike, and the ratio is zero."""
    if b is not None:
        weights = weights - b
    return torch.where(a == 0, 0.0, weights / a)


@torch.no_grad()
def fit_scales(weights: Tensor, importance: Tensor, form: Format) -> Tensor:
    """Return the stored scales of spans of weights.

    Args:
        weights: (spans, span) float32.
        importance: (spans, span), non-negative; the weight h of each squared error.
        form: The format.

    Returns:
        (spans, scales) float32, each exactly a number that the file can hold.
    """
    return _fit_spans(weights, importance, form)[0]


def _fit_spans(weights: Tensor, importance: Tensor, form: Format) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Return the stored scales of spans, and the a and b that their groups would like."""
    groups, spread = weights.reshape(-1, form.group), importance.reshape(-1, form.group)
    a, b = wanted = fit_groups(groups, spread, form)
    if form.span == form.group:
        scales = a[:, None] if form.offset != "minimum" else torch.stack([a, b], 1)
        return form.storable(scales)[0], wanted
    of_span = a.reshape(len(weights), -1)
    extreme = of_span.gather(1, of_span.abs().argmax(1, keepdim=True))
    longest = max(form.steps, key=abs)
    best = _Best()
    for factor in SPAN_SEARCH:
        scales = factor * extreme / longest
        if form.offset:
            # The lowest offset of all (b is never positive) gets the largest step.
            offset = b.reshape(of_span.shape).amin(1, keepdim=True) / max(form.offset_steps)
            scales = torch.cat([scales, offset], 1)
        scales = form.storable(scales)[0]
        steps = _closest_steps(a, b, form, _of_each_group(form, scales))
        best.offer(*_refit(weights, importance, form, scales, steps))
    for _ in range(ROUNDS):
        steps = fit_steps(groups, spread, form, _of_each_group(form, best.values[0]), wanted)
        best.offer(*_refit(weights, importance, form, best.values[0], steps))
    return best.values[0], wanted


class _Best:
    """The values with the least error that was offered, row by row."""

    error: Tensor | None = None
    values: tuple[Tensor, ...] = ()

    def offer(self, error: Tensor, *values: Tensor) -> None:
        """Keep the values of the rows whose error is less than the least so far."""
        if self.error is None:
            self.error, self.values = error, values
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.values = tuple(
            torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip(values, self.values, strict=True)
        )


def _of_each_group(form: Format, scales: Tensor) -> Tensor:
    return scales.repeat_interleave(form.span // form.group, 0)


def _levels(weights: Tensor, importance: Tensor, form: Format, scales: Tensor, steps: Tensor) -> Tensor:
    a, b = _of_groups(scales, steps)
    heavy = importance.reshape(-1, form.group)
    return form.snap(ratios(weights.reshape(-1, form.group), a, b), heavy).reshape(weights.shape)


def _squared(
    weights: Tensor, importance: Tensor, levels: Tensor, form: Format, scales: Tensor, steps: Tensor
) -> Tensor:
    a, b = _of_groups(scales, steps)
    decoded = levels.reshape(-1, form.group) * a
    decoded = (decoded if b is None else decoded + b).reshape(weights.shape)
    return (importance * (weights - decoded).square()).sum(1)


def _refit(weights: Tensor, importance: Tensor, form: Format, scales: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the error and the least-squares scales of spans for the levels and steps that `scales` led to."""
    levels = _levels(weights, importance, form, scales, steps)
    spread = steps.float().reshape(len(weights), -1, steps.shape[-1]).repeat_interleave(form.group, 1)
    if form.offset == "minimum":
        fitted = torch.stack(_two_by_two(weights, importance, levels * spread[..., 0], spread[..., 1]), 1)
    else:
        basis = levels * spread[..., 0] + (spread[..., 1] if form.offset else 0.0)
        cross, norm = (importance * weights * basis).sum(1), (importance * basis * basis).sum(1)
        fitted = (cross / norm.clamp_min(_TINY))[:, None]
    if not form.signed:
        fitted = fitted.clamp_min(0)
    best = _Best()
    for each in (scales, form.storable(fitted)[0]):
        best.offer(_squared(weights, importance, levels, form, each, steps).nan_to_num(torch.inf), each)
    return best.error, best.values[0]


@torch.no_grad()
def fit_steps(
    groups: Tensor,
    importance: Tensor,
    form: Format,
    scales: Tensor,
    wanted: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Return the steps of groups whose span's scales are fixed.

    Args:
        groups: (groups, group) float32.
        importance: (groups, group).
        form: The format.
        scales: (groups, scales), of each group's span.
        wanted: a and b that groups would like, where they are known already.

    Returns:
        (groups, 1 or 2) int16.
    """
    if form.steps == (1,) and form.offset_steps == (1,):
        return torch.ones(len(groups), 2 if form.offset else 1, dtype=torch.int16)
    a, b = wanted or fit_groups(groups, importance, form)
    first = _closest_steps(a, b, form, scales)
    best, reach = _Best(), (-1, 0, 1) if len(form.steps) > 1 else (0,)
    for nearby in reach:
        steps = first.clone()
        if nearby:
            stride = form.steps[1] - form.steps[0]
            steps[:, 0] = (steps[:, 0] + nearby * stride).clamp_(form.steps[0], form.steps[-1])
        levels = _levels(groups, importance, form, scales, steps)
        if form.offset:
            a = scales[:, :1] * steps[:, :1]
            b = (importance * (groups - a * levels)).sum(1) / importance.sum(1).clamp_min(_TINY)
            steps[:, 1] = _closest(b, scales[:, -1], form.offset_steps)
        best.offer(_squared(groups, importance, levels, form, scales, steps), steps)
    return best.values[0]


def _closest_steps(a: Tensor, b: Tensor | None, form: Format, scales: Tensor) -> Tensor:
    columns = [_closest(a, scales[:, 0], form.steps)]
    if form.offset:
        columns.append(_closest(b, scales[:, -1], form.offset_steps))
    return torch.stack(columns, 1).to(torch.int16)


def _closest(values: Tensor, scale: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Return which of `steps`, evenly spaced, times scale is nearest to each value."""
    low = steps[0]
    stride = steps[1] - steps[0] if len(steps) > 1 else 1
    wanted = torch.where(scale == 0, 0.0, values / scale)
    return (((wanted - low) / stride).round() * stride + low).clamp(low, steps[-1])


@torch.no_grad()
def fit_groups(groups: Tensor, importance: Tensor, form: Format) -> tuple[Tensor, Tensor | None]:
    """Return a and b, (groups,) float32 each, that groups would have if every number could be stored."""
    if len(groups) > ROWS_AT_ONCE * 8:
        parts = [
            fit_groups(part, weight, form)
            for part, weight in zip(groups.split(ROWS_AT_ONCE * 8), importance.split(ROWS_AT_ONCE * 8), strict=True)
        ]
        a, b = zip(*parts, strict=True)
        return torch.cat(a), torch.cat(b) if form.offset else None
    return _affine(groups, importance, form) if form.offset else (_symmetric(groups, importance, form), None)


def _factors(form: Format) -> tuple[float, ...]:
    count = len(form.levels)
    fine = tuple(1 + part / form.levels[-1] for part in FINE)
    if form.codebook or (count > SEARCHED_LEVELS and not form.consecutive):
        return SHORT_SEARCH
    if count > SEARCHED_LEVELS:
        return (1.0, *fine)
    if not form.consecutive:
        # The extreme weight may also sit on the second largest level.
        return (*SEARCH, *fine, *(factor * form.levels[-1] / form.levels[-2] for factor in SPAN_SEARCH))
    return COARSE_SEARCH if count <= COARSE_LEVELS else (*SEARCH, *fine)


def _symmetric(groups: Tensor, importance: Tensor, form: Format) -> Tensor:
    # Both signs are tried where the levels are lopsided, so that the extreme weight can sit on the longer side.
    table = form.table()
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    peak = torch.where(peak.abs() < NEGLIGIBLE, 0.0, peak)
    ends = (table[0], table[-1]) if table[0] != -table[-1] else (table[-1],)
    best = _Best()
    weighted = groups * importance
    # Where stored scales are coarse, these are searched themselves: the best of all scales says little about them.
    coarse = len(form.storable(peak)) > 1

    def offer(a: Tensor) -> None:
        levels = form.snap(ratios(groups, a, None), importance)
        if not coarse:
            norm = (importance * levels).mul_(levels).sum(1, keepdim=True).clamp_min_(_TINY)
            a = (weighted * levels).sum(1, keepdim=True) / norm
        best.offer((groups - a * levels).square_().mul_(importance).sum(1, keepdim=True), a)

    for end in ends:
        for factor in _factors(form):
            a = factor * peak / end
            a = a if form.signed else a.abs()
            for each in form.storable(a) if coarse else (a,):
                offer(each)
    for _ in range(0 if coarse or form.codebook else ROUNDS):
        offer(*best.values)
    return best.values[0].squeeze(1)


def _affine(groups: Tensor, importance: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    # Levels go from 0 up. Where offsets have steps, b is never positive: the engines store it as a minimum to take off.
    bounded = form.offset_steps != (1,)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if bounded:
        low, high = low.clamp_max(0), high.clamp_min(0)
    # Where b is free, weights count from the lowest one: sums of squares then keep their precision far from zero.
    base = 0.0 if bounded else low
    groups, low, span = groups - base, low - base, torch.where(high - low < NEGLIGIBLE, 0.0, high - low)
    weighted = importance * groups
    total, sums = importance.sum(1, keepdim=True).clamp_min_(_TINY), weighted.sum(1, keepdim=True)
    best = _Best()

    def offer(a: Tensor, b: Tensor) -> None:
        zero = None
        if form.offset == "zero":
            zero = _closest(b, a, form.offset_steps)
            b = a * zero
        levels = form.snap((groups - b).mul_(inverse_scale(a)))
        if zero is not None:
            levels = levels + zero
        heavy = importance * levels
        first, cross = heavy.sum(1, keepdim=True), (weighted * levels).sum(1, keepdim=True)
        second = heavy.mul_(levels).sum(1, keepdim=True)
        spread = second - first * first / total
        solvable = spread > 1e-6 * second
        alone = cross / second.clamp_min(_TINY)
        if zero is not None:
            a, b = alone, 0.0
        else:
            a = torch.where(solvable, (cross - first * sums / total) / torch.where(solvable, spread, 1.0), 0.0)
            b = (sums - a * first) / total
            if bounded:
                a, b = torch.where(b > 0, alone, a), b.clamp_max(0)
        error = (groups - a * levels).sub_(b).square_().mul_(importance).sum(1, keepdim=True)
        best.offer(error, a, b if zero is None else a * zero)

    for factor in _factors(form):
        for shift in SHIFTS:
            offer(factor * span / form.levels[-1], low + shift * (1 - factor) * span)
    for _ in range(ROUNDS):
        offer(*best.values)
    a, b = best.values
    return a.squeeze(1), (b + base).squeeze(1)


def _two_by_two(weights: Tensor, importance: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return a, b, (n,) each, that minimise Σ h (w - a first - b second)²; where they depend, b alone."""
    pp, pq, qq = ((importance * x * y).sum(1) for x, y in ((first, first), (first, second), (second, second)))
    pw, qw = ((importance * x * weights).sum(1) for x in (first, second))
    determinant = pp * qq - pq * pq
    solvable = determinant > 1e-6 * pp * qq
    safe = torch.where(solvable, determinant, 1.0)
    a = torch.where(solvable, (pw * qq - qw * pq) / safe, 0.0)
    b = torch.where(solvable, (qw * pp - pw * pq) / safe, qw / qq.clamp_min(_TINY))
    return a, b
