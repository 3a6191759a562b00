"""Attention in plain torch: the CPU's backend, and the oracle of the kernels.

Keys and values are gathered token by token into dense memory, never block by block, so that a row
reads its own tokens only: what lies in unwritten slots (NaN perhaps) never enters a product.

The cache is seen as rows, one token's keys or values each: [kv_heads, head_dim]. In one layer's view
    key of slot (block, offset)    row  block · block_rows + offset
    value                          the same + value_rows

One-token rows are padded to the longest of their group and attended at once; padding repeats the
row's newest token behind a mask of -inf. A group is small enough to stay in a core's own cache. Rows with several tokens are attended one by one, a slice
of queries at a time, under one mask that every row and slice shares as a view.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.attention.batch import Batch
from pagedserve.device import Device
from pagedserve.spec import Attn

MAX_MASK_ELEMENTS = 1 << 21  # of a slice of queries × its context
MIN_SLICE = 32
GROUP_COST_TOKENS = 256  # one more group costs about as much time as gathering these
MAX_GROUP_BYTES = 2 << 20  # of the gathered copy, which should not leave the core's own cache


@dataclass(frozen=True, slots=True)
class Layout:
    """How one layer's view lies in memory, counted in rows. Equal for all layers."""

    block_rows: int
    value_rows: int

    @classmethod
    def of(cls, kv: Tensor) -> Layout:
        width = kv.shape[3] * kv.shape[4]
        blocks, parts, *inner = kv.stride()
        assert inner == [width, kv.shape[4], 1], "a block's keys must be contiguous"
        assert blocks % width == 0 and parts % width == 0
        return cls(blocks // width, parts // width)


@dataclass(frozen=True, slots=True)
class Decodes:
    """One-token rows that are attended together: `start` … `stop` - 1 in `Work.order`.

    index: [2 · n · length] cache rows, keys, then values; mask: [n, 1, 1, length] 0 or -inf, None if
    no row is padded.
    """

    start: int
    stop: int
    index: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Prefill:
    """A row of several tokens: tokens first … first + count - 1 of the batch.

    index: [2 · length] cache rows of its last `length` tokens of context; None if these are just
    the step's own tokens.
    """

    first: int
    count: int
    length: int
    index: Tensor | None


@dataclass(frozen=True, slots=True)
class Work:
    """What the layers with the same window share.

    order: one-token rows from the longest to the shortest, None if they come so. mask: [slice,
    context + slice], see `band`.
    """

    num_decodes: int
    order: Tensor | None
    decodes: list[Decodes]
    prefills: list[Prefill]
    slice: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Places:
    """Where this step's tokens go: cache rows of their keys and values, [num_tokens] int64 each."""

    layout: Layout
    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class TorchPlan:
    """Made as the layers come: `places` by the first, `work` by the first of each window."""

    batch: Batch
    places: Places | None = None
    work: dict[int | None, Work] = field(default_factory=dict)


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
            self.prefill(q, k, v, cache, row, work, attn, out)
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

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Tensor,
        row: Prefill,
        work: Work,
        attn: Attn,
        out: Tensor,
    ) -> None:
        """Attend one row's queries, slice by slice, into its part of `out`."""
        end = row.first + row.count
        if row.index is None:
            keys, values = (t[row.first : end].transpose(0, 1)[None] for t in (k, v))
        else:
            keys, values = self.gather(cache, row.index, 1, q.dtype, attn)
        past = row.length - row.count
        for start in range(0, row.count, work.slice):
            stop = min(start + work.slice, row.count)
            low = max(0, past + start + 1 - attn.window) if attn.window else 0
            seen = slice(low, past + stop)
            result = F.scaled_dot_product_attention(
                q[row.first + start : row.first + stop].transpose(0, 1)[None],
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=band_for(work.mask, stop - start, past + stop - low),
                is_causal=work.mask is None,
                scale=attn.scale,
                enable_gqa=attn.heads != attn.kv_heads,
            )
            out[row.first + start : row.first + stop] = result[0].transpose(0, 1)

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


def cache_rows(kv: Tensor, layout: Layout) -> Tensor:
    """One layer's view as [rows, kv_heads, head_dim], with the other layers' rows in between."""
    blocks, _, block_size, heads, head_dim = kv.shape
    rows = (blocks - 1) * layout.block_rows + layout.value_rows + block_size
    return kv.as_strided((rows, heads, head_dim), (heads * head_dim, head_dim, 1))


def place_tokens(batch: Batch, layout: Layout) -> Places:
    """Cache rows of the batch's slots."""
    slots, block_size = batch.slot_mapping, batch.block_size
    keys = slots + slots // block_size * (layout.block_rows - block_size)
    return Places(layout, keys, keys + layout.value_rows)


def lay_out(
    batch: Batch, places: Places, window: int | None, cache: Tensor, dtype: torch.dtype
) -> Work:
    """Groups of one-token rows, the other rows, and their mask."""
    max_tokens = MAX_GROUP_BYTES // (2 * cache[0].nbytes)
    order, decodes = decode_groups(batch, places, window, max_tokens, dtype)
    prefills, first = [], batch.num_decodes
    for row in range(batch.num_decodes, len(batch.counts)):
        prefills.append(prefill_row(batch, places.layout, row, first, window))
        first += batch.counts[row]
    slice_, mask = band(prefills, window, dtype, batch.input_ids.device)
    return Work(batch.num_decodes, order, decodes, prefills, slice_, mask)


def decode_groups(
    batch: Batch, places: Places, window: int | None, max_tokens: int, dtype: torch.dtype
) -> tuple[Tensor | None, list[Decodes]]:
    """One-token rows by falling length, in groups of at most `max_tokens` or of one row."""
    count = batch.num_decodes
    lens = batch.lens[:count]
    tables, newest = batch.block_tables[:count], places.keys[:count]
    seq_lens, order = batch.seq_lens[:count], None
    if any(a < b for a, b in itertools.pairwise(lens)):
        rows = sorted(range(count), key=lambda row: -lens[row])
        lens = [lens[row] for row in rows]
        order = torch.tensor(rows, device=tables.device)
        tables, newest, seq_lens = tables[order], newest[order], seq_lens[order]
    seen = [min(n, window) for n in lens] if window else lens
    decodes = []
    for start, stop in groups(seen, max_tokens):
        part, length = slice(start, stop), seen[start]
        starts = None
        if window and lens[start] > window:
            starts = (seq_lens[part, None] - window).clamp_(min=0)
        index = token_rows(tables[part], starts, length, batch.block_size, places.layout)
        mask = None
        if seen[stop - 1] != length:
            position = torch.arange(length, device=tables.device)
            valid = (position if starts is None else position + starts) < seq_lens[part, None]
            index = torch.where(valid, index, newest[part, None])
            mask = torch.where(valid, 0.0, -math.inf).to(dtype)[:, None, None]
        both = torch.cat((index, index + places.layout.value_rows)).view(-1)
        decodes.append(Decodes(start, stop, both, mask))
    return order, decodes


def groups(lens: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cut falling lengths into runs (start, stop): padding costs time, and so does every run."""
    runs, start, padding = [], 0, 0
    for row, length in enumerate(lens):
        padding += lens[start] - length
        if padding > GROUP_COST_TOKENS or lens[start] * (row - start + 1) > max(
            max_tokens, lens[start]
        ):
            runs.append((start, row))
            start, padding = row, 0
    return [*runs, (start, len(lens))] if lens else []


def prefill_row(batch: Batch, layout: Layout, row: int, first: int, window: int | None) -> Prefill:
    """Where one row of several tokens reads its context."""
    count, context = batch.counts[row], batch.lens[row]
    length = min(context, count + window - 1) if window else context
    if length == count:
        return Prefill(first, count, length, None)
    table = batch.block_tables[row : row + 1]
    starts = None if length == context else torch.tensor([[context - length]], device=table.device)
    index = token_rows(table, starts, length, batch.block_size, layout)[0]
    return Prefill(first, count, length, torch.cat((index, index + layout.value_rows)))


def token_rows(
    tables: Tensor, starts: Tensor | None, length: int, block_size: int, layout: Layout
) -> Tensor:
    """Cache rows of tokens starts[i] … starts[i] + length - 1: [n, length] int64.

    tables: [n, blocks]; starts: [n, 1], None for zeros. Beyond a row's own tokens the answer means
    nothing, but its block is one of the table's.
    """
    if starts is None:
        blocks = tables[:, : -(-length // block_size), None].long() * layout.block_rows
        return (blocks + torch.arange(block_size, device=tables.device)).flatten(1)[:, :length]
    position = starts + torch.arange(length, device=tables.device)
    entry = (position // block_size).clamp_(max=tables.shape[1] - 1)
    block = tables.long().gather(1, entry)
    return block * layout.block_rows + position % block_size


def band(
    rows: list[Prefill], window: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[int, Tensor | None]:
    """Queries to a slice, and the mask that all slices share: [slice, past + slice] of 0 and -inf.

    Query i sees column past + j (its own is j = i) where i - window < j ≤ i. None means that every
    row fits one slice over its own tokens only, so that plain causal attention says the same.
    """
    if not rows:
        return 1, None
    context = max(row.length for row in rows)
    size = min(max(row.count for row in rows), max(MIN_SLICE, MAX_MASK_ELEMENTS // context))
    own = all(row.index is None and row.count <= size for row in rows)
    if own and (window is None or context <= window):
        return size, None
    past = context
    distance = (
        torch.arange(size, device=device)[:, None] + past - torch.arange(past + size, device=device)
    )
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return size, mask.masked_fill_(hidden, -math.inf)


def band_for(mask: Tensor | None, queries: int, context: int) -> Tensor | None:
    """The view of `band` for `queries` queries that end a context of `context` tokens."""
    if mask is None:
        return None
    past = mask.shape[1] - mask.shape[0]
    return mask[:queries, past - (context - queries) : past + queries]
