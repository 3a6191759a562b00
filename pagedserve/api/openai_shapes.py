"""Shapes that the OpenAI dialect's answers share: heads, choices, usage, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.answer import Answer, joined
from pagedserve.api.service import Service
from pagedserve.errors import (
    BusyError,
    DeadlineError,
    NotFoundError,
    PagedServeError,
    UnavailableError,
    shorten,
)
from pagedserve.text.deltas import Delta
from pagedserve.version import __version__

MAX_ERROR_BYTES = 4096
RETRY_AFTER_SECONDS = "2"


@dataclass(frozen=True)
class Head:
    """The fields that begin every answer and chunk."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def of(cls, service: Service, request: HttpRequest, prefix: str, object: str) -> Head:
        """A head for `request`, with the request's id as the tail of its own."""
        tail = request.scope["request_id"]
        return cls(f"{prefix}-{tail}", object, int(time.time()), service.model_name)

    def fields(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"pagedserve-{__version__}",
        }


def check_model(service: Service, model: str | None) -> None:
    """Raise NotFoundError unless `model` is the served one; None means that one."""
    if model is not None and model != service.model_name:
        raise NotFoundError(
            f"The model `{shorten(model, 128)}` does not exist. "
            f"This server serves `{service.model_name}`.",
            param="model",
        )


def usage_of(answer: Answer, n: int, *, count_output: bool = True) -> dict[str, Any]:
    """The usage of an answer with `n` choices a prompt; a prompt is counted once."""
    firsts = answer.sequences[::n]
    prompt = sum(sequence.num_prompt for sequence in firsts)
    written = sum(sequence.stream.num_tokens for sequence in answer.sequences) * count_output
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {
            "cached_tokens": sum(sequence.cached_tokens for sequence in firsts)
        },
    }


async def choices_of(
    answer: Answer, render: Callable[[int, Delta], Awaitable[dict[str, Any]]]
) -> list[msgspec.Raw]:
    """All choices of a whole answer, encoded; `render` gets each with its one Delta.

    Others have their turn between choices, and an answer that nobody waits for any more is not
    rendered to its end. Raises what the answer failed with.
    """
    rendered = []
    for index, pieces in enumerate(await answer.collect()):
        rendered.append(msgspec.Raw(msgspec.json.encode(await render(index, joined(pieces)))))
        await asyncio.sleep(0)
        answer.check()
    return rendered


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as a JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: PagedServeError) -> Response:
    """The error object with its status, below 4 KiB whatever it quotes."""
    body = msgspec.json.encode(error.body())
    if len(body) > MAX_ERROR_BYTES:  # characters that take six bytes each
        short = PagedServeError(shorten(error.message, 256), code=error.code)
        body = msgspec.json.encode({"error": short.body()["error"] | {"type": error.type}})
    response = Response(body, error.status, media_type="application/json")
    if isinstance(error, UnavailableError):
        response.headers["Retry-After"] = RETRY_AFTER_SECONDS
    if isinstance(error, BusyError):
        response.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, DeadlineError) and error.by_client:
        # OpenAI's clients try a 408 again by themselves; whoever set the time has no more of it.
        response.headers["X-Should-Retry"] = "false"
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
