"""API keys: where there are any, every route needs one but the probes."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pagedserve.api.health import OPEN_PATHS
from pagedserve.api.keys import Keys
from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import AuthenticationError


class RequireKey:
    """ASGI middleware: `Authorization: Bearer <key>`, or a 401 of the OpenAI shape.

    Whose key it is goes on in the scope, as `tenant`.
    """

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app = app
        self._keys = keys

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
        # as it came over the wire
        tenant = self._keys.tenant(given.encode("latin-1")) if scheme.lower() == "bearer" else None
        if tenant is None:
            return False
        scope["tenant"] = tenant
        return True
