"""Narrow the feed-forward networks: remove channels and let the others take over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import ffn_width, read_weight, write_weight
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import keep_channels, set_ffn_width
from pocketlm.model.sweep import Layer, sweep
from pocketlm.steps.report import StepReport
from pocketlm.tensors.reconstruction import removal_order, solve_readers

SPACE = "mlp_hidden"


@dataclass(frozen=True, kw_only=True)
class PruneWidth:
    """How wide the feed-forward networks become."""

    step: Literal["prune_width"] = "prune_width"
    ffn: int
    """Channels kept in every block."""


def kept_channels(layer: Layer, widths: list[int]) -> dict[int, Tensor]:
    """Return which channels of a block's FFN to keep for each width, ascending.

    One order of removal, chosen for a reader that is re-solved afterwards, serves all widths.
    """
    gram = layer.gram[SPACE]
    gone = removal_order(read_weight(reader_of(layer)), gram, len(gram) - min(widths))
    kept = {}
    for width in widths:
        mask = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        mask[gone[: len(gram) - width]] = False
        kept[width] = mask.nonzero().squeeze(1)
    return kept


def reader_of(layer: Layer) -> nn.Module:
    """Return the linear that reads the channels of a block's FFN."""
    return next(linear for edge, linear in layer.linears() if edge.reads == SPACE)


def prune_width(
    model: LanguageModel,
    config: PruneWidth,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LanguageModel, StepReport]:
    """Keep `config.ffn` channels in every block and re-solve what reads them, block by block.

    Each block is measured on the text as the blocks before it, already narrowed, deliver it.

    Args:
        model: Changed in place and returned.
        config: The width.
        windows: (windows, length) token ids to measure on.
        progress: Called after each block with how many are done and how many there are.

    Raises:
        BadInputError: The width is not between 1 and the present one.
    """
    present = ffn_width(model.network)
    if not 0 < config.ffn <= present:
        raise BadInputError(f"Cannot make FFNs {config.ffn} wide: they are {present} wide now. Give 1 to {present}")
    energy_kept = []
    for layer in sweep(model.network, windows, spaces=(SPACE,)):
        gram = layer.gram[SPACE]
        keep, reader = kept_channels(layer, [config.ffn])[config.ffn], reader_of(layer)
        solved = solve_readers(read_weight(reader), gram, keep)
        energy_kept.append(_explained(read_weight(reader), solved, gram, keep))
        keep_channels(layer.module, model.network, SPACE, keep)
        write_weight(reader, solved)
        progress(layer.index + 1, model.network.config.num_hidden_layers)
    set_ffn_width(model.network, config.ffn)
    mean = sum(energy_kept) / len(energy_kept)
    return model, StepReport(
        "prune_width",
        f"narrowed FFNs from {present} to {config.ffn} channels, keeping {mean:.1%} of their output energy",
        {"from": present, "to": config.ffn, "energy_kept": [round(value, 5) for value in energy_kept]},
    )


def _explained(weight: Tensor, solved: Tensor, gram: Tensor, keep: Tensor) -> float:
    """Return the share of ‖W X‖² that the re-solved weights reproduce."""
    change = weight.clone().float()
    change[:, keep] -= solved.float()
    whole = ((weight.float() @ gram) * weight.float()).sum()
    return 1 - (((change @ gram) * change).sum() / whole.clamp_min(1e-30)).item()
