"""The main job: a model and a budget in, a folder with a file that runs and the proof of what it cost out.

model ─> text ─> plan ─> trials ─> [prune ─> distil ─> quantize ─> tune] ─> export ─> verify ─> measure ─> report
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pocketlm.export.gguf import write_gguf
from pocketlm.export.verify import check_bytes
from pocketlm.measure.task_files import TASK_ITEMS, read_task
from pocketlm.model.files import file_sha256
from pocketlm.model.language_model import LanguageModel, copy_notices
from pocketlm.pipeline.account import run_facts
from pocketlm.pipeline.artefact import make_report, new_folder
from pocketlm.pipeline.cache import remove_leftovers
from pocketlm.pipeline.planning import Fit, Planned, check_job, load_for, prepare
from pocketlm.pipeline.proof import plain_file, prove, simpler_choice
from pocketlm.pipeline.scoring import check_items, seen_items
from pocketlm.pipeline.stages import Progress, Texts, run_recipe, silent
from pocketlm.pipeline.trials import as_learnt, search
from pocketlm.plan.recipe import to_yaml
from pocketlm.report.content import Report
from pocketlm.report.write import write_manifest, write_reports


def fit(job: Fit, progress: Progress = silent, announce: Callable[[Planned], None] = lambda planned: None) -> Report:
    """Make a model fit a budget, and write the folder `job.out`, whole or not at all.

    Args:
        job: What is asked for.
        progress: Called as the work goes on.
        announce: Called with the plan before it is run.

    Raises:
        BadInputError, ImpossibleBudgetError, VerificationError, OutOfResourcesError: As their names say.
    """
    check_job(job)
    remove_leftovers()
    began = time.monotonic()
    with new_folder(job.out, job.force, job.reads) as folder:
        model, tasks = load_for(job), [read_task(path, TASK_ITEMS) for path in job.tasks]
        check_items(model, tasks)
        texts, planned = prepare(job, model, progress, began)
        announce(planned)
        planned = try_candidates(model, planned, texts, progress)
        compressed = run_recipe(model, planned.recipe, texts, progress)
        planned = replace(planned, recipe=as_learnt(planned.recipe, compressed.stages))
        exported = folder / "model.gguf"
        write_gguf(compressed.model, compressed.packed, exported)
        check_bytes(exported, planned.predicted_bytes)
        plain = _plain(job, model, planned, texts, progress)
        proof = prove(model, compressed, exported, texts, plain, progress, tasks)
        shutil.copytree(compressed.folder, folder / "hf")
        copy_notices(model.origin, folder)
        (folder / "recipe.yaml").write_text(to_yaml(planned.recipe), encoding="utf-8")
        hashes = {"original": model.origin.sha256, "model.gguf": file_sha256(exported)}
        hashes |= {str(path): file_sha256(path) for path in job.tasks}
        seen = seen_items(tasks, texts.documents["calibration"])
        facts = run_facts(job, planned, exported, proof, began, seen)
        report = make_report(facts, model, compressed, proof, texts, hashes)
        write_reports(report, folder)
        write_manifest(folder)
    return report


def plan(job: Fit, progress: Progress = silent) -> Planned:
    """Decide what `fit` would do and how many bytes its file would have; nothing is written but the cache."""
    check_job(job)
    return prepare(job, load_for(job), progress)[1]


def try_candidates(model: LanguageModel, planned: Planned, texts: Texts, progress: Progress) -> Planned:
    """Build the plans that are worth a try and return the best one's; the only one as it is."""
    decision = planned.decision
    if decision is None or (len(decision.rivals) < 2 and planned.limit is None):
        return planned
    found = search(model, decision, planned.wanted, texts, planned.limit, progress)
    won = found.winner.plan
    return replace(planned, recipe=found.recipe, predicted_bytes=won.bytes, plan=won, search=found)


def _plain(job: Fit, model: LanguageModel, planned: Planned, texts: Texts, progress: Progress) -> Path:
    """Return the file of the obvious simpler choice: the best mix of formats where pruning won, else plain rounding."""
    if planned.alone:
        return planned.alone.file
    choice = simpler_choice(planned.sizes, planned.budget.bytes if job.size else planned.predicted_bytes)
    return plain_file(model, choice, texts, progress)
