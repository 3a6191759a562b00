"""Whose turn it is: sequences that wait, in a line for each tenant, and what each tenant has used.

    tenant 0   ▌used 120   A ◀─ B ◀─ C        a line: by priority, then by the earliest moment
    tenant 1   ▌used  40   D ◀─ E             something is due, then by arrival
                           ▲
                           head: of the best priority, the tenant that has used least

Tenants are small ints here. What one has used are *virtual tokens*: those computed of its prompts
and, twice, those written for it, divided by its weight. So tenants that all have work get tokens in
proportion to their weights, however many requests each of them sends, and whoever sends nothing
saves nothing up: a line that was empty begins at the level of the others (Sheng et al., "Fairness
in Serving Large Language Models", OSDI 2024, algorithm 2).

Every AGEING_TURNS-th turn is that of the sequence that came first, whatever its priority and
tenant: so nobody waits for ever. It counts turns and not seconds, so that the order is the same in
every run.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from pagedserve.engine.sequence import Sequence, Status

PROMPT_COST = 1.0
OUTPUT_COST = 2.0  # a token of its own step, against one of many in a prefill
AGEING_TURNS = 32


class Line:
    """One tenant's sequences that wait; a heap, in which ended ones stay until they surface."""

    __slots__ = ("heap", "num_ended", "num_running", "used")

    def __init__(self) -> None:
        self.heap: list[Sequence] = []
        self.num_ended = 0  # of those in the heap
        self.num_running = 0
        self.used = 0.0  # virtual tokens

    def head(self) -> Sequence | None:
        """The first that still waits."""
        while self.heap and self.heap[0].status is not Status.WAITING:
            heapq.heappop(self.heap)
            self.num_ended -= 1
        return self.heap[0] if self.heap else None

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it stands."""
        if self.heap[0] is sequence:
            heapq.heappop(self.heap)
            return
        self.heap.remove(sequence)
        heapq.heapify(self.heap)

    def forget(self) -> None:
        """One in the heap has ended. It stays until it surfaces or too many have ended: taking it
        out at once would make a storm of aborts quadratic."""
        self.num_ended += 1
        if 2 * self.num_ended > len(self.heap):
            self.heap = [s for s in self.heap if s.status is Status.WAITING]
            heapq.heapify(self.heap)
            self.num_ended = 0


class Waiting:
    """All lines."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}
        self._turns = 0
        self._aged: Sequence | None = None  # the one whose turn of ageing it is
        self._served = Line()  # the one whose turn was last

    def __len__(self) -> int:
        return sum(len(line.heap) for line in self._lines.values())

    @property
    def shared(self) -> bool:
        """True once there is more than one tenant."""
        return len(self._lines) > 1

    @property
    def stranded(self) -> bool:
        """True while a tenant waits that has nothing running."""
        return any(
            line.num_running == 0 and line.head() is not None for line in self._lines.values()
        )

    def num_running(self, tenant: int) -> int:
        """How many sequences of `tenant` were taken and have not left."""
        return self._lines[tenant].num_running

    def largest(self) -> tuple[int, int]:
        """The tenant with most running sequences, and how many they are."""
        tenant = max(self._lines, key=lambda each: self._lines[each].num_running)
        return tenant, self._lines[tenant].num_running

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence: a new one, or one that was preempted."""
        line = self._lines.get(sequence.request.tenant)
        if line is None:
            self._prune()
            line = self._lines[sequence.request.tenant] = Line()
        if line.head() is None:
            levels = [each.used for each in self._lines.values() if each.head() is not None]
            line.used = max(line.used, min(levels, default=self._served.used))
        heapq.heappush(line.heap, sequence)

    def head(self) -> Sequence | None:
        """Whose turn it is; the same one until it is taken, has ended, or a better one came."""
        if len(self._lines) > 1 or self._turns % AGEING_TURNS == AGEING_TURNS - 1:
            return self._head_of_many()
        for line in self._lines.values():
            return line.head()
        return None

    def take(self, sequence: Sequence) -> None:
        """`sequence`, which `head` gave, is running now."""
        line = self._lines[sequence.request.tenant]
        line.remove(sequence)
        line.num_running += 1
        self._served = line
        self._turns += 1
        self._aged = None

    def set_aside(self, sequence: Sequence) -> None:
        """Let others come before `sequence`, which `head` gave, until it is put back."""
        self._lines[sequence.request.tenant].remove(sequence)
        self._aged = None

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Queue those that were set aside as if they had never left: what they have used stays."""
        for sequence in sequences:
            heapq.heappush(self._lines[sequence.request.tenant].heap, sequence)
            self._aged = None

    def left(self, sequence: Sequence) -> None:
        """`sequence` is not running any more."""
        self.charge(sequence)
        self._lines[sequence.request.tenant].num_running -= 1

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended while it waited."""
        self._lines[sequence.request.tenant].forget()

    def charge_prompt(self, sequence: Sequence, num_cached: int) -> None:
        """Charge for a sequence that is computed for the first time; what was cached is free."""
        # What a dead engine wrote comes with the request, and may be cached beyond the prompt.
        num_computed = max(0, sequence.num_prompt - num_cached)
        line = self._lines[sequence.request.tenant]
        line.used += PROMPT_COST * num_computed / sequence.request.weight

    def charge(self, sequence: Sequence) -> None:
        """Charge for what was written since the last time."""
        num_written = len(sequence.tokens) - sequence.num_prompt
        self._lines[sequence.request.tenant].used += (
            OUTPUT_COST * (num_written - sequence.num_charged) / sequence.request.weight
        )
        sequence.num_charged = num_written

    def settle(self, running: Iterable[Sequence]) -> None:
        """Charge for what the running ones have written, before turns are decided by it."""
        for sequence in running:
            self.charge(sequence)

    def _prune(self) -> None:
        """Drop lines that would begin at the others' level anyway."""
        idle = [
            tenant
            for tenant, line in self._lines.items()
            if line.head() is None and not line.num_running and line.used <= self._served.used
        ]
        for tenant in idle:
            del self._lines[tenant]

    def _head_of_many(self) -> Sequence | None:
        if self._turns % AGEING_TURNS == AGEING_TURNS - 1:
            if self._aged is None or self._aged.status is not Status.WAITING:
                self._aged = self._oldest()
            return self._aged
        best: tuple[int, float, int, int] | None = None
        chosen: Sequence | None = None
        for tenant, line in self._lines.items():
            if (head := line.head()) is not None:
                rank = (head.request.priority, line.used, line.num_running, tenant)
                if best is None or rank < best:
                    best, chosen = rank, head
        return chosen

    def _oldest(self) -> Sequence | None:
        waiting = (
            each
            for line in self._lines.values()
            for each in line.heap
            if each.status is Status.WAITING
        )
        return min(waiting, key=lambda each: (each.request.arrival, each.id), default=None)
