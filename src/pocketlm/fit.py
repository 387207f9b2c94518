"""The main job: a model and a budget in, a folder with a file that runs and the proof of what it cost out.

model ─> text ─> plan ─> [prune ─> distil ─> quantize] ─> export ─> verify ─> measure ─> report
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pocketlm.artefact import Run, make_report, new_folder
from pocketlm.cache import remove_leftovers
from pocketlm.export.gguf import write_gguf
from pocketlm.local_search import improve
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load, weight_bytes
from pocketlm.plan.budget import Budget, parse_quality, parse_size, parse_speed, say_bytes
from pocketlm.plan.decide import Wanted, tokens_in, uniform_recipe
from pocketlm.plan.footprint import Footprint, measure_file
from pocketlm.plan.recipe import Recipe, read_recipe, to_dict, to_yaml
from pocketlm.plan.search import Plan, check_budget, check_running
from pocketlm.plan.sizes import Sizes, bits_budget, budget_range, check_fixed, recipe_bytes, sizes_of
from pocketlm.preflight import check_resources
from pocketlm.proof import Proof, engine_damage, prove, simpler_choice
from pocketlm.report.content import BudgetFacts, Report
from pocketlm.report.write import file_sha256, write_manifest, write_reports
from pocketlm.stages import Progress, Texts, costs_here, gather_texts, make_plan, run_recipe, silent
from pocketlm.steps.trim_vocabulary import TrimVocabulary, outline
from pocketlm.steps.tune import Tune

LARGE_BYTES = 1_200_000_000  # of the weights on disk


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a person asks for."""

    model: str  # a folder, a hub id, a GGUF file, or `demo`
    size: str | None = None  # such as 70MB, 0.5GiB, 40%; a recipe needs none
    ram: str | None = None  # memory while running, with `context`, such as 200MB
    context: int = 2048  # tokens that `ram` is for
    speed: str | None = None  # of generating on this machine, such as 30tok/s
    quality: str | None = None  # floor of exp(-KL) to the original, such as 0.95: the fewest bytes that keep it
    recipe: Path | None = None
    out: Path = Path("pocketlm-out")
    data: tuple[Path, ...] = ()  # text files; the model's samples and Python's help topics where empty
    bits: float | None = None  # per weight of all matrices together, instead of a size
    format: str | None = None  # one for all matrices, instead of a size
    fixed: tuple[tuple[str, str], ...] = ()  # formats of groups or patterns of tensors that are not up for choice
    method: str = "descent"  # how codes are chosen; or `gptaq`, `gptq`, `rtn`
    prune: bool = True  # whether parts may be removed where that costs less than coarser numbers
    heal: float | None = None  # seconds of distillation after pruning; a fixed number of tokens where None
    tune: float = 0.0  # seconds of tuning scales and norms after quantizing
    seed: int = 0
    force: bool = False  # replace `out`
    command: str = ""  # that reproduces the run


@dataclass(frozen=True)
class Planned:
    """A recipe and its predicted bytes."""

    recipe: Recipe
    budget: Budget
    predicted_bytes: int
    sizes: Sizes
    plan: Plan | None  # None where the recipe came from a person
    engine: float = 0.0  # KL that the engine's 8-bit activations add to what the plan expects of weights

    @property
    def footprint(self) -> Footprint | None:
        """Memory and speed of the plan's layout, measured, where the budget is about them."""
        return self.plan and self.plan.footprint

    @property
    def binding(self) -> str:
        """Which part of the budget is nearest its limit."""
        used = {"size": self.predicted_bytes / self.budget.bytes}
        if self.footprint and self.budget.memory:
            used["memory"] = self.footprint.memory / self.budget.memory
        if self.footprint and self.budget.speed:
            used["speed"] = self.budget.speed / self.footprint.speed
        return max(used, key=used.__getitem__)

    def as_data(self) -> dict[str, Any]:
        """Return what a program needs to know of it."""
        return {
            "budget_bytes": self.budget.bytes,
            "predicted_bytes": self.predicted_bytes,
            "recipe": to_dict(self.recipe),
            "plan": None if self.plan is None else asdict(self.plan),
        }


def fit(job: Fit, progress: Progress = silent, announce: Callable[[Planned], None] = lambda planned: None) -> Report:
    """Make a model fit a budget, and write the folder `job.out`, whole or not at all.

    Args:
        job: What is asked for.
        progress: Called as the work goes on.
        announce: Called with the plan before it is run.

    Raises:
        BadInputError, ImpossibleBudgetError, VerificationError, OutOfResourcesError: As their names say.
    """
    remove_leftovers()
    with new_folder(job.out, job.force) as folder:
        model = load_for(job)
        texts, planned = prepare(job, model, progress)
        announce(planned)
        compressed = run_recipe(model, planned.recipe, texts, progress)
        exported = folder / "model.gguf"
        write_gguf(compressed.model, compressed.packed, exported)
        simpler = simpler_choice(planned.sizes, planned.budget.bytes if job.size else planned.predicted_bytes)
        proof = prove(model, compressed, exported, texts, simpler, progress)
        shutil.copytree(compressed.folder, folder / "hf")
        (folder / "recipe.yaml").write_text(to_yaml(planned.recipe))
        hashes = {"original": model.origin.sha256, "model.gguf": file_sha256(exported)}
        report = make_report(_run(job, planned, exported, proof), model, compressed, proof, texts, hashes)
        write_reports(report, folder)
        write_manifest(folder)
    return report


def load_for(job: Fit) -> LanguageModel:
    """Load a job's model; in 16 bits, half the memory, where it is large and nothing will be trained."""
    small = weight_bytes(job.model) < LARGE_BYTES
    return load(job.model, torch.float32 if _trains(job) or small else torch.bfloat16)


def _trains(job: Fit) -> bool:
    """Whether something may learn; what a recipe does is not known yet when the model is loaded."""
    return bool(job.prune or job.tune or job.recipe)


def plan(job: Fit, progress: Progress = silent) -> Planned:
    """Decide what `fit` would do and how many bytes its file would have; nothing is written but the cache."""
    return prepare(job, load_for(job), progress)[1]


def prepare(job: Fit, model: LanguageModel, progress: Progress) -> tuple[Texts, Planned]:
    """Return the text of a run and its recipe: a person's, or the best for the budget."""
    sizes = sizes_of(model)
    budget, recipe = _budget(job, model, sizes), read_recipe(job.recipe) if job.recipe else None
    if job.format:
        recipe = uniform_recipe(sizes, job.format, dict(job.fixed), job.method, job.seed)
    check_fixed(sizes, dict(job.fixed))
    costs = None
    if budget and not recipe:
        check_budget(sizes, budget, job.prune)
        if budget.memory or budget.speed:
            costs = costs_here(model, sizes, budget.context, progress)
            check_running(sizes, budget, costs, job.prune)
    check_resources(model, job.out, _trains(job))
    floor = parse_quality(job.quality) if job.quality else None
    texts = gather_texts(model, list(job.data), job.seed, progress)
    if recipe and job.format and job.tune:
        tokens = tokens_in(model, texts.calibration, job.tune)
        recipe = Recipe(steps=(*recipe.steps, Tune(tokens=tokens, seed=job.seed)), seed=job.seed)
    if recipe:
        size = recipe_bytes(sizes_before(model, recipe, texts), recipe)
        return texts, Planned(recipe, budget or Budget("the recipe's size", size), size, sizes, None)
    engine = engine_damage(model, texts, progress)
    wanted = Wanted(
        budget=budget,
        costs=costs,
        prune=job.prune,
        fixed=dict(job.fixed),
        method=job.method,
        heal_seconds=job.heal,
        tune_seconds=job.tune,
        most_damage=None if floor is None else -math.log(floor) - engine,
    )
    decision = make_plan(model, wanted, texts, job.seed, progress)
    decision = improve(model, wanted, decision, texts, job.seed, progress)
    return texts, Planned(decision.recipe, budget, decision.plan.bytes, sizes, decision.plan, engine)


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
    size = parse_size(job.size, whole) if job.size else None
    if not (job.ram or job.speed or job.quality):
        return size
    memory = parse_size(job.ram, whole) if job.ram else None
    texts = [size.text] if size else []
    texts += [f"{memory.text} of memory at {job.context:,} tokens of context"] if memory else []
    texts += [f"{parse_speed(job.speed):g} tokens/s"] if job.speed else []
    texts += [f"quality {parse_quality(job.quality):g}"] if job.quality else []
    return Budget(
        text=", ".join(texts),
        bytes=size.bytes if size else budget_range(sizes)[1],
        memory=memory and memory.bytes,
        speed=parse_speed(job.speed) if job.speed else None,
        context=job.context,
    )


def _run(job: Fit, planned: Planned, exported: Path, proof: Proof) -> Run:
    actual = exported.stat().st_size
    budget = BudgetFacts(planned.budget.text, planned.budget.bytes, planned.predicted_bytes, actual)
    kept = [group for group in planned.sizes.group_names if planned.sizes.allowed(group) == ["F16"]]
    notes = [f"{group} stays F16: its rows do not divide by 32" for group in kept]
    if not planned.sizes.anatomy.uniform_blocks:
        notes.append("no blocks were dropped: this family's blocks alternate in kind")
    if planned.engine:
        notes.append(
            f"llama.cpp rounds activations to 8 bits: that alone costs {planned.engine:.4f} nats per token, measured "
            "on a Q8_0 file of the original"
        )
    reached = proof.quality.qualities["compressed"].kl
    if job.quality and planned.plan and reached:
        expected = math.exp(-planned.plan.damage - planned.engine)
        notes.append(
            f"Quality asked for, as exp(-KL): at least {parse_quality(job.quality):g}; expected {expected:.3f}, "
            f"measured {math.exp(-reached.value):.3f} ({math.exp(-reached.high):.3f} to {math.exp(-reached.low):.3f})"
        )
    if planned.footprint:
        notes.append(_running_note(planned, measure_file(exported, planned.budget.context)))
    settings = {"data": [str(path) for path in job.data], "heal seconds": job.heal, "size": job.size}
    settings |= {"tune seconds": job.tune, "method": job.method, "pruning allowed": job.prune}
    return Run(job.command, settings, job.seed, budget, to_yaml(planned.recipe), tuple(notes))


def _running_note(planned: Planned, found: Footprint) -> str:
    expected, budget = planned.footprint, planned.budget
    return (
        f"Of {budget.text}, {planned.binding} binds. Memory of the model at {budget.context:,} tokens of context: "
        f"{say_bytes(expected.memory)} expected, {say_bytes(found.memory)} measured on the file; generating: "
        f"{expected.speed:.1f} tokens/s expected, {found.speed:.1f} measured"
    )
