"""Every path wants a key but the probes: each route, paths that are nearly one, and plain noise."""

from __future__ import annotations

import json
import os
import random
import socket
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi.testclient import TestClient

from pagedserve.api import app as app_module
from pagedserve.api.admission import ANYBODY, EVERYTHING, Scope, Tenant
from pagedserve.api.auth import RequireKey
from pagedserve.api.keys import Keys
from tests.api.serving import Server

KEYS = {"use": "user-key-1", "metrics": "metrics-key-2", "admin": "admin-key-3"}
PROBES = {"/health", "/livez", "/readyz", "/startupz"}
BODY = {"prompt": "hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key of each scope."""
    folder = tmp_path_factory.mktemp("locked")
    lines = [f"{scope}:{key} scope={scope}" for scope, key in KEYS.items()]
    (folder / "keys").write_text("\n".join(lines))
    options = {"api_key_file": str(folder / "keys"), "served_model_name": "toy"}
    with Server(folder / "log", model=str(checkpoint), access_log=True, **options) as started:
        yield started.until_ready()


def real_path(path: str) -> str:
    return path.replace("{id:path}", "toy")


def ask(server: Server, method: str, path: str, authorization: str | None) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    raw: list[tuple[bytes, bytes]] = [(k.encode(), v.encode()) for k, v in headers.items()]
    if authorization is not None:
        raw.append((b"Authorization", authorization.encode()))
    content = json.dumps(BODY).encode() if method == "POST" else None
    return server.http.request(method, path, content=content, headers=raw)


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
ROUTES = [(method, real_path(path), needs) for method, path, needs, _ in app_module.ROUTES]
NO_ROUTES = ["/", "/docs", "/redoc", "/openapi.json", "/v1", "/nothing", "/admin", "/invocations"]


@pytest.mark.parametrize(
    "wrong",
    [
        None, "", "Bearer", "Bearer\tuser-key-1", "Bearer wrong", "Bearer user-key-1x",
        "Bearer  user-key-1", "Bearer user-key-", "user-key-1", "Basic user-key-1",
        "Bearer user-key-1 user-key-1", "Bearer USER-KEY-1", "Bearer user-key-1,",
        "Bearer üser-key-1",
    ],
)  # fmt: skip
def test_no_path_answers_without_a_right_key_but_the_probes(
    locked: Server, wrong: str | None
) -> None:
    for path in {path for _, path, _ in ROUTES} | set(NO_ROUTES):
        for method in METHODS if wrong is None else ("GET", "POST"):
            answer = ask(locked, method, path, wrong)
            if path in PROBES and method in ("GET", "HEAD"):
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("holder", KEYS)
def test_every_route_opens_to_the_scope_that_it_wants(locked: Server, holder: str) -> None:
    has = {"use": Scope.USE, "metrics": Scope.METRICS, "admin": EVERYTHING}[holder]
    for method, path, needs in ROUTES:
        answer = ask(locked, method, path, f"bearer {KEYS[holder]}")
        allowed = needs is None or needs in has
        if allowed:
            assert answer.status_code not in (401, 403), (method, path, answer.text)
        else:
            assert answer.status_code == 403, (method, path)
            error = answer.json()["error"]
            assert error["code"] == "permission_denied"
            assert f"scope={needs.name.lower()}" in error["message"]
    for path in NO_ROUTES:
        assert ask(locked, "GET", path, f"Bearer {KEYS[holder]}").status_code == 404


def test_probes_tell_strangers_the_phase_and_nothing_else(locked: Server) -> None:
    for path in PROBES:
        assert locked.http.get(path).json() == {"status": "ok", "phase": "ready"}
        wrong = locked.http.get(path, headers={"Authorization": "Bearer wrong"})
        assert wrong.json() == {"status": "ok", "phase": "ready"}
    headers = {"Authorization": f"Bearer {KEYS['use']}"}
    assert locked.http.get("/health", headers=headers).json()["model"] == "toy"


def send_raw(server: Server, target: bytes, method: bytes = b"GET") -> tuple[int, bytes]:
    """The status and the body for a request target that no client library would let through."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=10) as sock:
        sock.sendall(
            method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        data = b""
        while piece := sock.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def disguised(r: random.Random, path: str) -> str:
    """`path` as one that a lenient router might take for it."""
    for _ in range(r.randint(1, 3)):
        at = r.randrange(len(path))
        match r.randrange(12):
            case 0:
                path = path[:at] + f"%{ord(path[at]):02x}" + path[at + 1 :]
            case 1:
                path = path[:at] + "/" + path[at:]
            case 2:
                path += r.choice([".", "/", "//", "/.", "/..", "%2f", "%00", ";x", "%20", "\\"])
            case 3:
                path = path[:at] + path[at].swapcase() + path[at + 1 :]
            case 4:
                path = r.choice(["/livez", "/health", "/readyz"]) + r.choice(
                    ["/..", "/%2e%2e", "/../", "%2f..", "?", "#", ";", "%3f", "%23"]
                ) + path  # fmt: skip
            case 5:
                path = r.choice(["//", "/./", "/x/../", "\\", "http://localhost", "*"]) + path
            case 6:
                path += r.choice(["?", "?/livez", "#/livez", "?x=/health", "&/livez", "%3f/livez"])
            case 7:
                path = path.replace("/", r.choice(["%2f", "//", "%252f", "\\", "/%2e/", "%5c"]))
            case 8:
                path = path[:at] + r.choice(["%00", "%0d%0a", "%c0%af", "%ff", "\xe9"]) + path[at:]
            case 9:
                path = path.upper()
            case 10:
                path = path[:at] + f"%25{ord(path[at]):02x}" + path[at + 1 :]
            case _:
                path = path[:at] + r.choice(string.printable[:94]) + path[at:]
    return path


def test_no_disguise_of_a_path_opens_it(locked: Server) -> None:
    r = random.Random(seed := int.from_bytes(os.urandom(4), "big"))
    paths = [path for _, path, _ in ROUTES] + NO_ROUTES
    for _ in range(400):
        target = disguised(r, r.choice(paths)).encode("latin-1").replace(b" ", b"")
        method = r.choice([b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT"])
        status, body = send_raw(locked, target, method)
        if status == 200:
            # The only way in is the exact path of a probe, percent-encoded or not.
            whole = target.decode("latin-1")
            path = unquote(httpx.URL(whole).path if "://" in whole else whole.split("?")[0])
            path = path.split("#")[0]
            assert path in PROBES and method in (b"GET", b"HEAD"), (seed, method, target)
            assert method == b"HEAD" or json.loads(body).keys() == {"status", "phase"}
        else:
            assert status in (400, 401), (seed, method, target, status, body)
            assert b"toy" not in body


def test_a_get_changes_nothing(locked: Server) -> None:
    headers = {"Authorization": f"Bearer {KEYS['admin']}"}

    def figures() -> list[str]:
        lines = locked.http.get("/metrics", headers=headers).text.splitlines()
        # what the idle engine does by itself
        return [line for line in lines if "engine_steps" not in line]

    before, state = figures(), locked.http.get("/health", headers=headers).json()
    for path in {path for _, path, _ in ROUTES} | set(NO_ROUTES):
        for method in ("GET", "HEAD", "OPTIONS"):
            query = {"prompt": "hi", "max_tokens": "4", "reset": "1", "stop": "1"}
            answer = locked.http.request(method, path, params=query, headers=headers)
            assert answer.status_code < 500
    time.sleep(0.25)  # longer than the toy's beat: what had been asked of it would be counted
    after = locked.http.get("/health", headers=headers).json()
    for moving in ("uptime_seconds", "last_token_age_seconds"):
        state.pop(moving), after.pop(moving)
    assert figures() == before and after == state


def test_the_table_of_routes_lets_no_get_write_and_opens_nothing_by_default() -> None:
    for method, path, needs, _ in app_module.ROUTES:
        assert method in ("GET", "POST")
        assert needs is not Scope.ADMIN or method != "GET", path
        assert needs is not None or (method == "GET" and path in PROBES), path


def test_a_route_of_the_admins_is_closed_to_all_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is none yet; the mechanism is ready for the first."""
    from starlette.responses import JSONResponse

    from pagedserve.api.callers import Callers
    from tests.api.test_origins import service_without_engine

    async def handler(service: object, request: object) -> JSONResponse:
        return JSONResponse({"done": True})

    route = ("POST", "/reset", Scope.ADMIN, handler)
    monkeypatch.setattr(app_module, "ROUTES", [*app_module.ROUTES, route])
    lines = [f"{scope}:{key} scope={scope}" for scope, key in KEYS.items()]
    (tmp_path / "keys").write_text("\n".join(lines))
    callers = Callers.of((), ("*",), (), public=False, keys=True)

    def status(keys: Keys, anybody: Tenant | None, headers: dict[str, str]) -> int:
        gate: Any = type("", (), {"keys": keys, "callers": callers, "anybody": anybody})
        app = app_module.build_app(service_without_engine(), gate)
        return TestClient(app).post("/reset", headers=headers).status_code

    keys = Keys("the-operators", str(tmp_path / "keys"))
    found = {
        key: status(keys, None, {"Authorization": f"Bearer {key}"})
        for key in (*KEYS.values(), "the-operators", "wrong")
    }
    assert list(found.values()) == [403, 403, 200, 200, 401]
    stranger = Tenant(scope=Scope.USE | Scope.METRICS)  # --insecure
    assert status(Keys(None, None), stranger, {}) == 403
    assert status(Keys(None, None), ANYBODY, {}) == 200  # on this machine, without keys


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["websocket", "lifespan", "webtransport"])
def test_what_is_not_http_is_not_let_through(kind: str) -> None:
    import asyncio

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it came through")

    async def nothing(*args: object) -> Any:
        raise AssertionError("nothing is read or written")

    for anybody in (None, ANYBODY):
        layer = RequireKey(inner, Keys("k", None), anybody, frozenset(("/livez",)))
        asyncio.run(layer({"type": kind, "path": "/livez", "method": "GET"}, nothing, nothing))


def test_keys_stay_out_of_the_log(checkpoint: Path, tmp_path: Path) -> None:
    options = {"api_key": "sécret-flag", "access_log": True, "model": str(checkpoint)}
    with Server(tmp_path / "log", **options) as server:
        server.until_ready()
        right = [(b"Authorization", "bearer sécret-flag".encode())]
        assert server.http.get("/v1/models", headers=right).status_code == 200
        for path in ("/v1/models/sécret-flag", "/x?api_key=sécret-flag", "/x?prompt=my+words"):
            server.http.get(path, headers=right)
        assert "GET /v1/models" in server.output
        for secret in ("sécret", "s%C3%A9cret", "my+words"):
            assert secret not in server.output
