"""Column elimination: the recursion is the textbook's, GPTQ pays in the metric it works in, refits never hurt."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocketlm.errors import PocketlmError
from pocketlm.tensors.elimination import (
    aimed,
    coefficients,
    descend,
    eliminate,
    gptq,
    group_order,
    inverse_factor,
    output_errors,
    refit_scales,
    ridge,
)
from pocketlm.tensors.formats import FORMATS, Format, Quantized, find_format, pack, round_to_nearest, unpack
from pocketlm.tensors.formats.integer import integer_format

COLUMNS = 256  # every format's block divides them
INTEGERS = {
    name: integer_format(name, COLUMNS)
    for name in ("int4-g32-asym", "int3-g64", "int2-row-asym", "int8-g128", "fp8-row")
}
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
every_kind = pytest.mark.parametrize("form", (FORMATS | INTEGERS).values(), ids=FORMATS | INTEGERS)


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs, (tokens, columns), a few columns far louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, ::11] *= 6
    return x


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def to_grid(step: float):
    """Choose the nearest multiple of a step, whatever the group."""
    return lambda rest, start: lambda columns, c: (columns / step).round() * step


def every_other(rest: Tensor, start: int):
    """Remove the odd columns, as SparseGPT would."""
    return lambda columns, c: columns if (start + c) % 2 == 0 else torch.zeros_like(columns)


def to_codebook(length: int):
    """Choose the nearest of some vectors for neighbouring columns together."""
    book = 0.05 * torch.randn(40, length, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda rest, start: lambda columns, c: book[torch.cdist(columns.T, book).argmin(1)].T


def textbook(weight: Tensor, gram: Tensor, damping: float, choose, vector: int = 1) -> Tensor:
    """Optimal Brain Surgeon in float64: after each vector the inverse Hessian of the columns left, from scratch."""
    work = weight.double().clone()
    hessian = gram.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for c in range(0, work.shape[1], vector):
        inverse = torch.linalg.inv(hessian[c:, c:])
        now, later = slice(c, c + vector), slice(c + vector, None)
        cheap = choose(work[:, c:].T, c)(work[:, now].T, 0).T
        error = (work[:, now] - cheap) @ torch.linalg.inv(inverse[:vector, :vector])
        work[:, later] -= error @ inverse[:vector, vector:]
        work[:, now] = cheap
    return work


@pytest.mark.parametrize("choose", [to_grid(0.02), every_other], ids=["rounding", "pruning"])
def test_elimination_is_the_textbook_recursion(choose):
    weight, gram = weights(9, 40), gram_of(inputs(200, 40))
    ours = eliminate(weight.double(), inverse_factor(gram.double(), 0.01), choose, 16)
    assert torch.allclose(ours, textbook(weight, gram, 0.01, choose), atol=1e-9)


@pytest.mark.parametrize("group", [4, 16, 40])
@pytest.mark.parametrize("vector", [2, 4])
def test_elimination_of_vectors_is_the_textbook_recursion(vector: int, group: int):
    weight, gram, choose = weights(9, 40), gram_of(inputs(200, 40)), to_codebook(vector)
    ours = eliminate(weight.double(), inverse_factor(gram.double(), 0.01), choose, group, vector)
    truth = textbook(weight, gram, 0.01, choose, vector)
    assert torch.allclose(ours, truth, atol=1e-9)


def test_each_group_is_chosen_for_on_what_the_errors_before_it_left():
    """`choose` sees all columns that are left, (columns, rows), and its replacement only the next vector."""
    weight, gram = weights(9, 40).double(), gram_of(inputs(200, 40)).double()
    truth, seen = weight.clone(), []
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)

    def choose(rest: Tensor, start: int):
        gone = torch.arange(40) < start
        if start:  # the columns that are left minimise the output error for those that are gone
            change = (weight - truth)[:, gone] @ damped[gone][:, ~gone] @ torch.linalg.inv(damped[~gone][:, ~gone])
            assert torch.allclose(rest.T, weight[:, ~gone] + change, atol=1e-9)
        assert rest.shape == (40 - start, 9)
        seen.append(start)

        def replace(columns: Tensor, c: int) -> Tensor:
            assert columns.shape == (2, 9)
            cheap = (columns / 0.03).round() * 0.03
            truth[:, start + c : start + c + 2] = cheap.T
            return cheap

        return replace

    result = eliminate(weight, inverse_factor(gram, 0.01), choose, 16, 2)
    assert torch.equal(result, truth)
    assert seen == [0, 16, 32]


@pytest.mark.parametrize("choose", [to_grid(0.02), every_other], ids=["rounding", "pruning"])
def test_the_block_size_does_not_matter(choose):
    weight, gram = weights(17, 48).double(), gram_of(inputs(200, 48)).double()
    factor = inverse_factor(gram)
    results = [eliminate(weight, factor, choose, block) for block in (1, 7, 16, 48, 1000)]
    for other in results[1:]:
        assert torch.allclose(other, results[0], atol=1e-10)


def test_elimination_leaves_its_arguments_alone():
    weight, gram = weights(5, 32), gram_of(inputs(100, 32))
    factor = inverse_factor(gram)
    before = weight.clone(), factor.clone()
    eliminate(weight, factor, to_grid(0.1), 8)
    assert torch.equal(weight, before[0])
    assert torch.equal(factor, before[1])


def test_white_inputs_leave_rounding_as_it_is():
    """Where inputs do not correlate, no column can absorb another's error."""
    weight = weights(13, 64)
    rounded = eliminate(weight, inverse_factor(torch.eye(64) * 7), to_grid(0.02), 16)
    assert torch.allclose(rounded, (weight / 0.02).round() * 0.02, atol=1e-6)


@every_format
def test_gptq_on_white_inputs_is_rounding_with_the_scale_search(form: Format):
    weight = weights(13, COLUMNS)
    rounded, chosen = round_to_nearest(weight, form), gptq(weight, torch.eye(COLUMNS) * 7, form)
    lost = (rounded.decode() - weight).norm()
    assert (chosen.codes == rounded.codes).float().mean() > 0.97  # scales that are almost as good may win
    assert (chosen.steps == rounded.steps).float().mean() > 0.95
    assert (chosen.decode() - rounded.decode()).norm() < 0.2 * lost  # scales are refitted to the final codes
    assert (chosen.decode() - weight).norm() <= 1.001 * lost


@pytest.mark.parametrize("growth", [1e-3, 1.0, 1e6])
def test_the_factor_gives_the_damped_inverse(growth: float):
    gram = gram_of(inputs(500, 50)).double() * growth
    upper = inverse_factor(gram, 0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(50)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(50, dtype=torch.float64), atol=1e-8)


def test_singular_and_dead_inputs_still_have_a_factor():
    x = inputs(10, 64)  # fewer tokens than columns
    x[:, 5:9] = 0
    for gram in (gram_of(x), torch.zeros(64, 64), torch.ones(64, 64) * 1e12, torch.ones(64, 64) * 1e-12):
        assert torch.isfinite(inverse_factor(gram)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_numbers_are_refused_and_do_not_hang(bad: float):
    gram = torch.eye(32)
    gram[3, 4] = gram[4, 3] = bad
    with pytest.raises(PocketlmError, match="not numbers, so it cannot be quantized"):
        gptq(weights(4, 32), gram, FORMATS["Q4_0"])


@every_kind
@pytest.mark.parametrize("tokens", [20, 2000])
def test_gptq_beats_rounding_where_it_counts(form: Format, tokens: int):
    weight, gram = weights(48, COLUMNS), gram_of(inputs(tokens, COLUMNS))
    rounded = output_errors(weight, round_to_nearest(weight, form).decode(), gram).sum()
    aware = output_errors(weight, round_to_nearest(weight, form, gram.diagonal()).decode(), gram).sum()
    chosen = output_errors(weight, gptq(weight, gram, form).decode(), gram).sum()
    assert chosen < 0.85 * min(rounded, aware)


@every_kind
def test_the_bytes_hold_what_gptq_chose(form: Format):
    """Columns are visited in another order than the file's, in which vectors must be those of the codebook."""
    chosen = gptq(weights(16, COLUMNS), gram_of(inputs(500, COLUMNS)), form)
    assert torch.equal(unpack(pack(chosen)).decode(), chosen.decode())


def test_gptq_also_beats_rounding_on_text_it_has_not_seen():
    weight, x = weights(64, 96), inputs(4000, 96)
    seen, unseen = gram_of(x[:2000]), gram_of(x[2000:])
    form = FORMATS["Q4_0"]
    rounded = output_errors(weight, round_to_nearest(weight, form).decode(), unseen).sum()
    chosen = output_errors(weight, gptq(weight, seen, form).decode(), unseen).sum()
    assert chosen < 0.8 * rounded


@every_format
def test_gptq_on_inputs_that_never_came_keeps_the_weights(form: Format):
    """Without statistics, rounding is all there is: the weights must not vanish."""
    weight = weights(8, COLUMNS)
    change = (gptq(weight, torch.zeros(COLUMNS, COLUMNS), form).decode() - weight).norm()
    assert change < 1.01 * (round_to_nearest(weight, form).decode() - weight).norm() < 0.7 * weight.norm()


def test_rows_are_quantized_each_on_its_own():
    """Linears with the same input can be stacked: a row does not see the other rows."""
    weight, gram, form = weights(20, 64), gram_of(inputs(300, 64)), FORMATS["IQ4_NL"]
    whole = gptq(weight, gram, form)
    for part in (slice(0, 7), slice(7, 20)):
        alone = gptq(weight[part], gram, form)
        assert (whole.codes[part] == alone.codes).float().mean() > 0.999  # sums may round differently
        assert torch.allclose(whole.decode()[part], alone.decode(), atol=5e-3)


@settings(deadline=None, max_examples=50)
@given(
    group=st.sampled_from([1, 2, 8, 32]),
    groups=st.integers(1, 6),
    data=st.data(),
)
def test_activation_order_is_a_permutation_that_keeps_groups_together(group: int, groups: int, data: st.DataObject):
    loudness = st.floats(0, 1e6, width=32)
    importance = torch.tensor(data.draw(st.lists(loudness, min_size=group * groups, max_size=group * groups)))
    order = group_order(importance, group)
    assert torch.equal(order.sort().values, torch.arange(group * groups))
    pieces = order.reshape(groups, group)
    assert (pieces // group == pieces[:, :1] // group).all()
    assert (importance[pieces].diff(dim=1) <= 0).all(), "inside a group the loudest column comes first"
    assert (importance[pieces[:, 0]].diff() <= 0).all(), "the group with the loudest column comes first"


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.sampled_from([(8, 2), (16, 8, 4), (4, 4), (6, 3, 1)]),
    spans=st.integers(1, 4),
    data=st.data(),
)
def test_activation_order_nests_groups_in_spans(sizes: tuple[int, ...], spans: int, data: st.DataObject):
    count = spans * sizes[0]
    # Few different numbers: ties are frequent.
    importance = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))).float()
    order = group_order(importance, *sizes)
    assert torch.equal(order.sort().values, torch.arange(count))
    whole = count
    for size in (*sizes, 1):
        pieces = order.reshape(-1, size)
        assert (pieces // size == pieces[:, :1] // size).all(), "a piece stays in one piece"
        loudest = importance[pieces].amax(1).reshape(-1, whole // size)  # by the larger piece that they are in
        assert (loudest.diff(dim=1) <= 0).all(), "inside the larger piece the loudest comes first"
        whole = size


def test_activation_order_pays():
    """The loudest columns come first, while there are still many that can absorb their error."""
    weight, x = weights(64, 128), inputs(3000, 128)
    x[:, -20:] *= 20
    gram, form = gram_of(x), FORMATS["Q4_0"]
    ordered = output_errors(weight, gptq(weight, gram, form).decode(), gram).sum()
    backwards = torch.arange(127, -1, -1)
    assert ordered < output_errors(weight, round_to_nearest(weight, form).decode(), gram).sum()
    # The order does not depend on where the columns stand.
    turned = gptq(weight[:, backwards], gram[backwards][:, backwards], form)
    again = output_errors(weight, turned.decode()[:, backwards], gram).sum()
    assert abs(again / ordered - 1) < 0.25


def as_it_is(scales: Tensor) -> tuple[Tensor, ...]:
    """Store scales in full precision."""
    return (scales,)


def damaged_scales(form: Format, seed: int = 5) -> Iterator[tuple[Tensor, Quantized, Tensor]]:
    """Weights, a quantization whose scales are off, and a Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight, gram = weights(12, COLUMNS), gram_of(inputs(600, COLUMNS))
    good = round_to_nearest(weight, form)
    for spread in (0.0, 0.05, 0.5):
        noise = 1 + spread * torch.randn(good.scales.shape, generator=generator)
        yield weight, Quantized(form, good.codes, form.storable(good.scales * noise)[0], good.steps), gram


@every_kind
def test_refitted_scales_never_make_a_row_worse(form: Format):
    for weight, start, gram in damaged_scales(form):
        refit = refit_scales(weight, start, gram)
        metric = gram + ridge(gram) * torch.eye(len(gram))
        before = output_errors(weight, start.decode(), metric)
        after = output_errors(weight, refit.decode(), metric)
        assert (after <= before * (1 + 1e-5)).all()
        assert torch.equal(refit.codes, start.codes)
        assert torch.equal(refit.steps, start.steps)
        assert torch.equal(refit.scales, form.storable(refit.scales)[0]), "the file can hold them"


@every_kind
def test_refitted_scales_repair_damaged_ones(form: Format):
    """As stored, with all that rounding the scales costs."""
    (weight, good, gram), _, (_, damaged, _) = damaged_scales(form)
    errors = [output_errors(weight, each.decode(), gram).sum() for each in (good, damaged)]
    refit = output_errors(weight, refit_scales(weight, damaged, gram).decode(), gram).sum()
    assert refit < min(1.1 * errors[0], 0.8 * errors[1])


@every_kind
def test_descent_never_makes_a_row_worse_and_pays(form: Format):
    weight, gram = weights(12, COLUMNS), gram_of(inputs(2000, COLUMNS))
    metric = gram + ridge(gram) * torch.eye(len(gram))
    start = gptq(weight, gram, form)
    once = descend(weight, start, gram)
    before, after = (output_errors(weight, each.decode(), metric) for each in (start, once))
    assert (after <= before * (1 + 1e-5)).all()
    assert torch.equal(once.scales, start.scales)
    assert torch.equal(once.steps, start.steps)
    often = output_errors(weight, gptq(weight, gram, form, descents=4).decode(), metric)
    assert often.sum() <= after.sum() * (1 + 1e-5)
    if len(form.levels) == 4 and form.vector == 1:
        assert often.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("name", ["Q2_0", "Q4_1", "MXFP4", "Q3_K"])
def test_where_descent_ends_no_other_code_is_better(name: str):
    """Brute force in float64: every code of every weight, all others as they are."""
    form, columns = FORMATS[name], 256 if name == "Q3_K" else 64
    weight, gram = weights(2, columns), gram_of(inputs(500, columns))
    metric = (gram + ridge(gram) * torch.eye(columns)).double()
    found = gptq(weight, gram, form)
    for _ in range(50):
        found = descend(weight, found, gram)
    errors = (weight - found.decode()).double()
    least = ((errors @ metric) * errors).sum(1)
    for code in range(len(form.levels)):
        other = Quantized(form, torch.full_like(found.codes, code), found.scales, found.steps).decode()
        change = (found.decode() - other).double()  # of one weight at a time
        changed = least[:, None] + 2 * change * (errors @ metric) + change.square() * metric.diagonal()
        assert (changed >= least[:, None] * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "Q3_K", "int4-g32", "int4-g32-asym"])
def test_descent_keeps_zeros(name: str):
    form, weight, gram = find_format(name, COLUMNS), weights(6, COLUMNS), gram_of(inputs(500, COLUMNS))
    assert form.has_zero
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    found = gptq(weight * mask, gram, form, mask=mask, descents=2)
    assert (found.decode()[~mask] == 0).all()


def spread_of(quantized: Quantized) -> Iterator[Tensor]:
    """Per row the (columns, scales) matrix that makes weights of its stored scales: decoded unit vectors."""
    form, count = quantized.format, quantized.scales[0].numel()
    units = torch.eye(count).reshape(count, *quantized.scales.shape[1:])
    for codes, steps in zip(quantized.codes, quantized.steps, strict=True):
        yield Quantized(form, codes.repeat(count, 1), units, steps.repeat(count, 1, 1)).decode().T.double()


@every_kind
def test_refitted_scales_are_the_least_squares_solution(form: Format):
    form = replace(form, storable=as_it_is)
    for weight, start, gram in damaged_scales(form):
        refit = refit_scales(weight, start, gram, damping=0.01)
        damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))
        root = torch.linalg.cholesky(damped, upper=True)  # ‖root v‖² = vᵀ G v
        for row, spread in enumerate(spread_of(start)):
            target = root @ weight[row].double()
            solution = torch.linalg.lstsq(root @ spread, target[:, None], driver="gelsd").solution[:, 0]
            best = (root @ spread @ solution - target).norm()
            error = (root @ refit.decode()[row].double() - target).norm()
            assert 0.9999 * best <= error <= 1.002 * best


@every_kind
def test_coefficients_times_scales_are_the_weights(form: Format):
    _, (_, start, _), _ = damaged_scales(form)
    ours = coefficients(start)
    assert ours.shape == (*start.codes.shape, form.scales)
    scales = start.scales.repeat_interleave(form.span, 1)
    assert torch.allclose((ours * scales).sum(2), start.decode(), rtol=1e-5, atol=1e-7)


@every_kind
def test_weights_that_are_stored_exactly_stay_so(form: Format):
    """Where blocks of like codes see like inputs, the solution is hardly determined, and the solver's is worse."""
    if form.name in INTEGERS:  # their block is the row
        form, small = integer_format(form.name, 3 * 128), integer_format(form.name, 128)
    else:
        small = form
    columns = small.block
    block = round_to_nearest(weights(30, columns), small)
    scales = torch.cat([block.scales * factor for factor in (1.0, 2.0, 4.0)], 1)
    if form.span > columns:  # a scale per row
        scales = block.scales
    exact = Quantized(
        form, block.codes.repeat(1, 3), scales, block.steps.repeat(1, scales.shape[1] // block.scales.shape[1], 1)
    )
    x = inputs(400, columns).repeat(1, 3) + 1e-3 * inputs(400, 3 * columns, seed=9)
    refit = refit_scales(exact.decode(), exact, gram_of(x), damping=1e-7)
    assert torch.equal(refit.decode(), exact.decode())


@every_kind
def test_gptq_ends_with_the_best_scales_for_its_codes(form: Format):
    weight, gram = weights(32, COLUMNS), gram_of(inputs(2000, COLUMNS))
    chosen = gptq(weight, gram, form)
    again = refit_scales(weight, chosen, gram)
    metric = gram + ridge(gram) * torch.eye(len(gram))
    ends, could = (output_errors(weight, quantized.decode(), metric).sum() for quantized in (chosen, again))
    assert ends <= could * 1.0005


def drifted(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer reads in the original model, what it reads now, and the drift."""
    original = inputs(500, columns)
    now = original + 0.3 * inputs(500, columns, seed=4) - 0.1 * original.roll(1, 1)
    return original, now, (original - now).T @ now


def test_the_target_of_gptaq_is_the_least_squares_answer():
    """min over V of ‖W X̃ - V X‖² + λ‖W - V‖², solved in float64 with no Gram matrix."""
    weight = weights(10, 40)
    original, now, drift = drifted(40)
    gram, order = gram_of(now), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    target = aimed(weight, drift, inverse_factor(gram[order][:, order], 0.02), order, share=1.0)
    root = ridge(gram_of(now).double(), 0.02).sqrt()
    left = torch.cat([now.double(), root * torch.eye(40)])
    right = torch.cat([original.double() @ weight.double().T, root * weight.double().T])
    truth = torch.linalg.lstsq(left, right).solution.T
    assert (target - truth).norm() < 1e-4 * truth.norm()
    assert (truth - weight).norm() > 0.05 * weight.norm()


def test_no_drift_is_no_other_target():
    weight, gram, form = weights(10, 64), gram_of(inputs(300, 64)), FORMATS["Q4_0"]
    plain, still = gptq(weight, gram, form), gptq(weight, gram, form, drift=torch.zeros(64, 64))
    assert torch.equal(plain.codes, still.codes)
    assert torch.equal(plain.scales, still.scales)


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "IQ3_XXS"])
def test_gptq_with_drift_comes_closer_to_the_originals_output(name: str):
    weight = weights(32, COLUMNS)
    original, now, drift = drifted(COLUMNS)
    errors = [
        (original @ weight.T - now @ gptq(weight, gram_of(now), FORMATS[name], drift=each).decode().T).square().sum()
        for each in (None, drift)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_refitting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    (weight, start, gram), *_ = damaged_scales(FORMATS["Q4_0"])
    whole = refit_scales(weight, start, gram)
    monkeypatch.setattr("pocketlm.tensors.elimination.REFIT_NUMBERS", 7 * weight.shape[1])
    assert torch.allclose(refit_scales(weight, start, gram).scales, whole.scales, rtol=2e-3)


def test_output_errors_are_those_of_the_outputs():
    weight, x = weights(10, 40).double(), inputs(70, 40).double()
    cheap = (weight / 0.03).round() * 0.03
    obvious = ((weight - cheap) @ x.T).square().sum(1)
    assert torch.allclose(output_errors(weight, cheap, gram_of(x).float()).double(), obvious, rtol=1e-4)
