"""Errors as OpenAI's clients read them."""

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)  # not frozen: Python writes the traceback into it
class RefusalError(Exception):
    """A request that is not answered.

    Attributes:
        status: Of HTTP.
        message: What is wrong and what to do, for a person.
        code: For a program, such as `context_length_exceeded`.
        param: The field of the request that is wrong.
        headers: To send along.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the refusal in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


# An embedding is read in one batch of the engine's.
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large to process.*current batch size: (\d+)")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def from_engine(status: int, answer: Any, context: int, param: str = "messages") -> RefusalError:
    """Word a refusal of the engine's.

    Args:
        status: The engine's.
        answer: Its body, parsed; anything if it was not JSON.
        context: Tokens that one request may take, for the message.
        param: Where the prompt is in the request.
    """
    error = answer.get("error") if isinstance(answer, dict) else None
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or "The engine refuses the request")
    if error.get("type") == "exceed_context_size_error":
        return RefusalError(
            400,
            f"This model's maximum context length is {context} tokens, but the prompt takes "
            f"{error.get('n_prompt_tokens', 'more')}. Shorten it, or serve with a larger --context",
            code="context_length_exceeded",
            param=param,
        )
    if too_large := _TOO_LARGE.search(message):
        return RefusalError(
            400,
            f"An embedding takes at most {too_large[2]} tokens here, but the text has {too_large[1]}. Cut it",
            code="context_length_exceeded",
            param=param,
        )
    # The engine calls some bad input an error of its own; a dead or broken engine has no such message.
    bad_input = any(words in message for words in ("Failed to parse", "json.exception"))
    return RefusalError(400 if bad_input or status < 500 else 500, message, code=None if status < 500 else "engine")
