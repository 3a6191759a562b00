"""An abort in every state that the API knows of: each sequence is counted once, and told once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedserve.api.deadlines import Deadlines
from pagedserve.engine.channel import Abort, Finish
from pagedserve.errors import PagedServeError
from tests.api.serving import Server
from tests.api.test_answer import LETTER_H, LETTER_I, Bed
from tests.api.test_disconnect import post
from tests.api.toy_engine import BEGUN, DIE, NEVER, SLOW
from tests.engine.test_client import Bed as ClientBed

TEXT = "/v1/completions"
STEPS: dict[str, Any] = {
    "the client leaves": lambda bed: bed.answer.close(),
    "the engine fails it": lambda bed: bed.sinks[0].failed(PagedServeError("x")),
    "another of its sequences fails": lambda bed: bed.sinks[1].failed(PagedServeError("y")),
    "the server stops": lambda bed: bed.answer.fail(PagedServeError("z")),
    "its time is over": lambda bed: bed.answer._on_time(),
    "its last token comes": lambda bed: bed.sinks[0].token(LETTER_I, None, Finish(0, "length")),
    "a stop string is found": lambda bed: bed.sinks[0].token(LETTER_H, None, None),
}


@pytest.fixture(scope="module")
def own(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose counters are these tests' alone."""
    with Server(tmp_path_factory.mktemp("abort") / "log", model=str(checkpoint)) as server:
        yield server.until_ready()


def live(server: Server) -> float:
    return server.metric("live_sequences")


def settle(server: Server, condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, server.output
        time.sleep(0.01)


def balance(server: Server) -> None:
    """Nothing is live, and everything that was admitted has ended, in one way."""
    # A request that is still being read, by a client that has left, may yet be admitted.
    settle(server, lambda: server.metric("open_requests") == 0 and live(server) == 0)
    server.wait_for("num_requests_running", 0)
    ended = [
        server.metric("request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    ]
    assert server.metric("admitted_sequences_total") == sum(ended)
    assert server.http.get("/health").json()["live_requests"] == 0


# ── the answer: whatever comes after the first end changes nothing ──────────────────────────────


@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_any_two_ends_are_one_abort_at_most_for_each_sequence(first: str, second: str) -> None:
    async def run() -> None:
        bed = Bed(n=2, deadlines=Deadlines(total=0.0), stop=["h"])
        for step in (first, second):
            ended = bed.sinks[0].ended
            if ended and step in ("its last token comes", "a stop string is found"):
                continue  # the client does not call the sink of a request that ended
            if step == "another of its sequences fails" and bed.sinks[1].ended:
                continue
            STEPS[step](bed)
        bed.answer.close()
        bed.answer.close()
        assert sorted(bed.client.aborted) == sorted(set(bed.client.aborted))
        assert sum(bed.metrics.ended_by_reason.values()) == 2
        assert sum(bed.admission.counts.ended.values()) == 2
        assert (bed.admission.num_live, bed.admission.num_waiting) == (0, 0)
        assert bed.closed == [bed.answer]
        if first == "its last token comes":
            assert 0 not in bed.client.aborted  # the engine has ended it itself

    asyncio.run(run())


# ── the client: what goes over the channel ──────────────────────────────────────────────────────


@pytest.fixture
def bed() -> Iterator[ClientBed]:
    made = ClientBed(max_restarts=3)
    yield made
    made.client.close(0.0)


def told(bed: ClientBed) -> list[list[int]]:
    """The ids of every Abort that is sent from now on."""
    sent: list[list[int]] = []
    send = bed.client._engine.send

    def note(message: Any) -> None:
        if isinstance(message, Abort):
            sent.append(message.ids)
        send(message)

    bed.client._engine.send = note  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize(("order", "begun"), [(NEVER, False), (BEGUN, True), (SLOW, True)])
def test_the_engine_is_told_once_whether_it_queues_prefills_or_decodes(
    order: int, begun: bool, bed: ClientBed
) -> None:
    sent, sink = told(bed), bed.submit(order)
    bed.until(lambda: bed.client.stats is not None and bed.client.stats.running == 1)
    bed.until(lambda: ("started" in sink.calls) == begun)
    for _ in range(3):
        bed.client.abort([1])
    assert sent == [[1]] and bed.client.num_live == 0
    bed.until(lambda: bed.client.stats.running == 0)  # type: ignore[union-attr]
    had = list(sink.tokens)
    marker = bed.submit(SLOW, max_tokens=2)
    bed.until(lambda: "finish" in marker.calls)
    assert sink.tokens == had and "finish" not in sink.calls and "failed" not in sink.calls
    stats = bed.client.stats
    assert stats is not None and (stats.preemptions, stats.prefix_hits) == (1, 0)


def test_one_that_has_ended_is_not_told_of(bed: ClientBed) -> None:
    sent, sink = told(bed), bed.submit(SLOW, max_tokens=2)
    bed.until(lambda: "finish" in sink.calls)
    bed.client.abort([1])
    assert sent == []


def test_one_whose_end_is_on_its_way_ends_here_and_the_engine_does_not_mind(
    bed: ClientBed,
) -> None:
    """The finish waits in the socket while the abort goes out: they pass each other."""
    sent, sink = told(bed), bed.submit(5, max_tokens=3)  # no order: it writes at once
    time.sleep(0.3)  # nobody polls
    bed.client.abort([1])
    assert sent == [[1]]
    bed.until(lambda: bed.client.stats is not None and bed.client.stats.prefix_hits == 1)
    assert (sink.tokens, sink.calls) == ([], [])
    assert bed.client.num_live == 0


def test_an_abort_of_the_suspect_lets_the_others_go_on(bed: ClientBed) -> None:
    suspect, waits = bed.submit(DIE), bed.submit(SLOW, max_tokens=4)
    bed.until(lambda: bed.client.num_restarts == 2 and bed.client._held)
    assert "finish" not in waits.calls
    bed.client.abort([1])
    bed.client.abort([1])
    bed.until(lambda: "finish" in waits.calls)
    assert "failed" not in suspect.calls and bed.client.num_quarantined == 0


# ── the server: admitted = ended, in whatever state the client leaves ───────────────────────────


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("order", "state"), [(NEVER, "queued"), (BEGUN, "prefill"), (SLOW, "decode")]
)
def test_a_client_that_leaves_is_counted_once(
    order: int, state: str, stream: bool, own: Server
) -> None:
    aborted = own.metric("request_success_total", finished_reason="abort")
    told_alive, told_gone = (
        own.metric("num_preemptions_total"),
        own.metric("prefix_cache_hits_total"),
    )
    body = {"prompt": ["hello"] * 3, "max_tokens": 2000, "seed": order, "stream": stream}
    sock = post(own, TEXT, body)
    own.wait_for("num_requests_running", 3)
    settle(own, lambda: (own.metric("queue_requests") == 3) == (state == "queued"))
    sock.close()
    balance(own)
    assert own.metric("request_success_total", finished_reason="abort") == aborted + 3
    assert own.metric("num_preemptions_total") == told_alive + 3
    assert own.metric("prefix_cache_hits_total") == told_gone


def test_clients_that_leave_at_any_moment_of_a_short_answer_are_counted_once(own: Server) -> None:
    """While it is read, tokenised in a thread, submitted, or as its last token is written."""
    large = {"prompt": ["x y " * 300] * 40, "max_tokens": 2}
    small = {"prompt": "hello", "max_tokens": 3}
    before = own.metric("admitted_sequences_total")
    for number in range(60):
        sock = post(own, TEXT, (large if number % 3 == 0 else small) | {"stream": number % 2 == 0})
        time.sleep(number % 20 / 1000)
        sock.close()
    balance(own)
    assert own.metric("admitted_sequences_total") > before
    assert "Traceback" not in own.output


@pytest.mark.parametrize("leaves", ["before the next engine", "once there is a next engine"])
def test_a_client_that_leaves_while_the_engine_is_restarted_is_counted_once(
    leaves: str, own: Server
) -> None:
    aborted = own.metric("request_success_total", finished_reason="abort")
    body = {"prompt": ["hello"] * 2, "max_tokens": 2000, "seed": SLOW, "stream": True}
    sock = post(own, TEXT, body)
    own.wait_for("num_requests_running", 2)
    restarts = own.metric("engine_restarts_total")
    os.kill(own.engine_pid(), signal.SIGKILL)
    if leaves == "once there is a next engine":
        settle(own, lambda: own.metric("engine_restarts_total") > restarts)
    sock.close()
    settle(own, lambda: own.metric("engine_restarts_total") > restarts)
    own.wait_for_phase("ready")
    balance(own)
    assert own.metric("request_success_total", finished_reason="abort") == aborted + 2
    # The engine that followed heard of an abort only of what it had been given.
    assert own.metric("prefix_cache_hits_total") == 0


def test_a_client_that_leaves_while_the_server_drains_is_counted_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    with Server(tmp_path / "log", model=str(checkpoint), shutdown_timeout=3600) as server:
        server.until_ready()
        body = {"prompt": "hello", "max_tokens": 2000, "seed": SLOW, "stream": True}
        sock = post(server, TEXT, body)
        server.wait_for("num_requests_running", 1)
        server.signal(signal.SIGTERM)
        server.wait_for_phase("draining")
        sock.close()
        assert server.exit_status() == 0  # nothing was left to wait for
        assert "Traceback" not in server.output
