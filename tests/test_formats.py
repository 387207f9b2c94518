"""Number formats: exact bytes, gguf and the engine as judges of the decoder, and a scale search that pays."""

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pocketlm.run.llamacpp import decode_row
from pocketlm.tensors.formats import FORMATS, Format, Quantized, fit_scales, pack, round_to_nearest, unpack

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
WEIGHTS = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def random_weights(rows: int = 64, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def adversarial() -> dict[str, Tensor]:
    """Rows of 64 weights that trip careless arithmetic."""
    ramp = torch.linspace(-1, 1, 64)
    lone = torch.zeros(64)
    lone[40] = 1e-40
    return {
        "zeros": torch.zeros(64),
        "negative zeros": -torch.zeros(64),
        "beyond fp16": ramp * 1e9,
        "near the largest float": ramp * 3e38,
        "one huge": torch.cat([ramp[:63] * 0.01, torch.tensor([1e6])]),
        "one denormal": lone,
        "denormals": ramp * 1e-41,
        "scale below fp16": ramp * 1e-8,
        "scale a denormal of fp16": ramp * 1e-5,
        "all the negative extreme": torch.full((64,), -0.3),
        "all the positive extreme": torch.full((64,), 0.3),
        "only integers": torch.arange(64.0) - 32,
        "only half integers": torch.arange(64.0) / 2 - 16,
        "alternating": torch.tensor([1.0, -1.0]).repeat(32),
    }


def by_gguf(form: Format, rows: Tensor) -> np.ndarray:
    return gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[form.name])


def by_engine(form: Format, rows: Tensor, columns: int) -> Tensor:
    return torch.stack([decode_row(form.name, bytes(row.numpy()), columns) for row in rows])


def assert_decodes_alike(quantized: Quantized):
    """All three decoders agree bit for bit, signs of zeros included."""
    packed, decoded = pack(quantized), quantized.decode()
    form, columns = quantized.format, decoded.shape[1]
    assert packed.rows.shape == (len(decoded), form.row_bytes(columns))
    assert torch.isfinite(decoded).all()
    bits = decoded.numpy().view(np.uint32)
    assert np.array_equal(by_engine(form, packed.rows, columns).numpy().view(np.uint32), bits)
    assert np.array_equal(by_gguf(form, packed.rows).view(np.uint32), bits)


@every_format
def test_every_code_and_scale_survives_packing_and_is_decoded_alike_by_gguf_and_the_engine(form: Format):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, len(form.levels), (37, 160), generator=generator).to(torch.uint8)
    codes[0, : len(form.levels)] = torch.arange(len(form.levels)).to(torch.uint8)[:160]
    codes[1] = len(form.levels) - 1
    scales = torch.randn(37, 160 // form.block, generator=generator).half().float()
    scales[2], scales[3], scales[4] = 65504.0, -(2.0**-24), 0.0
    quantized = Quantized(form, codes, scales)
    back = unpack(pack(quantized))
    assert back.codes.dtype == torch.uint8
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scales, scales)
    assert_decodes_alike(quantized)


@every_format
@settings(max_examples=60, deadline=None)
@given(data=WEIGHTS)
def test_any_weights_round_to_bytes_that_all_decoders_read_alike(form: Format, data: np.ndarray):
    assert_decodes_alike(round_to_nearest(torch.from_numpy(data), form))


@every_format
@pytest.mark.parametrize("row", adversarial().values(), ids=adversarial())
def test_weights_at_the_edge_of_the_numbers(form: Format, row: Tensor):
    quantized = round_to_nearest(row[None], form)
    assert_decodes_alike(quantized)
    reach = max(map(abs, form.levels)) * 65504.0
    clipped = row.clamp(-reach, reach)
    # Every weight is off by at most the coarsest gap between two levels or fp16's smallest step.
    gap = max(b - a for a, b in zip(form.levels, form.levels[1:], strict=False))
    ends = min(abs(form.levels[0]), abs(form.levels[-1]))
    bound = clipped.abs().max() * gap / ends * 0.75 + 2.0**-25 * max(map(abs, form.levels)) + 1e-30
    assert (quantized.decode()[0] - clipped).abs().max() <= bound


@every_format
def test_a_zero_row_stays_exactly_zero(form: Format):
    assert (round_to_nearest(torch.zeros(2, 64), form).decode() == 0).all()


@every_format
def test_weights_on_the_grid_come_back_bit_for_bit(form: Format):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, len(form.levels), (50, 64), generator=generator).to(torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, len(form.levels) - 1  # both ends are in every block
    scales = (torch.rand(50, 2, generator=generator) + 0.5).half().float()
    weights = Quantized(form, codes, scales).decode()
    assert torch.equal(round_to_nearest(weights, form).decode(), weights)


@every_format
def test_rounding_is_the_nearest_level_in_float64_around_every_midpoint(form: Format):
    levels = torch.tensor(form.levels, dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    around = [
        torch.nextafter(middles, torch.tensor(end)) for end in (-math.inf, math.inf)
    ]  # the floats on both sides of each tie
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


def test_the_half_step_lookup_of_iq4_nl_is_a_search_among_its_midpoints():
    form = FORMATS["IQ4_NL"]
    levels = form.table()
    middles = (levels[1:] + levels[:-1]) / 2
    assert torch.equal(middles * 2, (middles * 2).round()), "midpoints lie on half steps"
    ratios = torch.arange(-130 * 64, 120 * 64) / 64
    assert torch.equal(form.nearest(ratios).long(), torch.bucketize(ratios, middles))


@every_format
def test_the_scale_search_beats_scaling_by_the_largest_weight(form: Format):
    weights = random_weights(256)
    blocks = weights.reshape(-1, form.block)
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scales = (peak / form.levels[0]).half().float()
    plain = form.snap(blocks / scales) * scales
    error = (round_to_nearest(weights, form).decode() - weights).square().sum()
    worst = (plain.reshape(weights.shape) - weights).square().sum()
    assert error < (0.999 if len(form.levels) > 64 else 0.93) * worst


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q5_0"])
def test_the_scale_search_never_loses_much_to_a_fine_search(name: str):
    form = FORMATS[name]
    blocks = random_weights(40, form.block)
    peak = blocks.abs().amax(1, keepdim=True)
    best = torch.full((len(blocks),), math.inf)
    for factor in torch.cat([torch.linspace(-1.2, -0.6, 120), torch.linspace(0.6, 1.2, 120)]):
        scale = factor * peak / abs(form.levels[0])
        best = torch.minimum(best, (form.snap(blocks / scale) * scale - blocks).square().sum(1))
    found = (round_to_nearest(blocks, form).decode() - blocks).square().sum(1)
    assert found.sum() < 1.04 * best.sum()


def test_importance_moves_the_error_to_where_it_does_not_count():
    form, weights = FORMATS["Q4_0"], random_weights(128, 64)
    importance = torch.ones(64)
    importance[::4] = 100.0
    plain = (round_to_nearest(weights, form).decode() - weights).square() @ importance
    aware = (round_to_nearest(weights, form, importance).decode() - weights).square() @ importance
    assert aware.sum() < 0.95 * plain.sum()


def test_each_column_gets_its_own_importance():
    """Two blocks with different importances: each block is fitted with its own part."""
    form, weights = FORMATS["Q4_0"], random_weights(16, 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(4)) * 10
    both = round_to_nearest(weights, form, importance)
    for block in (0, 1):
        part = slice(32 * block, 32 * block + 32)
        alone = round_to_nearest(weights[:, part], form, importance[part])
        assert torch.equal(both.decode()[:, part], alone.decode())


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_only_the_ratio_of_importances_counts(scale: float):
    form, weights = FORMATS["IQ4_NL"], random_weights(64, 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.1
    once, scaled = (round_to_nearest(weights, form, importance * factor) for factor in (1.0, scale))
    assert torch.equal(once.codes, scaled.codes)


def test_rows_are_searched_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    form, weights = FORMATS["Q4_0"], random_weights(50, 32)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(6))
    whole = fit_scales(weights, importance, form)
    monkeypatch.setattr("pocketlm.tensors.formats.block.ROWS_AT_ONCE", 7)
    assert torch.equal(fit_scales(weights, importance, form), whole)


@every_format
def test_bits_and_bytes_agree_with_the_gguf_package(form: Format):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form.name]]
    assert (form.block, form.block_bytes) == (block, size)
    assert form.row_bytes(96) == 96 * form.bits / 8
    assert form.fits(96)
    assert not form.fits(100)
