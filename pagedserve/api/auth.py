"""API keys: with one set, every route needs it but the probes."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pagedserve.api.health import OPEN_PATHS
from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import AuthenticationError


class RequireKey:
    """ASGI middleware: `Authorization: Bearer <key>`, or a 401 of the OpenAI shape."""

    def __init__(self, app: ASGIApp, key: str):
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = AuthenticationError(
            "a valid API key is needed: send the header Authorization: Bearer <key>"
        )
        await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Constant time: how much of a guess was right must not show in how long the answer took.
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.encode("latin-1"),
            self._key,  # as it came over the wire
        )
