"""Tasks of lm-evaluation-harness, through its own API, over llama.cpp; `pip install 'pocketlm[harness]'`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any

from pocketlm.errors import BadInputError, MissingExtraError
from pocketlm.interval import Interval, wilson
from pocketlm.measure.tasks import Pair, joined, likelihoods, pair
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.scoring import reading
from pocketlm.run.engine import Engine

if TYPE_CHECKING:
    from lm_eval.api.model import LM

NO_FILTER = "none"  # the harness's name for answers as they were given
WRITTEN = 256  # tokens at most where a task does not say


@dataclass(frozen=True)
class HarnessScore:
    """A metric of a task: shares by model, `reference` first where there is one, and their paired difference."""

    task: str
    metric: str
    items: int
    scores: dict[str, Interval]
    difference: Interval | None


def score_harness(
    subjects: Mapping[str, tuple[Path, LanguageModel]], tasks: Sequence[str], limit: int, as_chat: bool = False
) -> list[HarnessScore]:
    """Score files on tasks of the harness, at most `limit` items each.

    Args:
        subjects: By role, `reference` and `model`: a GGUF file, and the same model for its tokenizer. A reference
            is not needed.
        tasks: Names as the harness knows them, or YAML files named after their task.
        limit: Items of each task.
        as_chat: Whether questions are put in each model's chat template, with examples as earlier turns.

    Raises:
        MissingExtraError: The harness is not installed.
        BadInputError: It does not know a task, a question does not fit the context, or a model has no chat template.
    """
    if not find_spec("lm_eval"):
        raise MissingExtraError(
            "lm-evaluation-harness is not installed. Install it with\n  pip install 'pocketlm[harness]'"
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    places = [str(Path(task).resolve().parent) for task in tasks if task.endswith(".yaml")]
    names = [Path(task).stem if task.endswith(".yaml") else task for task in tasks]
    manager = TaskManager(include_path=places or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise BadInputError(f"The harness has no task {', '.join(unknown)}. `lm-eval ls tasks` lists them")
    for role, (_, subject) in subjects.items():
        if as_chat and not subject.tokenizer.chat_template:
            raise BadInputError(f"The {role} has no chat template. Leave --chat-template out")
    found = {}
    for role, (path, subject) in subjects.items():
        with reading(path, subject) as engine:
            model = _adapter(engine, subject.tokenizer)
            found[role] = simple_evaluate(
                model,
                tasks=names,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                apply_chat_template=as_chat,
                fewshot_as_multiturn=as_chat,
            )
    return [score for task in found["model"]["samples"] for score in _scores(task, found)]


def _scores(task: str, found: Mapping[str, Any]) -> list[HarnessScore]:
    """Return every metric of a task that is a mean over its items, for each filter that answers go through."""
    samples = {role: each["samples"][task] for role, each in found.items()}
    filters = dict.fromkeys(sample.get("filter", NO_FILTER) for sample in samples["model"])
    scores = []
    for name in filters:
        rows = {
            r: [sample for sample in each if sample.get("filter", NO_FILTER) == name] for r, each in samples.items()
        }
        for metric in rows["model"][0]["metrics"]:
            values = {role: [sample.get(metric) for sample in each] for role, each in rows.items()}
            if not all(isinstance(value, int | float) for each in values.values() for value in each):
                continue  # such as pairs of a likelihood and a count of bytes
            difference = pair(values["reference"], values["model"]).difference if "reference" in values else None
            shares = {role: _mean(each) for role, each in values.items()}
            said = metric if name == NO_FILTER else f"{metric} ({name})"
            scores.append(HarnessScore(task, said, len(values["model"]), shares, difference))
    return scores


def _mean(values: Sequence[float]) -> Interval:
    """Return a mean with its 95 % interval: Wilson's of a share, else the normal one, from the standard error."""
    if all(value in (0, 1) for value in values):  # where all are equal, the normal one would be certain
        return wilson(int(sum(values)), len(values))
    mean = fmean(values)
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    half = NormalDist().inv_cdf(0.975) * error
    return Interval(mean, mean - half, mean + half)


def _adapter(engine: Engine, tokenizer: Any) -> "LM":
    from jinja2 import TemplateError
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # as a chat template may begin it
        return tokenizer(text, add_special_tokens=not begun, verbose=False).input_ids

    def split(prompt: str, ending: str) -> Pair:
        before, after = joined(prompt, ending, encode)
        return (before, after) if before else (start, tokenizer(ending, add_special_tokens=False).input_ids)

    class OverEngine(LM):
        """The three questions that the harness asks, put to llama.cpp, and how it writes them as a chat."""

        tokenizer_name = tokenizer.name_or_path

        def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
            try:
                return tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            except TemplateError as error:
                raise BadInputError(f"A chat template refuses: {error}. Leave --chat-template out") from error

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return likelihoods([split(*request.args) for request in requests], engine.continuations, engine.context)

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return [sum(total for total, _ in self._whole(request.args[0])) for request in requests]

        def _whole(self, text: str) -> list[tuple[float, bool]]:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            windows = get_rolling_token_windows(ids, start[0], engine.context - 1, context_len=1)
            return likelihoods(
                [make_disjoint_window(window) for window in windows], engine.continuations, engine.context
            )

        def generate_until(self, requests: list) -> list[str]:
            asked = [(encode(prompt), settings) for prompt, settings in (request.args for request in requests)]
            for request, (prompt, _) in zip(requests, asked, strict=True):  # all of them before the first answer
                _check_room(request.task_name, len(prompt), engine.context)
            return [_until(engine, tokenizer, prompt, settings) for prompt, settings in asked]

    return OverEngine()


def _check_room(task: str, tokens: int, context: int) -> None:
    """Refuse a question that the context has no room for: cut, it would be another question.

    Raises:
        BadInputError: It leaves no token for an answer.
    """
    if tokens >= context:
        raise BadInputError(
            f"A question of {task} has {tokens:,} tokens, where it and its answer have {context:,} together. "
            "Give a YAML file of the task with fewer examples in front (num_fewshot), or leave it out"
        )


def _until(engine: Engine, tokenizer: Any, prompt: list[int], settings: Mapping[str, Any]) -> str:
    """Return what the model goes on with, greedily, up to the first of a task's stop texts.

    A task may allow more tokens than the context has: the answer then ends where the context does, and the question
    stays whole.
    """
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else stops
    most = settings.get("max_gen_toks", WRITTEN)

    def text(said: list[int]) -> str:
        return tokenizer.decode(said, skip_special_tokens=True)

    said = text(engine.generate(prompt, most, lambda said: any(stop in text(said) for stop in stops)))
    for stop in stops:
        said = said.split(stop)[0]
    return said
