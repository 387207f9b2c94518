"""Column elimination: the recursion is the textbook's, GPTQ pays in the metric it works in, refits never hurt."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocketlm.errors import PocketlmError
from pocketlm.tensors.elimination import (
    eliminate,
    gptq,
    group_order,
    inverse_factor,
    output_errors,
    refit_scales,
    ridge,
)
from pocketlm.tensors.formats import FORMATS, Format, Quantized, round_to_nearest

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


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
    """Choose the nearest multiple of a step, whatever the block."""
    return lambda block, corner, start: lambda column, c: (column / step).round() * step


def every_other(block: Tensor, corner: Tensor, start: int):
    """Remove the odd columns, as SparseGPT would."""
    return lambda column, c: column if (start + c) % 2 == 0 else torch.zeros_like(column)


def textbook(weight: Tensor, gram: Tensor, damping: float, choose) -> Tensor:
    """Optimal Brain Surgeon in float64: after each column the inverse Hessian of the columns left, from scratch."""
    work = weight.double().clone()
    hessian = gram.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for c in range(work.shape[1]):
        inverse = torch.linalg.inv(hessian[c:, c:])
        cheap = choose(work[:, c : c + 1], None, c)(work[:, c], 0)
        error = (work[:, c] - cheap) / inverse[0, 0]
        work[:, c + 1 :] -= torch.outer(error, inverse[0, 1:])
        work[:, c] = cheap
    return work


@pytest.mark.parametrize("choose", [to_grid(0.02), every_other], ids=["rounding", "pruning"])
def test_elimination_is_the_textbook_recursion(choose):
    weight, gram = weights(9, 40), gram_of(inputs(200, 40))
    ours = eliminate(weight.double(), inverse_factor(gram.double(), 0.01), choose, 16)
    assert torch.allclose(ours, textbook(weight, gram, 0.01, choose), atol=1e-9)


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
    weight = weights(13, 96)
    rounded, chosen = round_to_nearest(weight, form), gptq(weight, torch.eye(96) * 7, form)
    assert torch.equal(chosen.codes, rounded.codes)
    assert torch.allclose(chosen.scales, rounded.scales, rtol=0.03)  # refitted to the final codes
    assert (chosen.decode() - weight).norm() <= (rounded.decode() - weight).norm()


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


@every_format
@pytest.mark.parametrize("tokens", [20, 2000])
def test_gptq_beats_rounding_where_it_counts(form: Format, tokens: int):
    weight, gram = weights(64, 96), gram_of(inputs(tokens, 96))
    rounded = output_errors(weight, round_to_nearest(weight, form).decode(), gram).sum()
    aware = output_errors(weight, round_to_nearest(weight, form, gram.diagonal()).decode(), gram).sum()
    chosen = output_errors(weight, gptq(weight, gram, form).decode(), gram).sum()
    assert chosen < 0.8 * min(rounded, aware)


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
    weight = weights(8, 64)
    change = (gptq(weight, torch.zeros(64, 64), form).decode() - weight).norm() / weight.norm()
    assert change < 0.15


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


def damaged_scales(form: Format, seed: int = 5) -> Iterator[tuple[Tensor, Quantized, Tensor]]:
    """Weights, a quantization whose scales are off, and a Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight, gram = weights(30, 96), gram_of(inputs(400, 96))
    good = round_to_nearest(weight, form)
    for spread in (0.0, 0.05, 0.5):
        noise = 1 + spread * torch.randn(good.scales.shape, generator=generator)
        yield weight, Quantized(form, good.codes, (good.scales * noise).half().float()), gram


@every_format
def test_refitted_scales_never_make_a_row_worse(form: Format):
    for weight, start, gram in damaged_scales(form):
        refit = refit_scales(weight, start, gram)
        metric = gram + ridge(gram) * torch.eye(len(gram))
        before = output_errors(weight, start.decode(), metric)
        after = output_errors(weight, refit.decode(), metric)
        assert (after <= before * (1 + 1e-5)).all()
        assert torch.equal(refit.codes, start.codes)
        assert torch.equal(refit.scales, refit.scales.half().float())


@every_format
def test_refitted_scales_are_the_least_squares_solution(form: Format):
    for weight, start, gram in damaged_scales(form):
        refit = refit_scales(weight, start, gram, damping=0.01)
        damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram))
        root = torch.linalg.cholesky(damped, upper=True)  # ‖root v‖² = vᵀ G v
        levels = form.table()[start.codes.long()].double()
        for row in range(len(weight)):
            spread = torch.zeros(96, 3, dtype=torch.float64)
            for g in range(3):
                spread[32 * g : 32 * g + 32, g] = levels[row, 32 * g : 32 * g + 32]
            target = root @ weight[row].double()
            solution = torch.linalg.lstsq(root @ spread, target[:, None]).solution[:, 0]
            best = (root @ spread @ solution - target).norm()
            error = (root @ refit.decode()[row].double() - root @ weight[row].double()).norm()
            # Each fp16 scale is off by at most one part in 2048.
            storing = ((root @ spread) * solution).norm(dim=0).sum() / 2048
            assert error <= best * 1.0001 + storing


@every_format
def test_weights_that_are_stored_exactly_stay_so(form: Format):
    """Where blocks of like codes see like inputs, the solution is hardly determined, and the solver's is worse."""
    block = round_to_nearest(weights(30, 32), form)
    scales = block.scales * torch.tensor([1.0, 2.0, 4.0])
    exact = Quantized(form, block.codes.repeat(1, 3), scales)
    x = inputs(400, 32).repeat(1, 3) + 1e-3 * inputs(400, 96, seed=9)
    refit = refit_scales(exact.decode(), exact, gram_of(x), damping=1e-7)
    assert torch.equal(refit.decode(), exact.decode())


@every_format
def test_gptq_ends_with_the_best_scales_for_its_codes(form: Format):
    weight, gram = weights(64, 96), gram_of(inputs(2000, 96))
    chosen = gptq(weight, gram, form)
    again = refit_scales(weight, chosen, gram)
    metric = gram + ridge(gram) * torch.eye(len(gram))
    ends, could = (output_errors(weight, quantized.decode(), metric).sum() for quantized in (chosen, again))
    assert ends <= could * 1.0005


def test_refitting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    (weight, start, gram), *_ = damaged_scales(FORMATS["Q4_0"])
    whole = refit_scales(weight, start, gram)
    monkeypatch.setattr("pocketlm.tensors.elimination.REFIT_ROWS", 7)
    assert torch.allclose(refit_scales(weight, start, gram).scales, whole.scales, rtol=2e-3)


def test_output_errors_are_those_of_the_outputs():
    weight, x = weights(10, 40).double(), inputs(70, 40).double()
    cheap = (weight / 0.03).round() * 0.03
    obvious = ((weight - cheap) @ x.T).square().sum(1)
    assert torch.allclose(output_errors(weight, cheap, gram_of(x).float()).double(), obvious, rtol=1e-4)
