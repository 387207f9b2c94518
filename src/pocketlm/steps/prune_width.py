"""Make a model narrower: fewer FFN channels, heads or directions of the residual stream; what is left takes over.

Channels and heads go by what the output loses when the rest is re-solved, on demand KV groups by the KL of going
without each. Each block is cut beside a copy of itself,
and what writes the residual stream is re-solved towards what the original's stream is behind it; where directions of
the stream go, all linears are, and on demand those that make the channels of the FFNs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.abreast import Pair, abreast, stream_moments
from pocketlm.model.anatomy import anatomy_of, blocks_of, ffn_width, read_weight, replaced
from pocketlm.model.ends import JUDGED, rescale_end, resolve_end
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import (
    head_width,
    keep_channels,
    keep_heads,
    key_value_heads,
    narrow_ends,
    narrow_stream,
    rebuilt,
    set_ffn_width,
)
from pocketlm.model.sweep import Layer, rehearse, run_batches, sweep
from pocketlm.steps.report import StepReport
from pocketlm.tensors.reconstruction import kept_groups, removal_order, solve_readers

WIDTHS = ("ffn", "kv_groups", "heads", "hidden")
SPACE, ATTENDED = "mlp_hidden", "attention_out"
FINAL = 1.0  # how much what the head reads counts beside all that the blocks read, when directions are chosen


@dataclass(frozen=True, kw_only=True)
class PruneWidth:
    """How wide a model becomes; what is None stays as it is."""

    step: Literal["prune_width"] = "prune_width"
    ffn: int | None = None
    """Channels of the feed-forward network kept in every block."""
    kv_groups: int | None = None
    """Heads of keys and values kept in every block, each with the query heads that it serves."""
    heads: int | None = None
    """Query heads kept in every block, of each head of keys and values as many."""
    hidden: int | None = None
    """Width of the residual stream."""
    channels: bool = False
    """Whether what makes the FFN's channels is re-solved too, which takes about as long again."""
    measured: bool = False
    """Whether KV groups are chosen by the KL of going without each, by its share of the output otherwise. Two of the
    reference model's three, by their KL, leave a perplexity of 38.7, by their share 44.8 (dense 28.3)."""
    windows: int = 32
    """Of calibration text at most, to choose and re-solve on; memory for all of it is needed at once."""


def kept_channels(layer: Layer, widths: list[int]) -> dict[int, Tensor]:
    """Return which channels of a block's FFN to keep for each width, ascending.

    One order of removal, chosen for a reader that is re-solved afterwards, serves all widths.
    """
    return _kept(read_weight(reader_of(layer)), layer.gram[SPACE], widths)


def _kept(weight: Tensor, gram: Tensor, widths: list[int]) -> dict[int, Tensor]:
    gone = removal_order(weight, gram, len(gram) - min(widths))
    kept = {}
    for width in widths:
        mask = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        mask[gone[: len(gram) - width]] = False
        kept[width] = mask.nonzero().squeeze(1)
    return kept


def reader_of(layer: Layer) -> nn.Module:
    """Return the linear that reads the channels of a block's FFN."""
    return next(linear for edge, linear in layer.linears() if edge.reads == SPACE)


@torch.no_grad()
def prune_width(
    model: LanguageModel,
    config: PruneWidth,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LanguageModel, StepReport]:
    """Narrow every block alike and re-solve what is left, block by block.

    Each block is measured on the text as the blocks before it, already narrowed, deliver it. Fewer directions of the
    stream are its principal ones where its norms allow a rotation, else channels; all blocks have the same. At last the
    logits are scaled by one factor, through the last norm, so that the model is as sure as it was.

    Args:
        model: Its network is cut; the model that is returned may have another.
        config: The widths.
        windows: (windows, length) token ids to measure on.
        progress: Called after each block with how many are done and how many there are.

    Raises:
        BadInputError: A width is more than the present one or less than 1, or the family has no such shape.
    """
    network, anatomy = model.network, anatomy_of(model.network)
    present = present_widths(network)
    wanted = checked(network, config)
    if wanted == present:
        return model, StepReport("prune_width", "nothing to narrow: all widths are there already", {})
    opinion, chosen, blocks = judge(network, windows[:JUDGED]), [], network.config.num_hidden_layers
    measured = config.measured and wanted.kv_groups < present.kv_groups
    total = 2 * blocks if measured else blocks
    damage = group_damage(network, windows, lambda done: progress(done, total)) if measured else None
    basis = choose_basis(network, windows, wanted.hidden) if wanted.hidden < present.hidden else None
    for pair in abreast(network, windows, basis=basis):
        cut = _cut(pair, network, wanted, damage and damage[pair.index])
        chosen.append(cut | {"channels": config.channels and pair.resolve_channels()})
        progress(total - blocks + pair.index + 1, total)
    if basis is not None:
        before = copy.deepcopy(network.get_submodule(anatomy.final_norm)), network.lm_head.weight
        narrow_ends(network, basis)
        resolve_end(network, *before, pair)
    set_ffn_width(network, wanted.ffn)
    if wanted != replace(present, ffn=wanted.ffn):
        model = replace(model, network=rebuilt(network, _stated(network, wanted)))
    rescale_end(model.network, windows[:JUDGED], opinion)
    return model, _report(present, wanted, chosen, measured)


def present_widths(network: nn.Module) -> PruneWidth:
    """Return the widths that a network has."""
    return PruneWidth(
        ffn=ffn_width(network),
        kv_groups=key_value_heads(network),
        heads=network.config.num_attention_heads,
        hidden=network.config.hidden_size,
    )


def checked(network: nn.Module, config: PruneWidth) -> PruneWidth:
    """Return the widths with those filled in that stay or follow from the others.

    Raises:
        BadInputError: As `prune_width`.
    """
    now = present_widths(network)
    groups, served = now.kv_groups, now.heads // now.kv_groups
    given = {name: getattr(config, name) for name in WIDTHS}
    wanted = replace(now, **{name: width for name, width in given.items() if width is not None})
    parts = (("FFNs", "they are", wanted.ffn, now.ffn), ("the residual stream", "it is", wanted.hidden, now.hidden))
    for what, present, asked, most in parts:
        if not 0 < asked <= most:
            raise BadInputError(f"Cannot make {what} {asked} wide: {present} {most} wide now. Give 1 to {most}")
    if not 0 < wanted.kv_groups <= groups:
        raise BadInputError(f"Cannot keep {wanted.kv_groups} KV groups: there are {groups} now. Give 1 to {groups}")
    if network.config.model_type == "gpt2":
        # Its heads together are as wide as the residual stream.
        width = head_width(network.config)
        if {config.kv_groups, config.heads} - {None, wanted.hidden // width} or wanted.hidden % width:
            raise BadInputError(
                f"The heads of a GPT-2 are together as wide as its residual stream: give a hidden size that is a "
                f"multiple of {width}, and as many heads follow"
            )
        return replace(wanted, kv_groups=wanted.hidden // width, heads=wanted.hidden // width)
    if config.heads is None:
        wanted = replace(wanted, heads=served * wanted.kv_groups)
    if wanted.heads not in range(wanted.kv_groups, served * wanted.kv_groups + 1, wanted.kv_groups):
        fits = ", ".join(str(wanted.kv_groups * each) for each in range(1, served + 1))
        raise BadInputError(
            f"Cannot keep {wanted.heads} query heads with {wanted.kv_groups} KV groups, of which each serves as many, "
            f"{served} now. What fits: {fits}"
        )
    biased = getattr(network.config, "attention_bias", False) or getattr(network.config, "mlp_bias", False)
    strict = network.config.model_type == "gemma3_text" or (network.config.model_type == "llama" and biased)
    if strict and wanted.hidden % wanted.heads:
        raise BadInputError(
            f"transformers wants the hidden size of a `{network.config.model_type}` to be a multiple of its "
            f"{wanted.heads} query heads: {wanted.hidden} is not. Nearest below: "
            f"{wanted.hidden // wanted.heads * wanted.heads}"
        )
    return wanted


def _stated(network: nn.Module, wanted: PruneWidth) -> dict[str, int]:
    """Return what the config says about widths."""
    if network.config.model_type == "gpt2":
        return {"n_embd": wanted.hidden, "n_head": wanted.heads}
    return {
        "hidden_size": wanted.hidden,
        "num_attention_heads": wanted.heads,
        "num_key_value_heads": wanted.kv_groups,
        "head_dim": head_width(network.config),
    }


@torch.no_grad()
def group_damage(
    network: nn.Module, windows: Tensor, progress: Callable[[int], None] = lambda done: None
) -> list[list[float]]:
    """Return the KL to the network of going without each KV group of each block alone, the others re-solved.

    Shares of the output often tie, and what ties there does not in what the network says: a head may matter for one
    kind of text alone.

    Args:
        network: Unchanged afterwards.
        windows: (windows, length) token ids. The last of them, up to JUDGED, are tried on, others are solved on.
        progress: Called after each block with how many are done.

    Returns:
        Nats per token by block and group.
    """
    anatomy, present, blocks = anatomy_of(network), present_widths(network), blocks_of(network)
    (path,), norm = anatomy.readers(ATTENDED), network.get_submodule(anatomy.final_norm)
    held = min(JUDGED, (len(windows) + 1) // 2)
    tried, solved = windows[-held:], windows[: min(JUDGED, max(1, len(windows) - held))]
    opinion, start, damage = judge(network, tried), rehearse(network, tried), []
    states = start.hidden
    for layer in sweep(network, solved, spaces=(ATTENDED,)):
        linear = layer.module.get_submodule(path)
        weight, gram, row = read_weight(linear), layer.gram[ATTENDED], []
        for group in range(present.kv_groups):
            left = states
            with replaced({linear: _without_group(weight, gram, present, group)}):
                for later in range(layer.index, len(blocks)):
                    left = run_batches(blocks[later], left, start.keywords[later])
            hidden = torch.cat([norm(each) for each in left]).flatten(0, 1)
            row.append(opinion.divergence(hidden, network.lm_head.weight))
        states = run_batches(layer.module, states, start.keywords[layer.index])
        damage.append(row)
        progress(layer.index + 1)
    return damage


def _without_group(weight: Tensor, gram: Tensor, present: PruneWidth, group: int) -> Tensor:
    """Return an output matrix that reads nothing of one KV group, the other columns re-solved."""
    heads = torch.arange(present.heads).view(present.kv_groups, -1)
    keep = _columns(torch.cat([heads[:group], heads[group + 1 :]]).flatten().tolist(), gram, present)
    narrow = torch.zeros_like(weight)
    narrow[:, keep] = solve_readers(weight, gram, keep)
    return narrow


def _choose_heads(
    weight: Tensor, gram: Tensor, present: PruneWidth, wanted: PruneWidth, damage: list[float] | None
) -> dict[str, Any]:
    """Return which heads of keys and values stay, which query heads of theirs, and the scores of both.

    A group's score is its damage where that was measured. Else, and for query heads, it is the share of the output that
    the others cannot replace; query heads are scored once the others of the groups that stay have taken over.
    """
    whole = ((weight.float() @ gram) * weight.float()).sum().clamp_min(1e-30)
    if damage is None:
        groups, costs = kept_groups(weight, gram, len(gram) // present.kv_groups, wanted.kv_groups)
        scores = (costs / whole).tolist()
    else:
        groups = sorted(sorted(range(len(damage)), key=lambda group: -damage[group])[: wanted.kv_groups])
        scores = damage
    heads = torch.arange(present.heads).view(present.kv_groups, -1)[groups].flatten().tolist()
    found = {"groups": groups, "group_scores": scores, "heads": heads, "served": heads}
    if wanted.heads < len(heads):
        columns = _columns(heads, gram, present)
        solved, size = solve_readers(weight, gram, columns), len(gram) // present.heads
        inner = gram[columns][:, columns]
        left, costs = kept_groups(solved, inner, size, wanted.heads, families=wanted.kv_groups)
        found |= {"heads": [heads[place] for place in left], "head_scores": (costs / whole).tolist()}
    return found


def _columns(heads: list[int], gram: Tensor, present: PruneWidth) -> Tensor:
    """Return the columns of what the output matrix reads of some query heads."""
    return torch.arange(len(gram), device=gram.device).view(present.heads, -1)[heads].flatten()


def _cut(pair: Pair, network: nn.Module, wanted: PruneWidth, damage: list[float] | None) -> dict[str, Any]:
    """Cut one block, perhaps for a narrower stream, and re-solve it from front to back; return what was chosen.

    What reads a whole stream is left alone: re-solved as well, it made no difference (FFNs of 1,152 channels in the
    reference model: KL 0.3835 to 0.3833).
    """
    attention, ffn = pair.writers
    present, chosen, narrower = present_widths(network), {}, pair.basis is not None
    if narrower:
        narrow_stream(pair.block, pair.anatomy, pair.basis)
        pair.resolve_readers("attention_in")
    moments, keep = pair.moments(attention), None
    if wanted.heads < present.heads:
        gram = moments[0].gram + moments[1].gram
        weight = read_weight(pair.original.get_submodule(attention))
        chosen |= _choose_heads(weight, gram, present, wanted, damage)
        keep_heads(pair.block, network, chosen["groups"], chosen["heads"])
        keep = _columns(chosen["heads"], gram, present)
    pair.resolve_writer(attention, moments, keep)
    if narrower:
        pair.resolve_readers("mlp_in")
    moments, keep = pair.moments(ffn), None
    gram = moments[0].gram + moments[1].gram
    if wanted.ffn < len(gram):
        weight = read_weight(pair.original.get_submodule(ffn))
        keep = _kept(weight, gram, [wanted.ffn])[wanted.ffn]
        chosen["energy_kept"] = _explained(weight, solve_readers(weight, gram, keep), gram, keep)
        keep_channels(pair.block, network, SPACE, keep)
    pair.resolve_writer(ffn, moments, keep)
    return chosen


def choose_basis(network: nn.Module, windows: Tensor, hidden: int) -> Tensor:
    """Return the directions of the residual stream that are kept in all blocks, (width, hidden), orthonormal.

    The principal directions of what all blocks and the head read (SliceGPT rotates each block by itself, which takes
    matrices between blocks that no stock shape has), or, where norms forbid a rotation, the channels with the most
    energy.
    """
    inner, final = stream_moments(network, windows)
    moment = inner / inner.trace() + FINAL * final / final.trace()
    if anatomy_of(network).rotates:
        return torch.linalg.eigh(moment.double()).eigenvectors[:, -hidden:].float().contiguous()
    keep = moment.diagonal().argsort(descending=True, stable=True)[:hidden].sort().values
    return torch.eye(len(moment), device=moment.device)[:, keep].contiguous()


def _report(before: PruneWidth, after: PruneWidth, chosen: list[dict[str, Any]], measured: bool) -> StepReport:
    said, details = [], {}
    energy = [block["energy_kept"] for block in chosen if "energy_kept" in block]
    if energy:
        said.append(
            f"narrowed FFNs from {before.ffn} to {after.ffn} channels, keeping {sum(energy) / len(energy):.1%} of "
            "their output energy"
        )
        details |= {"from": before.ffn, "to": after.ffn, "energy_kept": [round(value, 5) for value in energy]}
    if after.kv_groups < before.kv_groups:
        said.append(f"kept {after.kv_groups} of {before.kv_groups} KV groups" + (" by their KL" if measured else ""))
        details |= {
            "kv_groups_kept": [block["groups"] for block in chosen],
            "kv_group_scores": [[round(score, 5) for score in block["group_scores"]] for block in chosen],
            "kv_group_scores_are_kl": measured,
        }
    if "head_scores" in chosen[0]:
        said.append(f"kept {after.heads} of {before.heads} query heads")
        details |= {
            "heads_kept": [block["heads"] for block in chosen],
            "heads_served": [block["served"] for block in chosen],
            "head_scores": [[round(score, 5) for score in block["head_scores"]] for block in chosen],
        }
    if after.hidden < before.hidden:
        said.append(f"narrowed the residual stream from {before.hidden} to {after.hidden}")
        details |= {"hidden_from": before.hidden, "hidden_to": after.hidden}
    resolved = [index for index, block in enumerate(chosen) if block["channels"]]
    if resolved:
        said.append(f"what makes FFN channels re-solved in {len(resolved)} of {len(chosen)} blocks")
        details |= {"channels_resolved": resolved}
    return StepReport("prune_width", "; ".join(said), details)


def _explained(weight: Tensor, solved: Tensor, gram: Tensor, keep: Tensor) -> float:
    """Return the share of ‖W X‖² that the re-solved weights reproduce."""
    change = weight.clone().float()
    change[:, keep] -= solved.float()
    whole = ((weight.float() @ gram) * weight.float()).sum()
    return 1 - (((change @ gram) * change).sum() / whole.clamp_min(1e-30)).item()
