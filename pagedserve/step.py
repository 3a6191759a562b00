"""What the next forward does, and what comes back: the two messages between engine and worker.

A Step says what *changed* since the last one and which rows compute; the worker keeps everything
else in permanent rows ("slots"), one for each active sequence. There is no prefill step and no
decode step: a row has a `count` of tokens to compute, and that is all.

        Scheduler ── Step ──▶ Executor ──▶ Runner ── StepOutput ──▶ Scheduler.commit
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NewType

import msgspec

from pagedserve.request import SamplingParams

Slot = NewType("Slot", int)
BlockId = NewType("BlockId", int)


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence takes a slot: a new one, or a preempted one that comes back.

    `token_ids` is all that is known of it: the prompt, and for a replay what it had written. Rows
    of the slot read their input tokens from there, and from what the worker itself samples.
    """

    slot: Slot
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """One forward. Columns of the same group have the same length.

    rows    slots[i] computes tokens starts[i] … starts[i] + counts[i] - 1 of its sequence and,
            where samples[i], draws the token after them
    growth  block grown_blocks[j] becomes entry grown_index[j] of grown_slots[j]'s block table; for
            a joining slot this is its whole table

    Slots that join or grow have a row. A step may be launched again, whole or in parts: what a row
    writes has a place of its own, and its draw is keyed by seed and position.
    """

    id: int
    joins: list[Join]
    slots: list[Slot]
    starts: list[int]
    counts: list[int]
    samples: list[bool]
    grown_slots: list[Slot]
    grown_index: list[int]
    grown_blocks: list[BlockId]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all rows."""
        return sum(self.counts)

    def of_rows(self, rows: list[int]) -> Step:
        """The same for these rows alone, in this order."""
        slots = [self.slots[row] for row in rows]
        kept = set(slots)
        grown = [at for at, slot in enumerate(self.grown_slots) if slot in kept]
        return Step(
            self.id,
            [join for join in self.joins if join.slot in kept],
            slots,
            [self.starts[row] for row in rows],
            [self.counts[row] for row in rows],
            [self.samples[row] for row in rows],
            [self.grown_slots[at] for at in grown],
            [self.grown_index[at] for at in grown],
            [self.grown_blocks[at] for at in grown],
        )

    def of_tokens(self, count: int) -> tuple[Step, Step]:
        """A step of one row as two: its first `count` tokens, then the others."""
        ((start,), (whole,)) = self.starts, self.counts
        assert 0 < count < whole, "both have a token"
        first = replace(self, counts=[count], samples=[False])
        then = Step(
            self.id, [], self.slots, [start + count], [whole - count], self.samples, [], [], []
        )
        return first, then


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the token there, its rank (1 = likeliest), and the top.

    Natural logarithm, of the model's logits before processors and temperature. The one form from
    the worker over the channel to the text that shows them.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step sampled: one token for each row with `samples`, in row order.

    `logprobs[i]` belongs to `token_ids[i]`, and is None where not asked for; the list is empty when
    nobody asked. `prompt_logprobs` maps a slot to those of the prompt tokens after each computed
    one. `failed` says why a slot's sequence cannot go on: its token means nothing.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: dict[Slot, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[Slot, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What start-up settled from the model and from memory."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: list[int]
    device: str
    dtype: str
    asynchronous: bool  # launch returns before the device is done, so overlapping pays
