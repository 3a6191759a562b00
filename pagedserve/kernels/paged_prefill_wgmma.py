"""`paged_prefill` for GPUs of capability 9.0, in Gluon: bulk copies, wgmma, warps with roles.

Plain attention with or without sinks, heads of 64 or 128 numbers, bfloat16 or float16. Windows are
written too, but `refusal` keeps them out of service: they have not been run (the test is
test_paged_gpu's `test_windows_are_right_where_bulk_copies_are`).

A program has two consumers of four warps, 64 query rows each, and a producer of one warp that fills
rings of query, key and value tiles in shared memory, each piece by one bulk copy of a block's
tokens:

    producer   Q₀ K V K V … │ Q₁ K V …        one item ahead, as far as the rings are free
    consumers     S₀ S₁+PV₀ S₂+PV₁ … PVₙ out  the product of a tile beside the softmax of another

An item is a tile of `TILE_TOKENS` tokens and a query head. Programs stay: each takes its share of
`paged_prefill.plan_prefill`'s list, there and back again, and what an item costs once (its numbers,
its queries, its output) lies beside another item's products. Keys run from the last to the first,
so the tiles that need a mask come first, and at the far edge of a window last.

One layer of the cache is a matrix to the bulk copies: a row is a token's keys of all heads, or its
values; the rows of the other layers lie between. So one descriptor serves a layer for good.

The values of whole blocks are multiplied, also of tokens that no query sees, by 0: the caller
clears what was never written (`kv_write.clear_tails`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pagedserve.kernels.aot import Variant
from pagedserve.kernels.paged_decode import Shape
from pagedserve.kernels.paged_prefill import PrefillPlan

TILE_TOKENS = 128  # two consumers of 64 rows
BLOCK_N = 128  # keys of a tile
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ITEMS_TOGETHER = gl.constexpr(2048)  # a dozen and more for each program, so that they are even
FIELDS = gl.constexpr(8)  # numbers of an item in the list of tiles
LOG2E = gl.constexpr(1.4426950408889634)
MASKED = gl.constexpr(-1.0e7)  # of a score in base 2: none, and small enough for exact differences


@gluon.jit
def _item(turn, programs):
    """Which of all items this program takes at its `turn`: there, and back again."""
    own = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, own, programs - 1 - own)


@gluon.jit
def _turns(items, programs):
    """How many items this program takes."""
    whole = items // programs
    return whole + gl.where(_item(whole, programs) < items, 1, 0)


@gluon.jit
def _tile(tiles_ptr, turn, programs, items, HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Of the item at `turn`: where its tile's numbers are, and its query head.

    Items go through all tiles for some key heads, then for the next ones: few enough that their
    keys and values stay in the GPU's cache, and enough that each program gets a fair share of them.
    """
    item = gl.maximum(gl.minimum(_item(turn, programs), items - 1), 0)
    tiles = gl.maximum(items // HEADS, 1)
    together = gl.minimum((ITEMS_TOGETHER + tiles * GROUP - 1) // (tiles * GROUP) * GROUP, HEADS)
    first_head = item // (tiles * together) * together
    heads = gl.minimum(together, HEADS - first_head)
    rest = item - first_head * tiles
    return tiles_ptr + rest // heads * FIELDS, first_head + rest % heads


@gluon.jit
def _first_tile(position, BN: gl.constexpr, WINDOW: gl.constexpr):
    """The first tile of keys that the query at `position` sees."""
    first = position * 0
    if WINDOW > 0:
        first = gl.maximum(position + 1 - WINDOW, 0) // BN
    return first


@gluon.jit
def _blocks(table_ptr, token, last, PAGE: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr):
    """The blocks of BOXES boxes from `token` on; past the last, the last again."""
    blocks = ()
    for b in gl.static_range(BOXES):
        block = gl.load(table_ptr + gl.minimum((token + b * BOX) // PAGE, last))
        blocks = blocks + (block.to(gl.int32),)  # type: ignore[assignment]
    return blocks


@gluon.jit
def _producer(
    q_desc, kv_desc, q_smem, k_smem, v_smem,
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
    table_ptr, tiles_ptr, count_ptr, table_stride, block_rows, value_rows,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: copies what the consumers will read, as soon as there is room."""
    BOXES: gl.constexpr = BN // BOX
    programs = gl.num_programs(0)
    items = gl.load(count_ptr) * HEADS
    at = 0  # tiles of keys so far
    for turn in range(0, _turns(items, programs)):
        tile, head = _tile(tiles_ptr, turn, programs, items, HEADS, GROUP)
        row = gl.load(tile)
        token = gl.load(tile + 1)
        position = gl.load(tile + 3)
        stop = position + gl.load(tile + 2)
        last = (stop - 1) // PAGE
        high = (stop + BN - 1) // BN
        low = _first_tile(position, BN, WINDOW)
        table = table_ptr + row.to(gl.int64) * table_stride
        column = head // GROUP * D
        blocks = _blocks(table, (high - 1) * BN, last, PAGE, BOX, BOXES)
        slot = turn % 2
        mbarrier.wait(q_empty.index(slot), (turn // 2 & 1) ^ 1)
        mbarrier.expect(q_ready.index(slot), q_desc.block_type.nbytes * 2)
        tma.async_copy_global_to_shared(
            q_desc, [token, head * D], q_ready.index(slot), q_smem.index(slot * 2)
        )
        tma.async_copy_global_to_shared(
            q_desc, [token + 64, head * D], q_ready.index(slot), q_smem.index(slot * 2 + 1)
        )
        for i in range(0, high - low):
            n = (high - 1 - i) * BN
            stage = at % STAGES
            phase = (at // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), kv_desc.block_type.nbytes * BOXES)
            for b in gl.static_range(BOXES):
                tma.async_copy_global_to_shared(
                    kv_desc,
                    [blocks[b] * block_rows + (n + b * BOX) % PAGE, column],
                    k_ready.index(stage),
                    k_smem.index(stage).slice(b * BOX, BOX, dim=0),
                )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), kv_desc.block_type.nbytes * BOXES)
            for b in gl.static_range(BOXES):
                tma.async_copy_global_to_shared(
                    kv_desc,
                    [blocks[b] * block_rows + value_rows + (n + b * BOX) % PAGE, column],
                    v_ready.index(stage),
                    v_smem.index(stage).slice(b * BOX, BOX, dim=0),
                )
            blocks = _blocks(table, gl.maximum(n - BN, 0), last, PAGE, BOX, BOXES)
            at += 1


@gluon.jit
def _consumer(
    q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
    out_ptr, tiles_ptr, count_ptr, sinks_ptr, scale,
    HALF: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Four warps: query rows HALF · 64 … + 63 of each item."""
    dtype: gl.constexpr = q_smem.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    mma_out: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma_out, k_width=2)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    of_out: gl.constexpr = gl.SliceLayout(1, mma_out)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma)) + HALF * 64
    columns = gl.arange(0, BN, layout=gl.SliceLayout(0, mma))
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, lines)) + HALF * 64
    d = gl.arange(0, D, layout=gl.SliceLayout(0, lines))
    zero = gl.zeros([64, BN], gl.float32, layout=mma)
    masked = MASKED / scale
    programs = gl.num_programs(0)
    items = gl.load(count_ptr) * HEADS
    turns = _turns(items, programs)
    tile, head = _tile(tiles_ptr, 0, programs, items, HEADS, GROUP)
    token, tokens, position = gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3)
    at = 0  # tiles of keys so far
    for turn in range(0, turns):
        # Asked for now, needed an item later.
        tile_2, head_2 = _tile(tiles_ptr, turn + 1, programs, items, HEADS, GROUP)
        token_2, tokens_2 = gl.load(tile_2 + 1), gl.load(tile_2 + 2)
        position_2 = gl.load(tile_2 + 3)
        high = (position + tokens + BN - 1) // BN
        num = high - _first_tile(position, BN, WINDOW)
        num_masked = high - (position + 1) // BN  # tiles that the first query does not see whole
        edge = 0  # tiles before it are not seen whole by the last query
        if WINDOW > 0:
            edge = (gl.maximum(position + tokens - WINDOW, 0) + BN - 1) // BN
        own = position + rows
        slot = turn % 2
        q = q_smem.index(slot * 2 + HALF)
        mbarrier.wait(q_ready.index(slot), turn // 2 & 1)
        stage = at % STAGES
        mbarrier.wait(k_ready.index(stage), at // STAGES & 1)
        s = warpgroup_mma(
            q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        n = (high - 1) * BN + columns
        seen = n[None, :] <= own[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] > own[:, None] - WINDOW)
        s = gl.where(seen, s, masked)
        m = gl.max(s, axis=1)
        p = gl.exp2(s * scale - (m * scale)[:, None])
        total = gl.sum(p, axis=1)
        weights = gl.convert_layout(p.to(dtype), operand)
        acc = gl.zeros([64, D], gl.float32, layout=mma_out)
        for i in range(1, num):
            before = at % STAGES
            phase = at // STAGES & 1
            at += 1
            stage = at % STAGES
            mbarrier.wait(k_ready.index(stage), at // STAGES & 1)
            s_async = warpgroup_mma(
                q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            mbarrier.wait(v_ready.index(before), phase)
            acc_async = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_async])  # the weighted values may take longer
            mbarrier.arrive(k_empty.index(stage), count=1)
            if (i < num_masked) | (high - 1 - i < edge):
                n = (high - 1 - i) * BN + columns
                seen = n[None, :] <= own[:, None]
                if WINDOW > 0:
                    seen = seen & (n[None, :] > own[:, None] - WINDOW)
                s = gl.where(seen, s, masked)
            top = gl.maximum(m, gl.max(s, axis=1))
            factor = gl.exp2((m - top) * scale)
            p = gl.exp2(s * scale - (top * scale)[:, None])
            total = total * factor + gl.sum(p, axis=1)
            m = top
            acc = warpgroup_mma_wait(0, deps=[acc_async])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(factor, of_out)[:, None]
            weights = gl.convert_layout(p.to(dtype), operand)
        stage = at % STAGES
        mbarrier.wait(v_ready.index(stage), at // STAGES & 1)
        acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
        inverse = 1.0 / total
        if sinks_ptr is not None:
            sink = gl.load(sinks_ptr + head) * LOG2E
            top_2 = gl.maximum(m * scale, sink)
            factor = gl.exp2(m * scale - top_2)
            inverse = factor / (total * factor + gl.exp2(sink - top_2))
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        at += 1
        # Through the queries' own memory, so that a thread writes 16 bytes of a row at a time.
        q.store((acc * gl.convert_layout(inverse, of_out)[:, None]).to(dtype))
        out = q.load(lines)
        fence_async_shared()  # before the copies that write here next
        mbarrier.arrive(q_empty.index(slot), count=1)
        out_at = (
            out_ptr + (token + line).to(gl.int64)[:, None] * (HEADS * D) + head * D + d[None, :]
        )
        gl.store(out_at, out, mask=(line < tokens)[:, None])
        token, tokens, position, head = token_2, tokens_2, position_2, head_2


@gluon.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["table_ptr"])
def paged_prefill_wgmma_kernel(
    q_desc,
    kv_desc,
    out_ptr,
    table_ptr,
    tiles_ptr,
    count_ptr,
    sinks_ptr,
    scale,
    table_stride,
    block_rows,
    value_rows,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    PAGE: gl.constexpr,
    BOX: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
    num_warps: gl.constexpr,
):
    """scale: with log2 e. block_rows: from block to block; value_rows: from keys to values."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [4, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], kv_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], kv_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                    out_ptr, tiles_ptr, count_ptr, sinks_ptr, scale,
                    0, HEADS, GROUP, D, BN, STAGES, WINDOW,
                ),
            ),
            (
                _consumer,
                (
                    q_smem, k_smem, v_smem, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                    out_ptr, tiles_ptr, count_ptr, sinks_ptr, scale,
                    1, HEADS, GROUP, D, BN, STAGES, WINDOW,
                ),
            ),
            (
                _producer,
                (
                    q_desc, kv_desc, q_smem, k_smem, v_smem,
                    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                    table_ptr, tiles_ptr, count_ptr, table_stride, block_rows, value_rows,
                    HEADS, GROUP, D, BN, PAGE, BOX, STAGES, WINDOW,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def refusal(shape: Shape, q: Tensor, kv: Tensor, capability: tuple[int, int]) -> str | None:
    """None, or why this kernel cannot do it. Capped scores and biases are the caller's to ask."""
    if capability != (9, 0):
        return f"it needs a GPU of capability 9.0, not {capability[0]}.{capability[1]}"
    if kv.dtype not in DTYPES or q.dtype != kv.dtype:
        return f"queries of {q.dtype} and keys of {kv.dtype} are not supported"
    if shape.latent or shape.width not in (64, 128) or shape.chunk or shape.window:
        return "it does plain attention with heads of 64 or 128"
    if shape.page < 8 or shape.page & (shape.page - 1):
        return f"blocks of {shape.page} tokens are not a power of two from 8 on"
    width = shape.kv_heads * shape.width
    if kv.stride(0) % width or kv.stride(1) % width:
        return "a block is no whole number of rows"
    if q.stride(0) % 8 or q.data_ptr() % 16 or kv.data_ptr() % 16:
        return "queries or keys are not aligned to 16 bytes"
    return None


def stages(size: int) -> int:
    """Tiles of keys, and of values, that fit beside the queries."""
    return 2 if size == 128 else 4


def smem_layout(size: int, rows: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """Swizzled shared memory of a tile [rows, size]."""
    return gl.NVMMASharedLayout.get_default_for([rows, size], dtype)


class CacheDescriptors:
    """The bulk copies' descriptors of each layer's part of the cache: made once, as it never moves.

    Making one takes tens of microseconds of Python.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[int, int, tuple[int, ...], torch.dtype], TensorDescriptor] = {}

    def of(self, kv: Tensor) -> TensorDescriptor:
        """kv: one layer's view [num_blocks, 2, block_size, K, D]."""
        key = (kv.data_ptr(), kv.stride(0), tuple(kv.shape), kv.dtype)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = describe_cache(kv)
        return found


def describe_cache(kv: Tensor) -> TensorDescriptor:
    """One layer as a matrix of rows of keys and of values; see the module."""
    blocks, _, page, heads, size = kv.shape
    width = heads * size
    assert kv.stride()[2:] == (width, size, 1) and kv.stride(0) % width == 0
    assert kv.stride(1) % width == 0
    rows = ((blocks - 1) * kv.stride(0) + kv.stride(1)) // width + page
    box = min(page, BLOCK_N)
    layout = smem_layout(size, BLOCK_N, DTYPES[kv.dtype])
    return TensorDescriptor(kv, [rows, width], [width, 1], [box, size], layout)


def paged_prefill_wgmma(
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    block_tables: Tensor,
    plan: PrefillPlan,
    shape: Shape,
    descriptors: CacheDescriptors,
    *,
    scale: float,
    sinks: Tensor | None = None,
    programs: int,
) -> None:
    """`paged_prefill.paged_prefill`, where `refusal` has none; plan: of `TILE_TOKENS` tokens.

    programs: of the grid, one to a processor.
    """
    tokens, heads, size = q.shape
    assert heads == shape.kv_heads * shape.group and q.stride()[1:] == (size, 1)
    assert kv.shape[1:] == (2, shape.page, shape.kv_heads, size) and kv.dtype == q.dtype
    assert out.is_contiguous() and out.shape == q.shape and plan.tokens == TILE_TOKENS
    assert block_tables.stride(1) == 1
    layout = smem_layout(size, 64, DTYPES[q.dtype])
    q_desc = TensorDescriptor(q, [tokens, heads * size], [q.stride(0), 1], [64, size], layout)
    width = shape.kv_heads * size
    paged_prefill_wgmma_kernel[(programs,)](
        q_desc,
        descriptors.of(kv),
        out,
        block_tables,
        plan.tiles,
        plan.count,
        sinks,
        scale * LOG2E.value,
        block_tables.stride(0),
        kv.stride(0) // width,
        kv.stride(1) // width,
        **constants(shape),
        num_warps=4,
        maxnreg=168,
    )


def constants(shape: Shape) -> dict[str, int]:
    """Of the kernel."""
    return {
        "HEADS": shape.kv_heads * shape.group,
        "GROUP": shape.group,
        "D": shape.width,
        "BN": BLOCK_N,
        "PAGE": shape.page,
        "BOX": min(shape.page, BLOCK_N),
        "STAGES": stages(shape.width),
        "WINDOW": shape.window,
    }


def variants(label: str, shape: Shape, *, dtype: str = "bf16", sinks: bool = False) -> Variant:
    """The kernel of one shape."""
    kind = gl.bfloat16 if dtype == "bf16" else gl.float16
    q_layout = smem_layout(shape.width, 64, kind)
    kv_layout = smem_layout(shape.width, BLOCK_N, kind)
    box = min(shape.page, BLOCK_N)
    types: dict[str, str | None] = {
        "q_desc": f"tensordesc<{dtype}[64, {shape.width}],{q_layout!r}>",
        "kv_desc": f"tensordesc<{dtype}[{box}, {shape.width}],{kv_layout!r}>",
        "out_ptr": f"*{dtype}",
        "table_ptr": "*i64",
        "tiles_ptr": "*i32",
        "count_ptr": "*i32",
        "sinks_ptr": "*fp32" if sinks else None,
        "scale": "fp32",
        **{name: "i32" for name in ("table_stride", "block_rows", "value_rows")},
    }
    return Variant(
        label=f"paged_prefill_wgmma {label} {dtype} blocks of {shape.page}",
        kernel=paged_prefill_wgmma_kernel,
        types=types,
        constants=constants(shape) | {"num_warps": 4},
        num_warps=4,
        unaligned=("table_ptr", "table_stride"),
        sass=("HGMMA", "UTMALDG"),
        capability=90,
        gluon=True,
        maxnreg=168,
    )


AOT = [
    variants("8×4 heads of 128", Shape(8, 4, 128, page=16)),
    variants("8×4 heads of 128", Shape(8, 4, 128, page=64)),
    variants("8×4 heads of 128", Shape(8, 4, 128, page=16), dtype="fp16"),
    variants("8×4 heads of 128, window", Shape(8, 4, 128, page=256, window=4096)),
    variants("8×8 heads of 64, window, sinks", Shape(8, 8, 64, window=128), sinks=True),
]
