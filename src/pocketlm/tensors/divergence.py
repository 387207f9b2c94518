"""How far one distribution over the next token is from another, and which way leads closer.

Gradients are written out because a vocabulary's worth of logits is large: autograd would keep and pass over it twice
as often. For q = softmax(logits) and a loss L(q) with g = dL/dq, the gradient by the logits is q (g - Σ q g).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"]
SHARES = {"jensen_shannon": 0.5, "skewed_kl": 0.1}  # of the teacher in the mixture, where none is given


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a student is trained on, with the teacher's probabilities p, its own q, and m = share p + (1 - share) q.

    Attributes:
        kind: `forward_kl` KL(p ‖ q); `reverse_kl` KL(q ‖ p); `jensen_shannon` share KL(p ‖ m) + (1 - share) KL(q ‖ m),
            as in GKD (https://arxiv.org/abs/2306.13649); `skewed_kl` KL(p ‖ m), as in DistiLLM
            (https://arxiv.org/abs/2402.03898).
        temperature: Divides both models' logits; the divergence is multiplied by its square, so that gradients keep
            their size (Hinton, https://arxiv.org/abs/1503.02531).
        share: Of the teacher in the mixture.
        cross_entropy: Weight of -log q(next token), at temperature 1; the divergence has the rest of 1.
    """

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    share: float | None = None
    cross_entropy: float = 0.0

    @property
    def teacher_share(self) -> float:
        """The share of the teacher in the mixture, given or usual."""
        return SHARES.get(self.kind, 0.0) if self.share is None else self.share


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Return KL(reference ‖ other) in nats for each position.

    Args:
        reference: (..., vocabulary) logits of the original.
        other: (..., vocabulary) logits of the compressed model.
    """
    truth = torch.log_softmax(reference.float(), -1)
    return (truth.exp() * (truth - torch.log_softmax(other.float(), -1))).sum(-1)


def kl_with_gradient(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(reference ‖ other) in nats for each position, and its gradient by `other`.

    The gradient is softmax(other) - softmax(reference).

    Args:
        reference: (positions, vocabulary) logits of the original.
        other: (positions, vocabulary) logits of the compressed model.
    """
    truth, mine = torch.log_softmax(reference.float(), -1), torch.log_softmax(other.float(), -1)
    probabilities = truth.exp()
    divergence = torch.linalg.vecdot(probabilities, truth.sub_(mine))
    return divergence, mine.exp_().sub_(probabilities)


def loss_with_gradient(
    loss: Loss, reference: Tensor | None, other: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a student's loss in nats for each position, and its gradient by the student's logits.

    Args:
        loss: Which one.
        reference: (positions, vocabulary) logits of the teacher; not needed for cross-entropy alone.
        other: (positions, vocabulary) logits of the student.
        labels: (positions,), the tokens that follow; not needed without cross-entropy.
    """
    if loss.cross_entropy == 1:
        return cross_entropy_with_gradient(other, labels)
    return mixed(_divergence_with_gradient(loss, reference, other), other, labels, loss.cross_entropy)


def mixed(soft: tuple[Tensor, Tensor], logits: Tensor, labels: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """Return a loss and its gradient, `soft`, mixed with `share` of the cross-entropy; the tensors are used up.

    Where the label is -1 there is no example, and the loss stays as it is.
    """
    if not share:
        return soft
    hard, shares = cross_entropy_with_gradient(logits, labels.clamp_min(0)), share * (labels >= 0)
    return soft[0].lerp_(hard[0], shares), soft[1].lerp_(hard[1], shares[:, None])


def cross_entropy_with_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(label) in nats for each position, and its gradient, p less one at the label.

    Args:
        logits: (positions, vocabulary).
        labels: (positions,) token ids.
    """
    mine = torch.log_softmax(logits.float(), -1)
    value = -mine.gather(-1, labels[:, None]).squeeze(-1)
    slope = mine.exp_()
    slope[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return value, slope


@dataclass(frozen=True)
class Sparse:
    """Part of a teacher's distributions, one position after the other.

    Attributes:
        lengths: (positions,) int64, how many tokens of each are here.
        ids: (entries,) int64, the tokens, none twice in a position.
        weights: (entries,) float32, their probabilities, or unbiased estimates of them.
        entropy: (positions,) float32, of the whole distribution, in nats.
        rest: (positions,) float32, the probability of all other tokens together; None where `weights` add up to 1.
    """

    COLUMNS: ClassVar = ("lengths", "ids", "weights", "entropy")

    lengths: Tensor
    ids: Tensor
    weights: Tensor
    entropy: Tensor
    rest: Tensor | None = None

    def to(self, device: torch.device) -> "Sparse":
        """Return the same on another device."""
        rest = None if self.rest is None else self.rest.to(device)
        return Sparse(*(getattr(self, name).to(device) for name in self.COLUMNS), rest)

    def at(self, positions: Tensor) -> "Sparse":
        """Return the distributions at some positions, (positions,)."""
        lengths = self.lengths[positions]
        begins = (self.lengths.cumsum(0) - self.lengths)[positions]
        moved = (begins - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        entries = torch.arange(len(moved), device=moved.device) + moved
        rest = None if self.rest is None else self.rest[positions]
        return Sparse(lengths, self.ids[entries], self.weights[entries], self.entropy[positions], rest)


def sparse_kl_with_gradient(target: Sparse, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(target ‖ student) in nats for each position, and its gradient by the student's logits.

    With sampled targets an unbiased estimate of both; with a `rest`, the KL over its tokens and all others as one,
    which is a lower bound: the gradient is q - p at the tokens, and q (1 - rest / Σ q over the others) at the others.

    Args:
        target: Of the teacher.
        logits: (positions, vocabulary) of the student.
    """
    mine = torch.log_softmax(logits.float(), -1)
    rows = torch.arange(len(logits), device=logits.device).repeat_interleave(target.lengths)
    said = mine[rows, target.ids]
    value = torch.zeros(len(logits), device=logits.device)
    slope = mine.exp_()
    if target.rest is None:
        value.index_add_(0, rows, target.weights * said).add_(target.entropy).neg_()
        slope[rows, target.ids] -= target.weights
        return value, slope
    value.index_add_(0, rows, torch.xlogy(target.weights, target.weights) - target.weights * said)
    known = slope[rows, target.ids]
    slope[rows, target.ids] = 0.0
    others = slope.sum(-1).clamp_min(torch.finfo(value.dtype).tiny)
    value += torch.xlogy(target.rest, target.rest) - target.rest * others.log()
    slope *= (1 - target.rest / others)[:, None]
    slope[rows, target.ids] = known - target.weights
    return value, slope


def _divergence_with_gradient(loss: Loss, reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    heat = loss.temperature
    if loss.kind == "forward_kl":
        if heat == 1:
            return kl_with_gradient(reference, other)
        value, slope = kl_with_gradient(reference / heat, other / heat)
        return value * heat**2, slope.mul_(heat)
    truth, mine = torch.log_softmax(reference.float() / heat, -1), torch.log_softmax(other.float() / heat, -1)
    probabilities = mine.exp()
    if loss.kind == "reverse_kl":
        value, slope = _away_with_slope(probabilities, mine.sub_(truth))
        return value * heat**2, slope.mul_(heat)
    share = loss.teacher_share
    mixture = torch.logaddexp(truth + math.log(share), mine + math.log1p(-share))
    from_teacher = torch.linalg.vecdot(truth.exp(), truth - mixture)
    if loss.kind == "jensen_shannon":
        value, slope = _away_with_slope(probabilities, mine.sub_(mixture))
        value = share * from_teacher + (1 - share) * value
    else:
        ratio = truth.sub_(mixture).exp_()
        value, slope = from_teacher, probabilities * (torch.linalg.vecdot(probabilities, ratio)[:, None] - ratio)
    return value * heat**2, slope.mul_((1 - share) * heat)


def _away_with_slope(probabilities: Tensor, away: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ q `away` for each position, and q (away - that)."""
    value = torch.linalg.vecdot(probabilities, away)
    return value, away.sub_(value[:, None]).mul_(probabilities)
