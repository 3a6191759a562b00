"""Attention in plain torch: the CPU's backend, and the oracle of the kernels.

Keys and values are gathered token by token into dense memory, never block by block, so that a row
reads its own tokens only: what lies in unwritten slots (NaN perhaps) never enters a product. Groups
of one-token rows are attended at once, each small enough to stay in a core's own cache; rows with
several tokens one by one, a slice of queries at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.attention.batch import Batch
from pagedserve.attention.torch_plan import (
    Layout,
    TorchPlan,
    Work,
    band_for,
    cache_rows,
    lay_out,
    place_tokens,
)
from pagedserve.device import Device
from pagedserve.spec import Attn


class TorchAttention:
    """See the module. Its scratch for gathered keys and values serves all layers."""

    name = "torch"

    def __init__(self, device: Device):
        self.scratch: dict[tuple[torch.dtype, int, int], Tensor] = {}  # by dtype, heads, head_dim

    def supports(self, attn: Attn, kv_dtype: torch.dtype, block_size: int) -> str | None:
        """See `AttentionBackend`."""
        if attn.heads % attn.kv_heads:
            return f"{attn.heads} query heads do not divide among {attn.kv_heads} key/value heads"
        if not kv_dtype.is_floating_point or kv_dtype.itemsize < 2:
            return f"a cache of {kv_dtype} is not supported"
        return None

    def plan(self, batch: Batch) -> TorchPlan:
        """See `AttentionBackend`. The work itself is laid out at the first layer that needs it."""
        return TorchPlan(batch)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor, plan: TorchPlan, attn: Attn
    ) -> Tensor:
        """See `AttentionBackend`."""
        places = plan.places
        if places is None:
            places = plan.places = place_tokens(plan.batch, Layout.of(kv))
        cache = cache_rows(kv, places.layout)
        cache.index_copy_(0, places.keys, k if k.dtype == kv.dtype else k.to(kv.dtype))
        cache.index_copy_(0, places.values, v if v.dtype == kv.dtype else v.to(kv.dtype))
        work = plan.work.get(attn.window)
        if work is None:
            work = plan.work[attn.window] = lay_out(plan.batch, places, attn.window, cache, q.dtype)
        if not work.prefills:
            return self.decode(q, cache, work, attn)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if work.decodes:
            out[: work.num_decodes] = self.decode(q[: work.num_decodes], cache, work, attn)
        for row in work.prefills:
            own = slice(row.first, row.first + row.count)
            if row.index is None:
                keys, values = (t[own].transpose(0, 1)[None] for t in (k, v))
            else:
                keys, values = self.gather(cache, row.index, 1, q.dtype, attn)
            attend(q[own], keys, values, out[own], work=work, attn=attn)
        return out

    def decode(self, q: Tensor, cache: Tensor, work: Work, attn: Attn) -> Tensor:
        """q: [num_decodes, H, D] → the same. The heads that share keys are the query's length."""
        if work.order is not None:
            q = q.index_select(0, work.order)
        q = q.view(work.num_decodes, attn.kv_heads, -1, attn.head_dim)
        outs = []
        for group in work.decodes:
            count = group.stop - group.start
            k, v = self.gather(cache, group.index, count, q.dtype, attn)
            part = q if count == work.num_decodes else q.narrow(0, group.start, count)
            outs.append(
                F.scaled_dot_product_attention(part, k, v, attn_mask=group.mask, scale=attn.scale)
            )
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        out = out.reshape(work.num_decodes, attn.heads, attn.head_dim)
        return out if work.order is None else torch.empty_like(out).index_copy_(0, work.order, out)

    def gather(
        self, cache: Tensor, index: Tensor, count: int, dtype: torch.dtype, attn: Attn
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of `count` rows, each [count, kv_heads, length, head_dim].

        They lie in the scratch until the next call: fresh memory of this size would cost a page
        fault every 4 KiB, several times the copy itself.
        """
        rows = index.shape[0]
        key = (cache.dtype, *cache.shape[1:])
        scratch = self.scratch.get(key)
        if scratch is None or scratch.shape[0] < rows:
            scratch = self.scratch[key] = cache.new_empty(rows + rows // 4, *cache.shape[1:])
        dense = scratch.narrow(0, 0, rows)
        torch.index_select(cache, 0, index, out=dense)
        if dtype != dense.dtype:
            dense = dense.to(dtype)
        k, v = dense.view(2, count, -1, attn.kv_heads, attn.head_dim).transpose(2, 3)
        return k, v


def attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, *, work: Work, attn: Attn) -> None:
    """One row's queries, the last of its context, slice by slice into `out`.

    q, out: [count, H, D]; keys, values: [1, kv_heads, context, D], context ≥ count.
    """
    count, past = q.shape[0], keys.shape[2] - q.shape[0]
    for start in range(0, count, work.slice):
        stop = min(start + work.slice, count)
        low = max(0, past + start + 1 - attn.window) if attn.window else 0
        seen = slice(low, past + stop)
        result = F.scaled_dot_product_attention(
            q[start:stop].transpose(0, 1)[None],
            keys[:, :, seen],
            values[:, :, seen],
            attn_mask=band_for(work.mask, stop - start, past + stop - low),
            is_causal=work.mask is None,
            scale=attn.scale,
            enable_gqa=attn.heads != attn.kv_heads,
        )
        out[start:stop] = result[0].transpose(0, 1)
