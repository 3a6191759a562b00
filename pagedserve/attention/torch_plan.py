"""Where the torch backend reads and writes: one step's work as cache rows and masks.

The cache is seen as rows, one token's keys or values each: [kv_heads, head_dim]. In one layer's
view, with the other layers' rows in between:
    key of slot (block, offset)    row  block · block_rows + offset
    value                          the same + value_rows

One-token rows of the batch are padded to the longest of their group; padding repeats the row's
newest token behind a mask of -inf. Rows with several tokens share one mask, of which every slice of
queries takes a view.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagedserve.attention.batch import Batch

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

    index: [2 · n · length] cache rows, keys, then values; mask: [n, 1, 1, length] 0 or -inf, None
    if no row is padded.
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
