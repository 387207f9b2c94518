"""Remove whole decoder blocks, and let those that stay take over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.abreast import abreast
from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.ends import JUDGED, rescale_end
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import drop_blocks
from pocketlm.steps.report import StepReport


@dataclass(frozen=True, kw_only=True)
class PruneDepth:
    """Which blocks go."""

    step: Literal["prune_depth"] = "prune_depth"
    drop: tuple[int, ...]
    """Indices of the blocks to remove, counted in the model as it comes in."""
    repair: bool = False
    """Whether the output matrices of the blocks that stay are re-solved to make up for those that go."""
    windows: int = 32
    """Of calibration text at most, to re-solve them on."""


def prune_depth(
    model: LanguageModel,
    config: PruneDepth,
    windows: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LanguageModel, StepReport]:
    """Remove blocks; the model that comes out has a stock shape with fewer blocks.

    To repair it, every output matrix from the first removed block on is re-solved by least squares, without training,
    so that the residual stream behind it is what it was in the original, behind the removed blocks that follow. Then
    the logits are scaled by one factor, through the last norm, so that the model is as sure as it was.

    Args:
        model: Changed in place and returned.
        config: The blocks, and whether to repair.
        windows: (windows, length) token ids to repair on; not used otherwise.
        progress: Called after each repaired block with its place and how many blocks there are.

    Raises:
        BadInputError: A block does not exist, none would be left, the family's blocks are not alike, or there is no
            text to repair on.
    """
    total = len(blocks_of(model.network))
    dropped = blocks_to_drop(config, total)
    if dropped and not anatomy_of(model.network).uniform_blocks:
        raise BadInputError(
            f"Blocks of `{model.family}` alternate in kind, so none can be dropped. Use prune_width instead"
        )
    repaired = bool(config.repair and dropped)
    if repaired:
        if windows is None or not len(windows):
            raise BadInputError("prune_depth with `repair` needs text to solve on. Give some with --data")
        opinion = judge(model.network, windows[:JUDGED])
        for pair in abreast(model.network, windows, frozenset(dropped)):
            if pair.index + 1 >= dropped[0]:
                for path in pair.writers:
                    pair.resolve_writer(path, pair.moments(path))
            progress(pair.index + 1, total)
    drop_blocks(model.network, set(dropped))
    if repaired:
        rescale_end(model.network, windows[:JUDGED], opinion)
    names = ", ".join(map(str, dropped)) or "none"
    how = ", the others re-solved" if repaired else ""
    summary = f"dropped {len(dropped)} of {total} blocks: {names}{how}"
    return model, StepReport("prune_depth", summary, {"dropped": dropped})


def blocks_to_drop(config: PruneDepth, total: int) -> list[int]:
    """Return the indices of the blocks that go, in order.

    Raises:
        BadInputError: One of `total` blocks does not exist, or none would be left.
    """
    unknown = [index for index in config.drop if not 0 <= index < total]
    if unknown:
        raise BadInputError(f"Cannot drop block {unknown[0]}: the model has blocks 0 to {total - 1}")
    dropped = sorted(set(config.drop))
    if len(dropped) >= total:
        raise BadInputError(f"Cannot drop all {total} blocks. Keep at least one")
    return dropped
