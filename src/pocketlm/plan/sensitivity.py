"""Measured damage: what each thing that a plan may do costs in KL to the original, on text held out for choosing."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight
from pocketlm.model.judge import Judge, divergence_of
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import rehearse, run_block, sweep
from pocketlm.plan.sizes import Sizes
from pocketlm.steps.prune_width import SPACE, kept_channels, reader_of
from pocketlm.tensors.formats import FORMATS, round_to_nearest
from pocketlm.tensors.reconstruction import solve_readers

CANDIDATES = 5  # after each round only so many of the cheapest blocks are tried again
Progress = Callable[[str, int, int], None]


@torch.no_grad()
def depth_damage(
    network: nn.Module, windows: Tensor, opinion: Judge, most: int, progress: Progress
) -> list[tuple[int, float]]:
    """Remove blocks greedily by measured KL.

    Each candidate's removal is measured with all earlier removals in place; hidden states in front of every block are
    kept, so that only the blocks behind a candidate run again.

    Returns:
        (block, KL with it and all before it removed), at most `most` of them, in the order of removal.
    """
    blocks, start = list(blocks_of(network)), rehearse(network, windows)
    norm = network.get_submodule(anatomy_of(network).final_norm)
    (states,), keywords = start.hidden, [per_batch[0] for per_batch in start.keywords]
    alive, path = list(range(len(blocks))), []
    candidates = alive[1:-1]  # the first block and the last are never worth dropping
    while len(path) < most and candidates:
        prefix = [states]
        for index in alive:
            prefix.append(run_block(blocks[index], prefix[-1], keywords[index]))
        costs = []
        for tried, index in enumerate(candidates, 1):
            position = alive.index(index)
            hidden = prefix[position]
            for later in alive[position + 1 :]:
                hidden = run_block(blocks[later], hidden, keywords[later])
            costs.append((opinion.divergence(norm(hidden).flatten(0, 1), network.lm_head.weight), index))
            progress(f"damage of dropping block {len(path) + 1} of {most}", tried, len(candidates))
        costs.sort()
        damage, block = costs.pop(0)
        path.append((block, damage))
        alive.remove(block)
        candidates = [index for _, index in costs][: max(CANDIDATES, most - len(path))]
    return path


@torch.no_grad()
def width_damage(
    network: nn.Module,
    calibration: Tensor,
    windows: Tensor,
    opinion: Judge,
    widths: list[int],
    progress: Progress,
) -> dict[int, float]:
    """Return the KL of narrowing every FFN to each of `widths`, readers re-solved.

    One sweep over the original gives the weights of all widths; removed channels are zeroed instead of cut.
    """
    solved: dict[int, list[Tensor]] = {width: [] for width in widths}
    blocks = len(blocks_of(network))
    for layer in sweep(network, calibration, spaces=(SPACE,)):
        weight, gram = read_weight(reader_of(layer)), layer.gram[SPACE]
        for width, keep in kept_channels(layer, widths).items():
            narrow = torch.zeros_like(weight)
            narrow[:, keep] = solve_readers(weight, gram, keep)
            solved[width].append(narrow.bfloat16())
        progress("damage of narrower FFNs", layer.index + 1, blocks)
    damage = {}
    (path,) = anatomy_of(network).readers(SPACE)
    for width, weights in solved.items():
        readers = [block.get_submodule(path) for block in blocks_of(network)]
        with replaced(dict(zip(readers, weights, strict=True))):
            damage[width] = divergence_of(network, windows, opinion)
    return damage


@torch.no_grad()
def format_damage(
    model: LanguageModel, sizes: Sizes, windows: Tensor, opinion: Judge, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return the KL of storing each group alone in each format, by rounding.

    Rounding is measured in one small format; the others are scaled by their squared error, to which small damages
    are proportional (the linearity theorem of HIGGS, https://arxiv.org/abs/2411.17525).
    """
    parameters = dict(model.network.named_modules())
    damage: dict[str, dict[str, float]] = {}
    for done, group in enumerate(sizes.group_names, 1):
        names = sizes.allowed(group)
        if names == ["F16"]:
            damage[group] = {"F16": 0.0}
            continue
        modules = [parameters[name.removesuffix(".weight")] for name in sizes.groups if sizes.groups[name] == group]
        coarse = min((FORMATS[name] for name in names if FORMATS[name].consecutive), key=lambda form: form.bits)
        errors = dict.fromkeys(names, 0.0)
        weights = {}
        for module in modules:
            weight = read_weight(module)
            rounded = round_to_nearest(weight, coarse).decode()
            weights[module] = rounded
            sample = weight[:: max(1, len(weight) // 256)]
            for name in names:
                errors[name] += (round_to_nearest(sample, FORMATS[name]).decode() - sample).square().mean().item()
        with replaced(weights):
            measured = divergence_of(model.network, windows, opinion)
        # Weights that lie on the coarse grid already have no error there, and the measured damage is noise.
        scale = measured / errors[coarse.name] if errors[coarse.name] else 0.0
        damage[group] = {name: scale * errors[name] for name in names}
        progress("damage of number formats", done, len(sizes.group_names))
    return damage


@contextmanager
def replaced(weights: dict[nn.Module, Tensor]) -> Iterator[None]:
    """While open, linears and embeddings have other weights, (out, in); tied ones change together."""
    before = {module: copy.deepcopy(module.weight.data) for module in weights}
    try:
        for module, weight in weights.items():
            stored = module.weight.data
            stored.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)
        yield
    finally:
        for module, weight in before.items():
            module.weight.data.copy_(weight)
