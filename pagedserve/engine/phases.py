"""The phases of an engine's start: when each began and how long it lasted.

What an engine says of its start is a list of `Progress`, several of a long phase; this is the same
as a table, for `/health`, the terminal and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedserve.engine.channel import Progress


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds: `began` since the engine process started, `lasted` until the next phase began.

    `lasted` is None of the phase that still goes on.
    """

    name: str
    began: float
    lasted: float | None


def phases_of(progress: Sequence[Progress], ready: float | None) -> list[Phase]:
    """Every phase once, in order. `ready`: the second at which the last one ended, if it has."""
    begun: dict[str, float] = {}
    for each in progress:
        begun.setdefault(each.phase, each.seconds)
    ends = [*list(begun.values())[1:], ready]
    return [
        Phase(name, began, None if end is None else end - began)
        for (name, began), end in zip(begun.items(), ends, strict=False)
    ]


def said(phases: Sequence[Phase]) -> str:
    """The phases that are over and took a tenth of a second or more, for people."""
    return ", ".join(
        f"{phase.name} {phase.lasted:.1f} s"
        for phase in phases
        if phase.lasted is not None and phase.lasted >= 0.05
    )
