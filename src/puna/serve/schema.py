"""The bodies of requests: what is understood, what is ignored, what is refused.

A field that this server does not know is refused, so that nobody believes it had an effect. Fields
that only label a request are ignored, and fields of features it lacks are accepted only with the
value that means "not used".
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from puna.serve.errors import ApiError

IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
"""Labels and hints; they never change the answer."""
UNUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Features this server lacks, and the values that ask for nothing."""
_UNUSED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": ("",),
    "refusal": (),
    "tool_calls": ([],),
}
MAX_LOGPROBS = 20
_MAX_STOPS = 16
_MAX_STOP_CHARS = 256
_PROMPT_KINDS = "give a string, a list of strings, a list of token ids, or a list of such lists"


def _prompts(value: Any) -> list[Any]:
    """Turn any of the four kinds of prompts into a list of strings or of lists of ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(
            isinstance(item, list) and item and all(type(id_) is int for id_ in item)
            for item in value
        ):
            return value
    raise ValueError(_PROMPT_KINDS)


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    min_p: float = Field(default=0.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=128)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopText], BeforeValidator(_texts)] = Field(
        default_factory=list, max_length=_MAX_STOPS
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_k: int = Field(default=0, ge=-1)
    top_p: float = Field(default=1.0, gt=0, le=1)


class CompletionBody(Body):
    """The body of ``/v1/completions``."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    best_of: int | None = Field(default=None, ge=1)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int = Field(default=16, ge=0, lt=2**31)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)]
    tool_call_id: str | None = None

    def to_message(self) -> dict[str, str]:
        """Return the turn as the tokenizer takes it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatBody(Body):
    """The body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool = False
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Read the body of a request.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _load(data)
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [
            _used(message, _UNUSED_IN_MESSAGE, f"messages.{number}.")
            if isinstance(message, dict)
            else message
            for number, message in enumerate(fields["messages"])
        ]
    known = _used(fields, UNUSED, "")
    known = {name: value for name, value in known.items() if name not in IGNORED}
    try:
        body = kind.model_validate(known)
    except ValidationError as error:
        _refuse(kind, error)
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options: only allowed with stream", param="stream_options",
            code="invalid_value",
        )  # fmt: skip
    _check_together(body)
    return body


def _check_together(body: Body) -> None:
    """Check what only several fields together can get wrong."""
    if isinstance(body, CompletionBody):
        if body.best_of not in (None, body.n):
            raise _unsupported("best_of", body.best_of, "leave it out, or give the value of n")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(
                400, "max_tokens: 0 is only allowed with echo", param="max_tokens",
                code="invalid_value",
            )  # fmt: skip
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            400, "top_logprobs: only allowed with logprobs", param="top_logprobs",
            code="invalid_value",
        )  # fmt: skip


def _load(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        detail = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {detail}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _used(fields: dict[str, Any], unused: dict[str, tuple[Any, ...]], where: str) -> dict[str, Any]:
    """Leave out nulls, which mean the default, and unused features; refuse used ones."""
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in unused:
            kept[name] = value
        elif value not in unused[name]:
            raise _unsupported(where + name, value, "leave it out")
    return kept


def _unsupported(name: str, value: Any, fix: str) -> ApiError:
    return ApiError(
        400, f"{name}: not supported by this server (given: {_short(value)}); {fix}", param=name,
        code="unsupported_parameter",
    )  # fmt: skip


def _refuse(kind: type[Body], error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        raise ApiError(400, f"{param}: missing", param=param, code="missing_parameter") from error
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, kind.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ApiError(
            400, f"{param}: unknown field{hint}", param=param, code="unknown_parameter"
        ) from error
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    raise ApiError(
        400, f"{param}: {message} (given: {_short(first['input'])})", param=param,
        code="invalid_value",
    ) from error  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, str | list | dict) and len(value) > 40:
        if isinstance(value, str):
            return json.dumps(value[:40]) + "..."
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
