"""One completion being written, as the scheduler sees it.

Two counters carry all timing. `num_computed`: tokens whose KV is written, or is being written by a
launched step. `num_inflight`: tokens sampled on the device that the CPU has not seen. So

    length = len(tokens) + num_inflight          what the device knows
    length - num_computed                        what there is to compute

hold at every moment, overlapped or not, and nothing else needs to know which.
"""

from __future__ import annotations

import enum

from pagedserve.engine.block_pool import chain_hash, root_hash
from pagedserve.request import Request
from pagedserve.step import BlockId, Slot

PATIENT_SECONDS = 60.0  # a request without a deadline is due so long after it came


class Status(enum.Enum):
    """Where a sequence is. Only RUNNING ones are scheduled; the last two are final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()
    ABORTED = enum.auto()


class Sequence:
    """State of one request in the engine; owned by the scheduler."""

    __slots__ = (
        "blocks",
        "hashes",
        "id",
        "launched",
        "max_length",
        "num_charged",
        "num_computed",
        "num_inflight",
        "num_prompt",
        "num_published",
        "num_scored",
        "order",
        "request",
        "reuse",
        "room",
        "slot",
        "started",
        "status",
        "stop_ids",
        "tokens",
    )

    def __init__(self, request: Request, eos_token_ids: frozenset[int]):
        params = request.params
        assert params.max_tokens is not None, "the API settles max_tokens before it submits"
        self.request = request
        self.id = request.id
        due = min(request.deadline, request.arrival + PATIENT_SECONDS)
        self.order = (request.priority, due, request.arrival, request.id)
        self.tokens = request.prompt_token_ids + request.written
        self.num_prompt = len(request.prompt_token_ids)
        self.max_length = self.num_prompt + params.max_tokens
        self.stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else eos_token_ids
        )
        # Positions taken from the cache have no logits, so who asks for all of them computes all.
        self.reuse = params.prompt_logprobs is None
        self.num_computed = 0
        self.num_inflight = 0
        self.launched = 0  # launched steps, not committed yet, that touch this sequence
        self.blocks: list[BlockId] = []
        self.room = 0  # tokens that `blocks` hold
        self.hashes: list[bytes] = []  # chain hashes of the first full blocks of `tokens`
        self.num_published = 0
        # Tokens written that the tenant was charged for; those of an engine that died were.
        self.num_charged = len(request.written)
        # Prompt log-probabilities sent; a replay computes them again.
        self.num_scored = request.num_scored
        self.slot: Slot | None = None
        self.status = Status.WAITING
        self.started = False

    @property
    def length(self) -> int:
        """Tokens the device knows, or will once launched steps are done."""
        return len(self.tokens) + self.num_inflight

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    def extend_hashes(self, num_blocks: int, block_size: int) -> None:
        """Know the chain hashes of the first `num_blocks` blocks; their tokens must be known."""
        for index in range(len(self.hashes), num_blocks):
            previous = self.hashes[-1] if self.hashes else root_hash(self.request.cache_salt)
            start = index * block_size
            self.hashes.append(chain_hash(previous, self.tokens[start : start + block_size]))
