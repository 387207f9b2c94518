"""Store every matrix in a number format, block by block, each block seeing the errors of the ones before."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import Edge, linears_of, overwrite_weight, read_weight
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import HEAD, Importance, Layer, sweep
from pocketlm.steps.learned_rounding import learn_rounding
from pocketlm.steps.report import StepReport
from pocketlm.tensors.elimination import DESCENTS, gptq, relative_error, ridge
from pocketlm.tensors.formats import FORMATS, Format, Packed, Quantized, find_format, is_known, pack, round_to_nearest

# The tied embedding is also read row by row, where every column counts alike: so much of the mean diagonal of the
# head's Gram matrix is added to its diagonal.
LOOKUP_WEIGHT = 0.1
# Of the mean diagonal of a Gram matrix. GPTQ's usual 0.01 fits the calibration text too closely: 0.1 has up to 6 %
# less output error on other text with 32 windows; with 64, 1 to 3 % less at 2 bits, 1 % more at 4
# (benchmarks/calibration.py).
DAMPING = 0.1
ERROR_ROWS = 256  # of a matrix, on which its output error is measured


Method = Literal["descent", "gptaq", "gptq", "rtn"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Which format each group of tensors gets, and how codes are chosen."""

    step: Literal["quantize"] = "quantize"
    formats: dict[str, str]
    """Format name per group (embedding, head, query_key, value, attention_out, ffn_in, ffn_out) or per pattern of
    parameter names (`model.layers.0.*`); of several that match a tensor the last one counts."""
    method: Method = "descent"
    """`gptaq`: GPTQ that aims at what the original model computes, so that later blocks make up for earlier ones (3 to
    12 % less KL on the reference model's mixes of 75 MB and 62 MB); `descent` goes over its codes again, column by
    column, with scales re-solved in between, and lets tokens count by what they matter to the model's output; `gptq` is
    a forward pass cheaper; `rtn` is rounding, scales searched."""
    learned_rounding: int = 0
    """Iterations of learned rounding per block, from those codes on."""
    keep_zeros: bool = False
    """Weights of the blocks that are zero stay zero, as `sparsify` left them; not every format can hold them."""
    windows: int = 64
    """Of calibration text, for the statistics. Twice as many as 32 take away 10 to 16 % of the output error on other
    text, four times as many hardly more (SmolLM2-135M, benchmarks/calibration.py)."""
    seed: int = 0

    @property
    def rounds_nothing(self) -> bool:
        """Whether every matrix stays in 16 bits."""
        return all(form == "F16" for form in self.formats.values())


def _codes(
    method: str, weight: Tensor, gram: Tensor, form: Format, drift: Tensor | None, mask: Tensor | None
) -> Quantized:
    if method == "rtn":  # the nearest level to zero is zero where the format has it: a mask changes nothing
        return round_to_nearest(weight, form, gram.diagonal() + ridge(gram))
    descents = DESCENTS if method == "descent" else 0
    return gptq(weight, gram, form, DAMPING, drift, mask, descents)


def quantize(
    model: LanguageModel,
    config: Quantize,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    importance: Importance | None = None,
) -> tuple[LanguageModel, dict[str, Packed], StepReport]:
    """Quantize the matrices of every block, the head and the embedding.

    Tied embeddings stay tied: the one matrix is quantized for the head, which reads all of it at every token.

    Args:
        model: Its weights become the decoded ones, in place.
        config: Formats and method.
        windows: (windows, length) token ids to take statistics on.
        progress: Called after each block and the head with how many are done and how many there are.
        importance: How much each token of the windows counts; all alike where None.

    Returns:
        The model, the bytes of every quantized tensor by parameter name, and the report.

    Raises:
        BadInputError: A format is unknown or does not fit a tensor's row length.
    """
    check_formats(tensors_of(model), config.formats)
    if config.rounds_nothing:
        return model, {}, StepReport("quantize", "every matrix stays in 16 bits", {})
    if config.keep_zeros:
        check_zeros(tensors_of(model), config)
    tied = model.network.config.tie_word_embeddings
    packed: dict[str, Packed] = {}
    errors: dict[str, list[float]] = {}
    total = model.network.config.num_hidden_layers
    aims = config.method in ("descent", "gptaq")
    for layer in sweep(model.network, windows, head=True, original=aims, importance=importance):
        before = {edge: read_weight(linear) for edge, linear in layer.linears()}
        chosen = choose_codes(layer, model, config.formats, config.method, config.keep_zeros)
        if config.learned_rounding and layer.states and chosen:
            before = {edge: weight.clone() for edge, weight in before.items()}  # learning overwrites them
            linears = {layer.module.get_submodule(edge.path): part for edge, part in chosen.items()}
            # What the last linear puts out joins the stream: its tokens count as those of the block's output do.
            counting = None if importance is None else importance[layer.index, layer.edges[-1].reads]
            learned = learn_rounding(layer, linears, config.learned_rounding, config.seed, counting)
            chosen = {edge: learned[layer.module.get_submodule(edge.path)] for edge in chosen}
        for edge, part in chosen.items():
            decoded = part.decode()
            error = _relative_error(before[edge], decoded, gram_of(layer, edge, model.network))
            errors.setdefault(_group(edge, tied), []).append(error)
            packed[_name(layer, edge, model)] = pack(part)
            overwrite_weight(layer.module.get_submodule(edge.path), decoded)
        progress(layer.index + 1, total + 1)
    if not tied:
        _quantize_lookup(model, config, packed, errors)
    means = {group: sum(values) / len(values) for group, values in errors.items()}
    kinds = ", ".join(f"{form} ({count})" for form, count in Counter(p.format.name for p in packed.values()).items())
    return model, packed, StepReport("quantize", f"{config.method} into {kinds}", {"output_error": means})


def choose_codes(
    layer: Layer, model: LanguageModel, formats: Mapping[str, str], method: str = "gptq", keep_zeros: bool = False
) -> dict[Edge, Quantized]:
    """Choose the codes of a layer's linears, those that stay 16-bit left out; nothing is changed.

    Those that read the same space share its statistics, so their rows are quantized as one matrix. With `keep_zeros`
    the weights of a block that are zero stay zero.
    """
    chosen = {}
    for (_, form), edges in _by_input_and_format(layer, model, formats).items():
        weights = [read_weight(layer.module.get_submodule(edge.path)) for edge in edges]
        together = torch.cat(weights) if len(weights) > 1 else weights[0]
        gram, drift = gram_of(layer, edges[0], model.network), layer.drift.get(edges[0].reads)
        mask = together != 0 if keep_zeros and edges[0] is not HEAD else None
        whole = _codes(method, together, gram, form, drift, mask)
        start = 0
        for edge, weight in zip(edges, weights, strict=True):
            chosen[edge] = whole.rows(slice(start, start := start + len(weight)))
    return chosen


def gram_of(layer: Layer, edge: Edge, network: torch.nn.Module) -> Tensor:
    """Return the second moments that an edge's columns are weighed with."""
    gram = layer.gram[edge.reads]
    if edge is HEAD and network.config.tie_word_embeddings:
        return gram + LOOKUP_WEIGHT * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    return gram


def edges_by_group(layer: Layer, network: torch.nn.Module) -> dict[str, list[Edge]]:
    """Return the edges of a layer by the group that they belong to."""
    groups: dict[str, list[Edge]] = {}
    for edge in layer.edges:
        groups.setdefault(_group(edge, network.config.tie_word_embeddings), []).append(edge)
    return groups


def tensors_of(model: LanguageModel) -> dict[str, tuple[str, int]]:
    """Return the group and the row length of every matrix that can be quantized, by parameter name."""
    network = model.network
    tied = network.config.tie_word_embeddings
    found = {embedding_name(model): ("embedding", network.config.hidden_size)}
    for name, (edge, linear) in linears_of(network).items():
        found[name] = (edge.group, read_weight(linear).shape[1])
    return found if tied else found | {f"{HEAD.path}.weight": (HEAD.group, network.config.hidden_size)}


def check_formats(tensors: Mapping[str, tuple[str, int]], formats: Mapping[str, str], whole: bool = True) -> None:
    """Refuse formats before the work, not when the sweep comes to the tensor that they do not fit.

    Args:
        tensors: Group and row length by parameter name.
        formats: As in `Quantize`.
        whole: Whether every tensor needs one.

    Raises:
        BadInputError: A tensor needs a format and has none, or has one that is unknown or does not fit, or a key
            matches nothing.
    """
    for name, (group, columns) in tensors.items():
        form = format_name(formats, name, group)
        if form is None and not whole:
            continue
        if form is None:
            raise BadInputError(
                f"The recipe gives no format for `{group}`. Add it under `formats` ({', '.join(FORMATS)})"
            )
        if form != "F16" and not is_known(form):
            raise BadInputError(
                f"Unknown format `{form}` for `{group}`. Known: F16, {', '.join(FORMATS)}, "
                "and for compressed-tensors names such as int4-g32, int8-row, fp8-row"
            )
        if form != "F16" and not find_format(form, columns).fits(columns):
            block = find_format(form, columns).block
            fitting = ", ".join(["F16", *(other for other in FORMATS if FORMATS[other].fits(columns))])
            raise BadInputError(
                f"{form} needs rows that divide by {block}; those of {name} have {columns} weights. "
                f"Formats that fit: {fitting}"
            )
    for key in formats:
        if not any(key == group or fnmatchcase(name, key) for name, (group, _) in tensors.items()):
            raise BadInputError(
                f"`{key}` is neither a group nor does any tensor's name match it. "
                f"Groups: {', '.join(dict.fromkeys(group for group, _ in tensors.values()))}"
            )


def check_zeros(tensors: Mapping[str, tuple[str, int]], config: Quantize) -> None:
    """Refuse, before the work, what cannot keep zeros.

    Raises:
        BadInputError: A matrix of a block has a format without an exact zero, or codes would be learned.
    """
    if config.learned_rounding:
        raise BadInputError("Learned rounding does not keep zeros. Leave out `learned_rounding` or `keep_zeros`")
    for name, (group, columns) in tensors.items():
        form = format_name(config.formats, name, group)
        if group in ("embedding", "head") or form == "F16" or find_format(form, columns).has_zero:
            continue
        fitting = ", ".join(other for other, each in FORMATS.items() if each.fits(columns) and each.has_zero)
        raise BadInputError(
            f"{form} has no exact zero: those of {name} would be lost. Formats that keep them: F16, {fitting}"
        )


def format_name(formats: Mapping[str, str], name: str, group: str) -> str | None:
    """Return the format of a tensor, None where nothing matches it."""
    matching = [form for key, form in formats.items() if key == group or fnmatchcase(name, key)]
    return matching[-1] if matching else None


def with_fixed(formats: Mapping[str, str], fixed: Mapping[str, str]) -> dict[str, str]:
    """Return formats of which those that a person fixed count last, in the person's order."""
    return {key: form for key, form in formats.items() if key not in fixed} | dict(fixed)


def _group(edge: Edge, tied: bool) -> str:
    return "embedding" if edge is HEAD and tied else edge.group


def _name(layer: Layer, edge: Edge, model: LanguageModel) -> str:
    tied = model.network.config.tie_word_embeddings
    return embedding_name(model) if edge is HEAD and tied else layer.parameter_name(edge)


def _by_input_and_format(
    layer: Layer, model: LanguageModel, formats: Mapping[str, str]
) -> dict[tuple[str, Format], list[Edge]]:
    """Return the edges of a layer that are quantized, those with the same input and format together."""
    tied = model.network.config.tie_word_embeddings
    together: dict[tuple[str, Format], list[Edge]] = {}
    for edge in layer.edges:
        form = format_name(formats, _name(layer, edge, model), _group(edge, tied))
        if form != "F16":
            columns = read_weight(layer.module.get_submodule(edge.path)).shape[1]
            together.setdefault((edge.reads, find_format(form, columns)), []).append(edge)
    return together


def embedding_name(model: LanguageModel) -> str:
    """Return the parameter name of the token embedding."""
    embedding = model.network.get_input_embeddings().weight
    return next(name for name, value in model.network.named_parameters() if value is embedding)


def _quantize_lookup(
    model: LanguageModel, config: Quantize, packed: dict[str, Packed], errors: dict[str, list[float]]
) -> None:
    """Quantize an embedding that is only looked up: no inputs, so no statistics, so rounding."""
    module = model.network.get_input_embeddings()
    form = format_name(config.formats, embedding_name(model), "embedding")
    if form == "F16":
        return
    chosen = round_to_nearest(module.weight.detach(), find_format(form, module.weight.shape[1]))
    decoded = chosen.decode()
    identity = torch.eye(module.weight.shape[1], device=module.weight.device)
    errors["embedding"] = [_relative_error(module.weight.detach(), decoded, identity)]
    packed[embedding_name(model)] = pack(chosen)
    overwrite_weight(module, decoded)


def _relative_error(weight: Tensor, decoded: Tensor, gram: Tensor) -> float:
    """Return the share of the output that is error, from a sample of the rows."""
    rows = slice(None, None, max(1, len(weight) // ERROR_ROWS))
    return relative_error(weight[rows].float(), decoded[rows], gram)
