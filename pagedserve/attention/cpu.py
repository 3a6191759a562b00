"""Attention on a CPU by the C++ kernels: keys and values are read where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.attention.base import Most
from pagedserve.attention.batch import Batch
from pagedserve.device import Device
from pagedserve.kernels import cpu
from pagedserve.spec import Attn


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """Where this step's tokens go, and the rows that they belong to."""

    slot_mapping: Tensor
    rows: cpu.PagedRows


class CpuAttention:
    """Rows of one token and of several alike."""

    name = "cpu"
    needs_lens = True
    takes_written = False

    def __init__(self, device: Device):
        self.kernels = None if device.is_gpu else cpu.load()

    def supports(self, attn: Attn, kv_dtype: torch.dtype, block_size: int) -> str | None:
        """See `AttentionBackend`."""
        if self.kernels is None:
            return "it needs the C++ kernels, and a CPU"
        if kv_dtype != torch.float32:
            return f"a cache of {kv_dtype} is not supported"
        if attn.heads % attn.kv_heads:
            return f"{attn.heads} query heads do not divide among {attn.kv_heads} key/value heads"
        return None

    def workspace_bytes(self, attns: list[Attn], most: Most, kv_dtype: torch.dtype) -> int:
        """See `AttentionBackend`. Scores stay in a core's own memory."""
        return 0

    def plan(self, batch: Batch) -> CpuPlan:
        """See `AttentionBackend`."""
        rows = cpu.PagedRows(batch.block_tables.long(), batch.seq_lens, batch.query_start_loc)
        return CpuPlan(batch.slot_mapping, rows)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        kv: Tensor,
        plan: CpuPlan,
        attn: Attn,
        *,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend`."""
        assert self.kernels is not None and k is not None
        assert (slopes is None) == (attn.alibi is None) and (sinks is not None) == attn.sinks
        self.kernels.kv_write(kv, plan.slot_mapping, k, v)
        return self.kernels.paged_attention(
            q,
            kv,
            plan.rows,
            scale=attn.scale,
            window=attn.window,
            chunk=attn.chunk,
            softcap=attn.softcap,
            slopes=slopes,
            sinks=sinks,
            values_in_keys=attn.values_in_keys,
        )
