"""How far a start is, over a clock of the test's own."""

from __future__ import annotations

import random

from pagedserve.api.startup import Startup


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_that_of_the_bytes_left_at_the_rate_so_far() -> None:
    clock = Clock()
    startup = Startup(clock)
    assert startup.seconds_left() is None
    startup.enter("load weights", "cuda", 0, 0)
    startup.enter("load weights", "1 %", 100, 10_000)
    assert startup.seconds_left() is None  # one point has no rate
    for second in range(1, 6):
        clock.now += 1.0
        startup.enter("load weights", f"{second} %", 100 + 200 * second, 10_000)
        assert startup.bytes is not None and startup.bytes.done == 100 + 200 * second
        assert startup.seconds_left() == (9900 - 200 * second) / 200
    left = startup.seconds_left()
    assert left is not None
    clock.now += 3.0  # nothing was told since
    assert startup.seconds_left() == left - 3.0
    clock.now += 1e6
    assert startup.seconds_left() == 0.0
    assert (startup.text, startup.seconds) == ("load weights 5 %", 1_000_008.0)


def test_a_phase_without_bytes_has_none_and_the_next_begins_anew() -> None:
    clock = Clock()
    startup = Startup(clock)
    startup.enter("downloading x", "50 %", 50, 100)
    clock.now += 1.0
    startup.enter("downloading x", "done", 100, 100)
    startup.enter("downloading x", "checking")  # the same phase: what is known stays
    assert startup.bytes is not None and startup.bytes.done == 100
    assert startup.seconds_left() == 0.0
    startup.enter("warm up")
    assert startup.bytes is startup.seconds_left() is None
    startup.enter("load weights", "", 5, 70)
    assert startup.bytes is not None
    assert (startup.bytes.first, startup.bytes.done, startup.bytes.total) == (5, 5, 70)


def test_bytes_that_have_to_come_again_start_the_count_again() -> None:
    clock, r = Clock(), random.Random()
    startup = Startup(clock)
    for _ in range(200):
        clock.now += r.random()
        done = r.randrange(1000)
        startup.enter("downloading x", "", done, 1000)
        left = startup.seconds_left()
        assert startup.bytes is not None
        assert startup.bytes.first <= startup.bytes.done == done
        assert left is None or left >= 0.0
