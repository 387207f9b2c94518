"""The main job: a model and a budget in, a folder with a file that runs and the proof of what it cost out.

model ─> text ─> plan ─> [prune ─> distil ─> quantize] ─> export ─> verify ─> measure ─> report
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketlm.artefact import Run, make_report, new_folder
from pocketlm.cache import remove_leftovers
from pocketlm.export.gguf import write_gguf
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.plan.budget import Budget, parse_size
from pocketlm.plan.recipe import Recipe, read_recipe, to_yaml
from pocketlm.plan.search import Plan, check_budget
from pocketlm.plan.sizes import Sizes, recipe_bytes, sizes_of
from pocketlm.preflight import check_resources
from pocketlm.proof import prove, simpler_choice
from pocketlm.report.content import BudgetFacts, Report
from pocketlm.report.write import file_sha256, write_manifest, write_reports
from pocketlm.stages import Progress, Texts, gather_texts, make_plan, run_recipe, silent


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a person asks for."""

    model: str  # a folder, a hub id, a GGUF file, or `demo`
    size: str | None = None  # such as 70MB, 0.5GiB, 40%; a recipe needs none
    recipe: Path | None = None
    out: Path = Path("pocketlm-out")
    data: tuple[Path, ...] = ()  # text files; the model's samples and Python's help topics where empty
    heal: float | None = None  # seconds of distillation after pruning; a fixed number of tokens where None
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
        model = load(job.model)
        texts, planned = prepare(job, model, progress)
        announce(planned)
        compressed = run_recipe(model, planned.recipe, texts, progress)
        exported = folder / "model.gguf"
        write_gguf(compressed.model, compressed.packed, exported)
        proof = prove(model, compressed, exported, texts, simpler_choice(planned.sizes, planned.budget.bytes), progress)
        shutil.copytree(compressed.folder, folder / "hf")
        (folder / "recipe.yaml").write_text(to_yaml(planned.recipe))
        hashes = {"original": model.origin.sha256, "model.gguf": file_sha256(exported)}
        report = make_report(_run(job, planned, exported), model, compressed, proof, texts, hashes)
        write_reports(report, folder)
        write_manifest(folder)
    return report


def plan(job: Fit, progress: Progress = silent) -> Planned:
    """Decide what `fit` would do and how many bytes its file would have; nothing is written but the cache."""
    return prepare(job, load(job.model), progress)[1]


def prepare(job: Fit, model: LanguageModel, progress: Progress) -> tuple[Texts, Planned]:
    """Return the text of a run and its recipe: a person's, or the best for the budget."""
    sizes = sizes_of(model)
    whole = model.origin.file_bytes if model.origin.kind == "gguf" else sizes.total_f16
    budget = parse_size(job.size, whole) if job.size else None
    recipe = read_recipe(job.recipe) if job.recipe else None
    if budget and not recipe:
        check_budget(sizes, budget)
    check_resources(model, job.out)
    texts = gather_texts(model, list(job.data), job.seed, progress)
    if recipe:
        size = recipe_bytes(sizes, recipe)
        return texts, Planned(recipe, budget or Budget("the recipe's size", size), size, sizes, None)
    decision = make_plan(model, budget, texts, job.heal, job.seed, progress)
    return texts, Planned(decision.recipe, budget, decision.plan.bytes, sizes, decision.plan)


def _run(job: Fit, planned: Planned, exported: Path) -> Run:
    actual = exported.stat().st_size
    budget = BudgetFacts(planned.budget.text, planned.budget.bytes, planned.predicted_bytes, actual)
    kept = [group for group in planned.sizes.group_names if planned.sizes.allowed(group) == ["F16"]]
    notes = [f"{group} stays F16: its rows do not divide by 32" for group in kept]
    if not planned.sizes.anatomy.uniform_blocks:
        notes.append("no blocks were dropped: this family's blocks alternate in kind")
    settings = {"data": [str(path) for path in job.data], "heal seconds": job.heal, "size": job.size}
    return Run(job.command, settings, job.seed, budget, to_yaml(planned.recipe), tuple(notes))
