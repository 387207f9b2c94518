"""Answers in OpenAI's shapes: chunks put together into one, and one taken apart into chunks."""

import json
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

Answer = dict[str, Any]  # a chat completion or a text completion, as JSON has it


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    """Yield the objects of a server-sent stream that arrives in arbitrary pieces of bytes."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith((b"data: {", b"error: {")):
                yield json.loads(line.partition(b": ")[2])


async def assemble(pieces: AsyncIterator[bytes], chat: bool) -> Answer:
    """Put a stream of the engine's together into what it would have said in one.

    The engine is always asked for a stream, because only a stream that is closed stops it.

    Args:
        pieces: The stream; an `error` in it is returned as it is.
        chat: Whether it is a chat completion; a text completion otherwise.
    """
    answer: Answer = {}
    text, tokens, calls, finish_reason = [], [], [], None
    async for event in events(pieces):
        if "error" in event or "code" in event:
            return event if "error" in event else {"error": event}
        answer |= {name: event[name] for name in event if name != "choices"}
        for choice in event["choices"]:
            delta = choice.get("delta", choice)
            text.append(delta.get("content" if chat else "text") or "")
            tokens += (choice.get("logprobs") or {}).get("content") or []
            for call in delta.get("tool_calls") or ():
                _add_call(calls, call)
            finish_reason = choice["finish_reason"] or finish_reason
    said: dict[str, Any] = {"text": "".join(text)}
    if chat:
        said = {"message": {"role": "assistant", "content": "".join(text) or (None if calls else "")}}
        if calls:
            said["message"]["tool_calls"] = calls
    logprobs = {"content": tokens} if tokens else None
    choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish_reason}
    kind = "chat.completion" if chat else "text_completion"
    return answer | {"object": kind, "choices": [choice]}


def _add_call(calls: list[dict], piece: dict) -> None:
    """Add a piece of a tool call to the calls so far."""
    if piece["index"] == len(calls):
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[piece["index"]]
    call["id"] = piece.get("id") or call["id"]
    for name, more in piece.get("function", {}).items():
        call["function"][name] += more


def trimmed(answer: Answer, alternatives: int) -> Answer:
    """Take from each token of an answer, or of a piece of one, all alternatives but the likeliest few."""
    for choice in answer["choices"]:
        for token in (choice.get("logprobs") or {}).get("content") or ():
            del token["top_logprobs"][alternatives:]
    return answer


def legacy_logprobs(answer: Answer, offset: int = 0) -> Answer:
    """Give a text completion, or what begins at `offset` of one, the logprobs of its own API: lists side by side."""
    for choice in answer["choices"]:
        if choice.get("logprobs"):
            tokens, offsets = choice["logprobs"]["content"], []
            for token in tokens:
                offsets.append(offset)
                offset += len(token["token"])
            choice["logprobs"] = {
                "tokens": [token["token"] for token in tokens],
                "token_logprobs": [token["logprob"] for token in tokens],
                "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
                "text_offset": offsets,
            }
    return answer


def chunks(answer: Answer, include_usage: bool) -> Iterator[bytes]:
    """Yield a finished chat completion as the stream that it would have been, in few pieces."""
    (choice,) = answer["choices"]
    shared = {
        name: answer[name] for name in answer if name not in ("choices", "usage", "object", "pocketlm", "timings")
    }
    shared["object"] = "chat.completion.chunk"

    def chunk(delta: dict, finish_reason: str | None = None, **more: Any) -> bytes:
        one = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return event_bytes(shared | {"choices": [one]} | more)

    message = choice["message"]
    yield chunk({"role": "assistant", "content": ""})
    if message.get("content"):
        said = {"index": 0, "delta": {"content": message["content"]}, "finish_reason": None}
        yield event_bytes(shared | {"choices": [said | {"logprobs": choice.get("logprobs")}]})
    if message.get("tool_calls"):
        yield chunk({"tool_calls": [{"index": i} | call for i, call in enumerate(message["tool_calls"])]})
    last = {name: answer[name] for name in ("pocketlm", "timings") if name in answer}
    yield chunk({}, choice.get("finish_reason") or "stop", **last)
    if include_usage:
        yield event_bytes(shared | {"choices": [], "usage": answer.get("usage")})
    yield b"data: [DONE]\n\n"


def event_bytes(data: dict) -> bytes:
    """Return an object as one event of a stream."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode(errors="replace") + b"\n\n"  # half a character has no bytes


def confidence(answer: Answer, measure: str) -> float:
    """Return how sure the model was of its answer, between 0 and 1.

    Args:
        answer: A completion with the logprobs of its tokens.
        measure: `mean` is the geometric mean of the probabilities of its tokens, exp(mean log p); `min` is the
            probability of its least likely token, which does not sink or rise with the answer's length.
    """
    tokens = (answer["choices"][0].get("logprobs") or {}).get("content") or []
    logs = [token["logprob"] for token in tokens]
    if not logs:
        return 0.0
    return math.exp(min(logs) if measure == "min" else sum(logs) / len(logs))
