"""The OpenAI dialect's requests: which fields there are, of which type, and what they come to.

Types are checked here; the limits of values in `request.py`. Every field is honoured, or without
effect on purpose (bookkeeping), or refused by name: nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import Request as HttpRequest

from pagedserve.api.json_shape import check_shape
from pagedserve.api.threads import in_thread_if
from pagedserve.errors import PagedServeError, RequestError, shorten
from pagedserve.limits import CEILING, Limits
from pagedserve.request import MAX_TOKENS, SamplingParams, check_number, check_within

Float = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[list[int], Field(fail_fast=True, max_length=CEILING.stop_token_ids)]
Name = Annotated[str, Field(max_length=1024)]
Priority = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]

MAX_INLINE_PARSE_BYTES = 256 << 10  # a few milliseconds of the event loop

# Accepted, documented, and without effect: they concern OpenAI's own storage and billing.
BOOKKEEPING = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
# Fields that OpenAI has and this server does not: the values that ask for nothing.
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {"best_of": (None, 1), "suffix": (None, "")}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False),  # says how tools are called; there are none
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "web_search_options": (None,),
    "verbosity": (None, "medium"),
    "moderation": (None,),
    "prompt_cache_retention": (None,),
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(BaseModel):
    """What completions and chat share. None, or a field left out, means the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: int | None = None
    min_p: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: Any = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: Any = None
    priority: Priority | None = None

    @property
    def include_usage(self) -> bool:
        """True when a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream(self) -> None:
        """Raise for stream options that have nothing to act on, or that are not offered."""
        if self.stream_options is None:
            return
        if not self.stream:
            raise RequestError(
                "stream_options is only allowed when stream is true", param="stream_options"
            )
        if self.stream_options.include_obfuscation:
            raise unsupported("stream_options.include_obfuscation")

    def params(self, defaults: Mapping[str, Any], limits: Limits, **settled: Any) -> SamplingParams:
        """The sampling parameters, with the model's `defaults` for what is left out.

        `settled` are those that the dialects name differently. Raises RequestError where what was
        given is past `limits`.
        """
        if self.stop is not None and not isinstance(self.stop, (str, list)):
            raise RequestError("stop must be a string or a list of strings", param="stop")
        # Those of the tokens are for who knows what fits: `service.check`.
        defaults = {name: value for name, value in defaults.items() if name != "min_tokens"}
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        check_within(given | settled, limits)
        return SamplingParams(**{**defaults, **given, **settled})


SAMPLING_FIELDS = SamplingFields.model_fields.keys() & set(SamplingParams.__struct_fields__)


class CompletionBody(SamplingFields):
    """`POST /v1/completions`. `prompt` is read by `openai_completions.read_prompts`."""

    prompt: Any
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(SamplingFields):
    """`POST /v1/chat/completions`. `messages` is read by `text.chat.check_messages`."""

    messages: Any
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def num_logprobs(self, limits: Limits) -> int | None:
        """`SamplingParams.logprobs` from OpenAI's pair of fields."""
        if self.top_logprobs is not None:
            check_number("top_logprobs", self.top_logprobs, int, 0, limits.logprobs)
            if not self.logprobs and self.top_logprobs > 0:
                raise RequestError(
                    "top_logprobs is only allowed when logprobs is true", param="top_logprobs"
                )
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        """The most tokens to write; None for what the context holds."""
        old, new = self.max_tokens, self.max_completion_tokens
        for name, value in (("max_tokens", old), ("max_completion_tokens", new)):
            if value is not None:
                check_number(name, value, int, 1, MAX_TOKENS)
        if old is not None and new is not None and old != new:
            raise RequestError(
                "give max_completion_tokens or max_tokens, not both", param="max_tokens"
            )
        return old if new is None else new


Body = TypeVar("Body", bound=SamplingFields)


async def read_body(
    request: HttpRequest,
    kind: type[Body],
    neutral: Mapping[str, tuple[Any, ...]],
    limits: Limits,
) -> Body:
    """The request's JSON as `kind`. Raises RequestError naming the first thing that is wrong."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":  # also keeps foreign web pages from posting here
        raise RequestError(
            "send the body as JSON, with the header Content-Type: application/json",
            code="unsupported_media_type",
        )
    body = await request.body()
    large = len(body) > MAX_INLINE_PARSE_BYTES
    return await in_thread_if(large, parsed, body, kind, neutral, limits)


def parsed(
    body: bytes, kind: type[Body], neutral: Mapping[str, tuple[Any, ...]], limits: Limits
) -> Body:
    """`body` as `kind`; see `read_body`."""
    check_shape(body, limits)
    try:
        fields = from_json(body, cache_strings="none")
    except ValueError as error:
        raise RequestError(f"the body is no valid JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return checked(fields, kind, neutral)


def checked(
    fields: dict[str, Any], kind: type[Body], neutral: Mapping[str, tuple[Any, ...]]
) -> Body:
    """`fields` as `kind`; see `read_body`."""
    known = kind.model_fields
    wanted: dict[str, Any] = {}
    for name, value in fields.items():
        if name in known:
            wanted[name] = value
        elif name in neutral:
            # bool first: 1 == True, and a flag is no number
            if not any(type(value) is type(same) and value == same for same in neutral[name]):
                raise unsupported(name)
        elif name not in BOOKKEEPING:
            short = shorten(name, 64)
            raise RequestError(
                f"there is no parameter {short!r}", param=short, code="unknown_parameter"
            )
    try:
        body = kind.model_validate(wanted)
    except ValidationError as error:
        raise first_error(error) from error
    body.check_stream()
    return body


def unsupported(name: str) -> RequestError:
    """The error for a parameter that this server does not honour."""
    return RequestError(
        f"{name} is not supported by this server", param=name, code="unsupported_parameter"
    )


def first_error(error: ValidationError) -> PagedServeError:
    """The first of pydantic's errors, with the path of the field that it is about."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = shorten(".".join(map(str, found["loc"])), 64)
    if found["type"] == "missing":
        return RequestError(f"{path} is missing", param=path, code="missing_required_parameter")
    if found["type"] == "extra_forbidden":
        return RequestError(f"there is no parameter {path}", param=path, code="unknown_parameter")
    return RequestError(f"{path}: {found['msg']}", param=path, code="invalid_type")
