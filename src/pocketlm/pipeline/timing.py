"""How long a run takes here: said before it starts, or held against a person's time."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.measure.task_files import Task
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.accuracy import QUALITIES
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.local_search import FLOOR_MIXES, most_mixes
from pocketlm.pipeline.plan_stages import damages_known
from pocketlm.pipeline.proof import original_file
from pocketlm.pipeline.scoring import outcomes
from pocketlm.pipeline.stages import Progress, Texts
from pocketlm.plan.budget import say_time
from pocketlm.plan.decide import Wanted, may_prune, most_candidates
from pocketlm.plan.effort import Effort, codes_seconds, expected_seconds
from pocketlm.plan.pace import Pace, pace_of
from pocketlm.plan.sizes import sizes_of

TIMED_ITEMS = 4  # of each task, behind the first


@dataclass(frozen=True)
class Limit:
    """A person's time.

    Attributes:
        seconds: As they gave them.
        began: When they began, by the monotonic clock.
        kept: Of them, for scoring tasks at the end.
    """

    seconds: float
    began: float
    kept: float = 0.0

    @property
    def key(self) -> tuple[float, float]:
        """What decides what is done in it, besides how long that takes."""
        return self.seconds, self.kept

    def left(self) -> float:
        """Return the seconds that are left for all else."""
        return self.began + self.seconds - self.kept - time.monotonic()


def scoring_seconds(model: LanguageModel, tasks: Sequence[Task], progress: Progress) -> float:
    """Return about how long it takes to score the original and what becomes of it on tasks, from a few items."""

    def produce(_: Path) -> float:
        total = 0.0
        for done, task in enumerate(tasks, 1):
            total += 2 * len(task.items) * _item_seconds(model, task)
            progress("timing a few items of the tasks", done, len(tasks))
        return total

    inputs = {"model": model.origin.key, "tasks": [asdict(task) for task in tasks]}
    return stage("scoring", inputs, produce).facts if tasks else 0.0


def _item_seconds(model: LanguageModel, task: Task) -> float:
    every, ends = max(1, len(task.items) // (1 + TIMED_ITEMS)), []
    few = replace(task, items=task.items[::every][: 1 + TIMED_ITEMS])
    outcomes(original_file(model), model, [few], lambda *_: ends.append(time.monotonic()))
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1)


def seconds_expected(model: LanguageModel, wanted: Wanted, texts: Texts, scoring: float, floor_on_task: bool) -> float:
    """Return about how long a whole run takes, at most where mixes or models are made until one keeps a floor.

    Args:
        model: The original.
        wanted: What the person asks for.
        texts: Of the run.
        scoring: Seconds that scoring tasks takes.
        floor_on_task: Whether models are built in search of a floor of quality that keeps one of accuracy.
    """
    pace, effort = pace_of(model, texts.calibration), wanted.effort
    mixes = FLOOR_MIXES if floor_on_task else most_mixes(wanted)
    effort, besides = replace(effort, candidates=most_candidates(wanted), mixes=mixes), scoring + wanted.tune_seconds
    if wanted.heal_seconds is not None:  # learning takes what was asked for
        effort, besides = replace(effort, tokens=0), besides + wanted.heal_seconds * wanted.prune
    if floor_on_task:
        models = 1 + math.ceil(math.log2(len(QUALITIES)))
        besides += models * (FLOOR_MIXES * codes_seconds(effort.trial_windows, pace) + scoring / 2)
    return besides + _seconds(model, wanted, texts, effort, pace)


def effort_within(model: LanguageModel, wanted: Wanted, texts: Texts, limit: Limit) -> Effort:
    """Return what of an effort fits a limited time; decided once, so that a resumed run goes on with the same.

    Raises:
        ImpossibleBudgetError: What must be done takes longer than there is left.
    """

    def produce(_: Path) -> dict[str, Any]:
        effort, pace = wanted.effort, pace_of(model, texts.calibration)
        # A second mix takes as long as a candidate, which learns besides.
        within = replace(effort, mixes=1)
        mixes = most_mixes(replace(wanted, effort=within))
        hurried = replace(effort, candidates=1, tokens=0, windows=effort.trial_windows, mixes=mixes)
        left, least = limit.left(), _seconds(model, wanted, texts, hurried, pace)
        if least > left:
            whole = limit.seconds - left + least
            raise ImpossibleBudgetError(
                f"--time {say_time(limit.seconds)} is too short: measuring, one candidate and its proof take about "
                f"{say_time(whole)} here. The smallest change that fits: --time {math.ceil(whole / 60)}m"
            )
        several = _seconds(model, wanted, texts, replace(hurried, candidates=2), pace) <= left
        return asdict(within if several else replace(within, candidates=1, windows=effort.trial_windows))

    inputs = {"model": model.origin.key, "wanted": asdict(wanted), "limit": limit.key, **texts.sha256}
    return Effort(**stage("effort", inputs, produce).facts)


def _seconds(model: LanguageModel, wanted: Wanted, texts: Texts, effort: Effort, pace: Pace) -> float:
    prunes, known = may_prune(sizes_of(model), wanted), damages_known(model, texts)
    return expected_seconds(effort, pace, prunes, known, wanted.prune)
