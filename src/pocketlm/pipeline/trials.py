"""Candidates built for real: each is pruned, learns for a while, is quantized and exported, and its weights are read.

What is expected of a plan adds up damages that were measured one by one, before anything healed. A trial is the thing
itself, on validation text, in torch with the weights that its file decodes to: the engine takes several times as
long with few bits. The final file is measured in the engine, on text that no trial has seen.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.export.gguf import write_gguf
from pocketlm.interval import Interval
from pocketlm.measure.quality import Comparison, compare
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import logits_of
from pocketlm.model.text import pack_windows
from pocketlm.pipeline.cache import Finished, stage
from pocketlm.pipeline.proof import compare_texts, measure_models, original_file
from pocketlm.pipeline.stages import Progress, Texts, run_recipe, silent
from pocketlm.pipeline.timing import Limit
from pocketlm.plan.decide import Decision, Wanted, recipe_of
from pocketlm.plan.effort import trial_tokens_within
from pocketlm.plan.pace import pace_of
from pocketlm.plan.recipe import Recipe, Step, from_dict, learnt_tokens, to_dict
from pocketlm.plan.search import Plan

# Of validation text, in the original's tokens, to rank candidates on: with the 8 that training is watched on, 4 % of
# perplexity were within noise.
RANKING_WINDOWS = 24
LEARNING = ("distil", "tune")
# The proof of the final file, in times that the engine takes to load both files and read one window.
PROOF_READINGS = 36
MARGIN = 0.95  # of the time that is left is given to learning
MEASURED_AGAIN = 2.5  # times as often as a trial's is a long training measured: at its start and four times
# Of a limited time, while more than two candidates are tried: at 40 to 90 MB of the reference model one of the first
# two won, and at 60 MB the other four took longer than the winner learnt.
LEARNING_SHARE = 0.5


@dataclass(frozen=True)
class Trial:
    """A candidate that was built and measured on validation text.

    Attributes:
        plan: What it does.
        recipe: How it was built.
        file: The GGUF file.
        losses: (windows,) nats per token of the original's.
        reference: The original's.
        kl: To the original, nats per token; None where vocabularies differ among the candidates.
        tokens: That it learnt from.
        learning: Seconds that it learnt, by step.
        seconds: Building and measuring it took.
        codes: Seconds that choosing codes took.
        proof: Seconds that the proof of a final file takes, guessed from what the engine took here.
        measuring: Seconds of learning that went into measuring what was learnt, twice.
    """

    plan: Plan
    recipe: Recipe
    file: Path
    losses: tuple[float, ...]
    reference: tuple[float, ...]
    kl: float | None
    tokens: int
    learning: dict[str, float]
    seconds: float
    codes: float
    proof: float
    measuring: float

    @property
    def bytes(self) -> int:
        """Of its file."""
        return self.file.stat().st_size

    @property
    def pace(self) -> float:
        """Tokens that it learnt from in a second, but for measuring; 0 where there were none."""
        return self.tokens / (sum(self.learning.values()) - self.measuring) if self.tokens else 0.0

    @property
    def ratio(self) -> Interval:
        """Its perplexity, per token of the original's, over the original's."""
        return _ratio(self.losses, self.reference)

    def against(self, other: "Trial") -> Interval:
        """Return its perplexity over another candidate's, paired window by window."""
        return _ratio(self.losses, other.losses)


def _ratio(ours: tuple[float, ...], theirs: tuple[float, ...]) -> Interval:
    losses = {"ours": torch.tensor(ours).double(), "theirs": torch.tensor(theirs).double()}
    return Comparison({}, losses).ratio("ours", "theirs")


@dataclass(frozen=True)
class Search:
    """What came of the trials.

    Attributes:
        trials: As they were made: what prunes nothing first, where that fits the budget.
        winner: The best of them.
        recipe: The winner's, with its full training.
        untried: Candidates that there was no time for.
    """

    trials: tuple[Trial, ...]
    winner: Trial
    recipe: Recipe
    untried: int


def search(
    model: LanguageModel,
    decision: Decision,
    wanted: Wanted,
    texts: Texts,
    limit: Limit | None,
    progress: Progress,
) -> Search:
    """Build the rivals of a decision, take the best one (see `best_of`), and give it its full training.

    Every trial is kept, and so is what a limited time was found to allow: a search that was killed loses at most the
    trial in hand.

    Args:
        model: The original.
        decision: With its rivals.
        wanted: What the person asks for.
        texts: Its validation part ranks.
        limit: Of the person's time; None where there is none. Two candidates are tried if they fit, more while most
            of the time is left, and the winner learns from as many tokens as fit, and no longer.
        progress: Called as the work goes on.
    """
    per_text = any(plan.vocabulary for plan in decision.rivals)
    most, seed = min(wanted.effort.trial_tokens, decision.heal), decision.recipe.seed
    few = wanted.windows(len(decision.rivals))
    rivals = [asdict(plan) for plan in decision.rivals]
    inputs = {"model": model.origin.key, "rivals": rivals, "wanted": asdict(wanted), "seed": seed, **texts.sha256}
    inputs |= {"heal": decision.heal, "tune": decision.tune, "limit": limit and limit.key}

    def within(_: Path) -> int:
        pace = pace_of(model, texts.calibration)
        return trial_tokens_within(limit.left(), most, pace, decision.rivals[0].prunes)

    # Before any trial, whose name they are part of: a resumed search has another time left.
    heal = stage("trial-tokens", inputs, within).facts if limit else most

    def trial_of(plan: Plan) -> Trial:
        return build(model, plan, recipe_of(plan, wanted, heal, 0, seed, few), texts, per_text, progress)

    def produce(_: Path) -> dict[str, Any]:
        made: list[Trial] = []
        spare = LEARNING_SHARE * limit.left() if limit else 0.0
        for plan in decision.rivals:
            if limit and made and limit.left() < _needed(made) + spare * (len(made) > 1):
                break
            made.append(trial_of(plan))
            progress(f"candidates ({plan.describe()}: x{made[-1].ratio.value:.3f})", len(made), len(decision.rivals))
        won = best_of(made, wanted.most_damage)
        recipe_with = partial(_recipe, won.plan, wanted, decision)
        if limit is None:
            recipe = recipe_with(decision.heal, wanted.effort.windows)
        else:
            pace = won.pace or 1 / pace_of(model, texts.calibration).learning(1)
            recipe = _longest(won, limit, pace, wanted.effort.windows, recipe_with)
        return {"trials": len(made), "recipe": to_dict(recipe)}

    done = stage("search", inputs, produce)
    trials = tuple(trial_of(plan) for plan in decision.rivals[: done.facts["trials"]])
    recipe = from_dict(done.facts["recipe"], "the search")
    return Search(trials, best_of(trials, wanted.most_damage), recipe, len(decision.rivals) - len(trials))


def _recipe(plan: Plan, wanted: Wanted, decision: Decision, tokens: int, windows: int) -> Recipe:
    return recipe_of(plan, wanted, tokens, decision.tune, decision.recipe.seed, windows)


def _needed(made: Sequence[Trial]) -> float:
    """Return the seconds that another candidate and the rest of the run take."""
    return max(trial.seconds + trial.codes + trial.proof for trial in made)


def _longest(won: Trial, limit: Limit, pace: float, windows: int, recipe_with: Callable[[int, int], Recipe]) -> Recipe:
    """Return the recipe that learns from as many tokens as fit, its codes chosen anew from `windows` if time allows.

    Where not even as many tokens fit as the winner learnt from, it is the winner's own. On a machine that slows down,
    its trainings end by the clock.

    Args:
        won: The winner.
        limit: Of the person's time.
        pace: Tokens that it learns from in a second.
        windows: Of text, for the statistics of quantizing.
        recipe_with: From tokens and windows to a recipe.
    """
    before = next(step.windows for step in won.recipe.steps if step.step == "quantize")
    spare = limit.left() - won.proof

    def learning_for(seconds: float, windows: int) -> Recipe:
        tokens = MARGIN * (seconds - MEASURED_AGAIN * won.measuring) * pace
        recipe = recipe_with(int(max(0.0, tokens)), windows)
        return _ending(recipe, seconds, won.learning)

    again = learning_for(spare - won.codes * (1 + windows / before) / 2, windows)  # half of it is reading the text
    as_was = learning_for(spare, before)
    kept = as_was.steps[: _codes_at(as_was)] == won.recipe.steps[: _codes_at(won.recipe)]
    choices = [again]
    if kept:
        choices = [as_was] if windows == before else [again, as_was]
    return next((recipe for recipe in choices if learnt_tokens(recipe) > won.tokens), won.recipe)


def _ending(recipe: Recipe, seconds: float, took: Mapping[str, float]) -> Recipe:
    """Return a recipe whose trainings end after some seconds together.

    Args:
        recipe: With tokens that are expected to take less.
        seconds: For all trainings.
        took: What each took in a trial, by step, to share them out by; by tokens where there was none.
    """
    trained = [step for step in recipe.steps if step.step in LEARNING]
    timed = all(took.get(step.step) for step in trained)
    parts = {step.step: took[step.step] if timed else step.tokens for step in trained}
    ends = {step: seconds * part / sum(parts.values()) for step, part in parts.items()}
    steps = (replace(step, seconds=ends[step.step]) if step.step in ends else step for step in recipe.steps)
    return replace(recipe, steps=tuple(steps))


def as_learnt(recipe: Recipe, stages: Sequence[Finished]) -> Recipe:
    """Return a recipe whose trainings stop where their time was over, and so make the same model without a clock.

    Args:
        recipe: What was run.
        stages: What came of it: the original, then one for each step.
    """

    def ended(step: Step, done: Finished) -> Step:
        if not getattr(step, "seconds", 0.0):
            return step
        at = done.facts["details"].get("ended_at_step")
        return replace(step, seconds=0.0, stop=step.stop if at is None else max(1, at))

    return replace(recipe, steps=tuple(ended(*pair) for pair in zip(recipe.steps, stages[1:], strict=True)))


def _codes_at(recipe: Recipe) -> int:
    return 1 + [step.step for step in recipe.steps].index("quantize")


def _seconds_of(done: Finished, recipe: Recipe) -> float:
    """Return how long a step took: of one that was killed and went on, the stage's clock knows only the end."""
    learnt = sum(step.tokens for step in recipe.steps if step.step in LEARNING and step.step == done.facts["step"])
    speed = done.facts["details"].get("tokens_per_second")
    return max(done.seconds, learnt / speed if speed else 0.0)


def build(model: LanguageModel, plan: Plan, recipe: Recipe, texts: Texts, per_text: bool, progress: Progress) -> Trial:
    """Build a candidate and read it beside the original, once.

    Args:
        model: The original.
        plan: What the candidate does.
        recipe: Its steps.
        texts: Its validation part is read, more of it than trainings are watched on.
        per_text: Whether texts are compared, not tokens, because some candidate has other tokens.
        progress: Called as the work goes on.
    """
    name = "candidate.gguf" if plan.prunes else "formats-alone.gguf"

    def produce(folder: Path) -> dict[str, Any]:
        made = run_recipe(model, recipe, texts, progress)
        write_gguf(made.model, made.packed, folder / name)
        began = time.monotonic()
        length = texts.validation.windows.shape[1]
        windows = pack_windows(texts.documents["validation"], model.tokenizer, RANKING_WINDOWS, length)
        models = {"original": model, "candidate": made.model}
        found = _compared(models, windows, per_text, progress)
        kl = found.qualities["candidate"].kl
        files = {"original": original_file(model), "candidate": folder / name}
        in_engine = min(_seconds_to_read(files, models, windows[:1]) for _ in range(2))  # a busy moment is no measure
        reading = time.monotonic() - began
        took = {each.facts["step"]: _seconds_of(each, recipe) for each in made.stages}
        return {
            "losses": found.losses["candidate"].tolist(),
            "reference": found.losses["original"].tolist(),
            "kl": kl and kl.value,
            "learning": {step: took[step] for step in LEARNING if step in took},
            "seconds": sum(took.values()) + reading,
            "codes": took["quantize"],
            "proof": PROOF_READINGS * in_engine,
            "measuring": sum(each.facts["details"].get("seconds_measuring", 0.0) for each in made.stages),
        }

    inputs = {"model": model.origin.key, "recipe": to_dict(recipe), "per_text": per_text, **texts.sha256}
    done = stage("trial", inputs, produce)
    facts = done.facts
    return Trial(
        plan=plan,
        recipe=recipe,
        file=done.folder / name,
        losses=tuple(facts["losses"]),
        reference=tuple(facts["reference"]),
        kl=facts["kl"],
        tokens=learnt_tokens(recipe),
        learning=facts["learning"],
        seconds=facts["seconds"],
        codes=facts["codes"],
        proof=facts["proof"],
        measuring=facts["measuring"],
    )


def _seconds_to_read(files: dict[str, Path], models: dict[str, LanguageModel], windows: Tensor) -> float:
    began = time.monotonic()
    measure_models(files, models, windows, silent)
    return time.monotonic() - began


def _compared(models: dict[str, LanguageModel], windows: Tensor, per_text: bool, progress: Progress) -> Comparison:
    """Compare models by the tokens of windows, (windows, length), or by the texts that these stand for."""

    def reading(done: int, total: int) -> None:
        progress("reading the candidate", done, total)

    logits = {role: partial(logits_of, model.network) for role, model in models.items()}
    return compare_texts(logits, models, windows, reading) if per_text else compare(logits, windows, reading)


def best_of(trials: Sequence[Trial], allowed: float | None = None) -> Trial:
    """Return what has the lowest perplexity; what prunes nothing, unless another beats it by more than noise.

    Under a floor of quality, `allowed` nats per token of KL, it is the smallest that keeps it, or that of the least KL.
    """
    if allowed is not None:
        keeping = [trial for trial in trials if trial.kl <= allowed]
        return min(keeping, key=lambda trial: trial.plan.bytes) if keeping else min(trials, key=lambda trial: trial.kl)
    best = min(trials, key=lambda trial: trial.ratio.value)
    simple = alone_of(trials) or best
    return best if best is simple or best.against(simple).high < 1 else simple


def alone_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the candidate that prunes nothing, None where formats alone do not fit the budget."""
    return next((trial for trial in trials if not trial.plan.prunes), None)
