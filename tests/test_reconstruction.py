"""Removing channels: what reads them is re-solved exactly, and the channels that go are those not missed."""

import itertools

import pytest
import torch
from torch import Tensor

from pocketlm.tensors.reconstruction import Moments, kept_groups, removal_order, solve_missing, solve_readers


def made(rows: int, channels: int, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights, (rows, channels), and correlated inputs, (tokens, channels), in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(channels) + 0.6 * torch.randn(channels, channels, generator=generator) / channels**0.5
    loudness = torch.rand(channels, generator=generator) * 3
    x = (torch.randn(tokens, channels, generator=generator) @ mixing * loudness).double()
    return torch.randn(rows, channels, generator=generator).double(), x


def damped(x: Tensor, damping: float) -> Tensor:
    """Inputs with the rows that a ridge stands for."""
    return torch.cat([x, (damping * x.square().sum(0)).sqrt().diag()])


def loss(weight: Tensor, x: Tensor, gone: list[int], damping: float = 0.01) -> float:
    """Squared error of the outputs after removing channels and re-solving, by lstsq on explicit data."""
    keep = [j for j in range(weight.shape[1]) if j not in gone]
    x = damped(x, damping)
    solved = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    return (x @ weight.T - x[:, keep] @ solved.T).square().sum().item()


@pytest.mark.parametrize("damping", [1e-6, 0.01, 0.3])
def test_the_readers_are_the_least_squares_solution_on_the_data(damping: float):
    weight, x = made(7, 20)
    keep = torch.tensor([0, 3, 4, 9, 15, 19])
    solved = solve_readers(weight, x.T @ x, keep, damping)
    data = damped(x, damping)
    reference = torch.linalg.lstsq(data[:, keep], data @ weight.T).solution.T
    assert torch.allclose(solved, reference, atol=1e-10)


def test_keeping_every_channel_changes_nothing():
    weight, x = made(7, 20)
    assert torch.allclose(solve_readers(weight, x.T @ x, torch.arange(20)), weight)


def test_the_readers_have_the_dtype_of_the_weights():
    weight, x = made(4, 8)
    gram = (x.T @ x).float()
    assert solve_readers(weight.bfloat16(), gram, torch.arange(5)).dtype == torch.bfloat16


def test_resolving_beats_cutting():
    weight, x = made(10, 32)
    keep = torch.arange(20)
    cut, solved = x[:, keep] @ weight[:, keep].T, x[:, keep] @ solve_readers(weight, x.T @ x, keep).T
    truth = x @ weight.T
    assert (solved - truth).norm() < 0.9 * (cut - truth).norm()


def test_dead_channels_go_first_and_cost_nothing():
    weight, x = made(10, 24)
    dead = torch.tensor([2, 3, 11, 20])
    x[:, dead] = 0
    gone = removal_order(weight, x.T @ x, 4, steps=2, damping=1e-6)
    assert torch.equal(gone.sort().values, dead)
    keep = torch.tensor([j for j in range(24) if j not in dead.tolist()])
    solved = solve_readers(weight, x.T @ x, keep)
    assert torch.allclose(x[:, keep] @ solved.T, x @ weight.T, rtol=1e-9, atol=1e-9)


def test_channels_that_nobody_reads_go_first():
    weight, x = made(10, 24)
    weight[:, [5, 6, 7]] = 0
    assert removal_order(weight, x.T @ x, 3).sort().values.tolist() == [5, 6, 7]


def test_of_a_duplicate_pair_one_goes_and_the_other_takes_over():
    weight, x = made(10, 24)
    weight[:, [4, 17]] *= 3  # both matter: only as long as one of them is there are they not missed
    x[:, 17] = x[:, 4]
    gone = removal_order(weight, x.T @ x, 6, damping=1e-6, steps=6).tolist()
    assert gone[0] in (4, 17)
    assert not {4, 17} <= set(gone)
    keep = torch.tensor([j for j in range(24) if j != gone[0]])
    solved = solve_readers(weight, x.T @ x, keep, damping=1e-9)
    assert torch.allclose(x[:, keep] @ solved.T, x @ weight.T, atol=1e-5)


def test_a_channel_that_is_a_sum_of_others_is_not_missed():
    weight, x = made(10, 24)
    x[:, 9] = x[:, 1] - 2 * x[:, 2] + x[:, 3]
    first = removal_order(weight, x.T @ x, 1, damping=1e-7).item()
    assert first in (1, 2, 3, 9)
    assert loss(weight, x, [first], damping=1e-9) < 1e-4 * loss(weight, x, [14], damping=1e-9)


@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_one_channel_a_round_is_the_greedy_choice_by_brute_force(damping: float):
    """Every channel is tried, the readers re-solved on the data each time, and the cheapest one goes."""
    weight, x = made(6, 12)
    gone: list[int] = []
    for _ in range(7):
        costs = {j: loss(weight, x, [*gone, j], damping) for j in range(12) if j not in gone}
        gone.append(min(costs, key=costs.get))
    assert removal_order(weight, x.T @ x, 7, damping, steps=7).tolist() == gone


def test_few_rounds_come_close_to_one_at_a_time_and_to_the_best_of_all_subsets():
    weight, x = made(6, 12)
    best = min(loss(weight, x, list(subset)) for subset in itertools.combinations(range(12), 5))
    greedy = loss(weight, x, removal_order(weight, x.T @ x, 5, steps=5).tolist())
    coarse = loss(weight, x, removal_order(weight, x.T @ x, 5, steps=2).tolist())
    assert best <= greedy * (1 + 1e-9)
    assert greedy < 1.15 * best
    assert coarse < 1.3 * best


@pytest.mark.parametrize(("remove", "steps"), [(0, 8), (1, 8), (5, 8), (23, 8), (23, 1), (20, 3)])
def test_any_number_of_channels_goes_each_once(remove: int, steps: int):
    weight, x = made(10, 24)
    gone = removal_order(weight.float(), (x.T @ x).float(), remove, steps=steps)
    assert gone.dtype == torch.int64
    assert len(set(gone.tolist())) == len(gone) == remove
    assert all(0 <= j < 24 for j in gone.tolist())


def test_silent_inputs_are_no_error():
    weight, _ = made(4, 8)
    gram = torch.zeros(8, 8)
    assert len(removal_order(weight, gram, 3)) == 3
    assert torch.isfinite(solve_readers(weight, gram, torch.arange(5))).all()


def halves(x: Tensor, t: Tensor) -> tuple[Moments, Moments]:
    cut = len(x) * 3 // 4
    return tuple(Moments(a.T @ a, b.T @ a) for a, b in ((x[:cut], t[:cut]), (x[cut:], t[cut:])))


def test_what_is_missing_is_solved_with_the_damping_that_is_best_on_held_back_text():
    weight, x = made(7, 20)
    t = x @ weight.T + 3 * torch.randn(len(x), 7, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    cut, solutions = len(x) * 3 // 4, {}

    def ridge(rows: Tensor, targets: Tensor, damping: float) -> Tensor:
        data = damped(rows, damping)
        padded = torch.cat([targets, torch.zeros(len(data) - len(targets), 7, dtype=targets.dtype)])
        return torch.linalg.lstsq(data, padded).solution.T

    for damping in (0.03, 0.3, 3.0):
        tried = ridge(x[:cut], t[:cut], damping)
        solutions[(x[cut:] @ tried.T - t[cut:]).norm().item()] = ridge(x, t, damping)
    assert torch.allclose(solve_missing(*halves(x, t), (0.03, 0.3, 3.0)), solutions[min(solutions)], atol=1e-9)


def test_noise_is_not_fitted():
    _, x = made(7, 20)
    t = torch.randn(len(x), 7, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    found = solve_missing(*halves(x, t), dampings=(1e-6, 1e-5))
    assert torch.equal(found, torch.zeros(7, 20, dtype=torch.float64))


def test_the_group_that_is_read_least_goes_first_and_its_cost_is_what_resolving_leaves():
    weight, x = made(10, 24)
    weight[:, 8:16] *= 0.01
    kept, costs = kept_groups(weight, x.T @ x, 8, 2, damping=1e-9)
    assert kept == [0, 2]
    assert costs.tolist() == pytest.approx(
        [loss(weight, x, list(range(start, start + 8)), damping=1e-9) for start in (0, 8, 16)], rel=1e-4
    )


def test_every_family_of_groups_keeps_as_many():
    weight, x = made(10, 32)
    weight[:, :16] *= 0.01  # both groups of the first half are read less than those of the second
    weight[:, :8] *= 0.5
    weight[:, 24:] *= 0.5
    assert kept_groups(weight, x.T @ x, 8, 2)[0] == [2, 3]
    assert kept_groups(weight, x.T @ x, 8, 2, families=2)[0] == [1, 2]


def test_of_two_groups_that_stand_in_for_one_another_one_stays():
    weight, x = made(10, 32)
    x[:, 8:16] = x[:, :8]
    kept, _ = kept_groups(weight, x.T @ x, 8, 2, damping=1e-6)
    assert len({0, 1} & set(kept)) == 1
