"""The client over real processes: what it does when an engine cannot be trusted, or not be made."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedserve.config import Config
from pagedserve.engine import client as room
from pagedserve.engine.channel import ChannelBroken, Finish
from pagedserve.engine.child import EngineProcess
from pagedserve.engine.client import EngineClient
from pagedserve.engine.watch import TICK_SECONDS, Recovery
from pagedserve.errors import PagedServeError
from pagedserve.request import Request, SamplingParams

SLOW, NEVER, RAISE = 6663, 6664, 6667


class Sink:
    """Keeps what comes."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.calls: list[str] = []
        self.error: PagedServeError | None = None

    def started(self, cached_tokens: int) -> None:
        self.calls.append("started")

    def prompt_logprobs(self, entries: list[Any]) -> None:
        self.calls.append("prompt_logprobs")

    def token(self, token_id: int, logprobs: Any, finish: Finish | None) -> None:
        self.tokens.append(token_id)
        if finish:
            self.calls.append("finish")

    def failed(self, error: PagedServeError) -> None:
        self.error = error
        self.calls.append("failed")


class Bed:
    """A client over the toy engine, in a loop that watches as the server's does."""

    def __init__(self, max_restarts: int):
        self.client = EngineClient("tests.api.toy_engine", Recovery(max_restarts))
        self.client.configure(Config.from_options({"model": "/toy"}).to_builtins())
        self.until(lambda: self.client.ready or self.client.cause_of_death)
        assert self.client.cause_of_death is None

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            self.client.poll(TICK_SECONDS / 2)
            self.client.tick()
            time.sleep(0.005)

    def submit(self, order: int, max_tokens: int = 30) -> Sink:
        sink, params = Sink(), SamplingParams(max_tokens=max_tokens, seed=order, ignore_eos=True)
        request = Request(self.client.next_id(), [5, 6, 7], params, order)
        self.client.submit([request], [sink])
        return sink


@pytest.fixture
def bed() -> Iterator[Bed]:
    made = Bed(max_restarts=3)
    yield made
    made.client.close(0.0)


def test_a_sink_hears_everything_once_over_three_engines(bed: Bed) -> None:
    sink = bed.submit(SLOW)
    for count in (5, 12):
        bed.until(lambda count=count: len(sink.tokens) >= count)
        os.kill(bed.client.pid, signal.SIGKILL)
    bed.until(lambda: "finish" in sink.calls)
    assert sink.tokens == [5, 6, 7] * 10
    assert sink.calls == ["started", "finish"]
    assert (bed.client.num_restarts, bed.client.num_live) == (2, 0)


def test_an_exception_is_the_cause_that_a_request_learns_in_the_end(bed: Bed) -> None:
    sink = bed.submit(RAISE)
    bed.until(lambda: sink.error is not None)
    assert sink.error is not None and sink.error.code == "request_quarantined"
    assert "died 3 times in a row" in str(sink.error)
    assert "RuntimeError: a toy exception" in str(sink.error)
    assert (sink.tokens, sink.calls) == ([5, 6], ["started", "failed"])
    assert bed.client.num_quarantined == 1
    later = bed.submit(SLOW, max_tokens=3)
    bed.until(lambda: "finish" in later.calls)


def test_an_engine_that_says_what_is_no_message_is_replaced(bed: Bed) -> None:
    sink, first = bed.submit(SLOW), bed.client.pid

    def garbage(timeout: float | None) -> Any:
        raise ChannelBroken("the other process sent no message: x")

    bed.until(lambda: len(sink.tokens) > 3)
    bed.client._engine.receive = garbage  # type: ignore[method-assign]
    bed.until(lambda: "finish" in sink.calls)
    assert sink.tokens == [5, 6, 7] * 10
    assert bed.client.last_death == "the other process sent no message: x"
    assert not Path(f"/proc/{first}").exists()


def test_a_machine_that_cannot_start_another_engine_is_asked_again(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = ["first", "second"]

    def reluctant(module: str) -> EngineProcess:
        if refusals:
            raise OSError(refusals.pop(0))
        return EngineProcess(module)

    sink = bed.submit(SLOW)
    monkeypatch.setattr(room, "EngineProcess", reluctant)
    bed.until(lambda: len(sink.tokens) > 3)
    os.kill(bed.client.pid, signal.SIGKILL)
    bed.until(lambda: "finish" in sink.calls)
    assert not refusals and sink.tokens == [5, 6, 7] * 10
    assert bed.client.last_death == "another engine cannot be started: second"


def test_a_machine_that_never_can_ends_every_request_with_that(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: str) -> EngineProcess:
        raise OSError("no")

    sinks = [bed.submit(NEVER) for _ in range(3)]
    monkeypatch.setattr(room, "EngineProcess", refuse)
    monkeypatch.setattr("pagedserve.engine.watch.MAX_DELAY_SECONDS", 0.1)
    os.kill(bed.client.pid, signal.SIGKILL)
    bed.until(lambda: bed.client.cause_of_death is not None)
    for sink in sinks:
        assert sink.calls[-1] == "failed" and sink.calls.count("failed") == 1
        assert "another engine cannot be started: no" in str(sink.error)
    with pytest.raises(PagedServeError, match="the engine is dead"):
        bed.submit(SLOW)


def test_an_abort_between_two_engines_is_final(bed: Bed) -> None:
    stays, goes = bed.submit(SLOW), bed.submit(SLOW)
    bed.until(lambda: len(goes.tokens) > 3)
    os.kill(bed.client.pid, signal.SIGKILL)
    bed.until(lambda: bed.client.restarting)
    bed.client.abort([2])
    bed.client.abort([2])
    had = len(goes.tokens)
    bed.until(lambda: "finish" in stays.calls)
    assert len(goes.tokens) == had and goes.calls == ["started"]
    stats = bed.client.stats
    assert stats is not None and (stats.preemptions, stats.prefix_hits) == (0, 0)  # no abort came
