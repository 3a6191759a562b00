"""When a request's time is over, and what it is told."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from pagedserve.api.deadlines import Deadlines
from pagedserve.config import ServerConfig
from pagedserve.errors import DeadlineError, RequestError
from tests.api.test_answer import LETTER_H, Bed, Finish


@pytest.mark.parametrize(
    "header", ["", "0", "-1", "nan", "inf", "1e7", "x", "1 s", "٣", "0x10", "9" * 40]
)
def test_a_header_that_is_no_time_is_named(header: str) -> None:
    with pytest.raises(RequestError, match="X-Request-Timeout must be a number of seconds"):
        Deadlines.of(ServerConfig(), header, 0.0)


def test_the_shorter_of_the_clients_time_and_the_servers_holds() -> None:
    server = ServerConfig(request_timeout=10.0)
    assert Deadlines.of(server, None, 5.0).total == 15.0
    assert not Deadlines.of(server, None, 5.0).by_client
    for header, total, by_client in (("2.5", 7.5, True), ("60", 15.0, False)):
        made = Deadlines.of(server, header, 5.0)
        assert (made.total, made.by_client) == (total, by_client)
    free = Deadlines.of(ServerConfig(), None, 5.0)
    assert free.next(computed=False, written=False) == math.inf


def test_a_deadline_counts_while_it_matters() -> None:
    config = ServerConfig(queue_timeout=1.0, ttft_timeout=2.0, request_timeout=9.0)
    made = Deadlines.of(config, None, 0.0)
    assert made.next(computed=False, written=False) == 1.0
    assert made.next(computed=True, written=False) == 2.0
    assert made.next(computed=True, written=True) == 9.0
    for now, computed, written, reason, code in (
        (1.0, False, False, "queue", "queue_timeout"),
        (2.5, True, False, "ttft", "ttft_timeout"),
        (9.0, True, True, "total", "request_timeout"),
        (9.0, False, False, "queue", "queue_timeout"),  # all have passed: the first of them
    ):
        found, error = made.expired(now, computed=computed, written=written)
        assert (found, error.code, error.status) == (reason, code, 504)
    error = Deadlines.of(config, "3", 0.0).expired(3.0, computed=True, written=True)[1]
    assert (error.status, error.message) == (
        408,
        "the request took longer than the 3 s of its X-Request-Timeout",
    )


def in_ms(queue: float = math.inf, first: float = math.inf, total: float = math.inf) -> Deadlines:
    """Deadlines so many milliseconds from now."""
    now = time.monotonic()
    return Deadlines(*(now + each / 1000 for each in (queue, first, total)))


def test_an_expired_answer_is_aborted_once_and_counted_once() -> None:
    async def run() -> None:
        bed = Bed(n=2, deadlines=in_ms(queue=5, first=10, total=15))
        bed.answer.keep_time()
        with pytest.raises(DeadlineError, match="waited"):
            await bed.answer.collect()
        await asyncio.sleep(0.03)  # the other deadlines pass too
        bed.answer.close()
        assert bed.client.aborted == [0, 1]
        assert bed.admission.counts.expired == {"queue": 1}
        assert bed.admission.counts.ended == {"abort": 2}
        assert (bed.admission.num_live, bed.admission.waiting_tokens) == (0, 0)

    asyncio.run(run())


def test_a_deadline_that_was_met_gives_way_to_the_next() -> None:
    async def run() -> None:
        bed = Bed(deadlines=in_ms(queue=5, first=30))
        bed.answer.keep_time()
        bed.sinks[0].started(0)
        with pytest.raises(DeadlineError, match="no first token"):
            await bed.answer.collect()
        assert bed.admission.counts.expired == {"ttft": 1}

    asyncio.run(run())


def test_what_was_written_in_time_is_the_clients_however_slowly_it_reads() -> None:
    async def run() -> None:
        bed = Bed(deadlines=in_ms(total=5))
        bed.answer.keep_time()
        bed.sinks[0].started(0)
        bed.sinks[0].token(LETTER_H, None, Finish(0, "length"))
        await asyncio.sleep(0.02)
        assert [delta.text for delta in (await bed.answer.collect())[0]] == ["h"]
        assert bed.admission.counts.expired == {} and bed.client.aborted == []

    asyncio.run(run())
