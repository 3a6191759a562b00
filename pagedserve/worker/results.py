"""What a step on a GPU leaves for the host: one flat buffer of int32, so that one copy brings it.

    [tokens: R] [finite: R]                                            of every step
    [logprobs: R] [ranks: R] [top ids: R, K] [top logprobs: R, K]      where a row wants them

R rows of the stage · K as many likeliest tokens as a request may ask for. Each part of the second
line begins at a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.kernels.logprobs_gpu import Scores
from pagedserve.limits import CEILING

UNIT = 4  # numbers
MOST = CEILING.logprobs  # likeliest tokens of a row


@dataclass(frozen=True, slots=True)
class Results:
    """How a buffer is laid out."""

    rows: int
    scored: bool

    @property
    def size(self) -> int:
        """Numbers in use."""
        if not self.scored:
            return 2 * self.rows
        return whole(2 * self.rows) + 2 * whole(self.rows) + 2 * self.rows * MOST

    def drawn(self, flat: Tensor) -> Tensor:
        """Tokens and whether they are good: [2, R], a view."""
        return flat[: 2 * self.rows].view(2, -1)

    def scores(self, flat: Tensor) -> Scores:
        """Log-probabilities, as views."""
        assert self.scored, "nobody asked for them"
        first, each, tops = whole(2 * self.rows), whole(self.rows), self.rows * MOST
        ids = first + 2 * each
        return Scores(
            flat[first : first + self.rows].view(torch.float32),
            flat[first + each : first + each + self.rows],
            flat[ids : ids + tops].view(-1, MOST),
            flat[ids + tops : ids + 2 * tops].view(torch.float32).view(-1, MOST),
        )


def whole(numbers: int) -> int:
    """So many and what fills their last 16 bytes."""
    return -(-numbers // UNIT) * UNIT
