"""The seam between the model and what computes attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pagedserve.attention.batch import Batch
from pagedserve.spec import Attn

Plan = Any  # a backend's own notes on one batch; only that backend looks inside


@dataclass(frozen=True, slots=True)
class Most:
    """The largest step: so many rows, tokens, and tokens of one row's context."""

    rows: int
    tokens: int
    context: int
    block_size: int


class AttentionBackend(Protocol):
    """Computes attention for whole batches. Knows no model: what it computes is said by `attn`."""

    name: str
    needs_lens: bool  # it reads a batch's counts and lens, not only its tensors
    takes_written: bool  # k may be None: this step's keys and values are in the cache already

    def supports(self, attn: Attn, kv_dtype: torch.dtype, block_size: int) -> str | None:
        """None, or why this backend cannot compute `attn` over such a cache."""
        ...

    def workspace_bytes(self, attns: list[Attn], most: Most, kv_dtype: torch.dtype) -> int:
        """What the layers of a step take beside what they get and give, at most."""
        ...

    def plan(self, batch: Batch) -> Plan:
        """What all layers share of one step. The plan is good for this batch only."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        kv: Tensor,
        plan: Plan,
        attn: Attn,
        *,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write k and v into the cache, then attend causally, as `attn` says.

        q: [num_tokens, heads, head_dim]; k, v: [num_tokens, kv_heads, head_dim], any stride between
        tokens. kv: one layer's view [num_blocks, 2, block_size, kv_heads, head_dim] of the cache;
        a block's keys are contiguous, and its values. Memory of the cache that was never written
        may hold anything, NaN included. slopes: [heads] float32, where `attn.alibi`: slope times
        the distance is taken from each score. sinks: [heads] float32, where `attn.sinks`. Returns
        [num_tokens, heads, head_dim], contiguous.

        Where `attn.values_in_keys`: v is None, kv [num_blocks, 1, block_size, kv_heads, head_dim],
        and the result [num_tokens, heads, values_in_keys].
        """
        ...
