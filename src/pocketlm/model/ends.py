"""What a cut network has behind its blocks, fitted to the original: the last norm and the head."""

import torch
from torch import Tensor, nn

from pocketlm.model.abreast import NARROW_DAMPINGS, Pair, Sums
from pocketlm.model.anatomy import anatomy_of, write_weight
from pocketlm.model.judge import Judge
from pocketlm.model.surgery import picks
from pocketlm.model.sweep import final_hidden
from pocketlm.tensors.reconstruction import Moments, solve_missing

JUDGED = 16  # windows by which the logits are scaled at last


@torch.no_grad()
def resolve_end(network: nn.Module, norm: nn.Module, head: Tensor, last: Pair) -> None:
    """Fit what follows the last block of a narrowed network to the original.

    A head of its own is re-solved towards the original's logits. One that is tied to the embedding stays, and the
    last norm's weights are rescaled, channel by channel, so that what the head reads comes closest to the original's.

    Args:
        network: Cut, with its ends narrowed; its last norm and head are changed.
        norm: The last norm as it was.
        head: The head's weights as they were.
        last: The last pair of the walk, whose basis is not None.
    """
    narrow, anatomy = network.get_submodule(anatomy_of(network).final_norm), last.anatomy
    if network.config.tie_word_embeddings and not picks(last.basis):  # the embedding has taken the weight
        norm.weight.fill_(norm.weight.mean())
    sums = Sums()
    for x, y in zip(last.left, last.goal, strict=True):
        sums.add(narrow(x).float(), norm(y).float())
    if not network.config.tie_word_embeddings:
        weight = network.lm_head.weight.float()
        parts = [Moments(part.gram, head.float() @ part.cross - weight @ part.gram) for part in sums.parts]
        write_weight(network.lm_head, weight + solve_missing(*parts, NARROW_DAMPINGS).float())
        return
    gram, cross = (sum(getattr(part, name) for part in sums.parts) for name in ("gram", "cross"))
    scaled = getattr(network.get_input_embeddings(), "embed_scale", None) is not None
    factor = (len(last.basis) / last.basis.shape[1]) ** 0.5 if scaled else 1.0
    ratio = (last.basis.T @ cross).diagonal() / gram.diagonal().clamp_min(1e-30) / factor
    narrow.weight.copy_((narrow.weight + anatomy.norm_offset) * ratio - anatomy.norm_offset)


@torch.no_grad()
def rescale_end(network: nn.Module, windows: Tensor, opinion: Judge) -> None:
    """Scale what the head reads so that next tokens are as probable as to the original: a cut model is too sure.

    Args:
        network: Cut; its last norm is changed.
        windows: (windows, length) token ids.
        opinion: The original's on them.
    """
    anatomy, hidden = anatomy_of(network), final_hidden(network, windows).flatten(0, 1)
    scale, norm = opinion.best_scale(hidden, network.lm_head.weight), network.get_submodule(anatomy.final_norm)
    norm.weight.copy_((norm.weight + anatomy.norm_offset) * scale - anatomy.norm_offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(scale)
