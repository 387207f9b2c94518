"""Answers that the small model is unsure of go to a larger one, wherever an OpenAI-compatible endpoint is."""

import os
import sys
from dataclasses import dataclass
from typing import Any

import aiohttp

from pocketlm.run.server.answers import Answer, confidence, trimmed
from pocketlm.run.server.requests import Chat

KEY_VARIABLE = "POCKETLM_ESCALATE_KEY"


@dataclass(frozen=True, slots=True)
class Escalation:
    """When to ask whom.

    Attributes:
        url: Of the larger model's API, such as `https://example.org/v1`.
        model: Its name there.
        threshold: Answers with a confidence below it are not trusted.
        measure: How confidence is read from the tokens' probabilities: `mean` or `min`.
        timeout: Seconds the larger model may take.
    """

    url: str
    model: str
    threshold: float
    measure: str = "mean"
    timeout: float = 30.0


async def better(answer: Answer, asked: Chat, escalation: Escalation, session: aiohttp.ClientSession) -> Answer:
    """Return the larger model's answer where the local one is not sure enough; the local one in any other case.

    Args:
        answer: The local model's answer, with the logprobs of its tokens.
        asked: What the client asked.
        escalation: When to ask whom.
        session: To ask with.

    Returns:
        The answer with a field `pocketlm`: `answered_by`, `confidence` (of the local answer), `escalated`, and
        `escalation_failed` with the reason where the larger model should have answered but did not.
    """
    mark: dict[str, Any] = {"answered_by": answer["model"], "confidence": confidence(answer, escalation.measure)}
    mark["escalated"] = mark["confidence"] < escalation.threshold
    if asked.alternatives is None:
        answer["choices"][0]["logprobs"] = None
    else:
        answer = trimmed(answer, asked.alternatives)
    if mark["escalated"]:
        try:
            answer = await ask_larger(asked.for_others(), escalation, session)
            mark["answered_by"] = escalation.model
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            sys.stderr.write(f"pocketlm: {escalation.model} did not answer: {str(error) or type(error).__name__}\n")
            mark["escalation_failed"] = _reason(error)
    return answer | {"pocketlm": mark}


def _reason(error: Exception) -> str:
    """Return what a client is told: nothing of where the larger model is."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the larger model refused with status {error.status}"
    if isinstance(error, TimeoutError):
        return "the larger model took too long"
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return "the larger model cannot be reached"
    return str(error)


async def ask_larger(body: dict, escalation: Escalation, session: aiohttp.ClientSession) -> Answer:
    """Ask the larger model; the key is taken from the environment variable POCKETLM_ESCALATE_KEY.

    Raises:
        TimeoutError: It took too long.
        aiohttp.ClientError: It cannot be reached, or refuses.
        ValueError: What it says is no chat completion.
    """
    key = os.environ.get(KEY_VARIABLE)
    async with session.post(
        f"{escalation.url.rstrip('/')}/chat/completions",
        json=body | {"model": escalation.model, "stream": False},
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=aiohttp.ClientTimeout(total=escalation.timeout),
        raise_for_status=True,
    ) as response:
        try:
            answer = await response.json(content_type=None)
            _check(answer)
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError("The larger model's answer is no chat completion") from error
    return answer


def _check(answer: Any) -> None:
    """See that an answer has all that is read of one; one that has not raises whatever reading it does."""
    (choice,) = answer["choices"]
    message, usage = choice["message"], answer.get("usage") or {}
    calls = message.get("tool_calls")
    said = isinstance(message.get("content"), str) or isinstance(calls, list)
    named = all(isinstance(call["function"], dict) for call in calls or ())
    counted = all((usage.get(name) or 0) >= 0 for name in ("prompt_tokens", "completion_tokens"))
    if not (said and named and counted):
        raise TypeError
