"""The server process: port first, phases, drain, second signal, deaths, exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from pagedserve.api.server import Life, cancelled_quietly
from pagedserve.config import Config
from pagedserve.engine.client import EngineClient
from tests.api.serving import ROOT, Server
from tests.api.test_disconnect import post

SLOW, DIE = 6663, 6661


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Any:
    """Start servers that are gone after the test."""
    started: list[Server] = []

    def make(**options: Any) -> Server:
        log = tmp_path / f"log{len(started)}"
        started.append(Server(log, **{"model": str(checkpoint), **options}))
        return started[-1]

    yield make
    for server in started:
        server.__exit__()


class Stream(threading.Thread):
    """A client that reads a slow stream to its end."""

    def __init__(self, server: Server, **body: Any):
        super().__init__()
        self._server = server
        self._body = {"prompt": "hello", "stream": True, "seed": SLOW, "max_tokens": 40} | body
        self.text = ""
        self.start()
        server.wait_for("num_requests_running", 1)

    def run(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=20) as http:
            self.text = http.post("/v1/completions", json=self._body).text


def test_the_port_answers_while_the_model_loads(start: Any) -> None:
    server = start(max_num_seqs=13)  # the toy's order never to become ready
    answer = server.http.get("/readyz")
    assert answer.status_code == 503
    assert (answer.json()["phase"], "retry-after" in answer.headers) == ("loading", True)
    deadline = time.monotonic() + 30
    while server.http.get("/health").json()["loading"] != "toy phase":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for path, status in [("/livez", 200), ("/startupz", 503), ("/health", 503), ("/version", 200)]:
        assert server.http.get(path).status_code == status
    refused = server.http.post("/v1/completions", json={"prompt": "hi"})
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert refused.json()["error"]["message"] == "the model is loading: toy phase"
    assert server.http.get("/v1/models").status_code == 503
    server.signal()
    assert server.exit_status() == 0


def test_a_signal_drains_and_exits_0(start: Any) -> None:
    server = start().until_ready()
    assert [server.http.get(p).status_code for p in ("/livez", "/startupz", "/readyz")] == [200] * 3
    stream = Stream(server)
    server.signal(signal.SIGTERM)
    server.wait_for_phase("draining")
    answer = server.http.get("/readyz")
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    live = server.http.get("/livez")
    assert (live.status_code, live.headers["connection"]) == (200, "close")
    refused = server.http.post("/v1/completions", json={"prompt": "hi"})
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    stream.join()
    assert '"finish_reason":"length"' in stream.text and stream.text.endswith("[DONE]\n\n")
    assert server.exit_status() == 0


def test_the_drain_ends_after_its_time(start: Any) -> None:
    server = start(shutdown_timeout=0.3).until_ready()
    stream = Stream(server, max_tokens=2000)
    server.signal()
    assert server.exit_status() == 0
    stream.join()
    assert "the server is shutting down" in stream.text
    assert stream.text.endswith("[DONE]\n\n")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_stops_at_once(first: int, second: int, start: Any) -> None:
    server = start(shutdown_timeout=3600).until_ready()
    stream = Stream(server, max_tokens=2000)
    server.signal(first)
    server.wait_for_phase("draining")
    server.signal(second)
    assert server.exit_status() == 128 + second
    stream.join()
    assert '"finish_reason":"length"' not in stream.text  # it would take 40 s


@pytest.mark.parametrize("signals", [1, 2])
def test_a_reader_that_stalls_is_cut_without_a_traceback(signals: int, start: Any) -> None:
    server = start(shutdown_timeout=0.2 if signals == 1 else 3600).until_ready()
    body = {"prompt": "x" * 40, "max_tokens": 2000, "logprobs": 20, "stream": True, "n": 8}
    with post(server, "/v1/completions", body):  # megabytes, and nobody reads them
        while server.metric("request_success_total", finished_reason="length") < 8:
            assert server.process.poll() is None, server.output
            time.sleep(0.02)
        server.signal(signal.SIGTERM)
        if signals == 2:
            server.wait_for_phase("draining")
            server.signal(signal.SIGTERM)
        assert server.exit_status() == (143 if signals == 2 else 0)
    assert "Traceback" not in server.output and "Cancel" not in server.output


def test_a_request_that_is_cancelled_at_the_end_is_no_error() -> None:
    async def works_on(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        request = asyncio.create_task(cancelled_quietly(works_on)({}, None, None))  # type: ignore
        await asyncio.sleep(0)
        request.cancel()
        await request

    asyncio.run(run())


def test_engine_death_is_told_in_band_and_exits_1(start: Any) -> None:
    server = start(max_engine_restarts=0).until_ready()
    victim = Stream(server, max_tokens=2000)
    body = {"prompt": ["hi"] * 3, "seed": DIE}
    died = server.http.post("/v1/completions", json=body)
    assert died.status_code == 503
    assert "the engine process exited with status 3" in died.json()["error"]["message"]
    health = server.http.get("/health")
    assert (health.status_code, health.json()["phase"]) == (503, "dead")
    assert health.json()["cause"] == "the engine process exited with status 3"
    assert [server.http.get(p).status_code for p in ("/livez", "/readyz", "/startupz")] == [503] * 3
    victim.join()
    event = victim.text.split("\n\n")[-3].removeprefix("data: ")
    assert "exited with status 3" in json.loads(event)["error"]["message"]
    assert victim.text.endswith("[DONE]\n\n")
    assert server.exit_status() == 1
    assert server.output.count("exited with status 3") == 1
    assert "Traceback" not in server.output


def test_a_killed_engine_is_named(start: Any) -> None:
    server = start(max_engine_restarts=0).until_ready()
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.exit_status() == 1
    assert "the engine process was killed by SIGKILL" in server.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"load_format": "dummy"}, "a toy cannot hold dummy weights"),
        ({"model": "/nowhere"}, "there is no directory /nowhere"),
        ({"tokenizer": "/nowhere"}, "there is no directory /nowhere"),
        ({"chat_template": "/nowhere/x"}, "the chat template /nowhere/x cannot be read"),
        ({"generation_config": "/nowhere"}, "--generation-config /nowhere: there is no file"),
        ({"revision": "v2"}, "--revision v2 is for hub ids"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init is for the offline LLM"),
    ],
)
def test_a_start_that_fails_says_why_and_exits_1(options: Any, says: str, start: Any) -> None:
    server = start(**options)
    assert server.exit_status() == 1
    assert server.output.count(says) == 1
    assert "Traceback" not in server.output


def test_a_directory_without_config_is_refused(start: Any, tmp_path: Path) -> None:
    server = start(model=str(tmp_path))
    assert server.exit_status() == 1
    assert "no config.json" in server.output


def test_a_port_in_use_is_named(start: Any) -> None:
    server = start()
    port = httpx.URL(server.url).port
    code = subprocess.run(
        [sys.executable, "-m", "tests.api.serving", json.dumps({"port": port})],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert code.returncode == 1
    assert f"port {port}" in code.stdout and "--port" in code.stdout


def test_a_host_that_is_no_name_is_named(start: Any) -> None:
    for host in ("nope.invalid", "x" * 70 + ".invalid"):
        options = json.dumps({"port": 0, "host": host})
        run = subprocess.run(
            [sys.executable, "-m", "tests.api.serving", options],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 1
        assert f"--host {host} cannot be resolved" in run.stdout
        assert "API key" not in run.stdout and "Traceback" not in run.stderr


def test_a_phase_is_told_at_once_and_its_details_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    now = [0.0]
    monkeypatch.setattr("pagedserve.api.server.time.monotonic", lambda: now[0])
    life = Life(Config(), cast(EngineClient, None), cast(Any, None), said.append, 0.0)
    life._report("import torch")
    for percent in range(10, 101, 10):  # in 2.5 s
        life._report("load weights", f"{percent} %")
        now[0] += 0.25
    life._report("warm up")
    life._report("ready")
    assert [line.split("s  ")[1] for line in said] == [
        "import torch", "load weights 10 %", "load weights 50 %", "load weights 90 %", "warm up",
        "ready",
    ]  # fmt: skip


def test_the_terminal_shows_phases_and_last_a_line_to_try(start: Any) -> None:
    server = start(max_model_len=200).until_ready()
    deadline = time.monotonic() + 5
    while "curl" not in server.output:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lines = server.output.strip().splitlines()
    assert lines[0].startswith("listening on http://127.0.0.1:")
    assert any(line.endswith("s  toy phase") for line in lines)
    assert any(line.endswith("engine: toy phase 0.1 s") for line in lines)
    told = server.http.get("/health").json()["phases"]
    assert told == [{"phase": "toy phase", "seconds": 0.01, "lasted_seconds": 0.09}]
    shown = lines[-1].strip()
    answer = subprocess.run(shown, shell=True, capture_output=True, text=True)
    assert "chat.completion.chunk" in answer.stdout
