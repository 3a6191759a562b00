"""The door of the routes that compute: whose request it is, how long it may take, and the quotas.

    RequireKey ─▶ BodyLimit ─▶ Door (enter … leave) ─▶ route ─▶ service.submit (admit)

It is plain ASGI middleware, so that a request leaves when its last byte is written or its client is
gone, however its handler ended: a stream is open until then.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from pagedserve.api.admission import Tenant, Visit
from pagedserve.api.deadlines import HEADER, Deadlines
from pagedserve.api.openai_shapes import error_response
from pagedserve.api.service import Service
from pagedserve.errors import PagedServeError


class Door:
    """Lets POST requests in, or answers 429 or 400; `visit_of` finds the Visit."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        admission = self._service.admission
        tenant: Tenant = scope["tenant"]
        try:
            deadlines = Deadlines.of(
                self._service.config.server, Headers(scope=scope).get(HEADER), time.monotonic()
            )
            admission.check_room(tenant)  # before the body is read and tokenised
            admission.enter(tenant)
        except PagedServeError as error:
            await error_response(error)(scope, receive, send)
            return
        scope["visit"] = Visit(tenant, deadlines)
        try:
            await self._app(scope, receive, send)
        finally:
            admission.leave(tenant)


def visit_of(request: HttpRequest) -> Visit:
    """What the door made of `request`."""
    visit: Visit = request.scope["visit"]
    return visit
