"""Held-out text beside a network that is being changed block by block, to try changes on before one is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.judge import Judge, judge
from pocketlm.model.sweep import rehearse, run_block

WINDOWS = 1  # of text that changes are tried on


@dataclass
class Trial:
    """Text at the door of the block that is changed next.

    Attributes:
        network: Its later blocks are as they were.
        opinion: The original's on the text.
        index: Of the block that is next.
        states: What that block reads, (windows, length, width).
        keywords: What each block is given beside the states.
        skip: Blocks that are left out.
    """

    network: nn.Module
    opinion: Judge
    index: int
    states: Tensor
    keywords: list[dict]
    skip: frozenset[int]

    @torch.no_grad()
    def divergence(self, block: nn.Module) -> float:
        """Return the KL to the original, in nats per token, if the next block was this one and the rest stayed."""
        states = run_block(block, self.states, self.keywords[self.index])
        for index, later in enumerate(blocks_of(self.network)):
            if index > self.index and index not in self.skip:
                states = run_block(later, states, self.keywords[index])
        norm = self.network.get_submodule(anatomy_of(self.network).final_norm)
        return self.opinion.divergence(norm(states).flatten(0, 1), self.network.lm_head.weight)

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Go through the next block as it is now, to the one behind it that is not left out."""
        self.states = run_block(block, self.states, self.keywords[self.index])
        self.index += 1
        while self.index in self.skip:
            self.index += 1


@torch.no_grad()
def trial(network: nn.Module, windows: Tensor, skip: frozenset[int] = frozenset()) -> Trial:
    """Put text, (windows, length), few enough for one batch, at the door of the first block that is not left out."""
    start = rehearse(network, windows)
    (states,) = start.hidden
    first = next(index for index in range(len(start.keywords)) if index not in skip)
    return Trial(network, judge(network, windows), first, states, [given[0] for given in start.keywords], skip)


def set_apart(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows to solve on and those to try on; of very few windows, all are solved on."""
    return (windows, windows[:WINDOWS]) if len(windows) < 4 * WINDOWS else (windows[:-WINDOWS], windows[-WINDOWS:])
