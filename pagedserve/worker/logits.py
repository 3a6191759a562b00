"""Logits processors: what a request's parameters do to its logits before a token is drawn.

Each works on permanent rows: `set` when a sequence takes a slot, `apply` in place on the rows of a
step that asked for it. Nothing moves when a batch changes. Order: penalties, bias, bans.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pagedserve.request import SamplingParams
from pagedserve.step import Join, Slot
from pagedserve.worker.rows import Rows


class Processor(Protocol):
    """One effect on logits."""

    def wants(self, params: SamplingParams) -> bool:
        """Whether a request with these parameters is touched at all."""
        ...

    def set(self, join: Join) -> None:
        """A sequence that wants this takes its slot."""
        ...

    def apply(self, logits: Tensor, rows: list[int], slots: list[Slot], lengths: list[int]) -> None:
        """Change `logits[rows[i]]` ([n, vocab] fp32) of slot i, which has `lengths[i]` tokens."""
        ...


class Penalties:
    """Presence and frequency penalty over the output, repetition penalty over prompt and output.

    OpenAI's formula: logit -= frequency · count + presence · [count > 0]. Repetition as in CTRL
    (Keskar et al. 2019): a seen token's logit is divided by the penalty if positive, else
    multiplied.
    """

    def __init__(self, rows: Rows, vocab_size: int):
        self._rows = rows
        self._vocab_size = vocab_size
        self._joins: dict[Slot, Join] = {}

    def wants(self, params: SamplingParams) -> bool:
        """True where any of the three is not neutral."""
        return params.penalised

    def set(self, join: Join) -> None:
        """Remember the penalties and where the output begins."""
        self._joins[join.slot] = join

    def apply(self, logits: Tensor, rows: list[int], slots: list[Slot], lengths: list[int]) -> None:
        """Count what each sequence has seen, on the device, and penalise it."""
        for row, slot, length in zip(rows, slots, lengths, strict=True):
            join = self._joins[slot]
            params, scores = join.params, logits[row]
            seen = self._rows.token_ids[slot, :length]
            if params.repetition_penalty != 1.0:
                ids = torch.unique(seen)
                picked = scores[ids]
                factor = params.repetition_penalty
                scores[ids] = torch.where(picked > 0, picked / factor, picked * factor)
            if params.presence_penalty or params.frequency_penalty:
                counts = torch.bincount(seen[join.num_prompt :], minlength=self._vocab_size)
                scores -= params.frequency_penalty * counts
                scores -= params.presence_penalty * (counts > 0)


class Bias:
    """`logit_bias`: a constant added to the logits of given tokens."""

    def __init__(self, device: torch.device):
        self._device = device
        self._bias: dict[Slot, tuple[Tensor, Tensor]] = {}

    def wants(self, params: SamplingParams) -> bool:
        """True where a bias was given."""
        return bool(params.logit_bias)

    def set(self, join: Join) -> None:
        """Move the bias to the device once."""
        bias = join.params.logit_bias
        ids = torch.tensor(list(bias), dtype=torch.int64, device=self._device)
        values = torch.tensor(list(bias.values()), dtype=torch.float32, device=self._device)
        self._bias[join.slot] = ids, values

    def apply(self, logits: Tensor, rows: list[int], slots: list[Slot], lengths: list[int]) -> None:
        """Add it."""
        for row, slot in zip(rows, slots, strict=True):
            ids, values = self._bias[slot]
            logits[row, ids] += values


class MinTokens:
    """Bans every token that would end the sequence until `min_tokens` are written."""

    def __init__(self, device: torch.device, eos_token_ids: list[int]):
        self._device = device
        self._eos = eos_token_ids
        self._bans: dict[Slot, tuple[int, Tensor]] = {}

    def wants(self, params: SamplingParams) -> bool:
        """True where a minimum was given and something could end the sequence."""
        return params.min_tokens > 0 and bool(self._ends(params))

    def set(self, join: Join) -> None:
        """Remember until which length which tokens are banned."""
        ids = torch.tensor(self._ends(join.params), dtype=torch.int64, device=self._device)
        self._bans[join.slot] = join.num_prompt + join.params.min_tokens, ids

    def apply(self, logits: Tensor, rows: list[int], slots: list[Slot], lengths: list[int]) -> None:
        """Set them to -inf while the sequence is too short."""
        for row, slot, length in zip(rows, slots, lengths, strict=True):
            until, ids = self._bans[slot]
            if length < until:
                logits[row, ids] = -torch.inf

    def _ends(self, params: SamplingParams) -> list[int]:
        return params.stop_token_ids + ([] if params.ignore_eos else self._eos)


class Processors:
    """All processors, and which slots want which."""

    def __init__(
        self, rows: Rows, vocab_size: int, eos_token_ids: list[int], device: torch.device
    ) -> None:
        each: list[Processor] = [
            Penalties(rows, vocab_size),
            Bias(device),
            MinTokens(device, eos_token_ids),
        ]
        self._wanting: list[tuple[Processor, set[Slot]]] = [(one, set()) for one in each]

    def set(self, join: Join) -> None:
        """A sequence takes a slot; whoever had it before wants nothing any more."""
        for processor, wanting in self._wanting:
            wanting.discard(join.slot)
            if processor.wants(join.params):
                wanting.add(join.slot)
                processor.set(join)

    def apply(self, logits: Tensor, slots: list[Slot], lengths: list[int]) -> None:
        """Process `logits` [n, vocab] fp32 in place; row i is slot i with `lengths[i]` tokens."""
        for processor, wanting in self._wanting:
            if wanting:
                rows = [row for row, slot in enumerate(slots) if slot in wanting]
                if rows:
                    processor.apply(
                        logits, rows, [slots[r] for r in rows], [lengths[r] for r in rows]
                    )
