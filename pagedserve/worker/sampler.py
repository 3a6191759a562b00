"""From logits to tokens, for the rows of a step that draw one.

    raw logits ──▶ log-probabilities, where asked for
        │
        └─▶ processors ──▶ greedy: argmax
                      └──▶ ÷ temperature ──▶ min-p ──▶ top-k ──▶ top-p ──▶ keyed race

Parameters live in permanent rows on the device. A row whose logits are not finite is reported and
fails alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.kernels.sample import race
from pagedserve.request import SamplingParams
from pagedserve.step import Join, Slot, TokenLogprobs
from pagedserve.worker.logits import Processors

TEMPERATURE, MIN_P, TOP_P = range(3)
NOT_FINITE = "the model's logits were not finite"


@dataclass(slots=True)
class Sampled:
    """Results on the device: token ids [n] int64, whether the row was finite [n] bool, and the
    log-probabilities of rows that asked for them."""

    token_ids: Tensor
    finite: Tensor
    logprobs: LogprobColumns | None


@dataclass(slots=True)
class LogprobColumns:
    """Log-probabilities of n positions on the device; `wanted[i]` alternatives of position i."""

    logprob: Tensor  # [n] fp32, of the token at the position
    rank: Tensor  # [n] int64, 1 = likeliest
    top_ids: Tensor  # [n, max wanted] int64
    top_logprobs: Tensor  # [n, max wanted] fp32
    wanted: list[int | None]

    def to_entries(self) -> list[TokenLogprobs | None]:
        """On the host, one entry a position; None where not wanted."""
        columns = zip(
            self.logprob.tolist(),
            self.rank.tolist(),
            self.top_ids.tolist(),
            self.top_logprobs.tolist(),
            self.wanted,
            strict=True,
        )
        return [
            None if k is None else TokenLogprobs(logprob, rank, ids[:k], tops[:k])
            for logprob, rank, ids, tops, k in columns
        ]


def logprob_columns(logits: Tensor, token_ids: Tensor, wanted: list[int | None]) -> LogprobColumns:
    """Log-softmax of `logits` [n, vocab] fp32 at `token_ids` [n] and at the likeliest tokens."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    top = logprobs.topk(max((k for k in wanted if k is not None), default=0), -1)
    rank = (logprobs > chosen).sum(-1) + 1
    return LogprobColumns(chosen[:, 0], rank, top.indices, top.values, wanted)


class Sampler:
    """Draws tokens for slots whose parameters were `set` when they were joined."""

    def __init__(self, num_slots: int, processors: Processors, device: torch.device):
        self._processors = processors
        self._device = device
        self._floats = torch.zeros((num_slots, 3), dtype=torch.float32, device=device)
        self._top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._params: dict[Slot, SamplingParams] = {}

    def set(self, join: Join) -> None:
        """A sequence takes a slot."""
        params = join.params
        self._params[join.slot] = params
        self._processors.set(join)
        if not params.greedy:
            floats = [params.temperature, params.min_p, params.top_p]
            self._floats[join.slot] = torch.tensor(floats).to(self._device)
            self._top_k[join.slot] = params.top_k
            self._seeds[join.slot] = join.seed

    def sample(self, logits: Tensor, slots: list[Slot], lengths: list[int]) -> Sampled:
        """Draw one token a row: `logits` [n, vocab] fp32 (overwritten) of `slots`.

        `lengths[i]` is the number of tokens before the one to draw: its position.
        """
        params = [self._params[slot] for slot in slots]
        wanted = [p.logprobs for p in params]
        raw = logits.clone() if any(k is not None for k in wanted) else None
        self._processors.apply(logits, slots, lengths)
        highest, token_ids = logits.max(-1)
        rows = [row for row, p in enumerate(params) if not p.greedy]
        if rows:
            drawn = self._draw(logits, rows, params, slots, lengths)
            token_ids[torch.tensor(rows, device=self._device)] = drawn
        columns = None if raw is None else logprob_columns(raw, token_ids, wanted)
        # NaN is every maximum it meets, so one value tells whether the row held any.
        return Sampled(token_ids, highest.isfinite(), columns)

    def _draw(
        self,
        logits: Tensor,
        rows: list[int],
        params: list[SamplingParams],
        slots: list[Slot],
        lengths: list[int],
    ) -> Tensor:
        if len(rows) < len(slots):
            logits = logits[torch.tensor(rows, device=self._device)]
        slot, position = torch.tensor(
            [[slots[row] for row in rows], [lengths[row] for row in rows]]
        ).to(self._device)
        floats = self._floats[slot]
        logits = logits / floats[:, TEMPERATURE, None]
        some = [params[row] for row in rows]
        if any(p.min_p > 0 for p in some):
            floor = logits.max(-1, keepdim=True).values + floats[:, MIN_P, None].log()
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if any(p.top_k > 0 or p.top_p < 1 for p in some):
            logits = keep_top(logits, self._top_k[slot], floats[:, TOP_P])
        return race(logits, self._seeds[slot], position)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf for all but the `top_k` likeliest (0 or less: all), then all but the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability, after top-k, reaches
    `top_p` (Holtzman et al. 2020); it always holds one. `logits` [n, vocab], the others [n].
    """
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    values = values.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), -torch.inf)
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs
    values = values.masked_fill((before >= top_p[:, None]) & (rank > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, values)
