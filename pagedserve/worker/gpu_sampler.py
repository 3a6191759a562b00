"""Sampling parameters in permanent rows on a GPU, and what a step's rows need of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedserve.kernels.logprobs_gpu import LogprobScratch, Scores, logprobs
from pagedserve.kernels.sample_gpu import Needs, SamplerRows, SamplerScratch, sample
from pagedserve.limits import CEILING
from pagedserve.request import SamplingParams
from pagedserve.step import Join, Slot


class GpuSampler:
    """Draws for slots whose parameters were `set` when they were joined; see `kernels.sample_gpu`.

    One more row than slots: the scratch slot, which is greedy and wants nothing.
    """

    def __init__(
        self, token_ids: Tensor, rows: int, vocab_size: int, eos_token_ids: list[int]
    ) -> None:
        """token_ids: [slots + 1, length] int64, the sequences; rows: drawn for at a time."""
        self._device = token_ids.device
        self._eos = eos_token_ids
        bans = CEILING.stop_token_ids + len(eos_token_ids)
        self._rows = SamplerRows.on(token_ids, biases=CEILING.bias_entries, bans=bans)
        self._scratch = SamplerScratch.on(self._device, rows, vocab_size)
        slots = token_ids.shape[0]
        self._wanted = torch.full((slots,), -1, dtype=torch.int32, device=self._device)
        self._logprob_scratch = LogprobScratch.on(self._device, rows, vocab_size)
        self.wanted: dict[Slot, int] = {}  # log-probabilities of so many tokens, where asked for
        self._drawn: set[Slot] = set()
        self._filtered: set[Slot] = set()
        self._processed: set[Slot] = set()

    def set(self, join: Join) -> None:
        """A sequence takes a slot; whoever had it before leaves nothing behind."""
        params, slot, rows = join.params, join.slot, self._rows
        bans = self._bans(params)
        numbers = (
            0.0 if params.greedy else params.temperature,
            params.min_p,
            params.top_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        bias = params.logit_bias
        until = join.num_prompt + params.min_tokens if bans else 0
        counts = (max(params.top_k, 0), join.num_prompt, len(bias), len(bans), until)
        self._write(rows.numbers, slot, numbers)
        self._write(rows.counts, slot, counts)
        rows.seeds[slot] = join.seed
        if bias:
            self._write(rows.bias_ids, slot, tuple(bias))
            self._write(rows.bias_values, slot, tuple(bias.values()))
        if bans:
            self._write(rows.ban_ids, slot, tuple(bans))
        self._want(slot, params.logprobs)
        cuts = params.min_p > 0 or params.top_k > 0 or params.top_p < 1
        note(self._drawn, slot, not params.greedy)
        note(self._filtered, slot, cuts and not params.greedy)
        note(self._processed, slot, params.penalised or bool(bias) or bool(bans))

    def needs(self, slots: list[Slot]) -> Needs:
        """What these slots need, all together."""
        return Needs(
            drawn=meet(self._drawn, slots),
            filtered=meet(self._filtered, slots),
            processed=meet(self._processed, slots),
            scored=bool(self.wanted) and not self.wanted.keys().isdisjoint(slots),
        )

    def sample(
        self, logits: Tensor, slots: Tensor, places: Tensor, needs: Needs
    ) -> tuple[Tensor, Tensor]:
        """Token ids [n] int64 and whether the row was finite [n] bool; see `sample_gpu.sample`."""
        return sample(logits, slots, places, self._rows, self._scratch, needs)

    def score(self, logits: Tensor, drawn: Tensor, slots: Tensor, out: Scores) -> None:
        """Log-probabilities of what was drawn, before any processor, where they are wanted."""
        logprobs(logits, drawn, self._wanted[slots], out, self._logprob_scratch)

    def _want(self, slot: Slot, count: int | None) -> None:
        if self.wanted.pop(slot, None) != count:
            self._wanted[slot] = -1 if count is None else count
        if count is not None:
            self.wanted[slot] = count

    def _bans(self, params: SamplingParams) -> list[int]:
        """Tokens that may not come before `min_tokens` are written."""
        if params.min_tokens <= 0:
            return []
        return params.stop_token_ids + ([] if params.ignore_eos else self._eos)

    def _write(self, into: Tensor, slot: Slot, values: tuple[float, ...]) -> None:
        row = torch.tensor(values, dtype=into.dtype, pin_memory=into.is_cuda)
        into[slot, : len(values)] = row.to(self._device, non_blocking=True)


def meet(some: set[Slot], slots: list[Slot]) -> bool:
    """Whether any of `slots` is among `some`, which is mostly empty."""
    return bool(some) and not some.isdisjoint(slots)


def note(slots: set[Slot], slot: Slot, wanted: bool) -> None:
    """Put `slot` into the set, or out of it."""
    if wanted:
        slots.add(slot)
    else:
        slots.discard(slot)
