"""Stalls and restarts, over a clock of the test's own."""

from __future__ import annotations

from pagedserve.config import Config
from pagedserve.engine.process import stall_seconds
from pagedserve.engine.watch import (
    GOOD_LIFE_SECONDS,
    MAX_DELAY_SECONDS,
    STOPPED_SECONDS,
    TICK_SECONDS,
    Recovery,
    Restarts,
    Silence,
)


def listen(silence: Silence, start: float, seconds: float, *, stopped: bool = False) -> float:
    """Look every tick for `seconds`; the time afterwards."""
    for number in range(1, round(seconds / TICK_SECONDS) + 1):
        silence.look(start + number * TICK_SECONDS, stopped=stopped)
    return start + seconds


def test_silence_past_the_deadline_is_a_stall_while_serving() -> None:
    silence = Silence(100.0)
    now = listen(silence, 100.0, 4.9)
    assert silence.stall(5.0, serving=True) is None
    now = listen(silence, now, 0.3)
    assert silence.stall(5.0, serving=True) == "the engine made no progress for 5 s"
    assert silence.stall(5.0, serving=False) is None, "a model loads for as long as it needs"
    assert silence.stall(0.0, serving=True) is None, "0 is never"
    silence.heard()
    assert silence.stall(5.0, serving=True) is None


def test_one_that_loads_has_its_own_deadline_and_every_word_of_it_counts() -> None:
    silence = Silence(0.0)
    now = listen(silence, 0.0, 8.0)
    assert silence.stall(5.0, serving=False, load_deadline=9.0) is None
    silence.heard()  # a hundredth more of the weights
    now = listen(silence, now, 8.9)
    assert silence.stall(5.0, serving=False, load_deadline=9.0) is None
    listen(silence, now, 0.3)
    told = silence.stall(5.0, serving=False, load_deadline=9.0)
    assert told == "the engine made no progress for 9 s while it loaded"
    assert silence.stall(0.0, serving=False, load_deadline=9.0) == told
    assert silence.stall(5.0, serving=False, load_deadline=0.0) is None, "0 is never"


def test_time_in_which_we_did_not_run_ourselves_accuses_nobody() -> None:
    silence = Silence(100.0)
    silence.look(100.0 + 3600, stopped=False)
    assert silence.stall(5.0, serving=True) is None


def test_a_process_that_is_stopped_is_a_stall_also_while_it_loads() -> None:
    silence = Silence(0.0)
    now = listen(silence, 0.0, STOPPED_SECONDS + 0.2, stopped=True)
    told = silence.stall(600.0, serving=False)
    assert told == "the engine process was stopped by a signal"
    listen(silence, now, TICK_SECONDS)  # it was continued
    assert silence.stall(600.0, serving=False) is None
    brief = Silence(0.0)
    listen(brief, 0.0, 1.2, stopped=True)
    assert brief.stall(600.0, serving=True) is None and brief.stall(1.0, serving=False)


def test_delays_double_until_it_is_given_up() -> None:
    restarts = Restarts(Recovery(8))
    delays = [restarts.after_death(float(now)) for now in range(9)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, MAX_DELAY_SECONDS, MAX_DELAY_SECONDS, None]
    assert (restarts.total, restarts.in_a_row) == (8, 8)


def test_a_token_or_a_minute_of_service_begins_a_new_row() -> None:
    restarts = Restarts(Recovery(1))
    for life in range(20):
        restarts.ready(life * 10.0)
        restarts.progress()
        assert restarts.after_death(life * 10.0 + 1) == 0.0
    restarts.ready(1000.0)
    assert restarts.after_death(1000.0 + GOOD_LIFE_SECONDS + 1) == 0.0
    restarts.ready(2000.0)
    assert restarts.after_death(2001.0) is None
    assert restarts.total == 21


def test_without_recovery_the_first_death_is_the_last() -> None:
    assert Restarts(Recovery()).after_death(0.0) is None


def test_a_step_may_take_longer_on_a_cpu_unless_asked_otherwise() -> None:
    assert stall_seconds(Config(), on_gpu=True) == 120.0
    assert stall_seconds(Config(), on_gpu=False) == 600.0
    for asked in (0.0, 7.5):
        config = Config.from_options({"engine_stall_timeout": asked})
        assert stall_seconds(config, on_gpu=True) == stall_seconds(config, on_gpu=False) == asked
