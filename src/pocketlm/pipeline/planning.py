"""What is asked for, and what to do about it: budgets are checked, damage is measured, plans are made."""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pocketlm.errors import BadInputError, ImpossibleBudgetError
from pocketlm.measure.task_files import TASK_ITEMS, read_task
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import weights_of
from pocketlm.model.text import read_corpus
from pocketlm.pipeline.accuracy import quality_for
from pocketlm.pipeline.local_search import improve
from pocketlm.pipeline.plan_stages import costs_here, make_plan, tuned_for
from pocketlm.pipeline.preflight import CODES_COPIES, check_memory, check_resources, load_if_room
from pocketlm.pipeline.proof import engine_damage
from pocketlm.pipeline.stages import Progress, Texts, gather_texts
from pocketlm.pipeline.timing import Limit, effort_within, scoring_seconds, seconds_expected
from pocketlm.pipeline.trials import Search, Trial, alone_of
from pocketlm.plan.budget import (
    Budget,
    highest_quality,
    parse_accuracy,
    parse_quality,
    parse_size,
    parse_speed,
    say_time,
)
from pocketlm.plan.decide import CODES_FROM, Decision, Wanted, uniform_recipe
from pocketlm.plan.effort import effort_of
from pocketlm.plan.footprint import Footprint
from pocketlm.plan.recipe import Recipe, check_shapes, read_recipe, to_dict
from pocketlm.plan.search import Plan, check_budget, check_running
from pocketlm.plan.sizes import (
    Sizes,
    bits_budget,
    budget_range,
    check_fixed,
    recipe_bytes,
    sizes_of,
    with_fewest_tokens,
)
from pocketlm.steps.quantize import METHODS
from pocketlm.steps.trim_vocabulary import TrimVocabulary, outline

LARGE = 600_000_000  # weights
CONTEXT = 2048  # tokens, where none is given
BINDS = 0.9  # of a limit: what takes less of every one is bound by none


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a person asks for."""

    model: str  # a folder, a hub id, a GGUF file, or `demo`
    size: str | None = None  # such as 70MB, 0.5GiB, 40%; a recipe needs none
    ram: str | None = None  # memory while running, with `context`, such as 200MB
    context: int | None = None  # tokens that `ram` is for: CONTEXT where None
    speed: str | None = None  # of generating on this machine, such as 30tok/s
    quality: str | None = None  # floor of exp(-KL) to the original, such as 0.95: the fewest bytes that keep it
    accuracy: str | None = None  # floor on the one task, such as 0.9: the fewest bytes that keep it
    recipe: Path | None = None
    out: Path = Path("pocketlm-out")
    tasks: tuple[Path, ...] = ()  # on which the file is scored beside the original, for the report
    data: tuple[Path, ...] = ()  # text files; the model's samples and Python's help topics where empty
    bits: float | None = None  # per weight of all matrices together, instead of a size
    format: str | None = None  # one for all matrices, instead of a size
    fixed: tuple[tuple[str, str], ...] = ()  # formats of groups or patterns of tensors that are not up for choice
    method: str = "descent"  # how codes are chosen; or `gptaq`, `gptq`, `rtn`
    prune: bool = True  # whether parts may be removed where that costs less than coarser numbers
    preset: str | None = None  # how much is tried; see plan/effort.py
    time: float | None = None  # seconds that the whole run may take, with `balanced` or `best`
    heal: float | None = None  # seconds of learning, by healing or tuning; as many tokens as the preset says where None
    tune: float = 0.0  # seconds of tuning what the file stores after quantizing
    seed: int = 0
    force: bool = False  # replace `out`
    command: str = ""  # that reproduces the run

    @property
    def reads(self) -> tuple[str | Path | None, ...]:
        """What the work reads: the model, which may be no path, and files."""
        return (self.model, *self.data, *self.tasks, self.recipe)


@dataclass(frozen=True)
class Planned:
    """A recipe and its predicted bytes."""

    recipe: Recipe
    budget: Budget
    predicted_bytes: int
    sizes: Sizes
    plan: Plan | None  # None where the recipe came from a person
    engine: float = 0.0  # KL that the engine's 8-bit activations add to what the plan expects of weights
    decision: Decision | None = None  # with the plans that are worth a try
    wanted: Wanted | None = None
    search: Search | None = None  # what came of trying them
    limit: Limit | None = None  # of a person's time

    @property
    def footprint(self) -> Footprint | None:
        """Memory and speed of the plan's layout, measured, where the budget is about them."""
        return self.plan and self.plan.footprint

    @property
    def alone(self) -> Trial | None:
        """Formats alone, as a candidate, where what prunes won: the file is measured beside it."""
        return alone_of(self.search.trials) if self.search and self.plan.prunes else None

    @property
    def binding(self) -> str:
        """Say which part of the budget binds: the one nearest its limit, if it is near."""
        used = {"size": self.predicted_bytes / self.budget.bytes} if self.budget.sized else {}
        if self.footprint and self.budget.memory:
            used["memory"] = self.footprint.memory / self.budget.memory
        if self.footprint and self.budget.speed:
            used["speed"] = self.budget.speed / self.footprint.speed
        if self.plan and self.wanted and self.wanted.most_damage is not None:
            used["quality"] = (self.plan.damage + self.engine) / (self.wanted.most_damage + self.engine)
        nearest = max(used, key=used.__getitem__)
        return f"{nearest} binds" if used[nearest] >= BINDS else "no limit binds"

    def as_data(self) -> dict[str, Any]:
        """Return what a program needs to know of it."""
        return {
            "budget_bytes": self.budget.bytes,
            "predicted_bytes": self.predicted_bytes,
            "recipe": to_dict(self.recipe),
            "plan": None if self.plan is None else asdict(self.plan),
            "candidates": [] if self.decision is None else [asdict(plan) for plan in self.decision.rivals],
        }


def load_for(job: Fit) -> LanguageModel:
    """Load a job's model; in 16 bits, half the memory, where it is large and nothing will be trained."""
    small = weights_of(job.model) < LARGE
    return load_if_room(job.model, torch.float32 if _trains(job) or small else torch.bfloat16)


def _trains(job: Fit) -> bool:
    """Whether something may learn or be cut, which wants weights in 32 bits."""
    if job.recipe:
        return any(step.step != "quantize" for step in read_recipe(job.recipe).steps)
    return bool(job.prune or job.tune)


def prepare(job: Fit, model: LanguageModel, progress: Progress, began: float | None = None) -> tuple[Texts, Planned]:
    """Return the text of a run and its recipe: a person's, or the best for the budget.

    Args:
        job: What is asked for.
        model: The original.
        progress: Called as the work goes on.
        began: When the person's time began, by the monotonic clock; now where None.
    """
    sizes, fixed = sizes_of(model), dict(job.fixed)
    check_fixed(sizes, fixed)
    budget = _budget(job, model, sizes)
    if job.format is not None:
        return _follow(job, model, uniform_recipe(sizes, job.format, fixed, job.method, job.seed), budget, progress)
    if job.recipe:
        return _follow(job, model, read_recipe(job.recipe), budget, progress)
    return _decide(job, model, budget, progress, time.monotonic() if began is None else began)


def _follow(
    job: Fit, model: LanguageModel, recipe: Recipe, budget: Budget | None, progress: Progress
) -> tuple[Texts, Planned]:
    """Return the text of a run that follows a given recipe, and its bytes."""
    check_shapes(recipe, model.network)
    check_resources(model, job.out, _trains(job))
    _check_tuning(model, recipe)
    # A recipe's own seed: it is to give the same bytes wherever it is run.
    texts = gather_texts(model, list(job.data), recipe.seed, progress)
    if job.format and job.tune:
        recipe = tuned_for(model, recipe, texts, job.tune)
        _check_tuning(model, recipe)
    size = recipe_bytes(sizes_before(model, recipe, texts), recipe)
    return texts, Planned(recipe, _budget_of_recipe(budget, size), size, sizes_of(model), None)


def _decide(job: Fit, model: LanguageModel, budget: Budget, progress: Progress, began: float) -> tuple[Texts, Planned]:
    """Return the text of a run and the best recipe for its budget."""
    sizes, fixed, effort, costs = sizes_of(model), dict(job.fixed), effort_of(job.preset), None
    # A KL needs the same tokens, and what fewer of them do to memory and speed is not predicted.
    vocabulary = bool(job.data) and not (budget.memory or budget.speed or job.quality or job.accuracy)
    trims = vocabulary and job.prune and effort.candidates > 1
    if not trims:
        check_budget(sizes, budget, job.prune, fixed)
    check_resources(model, job.out, _trains(job), effort.candidates if job.prune and effort.candidates > 1 else 0)
    if job.prune and effort.tunes and effort.tokens >= CODES_FROM:
        _check_memory_for_codes(model)
    if budget.memory or budget.speed:
        costs = costs_here(model, sizes, budget.context, progress)
        check_running(sizes, budget, costs, job.prune)
    texts = gather_texts(model, list(job.data), job.seed, progress)
    if trims and budget.bytes < budget_range(sizes, fixed=fixed)[0]:  # else there is no need to choose tokens here
        check_budget(sizes, budget, fixed=fixed, trimmed=with_fewest_tokens(model, texts.documents["calibration"]))
    engine, floor = engine_damage(model, texts, progress), parse_quality(job.quality) if job.quality else None
    wanted = Wanted(
        budget=budget,
        costs=costs,
        prune=job.prune,
        fixed=fixed,
        method=job.method,
        effort=effort,
        vocabulary=vocabulary,
        heal_seconds=job.heal,
        tune_seconds=job.tune,
        most_damage=None if floor is None else _most_damage(floor, engine),
        engine=engine,
    )
    tasks = [read_task(path, TASK_ITEMS) for path in job.tasks]
    scoring, limit = scoring_seconds(model, tasks, progress), None
    if job.time:
        limit = Limit(job.time, began, scoring)
        wanted = replace(wanted, effort=effort_within(model, wanted, texts, limit))
    else:
        expected = seconds_expected(model, wanted, texts, scoring, bool(job.accuracy))
        most = "up to " if floor or job.accuracy else ""
        progress(f"all of it takes {most}about {say_time(expected)} here", 0, 1)
    if job.accuracy:
        least = parse_accuracy(job.accuracy)
        floor = max(floor or 0.0, quality_for(model, wanted, engine, texts, tasks[0], least, progress))
        wanted = replace(wanted, most_damage=_most_damage(floor, engine))
    decision = make_plan(model, wanted, texts, job.seed, progress)
    _check_tuning(model, decision.recipe)
    decision = improve(model, wanted, decision, texts, progress)
    plan = decision.plan
    return texts, Planned(decision.recipe, budget, plan.bytes, sizes, plan, engine, decision, wanted, limit=limit)


def _check_tuning(model: LanguageModel, recipe: Recipe) -> None:
    """Refuse a recipe whose codes learn where there is no memory for it."""
    if any(step.step == "tune" and step.train == "weights" for step in recipe.steps):
        _check_memory_for_codes(model)


def _check_memory_for_codes(model: LanguageModel) -> None:
    check_memory(
        model,
        CODES_COPIES,
        "let scales alone learn: `train: scales` in a recipe, a shorter time, or `--preset balanced`",
    )


def _most_damage(floor: float, engine: float) -> float:
    """Return the KL that a floor of quality leaves to a plan.

    Raises:
        ImpossibleBudgetError: The engine alone costs more.
    """
    allowed = -math.log(floor) - engine
    if allowed <= 0:
        raise ImpossibleBudgetError(
            f"A quality of {floor:g} cannot be met: llama.cpp's 8-bit activations alone cost {engine:.4f} nats per "
            f"token, {-math.log(floor):.4f} are allowed. Ask for less --quality, at most {highest_quality(engine)}"
        )
    return allowed


def check_job(job: Fit) -> None:
    """Refuse options that do not go together, and text that cannot be read, before any work.

    Raises:
        BadInputError: Some do not, the preset is unknown, or a file is missing or damaged.
    """
    effort, healed = effort_of(job.preset), job.heal is not None
    limits = (job.size, job.ram, job.speed, job.quality, job.accuracy)
    refusals = (
        (
            not any(limits) and job.bits is None and not job.format and not job.recipe,
            "Give a budget with --size (such as 70MB), --ram, --speed, --quality or --accuracy, "
            "or a recipe with --recipe",
        ),
        (job.method not in METHODS, f"Unknown method `{job.method}`. Known: {', '.join(METHODS)}"),
        (job.recipe and job.time, "A recipe takes the time it takes: leave --time out, or the recipe"),
        (
            job.time and (effort.candidates == 1 or healed),
            "--time is for --preset balanced or best, and decides the time of healing by itself",
        ),
        (
            job.recipe and (any(limits[1:]) or healed or job.seed),
            "A recipe says all that is done: --ram, --speed, --quality, --accuracy, --heal and --seed would change "
            "nothing. Leave them out, or the recipe",
        ),
        (
            job.time and job.accuracy,
            "--accuracy builds models until one is right often enough: leave --time out, or that",
        ),
        (
            job.accuracy and len(job.tasks) != 1,
            "--accuracy is a floor on one task: give it with --task FILE",
        ),
        (
            job.recipe and (job.preset or job.context),
            "--preset and --context are for making a recipe: leave them out, or the recipe",
        ),
        (
            job.context and not job.ram,
            "--context is of the memory that --ram bounds: give --ram too, or leave it out",
        ),
    )
    for wrong, message in refusals:
        if wrong:
            raise BadInputError(message)
    if job.data:
        read_corpus(list(job.data))


def _budget_of_recipe(budget: Budget | None, size: int) -> Budget:
    """Return the budget of a recipe whose file has `size` bytes: those where none was given.

    Raises:
        ImpossibleBudgetError: The file is larger than the budget.
    """
    if budget and size > budget.bytes:
        raise ImpossibleBudgetError(
            f"The recipe's file has {size:,} bytes, more than the budget of {budget.text} ({budget.bytes:,}). "
            "Leave the budget out, or let `fit` make a recipe for it"
        )
    return budget or Budget("the recipe's size", size)


def sizes_before(model: LanguageModel, recipe: Recipe, texts: Texts) -> Sizes:
    """Return the size arithmetic that a recipe's steps start from: with the vocabulary that it leaves the model."""
    first = recipe.steps[0]
    if isinstance(first, TrimVocabulary):
        return sizes_of(outline(model, first, texts.documents["calibration"]))
    return sizes_of(model)


def _budget(job: Fit, model: LanguageModel, sizes: Sizes) -> Budget | None:
    """Return what was asked for: bytes, or those of all matrices at an average of bits, memory and speed."""
    if job.bits is not None:
        return bits_budget(sizes, job.bits)
    whole = model.origin.file_bytes if model.origin.kind == "gguf" else sizes.total_f16
    size = None if job.size is None else parse_size(job.size, whole)
    if not (job.ram or job.speed or job.quality or job.accuracy):
        return size
    memory = parse_size(job.ram, whole) if job.ram else None
    texts = [size.text] if size else []
    context = job.context or CONTEXT
    texts += [f"{memory.text} of memory at {context:,} tokens of context"] if memory else []
    texts += [f"{parse_speed(job.speed):g} tokens/s"] if job.speed else []
    texts += [f"quality {parse_quality(job.quality):g}"] if job.quality else []
    texts += [f"accuracy {parse_accuracy(job.accuracy):g} on {job.tasks[0].stem}"] if job.accuracy else []
    return Budget(
        text=", ".join(texts),
        bytes=size.bytes if size else budget_range(sizes, fixed=dict(job.fixed))[1],
        memory=memory and memory.bytes,
        speed=parse_speed(job.speed) if job.speed else None,
        context=context,
        sized=size is not None,
    )
