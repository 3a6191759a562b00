"""When an engine counts as stalled, when a dead one is replaced, and when that is given up.

Pure decisions over the clock that the caller gives; the client acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass

TICK_SECONDS = 0.1  # how often the API process looks
STOPPED_SECONDS = 10.0  # the kernel's word that a process is stopped needs no longer patience
GOOD_LIFE_SECONDS = 60.0  # an engine that was ready for so long did not die of its start
MAX_DELAY_SECONDS = 30.0
SILENT_SHARE = 0.25  # of the silence that ends an engine: it is told of, long before
END_SECONDS = 60.0  # a killed process that is still there then will not go


@dataclass(frozen=True, slots=True)
class Recovery:
    """What happens at an engine's death.

    `max_restarts`: restarts in a row, each without a token and without a minute of service, before
    it is given up; 0 never restarts, and ends no engine that stalls. `load_seconds`: without a word
    from an engine that loads, after which it is ended; 0 is never.
    """

    max_restarts: int = 0
    load_seconds: float = 0.0


class Silence:
    """How long nothing came, in time in which we ourselves were running.

    A process that was stopped, or starved, and then looks at the clock would accuse the engine of
    its own absence: each look adds at most two ticks.
    """

    def __init__(self, now: float):
        self.seconds = 0.0
        self.stopped_seconds = 0.0
        self._looked = now

    def heard(self) -> None:
        """Something came."""
        self.seconds = 0.0

    def look(self, now: float, *, stopped: bool) -> None:
        """Time went by; `stopped` is what the kernel says of the process."""
        passed = min(now - self._looked, 2 * TICK_SECONDS)
        self._looked = now
        self.seconds += passed
        self.stopped_seconds = self.stopped_seconds + passed if stopped else 0.0

    def stall(self, deadline: float, *, serving: bool, load_deadline: float = 0.0) -> str | None:
        """Why the engine counts as stalled, or None. Deadlines are in seconds; 0 is never.

        One that serves owes a sign of life all the time, one that loads a word on how far it is.
        """
        if deadline and self.stopped_seconds > min(deadline, STOPPED_SECONDS):
            return "the engine process was stopped by a signal"
        limit, when = (deadline, "") if serving else (load_deadline, " while it loaded")
        if limit and self.seconds > limit:
            return f"the engine made no progress for {limit:g} s{when}"
        return None


class Restarts:
    """Counts the deaths in a row that came to nothing."""

    def __init__(self, recovery: Recovery):
        self._recovery = recovery
        self.total = 0
        self.in_a_row = 0
        self._ready_at: float | None = None

    def ready(self, now: float) -> None:
        """The engine serves."""
        self._ready_at = now

    def progress(self) -> None:
        """A token came: whatever happened before is over."""
        self.in_a_row = 0

    def after_death(self, now: float) -> float | None:
        """Seconds to wait before the next start; None to give up."""
        if self._ready_at is not None and now - self._ready_at > GOOD_LIFE_SECONDS:
            self.in_a_row = 0
        self._ready_at = None
        if self.in_a_row >= self._recovery.max_restarts:
            return None
        self.in_a_row += 1
        self.total += 1
        # At once after a first death, then 1, 2, 4, … seconds.
        return 0.0 if self.in_a_row == 1 else min(2.0 ** (self.in_a_row - 2), MAX_DELAY_SECONDS)
