"""Number formats: exact bytes, gguf and the engine as judges of the decoder, and a search for scales that pays."""

import math
import pickle

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pocketlm.run.llamacpp import decode_row
from pocketlm.tensors.formats import (
    FORMATS,
    Format,
    Packed,
    Quantized,
    fit_scales,
    fit_steps,
    pack,
    round_to_nearest,
    unpack,
)
from pocketlm.tensors.formats.codebook import Codebook


def formats(condition) -> pytest.MarkDecorator:
    chosen = {name: form for name, form in FORMATS.items() if condition(form)}
    return pytest.mark.parametrize("form", chosen.values(), ids=chosen)


every_format = formats(lambda form: True)
scalar = formats(lambda form: not form.codebook)
with_codebook = formats(lambda form: form.codebook)
one_scale = formats(lambda form: not form.codebook and not form.offset and form.span == form.group)

NOT_IN_GGUF = {"Q1_0", "Q2_0"}  # the package has no decoder for these
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def random_weights(rows: int = 64, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def random_quantized(form: Format, rows: int = 37, seed: int = 1) -> Quantized:
    """Codes, scales and steps that a file can hold, the extreme ones among them."""
    generator, columns = torch.Generator().manual_seed(seed), 2 * form.block
    groups, spans = columns // form.group, columns // form.span
    if form.codebook:
        codes = random_vectors(form.codebook, rows * columns, generator).reshape(rows, columns)
    else:
        codes = torch.randint(0, len(form.levels), (rows, columns), generator=generator).to(torch.uint8)
        codes[0] = torch.arange(columns).remainder(len(form.levels)).to(torch.uint8)
        codes[1] = len(form.levels) - 1
    scales = torch.randn(rows, spans, form.scales, generator=generator)
    scales[2], scales[3], scales[4] = 65504.0, -(2.0**-24), 0.0
    steps = torch.stack([
        torch.tensor(choices)[torch.randint(0, len(choices), (rows, groups), generator=generator)]
        for choices in ((form.steps, form.offset_steps) if form.offset else (form.steps,))
    ], 2)  # fmt: skip
    for row, end in ((5, 0), (6, -1)):
        steps[row, :, 0] = form.steps[end]
        if form.offset:
            steps[row, :, 1] = form.offset_steps[end]
    return Quantized(form, codes, form.storable(scales)[0], steps.to(torch.int16))


def random_vectors(book: Codebook, count: int, generator: torch.Generator) -> Tensor:
    index = torch.randint(0, len(book.vectors), (count // book.size,), generator=generator)
    negative = torch.rand(count // book.length, book.length, generator=generator) < 0.5
    if book.even:
        negative[:, -1] = negative[:, :-1].sum(1) % 2 == 1
    return book.codes(index, negative)


def adversarial() -> dict[str, Tensor]:
    """Rows of 256 weights that trip careless arithmetic."""
    ramp = torch.linspace(-1, 1, 256)
    lone = torch.zeros(256)
    lone[40] = 1e-40
    return {
        "zeros": torch.zeros(256),
        "negative zeros": -torch.zeros(256),
        "beyond fp16": ramp * 1e9,
        "near the largest float": ramp * 3e38,
        "one huge": torch.cat([ramp[:255] * 0.01, torch.tensor([1e6])]),
        "one denormal": lone,
        "denormals": ramp * 1e-41,
        "scale below fp16": ramp * 1e-8,
        "scale a denormal of fp16": ramp * 1e-5,
        "all the negative extreme": torch.full((256,), -0.3),
        "all the positive extreme": torch.full((256,), 0.3),
        "all positive": ramp + 2,
        "only integers": torch.arange(256.0) - 128,
        "only half integers": torch.arange(256.0) / 2 - 64,
        "alternating": torch.tensor([1.0, -1.0]).repeat(128),
    }


def by_engine(form: Format, rows: Tensor, columns: int) -> Tensor:
    return decode_row(form.name, bytes(rows.numpy()), rows.shape[0] * columns).reshape(-1, columns)


def assert_same_bits(a: Tensor, b: Tensor):
    """Equal, signs of zeros included."""
    assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def assert_decodes_alike(quantized: Quantized):
    """Unpacking is the inverse of packing, and all three decoders agree bit for bit."""
    packed, decoded = pack(quantized), quantized.decode()
    form, columns = quantized.format, decoded.shape[1]
    assert packed.rows.dtype == torch.uint8
    assert packed.rows.shape == (len(decoded), form.row_bytes(columns))
    back = unpack(packed)
    assert back.codes.dtype == torch.uint8
    assert back.steps.dtype == torch.int16
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert torch.equal(back.steps, quantized.steps)
    assert torch.isfinite(decoded).all()
    assert_same_bits(by_engine(form, packed.rows, columns), decoded)
    if form.name not in NOT_IN_GGUF:
        kind = gguf.GGMLQuantizationType[form.name]
        assert_same_bits(torch.from_numpy(gguf.quants.dequantize(packed.rows.numpy(), kind)), decoded)


def assert_possible(quantized: Quantized):
    """Every step is one that the format has, and no scale has a sign that it has not."""
    form = quantized.format
    for place, choices in enumerate((form.steps, form.offset_steps) if form.offset else (form.steps,)):
        assert set(quantized.steps[..., place].flatten().tolist()) <= set(choices)
    if not form.signed:
        assert (quantized.scales >= 0).all()


# ---- bytes ----


@every_format
def test_every_code_scale_and_step_survives_packing_and_is_decoded_alike_by_gguf_and_the_engine(form: Format):
    assert_decodes_alike(random_quantized(form))


# Ternary formats store numbers of which some stand for no level, and -128 is none in Q8_0.
@formats(lambda form: len(form.levels) != 3 and form.name != "Q8_0")
def test_random_bytes_are_decoded_as_the_engine_decodes_them(form: Format):
    rows = torch.randint(0, 256, (300, form.block_bytes), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    expected = by_engine(form, rows, form.block)
    finite = torch.isfinite(expected).all(1)  # a scale may be infinite or not a number
    assert finite.float().mean() > 0.8
    quantized = unpack(Packed(form, rows[finite], (int(finite.sum()), form.block)))
    assert_same_bits(quantized.decode(), expected[finite])


@every_format
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_weights_round_to_bytes_that_all_decoders_read_alike(form: Format, data: st.DataObject):
    scale = data.draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 3e38]))
    weights = data.draw(
        arrays(np.float32, (1, max(form.block, 64)), elements=FLOATS.map(lambda x: math.remainder(x, scale)))
    )
    quantized = round_to_nearest(torch.from_numpy(weights), form)
    assert_possible(quantized)
    assert_decodes_alike(quantized)


@every_format
def test_bits_and_bytes_agree_with_the_gguf_package(form: Format):
    kinds = gguf.GGMLQuantizationType
    if form.name in kinds.__members__:
        assert gguf.GGML_QUANT_SIZES[kinds[form.name]] == (form.block, form.block_bytes)
    assert form.row_bytes(768) == 768 * form.bits / 8
    assert form.fits(768)
    assert not form.fits(768 + form.block // 2)
    assert form.block % form.span == form.span % form.group == form.group % form.vector == 0
    assert list(form.levels) == sorted(set(form.levels))


@every_format
def test_another_process_finds_the_same_format(form: Format):
    assert pickle.loads(pickle.dumps(form)) is form


def test_formats_are_in_the_order_of_their_bits():
    bits = [form.bits for form in FORMATS.values()]
    assert bits == sorted(bits)


# ---- rounding ----


@every_format
@pytest.mark.parametrize("row", adversarial().values(), ids=adversarial())
def test_weights_at_the_edge_of_the_numbers(form: Format, row: Tensor):
    quantized = round_to_nearest(row[None], form)
    assert_possible(quantized)
    assert_decodes_alike(quantized)
    # However the search clips, a group's error is no more than what rounding all of it to zero costs.
    groups = row.double().reshape(-1, form.span)
    error = (quantized.decode()[0].double().reshape(groups.shape) - groups).square().sum(1)
    assert (error <= groups.square().sum(1) * (1 + 1e-5)).all()


@every_format
def test_a_zero_row_stays_exactly_zero(form: Format):
    assert (round_to_nearest(torch.zeros(2, 512), form).decode() == 0).all()


@one_scale
def test_weights_on_the_grid_come_back_bit_for_bit(form: Format):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, len(form.levels), (50, 512), generator=generator).to(torch.uint8)
    codes[:, :: form.group], codes[:, 1 :: form.group] = 0, len(form.levels) - 1  # both ends are in every group
    scales = form.storable(torch.rand(50, 512 // form.span, 1, generator=generator) + 0.5)[0]
    weights = Quantized(form, codes, scales, torch.ones_like(scales, dtype=torch.int16)).decode()
    assert torch.equal(round_to_nearest(weights, form).decode(), weights)


@scalar
def test_rounding_is_the_nearest_level_in_float64_around_every_midpoint(form: Format):
    levels = torch.tensor(form.levels, dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    around = [torch.nextafter(middles, torch.tensor(end)) for end in (-math.inf, math.inf)]
    random = (torch.rand(20_000, generator=torch.Generator().manual_seed(3)) - 0.5) * 300
    tiny = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-7, -1e-7])
    far = torch.tensor([1e30, -1e30, math.inf, -math.inf, 128.0, -128.5])
    for ratios in (*around, middles, random, tiny, far, levels.float()):
        distances = (ratios.double().clamp(-1e4, 1e4)[:, None] - levels).abs()
        codes = form.nearest(ratios)
        assert codes.dtype == torch.uint8
        chosen = distances.gather(1, codes.long()[:, None]).squeeze(1)
        assert torch.equal(chosen, distances.amin(1)), "a nearer level exists"
        assert torch.equal(form.snap(ratios), form.table()[codes.long()])


# ---- codebooks ----


def nearest_vectors(book: Codebook, ratios: Tensor, importance: Tensor) -> Tensor:
    """The squared error of the best allowed vector for each `length` ratios, (n,) float64, by trying all of them."""
    vectors = torch.tensor(book.magnitudes, dtype=torch.float64)[book.vectors]
    weights, heavy = ratios.double().reshape(-1, book.length), importance.double().reshape(-1, book.length)

    def best(signed: Tensor) -> Tensor:
        parts, part_heavy = signed.reshape(-1, book.size), heavy.reshape(-1, book.size)
        errors = part_heavy @ vectors.square().T - 2 * (part_heavy * parts) @ vectors.T
        return (errors.amin(1) + (part_heavy * parts * parts).sum(1)).reshape(len(weights), -1).sum(1)

    error = best(weights.abs())
    if book.even:
        odd = (weights < 0).sum(1) % 2 == 1
        flips = 1 - 2 * torch.eye(book.length, dtype=torch.float64)
        flipped = torch.stack([best(weights.abs() * flip) for flip in flips]).amin(0)
        error = torch.where(odd, flipped, error)
    return error


@with_codebook
@pytest.mark.parametrize("weighted", [False, True])
def test_looking_vectors_up_loses_little_against_comparing_with_all_of_them(form: Format, weighted: bool):
    book, generator = form.codebook, torch.Generator().manual_seed(8)
    ratios = torch.randn(3000, book.length, generator=generator) * form.levels[-1] / 2.6
    importance = torch.rand(ratios.shape, generator=generator) + 0.2 if weighted else torch.ones_like(ratios)
    levels = form.snap(ratios, importance if weighted else None)
    found = (importance * (levels - ratios).square()).sum(1).double()
    best = nearest_vectors(book, ratios, importance)
    assert (found > best * (1 - 1e-5)).all()
    assert found.sum() < 1.02 * best.sum()


@with_codebook
def test_allowed_vectors_are_nearest_to_themselves(form: Format):
    codes = random_vectors(form.codebook, 4096, torch.Generator().manual_seed(9))
    assert torch.equal(form.nearest(form.table()[codes.long()]), codes)


# ---- the search for scales ----


@formats(lambda form: form.name != "Q8_0")
def test_the_search_beats_scaling_by_the_largest_weight(form: Format):
    weights = random_weights(64)
    groups = weights.reshape(-1, form.group)
    if form.offset:
        b = groups.amin(1, keepdim=True)
        a = (groups.amax(1, keepdim=True) - b) / form.levels[-1]
    else:
        a, b = form.storable(groups.abs().amax(1, keepdim=True) / form.levels[-1])[0], 0.0
    plain = (form.snap((groups - b) / a) * a + b - groups).square().sum()
    found = (round_to_nearest(weights, form).decode() - weights).square().sum()
    assert found < 0.97 * plain


def reference(form: Format, groups: Tensor) -> Tensor:
    """The least squared error of each group, (n,) float64, over a fine grid of scales that need not be stored."""
    groups = groups.double()
    levels = torch.tensor(form.levels, dtype=torch.float64)
    best = torch.full((len(groups),), math.inf, dtype=torch.float64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    coarse = len(form.storable(torch.ones(1))) > 1
    if form.offset:
        factors = torch.linspace(0.5, 1.15, 40)
        candidates = [
            (factor * (high - low) / levels[-1], low + shift * (1 - factor) * (high - low))
            for factor in factors
            for shift in torch.linspace(-0.2, 1.2, 15)
        ]
    else:
        peak = groups.abs().amax(1, keepdim=True) / levels.abs().max()
        factors = torch.linspace(0.3, 1.7, 200 if not form.codebook else 30)
        candidates = [(sign * factor * peak, 0.0) for factor in factors for sign in ((1, -1) if form.signed else (1,))]
    for a, b in candidates:
        for scale in form.storable(a.float()) if coarse else (a,):
            a = scale.double()
            if form.codebook:
                error = nearest_vectors(form.codebook, groups / a, torch.ones_like(groups)).reshape(len(groups), -1)
                best = torch.minimum(best, error.sum(1) * a.squeeze(1).square())
            else:
                middles = (levels[1:] + levels[:-1]) / 2
                near = levels[torch.bucketize((groups - b) / a, middles)] * a + b
                best = torch.minimum(best, (near - groups).square().sum(1))
    return best


@every_format
def test_the_search_loses_little_to_a_slow_search_whose_scales_need_not_be_stored(form: Format):
    weights = random_weights(6, 512 if form.codebook else 1024)
    best = reference(form, weights.reshape(-1, form.group)).sum()
    found = (round_to_nearest(weights, form).decode() - weights).double().square().sum()
    # Where a scale has steps these cost something, and with many levels a fine search gains in the last per cents.
    assert found < (1.03 if form.bits < 5 else 1.08 if form.bits < 8 else 1.15) * best


@scalar
def test_importance_moves_the_error_to_where_it_does_not_count(form: Format):
    weights = random_weights()
    importance = torch.ones(512)
    importance[::4] = 100.0
    plain = (round_to_nearest(weights, form).decode() - weights).square() @ importance
    aware = (round_to_nearest(weights, form, importance).decode() - weights).square() @ importance
    assert aware.sum() < (0.995 if form.bits < 8 else 1.0001) * plain.sum()


@with_codebook
def test_importance_decides_between_vectors_too(form: Format):
    weights = random_weights()
    importance = torch.ones(512)
    importance[::4] = 100.0
    plain = (round_to_nearest(weights, form).decode() - weights).square() @ importance
    aware = (round_to_nearest(weights, form, importance).decode() - weights).square() @ importance
    assert aware.sum() < 0.8 * plain.sum()


@every_format
def test_each_column_gets_its_own_importance(form: Format):
    """Two blocks with different importances: each block is fitted with its own part."""
    weights = random_weights(8, 2 * form.block)
    importance = torch.rand(2 * form.block, generator=torch.Generator().manual_seed(4)) * 10
    both = round_to_nearest(weights, form, importance).decode()
    for part in (slice(0, form.block), slice(form.block, None)):
        alone = round_to_nearest(weights[:, part], form, importance[part]).decode()
        assert torch.equal(both[:, part], alone)


@every_format
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_only_the_ratio_of_importances_counts(form: Format, scale: float):
    weights = random_weights(8)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(5)) + 0.1
    once, scaled = (round_to_nearest(weights, form, importance * factor) for factor in (1.0, scale))
    assert torch.equal(once.codes, scaled.codes)


@every_format
def test_columns_without_importance_do_no_harm(form: Format):
    """A column that is always zero has importance zero; a whole block may be made of them."""
    importance = torch.ones(512)
    importance[:256], importance[300] = 0.0, 0.0
    quantized = round_to_nearest(random_weights(8), form, importance)
    assert_possible(quantized)
    assert_decodes_alike(quantized)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "IQ3_S"])
def test_weights_are_searched_in_parts_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch):
    form, weights = FORMATS[name], random_weights(20)
    whole = round_to_nearest(weights, form).decode()
    monkeypatch.setattr("pocketlm.tensors.formats.fit.ROWS_AT_ONCE", 7)
    assert torch.equal(round_to_nearest(weights, form).decode(), whole)


@formats(lambda form: len(form.steps) > 1)
def test_steps_for_given_scales_are_better_than_their_neighbours(form: Format):
    weights = random_weights(4, 256)
    scales = fit_scales(weights, torch.ones_like(weights), form)
    groups = weights.reshape(-1, form.group)
    each = scales.repeat_interleave(256 // form.group, 0)

    def error(steps: Tensor) -> Tensor:
        a = each[:, :1] * steps[:, :1]
        b = each[:, 1:] * steps[:, 1:] if form.offset else 0.0
        return (form.snap((groups - b) / a) * a + b - groups).square().sum(1)

    steps = fit_steps(groups, torch.ones_like(groups), form, each)
    stride, found = form.steps[1] - form.steps[0], error(steps)
    for nearby in (-stride, stride):
        other = steps.clone()
        other[:, 0] = (other[:, 0] + nearby).clamp(form.steps[0], form.steps[-1])
        other[:, 0] = torch.where(other[:, 0] == 0, steps[:, 0], other[:, 0])
        assert found.sum() <= error(other).sum()
