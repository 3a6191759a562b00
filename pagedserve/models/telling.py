"""How a start tells how far it is: a phase, words for people, and bytes where it moves some."""

from __future__ import annotations

from typing import Protocol


class Tell(Protocol):
    """Hears of a phase that begins or goes on; `done` of `total` bytes, 0 of 0 where none move."""

    def __call__(self, phase: str, detail: str, done: int = 0, total: int = 0, /) -> None: ...


def tell_nobody(phase: str, detail: str, done: int = 0, total: int = 0, /) -> None:
    """For who does not want to know."""
