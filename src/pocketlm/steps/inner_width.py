"""Cut FFN channels and heads inside every block: several choices are re-solved, and held-out text says which to keep.

A block's candidates differ in what is kept (by second order, by gradients, by activations; heads in every way there is)
and in how far the re-solved output matrix aims past its own old output at what the original's stream is. Each is put
in front of the later blocks, still whole, and the one that costs the least KL on text that nothing is solved on stays.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from pocketlm.model.abreast import Pair, abreast
from pocketlm.model.anatomy import blocks_of, ffn_width, read_weight
from pocketlm.model.gradients import Gradients, gradients_of
from pocketlm.model.surgery import keep_channels, keep_heads, key_value_heads
from pocketlm.model.sweep import Layer
from pocketlm.model.trial import Trial, set_apart, trial
from pocketlm.tensors.reconstruction import kept_groups, removal_order, solve_readers, whitened

SPACE = "mlp_hidden"
HEADS = "attention_out"
# Of the way from what the matrix behind put out by itself to what the original's stream is behind it. All of it was
# no better than half (channels of blocks 8 to 11 of the reference model: KL 0.0584, 0.0578, 0.0578).
SHARES = (0.0, 0.5)
GRADIENT_WINDOWS = 4  # of text, to take gradients on
MOST_SETS = 6  # of heads, up to which every set is tried
SAME_SCORE = 4  # so many blocks in a row keep the channels of the score that was best in the first of them


def kept_channels(layer: Layer, widths: list[int]) -> dict[int, Tensor]:
    """Return which channels of a block's FFN to keep for each width, ascending.

    One order of removal, chosen for a reader that is re-solved afterwards, serves all widths.
    """
    return kept_for(read_weight(reader_of(layer)), layer.gram[SPACE], widths)


def kept_for(weight: Tensor, gram: Tensor, widths: list[int]) -> dict[int, Tensor]:
    """Return which input channels of a linear to keep for each width, ascending, when what is kept is re-solved."""
    gone = removal_order(weight, gram, len(gram) - min(widths))
    return {width: _without(gone[: len(gram) - width], len(gram)) for width in widths}


def reader_of(layer: Layer) -> nn.Module:
    """Return the linear that reads the channels of a block's FFN."""
    return next(linear for edge, linear in layer.linears() if edge.reads == SPACE)


def choose_heads(weight: Tensor, gram: Tensor, keep: int, heads: int) -> tuple[list[int], list[float]]:
    """Return the kept heads of keys and values, and each one's share of the output that the others cannot replace."""
    groups, costs = kept_groups(weight, gram, len(gram) // heads, keep)
    whole = ((weight.float() @ gram) * weight.float()).sum().clamp_min(1e-30)
    return groups, (costs / whole).tolist()


def explained(weight: Tensor, solved: Tensor, gram: Tensor, keep: Tensor) -> float:
    """Return the share of ‖W X‖² that the re-solved weights reproduce."""
    change = weight.clone().float()
    change[:, keep] -= solved.float()
    whole = ((weight.float() @ gram) * weight.float()).sum()
    return 1 - (((change @ gram) * change).sum() / whole.clamp_min(1e-30)).item()


@torch.no_grad()
def narrow_inside(
    network: nn.Module, ffn: int, kv_groups: int, windows: Tensor, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Keep so many channels and heads in every block, re-solve what reads them, and return what was chosen.

    Args:
        network: Its blocks are cut in place.
        ffn: Channels that are kept.
        kv_groups: Heads of keys and values that are kept.
        windows: (windows, length) token ids; a few of them only to try candidates on.
        progress: Called after each block with how many are done and how many there are.
    """
    heads, channels, chosen = key_value_heads(network), ffn_width(network), []
    solving, trying = set_apart(windows)
    every_set = comb(heads, kv_groups) <= MOST_SETS
    blind = every_set and ffn == channels  # then no score is asked
    sensitive = [] if blind else gradients_of(network, solving[:GRADIENT_WINDOWS])
    tried = trial(network, trying)
    for pair in abreast(network, solving):
        found: dict[str, Any] = {}
        attention, mlp = pair.writers
        if kv_groups < heads:
            metric = None if every_set else sensitive[pair.index][attention].fisher
            found |= _cut_heads(pair, network, kv_groups, tried, metric)
        if ffn < channels:
            score = chosen[-1]["channels_by"] if pair.index % SAME_SCORE else None
            found |= _cut_channels(pair, network, ffn, tried, sensitive[pair.index][mlp], score)
        tried.advance(pair.block)
        chosen.append(found)
        progress(pair.index + 1, len(blocks_of(network)))
    return chosen


def _cut_heads(pair: Pair, network: nn.Module, keep: int, tried: Trial, metric: Tensor | None) -> dict[str, Any]:
    """Keep the best of all sets of heads; with a metric of the loss, the better of two that second order chooses."""
    heads, (path, _) = key_value_heads(network), pair.writers
    moments = pair.moments(path, scaled=False)
    weight, gram = read_weight(pair.block.get_submodule(path)), moments[0].gram + moments[1].gram
    groups, scores = choose_heads(weight, gram, keep, heads)
    if metric is None:
        sets = list(combinations(range(heads), keep))
    else:
        sets = [tuple(groups), tuple(choose_heads(whitened(metric) @ weight.float(), gram, keep, heads)[0])]

    def cut(block: nn.Module, groups: tuple[int, ...], share: float) -> nn.Module:
        columns = torch.arange(len(gram), device=gram.device).view(heads, -1)[list(groups)].flatten()
        keep_heads(block, network, list(groups))
        replace(pair, block=block).resolve_writer(path, moments, columns, share)
        return block

    best, _ = _tried(pair, tried, dict(zip(sets, sets, strict=True)), cut)
    return {"groups": list(best), "group_scores": scores}


def _cut_channels(
    pair: Pair, network: nn.Module, width: int, tried: Trial, sensitive: Gradients, score: str | None
) -> dict[str, Any]:
    """Keep the channels that one score chooses, or the best of all."""
    path = pair.writers[-1]
    moments = pair.moments(path, scaled=False)
    weight, gram = read_weight(pair.block.get_submodule(path)), moments[0].gram + moments[1].gram
    gone = len(gram) - width
    scores = {
        "second order": lambda: removal_order(weight, gram, gone),
        "second order of the loss": lambda: removal_order(whitened(sensitive.fisher) @ weight.float(), gram, gone),
        "gradients": lambda: sensitive.taylor.argsort(stable=True)[:gone],
        "activations": lambda: gram.diagonal().argsort(stable=True)[:gone],
    }
    kept = {name: _without(scores[name](), len(gram)) for name in ([score] if score else scores)}

    def cut(block: nn.Module, keep: Tensor, share: float) -> nn.Module:
        keep_channels(block, network, SPACE, keep)
        replace(pair, block=block).resolve_writer(path, moments, keep, share)
        return block

    name, share = _tried(pair, tried, kept, cut)
    energy = explained(weight, solve_readers(weight, gram, kept[name]), gram, kept[name])
    return {"channels_by": name, "shares": share, "energy_kept": energy}


def _tried(
    pair: Pair, tried: Trial, kept: dict[Any, Any], cut: Callable[[nn.Module, Any, float], nn.Module]
) -> tuple[Any, float]:
    """Cut the block in the way that costs the least KL; return the name of what is kept, and the share."""

    def cost(name: Any, share: float) -> float:
        return tried.divergence(cut(copy.deepcopy(pair.block), kept[name], share))

    costs = {(name, SHARES[0]): cost(name, SHARES[0]) for name in kept}
    best, _ = min(costs, key=costs.__getitem__)
    if pair.drifted:
        costs |= {(best, share): cost(best, share) for share in SHARES[1:]}
    best, share = min(costs, key=costs.__getitem__)
    cut(pair.block, kept[best], share)
    pair.touched = True
    return best, share


def _without(gone: Tensor, count: int) -> Tensor:
    mask = torch.ones(count, dtype=torch.bool, device=gone.device)
    mask[gone] = False
    return mask.nonzero().squeeze(1)
