"""From a budget and measured damages to a plan: the least expected damage that fits."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.plan.allocation import Limits, Option, as_formats, by_group, solve, unit_options
from pocketlm.plan.budget import Budget, say_bytes
from pocketlm.plan.footprint import Costs, Footprint
from pocketlm.plan.sizes import MULTIPLE, Shape, Sizes, budget_range, smallest_shape
from pocketlm.steps.quantize import with_fixed


@dataclass(frozen=True)
class Damages:
    """Measured KL to the original, in nats per token, of everything that a plan may do.

    Attributes:
        depth: (block, KL with it and all before it removed), in the order of removal; may be empty.
        width: By FFN width; the present width is not in it.
        formats: By unit (a group of one block, such as `3.ffn_in`) and format name.
        vocabulary: By tokens kept; nats per token of the original's, of the text itself.
    """

    depth: tuple[tuple[int, float], ...] = ()
    width: dict[int, float] = field(default_factory=dict)
    formats: dict[str, dict[str, float]] = field(default_factory=dict)
    vocabulary: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What to do about a budget.

    Attributes:
        shape: The shape after pruning.
        drop: Blocks that go.
        formats: Format by group, and by parameter name where one differs.
        bytes: Exact bytes of the file.
        damage: Expected KL in nats per token: no recovery, damages added up, or the least of `measured`.
        units: Format, bytes and expected KL of each unit.
        footprint: Memory and speed of its layout, measured, where the budget is about them.
        measured: KL of each whole mix that was made and measured, in order.
        vocabulary: Tokens that are kept; all of them where None.
        spelling: What that costs, of the damage.
        narrower: Whether FFNs lose channels.
    """

    shape: Shape
    drop: tuple[int, ...]
    formats: dict[str, str]
    bytes: int
    damage: float
    units: dict[str, tuple[str, int, float]]
    footprint: Footprint | None = None
    vocabulary: int | None = None
    spelling: float = 0.0
    narrower: bool = False
    measured: tuple[float, ...] = ()

    @property
    def prunes(self) -> bool:
        """Whether anything is removed."""
        return bool(self.vocabulary or self.drop or self.narrower)

    def describe(self) -> str:
        """Say what is left after pruning, in words."""
        parts = [f"{self.vocabulary:,} tokens"] if self.vocabulary else []
        if self.drop:
            parts.append(f"{self.shape.blocks} blocks")
        if self.narrower:
            parts.append(f"FFN {self.shape.ffn:,}")
        return ", ".join(parts) or "formats alone"


def check_budget(
    sizes: Sizes,
    budget: Budget,
    prune: bool = True,
    fixed: Mapping[str, str] | None = None,
    trimmed: Sizes | None = None,
) -> None:
    """Refuse a budget that no plan meets, with the range that can be met; arguments as of `budget_range`.

    Args:
        sizes: Of the model.
        budget: What is asked for.
        prune: Whether parts may be removed.
        fixed: Formats that are not up for choice.
        trimmed: Sizes with as few tokens as a plan may keep, where it may keep fewer.

    Raises:
        ImpossibleBudgetError: The budget is below the smallest file.
    """
    least, most = budget_range(sizes, prune, fixed)
    if trimmed is not None:
        least = min(least, budget_range(trimmed, prune, fixed)[0])
    if budget.bytes < least:
        raise ImpossibleBudgetError(
            f"{budget.text} ({budget.bytes:,} bytes) cannot be met: files of this model go from "
            f"{say_bytes(least)} ({least:,} bytes) to {say_bytes(most)}. "
            f"The smallest change that fits: --size {math.ceil(least / 1e4) / 100:.2f}MB"
        )


def check_running(sizes: Sizes, budget: Budget, costs: Costs, prune: bool = True) -> None:
    """Refuse memory or speed that no plan meets, with the range that can be met.

    Raises:
        ImpossibleBudgetError: The budget cannot be met.
    """
    memory, seconds = costs.least(sizes, smallest_shape(sizes) if prune else sizes.original)
    if budget.memory and memory > budget.memory:
        raise ImpossibleBudgetError(
            f"{say_bytes(budget.memory)} of memory cannot be met: with {costs.context:,} tokens of context this model "
            f"needs {say_bytes(memory)} at least, of which {say_bytes(costs.base)} are no weights. The smallest change "
            f"that fits: --ram {math.ceil(memory / 1e6)}MB, or a smaller --context"
        )
    if budget.speed and budget.speed > 1 / seconds:
        second = 10 ** (math.floor(math.log10(1 / seconds)) - 1)  # of two digits
        most = math.floor(1 / seconds / second) * second
        raise ImpossibleBudgetError(
            f"{budget.speed:g} tokens/s cannot be met: on this machine this model reaches about {most:g} at most "
            "(measured once: if other work ran then, `pocketlm clean --yes` has it measured anew). "
            f"The smallest change that fits: --speed {most:g}"
        )


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


def choose(
    sizes: Sizes,
    damages: Damages,
    budget: Budget,
    fixed: Mapping[str, str] | None = None,
    costs: Costs | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Plan:
    """Return the shape and formats with the least expected damage among all that fit the budget.

    Every shape is tried with its best mix of formats per group; then the best shape's mix is solved tensor by tensor.
    Where groups of one format each do not fit, as may be under several limits at once, the smallest shape and the
    largest are tried tensor by tensor. Damages are added up.

    Args:
        sizes: Of the model.
        damages: What was measured; shapes need damages of depth or width.
        budget: Bytes of the file.
        fixed: Formats by group or pattern that a person has fixed.
        costs: Of formats in the engine, where the budget is about memory or speed.
        shapes: To choose from; `candidate_shapes` where None.

    Raises:
        ImpossibleBudgetError: Nothing fits.
    """
    shapes = candidate_shapes(sizes, len(damages.depth)) if shapes is None else shapes
    fixed = dict(fixed or {})
    narrowest = min(damages.width, default=sizes.original.ffn)  # beyond what was measured nothing is known
    known = [shape for shape in shapes if shape.ffn >= narrowest]

    def fitting(shapes: Sequence[Shape], grouped: bool) -> dict[Shape, float]:
        """Return the least expected damage of each shape that fits the budget."""
        found = {}
        for shape in shapes:
            base, options = _options(sizes, damages, shape, fixed, costs)
            with suppress(ImpossibleBudgetError):
                mix = solve(by_group(options) if grouped else options, _limits(budget, base, costs))
                found[shape] = shape_damage(sizes, damages, shape) + sum(option.damage for option in mix.values())
        return found

    expected = fitting(known, True) or fitting([*known[:1], *known[1:][-1:]], False)
    if not expected:
        raise ImpossibleBudgetError(
            f"{budget.text} cannot be met with what was measured and fixed. Try a larger budget, or fix fewer tensors"
        )
    shape = min(expected, key=expected.__getitem__)
    base, options = _options(sizes, damages, shape, fixed, costs)
    chosen = solve(options, _limits(budget, base, costs))
    return Plan(
        shape=shape,
        drop=_dropped(sizes, damages, shape),
        formats=with_fixed(as_formats(sizes, shape, chosen), fixed),
        bytes=base + sum(option.bytes for option in chosen.values()),
        damage=shape_damage(sizes, damages, shape) + sum(option.damage for option in chosen.values()),
        units={unit: (option.format, option.bytes, option.damage) for unit, option in chosen.items()},
        narrower=shape.ffn != sizes.original.ffn,
    )


def _limits(budget: Budget, base: int, costs: Costs | None) -> Limits:
    memory, seconds = math.inf, math.inf
    if costs and budget.memory:
        memory = budget.memory - costs.base
    if costs and budget.speed:
        seconds = 1 / budget.speed
    return Limits(budget.bytes - base, memory, seconds)


def _dropped(sizes: Sizes, damages: Damages, shape: Shape) -> tuple[int, ...]:
    count = sizes.original.blocks - shape.blocks
    return tuple(sorted(block for block, _ in damages.depth[:count]))


def _options(
    sizes: Sizes, damages: Damages, shape: Shape, fixed: Mapping[str, str], costs: Costs | None
) -> tuple[int, dict[str, list[Option]]]:
    """Return `unit_options` at a shape, whose blocks are the kept ones of the original in order."""
    dropped = _dropped(sizes, damages, shape)
    kept = iter(index for index in range(sizes.original.blocks) if index not in dropped)
    renumbered = {str(old): str(new) for new, old in enumerate(kept)}
    formats = {}
    for unit, by_format in damages.formats.items():
        block, dot, group = unit.rpartition(".")
        if not dot or block in renumbered:
            formats[f"{renumbered[block]}.{group}" if dot else unit] = by_format
    return unit_options(sizes, shape, formats, fixed, costs)
