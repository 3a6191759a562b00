"""The engine dies, stalls, dies again: streams pause and go on, and the state is told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.serving import Server

DIE, SLOW, NEVER, HANG = 6661, 6663, 6664, 6666


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers that are gone after the test."""
    started: list[Server] = []

    def make(**options: Any) -> Server:
        log = tmp_path / f"log{len(started)}"
        started.append(Server(log, **{"model": str(checkpoint), **options}))
        return started[-1].until_ready()

    yield make
    for server in started:
        server.__exit__()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def ask(server: Server, **body: Any) -> httpx.Response:
    """A completion of a slow request, in a connection of its own."""
    body = {"prompt": "hello you", "seed": SLOW, "max_tokens": 40} | body
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as streams do."""
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def written(answer: httpx.Response) -> tuple[str, str]:
    """Text and finish reason of a stream."""
    choices = [event["choices"][0] for event in events(answer)]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def eventually(condition: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, server.output
        time.sleep(0.02)


def wait_for_another(server: Server, engine: int) -> int:
    """The process id of the engine that follows `engine`."""

    def there() -> bool:
        try:
            pid = server.engine_pid()
        except ValueError:  # none at this moment
            return False
        # After its exec: until then the API process waits for it, and it must not be stopped.
        return pid != engine and b"toy_engine" in Path(f"/proc/{pid}/cmdline").read_bytes()

    eventually(there, server)
    return server.engine_pid()


def test_streams_and_answers_in_one_piece_survive_a_killed_engine(
    start: Any, pool: ThreadPoolExecutor
) -> None:
    server = start()
    undisturbed = ask(server).json()["choices"][0]
    answers = [pool.submit(ask, server, stream=True) for _ in range(4)]
    answers += [pool.submit(ask, server, n=2, logprobs=1, echo=True) for _ in range(2)]
    server.wait_for("num_requests_running", 8)
    time.sleep(0.3)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    second = wait_for_another(server, engine)
    server.wait_for("num_requests_running", 8)
    os.kill(second, signal.SIGSEGV)
    for future in answers[:4]:
        assert written(future.result()) == (undisturbed["text"], "length")
    for future in answers[4:]:
        whole = future.result().json()
        assert future.result().status_code == 200
        assert whole["usage"]["completion_tokens"] == 80
        for choice in whole["choices"]:
            assert choice["text"] == "hello you" + undisturbed["text"]
            # Those of the prompt once, those of the answer once, whatever died between.
            prompt_tokens = whole["usage"]["prompt_tokens"]
            assert len(choice["logprobs"]["tokens"]) == prompt_tokens + 40
    assert server.metric("engine_restarts_total") == 2
    cause = "the engine process was killed by SIGSEGV"
    assert server.metric("engine_last_death_info", cause=cause) == 1
    assert server.metric("request_success_total", finished_reason="error") == 0
    assert server.output.count("was killed by SIGKILL") == 1
    assert server.output.count("was killed by SIGSEGV") == 1
    assert "Traceback" not in server.output
    assert server.http.get("/health").json()["last_death"] == cause
    server.signal()
    assert server.exit_status() == 0


def test_while_it_restarts_it_lives_and_is_not_ready_and_requests_wait(
    start: Any, pool: ThreadPoolExecutor
) -> None:
    server = start()
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    second = wait_for_another(server, engine)
    os.kill(second, signal.SIGSTOP)  # it stays in its start
    late = pool.submit(ask, server, max_tokens=3)
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["phase"]) == (503, "restarting")
    assert ready.json()["cause"] == "the engine process was killed by SIGKILL"
    assert "retry-after" in ready.headers and ready.json()["loading"]
    assert server.http.get("/livez").status_code == 200
    assert server.http.get("/health").status_code == 503
    eventually(lambda: server.http.get("/health").json()["live_requests"] == 1, server)
    assert not late.done()
    os.kill(second, signal.SIGCONT)
    assert late.result().status_code == 200
    server.until_ready()
    assert "cause" not in server.http.get("/readyz").json()


def test_an_abort_during_a_restart_happens_once(start: Any, pool: ThreadPoolExecutor) -> None:
    server = start()
    stays = pool.submit(ask, server, stream=True, max_tokens=60)
    body = {"prompt": "hello", "seed": NEVER, "stream": True, "n": 3}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20):
        server.wait_for("num_requests_running", 4)
        engine = server.engine_pid()
        os.kill(engine, signal.SIGKILL)
        second = wait_for_another(server, engine)
        os.kill(second, signal.SIGSTOP)
    eventually(lambda: server.http.get("/health").json()["live_requests"] == 1, server)
    assert server.metric("request_success_total", finished_reason="abort") == 3
    os.kill(second, signal.SIGCONT)
    assert written(stays.result())[1] == "length"
    server.wait_for("num_requests_running", 0)
    # The new engine never heard of them: nothing to abort, alive or not.
    assert server.metric("num_preemptions_total") == 0
    assert server.metric("prefix_cache_hits_total") == 0
    assert server.metric("request_success_total", finished_reason="abort") == 3


@pytest.mark.parametrize("order", [DIE, HANG])
def test_the_request_that_kills_engines_is_failed_and_nobody_else(
    order: int, start: Any, pool: ThreadPoolExecutor
) -> None:
    server = start(engine_stall_timeout=0.6)
    others = [pool.submit(ask, server, max_tokens=150, stream=True) for _ in range(3)]
    server.wait_for("num_requests_running", 3)
    failed = ask(server, seed=order)
    assert failed.status_code == 500
    error = failed.json()["error"]
    assert error["code"] == "request_quarantined"
    cause = "exited with status 3" if order == DIE else "made no progress for 0.6 s"
    assert cause in error["message"] and "times in a row" in error["message"]
    texts = {written(future.result()) for future in others}
    assert len(texts) == 1 and texts.pop()[1] == "length"
    assert server.metric("requests_quarantined_total") == 1
    assert ask(server, max_tokens=2).status_code == 200


def test_an_engine_that_is_stopped_is_replaced(start: Any, pool: ThreadPoolExecutor) -> None:
    server = start(engine_stall_timeout=0.5)
    answers = [pool.submit(ask, server, stream=True) for _ in range(3)]
    server.wait_for("num_requests_running", 3)
    first = server.engine_pid()
    os.kill(first, signal.SIGSTOP)
    second = wait_for_another(server, first)
    assert len({written(future.result()) for future in answers}) == 1
    os.kill(second, signal.SIGSTOP)  # with nothing to do
    eventually(lambda: server.http.get("/readyz").status_code == 503, server)
    wait_for_another(server, second)
    server.until_ready()
    assert server.metric("engine_restarts_total") == 2
    assert not Path(f"/proc/{first}").exists() and not Path(f"/proc/{second}").exists()


def test_a_stall_is_no_death_where_that_is_asked_for(start: Any, pool: ThreadPoolExecutor) -> None:
    server = start(engine_stall_timeout=0)
    answer = pool.submit(ask, server)
    server.wait_for("num_requests_running", 1)
    os.kill(server.engine_pid(), signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(server.engine_pid(), signal.SIGCONT)
    assert answer.result().status_code == 200
    assert server.metric("engine_restarts_total") == 0


def test_a_crash_loop_ends_in_band_and_with_a_failure(start: Any, pool: ThreadPoolExecutor) -> None:
    server = start(max_engine_restarts=1)
    stream = pool.submit(ask, server, stream=True, seed=NEVER)
    whole = pool.submit(ask, server, seed=NEVER)
    server.wait_for("num_requests_running", 2)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    os.kill(wait_for_another(server, engine), signal.SIGKILL)
    told = "killed by SIGKILL; it was restarted 1 times in a row"
    assert told in events(stream.result())[-1]["error"]["message"]
    assert whole.result().status_code == 503 and told in whole.result().json()["error"]["message"]
    assert server.http.get("/livez").status_code == 503
    assert told in server.http.get("/readyz").json()["cause"]
    assert server.exit_status() == 1
    assert "Traceback" not in server.output


def test_a_drain_waits_for_the_restart(start: Any, pool: ThreadPoolExecutor) -> None:
    server = start()
    answer = pool.submit(ask, server, stream=True)
    server.wait_for("num_requests_running", 1)
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.signal(signal.SIGTERM)
    assert written(answer.result())[1] == "length"
    assert server.exit_status() == 0
