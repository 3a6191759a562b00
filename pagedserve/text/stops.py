"""Where an answer ends because of a stop string.

The matcher sees text as it comes, in any pieces, and decides the same as on the whole text: the
stop that is complete first wins, the longest of those that end there. Text is held back only while
it is a true beginning of some stop.
"""

from __future__ import annotations


class StopMatcher:
    """Stop strings over one sequence's text. One automaton (Knuth-Morris-Pratt) a stop.

    `matched` is the stop found, after which nothing more is written.
    """

    def __init__(self, stops: list[str], *, include: bool = False):
        self._stops = [(stop, failures(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._firsts = {stop[0] for stop in stops}
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. After a match: up to it, or with it if `include`."""
        if self.matched is not None or not text:
            return ""
        if not self._held and self._firsts.isdisjoint(text):
            return text  # no stop begins here: the common case
        for at, char in enumerate(text):
            stop = self._step(char)
            if stop is not None:
                self.matched = stop
                seen = self._held + text[: at + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(stop)]
        seen = self._held + text
        keep = max(self._states)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Advance every automaton by `char`; the longest stop now complete, if any."""
        found: str | None = None
        for index, (stop, failure) in enumerate(self._stops):
            state = self._states[index]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = failure[state - 1]
            self._states[index] = state
        return found


def failures(stop: str) -> list[int]:
    """For every prefix of `stop`: the length of its longest own prefix that is also its end."""
    table = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = table[length - 1]
        if stop[at] == stop[length]:
            length += 1
        table[at] = length
    return table
