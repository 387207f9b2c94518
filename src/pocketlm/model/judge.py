"""The original's opinion on a text, kept so that changed models can be compared with it again and again."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.model.compute import fast_forward
from pocketlm.model.sweep import final_hidden
from pocketlm.tensors.divergence import kl_divergence

POSITIONS_AT_ONCE = 256  # logits of so many positions are in memory together, whatever the vocabulary


@dataclass(frozen=True)
class Judge:
    """The original's opinion on some text: what its head read, and the head.

    Logits of the whole text are never kept: they are made again, some positions at a time.
    """

    hidden: Tensor  # (tokens, width) float32
    head: Tensor  # (vocabulary, width)

    @torch.no_grad()
    def divergence(self, hidden: Tensor, head: Tensor) -> float:
        """Return the mean KL in nats per token of another final hidden state, (tokens, width), under its head."""
        total = 0.0
        with fast_forward(hidden.device):
            for start in range(0, len(hidden), POSITIONS_AT_ONCE):
                chunk = slice(start, start + POSITIONS_AT_ONCE)
                truth = nn.functional.linear(self.hidden[chunk], self.head)
                total += kl_divergence(truth, nn.functional.linear(hidden[chunk], head)).sum().item()
        return total / len(hidden)


def judge(network: nn.Module, windows: Tensor) -> Judge:
    """Record the original's opinion on `windows`, (windows, length)."""
    return Judge(final_hidden(network, windows).flatten(0, 1), network.lm_head.weight.detach().clone())


def divergence_of(network: nn.Module, windows: Tensor, opinion: Judge) -> float:
    """Return the mean KL of a changed network to the original, in nats per token."""
    return opinion.divergence(final_hidden(network, windows).flatten(0, 1), network.lm_head.weight)
