"""Probes tell the truth: how far a start is, that it hangs, that the engine is silent."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pagedserve.api import service as service_room
from pagedserve.api.service import Service
from pagedserve.config import Config
from pagedserve.engine.client import EngineClient
from tests.api.serving import Server
from tests.api.test_recovery import ask, wait_for_another
from tests.text.building import byte_level, write_checkpoint

HALF_WAY = 14  # the toy's order to hang in the middle of its start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers of a checkpoint of the test's own, gone after it."""
    model = write_checkpoint(tmp_path / "model", byte_level())
    started: list[Server] = []

    def make(**options: Any) -> Server:
        log = tmp_path / f"log{len(started)}"
        started.append(Server(log, **{"model": str(model), **options}))
        return started[-1]

    yield make
    for server in started:
        server.__exit__()


def test_a_start_tells_its_phase_its_bytes_and_the_time_they_will_take(start: Any) -> None:
    server = start(max_num_seqs=HALF_WAY)
    deadline = time.monotonic() + 30
    while (told := server.http.get("/startupz").json()).get("bytes_done") != 500:
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    assert told["loading"] == "toy weights 500 of 1000"
    assert (told["phase"], told["bytes_total"]) == ("loading", 1000)
    assert told["eta_seconds"] >= 0.0 and told["seconds"] > 0.0
    assert [each["phase"] for each in told["phases"]] == ["toy phase", "toy weights"]
    answer = server.http.get("/startupz")
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


def test_once_the_model_is_loaded_only_the_phases_are_left(start: Any) -> None:
    server = start().until_ready()
    answer = server.http.get("/startupz")
    assert answer.status_code == 200
    assert answer.json().keys() == {"status", "phase", "phases"}


def test_a_first_start_that_hangs_is_given_up_with_what_it_was_doing(start: Any) -> None:
    server = start(max_num_seqs=HALF_WAY, load_timeout=2.0)
    assert server.exit_status() == 1
    assert (
        "the engine made no progress for 2 s while it loaded: toy weights 500 of 1000"
        in server.output
    )
    assert "Traceback" not in server.output


def test_a_restart_that_hangs_is_tried_again_and_requests_go_on(start: Any, tmp_path: Path) -> None:
    server = start(load_timeout=2.0).until_ready()
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask(server)))
    asking.start()
    server.wait_for("num_requests_running", 1)
    (tmp_path / "model" / "hang").touch()
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    hanging = wait_for_another(server, engine)
    wait_for_another(server, hanging)
    asking.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 40
    assert server.metric("engine_restarts_total") == 2
    assert "made no progress for 2 s while it loaded" in server.output


def test_an_engine_that_is_silent_is_not_ready_and_one_that_speaks_again_is(start: Any) -> None:
    server = start(engine_stall_timeout=12.0).until_ready()  # silent after a quarter of it
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    told = server.wait_for_phase("stalled")
    assert told["cause"] == "the engine has given no sign of life for too long"
    answers = {path: server.http.get(path).status_code for path in ("/readyz", "/health", "/livez")}
    assert answers == {"/readyz": 503, "/health": 503, "/livez": 200}
    os.kill(engine, signal.SIGCONT)
    server.wait_for_phase("ready")
    assert server.engine_pid() == engine
    assert server.metric("engine_restarts_total") == 0
    deadline = time.monotonic() + 30
    while "ready again the engine gives signs of life" not in server.output:
        assert time.monotonic() < deadline, server.output
        time.sleep(0.01)
    assert server.output.count("stalled: the engine gives no sign of life") == 1


def test_our_own_half_of_a_start_that_hangs_is_given_up_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A read from a dead file system returns never, and cannot be interrupted."""
    hanging = threading.Event()

    def load(model: Any, on_progress: Any) -> None:
        hanging.wait(60)

    async def cause() -> str:
        client = SimpleNamespace(
            configured=False, silent=False, cause_of_death=None, restarting=False, ready=None,
            stats=None, last_death=None, num_restarts=0,
            num_quarantined=0, num_isolated=0, num_batch_errors=0,
            tick=lambda: None, fileno=lambda: reader, poll=lambda: None,
        )  # fmt: skip
        service = Service(
            Config.from_options({"load_timeout": 0.3, "model": "/mount"}),
            cast(EngineClient, client),
        )
        starting = asyncio.create_task(service.start())
        try:
            return await asyncio.wait_for(asyncio.shield(service.failure), 30)
        finally:
            starting.cancel()
            service.close()
            hanging.set()

    monkeypatch.setattr(service_room.checkpoint, "load", load)
    reader, writer = os.pipe()
    try:
        told = asyncio.run(cause())
    finally:
        os.close(reader)
        os.close(writer)
    assert told.startswith(
        "the start made no progress for 0.3 s while it read the files of /mount;"
    )
