"""What clients may ask, checked before the engine sees it.

The fields are those of OpenAI's API and some of llama.cpp's samplers. What is not known is refused by name: a
field that is silently dropped is a wrong answer. An empty one asks for nothing.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from pocketlm.run.chat import SEEDS
from pocketlm.run.server.refusals import RefusalError

_Text = Annotated[str, Field(min_length=1)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
# A list ends at its first wrong item: to word a million errors takes many seconds, in which nobody else is served.
_First = Field(fail_fast=True)
_Tokens = Annotated[list[_Token], Field(min_length=1), _First]
# What says who asks or how a bill is made; it changes no answer.
_WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
_NOT_THE_ENGINES = ("model", "stream_options", "n", "best_of", "echo", "suffix", "max_completion_tokens", "modalities")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, asked: Any) -> Any:
        if not isinstance(asked, dict):
            return asked
        known = {field.alias or name for name, field in cls.model_fields.items()}
        # OpenAI's client sends back what it has read, with all that is empty there: annotations, audio, function_call.
        return {
            name: value
            for name, value in asked.items()
            if name in known or not (name in _WITHOUT_EFFECT or value in (None, "", [], {}))
        }


Kind = TypeVar("Kind", bound=BaseModel)


class StreamOptions(_Strict):
    """What a stream carries beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(_Strict):
    """What all requests for text have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16), _First] | None = None
    n: Literal[1] | None = None

    def for_engine(self) -> dict[str, Any]:
        """Return the request as the engine takes it, without what is not meant for it."""
        asked = self.model_dump(exclude_none=True, exclude={*_NOT_THE_ENGINES})
        if self.seed is not None:
            asked["seed"] = self.seed % SEEDS
            # A prompt read from the cache rounds differently from one read afresh.
            asked["cache_prompt"] = False
        return asked


class TextPart(_Strict):
    """A piece of a message; the models served here read nothing but text."""

    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    """What the model called earlier."""

    name: _Text
    arguments: str


class ToolCall(_Strict):
    """A call that the model made earlier."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], _First] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], _First] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("content", "`content` is missing")
        return self

    def for_engine(self) -> dict[str, Any]:
        """Return the message with its text in one piece."""
        turn = self.model_dump(exclude_none=True, exclude={"name", "refusal"})
        turn["role"] = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            turn["content"] = "".join(part.text for part in self.content)
        return turn


class Function(_Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    """The name of a function."""

    name: _Text


class ToolChoice(_Strict):
    """The one tool that must be used."""

    type: Literal["function"]
    function: FunctionName


class Schema(_Strict):
    """A JSON schema and its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What shape the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("schema", "`json_schema` belongs to the type json_schema, and only there")
        return self


class Chat(Request):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1), _First]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128), _First] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], _First] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "`top_logprobs` needs `logprobs`: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise PydanticCustomError("tools", "`tool_choice` needs `tools`")
        if isinstance(self.tool_choice, ToolChoice) and not self._chosen_tools():
            raise PydanticCustomError("tools", "`tool_choice` names a function that is not among `tools`")
        return self

    def _chosen_tools(self) -> list[Tool]:
        tools = self.tools or []
        if isinstance(self.tool_choice, ToolChoice):
            return [tool for tool in tools if tool.function.name == self.tool_choice.function.name]
        return tools

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens the answer names beside each of its own; None where it says no probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None

    def for_engine(self, wraps_tools: bool = False, judged: bool = False) -> dict[str, Any]:
        """Return the request as the engine takes it.

        Args:
            wraps_tools: Whether the model is told of tools in pocketlm's words (`tools.jinja`).
            judged: Whether the answer's confidence is to be read: then the probabilities of its tokens are wanted even
                if the client wants none, and its tokens are the likeliest unless the client says a temperature, as
                when the threshold was calibrated. Drawn ones are less likely.
        """
        asked = super().for_engine() | {"messages": [message.for_engine() for message in self.messages]}
        if self.logprobs or judged:
            # For no number the engine looks up 20 alternatives to each token, for 0 it says no probability at all.
            asked |= {"logprobs": True, "top_logprobs": self.top_logprobs or 1}
        if judged:
            asked.setdefault("temperature", 0)
        if self.max_completion_tokens is not None:
            asked["max_tokens"] = self.max_completion_tokens
        if self.response_format:
            asked["response_format"] = self.response_format.model_dump(exclude_none=True, by_alias=True)
        if self.tools:
            asked["tools"] = [tool.model_dump(exclude_none=True) for tool in self._chosen_tools()]
            must = self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)
            asked.setdefault("parallel_tool_calls", False)
            asked["tool_choice"] = "required" if must else self.tool_choice or "auto"
            if must and wraps_tools:
                # The engine's grammar would let a small model talk for ever before it calls.
                asked["messages"].append({"role": "assistant", "content": "<tool_call>\n"})
        return asked

    def for_others(self) -> dict[str, Any]:
        """Return the request as any OpenAI-compatible endpoint takes it, without a model.

        Samplers that OpenAI does not have stay here, and so does `logit_bias`: its tokens are the local model's.
        """
        ours = {"model", "stream", "stream_options", "top_k", "min_p", "repeat_penalty", "logit_bias"}
        return self.model_dump(exclude_none=True, exclude=ours, by_alias=True)


class Completion(Request):
    """A request to `/v1/completions`."""

    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, max_length=1), _First]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=1), _First]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens the answer names beside each of its own; None where it says no probabilities."""
        return self.logprobs

    def for_engine(self) -> dict[str, Any]:
        """Return the request as the engine takes it."""
        asked = super().for_engine()
        if self.logprobs == 0:
            asked["logprobs"] = 1  # for 0 the engine says no probability at all
        if self.prompt in ("", [""]):
            raise RefusalError(400, "`prompt` is empty", param="prompt")
        return {"max_tokens": 16} | asked  # OpenAI's default of this route


class Embedding(_Strict):
    """A request to `/v1/embeddings`."""

    model: str | None = None
    input: (
        _Text
        | _Tokens
        | Annotated[list[_Text], Field(min_length=1, max_length=2048), _First]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=2048), _First]
    )
    encoding_format: Literal["float", "base64"] | None = None

    def inputs(self) -> list[str] | list[list[int]]:
        """Return the texts, or lists of tokens, one for each embedding."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else self.input


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Read a request.

    Raises:
        RefusalError: It is no JSON, or not what the route takes.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, body) from None


def _refusal(error: ValidationError, body: bytes) -> RefusalError:
    """Say what is wrong; of a union, what the alternative says that fits the input best."""
    errors = error.errors(include_url=False, include_context=False)[:100]  # of so many, any is as good
    if not errors[0]["loc"]:  # perhaps no JSON at all
        return RefusalError(400, f"The request is not what this route takes: {errors[0]['msg']}")
    asked = from_json(body)
    said, field = max(((each, _field(each, asked)) for each in errors), key=lambda pair: _fits(*pair))
    name = ".".join(field)
    if said["type"] == "extra_forbidden":
        return RefusalError(400, f"Unrecognized request argument supplied: {name}", param=name)
    return RefusalError(400, f"Invalid value for `{name}`: {said['msg']}", param=name)


def _field(error: ErrorDetails, asked: Any) -> list[str]:
    """Return where in a request an error is, without the names of the alternatives that pydantic has tried."""
    field = []
    for part in error["loc"]:
        if (isinstance(asked, dict) and part in asked) or (isinstance(asked, list) and isinstance(part, int)):
            field.append(str(part))
            asked = asked[part]
    return [*field, str(error["loc"][-1])] if error["type"] == "missing" else field


def _fits(error: ErrorDetails, field: list[str]) -> tuple[bool, int]:
    """Rank an error by how well its alternative fits: its kind is right, and so is all on the way to the error."""
    kind, given = error["type"], error["input"]
    other_kind = kind.endswith("_type") or (kind == "literal_error" and not isinstance(given, str))
    return not other_kind, len(field)
