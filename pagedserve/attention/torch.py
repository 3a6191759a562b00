"""Attention in plain torch: the CPU's backend, and the oracle of the kernels.

Keys and values are gathered token by token into dense memory, never block by block, so that a row
reads its own tokens only: what lies in unwritten slots (NaN perhaps) never enters a product.

The cache is seen as rows of one token's heads, E = kv_heads · head_dim numbers. In one layer's view
    key of slot (block, offset)    row  block · block_rows + offset
    value                          the same + value_rows

One-token rows are padded to the longest of their group and attended at once; padding repeats the
row's newest token behind a mask of -inf. Rows with several tokens are attended one by one, a slice
of queries at a time, under one mask that every row and slice shares as a view.
"""

from __future__ import annotations

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
MAX_GROUP_TOKENS = 1 << 14  # bounds the gathered copy


@dataclass(frozen=True, slots=True)
class Layout:
    """How one layer's view lies in memory, in rows of E numbers. Equal for all layers."""

    block_rows: int
    value_rows: int

    @classmethod
    def of(cls, kv: Tensor) -> Layout:
        width = kv.shape[3] * kv.shape[4]
        blocks, parts, tokens, _, last = kv.stride()
        assert tokens == width and last == 1, "a block's keys must be contiguous"
        assert blocks % width == 0 and parts % width == 0
        return cls(blocks // width, parts // width)


@dataclass(frozen=True, slots=True)
class Decodes:
    """One-token rows that are attended together.

    rows: which rows, None if all of them are the batch's first; index: [2 · n · length] cache rows,
    keys, then values; mask: [n, 1, 1, length] 0 or -inf, None if no row is padded.
    """

    rows: Tensor | None
    count: int
    length: int
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
    """What the layers with the same window share. mask: [slice, context + slice], see `band`."""

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
        self.scratch: dict[torch.dtype, Tensor] = {}

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
        tokens, width = q.shape[0], cache.shape[1]
        cache.index_copy_(0, places.keys, k.reshape(tokens, width).to(kv.dtype))
        cache.index_copy_(0, places.values, v.reshape(tokens, width).to(kv.dtype))
        work = plan.work.get(attn.window)
        if work is None:
            work = plan.work[attn.window] = lay_out(plan.batch, places, attn.window, q.dtype)
        if len(work.decodes) == 1 and not work.prefills and work.decodes[0].rows is None:
            return self.decode(q, cache, work.decodes[0], attn)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in work.decodes:
            if group.rows is None:
                out[: group.count] = self.decode(q[: group.count], cache, group, attn)
            else:
                out[group.rows] = self.decode(q[group.rows], cache, group, attn)
        for row in work.prefills:
            self.prefill(q, k, v, cache, row, work, attn, out)
        return out

    def decode(self, q: Tensor, cache: Tensor, group: Decodes, attn: Attn) -> Tensor:
        """q: [n, H, D] → [n, H, D]. The heads that share keys are the query's length."""
        k, v = self.gather(cache, group.index, group.count, q.dtype, attn)
        q = q.reshape(group.count, attn.kv_heads, -1, attn.head_dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=attn.scale)
        return out.reshape(group.count, attn.heads, attn.head_dim)

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
        needed = index.numel() * cache.shape[1]
        scratch = self.scratch.get(cache.dtype)
        if scratch is None or scratch.numel() < needed:
            scratch = self.scratch[cache.dtype] = cache.new_empty(needed + needed // 4)
        dense = scratch[:needed].view(index.numel(), cache.shape[1])
        torch.index_select(cache, 0, index, out=dense)
        k, v = dense.view(2, count, -1, attn.kv_heads, attn.head_dim).transpose(2, 3).to(dtype)
        return k, v


def cache_rows(kv: Tensor, layout: Layout) -> Tensor:
    """One layer's view as [rows, E], from its first key to its last value, other layers between."""
    blocks, _, block_size, heads, head_dim = kv.shape
    rows = (blocks - 1) * layout.block_rows + layout.value_rows + block_size
    return kv.as_strided((rows, heads * head_dim), (heads * head_dim, 1))


def place_tokens(batch: Batch, layout: Layout) -> Places:
    """Cache rows of the batch's slots."""
    slots, block_size = batch.slot_mapping, batch.block_size
    keys = slots + slots // block_size * (layout.block_rows - block_size)
    return Places(layout, keys, keys + layout.value_rows)


def lay_out(batch: Batch, places: Places, window: int | None, dtype: torch.dtype) -> Work:
    """Groups of one-token rows, the other rows, and their mask."""
    decodes = [decode_group(batch, places, rows, window, dtype) for rows in groups(batch, window)]
    prefills, first = [], batch.num_decodes
    for row in range(batch.num_decodes, len(batch.counts)):
        prefills.append(prefill_row(batch, places.layout, row, first, window))
        first += batch.counts[row]
    slice_, mask = band(prefills, window, dtype, batch.input_ids.device)
    return Work(decodes, prefills, slice_, mask)


def groups(batch: Batch, window: int | None) -> list[list[int]]:
    """One-token rows by similar length: padding costs time, and so does every group."""
    lens = [min(n, window) if window else n for n in batch.lens[: batch.num_decodes]]
    if not lens:
        return []
    if len(lens) * max(lens) - sum(lens) <= GROUP_COST_TOKENS and (
        len(lens) * max(lens) <= MAX_GROUP_TOKENS
    ):
        return [list(range(len(lens)))]
    made: list[list[int]] = []
    padding = 0
    for row in sorted(range(len(lens)), key=lambda row: -lens[row]):
        if made:
            longest = lens[made[-1][0]]
            padding += longest - lens[row]
            if padding <= GROUP_COST_TOKENS and longest * len(made[-1]) < MAX_GROUP_TOKENS:
                made[-1].append(row)
                continue
        made.append([row])
        padding = 0
    return made


def decode_group(
    batch: Batch, places: Places, rows: list[int], window: int | None, dtype: torch.dtype
) -> Decodes:
    """Index and mask of the rows; see `Decodes`."""
    layout, device = places.layout, batch.input_ids.device
    everyone = rows == list(range(len(rows)))
    chosen = None if everyone else torch.tensor(rows, device=device)
    pick = slice(len(rows)) if chosen is None else chosen
    lens = [batch.lens[row] for row in rows]
    length = max(min(n, window) if window else n for n in lens)
    if window is None or max(lens) <= window:
        starts = torch.zeros((len(rows), 1), dtype=torch.int64, device=device)
    else:
        starts = (batch.seq_lens[pick, None] - window).clamp_(min=0)
    index = token_rows(batch.block_tables[pick], starts, length, batch.block_size, layout)
    mask = None
    if any((min(n, window) if window else n) != length for n in lens):
        position = starts + torch.arange(length, device=device)
        valid = position < batch.seq_lens[pick, None]
        index = torch.where(valid, index, places.keys[pick, None])
        mask = torch.zeros((len(rows), 1, 1, length), dtype=dtype, device=device)
        mask.masked_fill_(~valid[:, None, None], -math.inf)
    both = torch.stack((index, index + layout.value_rows)).flatten()
    return Decodes(chosen, len(rows), length, both, mask)


def prefill_row(batch: Batch, layout: Layout, row: int, first: int, window: int | None) -> Prefill:
    """Where one row of several tokens reads its context."""
    count, context = batch.counts[row], batch.lens[row]
    length = min(context, count + window - 1) if window else context
    if length == count:
        return Prefill(first, count, length, None)
    table = batch.block_tables[row : row + 1]
    starts = torch.full((1, 1), context - length, device=table.device)
    index = token_rows(table, starts, length, batch.block_size, layout)[0]
    return Prefill(first, count, length, torch.cat((index, index + layout.value_rows)))


def token_rows(
    tables: Tensor, starts: Tensor, length: int, block_size: int, layout: Layout
) -> Tensor:
    """Cache rows of tokens starts[i] … starts[i] + length - 1: [n, length] int64.

    tables: [n, blocks], starts: [n, 1]. Beyond a row's last block the answer means nothing, but is
    in range of the table.
    """
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
