"""What every HTTP request passes first: an id, a limit on its body, and the end of its connection.

All are plain ASGI middleware: they run for every chunk of every stream.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedserve.api.admission import Admission
from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import BodyTooLarge, DeadlineError

BODY_SECONDS = 120.0  # the longest body at a megabit a second
GOOD_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class RequestId:
    """Gives each request an id, the client's X-Request-Id where that is fit, and sends it back."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        await self._app(scope, receive, send_with_id)


class LastAnswer:
    """Makes every answer the last of its connection, once `ending()`: clients go elsewhere."""

    def __init__(self, app: ASGIApp, ending: Callable[[], bool]):
        self._app = app
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._ending():
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_last)


class BodyLimit:
    """Refuses a body past `max_bytes`: by its declared length, or as it streams in.

    Bodies count against `admission` until they are answered, or a stream begins, and have to come
    within BODY_SECONDS.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, admission: Admission):
        self._app = app
        self._max_bytes = max_bytes
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            response = error_response(self._error())
            response.headers["Connection"] = "close"  # the body is not read
            await response(scope, receive, send)
            return
        taken = held = 0
        whole = False
        until = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_counted() -> Message:
            nonlocal taken, held, whole
            message = await (receive() if whole else self._in_time(receive, until))
            size = len(message.get("body", b""))
            whole = not message.get("more_body", False)
            taken += size
            if taken > self._max_bytes:
                raise self._error()
            self._admission.hold_body(size)
            held += size
            return message

        def let_go() -> None:
            nonlocal held
            self._admission.release_body(held)
            held = 0

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                let_go()
            await send(message)

        try:
            await self._app(scope, receive_counted, send_noted)
        finally:
            let_go()

    async def _in_time(self, receive: Receive, until: float) -> Message:
        try:
            async with asyncio.timeout_at(until):
                return await receive()
        except TimeoutError as error:
            raise DeadlineError(
                f"the body did not come within {BODY_SECONDS:g} s",
                code="body_timeout",
                by_client=True,
            ) from error

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is longer than {self._max_bytes} bytes")
