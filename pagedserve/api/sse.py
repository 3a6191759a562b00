"""How a stream is framed: server-sent events, one JSON chunk each.

    chat      role chunk · content chunks · finish chunk · [usage chunk] · [DONE]
    text      text chunks · finish chunk · [usage chunk] · [DONE]
    trouble   … · data: {"error": …} · [DONE]
    silence   a comment every 15 s, so that proxies keep the connection

What does not change within a stream is rendered once; a token is spliced in as bytes. When a reader
lags, the chunks that wait go out in few writes; between these other streams have their turn.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagedserve.api.answer import Answer, ClientGone, reading
from pagedserve.errors import PagedServeError
from pagedserve.text.deltas import Delta

log = logging.getLogger("pagedserve")

KEEP_ALIVE_SECONDS = 15.0
DELTAS_A_WRITE = 64  # with log-probabilities of 20 tokens, a few milliseconds of rendering
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.encode


class Envelope:
    """What is the same in every chunk of a stream.

    `head` holds the fields before `choices`. With `usage`, every chunk but the last says
    `"usage": null`, as OpenAI's do.
    """

    def __init__(self, head: dict[str, Any], *, usage: bool):
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """A chunk with one choice."""
        return self._head + encode(choice) + self._tail

    def around_text(self, choice: dict[str, Any], mark: str) -> tuple[bytes, bytes]:
        """The bytes before and after the text that stands where `choice` has the string `mark`."""
        before, after = encode(choice).split(encode(mark))
        return self._head + before, after + self._tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that carries the usage."""
        return self._head + b'],"usage":' + encode(usage) + b"}\n\n"


class Events(Protocol):
    """What a dialect writes for an answer."""

    def begin(self) -> bytes:
        """What goes out at once."""

    async def delta(self, index: int, delta: Delta) -> bytes:
        """The chunks of one Delta; empty where it has nothing to show."""

    def end(self) -> bytes:
        """What follows the last Delta, before [DONE]."""


class EventStream(Response):
    """Writes an answer as it comes. A disconnect aborts it."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: Events):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer = answer
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        async with reading(self._answer, receive):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await self._write(send)
            except ClientGone:
                return
            except Exception as error:
                await send_part(send, error_event(error))
            await send_part(send, DONE, more=False)

    async def _write(self, send: Send) -> None:
        answer, events = self._answer, self._events
        if first := events.begin():
            await send_part(send, first)
        while not answer.exhausted:
            waiting = await answer.next(KEEP_ALIVE_SECONDS)
            if not waiting:
                await send_part(send, KEEP_ALIVE)
            for start in range(0, len(waiting), DELTAS_A_WRITE):
                if start:
                    await asyncio.sleep(0)
                some = waiting[start : start + DELTAS_A_WRITE]
                parts = [await events.delta(index, delta) for index, delta in some]
                if body := b"".join(parts):
                    await send_part(send, body)
        if last := events.end():
            await send_part(send, last)


def error_event(error: Exception) -> bytes:
    """The event that tells a client what went wrong after the status was sent."""
    if not isinstance(error, PagedServeError):
        log.error("a stream failed", exc_info=error)
        error = PagedServeError("the server failed while it wrote this answer")
    return b"data: " + encode(error.body()) + b"\n\n"


async def send_part(send: Send, body: bytes, *, more: bool = True) -> None:
    """Write `body`; waits while the client reads more slowly than we write."""
    await send({"type": "http.response.body", "body": body, "more_body": more})
