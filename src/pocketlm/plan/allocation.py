"""Which format each tensor gets: the exact least of the expected damages under a byte budget.

A unit is what must share a format (the query and key rows of one block, say) and its options are formats with their
bytes and measured damages. Choosing one option per unit is a multiple-choice knapsack; HiGHS solves it exactly.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.model.gguf_file import padded, tensor_bytes
from pocketlm.plan.footprint import Costs
from pocketlm.plan.sizes import Shape, Sizes
from pocketlm.steps.quantize import format_name, with_fixed
from pocketlm.tensors.formats import FORMATS

# When the search for the best mix ends: within so much of the best, or behind so many nodes. Never after a time: a busy
# machine finds the same mix.
GAP, NODES = 1e-4, 100_000


@dataclass(frozen=True)
class Option:
    """A format for a unit.

    Attributes:
        format: Its name.
        bytes: Of all the unit's tensors in the file.
        damage: Expected KL in nats per token of storing this unit alone in the format.
        memory: Bytes that it takes in the engine.
        seconds: That it takes per generated token.
    """

    format: str
    bytes: int
    damage: float
    memory: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What all units together may take, in what `Option` counts."""

    bytes: int
    memory: float = np.inf
    seconds: float = np.inf


def solve(options: Mapping[str, list[Option]], limits: Limits) -> dict[str, Option]:
    """Return one option per unit: the least total damage within the limits, to a ten-thousandth.

    Args:
        options: By unit.
        limits: Of all units together.

    Raises:
        ImpossibleBudgetError: Nothing fits.
    """
    budget, running = limits.bytes, [kind for kind in ("memory", "seconds") if np.isfinite(getattr(limits, kind))]
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    least = sum(min(option.bytes for option in choices) for choices in options.values())
    if least > budget:
        raise ImpossibleBudgetError(f"The tensors need {least:,} bytes at least, {budget:,} are left for them")
    options = {unit: worthwhile(choices, running) for unit, choices in options.items()}
    flat = [(unit, option) for unit, choices in options.items() for option in choices]
    smallest = {unit: choices[0] for unit, choices in options.items()}
    rows = {unit: row for row, unit in enumerate(options)}
    one_each = csr_matrix(
        (np.ones(len(flat)), ([rows[unit] for unit, _ in flat], range(len(flat)))), (len(rows), len(flat))
    )
    extra = np.array([option.bytes - smallest[unit].bytes for unit, option in flat], dtype=float)
    damages = np.array([option.damage for _, option in flat])
    slack = budget - sum(option.bytes for option in smallest.values())
    others = []
    for kind in running:
        costs, most = np.array([getattr(option, kind) for _, option in flat]), getattr(limits, kind)
        if most <= 0 or sum(min(getattr(option, kind) for option in choices) for choices in options.values()) > most:
            raise ImpossibleBudgetError(f"Even the options that need least {kind} need more than there is")
        others.append(LinearConstraint(costs[None] / most, -np.inf, 1))
    limit = slack
    while limit > 0 or (others and limit == 0):
        with _unspoken():
            found = milp(
                damages / max(damages.max(), 1e-30),
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(extra[None] / max(slack, 1), -np.inf, limit / max(slack, 1)),
                    *others,
                ],
                options={"mip_rel_gap": GAP, "node_limit": NODES},
            )
        if found.x is None:
            break
        taken = found.x > 0.5
        over = int(extra[taken].sum()) - slack
        if over <= 0:
            return {unit: option for (unit, option), chosen in zip(flat, taken, strict=True) if chosen}
        limit -= over  # HiGHS may miss a bound by a millionth of it; the file may not
    if others:
        raise ImpossibleBudgetError("No mix of formats keeps to bytes, memory and time at once")
    return smallest


@contextmanager
def _unspoken() -> Iterator[None]:
    """While open, nothing reaches standard output, not even from native code.

    HiGHS prints a line of its own debugging there, whatever it is told, where a person may have asked for JSON.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def worthwhile(options: list[Option], running: Sequence[str] = ()) -> list[Option]:
    """Return the options that no other one beats in bytes, damage and what else counts, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.damage)):
        if not any(
            other.damage <= option.damage and all(getattr(other, kind) <= getattr(option, kind) for kind in running)
            for other in kept
        ):
            kept.append(option)
    return kept


def unit_options(
    sizes: Sizes,
    shape: Shape,
    damages: Mapping[str, Mapping[str, float]],
    fixed: Mapping[str, str],
    costs: Costs | None = None,
) -> tuple[int, dict[str, list[Option]]]:
    """Return the bytes of everything that is not in a unit, and the options of each unit.

    Args:
        sizes: Of the model.
        shape: Which the model has when it is quantized.
        damages: By unit and format.
        fixed: Formats that a person has fixed, by group or pattern.
        costs: Of formats in the engine; without, memory and time are 0.
    """
    options, shapes = {}, sizes.shapes_at(shape)
    for unit, names in sizes.units(shape).items():
        allowed = {
            form: kl
            for form, kl in damages[unit].items()
            if form == "F16" or all(FORMATS[form].fits(shapes[name][1]) for name in names)
        }
        wanted = {name: format_name(fixed, name, sizes.groups[name]) for name in names}
        if all(wanted.values()):
            only = wanted[names[0]]
            allowed = {only: _damage_of(only, damages[unit])}
        options[unit] = [
            Option(
                form,
                sum(padded(tensor_bytes(wanted[name] or form, shapes[name])) for name in names),
                damage,
                *(costs.of_tensors(sizes, shape, {n: wanted[n] or form for n in names}) if costs else ()),
            )
            for form, damage in allowed.items()
        ]
    everything = {name: options[unit][0].format for unit, names in sizes.units(shape).items() for name in names}
    base = sizes.total(shape, with_fixed(everything, fixed)) - sum(choices[0].bytes for choices in options.values())
    return base, options


def _damage_of(form: str, measured: Mapping[str, float]) -> float:
    """Return the damage of a format that a person fixed.

    What is not offered is not measured: 16 bits cost nothing, binary and ternary formats no less than the coarsest one
    that was measured.
    """
    return measured.get(form, 0.0 if form == "F16" else max(measured.values()))


def by_group(options: Mapping[str, list[Option]]) -> dict[str, list[Option]]:
    """Return the options of whole groups, all of whose units have one format: a small problem for a first look.

    A unit that has no choice stays by itself: it counts whatever format its group takes.
    """
    groups: dict[str, dict[str, Option]] = {}
    for unit, choices in options.items():
        group = groups.setdefault(unit if len(choices) == 1 else unit.rpartition(".")[2], {})
        for option in choices:
            sofar = group.get(option.format, Option(option.format, 0, 0.0))
            group[option.format] = Option(
                option.format,
                sofar.bytes + option.bytes,
                sofar.damage + option.damage,
                sofar.memory + option.memory,
                sofar.seconds + option.seconds,
            )
    return {group: list(formats.values()) for group, formats in groups.items()}


def as_formats(sizes: Sizes, shape: Shape, chosen: Mapping[str, Option]) -> dict[str, str]:
    """Return a choice as a recipe's `formats`: the commonest format of each group, then the tensors that differ."""
    by_name = {name: chosen[unit].format for unit, names in sizes.units(shape).items() for name in names}
    counts: dict[str, Counter[str]] = {}
    for name, form in by_name.items():
        counts.setdefault(sizes.groups[name], Counter())[form] += 1
    common = {group: count.most_common(1)[0][0] for group, count in counts.items()}
    return common | {name: form for name, form in by_name.items() if form != common[sizes.groups[name]]}
