"""Probes, and what is said about the server itself.

    /livez     200 while the process works, also while it loads, drains or restarts its engine;
               503 once the engine is dead and stays so
    /startupz  200 once the model has been loaded; 503 before, with the phase, its bytes and the
               time they will take, and when that failed
    /readyz    200 while requests are computed; 503 while loading, stalled, restarting, draining or
               dead
    /health    as /readyz, with the figures
    /version, /metrics

The answers follow the service's state and the engine's messages; no probe sends a request. Where
keys are needed, probes without one get the same status and the phase, and nothing else.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.auth import is_known
from pagedserve.api.openai_shapes import RETRY_AFTER_SECONDS, json_response
from pagedserve.api.service import Service
from pagedserve.errors import without_places
from pagedserve.version import __version__


def state(service: Service) -> dict[str, Any]:
    """The phase, for everybody."""
    phase = service.phase
    return {"status": "ok" if phase == "ready" else "unavailable", "phase": phase}


def details(service: Service) -> dict[str, Any]:
    """What is being loaded, and the cause of a death."""
    phase = service.phase
    found = {
        "loading": service.startup.text if phase in ("loading", "restarting") else None,
        "cause": cause(service),
    }
    return {name: without_places(text) for name, text in found.items() if text is not None}


def cause(service: Service) -> str | None:
    """Why the engine is dead, silent, or being restarted."""
    if service.failure.done():
        return service.failure.result()
    if service.phase == "stalled":
        return "the engine has given no sign of life for too long"
    return service.client.last_death if service.client.restarting else None


def probe(service: Service, request: HttpRequest, good: bool, **more: Any) -> Response:
    """The state with the status that a probe looks at, and `more` for who may know it."""
    body = state(service)
    if is_known(request):
        body |= details(service) | more
    response = json_response(body, 200 if good else 503)
    if not good:
        response.headers["Retry-After"] = RETRY_AFTER_SECONDS
    return response


async def livez(service: Service, request: HttpRequest) -> Response:
    """Whether a restart would help."""
    return probe(service, request, service.phase != "dead")


async def startupz(service: Service, request: HttpRequest) -> Response:
    """Whether the start has come to its end, and how far it is.

    `seconds` since it began; `eta_seconds` until the bytes of this phase are there.
    """
    good = service.ready is not None and not service.failure.done()
    more = {} if good else progress(service)
    return probe(service, request, good, **more, phases=phases(service))


def progress(service: Service) -> dict[str, Any]:
    """How far the start is, in numbers."""
    startup = service.startup
    found: dict[str, Any] = {"seconds": round(startup.seconds, 3)}
    if startup.bytes is not None:
        found |= {"bytes_done": startup.bytes.done, "bytes_total": startup.bytes.total}
    if (left := startup.seconds_left()) is not None:
        found["eta_seconds"] = round(left, 1)
    return found


async def readyz(service: Service, request: HttpRequest) -> Response:
    """Whether requests are taken."""
    return probe(service, request, service.phase == "ready")


async def health(service: Service, request: HttpRequest) -> Response:
    """As readyz, with figures."""
    stats, now = service.client.stats, time.monotonic()
    last_death = service.client.last_death
    return probe(
        service,
        request,
        service.phase == "ready",
        model=service.model_name,
        uptime_seconds=round(now - service.started_at, 3),
        live_requests=len(service.answers),
        engine_restarts=service.client.num_restarts,
        last_death=None if last_death is None else without_places(last_death),
        running=stats.running if stats else 0,
        waiting=stats.waiting if stats else 0,
        last_token_age_seconds=round(now - service.client.last_token_at, 3),
        phases=phases(service),
    )


def phases(service: Service) -> list[dict[str, Any]]:
    """The phases of the engine's start, each once. One that goes on has lasted None."""
    return [
        {
            "phase": phase.name,
            "seconds": round(phase.began, 3),
            "lasted_seconds": None if phase.lasted is None else round(phase.lasted, 3),
        }
        for phase in service.client.start_phases
    ]


async def version(service: Service, request: HttpRequest) -> Response:
    """The version of this server."""
    return json_response({"version": __version__})


async def metrics(service: Service, request: HttpRequest) -> Response:
    """The figures in Prometheus' text format."""
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
