"""Causal attention of rows of several tokens over the paged cache, in Triton, on any GPU.

    out[t, h] = softmax(scale · q[t, h] · K_rowᵀ + mask) · V_row       key/value head h // GROUP

The mask ends with the context: token i of a row's `count` sees keys 0 … length - count + i, less
what its window or chunk hides. So prompts, and chunks of prompts on a context that is there
already, are one call.

The tokens of each row are cut into tiles; `plan_prefill` lists them on the device, the most work
first, once for all layers that see alike:

    tiles   [max_tiles, 6]  row, first token in the batch, tokens, position of the first,
                            context of the row, first key seen
    count   [1]             of them

A fixed grid of programs walks the list for all heads, there and back again, so that each gets as
much as the others. In a program the heads that share keys are rows of one tile of queries: row i is
token i // HEADS, head i % HEADS. Rows of one token have no tiles: they are `paged_decode`'s.

`paged_prefill_wgmma` does the plain cases faster where the GPU has what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant
from pagedserve.kernels.capability import has_small_memory
from pagedserve.kernels.launch import dependent, launch_dependents, wait
from pagedserve.kernels.paged_decode import Shape
from pagedserve.kernels.paged_scores import LOG2E, MASKED, first_seen, in_base_2, with_sink

FIELDS = tl.constexpr(8)  # numbers of a tile in the list, two of them spare
MAX_SORTED = 1024  # tiles: each is compared with each; more are in any order, and level out


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "query_start_ptr"],
)
def plan_prefill_kernel(
    seq_lens_ptr,
    query_start_ptr,
    starts_ptr,
    costs_ptr,
    tiles_ptr,
    count_ptr,
    num_rows,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SORT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. starts: [rows + 1] tiles before each row; costs: [max_tiles], scratch."""
    launch_dependents(PDL)
    wait(PDL)
    total = 0
    r = tl.arange(0, BLOCK)
    for r0 in range(0, num_rows, BLOCK):
        row, inside = r0 + r, r0 + r < num_rows
        begin = tl.load(query_start_ptr + row, mask=inside, other=0)
        count = (tl.load(query_start_ptr + row + 1, mask=inside, other=0) - begin).to(tl.int32)
        tiles = tl.where(count > 1, tl.cdiv(count, TOKENS), 0)
        tl.store(starts_ptr + row, total + tl.cumsum(tiles, 0) - tiles, mask=inside)
        total += tl.sum(tiles, 0)
    tl.store(starts_ptr + num_rows, total)
    tl.store(count_ptr, total)
    tl.debug_barrier()  # what was written is read by other threads
    if SORT:
        for t0 in range(0, total, BLOCK):
            tile, some = t0 + r, t0 + r < total
            row, begin, position, first, stop = _locate(
                tile, some, seq_lens_ptr, query_start_ptr, starts_ptr, num_rows,
                TOKENS, WINDOW, CHUNK, BLOCK,
            )  # fmt: skip
            tl.store(costs_ptr + tile, stop - first, mask=some)
        tl.debug_barrier()
    for t0 in range(0, total, BLOCK):
        tile, some = t0 + r, t0 + r < total
        place = tile
        if SORT:
            cost = tl.load(costs_ptr + tile, mask=some, other=0)
            place = tl.zeros([BLOCK], tl.int32)
            for o0 in range(0, total, BLOCK):
                other = o0 + r
                theirs = tl.load(costs_ptr + other, mask=other < total, other=-1)
                before = (theirs[None, :] > cost[:, None]) | (
                    (theirs[None, :] == cost[:, None]) & (other[None, :] < tile[:, None])
                )
                place += tl.sum(before.to(tl.int32), 1)
        row, begin, position, first, stop = _locate(
            tile, some, seq_lens_ptr, query_start_ptr, starts_ptr, num_rows,
            TOKENS, WINDOW, CHUNK, BLOCK,
        )  # fmt: skip
        at = tiles_ptr + place * FIELDS
        tl.store(at, row, mask=some)
        tl.store(at + 1, begin, mask=some)
        tl.store(at + 2, stop - position, mask=some)
        tl.store(at + 3, position, mask=some)
        length = tl.load(seq_lens_ptr + row, mask=some, other=0).to(tl.int32)
        tl.store(at + 4, length, mask=some)
        tl.store(at + 5, first, mask=some)


@triton.jit
def _locate(
    tile,
    some,
    seq_lens_ptr,
    query_start_ptr,
    starts_ptr,
    num_rows,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each tile: row, first token, its position, first key seen, end of the keys."""
    r = tl.arange(0, BLOCK)
    row = tl.zeros([BLOCK], tl.int32)
    for r0 in range(0, num_rows, BLOCK):
        ends = tl.load(starts_ptr + 1 + r0 + r, mask=r0 + r < num_rows, other=2147483647)
        row += tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    row = tl.where(some, row, 0)
    skipped = (tile - tl.load(starts_ptr + row)) * TOKENS
    begin = tl.load(query_start_ptr + row).to(tl.int32)
    count = tl.load(query_start_ptr + row + 1).to(tl.int32) - begin
    position = tl.load(seq_lens_ptr + row).to(tl.int32) - count + skipped
    first = first_seen(position, WINDOW, CHUNK)
    stop = position + tl.minimum(count - skipped, TOKENS)
    return row, begin + skipped, position, first, stop


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table_ptr"])
def paged_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    table_ptr,
    tiles_ptr,
    count_ptr,
    slopes_ptr,
    sinks_ptr,
    scale,
    softcap,
    q_stride,
    table_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module; sizes as in `paged_decode_kernel`. TOKENS · HEADS ≤ BLOCK_M."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    LANES: tl.constexpr = KV_HEADS * HEAD_BLOCKS
    SIZE: tl.constexpr = WIDTH + REST
    launch_dependents(PDL)
    wait(PDL)
    programs = tl.num_programs(0)
    items = tl.load(count_ptr) * LANES
    i = tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDTH_PAD)
    x = tl.arange(0, REST_PAD)
    for turn in range(0, tl.cdiv(items, programs)):
        own = tl.program_id(0)
        item = turn * programs + tl.where(turn % 2 == 0, own, programs - 1 - own)
        if item < items:
            at = tiles_ptr + (item // LANES) * FIELDS
            lane = item % LANES
            row = tl.load(at).to(tl.int64)
            token = tl.load(at + 1) + i // HEADS
            num_tokens = tl.load(at + 2)
            begin = tl.load(at + 3)
            position = begin + i // HEADS
            first_key = tl.load(at + 5)
            in_group = (lane % HEAD_BLOCKS) * HEADS + i % HEADS
            kv_head = lane // HEAD_BLOCKS
            head = kv_head * GROUP + in_group
            real = (i // HEADS < num_tokens) & (i < TOKENS * HEADS) & (in_group < GROUP)
            q_at = q_ptr + token.to(tl.int64)[:, None] * q_stride + head[:, None] * SIZE
            q = tl.load(q_at + d[None, :], mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)
            q_rest = q
            if REST > 0:
                q_rest = tl.load(
                    q_at + WIDTH + x[None, :], mask=real[:, None] & (x < REST)[None, :], other=0.0
                )
            slope = tl.zeros([BLOCK_M], tl.float32)
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + head, mask=real, other=0.0) * LOG2E
            m = tl.full([BLOCK_M], MASKED, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, WIDTH_PAD], tl.float32)
            # Keys that all queries see lie between two edges of keys that some see. The last query
            # sees the latest first key.
            low = first_key // BLOCK_N * BLOCK_N
            high = tl.cdiv(begin + num_tokens, BLOCK_N) * BLOCK_N
            full_low = low
            if (WINDOW > 0) | (CHUNK > 0):
                last = first_seen(begin + num_tokens - 1, WINDOW, CHUNK)
                full_low = tl.cdiv(last, BLOCK_N) * BLOCK_N
            full_high = (begin + 1) // BLOCK_N * BLOCK_N
            full_low = tl.minimum(full_low, high)
            full_high = tl.maximum(full_high, full_low)
            table = table_ptr + row * table_stride
            if (WINDOW > 0) | (CHUNK > 0):
                m, total, acc = _attend(
                    m, total, acc, q, q_rest, k_ptr, v_ptr, table, low, full_low, position, slope,
                    slopes_ptr, begin + num_tokens, kv_head, scale, softcap, block_stride,
                    True, KV_HEADS, SIZE, WIDTH, WIDTH_PAD, REST, REST_PAD, LATENT, PAGE,
                    BLOCK_N, WINDOW, CHUNK, CAP,
                )  # fmt: skip
            m, total, acc = _attend(
                m, total, acc, q, q_rest, k_ptr, v_ptr, table, full_low, full_high, position, slope,
                slopes_ptr, begin + num_tokens, kv_head, scale, softcap, block_stride,
                False, KV_HEADS, SIZE, WIDTH, WIDTH_PAD, REST, REST_PAD, LATENT, PAGE,
                BLOCK_N, WINDOW, CHUNK, CAP,
            )  # fmt: skip
            m, total, acc = _attend(
                m, total, acc, q, q_rest, k_ptr, v_ptr, table, full_high, high, position, slope,
                slopes_ptr, begin + num_tokens, kv_head, scale, softcap, block_stride,
                True, KV_HEADS, SIZE, WIDTH, WIDTH_PAD, REST, REST_PAD, LATENT, PAGE,
                BLOCK_N, WINDOW, CHUNK, CAP,
            )  # fmt: skip
            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + head, mask=real, other=0.0)
                factor, total = with_sink(m, total, sink)
                acc *= factor[:, None]
            out = acc / tl.maximum(total, 1e-30)[:, None]
            out_at = out_ptr + (token.to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * WIDTH
            tl.store(
                out_at + d[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=real[:, None] & (d < WIDTH)[None, :],
            )


@triton.jit
def _attend(
    m,
    total,
    acc,
    q,
    q_rest,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
    stop,
    position,
    slope,
    slopes_ptr,
    context,
    kv_head,
    scale,
    softcap,
    block_stride,
    SOME: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Online softmax over keys start … stop - 1. SOME: each query sees only some of them.

    A query that sees none of a tile gets weights of nonsense, which the first key that it does see,
    its own at the latest, multiplies by 0.
    """
    d = tl.arange(0, WIDTH_PAD)
    x = tl.arange(0, REST_PAD)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        if SOME:
            there = n < context
            block = tl.load(table_ptr + n // PAGE, mask=there, other=0).to(tl.int64)
            inside = there[:, None] & (d < WIDTH)[None, :]
        else:
            block = tl.load(table_ptr + n // PAGE).to(tl.int64)
            inside = (d < WIDTH)[None, :]
        base = block * block_stride + ((n % PAGE) * KV_HEADS + kv_head) * SIZE
        if (not SOME) and WIDTH == WIDTH_PAD:
            k = tl.load(k_ptr + base[:, None] + d[None, :]).to(q.dtype)
        else:
            k = tl.load(k_ptr + base[:, None] + d[None, :], mask=inside, other=0.0).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST > 0:
            rest = (x < REST)[None, :]
            if SOME:
                rest = rest & there[:, None]
            k_rest = tl.load(k_ptr + base[:, None] + WIDTH + x[None, :], mask=rest, other=0.0)
            s = tl.dot(q_rest, tl.trans(k_rest.to(q.dtype)), s, input_precision="ieee")
        s = in_base_2(s, scale, softcap, CAP)
        if slopes_ptr is not None:
            s -= slope[:, None] * (position[:, None] - n[None, :]).to(tl.float32)
        if SOME:
            seen = n[None, :] <= position[:, None]
            if (WINDOW > 0) | (CHUNK > 0):
                seen = seen & (n[None, :] >= first_seen(position, WINDOW, CHUNK)[:, None])
            s = tl.where(seen, s, MASKED)
        top = tl.maximum(m, tl.max(s, 1))
        factor = tl.exp2(m - top)
        p = tl.exp2(s - top[:, None])
        total = total * factor + tl.sum(p, 1)
        if LATENT:
            v = k
        elif (not SOME) and WIDTH == WIDTH_PAD:
            v = tl.load(v_ptr + base[:, None] + d[None, :]).to(q.dtype)
        else:
            v = tl.load(v_ptr + base[:, None] + d[None, :], mask=inside, other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * factor[:, None], input_precision="ieee")
        m = top
    return m, total, acc


@dataclass(frozen=True, slots=True)
class Tuning:
    """block_m: queries · heads of a program; block_n: keys at a time; programs: of the grid."""

    block_m: int
    block_n: int
    programs: int
    num_warps: int
    num_stages: int


def tune(shape: Shape, processors: int, capability: tuple[int, int]) -> Tuning:
    """The constants that were measured to serve best (benchmarks/RESULTS.md), kept in memory."""
    big = shape.width_pad * shape.itemsize  # bytes of a value
    if shape.itemsize == 4:
        return Tuning(32, 16, processors * 2, 4, 2)
    small = has_small_memory(10 * capability[0] + capability[1])
    hopper = capability >= (9, 0) and not small
    if shape.latent:
        return Tuning(64, 32 if hopper else 16, processors, 8, 2)
    if big > 256:
        return Tuning(128 if hopper else 64, 32, processors, 8, 2)
    if small:
        return Tuning(128, 32, processors, 4 if big <= 128 else 8, 2)
    if hopper:
        return Tuning(64, 64, processors * 2, 4, 3)
    return Tuning(128, 64, processors, 8, 3)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """What the layers that see alike share in a step; see the module. int32."""

    tokens: int
    tiles: Tensor
    count: Tensor


def tokens_of(shape: Shape, tuning: Tuning) -> int:
    """Tokens of a tile."""
    return max(1, tuning.block_m // shape.group)


def plan_prefill(
    tokens: int,
    num_tokens: int,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    window: int = 0,
    chunk: int = 0,
) -> PrefillPlan:
    """List the tiles, of `tokens` tokens each, of rows that compute several.

    num_tokens: of the batch, at most; seq_lens: [R], query_start_loc: [R + 1], int32 or int64, on
    the GPU. Nothing is read back, so a graph that captures this plans anew at every replay.
    """
    rows, where = seq_lens.shape[0], seq_lens.device
    most = num_tokens // tokens + min(rows, num_tokens // 2)
    starts = torch.empty(rows + 1, dtype=torch.int32, device=where)
    costs = torch.empty(most, dtype=torch.int32, device=where)
    plan = PrefillPlan(
        tokens,
        torch.empty((most, FIELDS.value), dtype=torch.int32, device=where),
        torch.empty(1, dtype=torch.int32, device=where),
    )
    plan_prefill_kernel[(1,)](
        seq_lens,
        query_start_loc,
        starts,
        costs,
        plan.tiles,
        plan.count,
        rows,
        TOKENS=tokens,
        WINDOW=window,
        CHUNK=chunk,
        BLOCK=64,
        SORT=most <= MAX_SORTED,
        num_warps=8,
        **dependent(seq_lens),
    )
    return plan


def paged_prefill(
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    block_tables: Tensor,
    plan: PrefillPlan,
    shape: Shape,
    tuning: Tuning,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Write `out` of each row that computes several tokens; `reference.paged_attention` says what.

    Tensors as for `paged_decode.paged_decode`.
    """
    size = shape.width + shape.rest
    assert q.shape[1:] == (shape.kv_heads * shape.group, size) and q.stride()[1:] == (size, 1)
    assert kv.shape[1:] == (1 if shape.latent else 2, shape.page, shape.kv_heads, size), kv.shape
    assert kv.stride()[2:] == (shape.kv_heads * size, size, 1)
    assert out.is_contiguous() and out.shape == (*q.shape[:2], shape.width)
    assert block_tables.stride(1) == 1 and plan.tokens == tokens_of(shape, tuning)
    paged_prefill_kernel[(tuning.programs,)](
        q,
        kv,
        kv if shape.latent else kv[:, 1],
        out,
        block_tables,
        plan.tiles,
        plan.count,
        slopes,
        sinks,
        scale if softcap else scale * LOG2E.value,
        softcap or 0.0,
        q.stride(0),
        block_tables.stride(0),
        kv.stride(0),
        **constants(shape, tuning),
        CAP=bool(softcap),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **dependent(q),
    )


def constants(shape: Shape, tuning: Tuning) -> dict[str, int | bool]:
    """Of `paged_prefill_kernel`, but for CAP and PDL."""
    return {
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "HEADS": min(shape.group, tuning.block_m),
        "TOKENS": tokens_of(shape, tuning),
        "WIDTH": shape.width,
        "WIDTH_PAD": shape.width_pad,
        "REST": shape.rest,
        "REST_PAD": shape.rest_pad,
        "LATENT": shape.latent,
        "PAGE": shape.page,
        "BLOCK_M": tuning.block_m,
        "BLOCK_N": tuning.block_n,
        "WINDOW": shape.window,
        "CHUNK": shape.chunk,
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
    stack: int = 32,
) -> Variant:
    """The kernel of one shape, as `tune` would have it on `capability`."""
    tuning = tune(shape, 132, capability)
    types: dict[str, str | None] = {"table_ptr": "*i64", "tiles_ptr": "*i32", "count_ptr": "*i32"}
    types |= {name: f"*{dtype}" for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")}
    types |= {name: "i32" for name in ("q_stride", "table_stride", "block_stride")}
    types |= {name: "fp32" for name in ("scale", "softcap")}
    types |= {"slopes_ptr": "*fp32" if slopes else None, "sinks_ptr": "*fp32" if sinks else None}
    major, minor = capability
    return Variant(
        label=f"paged_prefill {label} {dtype} as for sm_{major}{minor}",
        kernel=paged_prefill_kernel,
        types=types,
        constants=constants(shape, tuning) | {"CAP": cap, "PDL": major >= 9},
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        unaligned=("table_ptr", "table_stride"),
        capability=10 * major + minor,
        newest=10 * major + minor,
        stack=stack,
    )


PLAN = Variant(
    label="plan_prefill",
    kernel=plan_prefill_kernel,
    types={
        **{name: "*i64" for name in ("seq_lens_ptr", "query_start_ptr")},
        **{name: "*i32" for name in ("starts_ptr", "costs_ptr", "tiles_ptr", "count_ptr")},
        "num_rows": "i32",
    },
    constants={"TOKENS": 32, "WINDOW": 0, "CHUNK": 0, "BLOCK": 64, "SORT": True, "PDL": False},
    num_warps=8,
    unaligned=("seq_lens_ptr", "query_start_ptr", "num_rows"),
)

A100, AD102 = (8, 0), (8, 9)
AOT = [
    PLAN,
    variants("8×4 heads of 128", Shape(8, 4, 128)),
    variants("8×4 heads of 128", Shape(8, 4, 128), capability=A100),
    variants("8×4 heads of 128", Shape(8, 4, 128), capability=AD102),
    variants("8×8 heads of 64, window, sinks", Shape(8, 8, 64, window=128), sinks=True),
    variants("8×8 heads of 64", Shape(8, 8, 64), capability=AD102),
    variants("2×4 heads of 32", Shape(2, 4, 32, itemsize=4), dtype="fp32", capability=A100),
    variants("8×4 heads of 128", Shape(8, 4, 128, itemsize=4), dtype="fp32", capability=A100),
    variants("32×1 heads of 96", Shape(32, 1, 96), capability=A100),
    variants("32×1 heads of 80, biases", Shape(32, 1, 80), dtype="fp16", slopes=True),
    variants("4×2 heads of 256, softcap", Shape(4, 2, 256, window=4096), cap=True),
    variants("4×2 heads of 256", Shape(4, 2, 256), capability=A100),
    variants("4×2 heads of 256", Shape(4, 2, 256), capability=AD102),
    variants("8×5 heads of 128, chunk", Shape(8, 5, 128, chunk=8192)),
    variants("1×71 heads of 64", Shape(1, 71, 64)),
    variants("128 heads on latents", Shape(1, 128, 512, 64, latent=True)),
    variants("16 heads on latents", Shape(1, 16, 512, 64, latent=True), capability=A100),
    variants("16 heads on latents", Shape(1, 16, 512, 64, latent=True), capability=AD102),
]
