"""Candidates are built and measured; what prunes nothing wins unless another is better by more than noise."""

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.command_line import command, environment, pocketlm
from tests.conftest import Tiny
from tests.tiny import tiny_folder

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.measure.task_files import Item, Task
from pocketlm.model.text import Tokens, as_tokens, pack_windows, python_topics
from pocketlm.pipeline import timing, trials
from pocketlm.pipeline.cache import Finished
from pocketlm.pipeline.planning import Fit, load_for, prepare
from pocketlm.pipeline.stages import Texts, run_recipe, silent
from pocketlm.pipeline.timing import TIMED_ITEMS, Limit, effort_within, scoring_seconds, seconds_expected
from pocketlm.pipeline.trials import MARGIN, Search, Trial, _longest, _seconds_of, as_learnt, best_of, search
from pocketlm.plan.budget import Budget
from pocketlm.plan.decide import CODES_TIME, Decision, Wanted, decide, most_candidates, read_decision, recipe_of
from pocketlm.plan.effort import PRESETS, Effort, expected_seconds, trial_tokens_within
from pocketlm.plan.pace import Pace
from pocketlm.plan.recipe import Recipe
from pocketlm.plan.search import Damages, Plan, check_budget
from pocketlm.plan.sensitivity import vocabulary_damage
from pocketlm.plan.sizes import Shape, budget_range, sizes_of, with_fewest_tokens
from pocketlm.steps.distil import Distil
from pocketlm.steps.quantize import Quantize
from pocketlm.steps.trim_vocabulary import TrimVocabulary, trim_vocabulary
from pocketlm.steps.tune import Tune
from pocketlm.tensors.formats import FORMATS

WORDS = "".join(f"Paragraph {n}: the {n % 7} small models went to market number {n * n}.\n\n" for n in range(4000))


def trial(losses: list[float], prunes: bool, size: int = 10, kl: float | None = None) -> Trial:
    plan = Plan(Shape(3, 96 if prunes else 128), (), {}, size, 0.0, {}, narrower=prunes)
    recipe = Recipe(steps=(Quantize(formats={}),))
    return Trial(plan, recipe, Path("none"), tuple(losses), (1.0,) * len(losses), kl, 0, {}, 0.0, 0.0, 0.0, 0.0)


def test_what_prunes_wins_only_by_more_than_noise():
    alone = trial([2.0, 2.2, 1.9, 2.1], prunes=False)
    better = trial([1.9, 2.1, 1.8, 2.0], prunes=True)
    lucky = trial([1.0, 2.3, 2.0, 2.2], prunes=True)  # the lowest mean, from one window
    assert best_of([alone, better]) is better
    assert best_of([alone, lucky]) is alone
    assert best_of([lucky, better]) is lucky, "there is nothing simpler to prefer"
    assert better.against(alone).value == pytest.approx(torch.tensor(-0.1).exp().item())
    assert better.ratio.value == pytest.approx(torch.tensor(0.95).exp().item())


def test_under_a_floor_the_smallest_that_keeps_it_wins():
    alone = trial([2.0, 2.0], prunes=False, size=100, kl=0.09)
    better = trial([1.5, 1.5], prunes=True, size=95, kl=0.05)
    smaller = trial([1.9, 1.9], prunes=True, size=90, kl=0.08)
    smallest = trial([1.0, 1.0], prunes=True, size=80, kl=0.2)  # the lowest perplexity, and it breaks the floor
    tried = [alone, better, smaller, smallest]
    assert best_of(tried) is smallest
    assert best_of(tried, 0.1) is smaller
    assert best_of(tried, 0.06) is better
    assert best_of(tried, 0.01) is better, "none keeps it: the least damage"


def test_a_step_that_went_on_after_a_kill_took_all_its_time():
    """Its stage knows only what the last process took, and a pace from that would promise too many tokens."""
    recipe = Recipe(steps=(Distil(tokens=1000), Quantize(formats={})))
    facts = {"step": "distil", "details": {"tokens_per_second": 10.0}}
    assert _seconds_of(Finished(Path("none"), "", facts, seconds=3.0, reused=False), recipe) == 100
    quantized = {"step": "quantize", "details": {}}
    assert _seconds_of(Finished(Path("none"), "", quantized, seconds=3.0, reused=False), recipe) == 3


def test_more_effort_takes_longer_and_known_damages_less():
    pace = Pace(0.5, 0.25, 512)
    seconds = [expected_seconds(effort, pace, prunes=True, known=False) for effort in PRESETS.values()]
    assert seconds == sorted(seconds)
    assert expected_seconds(PRESETS["fast"], pace, prunes=True, known=True) < seconds[0]
    best = Wanted(budget=Budget("any", 1), effort=PRESETS["best"])
    assert [most_candidates(replace(best, vocabulary=own_text)) for own_text in (False, True)] == [4, 6]
    alone = replace(PRESETS["balanced"], candidates=1)
    assert expected_seconds(alone, pace, True, True) == expected_seconds(
        PRESETS["balanced"], pace, prunes=False, known=True
    )


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pace:
    """A machine whose pace is known, where no damage was measured and something will be pruned."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "pace_of", lambda model, text: Pace(1.0, 0.5, 512))
    monkeypatch.setattr(timing, "damages_known", lambda model, texts: False)
    monkeypatch.setattr(timing, "may_prune", lambda sizes, wanted: True)
    return Pace(1.0, 0.5, 512)


TEXT = as_tokens("text", torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(0)))
TEXTS = Texts(TEXT, TEXT, TEXT, {})


def test_of_a_short_time_what_does_not_fit_is_left_out(tiny_model: Tiny, paced: Pace):
    model, wanted = tiny_model("llama"), Wanted(budget=Budget("b", 1), effort=PRESETS["best"])

    def effort(seconds: float, gone: float = 0.0, kept: float = 0.0) -> Effort:
        return effort_within(model, wanted, TEXTS, Limit(seconds, time.monotonic() - gone, kept))

    assert effort(1e5) == replace(PRESETS["best"], mixes=1)
    one = replace(PRESETS["best"], candidates=1, tokens=0, windows=32, mixes=1)
    least = expected_seconds(one, paced, prunes=True, known=False)
    assert effort(least + 1) == replace(PRESETS["best"], mixes=1, candidates=1, windows=32)
    with pytest.raises(ImpossibleBudgetError, match="--time 19m"):
        effort(least - 1)
    with pytest.raises(ImpossibleBudgetError, match="--time 24m"):
        effort(least + 299, gone=300)  # measuring memory and speed took five minutes
    with pytest.raises(ImpossibleBudgetError, match="--time 24m"):
        effort(least + 299, kept=300)  # as scoring tasks will
    floor = replace(wanted, most_damage=0.1)
    with pytest.raises(ImpossibleBudgetError, match="is too short"):  # mixes are made until one keeps it
        effort_within(model, floor, TEXTS, Limit(least + 1, time.monotonic()))


def test_what_fits_a_time_is_decided_once(tiny_model: Tiny, paced: Pace, monkeypatch: pytest.MonkeyPatch):
    model, wanted = tiny_model("llama"), Wanted(budget=Budget("b", 1), effort=PRESETS["best"])
    two = replace(PRESETS["best"], candidates=2, tokens=0, windows=32, mixes=1)
    enough = 1 + expected_seconds(two, paced, prunes=True, known=True)
    first = effort_within(model, wanted, TEXTS, Limit(enough, time.monotonic()))
    assert first.candidates == 1
    monkeypatch.setattr(timing, "damages_known", lambda model, texts: True)  # by the run that was killed
    assert effort_within(model, wanted, TEXTS, Limit(enough, time.monotonic())) == first
    assert effort_within(model, wanted, TEXTS, Limit(enough + 1, time.monotonic())).candidates > 1


def test_tasks_and_models_for_a_floor_are_counted(tiny_model: Tiny, paced: Pace):
    model, wanted = tiny_model("llama"), Wanted(budget=Budget("b", 1))
    plain = seconds_expected(model, wanted, TEXTS, 0.0, False)
    assert seconds_expected(model, wanted, TEXTS, 60.0, False) == pytest.approx(plain + 60)
    learning = replace(wanted, heal_seconds=100.0, tune_seconds=10.0)
    effort = replace(wanted.effort, tokens=0, candidates=most_candidates(wanted))
    assert seconds_expected(model, learning, TEXTS, 0.0, False) == pytest.approx(
        expected_seconds(effort, paced, True, False) + 110
    )
    codes = 220 * paced.plain + 6 * 32 * paced.fast
    on_task = seconds_expected(model, wanted, TEXTS, 60.0, True)
    assert on_task == pytest.approx(plain + 60 + 2 * codes + 4 * (3 * codes + 30)), "four models of three mixes each"


def test_scoring_is_timed_on_a_few_items(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    now, read = [0.0], []

    def outcomes(path: Path, model: Any, tasks: Sequence[Task], progress: Any) -> None:
        now[0] += 1000  # loading
        for done, item in enumerate(tasks[0].items, 1):
            read.append(item.prompt)
            now[0] += 2.0
            progress("", done, len(tasks[0].items))

    monkeypatch.setattr(timing, "outcomes", outcomes)
    monkeypatch.setattr(timing, "original_file", lambda model: tmp_path)
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tasks = [Task(str(count), "written", tuple(Item(str(i), (), "") for i in range(count))) for count in (100, 1)]
    model = tiny_model("llama")
    assert scoring_seconds(model, tasks, silent) == 2 * 100 * 2.0, "two files; of a single item nothing is known"
    assert read == ["0", "20", "40", "60", "80", "0"], "from all of the file"
    assert len(read) == 1 + TIMED_ITEMS + 1
    assert scoring_seconds(model, tasks, silent) == 400
    assert len(read) == 6, "once"
    assert scoring_seconds(model, [], silent) == 0


def test_trainings_share_what_is_left_and_end_by_it():
    recipe = Recipe(steps=(Distil(tokens=50), Quantize(formats={}, windows=32), Tune(tokens=50)))
    won = replace(trial([2.0], prunes=True), recipe=recipe, tokens=100, learning={"distil": 30.0, "tune": 10.0})
    won = replace(won, codes=100.0, proof=200.0, measuring=4.0)
    limit = Limit(1500.0, time.monotonic(), kept=300.0)

    def recipe_with(tokens: int, windows: int) -> Recipe:
        learnt = tokens // 2
        return Recipe(steps=(Distil(tokens=learnt), Quantize(formats={}, windows=windows), Tune(tokens=learnt)))

    found = _longest(won, limit, 2.5, 64, recipe_with)
    distil, codes, tune = found.steps
    assert codes.windows == 64
    assert distil.seconds + tune.seconds == pytest.approx(1500 - 300 - 200 - 150, abs=1), "tasks, proof, codes anew"
    assert distil.seconds == pytest.approx(3 * tune.seconds), "as they took in the trial"
    assert distil.tokens + tune.tokens == pytest.approx(MARGIN * (850 - 2.5 * 4) * 2.5, rel=0.01)
    assert _longest(won, Limit(600.0, time.monotonic(), kept=300.0), 0.5, 64, recipe_with) is recipe, "built already"


@pytest.mark.usefixtures("exact")
def test_what_a_clock_ended_is_made_again_by_its_recipe(tiny_model: Tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    model, tokens, no_time = tiny_model("llama"), 40 * 4 * 32, 1e-9
    steps = (
        Distil(tokens=tokens, learning_rate=1e-3, seconds=no_time),
        Quantize(formats={"*": "Q4_0"}, windows=4),
        Tune(tokens=tokens, seconds=no_time),
    )
    made = run_recipe(model, Recipe(steps=steps), TEXTS, silent)
    again = as_learnt(Recipe(steps=steps), made.stages)
    learnt = [(step.tokens, step.stop, step.seconds) for step in again.steps if step.step != "quantize"]
    assert learnt == [(tokens, 1, 0.0)] * 2, "the step in hand is the last"
    assert all(
        "its time was over after 128 tokens" in done.facts["summary"] for done in (made.stages[1], made.stages[3])
    )
    repeated = run_recipe(model, again, TEXTS, silent)
    assert as_learnt(again, repeated.stages) == again
    assert repeated.stages[-1].folder != made.stages[-1].folder, "it is no copy"
    for name, tensor in made.packed.items():
        assert torch.equal(tensor.rows, repeated.packed[name].rows)
    for name, value in made.model.network.state_dict().items():
        assert torch.equal(value, repeated.model.network.state_dict()[name])


def test_a_candidate_learns_from_what_the_time_leaves_beside_its_proof():
    pace = Pace(0.5, 0.25, 512)
    learns = pace.learning(2048)
    assert learns == pytest.approx(5.0), "four windows, five passes each"
    proof = next(seconds for seconds in range(1000) if trial_tokens_within(seconds, 2048, pace, chooses=False))
    asked = [trial_tokens_within(proof + more, 2048, pace, chooses=False) for more in (-100, 0, 1, 2, 4, 100)]
    assert asked == [0, 512, 1024, 1024, 2048, 2048]
    assert trial_tokens_within(proof, 2048, pace, chooses=True) == 0, "codes take time, too"


def test_rivals_are_the_best_plans_of_each_kind(tiny_model: Tiny):
    model = tiny_model("llama")
    sizes, text = sizes_of(model), Tokens("text", torch.zeros(8, 32, dtype=torch.long), "")
    names = ("Q2_0", "Q4_0", "Q8_0")
    by_format = {name: 2.0 ** -FORMATS[name].bits for name in names}
    formats = dict.fromkeys(sizes.units(sizes.original), by_format)
    damages = Damages(((1, 0.02),), {32: 9.0, 64: 0.3, 96: 0.01}, formats)
    budget = Budget("b", sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q4_0")) * 9 // 10)

    def decided(preset: str) -> Decision:
        wanted = Wanted(budget=budget, effort=PRESETS[preset], heal_seconds=None)
        return decide(model, wanted, damages, (text, text), [], 0, silent)

    one, several = decided("fast"), decided("best")
    assert all(read_decision(json.loads(json.dumps(asdict(each)))) == each for each in (one, several))
    assert one.rivals == (one.plan,)
    assert len(several.rivals) == 4, "formats alone, fewer blocks, narrower FFNs, both"
    assert [plan.prunes for plan in several.rivals] == [False, True, True, True]
    expected = [plan.damage for plan in several.rivals[1:]]
    assert expected == sorted(expected)
    assert min(plan.damage for plan in several.rivals) == several.plan.damage == one.plan.damage
    assert all(plan.bytes <= budget.bytes for plan in several.rivals)
    assert len(decided("balanced").rivals) == 3
    floor = min(plan.damage for plan in several.rivals) * 1.2
    asked = Wanted(budget=Budget("b", sizes.total_f16), effort=PRESETS["best"], most_damage=floor)
    kept = decide(model, asked, damages, (text, text), [], 0, silent)
    assert all(plan.damage <= floor for plan in kept.rivals), "a floor of quality is one for every candidate"
    wanted = Wanted(budget=budget, effort=PRESETS["balanced"])
    steps = [[step.step for step in recipe_of(plan, wanted, 99, 0, 0, 64).steps] for plan in several.rivals[:2]]
    assert steps[0] == ["quantize", "tune"]
    assert steps[1][-3:] == ["distil", "quantize", "tune"]
    rounded = replace(several.rivals[0], formats=dict.fromkeys(several.rivals[0].formats, "F16"))
    assert [step.step for step in recipe_of(rounded, wanted, 99, 0, 0, 64).steps] == ["quantize"], "nothing to tune"
    assert recipe_of(rounded, wanted, 99, 0, 3, 64).steps[0].seed == 3
    pruned = recipe_of(several.rivals[1], wanted, 10_000, 0, 0, 64)
    assert [step.tokens for step in pruned.steps if step.step in ("distil", "tune")] == [5_000, 5_000]
    trimmed = replace(several.rivals[0], vocabulary=320, spelling=0.5)
    few, many = (recipe_of(trimmed, wanted, tokens, 0, 0, 64).steps for tokens in (10_000, 1_000_000))
    assert [(step.step, getattr(step, "tokens", 0)) for step in few[1:]] == [("quantize", 0), ("tune", 10_000)]
    assert [step.step for step in many[1:]] == ["distil", "quantize", "tune"]
    assert [step.train for step in (few[-1], many[-1])] == ["scales", "weights"]
    assert many[-1].tokens == int(500_000 / CODES_TIME), "as long as scales would have learnt"
    hardly = recipe_of(replace(trimmed, spelling=0.01), wanted, 1_000_000, 0, 0, 64).steps
    assert [step.step for step in hardly[1:]] == ["quantize", "tune"], "hardly a word is spelled anew"
    once = replace(wanted, effort=PRESETS["fast"])
    assert [step.step for step in recipe_of(trimmed, once, 99, 0, 0, 64).steps[1:]] == ["distil", "quantize"]
    nothing = [[step.step for step in recipe_of(plan, wanted, 0, 0, 0, 64).steps] for plan in several.rivals[:2]]
    assert nothing[0] == ["quantize"]
    assert nothing[1][-1] == "quantize"
    assert "distil" not in nothing[1]


def test_a_budget_that_only_fewer_tokens_meet_is_met(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pocketlm.plan.sizes.VOCABULARIES", (0.9, 0.01))  # a hundredth is too few
    model, documents = tiny_model("llama"), [WORDS]
    sizes, text = sizes_of(model), as_tokens("text", pack_windows(documents, model.tokenizer, 8, 32))
    formats = {unit: {"Q2_0": 0.1, "Q4_0": 0.05} for unit in sizes.units(sizes.original)}
    damages = Damages(((1, 0.02),), {32: 0.3, 64: 0.2, 96: 0.01}, formats)
    trimmed, (least, _) = with_fewest_tokens(model, documents), budget_range(sizes)
    smallest = budget_range(trimmed)[0]
    assert smallest < least
    budget = Budget("b", (smallest + least) // 2)
    with pytest.raises(ImpossibleBudgetError):
        check_budget(sizes, budget)
    check_budget(sizes, budget, trimmed=trimmed)
    with pytest.raises(ImpossibleBudgetError, match=f"{smallest:,} bytes"):
        check_budget(sizes, Budget("b", smallest - 1), trimmed=trimmed)
    wanted = Wanted(budget=budget, effort=PRESETS["best"], vocabulary=True, heal_seconds=None)
    found = decide(model, wanted, damages, (text, text), documents, 0, silent)
    assert found.plan.vocabulary == trimmed.shapes[trimmed.embedding][0]
    assert found.plan.bytes <= budget.bytes
    with pytest.raises(ImpossibleBudgetError):
        decide(model, replace(wanted, vocabulary=False), damages, (text, text), documents, 0, silent)


def test_a_limit_counts_down():
    limit = Limit(100.0, time.monotonic() - 40)
    assert 50 < limit.left() <= 60


def test_fewer_tokens_cost_what_the_same_text_costs_more(tiny_model: Tiny, exact: None):
    """Against the trimmed model's own reading, piece by piece, in float64."""
    model = tiny_model("llama")
    documents = python_topics().split("calibration")
    windows = pack_windows(documents, model.tokenizer, 2, 48)
    count = model.network.config.vocab_size - 40
    found = vocabulary_damage(model, documents, windows, [count, 1], silent)  # one token is too few: it is left out

    def nats(network: torch.nn.Module, ids: list[int]) -> float:
        with torch.no_grad():
            logits = network.double()(torch.tensor([ids])).logits[0, :-1]
        return -torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()

    trimmed, _ = trim_vocabulary(tiny_model("llama"), TrimVocabulary(size=count), documents)
    left = {trimmed.tokenizer.convert_ids_to_tokens(i): i for i in range(len(trimmed.tokenizer))}
    more = 0.0
    for row in windows.tolist():
        spelled = []
        for token in model.tokenizer.convert_ids_to_tokens(row):
            if token in left:
                spelled.append(left[token])
            else:
                text = model.tokenizer.convert_tokens_to_string([token])
                spelled += trimmed.tokenizer(text, add_special_tokens=False).input_ids
        more += nats(trimmed.network, spelled) - nats(tiny_model("llama").network, row)
    assert more > 0, "some tokens are gone"
    assert found == {count: pytest.approx(more / (windows.numel() - len(windows)), rel=1e-3)}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search on a tiny model: arguments, folder, cache and report."""
    place = tmp_path_factory.mktemp("searched")
    folder = tiny_folder("llama", place / "model")
    (place / "words.txt").write_text(WORDS)
    items = [{"prompt": "The models went to", "choices": ["market", "sleep"], "answer": n % 2} for n in range(4)]
    (place / "places.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    arguments = ("fit", folder, "--size", "60kB", "--data", place / "words.txt", "--heal", "1s", "--json")
    arguments += ("--task", place / "places.jsonl")
    done = pocketlm(*arguments, "-o", place / "out", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    return arguments, place / "out", place / "cache", json.loads(done.stdout)


@pytest.mark.slow
def test_candidates_are_built_measured_and_reported(searched):
    _, out, _, report = searched
    names = [tried["name"] for tried in report["trials"]]
    assert names[0] == "formats alone"
    assert len(names) == len(set(names)) == PRESETS["balanced"].candidates
    assert all(tried["bytes"] <= 60_000 for tried in report["trials"])
    (won,) = [tried for tried in report["trials"] if tried["won"]]
    assert any(won["name"] in note for note in report["notes"]) or names.index(won["name"]) == 0
    assert (out / "model.gguf").stat().st_size == report["budget"]["predicted_bytes"] == won["bytes"]
    (task,) = report["tasks"]
    assert (task["name"], task["items"]) == ("places", 4)
    assert task["compressed"]["value"] == 0.5, "whatever it prefers, half of the items want the other"
    parts = {unit["group"] for unit in report["sensitivity"]["units"]}
    assert parts == {"embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out"}
    for page in ("report.html", "report.md"):
        assert f"{won['name']} (chosen)" in (out / page).read_text()


@pytest.mark.slow
def test_a_search_killed_in_a_trial_ends_in_the_same_file(searched, tmp_path):
    arguments, out, kept, _ = searched
    again = tmp_path / "cache"
    for stage in kept.iterdir():  # what was measured and planned is there; trials are not
        if stage.name.partition("-")[0] in ("text", "engine", "damage", "plan", "original"):
            (again / stage.name).mkdir(parents=True)
            for file in stage.iterdir():
                (again / stage.name / file.name).symlink_to(file)
    process = subprocess.Popen(
        command(*arguments, "-o", tmp_path / "out"),
        env=environment(again),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (list(again.glob("trial-*")) and list(again.glob(".trial-*.partial"))) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before a second trial was seen"
    done = pocketlm(*arguments, "-o", tmp_path / "out", cache=again)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()


@pytest.mark.slow
def test_a_search_in_limited_time_that_is_killed_in_a_trial_keeps_those_before(searched, tmp_path, monkeypatch):
    """Though the resumed run has another time left, and the machine another pace."""
    arguments, _, kept, _ = searched
    again = tmp_path / "cache"
    for stage in kept.iterdir():
        if stage.name.partition("-")[0] in ("text", "engine", "damage", "original", "scoring"):
            (again / stage.name).mkdir(parents=True)
            for file in stage.iterdir():
                (again / stage.name / file.name).symlink_to(file)
    monkeypatch.setenv("POCKETLM_CACHE", str(again))
    job = Fit(model=str(arguments[1]), size="60kB", data=(arguments[5],), time=3600.0)
    model, built, stop_at = load_for(job), [], 2

    def noted(model, plan, recipe, *rest):
        if recipe not in built:
            built.append(recipe)
        if len(built) == stop_at:
            raise KeyboardInterrupt
        return build(model, plan, recipe, *rest)

    build = trials.build
    monkeypatch.setattr(trials, "build", noted)
    texts, planned = prepare(job, model, silent)
    with pytest.raises(KeyboardInterrupt):
        search(model, planned.decision, planned.wanted, texts, planned.limit, silent)
    (first,) = again.glob("trial-[0-9a-f]*")
    for module in (timing, trials):
        monkeypatch.setattr(module, "pace_of", lambda model, text: Pace(1e3, 1e3, 256))
    stop_at = 0
    texts, planned = prepare(job, model, silent, time.monotonic() - 600)
    found = search(model, planned.decision, planned.wanted, texts, planned.limit, silent)
    assert found.trials[0].recipe == built[0]
    assert found.trials[0].file.parent == first
    assert found.trials[0].tokens > 0
    assert len(list(again.glob("trial-[0-9a-f]*"))) == len(found.trials) > 1, "none was built twice"


@pytest.mark.slow
def test_a_time_that_is_too_short_or_beside_the_point_is_refused(searched, tmp_path):
    arguments, _, cache, _ = searched
    plain = [word for word in arguments if word not in ("--heal", "1s")]
    refused = pocketlm(*plain, "--time", "1s", "-o", tmp_path / "out", cache=cache)
    assert refused.returncode == 3
    assert "The smallest change that fits: --time" in refused.stderr
    wrong = pocketlm(*arguments, "--time", "10m", "-o", tmp_path / "out", cache=cache)
    assert wrong.returncode == 2
    assert "--time" in wrong.stderr
    unknown = pocketlm(*plain, "--preset", "most", "-o", tmp_path / "out", cache=cache)
    assert unknown.returncode == 2
    assert "fast, balanced, best" in unknown.stderr


@pytest.mark.slow
def test_time_decides_what_is_tried_and_how_long_the_winner_learns(searched, monkeypatch):
    arguments, _, cache, _ = searched
    monkeypatch.setenv("POCKETLM_CACHE", str(cache))  # all trials are there
    monkeypatch.setattr(trials, "trial_tokens_within", lambda left, most, *_: most)  # and none learns from less
    job = Fit(model=str(arguments[1]), size="60kB", data=(arguments[5],), heal=1.0)
    model = load_for(job)
    texts, planned = prepare(job, model, silent)

    def within(seconds: float) -> Search:
        limit = Limit(seconds, time.monotonic())
        return search(model, planned.decision, planned.wanted, texts, limit, silent)

    short, long = within(0.0), within(1e5)
    needed = max(each.seconds + each.codes + each.proof for each in long.trials[:2])
    assert len(within(1.5 * needed).trials) == 2, "a third would take what the winner learns in"
    assert len(within(2.5 * needed).trials) == 3
    assert (len(short.trials), short.untried) == (1, 2)
    assert short.recipe == short.winner.recipe, "what was built is what ships"
    assert (len(long.trials), long.untried) == (3, 0)
    learnt = {step.step: step.tokens for step in long.recipe.steps if step.step in ("distil", "tune")}
    learnt["tune"] *= CODES_TIME  # so long do codes learn too
    assert long.recipe.steps[-1].train == "weights"
    # How much candidates learn in a second, and so which one wins, is the machine's affair.
    assert set(learnt) == ({"distil", "tune"} if long.winner.plan.prunes else {"tune"})
    assert sum(learnt.values()) == pytest.approx(MARGIN * 1e5 * long.winner.pace, rel=0.01)
    assert sum(getattr(step, "seconds", 0.0) for step in long.recipe.steps) == pytest.approx(1e5, rel=0.01)
