"""A floor of accuracy becomes the lowest floor of quality that keeps it, measured on real files."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.command_line import pocketlm
from tests.conftest import Tiny

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.task_files import Item, Task
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.text import as_tokens
from pocketlm.pipeline import accuracy
from pocketlm.pipeline.accuracy import QUALITIES, quality_for
from pocketlm.pipeline.local_search import improve
from pocketlm.pipeline.plan_stages import make_plan
from pocketlm.pipeline.scoring import outcomes
from pocketlm.pipeline.stages import Texts, run_recipe, silent
from pocketlm.plan.budget import Budget, parse_accuracy
from pocketlm.plan.decide import Wanted

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=GENERATOR) for rows in (8, 4))
TEXTS = Texts(as_tokens("a", WINDOWS), as_tokens("b", HELD_OUT), as_tokens("c", HELD_OUT), {"calibration": []})


def of_its_own(model: LanguageModel, path: Path, count: int) -> Task:
    """Questions whose right answers are what the model itself finds likelier."""
    write_gguf(model, {}, path)
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        return "".join(draw.choices(letters, k=3))

    items = tuple(Item(f"{word()} {word()}", (f" {word()}", f" {word()}"), 0) for _ in range(count))
    (found,) = outcomes(path, model, [Task("own", "choices", items)], silent)
    answered = (replace(item, answer=0 if one.right else 1) for item, one in zip(items, found, strict=True))
    return Task("own", "choices", tuple(answered))


@pytest.mark.parametrize(("least", "lowest"), [(0.9, 0.97), (0.8, 0.85), (0.5, 0.7), (0.3, 0.7), (0.2, 0.5)])
def test_the_floor_is_found_by_bisection(
    least: float, lowest: float, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    reached = dict(zip(QUALITIES, (0.9, 0.9, 0.8, 0.8, 0.5, 0.2), strict=True))
    measured: list[float] = []

    def accuracy_at(model, wanted, decision, *rest):
        measured.append(decision)
        return reached[decision]

    monkeypatch.setattr(accuracy, "_decision", lambda model, wanted, *_: round(math.exp(-wanted.most_damage), 2))
    monkeypatch.setattr(accuracy, "_accuracy", accuracy_at)
    wanted, task = Wanted(budget=Budget("any", 10**9)), Task("own", "choices", ())
    assert quality_for(tiny_model("llama"), wanted, 0.0, TEXTS, task, least, silent) == lowest
    assert len(measured) <= 4


def test_where_no_floor_fits_the_budget_nothing_is_said_to_be_measured(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(accuracy, "_decision", lambda *_: None)
    wanted, task = Wanted(budget=Budget("50MB", 10**9)), Task("own", "choices", ())
    with pytest.raises(ImpossibleBudgetError, match="cannot be met within 50MB: formats alone expect less than a qual"):
        quality_for(tiny_model("llama"), wanted, 0.0, TEXTS, task, 0.5, silent)


@pytest.mark.slow
def test_the_lowest_quality_that_reaches_an_accuracy_is_taken(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    model = tiny_model("llama")
    task = of_its_own(model, tmp_path / "own.gguf", 60)
    wanted = Wanted(budget=Budget("any", 10**9))
    measured: dict[int, float] = {}

    def noted(*arguments):
        measured[len(measured)] = real(*arguments)
        return measured[len(measured) - 1]

    real = accuracy._accuracy
    monkeypatch.setattr(accuracy, "_accuracy", noted)
    anything = quality_for(model, wanted, 0.0, TEXTS, task, 0.01, silent)
    assert anything == QUALITIES[-1]
    least = measured[0]  # of the best file; on another processor's arithmetic a worse one may guess one more right
    found = quality_for(model, wanted, 0.0, TEXTS, task, least, silent)
    # As the run goes on with the floor: it plans, and improves the plan.
    floor = replace(wanted, prune=False, most_damage=-math.log(found))
    recipe = improve(model, floor, make_plan(model, floor, TEXTS, 0, silent), TEXTS, silent).recipe
    made = run_recipe(model, recipe, TEXTS, silent)
    write_gguf(made.model, made.packed, tmp_path / "made.gguf")
    (answers,) = outcomes(tmp_path / "made.gguf", made.model, [task], silent)
    assert sum(answer.right for answer in answers) / len(answers) >= least
    with pytest.raises(ImpossibleBudgetError, match=r"An accuracy of 1\.1 on own cannot be met"):
        quality_for(model, wanted, 0.0, TEXTS, task, 1.1, silent)


def test_what_is_no_accuracy_or_has_no_task_is_refused(tmp_path: Path):
    assert parse_accuracy("90%") == 0.9
    done = pocketlm("fit", "demo", "--accuracy", "0.9", "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert "give it with --task FILE" in done.stderr
