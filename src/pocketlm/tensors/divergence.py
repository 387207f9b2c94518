"""How far one distribution over the next token is from another."""

import torch
from torch import Tensor


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

    The gradient is softmax(other) - softmax(reference). Written out because a vocabulary's worth of logits is large:
    autograd would keep and pass over it twice as often.

    Args:
        reference: (positions, vocabulary) logits of the original.
        other: (positions, vocabulary) logits of the compressed model.
    """
    truth, mine = torch.log_softmax(reference.float(), -1), torch.log_softmax(other.float(), -1)
    probabilities = truth.exp()
    divergence = torch.linalg.vecdot(probabilities, truth.sub_(mine))
    return divergence, mine.exp_().sub_(probabilities)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) in nats for each position.

    Args:
        logits: (..., vocabulary).
        targets: (...), token ids.
    """
    return -torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None]).squeeze(-1)
