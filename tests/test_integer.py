"""Integer and FP8 formats: names, exact bytes, levels, and rounding at the edge of the numbers."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.tensors.formats import Format, Quantized, pack, round_to_nearest, unpack
from pocketlm.tensors.formats.integer import (
    BITS,
    DTYPE,
    E4M3,
    NAMES,
    Layout,
    integer_format,
    pack_stream,
    scheme_of,
    unpack_stream,
)

every_name = pytest.mark.parametrize("name", NAMES)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def random_weights(rows: int = 64, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def any_quantized(form: Format, rows: int = 9, seed: int = 0) -> Quantized:
    """Codes, scales and zeros at random, the extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    columns, groups = form.block, form.block // form.span
    codes = torch.randint(0, len(form.levels), (rows, columns), generator=generator).to(torch.uint8)
    codes[0], codes[1] = 0, len(form.levels) - 1
    scales = torch.randn(rows, groups, 1, generator=generator)
    scales[2], scales[3], scales[4], scales[5] = 0.0, 1e-45, 1e-30, 3e38
    steps = torch.ones(rows, groups, 1, dtype=torch.int16)
    if form.offset:
        low = form.offset_steps[0]
        zeros = torch.randint(low, 1, (rows, groups, 1), generator=generator)
        zeros[6], zeros[7] = 0, low
        steps = torch.cat([steps, zeros.to(torch.int16)], 2)
    return Quantized(form, codes, form.storable(scales)[0], steps)


def assert_survives_packing(quantized: Quantized):
    form, packed = quantized.format, pack(quantized)
    rows, columns = quantized.codes.shape
    assert packed.rows.shape == (rows, form.row_bytes(columns))
    back = unpack(packed)
    for before, after in (
        (quantized.codes, back.codes),
        (quantized.scales, back.scales),
        (quantized.steps, back.steps),
    ):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    assert torch.equal(quantized.decode().view(torch.int32), back.decode().view(torch.int32))
    assert torch.isfinite(quantized.decode().to(DTYPE)).all()


# ---- names ----


@every_name
def test_a_name_says_bits_group_and_zeros(name: str):
    scheme = scheme_of(name)
    kind = f"int{scheme.bits}" if scheme.kind == "int" else "fp8"
    group = f"g{scheme.group}" if scheme.group else "row"
    assert name == f"{kind}-{group}{'' if scheme.symmetric else '-asym'}"
    assert integer_format(name, 128) is integer_format(name, 128)
    assert integer_format(name, 128).name == name
    assert pickle.loads(pickle.dumps(integer_format(name, 256))) is integer_format(name, 256)


@pytest.mark.parametrize(
    "name", ["int4", "int7-g32", "int4-g48", "fp8-row-asym", "int4-row-sym", "Q4_0", "xint4-row", ""]
)
def test_an_unknown_name_is_refused_with_examples(name: str):
    with pytest.raises(BadInputError, match=r"(?s)Unknown integer format .*int4-g32.*int8-row"):
        integer_format(name, 128)


def test_groups_must_divide_the_row():
    with pytest.raises(BadInputError, match=r"int4-g64-asym needs rows that divide by 64.*96.*int4-row-asym"):
        integer_format("int4-g64-asym", 96)


# ---- bytes ----


@pytest.mark.parametrize(
    ("name", "columns"), [(name, n) for name in NAMES for n in (128, 384, 100) if n != 100 or "row" in name]
)
def test_every_code_scale_and_zero_survives_packing(name: str, columns: int):
    assert_survives_packing(any_quantized(integer_format(name, columns)))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), count=st.integers(1, 70), unit=st.sampled_from([1, 4]))
def test_a_stream_of_codes_comes_back_and_is_laid_out_as_compressed_tensors_does(
    data: Any, bits: int, count: int, unit: int
):
    codes = torch.from_numpy(data.draw(arrays(np.uint8, (2, count), elements=st.integers(0, 2**bits - 1))))
    stream = pack_stream(codes, bits, unit)
    assert stream.shape[1] == math.ceil(math.ceil(count * bits / 8) / unit) * unit
    assert torch.equal(unpack_stream(stream, bits, count), codes)
    if unit == 4:
        theirs = pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits)
        assert torch.equal(stream.view(torch.int32), theirs)


@every_name
def test_bits_count_codes_scales_and_zeros(name: str):
    scheme, columns = scheme_of(name), 1024
    groups = columns // (scheme.group or columns)
    zeros = 0 if scheme.symmetric else math.ceil(groups * scheme.bits / 8)  # up to a whole byte of the row
    assert integer_format(name, columns).row_bytes(columns) == columns * scheme.bits / 8 + 2 * groups + zeros


def test_the_parts_of_a_row_are_where_the_layout_says():
    quantized = any_quantized(form := integer_format("int3-g32-asym", 96))
    codes, scales, zeros = Layout(scheme_of(form.name), 96).split(pack(quantized).rows)
    assert (codes.shape[1], scales.shape[1], zeros.shape[1]) == (36, 3, 2)
    assert torch.equal(scales.float(), quantized.scales[..., 0])


# ---- levels ----


def test_the_levels_of_fp8_are_the_finite_numbers_of_e4m3():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.tensor(E4M3).tolist() == numbers[numbers.isfinite()].unique().tolist()
    assert len(E4M3) == 253
    form = integer_format("fp8-row", 253)
    codes = torch.arange(253).to(torch.uint8)[None]
    row = pack(Quantized(form, codes, torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.int16))).rows
    assert torch.equal(row[:, :253].contiguous().view(torch.float8_e4m3fn).float(), torch.tensor([E4M3]))


def test_a_byte_that_is_minus_zero_reads_as_zero():
    row = torch.tensor([[0x80, 0x00, 0x80, 0x3F]], dtype=torch.uint8)  # two weights, scale 1
    codes, scales, _ = integer_format("fp8-row", 2).unpack(row)
    assert torch.tensor(E4M3)[codes.long()].tolist() == [[0.0, 0.0]]
    assert scales.item() == 1.0


@every_name
def test_rounding_is_the_nearest_level_around_every_midpoint(name: str):
    form = integer_format(name, 128)
    levels = torch.tensor(form.levels, dtype=torch.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    sides = [torch.nextafter(middles, torch.tensor(end)) for end in (-math.inf, math.inf)]
    for ratios in (*sides, middles, levels.float(), torch.tensor([1e30, -1e30, 0.0, -0.0, 1e-40])):
        codes = form.nearest(ratios)
        distances = (ratios.double()[:, None] - levels).abs()
        assert torch.equal(distances.gather(1, codes.long()[:, None]).squeeze(1), distances.amin(1))


# ---- rounding ----


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), data=arrays(np.float32, (2, 128), elements=FLOATS))
def test_any_weights_become_finite_numbers_that_survive_packing(name: str, data: np.ndarray):
    quantized = round_to_nearest(torch.from_numpy(data), form := integer_format(name, 128))
    assert_survives_packing(quantized)
    if not form.signed:
        assert (quantized.scales >= 0).all()
    if form.offset:
        assert set(quantized.steps[..., 1].flatten().tolist()) <= set(form.offset_steps)


RAMP = torch.linspace(-1, 1, 128)
ADVERSARIAL = {
    "zeros": torch.zeros(128),
    "one huge": torch.cat([RAMP[:127] * 0.01, torch.tensor([1e6])]),
    "denormals": RAMP * 1e-41,
    "small": RAMP * 1e-15,
    "large": RAMP * 1e12,
    "all alike": torch.full((128,), -0.3),
    "all positive": RAMP + 2,
    "ties": torch.arange(128.0) / 2 - 32,
    "alternating": torch.tensor([1.0, -1.0]).repeat(64),
}


@every_name
@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_weights_at_the_edge_of_the_numbers(name: str, row: Tensor):
    quantized = round_to_nearest(row[None], form := integer_format(name, 128))
    assert_survives_packing(quantized)
    # No weight is off by more than the coarsest gap between levels, however far the group is clipped.
    gap = max(b - a for a, b in zip(form.levels, form.levels[1:], strict=False))
    reach = (form.levels[-1] - form.levels[0]) / (1 if form.offset else 2)
    spread = max(row.max().item(), 0.0) - min(row.min().item(), 0.0) if form.offset else row.abs().max().item()
    assert (quantized.decode()[0] - row).abs().max() <= 1.5 * spread * gap / reach + 1e-19


@every_name
def test_zero_rows_stay_exactly_zero(name: str):
    assert (round_to_nearest(torch.zeros(2, 128), integer_format(name, 128)).decode() == 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if "asym" not in name and "fp8" not in name])
def test_weights_on_the_grid_come_back_bit_for_bit(name: str):
    form = integer_format(name, 128)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, len(form.levels), (20, 128), generator=generator).to(torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, len(form.levels) - 1
    scales = (torch.rand(20, 128 // form.span, 1, generator=generator) + 0.5).to(DTYPE).float()
    weights = Quantized(form, codes, scales, torch.ones_like(scales, dtype=torch.int16)).decode()
    assert torch.equal(round_to_nearest(weights, form).decode(), weights)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_pay_for_weights_of_one_sign(bits: int):
    weights = random_weights().abs() + 0.05
    errors = [
        (round_to_nearest(weights, integer_format(f"int{bits}-g64{end}", 128)).decode() - weights).square().sum()
        for end in ("", "-asym")
    ]
    assert errors[1] < errors[0]


def test_smaller_groups_and_more_bits_are_nearer():
    weights = random_weights(64, 256)
    errors = {
        name: (round_to_nearest(weights, integer_format(name, 256)).decode() - weights).square().sum().item()
        for name in NAMES
    }
    for end in ("", "-asym"):
        for bits in BITS:
            by_group = [errors[f"int{bits}-{group}{end}"] for group in ("g32", "g64", "g128", "row")]
            assert by_group == sorted(by_group)
        for group in ("g32", "row"):
            by_bits = [errors[f"int{bits}-{group}{end}"] for bits in reversed(BITS)]
            assert by_bits == sorted(by_bits)
