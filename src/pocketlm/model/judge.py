"""The original's opinion on a text, kept so that changed models can be compared with it again and again."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.model.sweep import final_hidden
from pocketlm.tensors.divergence import kl_divergence

POSITIONS_AT_ONCE = 256  # logits of so many positions are in memory together, whatever the vocabulary


@dataclass(frozen=True)
class Judge:
    """The original's opinion on some text: what its head read, the head, and what both say.

    Logits of the whole text are never kept: they are made again, some positions at a time. With p the original's
    probabilities, W its head and h what that read, KL(p ‖ softmax(W h')) = (Wᵀp)·(h - h') + log Σ exp(W h') -
    log Σ exp(W h): while the head is the original's, one product with it is all that another h' needs. All of it is in
    float32: the difference is small beside its parts.
    """

    hidden: Tensor  # (tokens, width) float32
    head: Tensor  # (vocabulary, width)
    expected: Tensor  # (tokens, width) float32, Wᵀp
    normalizer: Tensor  # (tokens,) float32, log Σ exp(W h)

    @torch.no_grad()
    def divergence(self, hidden: Tensor, head: Tensor) -> float:
        """Return the mean KL in nats per token of another final hidden state, (tokens, width), under its head."""
        same, weight, truth, total = torch.equal(head, self.head), head.float(), self.head.float(), 0.0
        for start in range(0, len(hidden), POSITIONS_AT_ONCE):
            chunk = slice(start, start + POSITIONS_AT_ONCE)
            logits = hidden[chunk] @ weight.T
            if same:
                total += (self.expected[chunk] * (self.hidden[chunk] - hidden[chunk])).sum().item()
                total += (logits.logsumexp(-1) - self.normalizer[chunk]).sum().item()
            else:
                total += kl_divergence(self.hidden[chunk] @ truth.T, logits).sum().item()
        return total / len(hidden)

    @torch.no_grad()
    def best_scale(self, hidden: Tensor, head: Tensor, steps: int = 4) -> float:
        """Return the factor on another final hidden state, (tokens, width), that brings its opinion closest to this.

        KL(p ‖ softmax(f z)) is convex in f, with slope Σ (q - p) z and curvature Var_q(z): Newton's method.
        """
        weight, scale, wanted = head.float(), 1.0, self._expected_logits(hidden, head)
        for _ in range(steps):
            slope = curvature = 0.0
            for start in range(0, len(hidden), POSITIONS_AT_ONCE):
                chunk = slice(start, start + POSITIONS_AT_ONCE)
                logits = hidden[chunk] @ weight.T
                mine = (scale * logits).softmax(-1)
                mean = torch.linalg.vecdot(mine, logits)
                slope += (mean - wanted[chunk]).sum().item()
                curvature += torch.linalg.vecdot(mine, (logits - mean[:, None]).square()).sum().item()
            scale *= min(2.0, max(0.5, 1 - slope / max(curvature * scale, 1e-30)))
        return scale

    def _expected_logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Return Σ p z of another final hidden state under its head, (tokens,)."""
        if torch.equal(head, self.head):
            return torch.linalg.vecdot(self.expected, hidden)
        weight, truth = head.float(), self.head.float()
        parts = zip(self.hidden.split(POSITIONS_AT_ONCE), hidden.split(POSITIONS_AT_ONCE), strict=True)
        return torch.cat([torch.linalg.vecdot((ours @ truth.T).softmax(-1) @ weight, h) for ours, h in parts])


@torch.no_grad()
def judge(network: nn.Module, windows: Tensor) -> Judge:
    """Record the original's opinion on `windows`, (windows, length)."""
    hidden, head = final_hidden(network, windows).flatten(0, 1), network.lm_head.weight.detach().clone()
    expected, normalizer, weight = torch.empty_like(hidden), hidden.new_empty(len(hidden)), head.float()
    for start in range(0, len(hidden), POSITIONS_AT_ONCE):
        chunk = slice(start, start + POSITIONS_AT_ONCE)
        logits = hidden[chunk] @ weight.T
        normalizer[chunk] = logits.logsumexp(-1)
        expected[chunk] = (logits - normalizer[chunk, None]).exp() @ weight
    return Judge(hidden, head, expected, normalizer)


def divergence_of(network: nn.Module, windows: Tensor, opinion: Judge) -> float:
    """Return the mean KL of a changed network to the original, in nats per token."""
    return opinion.divergence(final_hidden(network, windows).flatten(0, 1), network.lm_head.weight)
