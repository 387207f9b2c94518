"""Removing input channels of a linear map and letting the others take over: the least-squares tools of pruning."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What a linear reads and what is missing behind it, summed over tokens.

    Attributes:
        gram: (columns, columns) float32, the sum of x xᵀ.
        cross: (rows, columns) float32, the sum of t xᵀ; t is what there should be besides what the linear puts out.
    """

    gram: Tensor
    cross: Tensor

    def of(self, columns: Tensor) -> "Moments":
        """Return the moments of some of the columns."""
        return Moments(self.gram[columns][:, columns], self.cross[:, columns])


def _damped(gram: Tensor, damping: float) -> Tensor:
    # float64: the inverse of a Gram matrix of a few thousand tokens is badly conditioned in float32. By each column's
    # own energy: the mean, which a few loud columns make, would drown what quiet ones can stand in for.
    gram = gram.double()
    return gram + damping * gram.diagonal().clamp_min(1e-30).diag()


@torch.no_grad()
def removal_order(weight: Tensor, gram: Tensor, remove: int, damping: float = 0.1, steps: int = 8) -> Tensor:
    """Choose which input channels of a linear to remove, when the others are re-solved afterwards.

    Removing channel j and re-solving costs ‖W_j‖² / (G⁻¹)_jj (Optimal Brain Surgeon for a whole column). The
    cheapest channels go in `steps` rounds, and weights and inverse are updated after each (as in SlimGPT,
    https://arxiv.org/abs/2412.18110): of two channels which stand in for one another only one goes, unless
    both fall into one round.

    Args:
        weight: (rows, channels), the linear that reads the channels.
        gram: (channels, channels), the sum of x xᵀ of the channels.
        remove: How many channels go.
        damping: Share of the diagonal added to itself.
        steps: Rounds; more is closer to one at a time.

    Returns:
        (remove,) indices in the order of removal, cheapest first.
    """
    inverse = torch.linalg.inv(_damped(gram, damping))
    work = weight.double().clone()
    alive = torch.arange(len(gram), device=gram.device)
    removed = []
    for count in [len(part) for part in torch.arange(remove).tensor_split(steps)]:
        if count == 0:
            continue
        cost = work.square().sum(0) / inverse.diagonal()
        order = cost.argsort(stable=True)
        gone, kept = order[:count].sort().values, order[count:].sort().values
        removed.append(alive[order[:count]])
        corner = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        work = work[:, kept] - work[:, gone] @ corner
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ corner
        alive = alive[kept]
    return torch.cat(removed) if removed else alive[:0]


@torch.no_grad()
def solve_readers(weight: Tensor, gram: Tensor, keep: Tensor, damping: float = 0.03) -> Tensor:
    """Return the weights on the kept channels that come closest to the old output.

    W' = W H[:, K] H[K, K]⁻¹ with H = G + λ diag(G), the least-squares solution for ‖W X - W' X[K]‖², damped
    towards W.

    Args:
        weight: (rows, channels).
        gram: (channels, channels), the sum of x xᵀ.
        keep: Indices of the kept channels.
        damping: Share of the diagonal added to itself.

    Returns:
        (rows, kept) in the dtype of `weight`.
    """
    damped = _damped(gram, damping)
    target = weight.double() @ damped[:, keep]
    return torch.linalg.solve(damped[keep][:, keep], target, left=False).to(weight.dtype)


@torch.no_grad()
def group_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return what removing each group of neighbouring input channels costs when the others are re-solved.

    tr(W_S [(G⁻¹)_SS]⁻¹ W_Sᵀ) for each group S, such as the channels that an output matrix reads of a head (ZipLM,
    https://arxiv.org/abs/2302.04089). Groups that are gone already, all zeros, cost nothing.

    Args:
        weight: (rows, groups * size) float64.
        inverse: (groups * size, groups * size) float64, of the damped sum of x xᵀ.
        size: Channels of a group.
    """
    costs = []
    for start in range(0, len(inverse), size):
        part = slice(start, start + size)
        rows = weight[:, part].T
        costs.append((rows * (torch.linalg.pinv(inverse[part, part], hermitian=True) @ rows)).sum())
    return torch.stack(costs)


@torch.no_grad()
def kept_groups(
    weight: Tensor, gram: Tensor, size: int, keep: int, damping: float = 0.01, families: int = 1
) -> tuple[list[int], Tensor]:
    """Choose which groups of neighbouring input channels to keep, when what is kept is re-solved afterwards.

    The cheapest group goes, weights and inverse are updated, and so on.

    Args:
        weight: (rows, groups * size), the linear that reads the channels.
        gram: (groups * size, groups * size), the sum of x xᵀ.
        size: Channels of a group.
        keep: How many groups stay.
        damping: Share of the diagonal added to itself.
        families: Into how many parts the groups are cut, neighbours together; as many groups of each stay.

    Returns:
        The kept groups, ascending, and (groups,) what removing each alone costs.
    """
    inverse, work = torch.linalg.inv(_damped(gram, damping)), weight.double().clone()
    first = costs = group_costs(work, inverse, size)
    alive, family = list(range(len(costs))), len(costs) // families
    left = dict.fromkeys(range(families), family)
    while len(alive) > keep:
        open_to = [group for group in alive if left[group // family] > keep // families]
        gone = min(open_to, key=lambda group: costs[group].item())
        alive.remove(gone)
        left[gone // family] -= 1
        part = slice(size * gone, size * (gone + 1))
        corner = torch.linalg.solve(inverse[part, part], inverse[part])
        work = work - work[:, part] @ corner
        inverse = inverse - inverse[:, part] @ corner
        costs = group_costs(work, inverse, size) if len(alive) > keep else costs
    return alive, first


@torch.no_grad()
def solve_missing(taught: Moments, held: Moments, dampings: tuple[float, ...]) -> Tensor:
    """Return what to add to a linear's weights so that it puts out more of what is missing behind it.

    D = C (G + λ diag(G))⁻¹ minimizes ‖T - D X‖² + λ ‖D diag(G)^½‖², where T is what is missing: the inputs X are the
    pruned path's, and T is taken from the original, so that what was lost before is made good as well (GPTAQ has this
    idea for quantization, https://arxiv.org/abs/2504.02692). Most of what is missing cannot be told from X, and a fit
    of it would add noise layer by layer: λ is chosen on text that is held back, and where no λ helps nothing is added.

    Args:
        taught: Of the text that is solved on.
        held: Of the text that is held back.
        dampings: What λ may be.

    Returns:
        (rows, columns) float64, solved on all the text with the λ that was best.
    """
    gram, cross = taught.gram + held.gram, taught.cross + held.cross
    errors = {}
    for damping in dampings:
        found = _ridge(taught.gram, taught.cross, damping)
        errors[damping] = ((found @ held.gram.double() - 2 * held.cross.double()) * found).sum().item()
    best = min(errors, key=errors.__getitem__)
    return _ridge(gram, cross, best) if errors[best] < 0 else torch.zeros_like(cross, dtype=torch.float64)


def _ridge(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    return torch.cholesky_solve(cross.double().T, torch.linalg.cholesky(_damped(gram, damping))).T
