"""Where the torch backend reads and writes: one step's work as cache rows and masks.

The cache is seen as rows, one token's keys or values each: [kv_heads, head_dim]. In one layer's
view, with the other layers' rows in between:
    key of slot (block, offset)    row  block · block_rows + offset
    value                          the same + value_rows

One-token rows of the batch are padded to the longest of their group; padding repeats the row's
newest token behind a mask of -inf. Rows with several tokens share one mask, of which every slice of
queries takes a view, unless their chunks make it depend on where they are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagedserve.attention.batch import Batch
from pagedserve.spec import Attn

MAX_MASK_ELEMENTS = 1 << 21  # of a slice of queries × its context
MIN_SLICE = 32
GROUP_COST_TOKENS = 256  # one more group costs about as much time as gathering these
MAX_GROUP_BYTES = 2 << 20  # of the gathered copy, which should not leave the core's own cache


@dataclass(frozen=True, slots=True)
class Layout:
    """How one layer's view lies in memory, counted in rows. Equal for all layers of a shape.

    `value_rows` is None where values are part of the keys.
    """

    block_rows: int
    value_rows: int | None

    @classmethod
    def of(cls, kv: Tensor) -> Layout:
        width = kv.shape[3] * kv.shape[4]
        blocks, parts, *inner = kv.stride()
        assert inner == [width, kv.shape[4], 1], "a block's keys must be contiguous"
        assert blocks % width == 0 and parts % width == 0
        return cls(blocks // width, parts // width if kv.shape[1] == 2 else None)

    def with_values(self, index: Tensor) -> Tensor:
        """Rows of keys → rows of the keys, then of their values, along the first dimension."""
        if self.value_rows is None:
            return index
        return torch.cat((index, index + self.value_rows))


@dataclass(frozen=True, slots=True)
class Sight:
    """Which of its context a query sees: the last `window` tokens, and those of its own chunk."""

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, attn: Attn) -> Sight:
        return cls(attn.window, attn.chunk)

    def first(self, position: int) -> int:
        """First position that a query at `position` sees."""
        start = max(0, position + 1 - self.window) if self.window else 0
        return max(start, position - position % self.chunk) if self.chunk else start

    def hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries: [.., Q, 1], keys: [.., 1, K] positions → [.., Q, K] bool: not seen."""
        distance = queries - keys
        hidden = distance < 0
        if self.window:
            hidden |= distance >= self.window
        if self.chunk:
            hidden |= queries // self.chunk != keys // self.chunk
        return hidden


@dataclass(frozen=True, slots=True)
class Decodes:
    """One-token rows that are attended together: `start` … `stop` - 1 in `Work.order`.

    index: [2 · n · length] cache rows, keys, then values; mask: [n, 1, 1, length] 0 or -inf, None
    if no row is padded. ages: [n, 1, 1, length] how far each key lies behind the query.
    """

    start: int
    stop: int
    index: Tensor
    mask: Tensor | None
    ages: Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """A row of several tokens: tokens first … first + count - 1 of the batch.

    index: [2 · length] cache rows of its last `length` tokens of context, which end at position
    `context` - 1; None if these are just the step's own tokens.
    """

    first: int
    count: int
    length: int
    context: int
    index: Tensor | None


@dataclass(frozen=True, slots=True)
class Work:
    """What the layers of the same layout and sight share.

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
    values: Tensor | None


@dataclass(slots=True)
class TorchPlan:
    """Made as the layers come: `places` by the first of each layout, `work` of each sight too."""

    batch: Batch
    places: dict[Layout, Places] = field(default_factory=dict)
    work: dict[tuple[Layout, Sight], Work] = field(default_factory=dict)


def cache_rows(kv: Tensor, layout: Layout) -> Tensor:
    """One layer's view as [rows, kv_heads, head_dim], with the other layers' rows in between."""
    blocks, _, block_size, heads, head_dim = kv.shape
    rows = (blocks - 1) * layout.block_rows + (layout.value_rows or 0) + block_size
    return kv.as_strided((rows, heads, head_dim), (heads * head_dim, head_dim, 1))


def place_tokens(batch: Batch, layout: Layout) -> Places:
    """Cache rows of the batch's slots."""
    slots, block_size = batch.slot_mapping, batch.block_size
    keys = slots + slots // block_size * (layout.block_rows - block_size)
    return Places(layout, keys, None if layout.value_rows is None else keys + layout.value_rows)


def lay_out(batch: Batch, places: Places, sight: Sight, cache: Tensor, dtype: torch.dtype) -> Work:
    """Groups of one-token rows, the other rows, and their mask."""
    max_tokens = MAX_GROUP_BYTES // (2 * cache[0].nbytes)
    order, decodes = decode_groups(batch, places, sight, max_tokens, dtype)
    prefills, first = [], batch.num_decodes
    for row in range(batch.num_decodes, len(batch.counts)):
        prefills.append(prefill_row(batch, places.layout, row, first, sight))
        first += batch.counts[row]
    slice_, mask = band(prefills, sight, dtype, batch.input_ids.device)
    return Work(batch.num_decodes, order, decodes, prefills, slice_, mask)


def decode_groups(
    batch: Batch, places: Places, sight: Sight, max_tokens: int, dtype: torch.dtype
) -> tuple[Tensor | None, list[Decodes]]:
    """One-token rows by what they see, most first, in groups of at most `max_tokens` or one row."""
    count = batch.num_decodes
    tables, newest = batch.block_tables[:count], places.keys[:count]
    seq_lens, order = batch.seq_lens[:count], None
    first = [sight.first(n - 1) for n in batch.lens[:count]]
    seen = [n - low for n, low in zip(batch.lens[:count], first, strict=True)]
    if any(a < b for a, b in itertools.pairwise(seen)):
        rows = sorted(range(count), key=lambda row: -seen[row])
        first, seen = [first[row] for row in rows], [seen[row] for row in rows]
        order = torch.tensor(rows, device=tables.device)
        tables, newest, seq_lens = tables[order], newest[order], seq_lens[order]
    decodes = []
    for start, stop in groups(seen, max_tokens):
        part, length = slice(start, stop), seen[start]
        starts = None
        if any(first[part]):
            starts = torch.tensor(first[part], device=tables.device)[:, None]
        index = token_rows(tables[part], starts, length, batch.block_size, places.layout)
        position = torch.arange(length, device=tables.device)
        ages = seq_lens[part, None] - 1 - (position if starts is None else position + starts)
        mask = None
        if seen[stop - 1] != length:
            valid = ages >= 0
            index = torch.where(valid, index, newest[part, None])
            mask = torch.where(valid, 0.0, -math.inf).to(dtype)[:, None, None]
        both = places.layout.with_values(index).view(-1)
        decodes.append(Decodes(start, stop, both, mask, ages[:, None, None]))
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


def prefill_row(batch: Batch, layout: Layout, row: int, first: int, sight: Sight) -> Prefill:
    """Where one row of several tokens reads its context."""
    count, context = batch.counts[row], batch.lens[row]
    length = context - sight.first(context - count)
    if length == count:
        return Prefill(first, count, length, context, None)
    table = batch.block_tables[row : row + 1]
    starts = None if length == context else torch.tensor([[context - length]], device=table.device)
    index = token_rows(table, starts, length, batch.block_size, layout)[0]
    return Prefill(first, count, length, context, layout.with_values(index))


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
    rows: list[Prefill], sight: Sight, dtype: torch.dtype, device: torch.device
) -> tuple[int, Tensor | None]:
    """Queries to a slice, and the mask that all slices share: [slice, past + slice] of 0 and -inf.

    Query i sees column past + j (its own is j = i) where i - window < j ≤ i. None means that every
    row fits one slice over its own tokens only, so that plain causal attention says the same; or
    that there are chunks, for which there is no mask that fits all.
    """
    if not rows:
        return 1, None
    context = max(row.length for row in rows)
    size = min(max(row.count for row in rows), max(MIN_SLICE, MAX_MASK_ELEMENTS // context))
    own = all(row.index is None and row.count <= size for row in rows)
    if sight.chunk or (own and (sight.window is None or context <= sight.window)):
        return size, None
    past = context
    queries = torch.arange(past, past + size, device=device)[:, None]
    hidden = Sight(sight.window).hidden(queries, torch.arange(past + size, device=device))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return size, mask.masked_fill_(hidden, -math.inf)


def band_for(mask: Tensor | None, queries: int, context: int) -> Tensor | None:
    """The view of `band` for `queries` queries that end a context of `context` tokens."""
    if mask is None:
        return None
    past = mask.shape[1] - mask.shape[0]
    return mask[:queries, past - (context - queries) : past + queries]
