"""Cut single connections: weights become zero, and in the best case the others take over."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import Edge, linears_of, overwrite_weight, read_weight
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import Layer, sweep
from pocketlm.steps.report import StepReport
from pocketlm.tensors.elimination import relative_error
from pocketlm.tensors.sparsity import METHODS, Sparsity, outlier_share, owl, sparsity_of

ALLOCATIONS = ("uniform", "owl")
NOTE = "a GGUF file stores zeros like any other number, so it gets no smaller"


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """How many connections of the blocks go, and how they are chosen. Embedding and head are left alone."""

    step: Literal["sparsify"] = "sparsify"
    sparsity: float | None = None
    """Share of the weights that become zero, between 0 and 1; it follows from a pattern where there is one."""
    pattern: str | None = None
    """`n:m`: of every m neighbours in a row n stay, such as 2:4; without one, zeros lie anywhere."""
    method: Literal["magnitude", "wanda", "wanda_absorbed", "sparsegpt"] = "sparsegpt"
    """`wanda_absorbed` is Wanda's choice with SparseGPT's updates: on a par at half zeros, worse in patterns."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """Every block alike, or fewer zeros where a block has more outliers (OWL)."""


def sparsify(
    model: LanguageModel,
    config: Sparsify,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LanguageModel, StepReport]:
    """Set connections to zero, block by block, each block measured as the blocks before it, already cut, feed it.

    Args:
        model: Changed in place and returned.
        config: How many and how.
        windows: (windows, length) token ids to measure on.
        progress: Called after each block with how many are done and how many there are.

    Raises:
        BadInputError: The sparsity is not in (0, 1), the pattern is none or does not divide the rows of a matrix, the
            method or the allocation is unknown, or an allocation is asked for beside a pattern.
    """
    sparsity = check_sparsity(model, config)
    blocks = model.network.config.num_hidden_layers
    shares = [sparsity.share] * blocks
    if config.allocation == "owl":
        shares = owl([_outliers(layer) for layer in sweep(model.network, windows)], sparsity.share)
    zeros, errors = [], []
    for layer in sweep(model.network, windows):
        before = {edge: read_weight(linear).float().clone() for edge, linear in layer.linears()}
        cut_block(layer, replace(sparsity, share=shares[layer.index]), config.method)
        after = {edge: read_weight(linear) for edge, linear in layer.linears()}
        zeros.append(share_of_zeros(after.values()))
        errors.append(_mean_error(layer, before, after))
        progress(layer.index + 1, blocks)
    share = share_of_zeros(read_weight(linear) for _, linear in linears_of(model.network).values())
    where = f"in the pattern {config.pattern}" if config.pattern else "anywhere"
    details = {"share_of_zeros": share, "sparsity": zeros, "output_error": errors, "note": NOTE}
    return model, StepReport(
        "sparsify", f"cut {share:.1%} of the blocks' connections, {where}, by {config.method}; {NOTE}", details
    )


def cut_block(layer: Layer, sparsity: Sparsity, method: str) -> None:
    """Cut the connections of one stop of a sweep, in place; matrices that read the same space share its statistics."""
    readers: dict[str, list[nn.Module]] = {}
    for edge, linear in layer.linears():
        readers.setdefault(edge.reads, []).append(linear)
    for space, linears in readers.items():
        cut = METHODS[method]([read_weight(linear).float() for linear in linears], layer.gram[space], sparsity)
        for linear, weight in zip(linears, cut, strict=True):
            overwrite_weight(linear, weight)


def share_of_zeros(weights: Iterable[Tensor]) -> float:
    """Return how many of all weights are zero, as a share."""
    counts = [(weight.numel(), int((weight == 0).sum())) for weight in weights]
    return sum(zeros for _, zeros in counts) / sum(total for total, _ in counts)


def check_sparsity(model: LanguageModel, config: Sparsify) -> Sparsity:
    """Return what the settings ask for.

    Raises:
        BadInputError: They make no sense, or not for this model.
    """
    if config.method not in METHODS:
        raise BadInputError(f"Unknown method `{config.method}` to cut connections. Known: {', '.join(METHODS)}")
    if config.allocation not in ALLOCATIONS:
        raise BadInputError(f"Unknown allocation `{config.allocation}`. Known: {', '.join(ALLOCATIONS)}")
    sparsity = sparsity_of(config.sparsity, config.pattern)
    if sparsity.group and config.allocation != "uniform":
        raise BadInputError(
            f"The pattern {config.pattern} gives every block the same sparsity. "
            "Leave out either the pattern or the allocation"
        )
    for name, (_, linear) in linears_of(model.network).items():
        columns = read_weight(linear).shape[1]
        if sparsity.group and columns % sparsity.group:
            raise BadInputError(
                f"The pattern {config.pattern} needs rows that divide by {sparsity.group}; those of {name} have "
                f"{columns} weights. Give a pattern whose second number divides {columns}"
            )
    return sparsity


def _outliers(layer: Layer) -> float:
    return outlier_share(
        [
            read_weight(linear).float().abs() * layer.gram[edge.reads].diagonal().sqrt()
            for edge, linear in layer.linears()
        ]
    )


def _mean_error(layer: Layer, before: dict[Edge, Tensor], after: dict[Edge, Tensor]) -> float:
    """Return the share of the output that is error, the mean over a block's matrices."""
    shares = [relative_error(weight, after[edge], layer.gram[edge.reads]) for edge, weight in before.items()]
    return sum(shares) / len(shares)
