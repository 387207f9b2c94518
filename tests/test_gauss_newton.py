"""What makes channels is re-solved: the damped least-squares answer, found step by step, and no noise."""

import pytest
import torch
from torch import Tensor

from pocketlm.tensors import gauss_newton
from pocketlm.tensors.gauss_newton import Tangent, solve_changes

ROWS, CHANNELS, WIDTH = 5, 6, 4


def made(tokens: int, linears: int = 2, seed: int = 0) -> tuple[Tensor, Tangent]:
    """Return a reader and tokens behind which noise is missing, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(WIDTH, dtype=torch.float64) + 0.5 * draw(WIDTH, WIDTH)
    slopes = tuple(draw(tokens, CHANNELS) + 0.5 for _ in range(linears))
    return draw(ROWS, CHANNELS), Tangent(draw(tokens, WIDTH) @ mixing, slopes, draw(tokens, ROWS))


def jacobian(reader: Tensor, text: Tangent) -> Tensor:
    """Return the outputs' derivatives by all weights, (tokens * rows, linears * channels * width), entry by entry."""
    columns = []
    for slopes in text.slopes:
        for channel in range(CHANNELS):
            for place in range(WIDTH):
                moved = slopes[:, channel] * text.inputs[:, place]
                columns.append(torch.outer(moved, reader[:, channel]).flatten())
    return torch.stack(columns, 1)


def effect(reader: Tensor, text: Tangent, changes: list[Tensor]) -> Tensor:
    flat = torch.cat([change.flatten() for change in changes]).double()
    return (jacobian(reader, text) @ flat).view_as(text.missing)


@pytest.mark.parametrize("linears", [1, 2], ids=["plain", "gated"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_changes_are_the_damped_least_squares_solution(
    linears: int, damping: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gauss_newton, "PATIENCE", 1000)
    reader, text = made(40, linears)
    # What is held back is what is learnt from, so that every round is a gain.
    again = torch.arange(40).repeat(4)
    repeated = Tangent(text.inputs[again], tuple(each[again] for each in text.slopes), text.missing[again])
    found = solve_changes(reader, [repeated], damping, rounds=400)
    big = jacobian(reader, text)
    inner = text.inputs.square().sum(0)
    sides = [(reader.T @ reader) * (each.T @ each) / len(text.inputs) for each in text.slopes]
    penalty = torch.cat([torch.outer(side.diagonal(), inner).flatten() for side in sides])
    exact = torch.linalg.solve(big.T @ big + damping * penalty.diag(), big.T @ text.missing.flatten())

    def objective(change: Tensor) -> float:
        return ((text.missing.flatten() - big @ change).square().sum() + damping * (penalty * change**2).sum()).item()

    lowest, gain = objective(exact), objective(torch.zeros_like(exact)) - objective(exact)
    assert gain > 0.02 * lowest
    assert 0 <= objective(torch.cat([each.flatten() for each in found])) - lowest < 1e-3 * gain


def test_what_the_linears_can_put_out_is_found_from_several_batches():
    reader, text = made(240)
    truth = [torch.randn(CHANNELS, WIDTH, generator=torch.Generator().manual_seed(1)).double() for _ in text.slopes]
    text = Tangent(text.inputs, text.slopes, effect(reader, text, truth))
    found = solve_changes(reader, [text.of(slice(100)), text.of(slice(100, None))], damping=1e-9, rounds=200)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, truth, strict=True))


def test_few_rounds_are_nearly_enough():
    reader, text = made(240)
    truth = [torch.randn(CHANNELS, WIDTH, generator=torch.Generator().manual_seed(1)).double() for _ in text.slopes]
    text = Tangent(text.inputs, text.slopes, effect(reader, text, truth))
    left = text.missing - effect(reader, text, solve_changes(reader, [text], damping=0.01))
    assert left.norm() < 0.05 * text.missing.norm()


def test_noise_is_not_fitted():
    reader, text = made(60)
    found = solve_changes(reader, [text])
    held = text.of(slice(45, None))
    left = held.missing - effect(reader, held, found)
    assert left.norm() <= held.missing.norm()
    assert effect(reader, text, found).norm() < 0.5 * text.missing.norm()


def test_dead_channels_and_silent_inputs_are_no_error():
    reader, text = made(60)
    text.inputs[:, 1] = 0
    reader[:, 2] = 0
    text.slopes[0][:, 3] = 0
    for found in solve_changes(reader, [text]):
        assert found.isfinite().all()
        assert not found[:, 1].any()
    silent = Tangent(text.inputs, text.slopes, torch.zeros_like(text.missing))
    assert not any(found.any() for found in solve_changes(reader, [silent]))


def test_one_token_teaches_nothing():
    reader, text = made(1)
    assert not any(found.any() for found in solve_changes(reader, [text]))


def test_sixteen_bits_find_nearly_the_same():
    reader, text = made(400)
    truth = [torch.randn(CHANNELS, WIDTH, generator=torch.Generator().manual_seed(1)).double() for _ in text.slopes]
    text = Tangent(text.inputs, text.slopes, effect(reader, text, truth))
    short = Tangent(text.inputs.bfloat16(), tuple(each.bfloat16() for each in text.slopes), text.missing.bfloat16())
    left = text.missing - effect(reader, text, solve_changes(reader.bfloat16(), [short], damping=0.01))
    assert left.norm() < 0.1 * text.missing.norm()
