"""API keys at the door: where there are any, whatever is asked for needs one, but for the probes.

    no key, a wrong one                 401
    a right one, too small a scope      403, by the route (`check_scope`)
    the routes of the probes            open: who asks has no key to give (kubelet, load balancer)
    no keys at all                      everybody is `anybody`

The rule is by exclusion: a path is open if it is exactly one of those, asked for with GET or HEAD.
What has no route at all is refused before that is found out.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from pagedserve.api.admission import Scope, Tenant
from pagedserve.api.keys import Keys
from pagedserve.api.openai_shapes import error_response
from pagedserve.errors import AuthenticationError, ForbiddenError

READING = ("GET", "HEAD")


class RequireKey:
    """ASGI middleware: `Authorization: Bearer <key>`, or a 401 of the OpenAI shape.

    Whose key it is goes on in the scope, as `tenant`; an open path may be asked for without.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, anybody: Tenant | None, open_paths: frozenset[str]
    ):
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._anybody = anybody

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served, and nothing else is let through
        tenant = self._anybody or self._tenant(scope)
        if tenant is not None:
            scope["tenant"] = tenant
        elif not (scope["method"] in READING and scope["path"] in self._open_paths):
            error = AuthenticationError(
                "a valid API key is needed: send the header Authorization: Bearer <key>"
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _tenant(self, scope: AsgiScope) -> Tenant | None:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # as it came over the wire
        return self._keys.tenant(given.encode("latin-1")) if scheme.lower() == "bearer" else None


def check_scope(request: HttpRequest, needs: Scope | None) -> None:
    """Raise ForbiddenError where the request's key has not the scope `needs`; None opens to all."""
    if needs is None:
        return
    tenant: Tenant = request.scope["tenant"]
    if needs not in tenant.scope:
        assert needs.name is not None, "a route needs one scope"
        raise ForbiddenError(
            f"this route wants a key with scope={needs.name.lower()}, and yours has not got it"
        )


def is_known(request: HttpRequest) -> bool:
    """Whether who asks has a key, or needs none; others learn from the probes what they must."""
    return "tenant" in request.scope
