"""Blocks that launched steps are filling: what others will find in the prefix cache in a moment.

    step n     [ a b c ]     hashes of the blocks of known tokens that each launched step fills,
    step n+1   [ d ]         forgotten when it is committed: then they are published, or their
                             sequence is gone

A burst of requests that begin alike waits for the first of them, a step or two, and then finds its
beginning in the cache.
"""

from __future__ import annotations

from collections import Counter, deque

from pagedserve.engine.sequence import Sequence

HELD_TOKENS = 256  # that a request rather waits for than computes them once more


class Coming:
    """The hashes, by step. Calls go `fill` …, `launched` for each step, and later `committed`."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._filling: list[bytes] = []  # by the step that is being scheduled
        self._launched: deque[list[bytes]] = deque()
        self._all: Counter[bytes] = Counter()

    def __bool__(self) -> bool:
        return bool(self._launched or self._all)

    def fill(self, sequence: Sequence, start: int, end: int) -> None:
        """The step computes the tokens of `sequence` from `start` to `end`. Drawn ones are not
        known, so nobody can wait for them."""
        if end - start > 1 and sequence.reuse:
            full = min(end, len(sequence.tokens)) // self._block_size
            sequence.extend_hashes(full, self._block_size)
            hashes = sequence.hashes[start // self._block_size : full]
            self._all.update(hashes)
            self._filling += hashes

    def launched(self) -> None:
        """The step is out."""
        self._launched.append(self._filling)
        self._filling = []

    def committed(self) -> None:
        """The oldest step that was out is committed."""
        if hashes := self._launched.popleft():
            self._all -= Counter(hashes)

    def holds(self, sequence: Sequence, num_hits: int) -> bool:
        """True where a step computes most of what `sequence`, which finds `num_hits` blocks, would
        have to."""
        num_coming = 0
        for prefix_hash in sequence.hashes[num_hits:]:
            if prefix_hash not in self._all:
                break
            num_coming += self._block_size
        missing = len(sequence.tokens) - num_hits * self._block_size
        return num_coming >= HELD_TOKENS and 2 * num_coming >= missing
