"""Keys and values of a step into the paged cache: `reference.kv_write`, in Triton.

One program a token and part (keys, values), so that a step of any size is one launch. Copying is
all it does; what rotates and normalises keys first is another kernel's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def kv_write_kernel(
    k_ptr,
    v_ptr,
    kv_ptr,
    slot_ptr,
    k_stride,
    v_stride,
    block_stride,
    part_stride,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Token program_id(0), part program_id(1). WIDTH: numbers of a token's keys, all heads."""
    launch_dependents(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    c = tl.arange(0, WIDTH_PAD)
    inside = c < WIDTH
    if part == 0:
        x = tl.load(k_ptr + token * k_stride + c, mask=inside)
    else:
        x = tl.load(v_ptr + token * v_stride + c, mask=inside)
    at = (slot // PAGE) * block_stride + (slot % PAGE) * WIDTH + part * part_stride
    tl.store(kv_ptr + at + c, x.to(kv_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr"],
)
def clear_tails_kernel(
    kv_ptr,
    table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    table_stride,
    block_stride,
    part_stride,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row program_id(0): zeros where the values of its last block's unwritten slots will be."""
    launch_dependents(PDL)
    wait(PDL)
    row = tl.program_id(0)
    length = tl.load(seq_lens_ptr + row).to(tl.int32)
    count = tl.load(query_start_ptr + row + 1) - tl.load(query_start_ptr + row)
    if (count > 1) & (length % PAGE != 0):
        block = tl.load(table_ptr + row.to(tl.int64) * table_stride + length // PAGE).to(tl.int64)
        c = tl.arange(0, WIDTH_PAD)
        zeros = tl.zeros([WIDTH_PAD], kv_ptr.dtype.element_ty)
        for offset in range(length % PAGE, PAGE):
            at = block * block_stride + part_stride + offset * WIDTH
            tl.store(kv_ptr + at + c, zeros, mask=c < WIDTH)


def kv_write(kv: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor | None) -> None:
    """`reference.kv_write`. v: None where values are part of the keys (kv: [.., 1, ..]).

    k, v: [T, K, D], any stride between tokens, any dtype; kv: one layer's view [num_blocks, 1 or 2,
    block_size, K, D], a block's keys contiguous; slot_mapping: [T] int32 or int64.
    """
    tokens, heads, size = k.shape
    width = heads * size
    assert kv.shape[1] == (1 if v is None else 2) and kv.shape[3:] == (heads, size), kv.shape
    assert kv.stride()[2:] == (width, size, 1), "a block's keys must be contiguous"
    assert slot_mapping.shape == (tokens,) and (v is None or v.shape == k.shape)
    if tokens == 0:
        return
    k = rows(k)
    v = k if v is None else rows(v)
    kv_write_kernel[(tokens, kv.shape[1])](
        k,
        v,
        kv,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        kv.stride(0),
        kv.stride(1),
        PAGE=kv.shape[2],
        WIDTH=width,
        WIDTH_PAD=power_of_2(width),
        num_warps=warps(width),
        **dependent(kv),
    )


def clear_tails(
    kv: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor
) -> None:
    """Zero the values that follow each row's last token in its block, of rows of several tokens.

    For a kernel that multiplies whole blocks: 0 · NaN is NaN, and what was never written, or was
    left by a sequence that overflowed, may be NaN. Those slots belong to the row alone, since its
    last block holds a token of this very step.
    """
    assert kv.shape[1] == 2 and block_tables.stride(1) == 1
    width = kv.shape[3] * kv.shape[4]
    clear_tails_kernel[(block_tables.shape[0],)](
        kv,
        block_tables,
        seq_lens,
        query_start_loc,
        block_tables.stride(0),
        kv.stride(0),
        kv.stride(1),
        PAGE=kv.shape[2],
        WIDTH=width,
        WIDTH_PAD=power_of_2(width),
        num_warps=warps(width),
        **dependent(kv),
    )


def rows(x: Tensor) -> Tensor:
    """x: [T, K, D] with each token's numbers side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def warps(width: int) -> int:
    """Enough for one 16-byte access a thread."""
    return max(1, min(8, power_of_2(width) // 256))


def variants(dtype: str, width: int, page: int) -> list[Variant]:
    """Of one cache."""
    cache = {"kv_ptr": f"*{dtype}", "block_stride": "i32", "part_stride": "i32"}
    sizes = {"PAGE": page, "WIDTH": width, "WIDTH_PAD": power_of_2(width), "PDL": False}
    tables = {"table_ptr": "*i64", "seq_lens_ptr": "*i64", "query_start_ptr": "*i64"}
    return [
        Variant(
            label=f"kv_write {dtype} {width}",
            kernel=kv_write_kernel,
            types={
                **cache,
                "k_ptr": f"*{dtype}",
                "v_ptr": f"*{dtype}",
                "slot_ptr": "*i64",
                "k_stride": "i32",
                "v_stride": "i32",
            },
            constants=sizes,
            num_warps=warps(width),
            unaligned=("slot_ptr",),
        ),
        Variant(
            label=f"clear_tails {dtype} {width}",
            kernel=clear_tails_kernel,
            types={**cache, **tables, "table_stride": "i32"},
            constants=sizes,
            num_warps=warps(width),
            unaligned=(*tables, "table_stride"),
        ),
    ]


AOT = [v for dtype in ("bf16", "fp32") for v in variants(dtype, 8 * 128, 16)]
