"""The routes, and what every request passes through.

RequestId ─▶ LastAnswer ─▶ CheckOrigin ─▶ RequireKey ─▶ BodyLimit ─▶ Door ─▶ route
                                                                               │
             an error of errors.py becomes its OpenAI object ◀─ handler(service, request)

The first two only add to the answer's head. The next two let nothing through that they do not know
to be allowed, whatever its path; every route says here which scope of a key it wants.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api import health, openai_models
from pagedserve.api.admission import Scope
from pagedserve.api.answer import ClientGone
from pagedserve.api.auth import RequireKey, check_scope
from pagedserve.api.door import Door
from pagedserve.api.gate import Gate
from pagedserve.api.limits import BodyLimit, LastAnswer, RequestId
from pagedserve.api.openai_chat import create_chat_completion
from pagedserve.api.openai_completions import create_completion
from pagedserve.api.openai_shapes import error_response
from pagedserve.api.origins import CheckOrigin
from pagedserve.api.service import Service
from pagedserve.errors import NotFoundError, PagedServeError, RequestError
from pagedserve.version import __version__

log = logging.getLogger("pagedserve")

METHODS = {"GET": ["GET", "HEAD"], "POST": ["POST"]}

Handler = Callable[[Service, HttpRequest], Awaitable[Response]]

# A GET changes nothing; what changes the server, and not only computes an answer, wants ADMIN.
# The scope None is for probes: they are open to whoever has no key, and then say the phase only.
ROUTES: list[tuple[str, str, Scope | None, Handler]] = [
    ("POST", "/v1/completions", Scope.USE, create_completion),
    ("POST", "/v1/chat/completions", Scope.USE, create_chat_completion),
    ("GET", "/v1/models", Scope.USE, openai_models.list_models),
    ("GET", "/v1/models/{id:path}", Scope.USE, openai_models.get_model),
    ("GET", "/health", None, health.health),
    ("GET", "/livez", None, health.livez),
    ("GET", "/readyz", None, health.readyz),
    ("GET", "/startupz", None, health.startupz),
    ("GET", "/version", Scope.USE, health.version),
    ("GET", "/metrics", Scope.METRICS, health.metrics),
]


def build_app(service: Service, gate: Gate) -> FastAPI:
    """The application over `service`, for those whom `gate` lets through."""
    app = FastAPI(
        title="pagedserve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # an answer to one path is none to another
    )
    for method, path, needs, handler in ROUTES:
        app.add_api_route(
            path, bound(handler, service, needs), methods=METHODS[method], response_model=None
        )
    app.add_exception_handler(PagedServeError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
    # The last added is the first to see a request.
    app.add_middleware(Door, service=service)
    max_bytes = service.config.server.max_body_bytes
    app.add_middleware(BodyLimit, max_bytes=max_bytes, admission=service.admission)
    service.admission.tenants = lambda: gate.keys.tenants
    open_paths = frozenset(path for _, path, needs, _ in ROUTES if needs is None)
    app.add_middleware(RequireKey, keys=gate.keys, anybody=gate.anybody, open_paths=open_paths)
    methods = dict.fromkeys(name for method, *_ in ROUTES for name in METHODS[method])
    app.add_middleware(CheckOrigin, callers=gate.callers, methods=methods)
    app.add_middleware(LastAnswer, ending=lambda: service.draining or service.failure.done())
    app.add_middleware(RequestId)
    return app


def bound(
    handler: Handler, service: Service, needs: Scope | None
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """`handler` as FastAPI calls it, for who has a key with the scope that it `needs`."""

    async def endpoint(request: HttpRequest) -> Response:
        check_scope(request, needs)
        return await handler(service, request)

    endpoint.__name__ = getattr(handler, "__name__", "endpoint")
    return endpoint


async def on_error(request: HttpRequest, error: Exception) -> Response:
    """An error of ours knows its status and its body."""
    assert isinstance(error, PagedServeError)
    return error_response(error)


async def on_http_error(request: HttpRequest, error: Exception) -> Response:
    """The router's own: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFoundError("there is no such route", code="not_found"))
    refused = RequestError(str(error.detail), code="http_error")
    refused.status = error.status_code
    response = error_response(refused)
    response.headers.update(error.headers or {})
    return response


async def on_client_gone(request: HttpRequest, error: Exception) -> Response:
    """Nobody reads this; the status is for the access log."""
    return Response(status_code=499)


async def on_bug(request: HttpRequest, error: Exception) -> Response:
    """A bug of ours: the client learns just that; the framework logs the traceback."""
    return error_response(PagedServeError("the server failed on this request", code="internal"))
