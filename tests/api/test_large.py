"""Large requests and large answers take their time from nobody else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.api.serving import Server
from tests.api.test_disconnect import post

TEXT = "/v1/completions"
MAX_MODEL_LEN = 2048  # the toy's


@contextlib.contextmanager
def probing(server: Server) -> Iterator[list[float]]:
    """Inside, another client asks for /livez all the time; the list gets how long each took."""
    waits: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as http:
            while not stop.is_set():
                start = time.monotonic()
                http.get("/livez")
                waits.append(time.monotonic() - start)
                time.sleep(0.002)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join()


def echo(num_prompts: int, **options: Any) -> dict[str, Any]:
    prompts = [[5 + at] * 1000 for at in range(num_prompts)]
    return {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 20} | options


@pytest.mark.parametrize("stream", [True, False])
def test_large_log_probabilities_are_rendered_in_pieces(stream: bool, server: Server) -> None:
    with probing(server) as waits:
        start = time.monotonic()
        answer = server.http.post(TEXT, json=echo(24, stream=stream))
        took = time.monotonic() - start
    assert answer.status_code == 200 and len(answer.content) > 4_000_000
    # One wait is for the toy's message, which holds all prompts; an engine sends a step's tokens.
    assert sorted(waits)[-3] < took / 4, waits
    assert len(waits) > 20


def test_pieces_of_a_long_echo_make_one_whole_table(server: Server) -> None:
    (choice,) = server.http.post(TEXT, json=echo(1, logprobs=2, max_tokens=300)).json()["choices"]
    table = choice["logprobs"]
    assert [len(column) for column in table.values()] == [1300] * 4
    assert "".join(table["tokens"]) == choice["text"]
    assert table["text_offset"] == sorted(table["text_offset"])
    assert table["token_logprobs"] == [None] + [-0.5] * 1299
    assert table["top_logprobs"][0] is None and all(len(t) == 2 for t in table["top_logprobs"][1:])


def test_chat_shows_every_tokens_log_probabilities(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 300,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,
    }
    for choice in server.http.post("/v1/chat/completions", json=body).json()["choices"]:
        assert len(choice["logprobs"]["content"]) == 300
        assert all(len(each["top_logprobs"]) == 2 for each in choice["logprobs"]["content"])


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [[5] * 2000] * 96, "n": 1},  # 4.03 million
        {"prompt": [5] * 2000, "n": 96},
        {"prompt": ["x " * 1000] * 96, "n": 1},
    ],
)
def test_too_many_prompt_log_probabilities_are_refused(
    body: dict[str, Any], http: httpx.Client
) -> None:
    asked = {"max_tokens": 1, "echo": True, "logprobs": 20} | body
    answer = http.post(TEXT, json=asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprobs"
    assert "4000000" in answer.json()["error"]["message"]


def test_without_echo_prompts_have_no_entries_to_count(http: httpx.Client) -> None:
    body = {"prompt": [[5] * 2000] * 96, "max_tokens": 1, "logprobs": 20}
    assert http.post(TEXT, json=body).status_code == 200


def test_the_first_text_that_does_not_fit_ends_the_work(server: Server) -> None:
    start = time.monotonic()
    answer = server.http.post(TEXT, json={"prompt": ["x y " * 3500] * 1024})
    assert time.monotonic() - start < 1.0  # all of them: many seconds
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")


def test_too_many_sequences_are_refused_before_any_is_tokenised(http: httpx.Client) -> None:
    start = time.monotonic()
    answer = http.post(TEXT, json={"prompt": ["x y " * 3500] * 1024, "n": 2})
    assert time.monotonic() - start < 1.0
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    assert "2048" in answer.json()["error"]["message"]


def test_many_texts_that_fit_hold_up_nobody(server: Server) -> None:
    with probing(server) as waits:
        body = {"prompt": ["x y " * 450] * 1024, "max_tokens": 1}
        assert server.http.post(TEXT, json=body).status_code == 200
    assert sorted(waits)[-3] < 0.15, waits


@pytest.mark.parametrize("prompt", ["x" * 400_000, ["x"] * 1025, [5] * 200_000])
def test_a_body_parsed_in_a_thread_is_refused_like_any_other(
    prompt: Any, http: httpx.Client
) -> None:
    answer = http.post(TEXT, json={"prompt": prompt, "user": "x" * 300_000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    broken = b'{"user": "' + b"x" * 300_000
    answer = http.post(TEXT, content=broken, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_a_thread_works_leaves_nothing_behind(stream: bool, server: Server) -> None:
    body = {"prompt": ["x y " * 450] * 500, "max_tokens": 200, "stream": stream}
    assert len(msgspec.json.encode(body)) > 256 << 10
    before = server.metric("request_success_total", finished_reason="abort")
    socks = [post(server, TEXT, body) for _ in range(4)]
    time.sleep(0.15)  # the bodies are taken in; the threads need longer together
    for sock in socks:
        sock.close()
    deadline = time.monotonic() + 10
    while server.metric("request_success_total", finished_reason="abort") < before + 500:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while server.http.get("/health").json()["live_requests"] != 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.wait_for("num_requests_running", 0)
    assert "Traceback" not in server.output


def test_scoring_a_prompt_as_long_as_the_context_says_what_is_missing(http: httpx.Client) -> None:
    body = {"max_tokens": 0, "echo": True, "logprobs": 1}
    answer = http.post(TEXT, json=body | {"prompt": [5] * MAX_MODEL_LEN})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "one token more is computed" in error["message"]
    assert f"{MAX_MODEL_LEN - 1} tokens" in error["message"]
    fits = http.post(TEXT, json=body | {"prompt": [5] * (MAX_MODEL_LEN - 1)}).json()
    assert len(fits["choices"][0]["logprobs"]["tokens"]) == MAX_MODEL_LEN - 1
