"""A client that leaves frees the engine: exactly one abort a live sequence, none for ended ones."""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx
import msgspec
import pytest

from tests.api.serving import Server

SLOW, NEVER = 6663, 6664


def post(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request, and leave its answer unread."""
    url = httpx.URL(server.url)
    sock = socket.create_connection((url.host, url.port))
    payload = msgspec.json.encode(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    sock.sendall(head.encode() + payload)
    return sock


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("seed", [SLOW, NEVER])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_aborts_once(server: Server, stream: bool, seed: int, n: int) -> None:
    aborted = server.metric("num_preemptions_total")
    useless = server.metric("prefix_cache_hits_total")
    body = {"prompt": "hello", "max_tokens": 2000, "seed": seed, "n": n, "stream": stream}
    # n makes other seeds of the given one, so only the first choice is slow
    sock = post(server, "/v1/completions", body | ({"prompt": ["hello"] * n, "n": 1}))
    server.wait_for("num_requests_running", n)
    sock.close()
    server.wait_for("num_requests_running", 0)  # they would write for 40 s, or for ever
    assert server.metric("num_preemptions_total") == aborted + n
    assert server.metric("prefix_cache_hits_total") == useless


def test_an_answer_read_to_its_end_aborts_nothing(server: Server) -> None:
    aborted = server.metric("num_preemptions_total")
    useless = server.metric("prefix_cache_hits_total")
    for stream in (True, False) * 5:
        server.http.post(
            "/v1/completions", json={"prompt": "hello", "max_tokens": 5, "stream": stream}
        )
    # Aborts would stand before this one in the channel, and its answer comes behind them.
    server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1})
    server.wait_for("num_requests_running", 0)
    assert server.metric("num_preemptions_total") == aborted
    assert server.metric("prefix_cache_hits_total") == useless


def test_a_storm_of_leaving_clients_leaves_nothing_behind(server: Server) -> None:
    for _ in range(3):
        body = {"prompt": "hello", "max_tokens": 2000, "seed": SLOW, "stream": True}
        socks = [post(server, "/v1/completions", body) for _ in range(60)]
        time.sleep(0.05)  # some are read, some tokenised, some computed
        for sock in socks:
            sock.close()
    server.wait_for("num_requests_running", 0)
    assert server.http.get("/health").json()["live_requests"] == 0
    answer = server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1})
    assert answer.json()["usage"]["completion_tokens"] == 1


def test_a_reader_that_stalls_gets_everything_in_few_writes(server: Server) -> None:
    """What waits is joined; the engine meanwhile runs to its end."""
    body = {"prompt": "x" * 40, "max_tokens": 1000, "stream": True}
    with post(server, "/v1/completions", body) as sock:
        server.wait_for("num_requests_running", 0)
        sock.settimeout(10)
        received = b""
        while b"[DONE]" not in received:
            received += sock.recv(1 << 20)
    assert received.count(b'"text":"x') > 900
