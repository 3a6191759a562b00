"""What a browser may do: preflights, headers of answers, and refusals before anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from pagedserve.api.callers import Callers
from pagedserve.api.origins import CheckOrigin
from pagedserve.api.service import Service
from pagedserve.config import Config
from tests.api.serving import Server

PAGE, OTHER = "https://app.example", "https://evil.example"
CORS = "access-control-allow-origin"


def service_without_engine() -> Service:
    """A service of which nothing but its settings is used."""

    async def make() -> Service:
        return Service(Config(), cast(Any, None))

    return asyncio.run(make())


@pytest.fixture(scope="module")
def open_to_a_page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    options = {"allowed_origin": [PAGE], "allowed_host": ["llm.example"], "api_key": "page-key"}
    with Server(folder / "log", model=str(checkpoint), **options) as started:
        yield started.until_ready()


def preflight(server: Server, origin: str, path: str = "/v1/chat/completions") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    return server.http.request("OPTIONS", path, headers=headers)


def test_a_foreign_page_is_refused_before_all_else(server: Server, open_to_a_page: Server) -> None:
    for each in (server, open_to_a_page):
        key = {"Authorization": "Bearer page-key"}
        for method, path in (
            *(("GET", "/livez"), ("GET", "/v1/models"), ("POST", "/v1/completions")),
            *(("GET", "/nothing"), ("DELETE", "/metrics"), ("OPTIONS", "/v1/models")),
        ):
            for origin in (OTHER, "https://null.example", "http://localhost:1", f"{PAGE}.evil"):
                headers = {"Origin": origin, **key}
                answer = each.http.request(method, path, headers=headers)
                assert answer.status_code == 403
                assert answer.json()["error"]["code"] == "origin_not_allowed"
                assert CORS not in answer.headers and origin[5:] not in answer.text
                assert answer.headers["x-request-id"]
        null = each.http.get("/livez", headers={"Origin": "null", **key})
        assert null.status_code == 403 and CORS not in null.headers
        refused = preflight(each, OTHER)
        assert refused.status_code == 403 and CORS not in refused.headers


def test_without_flags_there_are_no_cors_headers(server: Server) -> None:
    own = {"Origin": server.url}
    for headers in ({}, own):
        answer = server.http.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert preflight(server, server.url).status_code == 405  # no page of ours needs one


def test_an_allowed_page_may_ask_and_read(open_to_a_page: Server) -> None:
    answer = preflight(open_to_a_page, PAGE)
    assert answer.status_code == 204 and answer.content == b""
    assert answer.headers[CORS] == PAGE and answer.headers["vary"] == "Origin"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "Authorization, *"
    assert "access-control-allow-credentials" not in answer.headers
    post = open_to_a_page.http.post
    body = {"prompt": "hi", "max_tokens": 2}
    for headers, status in (
        ({"Authorization": "Bearer page-key"}, 200),
        ({"Authorization": "Bearer wrong"}, 401),
        ({}, 401),
    ):
        for stream in (False, True):
            asked = body | {"stream": stream}
            answer = post("/v1/completions", json=asked, headers={"Origin": PAGE, **headers})
            assert answer.status_code == status and answer.headers[CORS] == PAGE
            assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
            assert "Origin" in answer.headers["vary"]


def test_a_preflight_opens_no_path_and_needs_to_be_one(open_to_a_page: Server) -> None:
    assert preflight(open_to_a_page, PAGE, "/nothing").content == b""
    plain = open_to_a_page.http.request("OPTIONS", "/v1/models", headers={"Origin": PAGE})
    assert plain.status_code == 401


def test_a_name_of_somebody_elses_is_refused_with_or_without_a_key(
    server: Server, open_to_a_page: Server
) -> None:
    for each in (server, open_to_a_page):
        for path in ("/livez", "/v1/models", "/nothing"):
            headers = {"Host": "evil.example", "Authorization": "Bearer page-key"}
            answer = each.http.get(path, headers=headers)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "host_not_allowed"
            assert "evil" not in answer.text
    assert open_to_a_page.http.get("/livez", headers={"Host": "LLM.example:9"}).status_code == 200


def test_rebinding_does_not_become_same_origin(server: Server) -> None:
    """A page of evil.example, whose name now resolves to this machine, is same-origin to itself."""
    port = httpx.URL(server.url).port
    name = f"evil.example:{port}"
    answer = server.http.get("/v1/models", headers={"Host": name, "Origin": f"http://{name}"})
    assert answer.json()["error"]["code"] == "host_not_allowed"


def test_what_is_not_http_is_not_let_through() -> None:
    async def never(*args: object) -> Any:
        raise AssertionError("it came through")

    callers = Callers.of((), ("*",), ("*",), public=True, keys=True)
    layer = CheckOrigin(never, callers, ["GET"])
    for kind in ("websocket", "lifespan"):
        asyncio.run(layer({"type": kind}, never, never))
