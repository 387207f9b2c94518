"""Re-solving the linears in front of a nonlinearity: those that make the channels of a feed-forward network.

    inputs x ─V₁,V₂─> channels h ─W─> output, behind which t is missing

Near the weights there are, the output changes by W (s₁ ∘ Δ₁ x + s₂ ∘ Δ₂ x) with the slopes s = ∂h/∂(V x), which is
linear in Δ: to make good what is missing is a least-squares problem again. It is too large to be factored and is solved
by conjugate gradients, which stop where text that is held back gains no more (Gauss-Newton with CG, as in "Deep
learning via Hessian-free optimization", Martens 2010), preconditioned by Kronecker factors
(https://arxiv.org/abs/1503.05671).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

ROUNDS = 12  # of conjugate gradients at most
PATIENCE = 2  # of them without a gain on the text that is held back
CONVERGED = 1e-16  # of the gradient's size at first
# Of the diagonal, added to itself. On the reference model (FFN 1152, 64 windows) 0.1 fits noise after two rounds.
DAMPING = 1.0

Changes = list[Tensor]
"""Of the weights of each linear, (channels, width), float32 or, of tokens in float64, float64."""


@dataclass(frozen=True)
class Tangent:
    """Some tokens, and how the output depends on what is re-solved.

    Attributes:
        inputs: (tokens, width), what the linears read.
        slopes: Of each linear, (tokens, channels): how fast each channel changes with what the linear puts out.
        missing: (tokens, rows), what there should be behind the reader of the channels besides its output.
    """

    inputs: Tensor
    slopes: tuple[Tensor, ...]
    missing: Tensor

    def of(self, tokens: slice) -> "Tangent":
        """Return some of the tokens."""
        return Tangent(self.inputs[tokens], tuple(each[tokens] for each in self.slopes), self.missing[tokens])


@torch.no_grad()
def solve_changes(reader: Tensor, text: list[Tangent], damping: float = DAMPING, rounds: int = ROUNDS) -> Changes:
    """Return what to add to the weights of the linears that make the channels; zeros where nothing helps.

    Minimizes ‖T - W Σ (s ∘ Δ x)‖² + λ Σ a b Δ², where a and b are what a channel and an input do to the output: the
    diagonal of (WᵀW) ∘ E[s sᵀ] and that of Σ x xᵀ, a thousandth of their means at least.

    Args:
        reader: W, (rows, channels), what reads the channels.
        text: Batches of tokens, in the precision of products; the last quarter of each is held back.
        damping: λ.
        rounds: At most.
    """
    cuts = [3 * len(batch.inputs) // 4 for batch in text]
    taught = [batch.of(slice(cut)) for batch, cut in zip(text, cuts, strict=True)]
    held = [batch.of(slice(cut, None)) for batch, cut in zip(text, cuts, strict=True)]
    weight, metrics = reader.to(text[0].inputs.dtype), _metrics(reader, taught, damping)

    def precondition(gradient: Changes) -> Changes:
        return [solve(each) for each, (_, solve) in zip(gradient, metrics, strict=True)]

    def product(changes: Changes) -> Changes:
        image = _pulled_back(weight, taught, (_pushed(weight, batch, changes) for batch in taught))
        return [one + penalty * each for one, each, (penalty, _) in zip(image, changes, metrics, strict=True)]

    gradient = _pulled_back(weight, taught, (batch.missing for batch in taught))
    change = best = [torch.zeros_like(each) for each in gradient]
    lost = [batch.missing.float() for batch in held]
    lowest, idle = _energy(lost), 0
    for step, direction in islice(_conjugate_gradients(gradient, product, precondition), rounds):
        change = _added(change, direction, step)
        lost = [rest - step * _pushed(weight, batch, direction).float() for rest, batch in zip(lost, held, strict=True)]
        error, idle = _energy(lost), idle + 1
        if error < lowest:
            lowest, best, idle = error, change, 0
        if idle == PATIENCE:
            break
    return best


def _conjugate_gradients(
    residual: Changes, product: Callable[[Changes], Changes], precondition: Callable[[Changes], Changes]
) -> Iterator[tuple[float, Changes]]:
    """Yield how far to go and in which direction, one after the other, as long as something is left to gain."""
    direction = solved = precondition(residual)
    size = _dot(residual, solved)
    least = CONVERGED * size
    while size > least:
        image = product(direction)
        step = size / _dot(direction, image)
        yield step, direction
        residual = _added(residual, image, -step)
        solved = precondition(residual)
        before, size = size, _dot(residual, solved)
        direction = _added(solved, direction, size / before)


def _pushed(weight: Tensor, batch: Tangent, changes: Changes) -> Tensor:
    """Return what changes do to the output, (tokens, rows)."""
    made = (
        (batch.inputs @ change.to(batch.inputs.dtype).T) * slopes
        for change, slopes in zip(changes, batch.slopes, strict=True)
    )
    return sum(made) @ weight.T


def _pulled_back(weight: Tensor, text: list[Tangent], outputs: Iterable[Tensor]) -> Changes:
    """Return the transpose of `_pushed` applied to outputs, summed over the batches."""
    found: Changes = [torch.zeros(())] * len(text[0].slopes)
    for batch, output in zip(text, outputs, strict=True):
        channels = output @ weight
        parts = ((channels * slopes).T @ batch.inputs for slopes in batch.slopes)
        found = [before + _wide(part) for before, part in zip(found, parts, strict=True)]
    return found


def _metrics(reader: Tensor, text: list[Tangent], damping: float) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Return for each linear the penalty of its weights, (channels, width), and what preconditions its gradient.

    The Gauss-Newton matrix of a linear is about the Kronecker product of (WᵀW) ∘ E[s sᵀ], on the side of its channels,
    and Σ x xᵀ, on that of its inputs.
    """
    tokens = max(1, sum(len(batch.inputs) for batch in text))
    between = reader.double().T @ reader.double() / tokens
    inner = sum((batch.inputs.T @ batch.inputs).double() for batch in text)
    metrics = []
    for place in range(len(text[0].slopes)):
        slopes = [batch.slopes[place] for batch in text]
        outer = between * sum((each.T @ each).double() for each in slopes)
        factors = [torch.linalg.cholesky(side + damping**0.5 * _diagonal(side).diag()) for side in (outer, inner)]

        def solve(gradient: Tensor, factors: list[Tensor] = factors) -> Tensor:
            left = torch.cholesky_solve(gradient.double(), factors[0])
            return torch.cholesky_solve(left.T, factors[1]).T.to(gradient.dtype)

        penalty = damping * torch.outer(_diagonal(outer), _diagonal(inner))
        metrics.append((penalty.to(_wide(text[0].inputs[:0]).dtype), solve))
    return metrics


def _diagonal(side: Tensor) -> Tensor:
    # Of dead channels and inputs there is none, and the factors want some.
    diagonal = side.diagonal()
    return diagonal.clamp_min(1e-3 * diagonal.mean()).clamp_min(1e-30)


def _energy(parts: list[Tensor]) -> float:
    return sum(part.square().sum().item() for part in parts)


def _dot(left: Changes, right: Changes) -> float:
    return sum((a * b).sum(dtype=torch.float64).item() for a, b in zip(left, right, strict=True))


def _wide(part: Tensor) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _added(left: Changes, right: Changes, share: float) -> Changes:
    return [a + share * b for a, b in zip(left, right, strict=True)]
