"""Attention in plain torch: the CPU's backend, and the oracle of the kernels.

Keys and values are gathered token by token into dense memory, never block by block, so that a row
reads its own tokens only: what lies in unwritten slots (NaN perhaps) never enters a product. Groups
of one-token rows are attended at once, each small enough to stay in a core's own cache; rows with
several tokens one by one, a slice of queries at a time.

Plain scores are torch's own attention's; what is done to scores before their softmax (softcap,
biases, sinks, chunks) is written out in `torch_scores.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.attention.base import Most
from pagedserve.attention.batch import Batch
from pagedserve.attention.torch_plan import (
    Layout,
    Prefill,
    Sight,
    TorchPlan,
    Work,
    band_for,
    cache_rows,
    lay_out,
    place_tokens,
)
from pagedserve.attention.torch_scores import Scores
from pagedserve.device import Device
from pagedserve.spec import Attn


class TorchAttention:
    """See the module. Its scratch for gathered keys and values serves all layers."""

    name = "torch"
    needs_lens = True
    takes_written = False

    def __init__(self, device: Device):
        self.scratch: dict[tuple[torch.dtype, int, int], Tensor] = {}  # by dtype, heads, head_dim

    def supports(self, attn: Attn, kv_dtype: torch.dtype, block_size: int) -> str | None:
        """See `AttentionBackend`."""
        if attn.heads % attn.kv_heads:
            return f"{attn.heads} query heads do not divide among {attn.kv_heads} key/value heads"
        if not kv_dtype.is_floating_point or kv_dtype.itemsize < 2:
            return f"a cache of {kv_dtype} is not supported"
        return None

    def workspace_bytes(self, attns: list[Attn], most: Most, kv_dtype: torch.dtype) -> int:
        """See `AttentionBackend`. One row's keys and values may be spread to all heads, in fp32."""
        heads = max((attn.heads * attn.head_dim for attn in attns), default=0)
        return 2 * most.context * heads * 4

    def plan(self, batch: Batch) -> TorchPlan:
        """See `AttentionBackend`. The work itself is laid out at the first layer that needs it."""
        return TorchPlan(batch)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        kv: Tensor,
        plan: TorchPlan,
        attn: Attn,
        *,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend`."""
        assert k is not None
        layout, sight = Layout.of(kv), Sight.of(attn)
        places = plan.places.get(layout)
        if places is None:
            places = plan.places[layout] = place_tokens(plan.batch, layout)
        cache = cache_rows(kv, layout)
        cache.index_copy_(0, places.keys, k if k.dtype == kv.dtype else k.to(kv.dtype))
        if places.values is not None and v is not None:
            cache.index_copy_(0, places.values, v if v.dtype == kv.dtype else v.to(kv.dtype))
        work = plan.work.get((layout, sight))
        if work is None:
            work = lay_out(plan.batch, places, sight, cache, q.dtype)
            plan.work[layout, sight] = work
        scores = Scores(attn, sight, slopes, sinks)
        if not work.prefills:
            return self.decode(q, cache, work, scores)
        out = q.new_empty((*q.shape[:2], attn.values_in_keys or attn.head_dim))
        if work.decodes:
            out[: work.num_decodes] = self.decode(q[: work.num_decodes], cache, work, scores)
        for row in work.prefills:
            own = slice(row.first, row.first + row.count)
            if row.index is None:
                keys = k[own].transpose(0, 1)[None]
                values = keys if v is None else v[own].transpose(0, 1)[None]
            else:
                keys, values = self.gather(cache, row.index, 1, q.dtype, attn)
            if attn.values_in_keys:
                values = keys[..., : attn.values_in_keys]
            attend(q[own], keys, values, out[own], row=row, work=work, scores=scores)
        return out

    def decode(self, q: Tensor, cache: Tensor, work: Work, scores: Scores) -> Tensor:
        """q: [num_decodes, H, D] → the same. The heads that share keys are the query's length."""
        attn = scores.attn
        if work.order is not None:
            q = q.index_select(0, work.order)
        q = q.view(work.num_decodes, attn.kv_heads, -1, attn.head_dim)
        outs = []
        for group in work.decodes:
            count = group.stop - group.start
            k, v = self.gather(cache, group.index, count, q.dtype, attn)
            part = q if count == work.num_decodes else q.narrow(0, group.start, count)
            if scores.plain:
                outs.append(
                    F.scaled_dot_product_attention(
                        part, k, v, attn_mask=group.mask, scale=attn.scale
                    )
                )
            else:
                hidden = None if group.mask is None else group.mask != 0
                out = scores.attend(part.unsqueeze(3), k, v, ages=group.ages, hidden=hidden)
                outs.append(out.squeeze(3))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        out = out.reshape(work.num_decodes, attn.heads, -1)
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
        if attn.values_in_keys:
            keys = dense.view(count, -1, attn.kv_heads, attn.head_dim).transpose(1, 2)
            return keys, keys[..., : attn.values_in_keys]
        k, v = dense.view(2, count, -1, attn.kv_heads, attn.head_dim).transpose(2, 3)
        return k, v


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    row: Prefill,
    work: Work,
    scores: Scores,
) -> None:
    """One row's queries, the last of its context, slice by slice into `out`.

    q, out: [count, H, D]; keys, values: [1, kv_heads, length, D] of the context's last tokens.
    """
    attn, count = scores.attn, row.count
    past, before = row.length - count, row.context - row.length  # of `keys`, and not in them
    size = work.slice if scores.plain else scores.slice(count, row.length)
    for start in range(0, count, size):
        stop = min(start + size, count)
        low = max(0, scores.sight.first(before + past + start) - before)
        seen = slice(low, past + stop)
        queries = q[start:stop].transpose(0, 1)[None]
        if scores.plain:
            result = F.scaled_dot_product_attention(
                queries,
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=band_for(work.mask, stop - start, past + stop - low),
                is_causal=work.mask is None,
                scale=attn.scale,
                enable_gqa=attn.heads != attn.kv_heads,
            )
        else:
            position = torch.arange(before + low, before + past + stop, device=q.device)
            own = position[past + start - low :, None]
            result = scores.attend(
                queries.reshape(1, attn.kv_heads, -1, stop - start, attn.head_dim),
                keys[:, :, seen],
                values[:, :, seen],
                ages=own - position,
                hidden=scores.sight.hidden(own, position),
            ).flatten(1, 2)
        out[start:stop] = result[0].transpose(0, 1)
