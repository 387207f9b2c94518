"""What a run says of itself besides its figures."""

import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import Tiny
from tests.test_report import report as invented_report

from pocketlm.errors import VerificationError
from pocketlm.export.gguf import write_gguf
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.account import run_facts
from pocketlm.pipeline.artefact import Run
from pocketlm.pipeline.planning import Fit, Planned
from pocketlm.pipeline.trials import Search, Trial
from pocketlm.plan.budget import Budget
from pocketlm.plan.recipe import Recipe, learnt_tokens
from pocketlm.plan.search import Plan
from pocketlm.plan.sizes import Shape, sizes_of
from pocketlm.report.content import Report
from pocketlm.report.frontier import frontier_markdown
from pocketlm.report.pages import html_page, markdown_page
from pocketlm.report.verdict import check_budgets_met, judge
from pocketlm.steps.distil import Distil
from pocketlm.steps.quantize import Quantize
from pocketlm.steps.tune import Tune
from pocketlm.tensors.formats import FORMATS, Packed, pack, round_to_nearest

report = invented_report  # the fixture of a whole report
RECIPE = Recipe(steps=(Quantize(formats={}),))


def facts_of(
    model: LanguageModel, folder: Path, job: Fit, took: float = 60.0, packed: dict[str, Packed] | None = None
) -> Run:
    """Account for a run that began some seconds ago and made the model's own file: F16 but for what is packed."""
    file = folder / "model.gguf"
    write_gguf(model, packed or {}, file)
    planned = Planned(RECIPE, Budget("60MB", 60_000_000), file.stat().st_size, sizes_of(model), None)
    quality = SimpleNamespace(qualities={"compressed": SimpleNamespace(kl=None)})
    proof = SimpleNamespace(quality=quality, files={"original": file}, tasks=())
    return run_facts(job, planned, file, proof, time.monotonic() - took)


@pytest.mark.parametrize(
    ("asked", "took", "text", "measured", "met"),
    [
        (1200.0, 1130.0, "20 min of time", "18 min 50 s", True),
        (1200.0, 1265.0, "20 min of time", "21 min 05 s (1 min 05 s over)", False),
        (3600.0, 3610.0, "1 h of time", "1 h 00 min (10 s over)", False),
    ],
)
def test_a_time_that_was_given_is_a_limit_like_others(asked, took, text, measured, met, tiny_model: Tiny, tmp_path):
    budget = facts_of(tiny_model("llama"), tmp_path, Fit(model="m", size="60MB", time=asked), took).budget
    (limit,) = budget.limits
    assert (limit.text, limit.measured, limit.met, budget.met) == (text, measured, met, met)
    assert budget.text == f"60MB, {text}"


def test_a_run_without_a_time_has_no_such_limit_and_its_seconds_all_the_same(tiny_model: Tiny, tmp_path):
    facts = facts_of(tiny_model("llama"), tmp_path, Fit(model="m", size="60MB"), took=60.0)
    assert (facts.budget.text, facts.budget.limits) == ("60MB", ())
    assert 60 <= facts.seconds < 90


def test_a_time_that_was_overrun_is_a_budget_missed(report, tiny_model: Tiny, tmp_path):
    facts = facts_of(tiny_model("llama"), tmp_path, Fit(model="m", size="60MB", time=1200.0), took=1265.0)
    overrun = replace(report, budget=facts.budget, seconds=facts.seconds)
    finding = judge(overrun)["budget"]
    assert (finding.word, finding.aside) == ("budget missed", "21 min 05 s (1 min 05 s over), not 20 min of time")
    with pytest.raises(VerificationError, match=r"The file is kept, .*1 min 05 s over\), not 20 min of time"):
        check_budgets_met({"out": overrun})


def test_the_time_of_the_recipes_steps_is_not_taken_for_that_of_the_run(report):
    short = " ".join(re.sub(r"<[^>]+>", "", html_page(report)).split())
    assert "6 stages: 29 min 32 s of the recipe's steps in this run." in short
    whole = replace(report, seconds=4000.0)
    said = "of the recipe's steps in this run, which took 1 h 07 min in all, with what was tried and measured."
    assert said in " ".join(html_page(whole).split())
    assert "The run took 1 h 07 min in all" in markdown_page(whole)
    assert "in all" not in markdown_page(report)


def test_what_each_file_has_learnt_from_is_counted(tiny_model: Tiny, tmp_path):
    """Formats alone learnt as a candidate; a training that the clock ended learnt from no more than it saw."""
    model, file = tiny_model("llama"), tmp_path / "model.gguf"
    write_gguf(model, {}, file)
    trained = Recipe(steps=(Distil(tokens=100_000, stop=10), Quantize(formats={}), Tune(tokens=3_000)))
    narrow, whole = (Plan(Shape(3, 96), (), {}, 1, 0.0, {}, narrower=prunes) for prunes in (True, False))
    tuned = replace(RECIPE, steps=(*RECIPE.steps, Tune(tokens=2_048)))
    interval = (1.0, 1.1)
    won, alone = (
        Trial(plan, recipe, file, interval, interval, None, learnt_tokens(recipe), {}, 0.0, 0.0, 0.0, 0.0)
        for plan, recipe in ((narrow, trained), (whole, tuned))
    )
    planned = Planned(trained, Budget("60MB", 60_000_000), file.stat().st_size, sizes_of(model), narrow)
    searched = replace(planned, search=Search((alone, won), won, trained, 0))
    assert searched.alone is alone
    assert planned.alone is None
    quality = SimpleNamespace(qualities={"compressed": SimpleNamespace(kl=None)})
    proof = SimpleNamespace(quality=quality, files={"original": file}, tasks=())
    learnt = [run_facts(Fit(model="m"), each, file, proof, time.monotonic()).learnt for each in (searched, planned)]
    assert learnt == [{"plain": 2_048, "compressed": 10 * 4 * 512 + 3_000}, {"plain": 0, "compressed": 23_480}]


def test_what_is_compared_says_how_much_each_has_learnt_from(report, tmp_path):
    def taught(plain: int | None, product: int | None) -> Report:
        tokens = {"original": None, "plain": plain, "compressed": product}
        return replace(report, files=tuple(replace(file, tokens=tokens[file.role]) for file in report.files))

    unequal = taught(12_288, 332_000)
    said = "; learnt from 12,288 tokens, the compressed file from 332,000 tokens): perplexity ratio"
    assert said in judge(unequal)["plain"].sentence
    assert "learnt from no tokens, the compressed file from 5 tokens" in judge(taught(0, 5))["plain"].sentence
    assert "| Learnt from, tokens | - | 12,288 | 332,000 |" in markdown_page(unequal)
    assert "learnt from 12,288 tokens" in frontier_markdown({"70MB": unequal}, {})
    for alike in (taught(5, 5), report):
        assert "learnt from" not in judge(alike)["plain"].sentence
    assert "Learnt from" not in markdown_page(report), "an older report does not say"


def test_a_quantized_original_is_named_as_what_all_is_compared_with(tiny_model: Tiny, tmp_path):
    """A file in F16 is none, and nor is one with BF16 in it."""
    model, job = tiny_model("llama"), Fit(model="m", size="60MB")
    with torch.no_grad():
        model.network.model.layers[2].mlp.down_proj.weight[3, 5] = 1e6
    assert not any("quantized" in note for note in facts_of(model, tmp_path, job).notes)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = model.network.get_parameter(name).detach()
    packed = {
        name: pack(round_to_nearest(weight, FORMATS["Q4_1"])),
        name.replace("0", "1"): pack(round_to_nearest(weight, FORMATS["Q8_0"])),
    }
    (note,) = (note for note in facts_of(model, tmp_path, job, packed=packed).notes if "quantized" in note)
    assert note.startswith("The original is itself a quantized file (Q4_1, Q8_0): losses and ratios are to that file")
