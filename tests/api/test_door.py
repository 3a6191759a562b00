"""The door over HTTP: a full queue, deadlines, and that nothing of what was refused stays."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.serving import Server
from tests.api.test_disconnect import post

SLOW, NEVER, BEGUN = 6663, 6664, 6665
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def small(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes four sequences and no more."""
    log = tmp_path_factory.mktemp("small") / "log"
    options = {"max_num_seqs": 4, "max_queued_requests": 2, "max_requests_per_key": 8}
    with Server(log, model=str(checkpoint), served_model_name="toy", **options) as started:
        yield started.until_ready()


def hold(server: Server, stack: ExitStack, count: int, **body: Any) -> None:
    """Have `count` requests under way until the stack unwinds."""
    for _ in range(count):
        wanted = {"prompt": "hello", "max_tokens": 2000, "seed": NEVER} | body
        stack.enter_context(post(server, PATH, wanted))


def check_idle(server: Server) -> None:
    """Nothing is left of any request."""
    for name in ("live_sequences", "queue_requests", "queue_tokens", "num_requests_running"):
        server.wait_for(name, 0)
    ended = sum(server.metric("request_success_total", finished_reason=r) for r in REASONS)
    assert server.metric("admitted_sequences_total") == ended


REASONS = ("stop", "length", "abort", "error")


def test_a_full_queue_answers_429_of_openais_shape(small: Server) -> None:
    with ExitStack() as stack:
        hold(small, stack, 6)
        small.wait_for("live_sequences", 6)
        for body in ({"prompt": "hi"}, {"prompt": "hi", "stream": True}):
            answer = small.http.post(PATH, json=body)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert "6 sequences are live of 6" in error["message"]
        with (
            openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.completions.create(model="toy", prompt="hi")
        assert small.http.get("/readyz").status_code == 200
        assert small.http.get("/v1/models").status_code == 200
    check_idle(small)
    assert small.http.post(PATH, json={"prompt": "hi"}).status_code == 200


def test_n_counts_as_n(small: Server) -> None:
    with ExitStack() as stack:
        hold(small, stack, 4)
        small.wait_for("live_sequences", 4)
        body = {"prompt": "hi", "max_tokens": 1}
        assert small.http.post(PATH, json=body | {"n": 3}).status_code == 429
        assert small.http.post(PATH, json=body | {"prompt": ["hi"] * 3}).status_code == 429
        assert small.http.post(PATH, json=body | {"n": 2}).status_code == 200
    never = small.http.post(PATH, json={"prompt": "hi", "n": 7})
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    check_idle(small)


def test_streams_open_at_once_are_bounded(small: Server) -> None:
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 99\r\n\r\n{"
    )
    url = httpx.URL(small.url)
    with ExitStack() as stack:
        for _ in range(8):  # half a request each: none has a sequence yet, and all are open
            sock = stack.enter_context(socket.create_connection((url.host, url.port)))
            sock.sendall(head.encode())
        small.wait_for("open_requests", 8)
        refused = small.http.post(PATH, json={"prompt": "hi"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    small.wait_for("open_requests", 0)
    assert small.http.post(PATH, json={"prompt": "hi"}).status_code == 200


@pytest.fixture(scope="module")
def hasty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lets requests wait a moment only."""
    log = tmp_path_factory.mktemp("hasty") / "log"
    options = {"queue_timeout": 0.05, "ttft_timeout": 0.1, "request_timeout": 0.3}
    with Server(log, model=str(checkpoint), served_model_name="toy", **options) as started:
        yield started.until_ready()


@pytest.mark.parametrize(
    ("seed", "reason", "code"),
    [
        (NEVER, "queue", "queue_timeout"),
        (BEGUN, "ttft", "ttft_timeout"),
        (SLOW, "total", "request_timeout"),
    ],
)
def test_a_deadline_of_the_server_is_a_504_or_an_event(
    hasty: Server, seed: int, reason: str, code: str
) -> None:
    before = hasty.metric("expired_requests_total", reason=reason)
    aborted = hasty.metric("num_preemptions_total")
    body = {"prompt": "hello", "max_tokens": 2000, "seed": seed}
    answer = hasty.http.post(PATH, json=body)
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "timeout_error"
    assert answer.json()["error"]["code"] == code
    events = hasty.http.post(PATH, json=body | {"stream": True}).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == code
    assert events[-2] == "data: [DONE]"
    assert (len(events) > 3) == (seed == SLOW)  # what came in time came
    check_idle(hasty)
    assert hasty.metric("expired_requests_total", reason=reason) == before + 2
    assert hasty.metric("num_preemptions_total") == aborted + 2
    assert hasty.metric("prefix_cache_hits_total") == 0  # no abort for what was not alive


def test_a_deadline_of_the_client_is_a_408_that_it_should_not_try_again(server: Server) -> None:
    for seed in (NEVER, BEGUN, SLOW):
        answer = server.http.post(
            PATH,
            json={"prompt": "hello", "max_tokens": 2000, "seed": seed},
            headers={"X-Request-Timeout": "0.05"},
        )
        assert answer.status_code == 408
        assert answer.headers["X-Should-Retry"] == "false"
        assert "0.05 s of its X-Request-Timeout" in answer.json()["error"]["message"]
    fine = server.http.post(PATH, json={"prompt": "hi"}, headers={"X-Request-Timeout": "9"})
    assert fine.status_code == 200
    bad = server.http.post(PATH, json={"prompt": "hi"}, headers={"X-Request-Timeout": "soon"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "X-Request-Timeout")


def test_nothing_stays_of_five_hundred_refused_and_expired_requests(small: Server) -> None:
    seen: dict[int, int] = {}

    async def run() -> None:
        async with httpx.AsyncClient(base_url=small.url, timeout=30) as client:
            gate = asyncio.Semaphore(24)

            async def one(number: int) -> None:
                body = {
                    "prompt": "hello",
                    "max_tokens": 2000,
                    "seed": (NEVER, BEGUN, SLOW)[number % 3],
                    "stream": number % 2 == 0,
                }
                async with gate:
                    answer = await client.post(
                        PATH, json=body, headers={"X-Request-Timeout": "0.02"}
                    )
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1

            await asyncio.gather(*map(one, range(500)))

    asyncio.run(run())
    assert sum(seen.values()) == 500 and seen.keys() == {200, 408, 429}
    check_idle(small)
    small.wait_for("open_requests", 0)
    assert small.metric("prefix_cache_hits_total") == 0
    assert small.http.post(PATH, json={"prompt": "hi"}).status_code == 200
    assert "Traceback" not in small.output
