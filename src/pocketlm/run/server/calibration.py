"""Find the confidence below which answers should go to a larger model, on a person's own examples."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import aiohttp

from pocketlm.errors import BadInputError
from pocketlm.interval import wilson
from pocketlm.model.bare import bare
from pocketlm.model.files import file_sha256, json_lines, json_values
from pocketlm.run.server.answers import Answer, confidence
from pocketlm.run.server.engine_process import EngineSettings
from pocketlm.run.server.escalation import Escalation, ask_larger
from pocketlm.run.server.local import LocalModel
from pocketlm.run.server.refusals import RefusalError
from pocketlm.run.server.requests import Chat, parse

Measure = Literal["mean", "min"]
Progress = Callable[[str, int, int], None]
MEASURES: tuple[Measure, ...] = ("mean", "min")
_WHAT = "answering the examples"


@dataclass(frozen=True, slots=True)
class Example:
    """A question whose right answer is known, and the place where it stands, such as `a.jsonl, line 3`."""

    asked: Chat
    answers: tuple[str, ...]
    place: str


@dataclass(frozen=True, slots=True)
class Judged:
    """An example that was answered.

    Attributes:
        confidence: Of the local answer, by measure.
        right: Whether it is right.
        larger_right: Whether the larger model's is; None where it was not asked.
    """

    confidence: dict[Measure, float]
    right: bool
    larger_right: bool | None


@dataclass(frozen=True, slots=True)
class Point:
    """What a threshold gives on the examples; intervals are Wilson's, 95 %.

    Attributes:
        threshold: Answers with a confidence below it are escalated.
        escalated: The share that is.
        accuracy: Of local and larger model together.
        accuracy_interval: Of that.
        kept_accuracy: Of the answers that are kept; None where none is.
        kept_interval: Of that.
    """

    threshold: float
    escalated: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    kept_accuracy: float | None
    kept_interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The accuracy-cost curve and what was chosen on it.

    Attributes:
        target: The accuracy that was asked for.
        measure: How confidence is read: the one that escalates less at the target.
        chosen: The point that escalates least among those that reach the target; None where none does.
        sure: The same with the lower end of the interval at the target.
        examples: How many there were.
        local_accuracy: Of the local model alone.
        larger_accuracy: Of the larger model alone; None where it was assumed to be always right.
        ranking: How often a right answer is more confident than a wrong one (AUROC), by measure.
        curve: All points, from nothing escalated to everything.
    """

    target: float
    measure: Measure
    chosen: Point | None
    sure: Point | None
    examples: int
    local_accuracy: float
    larger_accuracy: float | None
    ranking: dict[Measure, float | None]
    curve: tuple[Point, ...]


def calibrate(
    settings: EngineSettings,
    data: Path,
    target: float,
    larger: Escalation | None,
    kept: Path,
    progress: Progress,
) -> Calibration:
    """Answer the examples with the local model and draw the curve of accuracy against escalations.

    What is answered when something fails, or a person stops it, is not asked again by the next run.

    Args:
        settings: The local model.
        data: JSON lines: a chat request, or `prompt` for one message of the user, and `answer`: a text, an
            object (read as JSON), or a list of these of which any is right.
        target: Accuracy to reach, 0 to 1.
        larger: The larger model, to be measured too; where None, it is taken to be always right.
        kept: A file that every answer is added to as a line of JSON, to be deleted when the result is safe.
        progress: Told how many examples are done.

    Raises:
        BadInputError: The data cannot be read, or the engine or the larger model refuses an example.
    """
    examples = read_examples(data)
    asked = {"model": file_sha256(Path(settings.path)), "data": file_sha256(data), "context": settings.context}
    asked |= {"url": larger.url, "larger": larger.model} if larger else {}
    judged = asyncio.run(_judge(settings, examples, larger, asked, kept, progress))
    return choose(judged, target)


def _take_up(kept: Path, asked: dict[str, Any]) -> dict[int, Judged]:
    """Return what an earlier run was answered, by the examples' places, where it asked the same; else begin anew."""
    first, *lines = json_lines(kept) or [None]
    if first == asked:
        return {place: Judged(**judged) for place, judged in lines}
    kept.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    return {}


def read_examples(path: Path) -> list[Example]:
    """Read examples.

    Raises:
        BadInputError: A line is no example, or there are fewer than two.
    """
    examples = []
    for place, entry in json_values(path):
        try:
            examples.append(_example(entry, place))
        except (ValueError, TypeError, AttributeError, KeyError, RefusalError) as error:
            says = error.message if isinstance(error, RefusalError) else error
            raise BadInputError(
                f'{place}: no example ({says}). Write it like {{"prompt": "...", "answer": "..."}}'
            ) from None
    if len(examples) < 2:
        raise BadInputError(f"{path} has {len(examples)} examples. A threshold needs some dozens, better hundreds")
    return examples


def _example(line: dict[str, Any], place: str) -> Example:
    answer = line.pop("answer")
    # An object is what the model is to write; as a list it would be its names.
    answers = tuple(json.dumps(each) if isinstance(each, dict) else each for each in _alternatives(answer))
    if not answers or not all(isinstance(text, str) for text in answers):
        raise TypeError("`answer` is neither a text, nor an object, nor a list of these")
    if "prompt" in line:
        line["messages"] = [{"role": "user", "content": line.pop("prompt")}]
    return Example(parse(Chat, json.dumps({"temperature": 0, "max_tokens": 64} | line).encode()), answers, place)


def _alternatives(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


async def _judge(
    settings: EngineSettings,
    examples: Sequence[Example],
    larger: Escalation | None,
    asked: dict[str, Any],
    kept: Path,
    progress: Progress,
) -> list[Judged]:
    model, judged = LocalModel(settings, queue=len(examples)), {}

    async def one(place: int, example: Example) -> None:
        async with model.line.turn():
            body = example.asked.for_engine(model.ready.wraps_tools if model.ready else False, judged=True)
            try:
                answer = await model.answer("/v1/chat/completions", body)
            except RefusalError as error:
                raise BadInputError(f"The engine refuses {example.place}: {error.message}") from error
            theirs = await _theirs(example, larger, session) if larger else None
        judged[place] = Judged(
            {measure: confidence(answer, measure) for measure in MEASURES},
            is_right(_said(answer), example.answers),
            None if theirs is None else is_right(_said(theirs), example.answers),
        )
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps([place, asdict(judged[place])]) + "\n")
        progress(_WHAT, len(judged), len(examples))

    try:
        await model.start()
        if not model.ready.chats:
            raise BadInputError(f"{settings.path} has no chat template, so `serve` does not chat with it")
        judged |= _take_up(kept, asked)  # only now: a model that cannot be asked leaves what is there as it is
        left = [(place, example) for place, example in enumerate(examples) if place not in judged]
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for place, example in left:
                group.create_task(one(place, example))
        return [judged[place] for place in range(len(examples))]
    except ExceptionGroup as group:
        raise group.exceptions[0] from group
    finally:
        await model.stop()


async def _theirs(example: Example, larger: Escalation, session: aiohttp.ClientSession) -> Answer:
    try:
        return await ask_larger(example.asked.for_others(), larger, session)
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise BadInputError(f"The larger model did not answer {example.place}: {reason}") from error


def _said(answer: Answer) -> str:
    message = answer["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return json.dumps(calls[0]) if calls else message.get("content") or ""


def is_right(said: str, answers: Sequence[str]) -> bool:
    """Whether what was said is one of the answers: as JSON where both are, else but for case, spaces and marks."""
    return any(_same(said, answer) for answer in answers)


def _same(said: str, answer: str) -> bool:
    given, wanted = _canonical(said), _canonical(answer)
    # An object or a list is itself only where it is whole: to leave out brackets as marks would mend one cut off.
    if wanted and (given or wanted[0] in "{["):
        return given == wanted
    return bare(said) == bare(answer)


def _canonical(text: str) -> str | None:
    """Return JSON in one spelling, in which `1` is not `true`, and `1.0` is `1`; None of what is none."""

    def number(digits: str) -> float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        return json.dumps(json.loads(text, parse_float=number), sort_keys=True)
    except ValueError:
        return None


def choose(judged: Sequence[Judged], target: float) -> Calibration:
    """Draw the curve for each measure and choose the one that escalates least at the target."""
    curves = {measure: _curve(judged, measure) for measure in MEASURES}

    def first(points: Sequence[Point], reaches: Callable[[Point], bool]) -> Point | None:
        return next((point for point in points if reaches(point)), None)

    chosen = {measure: first(curves[measure], lambda point: point.accuracy >= target) for measure in MEASURES}
    ranking = {measure: _ranking(judged, measure) for measure in MEASURES}
    # Where both escalate the same share, the one that ranks better.
    measure = min(MEASURES, key=lambda m: (chosen[m].escalated if chosen[m] else 2, -(ranking[m] or 0)))
    larger = [one.larger_right for one in judged if one.larger_right is not None]
    return Calibration(
        target=target,
        measure=measure,
        chosen=chosen[measure],
        sure=first(curves[measure], lambda point: point.accuracy_interval[0] >= target),
        examples=len(judged),
        local_accuracy=sum(one.right for one in judged) / len(judged),
        larger_accuracy=sum(larger) / len(larger) if larger else None,
        ranking=ranking,
        curve=curves[measure],
    )


def _curve(judged: Sequence[Judged], measure: Measure) -> tuple[Point, ...]:
    """Return a point per distinct confidence, from nothing escalated to everything."""
    levels = sorted({one.confidence[measure] for one in judged})
    between = [_between(low, high) for low, high in pairwise(levels)]
    # A threshold of 1 would keep an answer whose every token was certain.
    return tuple(_point(judged, measure, threshold) for threshold in (0.0, *between, math.nextafter(levels[-1], 2)))


def _between(low: float, high: float) -> float:
    """Return the threshold of fewest decimals that keeps `high` and not `low`: a person copies it in full."""
    middle = (low + high) / 2
    return next((short for places in range(1, 17) if low < (short := round(middle, places)) <= high), high)


def _point(judged: Sequence[Judged], measure: Measure, threshold: float) -> Point:
    kept = [one.right for one in judged if one.confidence[measure] >= threshold]
    passed_on = [one.larger_right is not False for one in judged if one.confidence[measure] < threshold]
    right, count = sum(kept) + sum(passed_on), len(judged)
    return Point(
        threshold=threshold,
        escalated=len(passed_on) / count,
        accuracy=right / count,
        accuracy_interval=_ends_of_share(right, count),
        kept_accuracy=sum(kept) / len(kept) if kept else None,
        kept_interval=_ends_of_share(sum(kept), len(kept)) if kept else None,
    )


def is_calibration(path: Path) -> bool:
    """Return whether a file is what `calibrate` wrote."""
    try:
        return {"target", "curve"} <= set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def _ends_of_share(right: int, count: int) -> tuple[float, float]:
    share = wilson(right, count)
    return share.low, share.high


def _ranking(judged: Sequence[Judged], measure: Measure) -> float | None:
    """Return the share of pairs of a right and a wrong answer that confidence puts in order; ties count half."""
    from scipy.stats import mannwhitneyu

    right = [one.confidence[measure] for one in judged if one.right]
    wrong = [one.confidence[measure] for one in judged if not one.right]
    if not right or not wrong:
        return None
    return float(mannwhitneyu(right, wrong, method="asymptotic").statistic) / (len(right) * len(wrong))


def lines(found: Calibration) -> list[str]:
    """Say for a person what was found."""
    larger = "taken to be always right" if found.larger_accuracy is None else f"right in {found.larger_accuracy:.1%}"
    out = [
        f"{found.examples} examples: the local model is right in {found.local_accuracy:.1%}, the larger one {larger}",
        "",
        "escalated  threshold  accuracy of both     accuracy of what is kept",
    ]
    step = max(1, len(found.curve) // 12)
    for point in found.curve[::step]:
        kept = _percent(point.kept_accuracy, point.kept_interval)
        accuracy = _percent(point.accuracy, point.accuracy_interval)
        out.append(f"{point.escalated:8.1%}  {point.threshold:9.4f}  {accuracy:19}  {kept}")
    if found.chosen is None:
        return [*out, "", f"No threshold reaches {found.target:.1%}: the larger model is not right often enough"]
    out += ["", f"{found.target:.1%} is reached with {found.chosen.escalated:.1%} escalated:"]
    out.append(f"  --threshold {found.chosen.threshold} --confidence {found.measure}")
    if found.sure and found.sure != found.chosen:
        out.append(
            f"To be sure of it on other questions too (lower end of the interval), {found.sure.escalated:.1%}: "
            f"--threshold {found.sure.threshold} --confidence {found.measure}"
        )
    return out


def _percent(share: float | None, interval: tuple[float, float] | None) -> str:
    if share is None or interval is None:
        return "-"
    return f"{share:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"
