"""Measured damage: what each thing that a plan may do costs in KL to the original, on text held out for choosing."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import Edge, anatomy_of, blocks_of, read_weight, replaced
from pocketlm.model.judge import Judge, divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.respelling import respell, text_loss
from pocketlm.model.sweep import Layer, rehearse, run_block, sweep
from pocketlm.model.vocabulary import spellings
from pocketlm.plan.sizes import Sizes
from pocketlm.steps.prune_width import SPACE, kept_channels, reader_of
from pocketlm.steps.quantize import choose_codes, edges_by_group, gram_of
from pocketlm.steps.trim_vocabulary import TrimVocabulary, trim_vocabulary
from pocketlm.tensors.elimination import ridge
from pocketlm.tensors.formats import FORMATS, round_to_nearest
from pocketlm.tensors.reconstruction import solve_readers

SOME_WINDOWS = 2  # of the text that damages are measured on, for one block and for all units of a group
SAMPLED_ROWS = 128  # of a matrix, from which the output errors of all formats are estimated
CANDIDATES = 5  # after each round only so many of the cheapest blocks are tried again
Progress = Callable[[str, int, int], None]


@torch.no_grad()
def depth_damage(
    network: nn.Module, windows: Tensor, opinion: Judge, most: int, progress: Progress, enough: float = math.inf
) -> list[tuple[int, float]]:
    """Remove blocks greedily by measured KL.

    Each candidate's removal is measured with all earlier removals in place; hidden states in front of every block are
    kept, so that only the blocks behind a candidate run again.

    Args:
        network: The original; unchanged afterwards.
        windows: (windows, length) token ids.
        opinion: The original's, on the same.
        most: Blocks to remove at most.
        progress: Called with what is measured, how much is done and how much there is.
        enough: A KL at which no more blocks are tried.

    Returns:
        (block, KL with it and all before it removed), in the order of removal.
    """
    blocks, start = list(blocks_of(network)), rehearse(network, windows)
    norm = network.get_submodule(anatomy_of(network).final_norm)
    (states,), keywords = start.hidden, [per_batch[0] for per_batch in start.keywords]
    alive, path = list(range(len(blocks))), []
    candidates = alive[1:-1]  # the first block and the last are never worth dropping
    while len(path) < most and candidates and (not path or path[-1][1] < enough):
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
        damage[width] = _with(dict(zip(readers, weights, strict=True)), network, windows, opinion)
    return damage


@torch.no_grad()
def vocabulary_damage(
    model: LanguageModel, documents: Sequence[str], windows: Tensor, counts: Sequence[int], progress: Progress
) -> dict[int, float]:
    """Return what keeping so many tokens costs: the text's nats per token of the original's, less the original's own.

    Args:
        model: The original; unchanged afterwards.
        documents: Text to choose the tokens by.
        windows: (windows, length) of its ids to measure on; words that are gone are spelled with what is left.
        counts: Tokens to keep; those that are too few, or that a tokenizer cannot be cut to, are left out.
        progress: Called with what is measured, how much of it is done and how much there is.
    """
    room = model.network.config.max_position_embeddings
    windows = windows[:, : room // 2]  # they are longer in other tokens
    labels = windows.numel() - len(windows)
    own = text_loss(model.network, respell(windows, [(i,) for i in range(model.network.config.vocab_size)], room))
    damage = {}
    for done, count in enumerate(counts, 1):
        smaller = replace(model, network=copy.deepcopy(model.network))
        try:
            trimmed, _ = trim_vocabulary(smaller, TrimVocabulary(size=count), documents)
        except BadInputError:
            continue
        text = respell(windows, spellings(model.tokenizer, trimmed.tokenizer), room)
        damage[count] = max(0.0, text_loss(trimmed.network, text) - own) / labels
        progress("damage of fewer tokens", done, len(counts))
    return damage


@torch.no_grad()
def format_damage(
    model: LanguageModel, sizes: Sizes, calibration: Tensor, windows: Tensor, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return the KL of storing each unit alone in each format, codes chosen by GPTQ.

    Small damages are proportional to the layer's output error (the linearity theorem of HIGGS,
    https://arxiv.org/abs/2411.17525), so the KL of each block in its coarsest formats is measured, shared out among its
    units by what each alone changes in the block's output (on SmolLM2-135M mostly within 30 % of measuring each), and
    carried over to the other formats by their output errors. What is lost on the way from 2 to 4 bits is corrected per
    group: the KL of all its units in a 4-bit format is measured too.

    Args:
        model: The original; unchanged afterwards.
        sizes: Its size arithmetic.
        calibration: (windows, length) token ids to take statistics on.
        windows: (windows, length) token ids to measure the KL on: blocks and groups on SOME_WINDOWS of
            them, everything at once on all.
        progress: Called with what is done, how much and of how much.

    Returns:
        Nats per token by unit (see `Sizes.units`) and format.
    """
    network = model.network
    some = windows[:SOME_WINDOWS]
    opinion, opinion_on_some = judge(network, windows), judge(network, some)
    blocks, start = list(blocks_of(network)), rehearse(network, some)
    (states,), keywords = start.hidden, [per_batch[0] for per_batch in start.keywords]
    names = {group: sizes.allowed(group) for group in sizes.group_names if sizes.allowed(group) != ["F16"]}
    errors: dict[str, dict[str, float]] = {group: dict.fromkeys(names[group], 0.0) for group in names}
    in_middle: dict[str, dict[nn.Module, Tensor]] = {group: {} for group in names}
    measured: dict[str, dict[str, float]] = {group: {} for group in names}
    for layer in sweep(network, calibration, head=True):
        groups = {group: edges for group, edges in edges_by_group(layer, network).items() if group in names}
        coarse = {group: _stored(layer, model, group, _coarsest(names[group])) for group in groups}
        for group, edges in groups.items():
            in_middle[group] |= _stored(layer, model, group, sizes.middle(group))
            if layer.index in (0, len(blocks) // 2, len(blocks)):
                for name in names[group]:
                    errors[group][name] += _sampled_error(layer, edges, network, name)
        if layer.module is network:
            for group, weights in coarse.items():
                measured[group][group] = _with(weights, network, some, opinion_on_some)
        else:
            rest = (blocks[layer.index :], keywords[layer.index :])
            for group, kl in _shared_out(states, *rest, network, opinion_on_some, coarse).items():
                measured[group][f"{layer.index}.{group}"] = kl
            states = run_block(layer.module, states, keywords[layer.index])
        progress("damage of number formats", layer.index + 1, len(blocks) + 1)
    together = {group: _with(weights, network, some, opinion_on_some) for group, weights in in_middle.items()}
    everything = {linear: weight for weights in in_middle.values() for linear, weight in weights.items()}
    # Damages do not quite add up, and a little text is easier or harder than all of it.
    joint = _with(everything, network, windows, opinion) / max(sum(together.values()), 1e-30)
    damage = {unit: {"F16": 0.0} for unit in sizes.units(sizes.original)}
    for group, units in measured.items():
        alone = {unit: joint * kl for unit, kl in units.items()}
        damage |= _carried_over(
            alone, errors[group], _coarsest(names[group]), sizes.middle(group), joint * together[group]
        )
    if not measured.get("embedding", True):
        damage["embedding"] = _lookup_damage(model, names["embedding"], some, opinion_on_some)
    return damage


def _coarsest(names: list[str]) -> str:
    """Return the smallest format whose weights are chosen one by one; codebooks take several times as long."""
    return min((name for name in names if FORMATS[name].vector == 1), key=lambda name: FORMATS[name].bits)


def _with(weights: dict[nn.Module, Tensor], network: nn.Module, windows: Tensor, opinion: Judge) -> float:
    """Return the KL of a network with other weights."""
    with replaced(weights):
        return divergence_of(network, windows, opinion)


def _shared_out(
    states: Tensor,
    blocks: list[nn.Module],
    keywords: list[dict],
    network: nn.Module,
    opinion: Judge,
    stored: Mapping[str, dict[nn.Module, Tensor]],
) -> dict[str, float]:
    """Return about what each group of the first block costs alone, from the KL of all of them at once.

    Behind the block it hardly matters which matrix an error of its output comes from: the KL per squared error of the
    residual stream, relative to its size, is that of all groups at once.

    Args:
        states: What the first block reads.
        blocks: That block and those behind it.
        keywords: Of each block.
        network: Their network.
        opinion: The original's.
        stored: By group, the first block's weights as they would be stored.
    """
    block, extra = blocks[0], keywords[0]
    before = run_block(block, states, extra)

    def change(hidden: Tensor) -> float:
        relative = (hidden - before).square().sum(-1) / before.square().sum(-1).clamp_min(1e-30)
        return relative.mean().item()

    changes = {}
    for group, weights in stored.items():
        with replaced(weights):
            changes[group] = change(run_block(block, states, extra))
    with replaced({linear: weight for weights in stored.values() for linear, weight in weights.items()}):
        hidden = run_block(block, states, extra)
    whole = change(hidden)
    for later, more in zip(blocks[1:], keywords[1:], strict=True):
        hidden = run_block(later, hidden, more)
    norm = network.get_submodule(anatomy_of(network).final_norm)
    kl = opinion.divergence(norm(hidden).flatten(0, 1), network.lm_head.weight)
    return {group: kl * each / max(whole, 1e-30) for group, each in changes.items()}


def _stored(layer: Layer, model: LanguageModel, group: str, form: str) -> dict[nn.Module, Tensor]:
    """Return the weights of a layer's group as a format would store them, codes by GPTQ."""
    formats = {"*": "F16", group: form}
    chosen = choose_codes(layer, model, formats)
    return {layer.module.get_submodule(edge.path): part.decode().bfloat16() for edge, part in chosen.items()}


def _sampled_error(layer: Layer, edges: list[Edge], network: nn.Module, form: str) -> float:
    """Return the squared error of rounding some edges to a format, columns weighed by their inputs.

    Rows are a sample. GPTQ's output error is smaller by a factor that hardly depends on the format, and takes much
    longer. Correlations between columns are left out because GPTQ takes care of them: plain rounding to powers of two,
    say, shrinks all weights alike, which costs a lot in the output and nothing once the next columns make up for it.
    """
    total = 0.0
    for edge in edges:
        weight = read_weight(layer.module.get_submodule(edge.path))
        gram = gram_of(layer, edge, network)
        importance = gram.diagonal() + ridge(gram)
        sample = weight[:: max(1, len(weight) // SAMPLED_ROWS)].float()
        error = round_to_nearest(sample, FORMATS[form], importance).decode() - sample
        total += (error.square() * importance).sum().item()
    return total


def _carried_over(
    units: dict[str, float], errors: dict[str, float], coarse: str, middle: str, together: float
) -> dict[str, dict[str, float]]:
    """Carry KLs that were measured in the coarsest format over to the others.

    Args:
        units: KL by unit, each alone in the coarsest format.
        errors: Output error by format, of a sample.
        coarse: The coarsest format.
        middle: The format in which all units were measured together.
        together: That KL.
    """
    shares = {name: error / max(errors[coarse], 1e-30) for name, error in errors.items()}
    linear = shares[middle] * sum(units.values())
    correction, reach = 1.0, 1.0
    if linear > 0 and 0 < shares[middle] < 1:
        correction, reach = together / linear, math.log(shares[middle])
    # The correction grows, on a logarithmic scale, from none at the coarsest format to all of it at the middle one.
    factors = {
        name: share * correction ** min(1.0, max(0.0, math.log(max(share, 1e-30)) / reach))
        for name, share in shares.items()
    }
    return {unit: {name: kl * factor for name, factor in factors.items()} for unit, kl in units.items()}


def _lookup_damage(model: LanguageModel, names: list[str], windows: Tensor, opinion: Judge) -> dict[str, float]:
    """Return the KL of an embedding that is only looked up, by format, codes chosen by rounding."""
    module = model.network.get_input_embeddings()
    damage = {}
    for name in names:
        rounded = round_to_nearest(module.weight.detach(), FORMATS[name]).decode()
        damage[name] = _with({module: rounded}, model.network, windows, opinion)
    return damage
