"""The field's simple measures of importance, to compare measured damage with: blocks by influence and by perplexity."""

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.compute import fast_forward
from pocketlm.model.judge import POSITIONS_AT_ONCE
from pocketlm.model.sweep import rehearse, run_block


@torch.no_grad()
def block_influence(network: nn.Module, windows: Tensor) -> list[float]:
    """Return for each block 1 - the mean cosine of a token's hidden state before and behind it.

    ShortGPT, https://arxiv.org/abs/2403.03853: the blocks that turn the hidden states least are dropped.

    Args:
        network: Left as it is.
        windows: (windows, length) token ids.
    """
    start, influence = rehearse(network, windows), []
    states = start.hidden
    for block, keywords in zip(blocks_of(network), start.keywords, strict=True):
        behind = [run_block(block, x, extra) for x, extra in zip(states, keywords, strict=True)]
        turned = [nn.functional.cosine_similarity(x, y, dim=-1) for x, y in zip(states, behind, strict=True)]
        influence.append(1 - torch.cat(turned).mean().item())
        states = behind
    return influence


@torch.no_grad()
def perplexity_without(network: nn.Module, windows: Tensor) -> list[float]:
    """Return for each block the perplexity of the network without it alone.

    Shortened LLaMA, https://arxiv.org/abs/2402.02834: the blocks that are missed least are dropped.

    Args:
        network: Left as it is.
        windows: (windows, length) token ids, few enough for one batch.
    """
    blocks, start = list(blocks_of(network)), rehearse(network, windows)
    keywords = [per_batch[0] for per_batch in start.keywords]
    norm, found = network.get_submodule(anatomy_of(network).final_norm), []
    before = start.hidden[0]
    for index, block in enumerate(blocks):
        states = before
        for later in range(index + 1, len(blocks)):
            states = run_block(blocks[later], states, keywords[later])
        found.append(perplexity(norm(states), network.lm_head, windows))
        before = run_block(block, before, keywords[index])
    return found


@torch.no_grad()
def perplexity(hidden: Tensor, head: nn.Module, windows: Tensor) -> float:
    """Return the perplexity of text from what the head reads, (windows, length, width)."""
    states, wanted = hidden[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
    total = 0.0
    with fast_forward(hidden.device):
        for start in range(0, len(states), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            logits = head(states[part]).float()
            total += nn.functional.cross_entropy(logits, wanted[part], reduction="sum").item()
    return float(torch.tensor(total / len(states), dtype=torch.float64).exp())
