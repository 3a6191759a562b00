"""A step that broke off, computed again in smaller parts until the row that breaks it stands alone.

    whole ──▶ half │ half ──▶ … ──▶ one row, twice ──▶ it fails, with the cause
               └─ goes on as if nothing had happened

Where memory was short, a row of many tokens is halved too. What befalls many rows of a step in turn
is not theirs, and what happens again and again is not a chance: both end the engine, and every
request goes on in the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pagedserve.errors import StepError
from pagedserve.executor.base import Executor
from pagedserve.step import Slot, Step, StepOutput, TokenLogprobs

MAX_FAILURES, WINDOW_STEPS = 10, 1000  # the error budget: so many steps of so many may break off
MAX_OFFENDERS = 4  # rows of one step that may fail for it
LEAST_TOKENS = 32  # a row of fewer is not halved


class Budget:
    """Counts steps that broke off."""

    def __init__(self) -> None:
        self.num_failures = 0
        self._recent: deque[int] = deque()  # ids of steps

    def charge(self, step: Step, error: StepError) -> None:
        """Count one. Raises StepError where they are too many."""
        self.num_failures += 1
        self._recent.append(step.id)
        while self._recent[0] <= step.id - WINDOW_STEPS:
            self._recent.popleft()
        if len(self._recent) > MAX_FAILURES:
            raise StepError(
                f"{len(self._recent)} of the last {WINDOW_STEPS} steps broke off, the last one: "
                f"{error.message}"
            )


@dataclass(slots=True)
class Found:
    """What parts of a step brought, by slot."""

    tokens: dict[Slot, int] = field(default_factory=dict)
    logprobs: dict[Slot, TokenLogprobs | None] = field(default_factory=dict)
    prompts: dict[Slot, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[Slot, str] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)  # of rows that broke it off alone

    def add(self, part: Step, output: StepOutput) -> None:
        """Take in what a part gave; parts of a row come in order."""
        slots = [slot for slot, samples in zip(part.slots, part.samples, strict=True) if samples]
        self.tokens.update(zip(slots, output.token_ids, strict=True))
        self.logprobs.update(zip(slots, output.logprobs, strict=False))  # none where nobody asked
        for slot, entries in output.prompt_logprobs.items():
            self.prompts.setdefault(slot, []).extend(entries)
        self.failed.update(output.failed)

    def of(self, step: Step) -> StepOutput:
        """As the whole step would have given it. Tokens of rows that were left out mean nothing."""
        slots = [slot for slot, samples in zip(step.slots, step.samples, strict=True) if samples]
        asked = any(entry is not None for entry in self.logprobs.values())
        return StepOutput(
            [self.tokens.get(slot, 0) for slot in slots],
            logprobs=[self.logprobs.get(slot) for slot in slots] if asked else [],
            prompt_logprobs=self.prompts,
            failed=self.failed,
        )


class Isolation:
    """Computes steps again. `alive` is called before each attempt: there may be many."""

    def __init__(self, executor: Executor, alive: Callable[[], None] = lambda: None):
        self.budget = Budget()
        self._executor = executor
        self._alive = alive

    def again(self, step: Step, rows: list[int]) -> StepOutput:
        """What `step`, which broke off or was launched behind one that did, gives for `rows`.

        Nothing else is in flight. Raises StepError where it is not a few rows' fault.
        """
        found = Found()
        if rows:
            self._compute(step.of_rows(rows), found)
        if len(found.causes) == len(rows) > 1:
            raise StepError(f"no row of a step can be computed: {found.causes[-1]}")
        return found.of(step)

    def _compute(self, part: Step, found: Found) -> None:
        """Add what `part` brings, in halves where it must be."""
        error = self._attempt(part, found)
        if error is None:
            return
        halves = halves_of(part, error)
        if halves is not None:
            for half in halves:
                if half.slots[0] not in found.failed:  # else a row whose first tokens have failed
                    self._compute(half, found)
            return
        # Alone for the first time: what troubled its neighbours may have been a chance.
        error = self._attempt(part, found)
        if error is not None:
            self._condemn(part.slots[0], error, found)

    def _condemn(self, slot: Slot, error: StepError, found: Found) -> None:
        found.causes.append(error.message)
        if len(found.causes) > MAX_OFFENDERS:
            raise StepError(f"more than {MAX_OFFENDERS} rows of a step fail: {error.message}")
        found.failed[slot] = f"it cannot be computed: {error.message}"

    def _attempt(self, part: Step, found: Found) -> StepError | None:
        self._alive()
        try:
            found.add(part, self._executor.result(self._executor.launch(part)))
        except StepError as error:
            return error
        return None


def halves_of(part: Step, error: StepError) -> tuple[Step, Step] | None:
    """Two parts for one; None where there is nothing to halve."""
    if (num_rows := len(part.slots)) > 1:
        middle = num_rows // 2
        return part.of_rows(list(range(middle))), part.of_rows(list(range(middle, num_rows)))
    if error.memory and part.counts[0] >= 2 * LEAST_TOKENS:
        return part.of_tokens(part.counts[0] // 2)
    return None
