"""From a budget and measured damages to a recipe: the least expected damage that fits."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.plan.budget import Budget, say_bytes
from pocketlm.plan.sizes import MULTIPLE, Shape, Sizes, budget_range, smallest_shape


@dataclass(frozen=True)
class Damages:
    """Measured KL to the original, in nats per token, of everything that a plan may do.

    Attributes:
        depth: (block, KL with it and all before it removed), in the order of removal; may be empty.
        width: By FFN width; the present width is not in it.
        formats: By group and format name.
    """

    depth: tuple[tuple[int, float], ...]
    width: dict[int, float]
    formats: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What to do about a budget.

    Attributes:
        shape: The shape after pruning.
        drop: Blocks that go.
        formats: Format by group.
        bytes: Exact bytes of the file.
        damage: Expected KL in nats per token: rounding, no recovery, damages added up.
    """

    shape: Shape
    drop: tuple[int, ...]
    formats: dict[str, str]
    bytes: int
    damage: float


def check_budget(sizes: Sizes, budget: Budget) -> None:
    """Refuse a budget that no plan meets, with the range that can be met.

    Raises:
        ImpossibleBudgetError: The budget is below the smallest file.
    """
    least, most = budget_range(sizes)
    if budget.bytes < least:
        raise ImpossibleBudgetError(
            f"{budget.text} ({budget.bytes:,} bytes) cannot be met: files of this model go from "
            f"{say_bytes(least)} ({least:,} bytes) to {say_bytes(most)}. "
            f"The smallest change that fits: --size {math.ceil(least / 1e4) / 100:.2f}MB"
        )


def needs_pruning(sizes: Sizes, budget: Budget) -> bool:
    """Whether even the smallest formats leave the unpruned model too big."""
    return sizes.total(sizes.original, {g: sizes.allowed(g)[-1] for g in sizes.group_names}) > budget.bytes


def candidate_shapes(sizes: Sizes, most_dropped: int) -> list[Shape]:
    """Return the shapes a plan may choose from, the original among them."""
    floor = smallest_shape(sizes)
    first = max(floor.blocks, sizes.original.blocks - most_dropped)
    widths = [*range(floor.ffn, sizes.original.ffn, MULTIPLE), sizes.original.ffn]
    return [Shape(n, width) for n in range(first, sizes.original.blocks + 1) for width in widths]


def shape_damage(sizes: Sizes, damages: Damages, shape: Shape) -> float:
    """Return the expected KL of pruning to `shape`: depth as measured, width between measured points.

    The root of the damage is interpolated, since small damages grow with the square of what is removed.
    """
    dropped = sizes.original.blocks - shape.blocks
    depth = damages.depth[dropped - 1][1] if dropped else 0.0
    known = sorted((damages.width | {sizes.original.ffn: 0.0}).items())
    widths, roots = [width for width, _ in known], [math.sqrt(max(kl, 0.0)) for _, kl in known]
    return depth + float(np.interp(shape.ffn, widths, roots)) ** 2


def choose(sizes: Sizes, damages: Damages, budget: Budget) -> Plan:
    """Return the shape and formats with the least expected damage among all that fit the budget.

    Every shape is tried with every mix of formats per group; damages are added up.

    Raises:
        ImpossibleBudgetError: Nothing fits.
    """
    check_budget(sizes, budget)
    best: Plan | None = None
    names = {group: sizes.allowed(group) for group in sizes.group_names}
    mixes = list(itertools.product(*(range(len(names[group])) for group in names)))
    picks = np.array(mixes)
    quantizing = sum(
        np.array([damages.formats[group][name] for name in names[group]])[picks[:, i]] for i, group in enumerate(names)
    )
    narrowest = min(damages.width, default=sizes.original.ffn)  # beyond what was measured nothing is known
    shapes = candidate_shapes(sizes, len(damages.depth))
    for shape in (shape for shape in shapes if shape.ffn >= narrowest):
        base, table = sizes.by_group(shape)
        sizes_of_mixes = base + sum(
            np.array([table[group][name] for name in names[group]])[picks[:, i]] for i, group in enumerate(names)
        )
        pruning = shape_damage(sizes, damages, shape)
        totals = np.where(sizes_of_mixes <= budget.bytes, quantizing + pruning, np.inf)
        at = int(totals.argmin())
        if np.isfinite(totals[at]) and (best is None or totals[at] < best.damage):
            dropped = sizes.original.blocks - shape.blocks
            formats = {group: names[group][mixes[at][i]] for i, group in enumerate(names)}
            drop = tuple(sorted(block for block, _ in damages.depth[:dropped]))
            best = Plan(shape, drop, formats, int(sizes_of_mixes[at]), float(totals[at]))
    if best is None:
        raise ImpossibleBudgetError(
            f"{budget.text} cannot be met with the blocks that were measured. Try a larger --size"
        )
    return best
