"""The sizes of steps on a GPU: a step takes the smallest that holds it, and pads.

There are few enough of them for a graph of each, and the largest says what memory must hold.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """What a stage holds: at most so many rows and tokens. `mixed`: rows may have several."""

    rows: int
    tokens: int
    mixed: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step, and the longest sequence."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @property
    def sizes(self) -> Sizes:
        """Of a GPU's steps."""
        return Sizes(self.max_num_seqs, self.max_num_batched_tokens)


class Sizes:
    """The sizes there are stages for."""

    def __init__(self, max_rows: int, max_tokens: int):
        self.one_token = steps(max_rows, (1, 2, 4), ((8, 32), (16, 256), (32, 512), (64, 1 << 30)))
        # A mixed stage reads at least two rows, and its sampled rows cost the head's time.
        self.rows = steps(max_rows, (2, 16, 64), ((128, 256), (256, 1 << 30)))
        fine = ((32, 256), (64, 1024), (128, 2048), (256, 4096), (512, 1 << 30))
        self.tokens = steps(max_tokens, (16,), fine)

    def of(self, rows: int, tokens: int) -> Size:
        """The smallest that holds a step."""
        if rows == tokens:
            bucket = self.one_token[bisect.bisect_left(self.one_token, rows)]
            return Size(bucket, bucket, mixed=False)
        held = self.rows[bisect.bisect_left(self.rows, rows)]
        return Size(held, self.tokens[bisect.bisect_left(self.tokens, tokens)], mixed=True)

    def sample(self) -> list[Size]:
        """Sizes between which kernels do not change, those that take longest to compile first."""
        mixed = [self.of(2, tokens) for tokens in spaced(self.tokens, 4) if tokens > 2]
        one_token = [Size(rows, rows, mixed=False) for rows in spaced(self.one_token, 2)]
        return mixed[::-1] + one_token

    def largest(self) -> tuple[int, int]:
        """Rows and tokens that memory must hold."""
        return max(self.rows[-1], self.one_token[-1]), max(self.tokens[-1], self.one_token[-1])


def spaced(numbers: list[int], factor: int) -> list[int]:
    """Of ascending numbers the first, always the next that is `factor` times as large, the last."""
    found = numbers[:1]
    for number in numbers:
        if number >= factor * found[-1]:
            found.append(number)
    return found if found[-1] == numbers[-1] else [*found, numbers[-1]]


def steps(most: int, first: tuple[int, ...], then: tuple[tuple[int, int], ...]) -> list[int]:
    """`first`, then on by each step up to its limit, until `most` is held."""
    found = list(first)
    for step, limit in then:
        while found[-1] < min(most, limit):
            found.append(-(-(found[-1] + 1) // step) * step)
    cut = bisect.bisect_left(found, most)
    return found[: cut + 1]
