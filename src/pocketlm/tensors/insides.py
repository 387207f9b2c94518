"""How far what two networks compute on the way is apart, and which way leads closer; gradients are written out."""

import math

import torch
from torch import Tensor

HIDDEN = -1e30  # a logit of what is not seen: its probability is 0, and 0 times its difference is 0


def stream_distance(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖mine - theirs‖² / ‖theirs‖² averaged over tokens, and its gradient by `mine`.

    Each token counts alike: a few tokens' streams are hundreds of times longer than all others'.

    Args:
        mine: (..., width), the student's stream, projected to the teacher's width.
        theirs: (..., width).
    """
    away = mine.float() - theirs.float()
    length = theirs.float().square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    value = (away.square().sum(-1, keepdim=True) / length).mean()
    return value, away.mul_(2 / (length * length.numel()))


def relation_divergence(mine: Tensor, theirs: Tensor, heads: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(theirs ‖ mine) of relations, averaged over heads and tokens, and its gradient by `mine`.

    A head's relations are softmax(A Aᵀ / √d): how alike a token's vector is to those of the tokens it sees. They have
    no width, so that two networks' can be compared (MiniLMv2, https://arxiv.org/abs/2012.15828).

    Args:
        mine: (windows, length, width), the student's queries, keys or values.
        theirs: (windows, length, any width), the teacher's.
        heads: Into how many parts both are cut; it divides both widths.
        seen: (windows, length, length) bool, whom (the last dimension) each token may look at, itself included.
    """
    total, slope = torch.zeros((), device=mine.device), torch.empty_like(mine, dtype=torch.float32)
    rows = mine.shape[0] * mine.shape[1] * heads
    for window in range(len(mine)):  # what has the size of length² is in memory for one window at a time
        vectors, truth = (_cut(each[window].float(), heads) for each in (mine, theirs))
        hidden = ~seen[window]
        log_q, log_p = (_relations(each, hidden) for each in (vectors, truth))
        p, q = log_p.exp(), log_q.exp()
        total += (p * (log_p - log_q)).sum() / rows
        by_logits = q.sub_(p).div_(rows * math.sqrt(vectors.shape[-1]))
        by_vectors = (by_logits + by_logits.transpose(1, 2)) @ vectors
        slope[window] = by_vectors.transpose(0, 1).flatten(1)
    return total, slope


def _cut(vectors: Tensor, heads: int) -> Tensor:
    """Cut (length, width) into (heads, length, width / heads)."""
    return vectors.unflatten(-1, (heads, -1)).transpose(0, 1)


def _relations(vectors: Tensor, hidden: Tensor) -> Tensor:
    logits = vectors @ vectors.transpose(1, 2) / math.sqrt(vectors.shape[-1])
    return logits.masked_fill_(hidden, HIDDEN).log_softmax(-1)


def projection_onto(mine: Tensor, theirs: Tensor, damping: float = 0.01) -> Tensor:
    """Return the (their width, my width) map that brings streams closest by `stream_distance`, a little damped.

    Args:
        mine: (tokens, width).
        theirs: (tokens, their width).
        damping: Share of the mean diagonal of my second moments that is added to the diagonal.
    """
    length = theirs.double().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    x, y = mine.double() / length, theirs.double() / length
    gram = x.T @ x
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).T.float()
