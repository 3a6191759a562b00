"""Attention of one new token a row over the paged cache, in Triton: the work in equal shares.

    out[t, h] = softmax(scale · q[t, h] · K_rowᵀ) · V_row       key/value head h // GROUP

The keys that each row sees are cut into tiles, the tiles of all rows are laid end to end, and the
line is cut into equal bins. A program takes one bin for one key/value head, so a fixed grid is busy
to its end whatever the lengths are, and one CUDA graph serves all of them:

    row         0          1   2          3
    tiles   │──────────│─────│──│───────────────────────│
    bins    │        0       │        1       │        2       │

    starts  [rows + 1]        tiles before each row
    pieces  [tiles, TILE / G] where each G tokens of a tile lie, and which of them are seen
    marks   [tiles, 2]        each tile's token of queries · 2 + whether it is its row's last, and
                              how far its first key is from the query
    bins    [num_bins, 16]    where each bin begins and ends, and its first and last row

`plan_decode` makes these on the device, once for all layers that see alike. With them a program
runs through its tiles in one loop whatever rows they are of, and keys of the next row are on their
way while the last of this one are multiplied: a loop of its own for each row would wait for memory
at every row's beginning, which costs as much as reading 500 tokens.

A row that lies in one bin is finished there. Of any other, each program leaves a part (maximum,
sum, weighted values), two at most: of its first row and of its last. The last program to arrive at
a row merges the parts and puts the row's counter back to 0, so layers follow each other without a
second launch.

What changes from step to step (rows, strides of tables, alignment of a step's tensors) makes no
variant of a kernel, which would be compiled in the middle of serving.

Heads that share keys are one tile of queries, BLOCK_H at a time (16 at least, for tensor cores).
Rows of several tokens, and of none, have no tiles here: their attention is `paged_prefill`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant
from pagedserve.kernels.capability import has_small_memory
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait
from pagedserve.kernels.paged_scores import LOG2E, MASKED, first_seen, in_base_2, with_sink

# Of a bin: begin, end, size; its first row, where that begins and ends; the same of its last row.
FIELDS = tl.constexpr(16)
FEW_ROWS = 8


@triton.jit(
    do_not_specialize=["num_rows", "num_counters"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "query_start_ptr"],
)
def plan_decode_kernel(
    seq_lens_ptr,
    query_start_ptr,
    starts_ptr,
    bins_ptr,
    counters_ptr,
    num_rows,
    num_counters,
    NUM_BINS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. ROWS and BINS: how many are looked at together."""
    launch_dependents(PDL)
    wait(PDL)
    total = 0
    longest = 0
    r = tl.arange(0, ROWS)
    for r0 in range(0, num_rows, ROWS):
        row, inside = r0 + r, r0 + r < num_rows
        length = tl.load(seq_lens_ptr + row, mask=inside, other=0).to(tl.int32)
        begin = tl.load(query_start_ptr + row, mask=inside, other=0)
        count = tl.load(query_start_ptr + row + 1, mask=inside, other=0) - begin
        tiles = tl.cdiv(length, TILE) - first_seen(length - 1, WINDOW, CHUNK) // TILE
        # A row without context has one tile of nothing, so that its output is written.
        tiles = tl.where(count == 1, tl.maximum(tiles, 1), 0)
        tl.store(starts_ptr + 1 + row, total + tl.cumsum(tiles, 0), mask=inside)
        total += tl.sum(tiles, 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))
    tl.store(starts_ptr, 0)
    size = tl.maximum(tl.cdiv(total, NUM_BINS), tl.cdiv(longest, MAX_PARTS))
    size = tl.maximum(size, MIN_TILES)
    for c0 in range(0, num_counters, ROWS):
        tl.store(counters_ptr + c0 + r, tl.zeros([ROWS], tl.int32), mask=c0 + r < num_counters)
    tl.debug_barrier()  # starts are read again, by other threads
    b = tl.arange(0, BINS)
    for b0 in range(0, NUM_BINS, BINS):
        begin = (b0 + b) * size
        stop = tl.minimum(begin + size, total)
        first = tl.zeros([BINS], tl.int32)
        last = tl.zeros([BINS], tl.int32)
        for r0 in range(0, num_rows, ROWS):
            inside = r0 + r < num_rows
            ends = tl.load(starts_ptr + 1 + r0 + r, mask=inside, other=2147483647)
            first += tl.sum((ends[None, :] <= begin[:, None]).to(tl.int32), 1)
            last += tl.sum((ends[None, :] < stop[:, None]).to(tl.int32), 1)
        real, some = b0 + b < NUM_BINS, begin < stop
        record = bins_ptr + (b0 + b) * FIELDS
        tl.store(record, begin, mask=real)
        tl.store(record + 1, stop, mask=real)
        tl.store(record + 2, size, mask=real)
        _note_row(record + 3, first, starts_ptr, some, real)
        _note_row(record + 6, last, starts_ptr, some, real)


@triton.jit
def _note_row(record, row, starts_ptr, some, real):
    """A row, and where its tiles begin and end."""
    tl.store(record, row, mask=real)
    tl.store(record + 1, tl.load(starts_ptr + row, mask=some, other=0), mask=real)
    tl.store(record + 2, tl.load(starts_ptr + row + 1, mask=some, other=0), mask=real)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr"],
)
def lay_tiles_kernel(
    table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    starts_ptr,
    pieces_ptr,
    marks_ptr,
    table_stride,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (rows, programs a row), TILES of a row's tiles at a time."""
    PIECES: tl.constexpr = TILE // PIECE
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0)
    start = tl.load(starts_ptr + row)
    num_tiles = tl.load(starts_ptr + row + 1) - start
    length = tl.load(seq_lens_ptr + row).to(tl.int32)
    token = tl.load(query_start_ptr + row).to(tl.int32)
    first = first_seen(length - 1, WINDOW, CHUNK)
    t = tl.arange(0, TILES)
    e = tl.arange(0, TILES * PIECES)
    for t0 in range(tl.program_id(1) * TILES, num_tiles, tl.num_programs(1) * TILES):
        tile = t0 + t
        mark, inside = marks_ptr + (start + tile) * 2, tile < num_tiles
        tl.store(mark, token * 2 + (tile == num_tiles - 1).to(tl.int32), mask=inside)
        tl.store(mark + 1, length - 1 - (first // TILE + tile) * TILE, mask=inside)
        n = (first // TILE + t0) * TILE + e * PIECE
        block = tl.load(
            table_ptr + row.to(tl.int64) * table_stride + n // PAGE, mask=n < length, other=0
        )
        low = tl.minimum(tl.maximum(first - n, 0), PIECE)
        high = tl.minimum(tl.maximum(length - n, 0), PIECE)
        place = block.to(tl.int64) * PAGE + n % PAGE
        tl.store(
            pieces_ptr + (start + t0) * PIECES + e,
            (place << 16) | (low << 8) | high,
            mask=t0 + e // PIECES < num_tiles,
        )


@triton.jit
def paged_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    starts_ptr,
    pieces_ptr,
    marks_ptr,
    bins_ptr,
    counters_ptr,
    parts_ptr,
    sums_ptr,
    slopes_ptr,
    sinks_ptr,
    scale,
    softcap,
    q_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    CAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: bins · lanes, a lane being a key/value head and BLOCK_H of its query heads.

    WIDTH: numbers of a value. REST: numbers of a key beyond those. LATENT: values are the first
    WIDTH numbers of the keys.
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    LANES: tl.constexpr = KV_HEADS * HEAD_BLOCKS
    HEADS: tl.constexpr = GROUP if GROUP < BLOCK_H else BLOCK_H  # rows of a part
    launch_dependents(PDL)
    lane = tl.program_id(0) % LANES  # neighbours read the same tokens
    bin_ = tl.program_id(0) // LANES
    kv_head = lane // HEAD_BLOCKS
    g = tl.arange(0, BLOCK_H)
    in_group = (lane % HEAD_BLOCKS) * BLOCK_H + g
    head = kv_head * GROUP + in_group
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=in_group < GROUP, other=0.0) * LOG2E
    record = bins_ptr + bin_ * FIELDS
    wait(PDL)
    begin = tl.load(record)
    stop = tl.load(record + 1)
    first_start = tl.load(record + 4)
    first_stop = tl.load(record + 5)
    last_stop = tl.load(record + 8)
    row = tl.load(record + 3)
    row_stop = first_stop
    at = begin
    m = tl.full([BLOCK_H], MASKED, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, WIDTH_PAD], tl.float32)
    while at < stop:
        here = stop
        next_stop = row_stop
        if LATENT:
            # Queries this wide stay while their row is read, so each row has a loop of its own.
            m = tl.full([BLOCK_H], MASKED, tl.float32)
            total = tl.zeros([BLOCK_H], tl.float32)
            acc = tl.zeros([BLOCK_H, WIDTH_PAD], tl.float32)
            here = tl.minimum(row_stop, stop)
            row += 1
            next_stop = tl.load(starts_ptr + row + 1)
            token = tl.load(marks_ptr + at * 2 + g * 0) // 2
            row_q, row_rest = _queries(
                q_ptr, token, q_stride, head, in_group, GROUP, WIDTH, WIDTH_PAD, REST, REST_PAD
            )
        for tile in range(at, here):
            if LATENT:
                q, q_rest = row_q, row_rest
            else:
                token = tl.load(marks_ptr + tile * 2 + g * 0) // 2
                q, q_rest = _queries(
                    q_ptr, token, q_stride, head, in_group, GROUP, WIDTH, WIDTH_PAD, REST, REST_PAD
                )
            m, total, acc = _attend(
                m,
                total,
                acc,
                q,
                q_rest,
                k_ptr,
                v_ptr,
                pieces_ptr,
                marks_ptr,
                slope,
                tile,
                kv_head,
                block_stride,
                scale,
                softcap,
                KV_HEADS,
                WIDTH,
                WIDTH_PAD,
                REST,
                REST_PAD,
                LATENT,
                PAGE,
                TILE,
                PIECE,
                CAP,
            )
            if not LATENT:
                # Not asked for a tile ahead: Triton would copy it in turn behind the next keys.
                mark = tl.load(marks_ptr + tile * 2)
                if (mark % 2 == 1) | (tile + 1 == stop):
                    enters = (tile < first_stop) & (first_start < begin)
                    part = (bin_ * LANES + lane) * 2 + (1 - enters.to(tl.int32))
                    _finish(
                        m,
                        total,
                        acc,
                        out_ptr,
                        parts_ptr,
                        sums_ptr,
                        sinks_ptr,
                        mark,
                        enters,
                        part,
                        kv_head,
                        in_group,
                        KV_HEADS,
                        GROUP,
                        HEADS,
                        WIDTH,
                    )
                    m = tl.full([BLOCK_H], MASKED, tl.float32)
                    total = tl.zeros([BLOCK_H], tl.float32)
                    acc = tl.zeros([BLOCK_H, WIDTH_PAD], tl.float32)
        if LATENT and here > at:
            mark = tl.load(marks_ptr + here * 2 - 2)
            enters = (at < first_stop) & (first_start < begin)
            part = (bin_ * LANES + lane) * 2 + (1 - enters.to(tl.int32))
            _finish(
                m,
                total,
                acc,
                out_ptr,
                parts_ptr,
                sums_ptr,
                sinks_ptr,
                mark,
                enters,
                part,
                kv_head,
                in_group,
                KV_HEADS,
                GROUP,
                HEADS,
                WIDTH,
            )
        at = here
        row_stop = next_stop
    cut_first = (first_start < begin) | (first_stop > stop)
    cut_last = (last_stop > stop) & (last_stop > first_stop)
    if (begin < stop) & (cut_first | cut_last):
        tl.debug_barrier()  # before one thread says that all have written
        for end in tl.static_range(2):
            if cut_last if end else cut_first:
                row = tl.load(record + 3 + 3 * end)
                row_start = tl.load(record + 4 + 3 * end)
                row_stop = tl.load(record + 5 + 3 * end)
                size = tl.load(record + 2)
                first_bin = row_start // size
                last_bin = (row_stop - 1) // size
                counter = counters_ptr + row * LANES + lane
                arrived = tl.atomic_add(counter, 1, sem="acq_rel")
                if arrived == last_bin - first_bin:
                    tl.store(counter, 0)
                    token = tl.load(marks_ptr + row_start * 2) // 2
                    _merge(
                        out_ptr + (token.to(tl.int64) * KV_HEADS + kv_head) * (GROUP * WIDTH),
                        parts_ptr,
                        sums_ptr,
                        sinks_ptr,
                        first_bin,
                        last_bin,
                        lane,
                        kv_head * GROUP,
                        (lane % HEAD_BLOCKS) * BLOCK_H,
                        LANES,
                        HEADS,
                        GROUP,
                        WIDTH,
                        WIDTH_PAD,
                    )


@triton.jit
def _queries(
    q_ptr,
    token,
    q_stride,
    head,
    in_group,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
):
    """(numbers that meet values too, numbers beyond), the second not to be used without REST.

    token: [heads], all of them one token. A vector, because loads by vectors are pipelined.
    """
    d = tl.arange(0, WIDTH_PAD)
    real = (in_group < GROUP)[:, None]
    at = q_ptr + token.to(tl.int64)[:, None] * q_stride + head[:, None] * (WIDTH + REST)
    q = tl.load(at + d[None, :], mask=real & (d < WIDTH)[None, :], other=0.0)
    rest = q
    if REST > 0:
        x = tl.arange(0, REST_PAD)
        rest = tl.load(at + WIDTH + x[None, :], mask=real & (x < REST)[None, :], other=0.0)
    return q, rest


@triton.jit
def _attend(
    m,
    total,
    acc,
    q,
    q_rest,
    k_ptr,
    v_ptr,
    pieces_ptr,
    marks_ptr,
    slope,
    tile,
    kv_head,
    block_stride,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    CAP: tl.constexpr,
):
    """One tile more: the new maximum, sum and weighted values."""
    SIZE: tl.constexpr = WIDTH + REST
    d = tl.arange(0, WIDTH_PAD)
    t = tl.arange(0, TILE)
    inner = t % PIECE
    piece = tl.load(pieces_ptr + (tile * (TILE // PIECE) + t // PIECE))
    seen = (inner >= ((piece >> 8) & 255)) & (inner < (piece & 255))
    place = (piece >> 16) + inner
    base = place // PAGE * block_stride + (place % PAGE * KV_HEADS + kv_head) * SIZE
    inside = seen[:, None] & (d < WIDTH)[None, :]
    k = tl.load(k_ptr + base[:, None] + d[None, :], mask=inside, other=0.0).to(q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REST > 0:
        x = tl.arange(0, REST_PAD)
        k_rest = tl.load(
            k_ptr + base[:, None] + WIDTH + x[None, :],
            mask=seen[:, None] & (x < REST)[None, :],
            other=0.0,
        )
        s = tl.dot(q_rest, tl.trans(k_rest.to(q.dtype)), s, input_precision="ieee")
    s = in_base_2(s, scale, softcap, CAP)
    if slope is not None:
        distance = tl.load(marks_ptr + tile * 2 + 1) - t
        s -= slope[:, None] * distance[None, :].to(tl.float32)
    s = tl.where(seen[None, :], s, MASKED)
    top = tl.maximum(m, tl.max(s, 1))
    factor = tl.exp2(m - top)
    p = tl.exp2(s - top[:, None])
    total = total * factor + tl.sum(p, 1)
    if LATENT:
        v = k
    else:
        v = tl.load(v_ptr + base[:, None] + d[None, :], mask=inside, other=0.0).to(q.dtype)
    acc = tl.dot(p.to(q.dtype), v, acc * factor[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def _finish(
    m,
    total,
    acc,
    out_ptr,
    parts_ptr,
    sums_ptr,
    sinks_ptr,
    mark,
    enters,
    part,
    kv_head,
    in_group,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write a row that lies in one bin, or leave a part of any other.

    mark: of the last tile that was read; enters: its row begins in an earlier bin.
    """
    g = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])
    if enters | (mark % 2 == 0):
        tl.store(sums_ptr + (part * 2) * HEADS + g, m, mask=g < HEADS)
        tl.store(sums_ptr + (part * 2 + 1) * HEADS + g, total, mask=g < HEADS)
        line = parts_ptr + (part.to(tl.int64) * HEADS + g[:, None]) * WIDTH
        tl.store(line + d[None, :], acc, mask=(g < HEADS)[:, None] & (d < WIDTH)[None, :])
    else:
        head = kv_head * GROUP + in_group
        real = in_group < GROUP
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=real, other=0.0)
            factor, total = with_sink(m, total, sink)
            acc *= factor[:, None]
        row = out_ptr + ((mark // 2).to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]) * WIDTH
        out = (acc / tl.maximum(total, 1e-30)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(row + d[None, :], out, mask=real[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _merge(
    out_ptr,
    parts_ptr,
    sums_ptr,
    sinks_ptr,
    first_bin,
    last_bin,
    lane,
    first_head,
    first_in_group,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    """Merge one row's parts, some bins and columns at a time. out_ptr: the group's first head."""
    ROWS: tl.constexpr = triton.next_power_of_2(HEADS)
    COLUMNS: tl.constexpr = min(WIDTH_PAD, max(16, 8192 // ROWS))
    BINS: tl.constexpr = max(1, min(16, 8192 // (ROWS * COLUMNS)))
    g = tl.arange(0, ROWS)
    c = tl.arange(0, BINS)
    d = tl.arange(0, COLUMNS)
    in_group = first_in_group + g
    some = g < HEADS
    real = some & (in_group < GROUP)
    for d0 in tl.static_range(0, WIDTH_PAD, COLUMNS):
        columns = d0 + d < WIDTH
        m = tl.full([ROWS], MASKED, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for b0 in range(first_bin, last_bin + 1, BINS):
            b = b0 + c
            mask = (b <= last_bin)[:, None] & some[None, :]
            part = (b * LANES + lane) * 2 + (b == first_bin).to(tl.int32)
            at = sums_ptr + (part * 2 * HEADS)[:, None] + g[None, :]
            lines = (part.to(tl.int64) * HEADS)[:, None] + g[None, :]
            # .cg: from L2, since other processors wrote it
            tops = tl.load(at, mask=mask, other=MASKED, cache_modifier=".cg")
            sums = tl.load(at + HEADS, mask=mask, other=0.0, cache_modifier=".cg")
            values = tl.load(
                parts_ptr + lines[:, :, None] * WIDTH + (d0 + d)[None, None, :],
                mask=mask[:, :, None] & columns[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            top = tl.maximum(m, tl.max(tops, 0))
            weights = tl.exp2(tops - top[None, :])
            factor = tl.exp2(m - top)
            total = total * factor + tl.sum(sums * weights, 0)
            acc = acc * factor[:, None] + tl.sum(values * weights[:, :, None], 0)
            m = top
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + first_head + in_group, mask=real, other=0.0)
            factor, total = with_sink(m, total, sink)
            acc *= factor[:, None]
        out = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(
            out_ptr + in_group[:, None] * WIDTH + (d0 + d)[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=real[:, None] & columns[None, :],
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decode kernel is compiled for: one layer's attention over one cache.

    width: numbers of a value; rest: numbers of a key beyond those (latent attention); window,
    chunk: as in `spec.Attn`, 0 for none.
    """

    kv_heads: int
    group: int
    width: int
    rest: int = 0
    latent: bool = False
    page: int = 16
    itemsize: int = 2
    window: int = 0
    chunk: int = 0

    @property
    def block_h(self) -> int:
        """Query heads of a program."""
        limit = 64 if self.width * self.itemsize <= 1024 else 32
        return max(16, min(limit, power_of_2(self.group)))

    @property
    def lanes(self) -> int:
        """Programs that share a bin."""
        return self.kv_heads * -(-self.group // self.block_h)

    @property
    def width_pad(self) -> int:
        """A power of two, and what a tensor core takes."""
        return max(16, power_of_2(self.width))

    @property
    def rest_pad(self) -> int:
        """The same of `rest`."""
        return max(16, power_of_2(self.rest))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is cut: keys of a tile, bins, tiles that a bin has at least, warps, stages.

    max_parts: that a row is merged of, since one program reads them all; there may be one more.
    """

    tile: int
    bins: int
    min_tiles: int
    num_warps: int
    num_stages: int
    max_parts: int = 1 << 20


def tune(shape: Shape, processors: int, capability: tuple[int, int], rows: int = 1 << 30) -> Tuning:
    """The constants that were measured to serve best (benchmarks/RESULTS.md), kept in memory.

    rows: that there may be at most; few of them want their keys in more pieces at a time.
    """
    big = shape.width_pad * shape.itemsize  # bytes of a value
    small_memory = has_small_memory(10 * capability[0] + capability[1])
    tokens, each, num_warps, num_stages = 128, 2, 4, 3
    tile = 128 if big <= 256 else 64 if big <= 512 else 32
    wide = shape.block_h * shape.width_pad > 64 * 128
    if small_memory or shape.block_h > 16:
        tile = max(16, tile // 2)  # shared memory; registers
    elif rows <= FEW_ROWS and tile == 128 and shape.itemsize == 2:
        tile, tokens, num_stages = 64, 64, 5
    if wide and shape.block_h > 16:
        num_warps, each, num_stages = 8, 1, 2
        if capability == (9, 0):
            tile, num_stages = 32, 3
    elif wide and rows <= FEW_ROWS and capability == (9, 0):
        tile, num_warps, each = 64, 8, 1
    if shape.itemsize == 4:
        tile = 16  # no tensor core multiplies float32 exactly: registers hold all of it
    heads = min(shape.group, shape.block_h)
    return Tuning(
        tile=tile,
        bins=max(1, processors * each // shape.lanes),
        min_tiles=max(1, tokens // tile),
        num_warps=num_warps,
        num_stages=num_stages,
        max_parts=max(8, (1 << 20) // (heads * shape.width * 4)),
    )


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What the layers of one shape share in a step; see the module. int32, but for the parts and
    the pieces (int64)."""

    shape: Shape
    tuning: Tuning
    starts: Tensor
    bins: Tensor
    counters: Tensor
    pieces: Tensor
    marks: Tensor
    parts: Tensor
    sums: Tensor

    @classmethod
    def on(
        cls, device: torch.device, shape: Shape, tuning: Tuning, rows: int, num_blocks: int
    ) -> DecodePlan:
        """Memory for so many rows, of block tables of so many blocks."""
        parts = 2 * tuning.bins * shape.lanes * min(shape.group, shape.block_h)
        tiles = rows * most_tiles(shape, tuning.tile, num_blocks)
        piece = piece_size(shape, tuning.tile)

        def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return cls(
            shape,
            tuning,
            starts=empty(rows + 2),  # one is read ahead
            bins=empty(tuning.bins, FIELDS.value),
            counters=empty(rows * shape.lanes),
            pieces=empty(tiles, tuning.tile // piece, dtype=torch.int64),
            marks=empty(tiles, 2),
            parts=empty(parts * shape.width, dtype=torch.float32),
            sums=empty(parts * 2, dtype=torch.float32),
        )


def most_tiles(shape: Shape, tile: int, num_blocks: int) -> int:
    """Of a row whose block table has `num_blocks` entries."""
    most = -(-num_blocks * shape.page // tile)
    limits = [limit for limit in (shape.window, shape.chunk) if limit]
    return max(1, min([most, *(-(-limit // tile) + 1 for limit in limits)]))


def piece_size(shape: Shape, tile: int) -> int:
    """Tokens that lie together wherever a tile begins: of a block and of a tile, in powers of 2."""
    return min(tile, shape.page & -shape.page)


def plan_decode(
    shape: Shape, tuning: Tuning, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor
) -> DecodePlan:
    """Share out the rows that compute one token.

    block_tables: [R, blocks], seq_lens: [R], query_start_loc: [R + 1], int32 or int64, on the GPU;
    nothing is read back, so a graph that captures this plans anew at every replay.
    """
    rows = seq_lens.shape[0]
    assert block_tables.stride(1) == 1 and block_tables.shape[0] == rows
    plan = DecodePlan.on(seq_lens.device, shape, tuning, rows, block_tables.shape[1])
    plan_decode_kernel[(1,)](
        seq_lens,
        query_start_loc,
        plan.starts,
        plan.bins,
        plan.counters,
        rows,
        plan.counters.shape[0],
        **plan_constants(shape, tuning),
        num_warps=4,
        **dependent(seq_lens),
    )
    lay_tiles_kernel[(rows, 4 if rows < 64 else 1)](
        block_tables,
        seq_lens,
        query_start_loc,
        plan.starts,
        plan.pieces,
        plan.marks,
        block_tables.stride(0),
        **tile_constants(shape, tuning),
        num_warps=4,
        **dependent(seq_lens),
    )
    return plan


def paged_decode(
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Write `out` of each row that computes one token; `reference.paged_attention` says what.

    q: [T, H, D], any stride between tokens; kv: one layer's view [num_blocks, 1 or 2, block_size,
    K, D]; out: [T, H, width], contiguous; slopes, sinks: [H] float32. Only what a row sees is read.
    """
    shape, tuning = plan.shape, plan.tuning
    size = shape.width + shape.rest
    assert q.shape[1:] == (shape.kv_heads * shape.group, size) and q.stride()[1:] == (size, 1)
    assert kv.shape[1:] == (1 if shape.latent else 2, shape.page, shape.kv_heads, size), kv.shape
    assert kv.stride()[2:] == (shape.kv_heads * size, size, 1)
    assert out.is_contiguous() and out.shape == (*q.shape[:2], shape.width)
    paged_decode_kernel[(tuning.bins * shape.lanes,)](
        q,
        kv,
        kv if shape.latent else kv[:, 1],
        out,
        plan.starts,
        plan.pieces,
        plan.marks,
        plan.bins,
        plan.counters,
        plan.parts,
        plan.sums,
        slopes,
        sinks,
        scale if softcap else scale * LOG2E.value,
        softcap or 0.0,
        q.stride(0),
        kv.stride(0),
        **constants(shape, tuning),
        CAP=bool(softcap),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **dependent(q),
    )


def plan_constants(shape: Shape, tuning: Tuning) -> dict[str, int]:
    """Of `plan_decode_kernel`, but for PDL."""
    return {
        "NUM_BINS": tuning.bins,
        "TILE": tuning.tile,
        "MIN_TILES": tuning.min_tiles,
        "MAX_PARTS": tuning.max_parts,
        "WINDOW": shape.window,
        "CHUNK": shape.chunk,
        "ROWS": 128,
        "BINS": 32,
    }


def tile_constants(shape: Shape, tuning: Tuning) -> dict[str, int]:
    """Of `lay_tiles_kernel`, but for PDL."""
    piece = piece_size(shape, tuning.tile)
    return {
        "PAGE": shape.page,
        "TILE": tuning.tile,
        "PIECE": piece,
        "WINDOW": shape.window,
        "CHUNK": shape.chunk,
        "TILES": max(1, 512 * piece // tuning.tile),
    }


def constants(shape: Shape, tuning: Tuning) -> dict[str, int | bool]:
    """Of `paged_decode_kernel`, but for CAP and PDL."""
    return {
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "BLOCK_H": shape.block_h,
        "WIDTH": shape.width,
        "WIDTH_PAD": shape.width_pad,
        "REST": shape.rest,
        "REST_PAD": shape.rest_pad,
        "LATENT": shape.latent,
        "PAGE": shape.page,
        "TILE": tuning.tile,
        "PIECE": piece_size(shape, tuning.tile),
    }


def variants(
    label: str,
    shape: Shape,
    *,
    dtype: str = "bf16",
    cap: bool = False,
    slopes: bool = False,
    sinks: bool = False,
    capability: tuple[int, int] = (9, 0),
    rows: int = 256,
) -> list[Variant]:
    """Plan and kernel of one shape, as `tune` would have them on `capability`."""
    tuning = tune(shape, 132, capability, rows)
    major, minor = capability
    sm, pdl = 10 * major + minor, {"PDL": capability >= (9, 0)}
    lists = ("seq_lens_ptr", "query_start_ptr", "table_ptr")
    types = {name: "*i64" for name in lists}
    types |= {name: "*i32" for name in ("starts_ptr", "bins_ptr", "counters_ptr", "marks_ptr")}
    types |= {"pieces_ptr": "*i64", "num_rows": "i32", "num_counters": "i32"}
    types |= {name: f"*{dtype}" for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")}
    types |= {name: "*fp32" for name in ("parts_ptr", "sums_ptr")}
    types |= {name: "i32" for name in ("q_stride", "table_stride", "block_stride")}
    types |= {name: "fp32" for name in ("scale", "softcap")}
    given: dict[str, str | None] = {
        **types,
        "slopes_ptr": "*fp32" if slopes else None,
        "sinks_ptr": "*fp32" if sinks else None,
    }
    plain = (*lists, "num_rows", "num_counters", "table_stride")

    def variant(kernel, name: str, constants, **options) -> Variant:
        names = [n for n in kernel.arg_names if n in given]
        return Variant(
            label=f"{name} {label} {dtype} as for sm_{sm}",
            kernel=kernel,
            types={n: given[n] for n in names},
            constants=constants,
            unaligned=tuple(n for n in plain if n in names),
            capability=sm,
            newest=sm,
            **options,
        )

    return [
        variant(plan_decode_kernel, "plan_decode", plan_constants(shape, tuning) | pdl),
        variant(lay_tiles_kernel, "lay_tiles", tile_constants(shape, tuning) | pdl),
        variant(
            paged_decode_kernel,
            "paged_decode",
            constants(shape, tuning) | pdl | {"CAP": cap},
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            stack=256 if shape.latent else 32,  # 128 heads: faster than tiles without spills
        ),
    ]


A100, AD102 = (8, 0), (8, 9)
AOT = [
    *variants("8×4 heads of 128", Shape(8, 4, 128)),
    *variants("8×4 heads of 128", Shape(8, 4, 128), capability=A100),
    *variants("8×4 heads of 128", Shape(8, 4, 128), capability=AD102)[2:],
    *variants("8×8 heads of 64, window, sinks", Shape(8, 8, 64, window=128), sinks=True)[2:],
    *variants("2×4 heads of 32", Shape(2, 4, 32, itemsize=4), dtype="fp32", capability=A100)[2:],
    *variants("8×4 heads of 128", Shape(8, 4, 128, itemsize=4), dtype="fp32")[2:],
    *variants("32×1 heads of 96", Shape(32, 1, 96), capability=A100)[2:],
    *variants("32×1 heads of 80, biases", Shape(32, 1, 80), dtype="fp16", slopes=True)[2:],
    *variants("4×2 heads of 256, softcap", Shape(4, 2, 256, window=4096), cap=True)[2:],
    *variants("4×2 heads of 256", Shape(4, 2, 256), capability=A100)[2:],
    *variants("4×2 heads of 256", Shape(4, 2, 256), capability=AD102)[2:],
    *variants("8×5 heads of 128, chunk", Shape(8, 5, 128, chunk=8192))[2:],
    *variants("1×71 heads of 64", Shape(1, 71, 64))[2:],
    *variants("1×71 heads of 64", Shape(1, 71, 64), capability=AD102)[2:],
    *variants("128 heads on latents", Shape(1, 128, 512, 64, latent=True))[2:],
    *variants("128 heads on latents", Shape(1, 128, 512, 64, latent=True), capability=A100)[2:],
    *variants("16 heads on latents", Shape(1, 16, 512, 64, latent=True))[2:],
    *variants("8 rows, 16 heads on latents", Shape(1, 16, 512, 64, latent=True), rows=8)[2:],
    *variants("8 rows, 8×4 heads of 128", Shape(8, 4, 128), rows=8)[1:],
    *variants("16 heads on latents", Shape(1, 16, 512, 64, latent=True), capability=AD102)[2:],
]
