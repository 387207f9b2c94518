"""Store every matrix in a number format, block by block, each block seeing the errors of the ones before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import Edge, anatomy_of, blocks_of, read_weight
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import HEAD, Layer, sweep
from pocketlm.steps.report import StepReport
from pocketlm.tensors.elimination import gptq, output_errors, ridge
from pocketlm.tensors.formats import FORMATS, Format, Packed, Quantized, pack, round_to_nearest

# The tied embedding is also read row by row, where every column counts alike: so much of the mean diagonal of the
# head's Gram matrix is added to its diagonal.
LOOKUP_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Which format each group of tensors gets, and how codes are chosen."""

    step: Literal["quantize"] = "quantize"
    formats: dict[str, str]
    """Format name per group: embedding, head, query_key, value, attention_out, ffn_in, ffn_out."""
    method: Literal["gptq", "rtn"] = "gptq"
    """GPTQ, or round-to-nearest with a scale search."""


Choose = Callable[[Tensor, Tensor, Format], Quantized]


def _rtn(weight: Tensor, gram: Tensor, form: Format) -> Quantized:
    return round_to_nearest(weight, form, gram.diagonal() + ridge(gram))


METHODS: dict[str, Choose] = {"gptq": gptq, "rtn": _rtn}


def quantize(
    model: LanguageModel,
    config: Quantize,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LanguageModel, dict[str, Packed], StepReport]:
    """Quantize the matrices of every block, the head and the embedding.

    Tied embeddings stay tied: the one matrix is quantized for the head, which reads all of it at every token.

    Args:
        model: Its weights become the decoded ones, in place.
        config: Formats and method.
        windows: (windows, length) token ids to take statistics on.
        progress: Called after each block and the head with how many are done and how many there are.

    Returns:
        The model, the bytes of every quantized tensor by parameter name, and the report.

    Raises:
        BadInputError: A format is unknown or does not fit a tensor's row length.
    """
    _check_formats(model, config.formats)
    method = METHODS[config.method]
    tied = model.network.config.tie_word_embeddings
    packed: dict[str, Packed] = {}
    errors: dict[str, list[float]] = {}
    total = model.network.config.num_hidden_layers
    for layer in sweep(model.network, windows, head=True):
        for (reads, form), edges in _by_input_and_format(layer, config.formats, tied).items():
            # Linears that read the same space share its statistics, so their rows are quantized as one matrix.
            linears = [layer.module.get_submodule(edge.path) for edge in edges]
            weight = torch.cat([read_weight(linear) for linear in linears])
            gram = layer.gram[reads]
            if edges[0] is HEAD and tied:
                gram = gram + LOOKUP_WEIGHT * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
            chosen = method(weight, gram, form)
            start = 0
            for edge, linear in zip(edges, linears, strict=True):
                rows = slice(start, start := start + len(read_weight(linear)))
                part = Quantized(form, chosen.codes[rows], chosen.scales[rows])
                group = _group(edge, tied)
                errors.setdefault(group, []).append(_relative_error(weight[rows], part.decode(), gram))
                name = embedding_name(model) if group == "embedding" else layer.parameter_name(edge)
                packed[name] = pack(part)
                _overwrite(linear, part.decode())
        progress(layer.index + 1, total + 1)
    if not tied:
        _quantize_lookup(model, config, packed, errors)
    means = {group: sum(values) / len(values) for group, values in errors.items()}
    kinds = ", ".join(f"{group} {config.formats[group]}" for group in errors)
    return model, packed, StepReport("quantize", f"{config.method} into {kinds}", {"output_error": means})


def _check_formats(model: LanguageModel, formats: dict[str, str]) -> None:
    """Refuse a recipe before the work, not when the sweep comes to the tensor that it does not fit."""
    network = model.network
    block = blocks_of(network)[0]
    for edge in anatomy_of(network).edges:
        format_for(formats, edge.group, read_weight(block.get_submodule(edge.path)).shape[1])
    for group in ("embedding",) if network.config.tie_word_embeddings else ("embedding", "head"):
        format_for(formats, group, network.config.hidden_size)


def _group(edge: Edge, tied: bool) -> str:
    return "embedding" if edge is HEAD and tied else edge.group


def _by_input_and_format(layer: Layer, formats: dict[str, str], tied: bool) -> dict[tuple[str, Format], list[Edge]]:
    """Return the edges of a layer that are quantized, those with the same input and format together."""
    together: dict[tuple[str, Format], list[Edge]] = {}
    for edge, linear in layer.linears():
        form = format_for(formats, _group(edge, tied), read_weight(linear).shape[1])
        if form is not None:
            together.setdefault((edge.reads, form), []).append(edge)
    return together


def format_for(formats: dict[str, str], group: str, columns: int) -> Format | None:
    """Return the format of a group, None where it stays 16-bit.

    Raises:
        BadInputError: The recipe does not name the group, the format is unknown, or it does not fit.
    """
    name = formats.get(group)
    if name is None:
        raise BadInputError(f"The recipe gives no format for `{group}`. Add it under `formats` ({', '.join(FORMATS)})")
    if name == "F16":
        return None
    if name not in FORMATS:
        raise BadInputError(f"Unknown format `{name}` for `{group}`. Known: F16, {', '.join(FORMATS)}")
    if not FORMATS[name].fits(columns):
        raise BadInputError(
            f"{name} needs rows that divide by {FORMATS[name].block}; those of `{group}` have {columns} weights. "
            "Use F16 for this group"
        )
    return FORMATS[name]


def embedding_name(model: LanguageModel) -> str:
    """Return the parameter name of the token embedding."""
    embedding = model.network.get_input_embeddings().weight
    return next(name for name, value in model.network.named_parameters() if value is embedding)


def _quantize_lookup(
    model: LanguageModel, config: Quantize, packed: dict[str, Packed], errors: dict[str, list[float]]
) -> None:
    """Quantize an embedding that is only looked up: no inputs, so no statistics, so rounding."""
    module = model.network.get_input_embeddings()
    form = format_for(config.formats, "embedding", module.weight.shape[1])
    if form is None:
        return
    chosen = round_to_nearest(module.weight.detach(), form)
    identity = torch.eye(module.weight.shape[1], device=module.weight.device)
    errors["embedding"] = [_relative_error(module.weight.detach(), chosen.decode(), identity)]
    packed[embedding_name(model)] = pack(chosen)
    _overwrite(module, chosen.decode())


@torch.no_grad()
def _overwrite(module: torch.nn.Module, weight: Tensor) -> None:
    # In place, so that a tied embedding and head stay one tensor.
    target = module.weight.data
    target.copy_(weight.T if type(module).__name__ == "Conv1D" else weight)


def _relative_error(weight: Tensor, decoded: Tensor, gram: Tensor) -> float:
    whole = ((weight.float() @ gram) * weight.float()).sum()
    return (output_errors(weight, decoded, gram).sum() / whole.clamp_min(1e-30)).item()
