"""The outermost layer: requests by whom none may come are refused, allowed web pages may read.

`callers.py` has the rules; this is how they are kept for every path, known or not.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedserve.api.callers import Callers
from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import RequestError

PREFLIGHT_SECONDS = "600"
SHOWN_HEADERS = "X-Request-Id, Retry-After, X-Should-Retry"


class CheckOrigin:
    """ASGI middleware: refuses by Host and Origin, answers preflights, lets allowed pages read."""

    def __init__(self, app: ASGIApp, callers: Callers, methods: Iterable[str]):
        self._app = app
        self._callers = callers
        self._methods = ", ".join(methods)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served, and nothing else is let through
        headers = Headers(scope=scope)
        try:
            self._callers.check_host(headers, scope["http_version"])
            origin = self._callers.check_origin(headers, scope["scheme"])
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if origin is None:
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await self._preflight(origin)(scope, receive, send)
        else:
            await self._app(scope, receive, readable_by(origin, send))

    def _preflight(self, origin: str) -> Response:
        """A browser sends no key with it, so it is answered before keys are asked for."""
        return Response(
            status_code=204,
            headers={
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Methods": self._methods,
                "Access-Control-Allow-Headers": "Authorization, *",  # the star leaves out that one
                "Access-Control-Max-Age": PREFLIGHT_SECONDS,
                "Vary": "Origin",
            },
        )


def readable_by(origin: str, send: Send) -> Send:
    """`send` with the headers that let pages of `origin` read the answer. Never with cookies."""

    async def outer(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = SHOWN_HEADERS
            headers.add_vary_header("Origin")
        await send(message)

    return outer
