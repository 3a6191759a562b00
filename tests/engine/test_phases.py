"""What is said of a start, as a table of its phases."""

from __future__ import annotations

import random

from pagedserve.engine.channel import Progress
from pagedserve.engine.phases import Phase, phases_of, said


def test_a_phase_lasts_until_the_next_begins_and_the_last_until_readiness() -> None:
    told = [Progress("a", 0.5), Progress("b", 0.75), Progress("b", 3.0, "90 %"), Progress("c", 4.0)]
    assert phases_of(told, 4.5) == [
        Phase("a", 0.5, 0.25),
        Phase("b", 0.75, 3.25),
        Phase("c", 4.0, 0.5),
    ]
    assert phases_of(told, None)[-1] == Phase("c", 4.0, None)
    assert phases_of([], 1.0) == phases_of([], None) == []


def test_the_phases_of_any_start_add_up_to_it() -> None:
    rng = random.Random()
    times = sorted(rng.uniform(0, 9) for _ in range(rng.randrange(2, 30)))
    told = [Progress(f"phase {n // 3}", at) for n, at in enumerate(times[:-1])]
    found = phases_of(told, times[-1])
    assert [phase.name for phase in found] == list(dict.fromkeys(each.phase for each in told))
    assert abs(sum(phase.lasted or 0.0 for phase in found) - (times[-1] - times[0])) < 1e-9


def test_people_hear_of_phases_that_took_time() -> None:
    found = [
        Phase("a", 0.0, 1.26),
        Phase("b", 1.26, 0.01),
        Phase("c", 1.27, 0.5),
        Phase("d", 2, None),
    ]
    assert said(found) == "a 1.3 s, c 0.5 s"
    assert said([]) == ""
