"""Remove whole decoder blocks."""

from dataclasses import dataclass
from typing import Literal

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import drop_blocks
from pocketlm.steps.report import StepReport


@dataclass(frozen=True, kw_only=True)
class PruneDepth:
    """Which blocks go."""

    step: Literal["prune_depth"] = "prune_depth"
    drop: tuple[int, ...]
    """Indices of the blocks to remove, counted in the model as it comes in."""


def prune_depth(model: LanguageModel, config: PruneDepth) -> tuple[LanguageModel, StepReport]:
    """Remove blocks; the model that comes out has a stock shape with fewer blocks.

    Raises:
        BadInputError: A block does not exist, none would be left, or the family's blocks are not alike.
    """
    total = len(blocks_of(model.network))
    unknown = [index for index in config.drop if not 0 <= index < total]
    if unknown:
        raise BadInputError(f"Cannot drop block {unknown[0]}: the model has blocks 0 to {total - 1}")
    if len(set(config.drop)) >= total:
        raise BadInputError(f"Cannot drop all {total} blocks. Keep at least one")
    if config.drop and not anatomy_of(model.network).uniform_blocks:
        raise BadInputError(
            f"Blocks of `{model.family}` alternate in kind, so none can be dropped. Use prune_width instead"
        )
    drop_blocks(model.network, set(config.drop))
    dropped = sorted(set(config.drop))
    names = ", ".join(map(str, dropped)) or "none"
    return model, StepReport("prune_depth", f"dropped {len(dropped)} of {total} blocks: {names}", {"dropped": dropped})
