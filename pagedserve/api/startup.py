"""How far the start is: phase, bytes, and how long the bytes that are left will take.

    download ─▶ tokenizer ─▶ (engine) import ─▶ weights ─▶ cache ─▶ warm up ─▶ ready

Both processes tell their phases; this is what was told last, for probes and errors. It belongs to
the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Bytes:
    """Bytes of a phase that moves some, `first` of them before `began` (`time.monotonic()`)."""

    began: float
    first: int
    done: int
    total: int


class Startup:
    """What the start is doing, or did last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.phase = "starting"
        self.detail = ""
        self.bytes: Bytes | None = None
        self._clock = clock
        self._began = self._told = clock()

    def enter(self, phase: str, detail: str = "", done: int = 0, total: int = 0) -> None:
        """A phase begins, or goes on; `done` of `total` bytes where it says."""
        now = self._clock()
        if phase != self.phase:
            self.bytes = None
        if total and (self.bytes is None or done < self.bytes.done or total != self.bytes.total):
            self.bytes = Bytes(now, done, done, total)
        elif total and self.bytes is not None:
            self.bytes.done = done
        self.phase, self.detail, self._told = phase, detail, now

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.phase} {self.detail}".rstrip()

    @property
    def seconds(self) -> float:
        """Since this process began to start."""
        return self._clock() - self._began

    def seconds_left(self) -> float | None:
        """Until the phase's bytes are there, at the rate so far; None where nothing can be said."""
        known = self.bytes
        if known is None or known.done == known.first:
            return None
        rate = (known.done - known.first) / max(self._told - known.began, 1e-3)
        return max(0.0, (known.total - known.done) / rate - (self._clock() - self._told))
