"""Up to 32 rows times a matrix, weights from memory straight to tensor cores: y = f(x · Wᵀ).

    x [M, K] ── RMSNorm? ── · Wᵀ [N, K] ── + bias? ── act(gate) · up? ── + residual? ── y [M, N]

A program owns LINES rows of W over all of K (with GATED half of them gate's, half up's, N apart),
so there is no merge between programs. Its warps share K, a chunk of BK columns each in turn, and
add up their sums once at the end:

    columns   │ warp 0 │ warp 1 │ warp 2 │ warp 3 │ warp 0 │ warp 1 │ …

Every thread loads 16 bytes of a row at a time into the registers that its tensor core reads: which
column stands where in a product does not matter as long as x's stand there too, so neither shared
memory nor a shuffle lies between. The first AHEAD blocks of weights are on their way before the
rows are there. In Gluon, since Triton has no say over where a load goes.

The norm is one factor a row, so it is applied to the sums; only its weight meets x, rounded to x's
dtype. That needs bfloat16, since in float16 rows before their norm may be too large, and registers:
it pays where K is short (`gpu_matrix`).

Any N and K. Rounded once, behind all that is fused. K is part of the compiled kernel.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from pagedserve.kernels.activation import activate, gate_up
from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait

MAX_ROWS = 32
MIN_BM = 8


@gluon.jit
def _columns(at, k, i: gl.constexpr, K: gl.constexpr, BLOCK: gl.constexpr, EVICT: gl.constexpr):
    """The i-th block of columns, zeros past K. at: pointers to the first block, k: its columns."""
    if (i + 1) * BLOCK > K:
        block = gl.load(at + i * BLOCK, mask=k < K - i * BLOCK, other=0.0, eviction_policy=EVICT)
    else:
        block = gl.load(at + i * BLOCK, eviction_policy=EVICT)
    return block


@gluon.jit(do_not_specialize=["M"])
def skinny_kernel(
    x,
    w,
    y,
    bias,
    residual,
    norm,
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    limit,
    K: gl.constexpr,
    BM: gl.constexpr,
    LINES: gl.constexpr,
    BK: gl.constexpr,
    AHEAD: gl.constexpr,
    GATED: gl.constexpr,
    ACT: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (blocks of N). y: [M, N] contiguous; M ≤ BM."""
    launch_dependents(PDL)
    WARPS: gl.constexpr = gl.num_warps()
    BLOCK: gl.constexpr = WARPS * BK
    STEPS: gl.constexpr = (K + BLOCK - 1) // BLOCK
    CHAINS: gl.constexpr = min(STEPS, max(1, 512 // (LINES * BM)))  # products that need not wait
    BN: gl.constexpr = LINES // 2 if GATED else LINES
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    # A thread adds up all warps' sums of its outputs.
    OUT: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 16, 2], [1, 1, WARPS], [0, 1, 2])

    first = gl.program_id(0) * BN
    line = gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    k = warp * BK + gl.arange(0, BK, gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    # Rows past the end are read as the last one and not written.
    if GATED:
        n = gl.minimum(first + line % BN, N - 1) + gl.where(line < BN, 0, N)
    else:
        n = gl.minimum(first + line, N - 1)
    w_at = w + n.to(gl.int64) * K + k
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    k_x = warp * BK + gl.arange(0, BK, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    m_x = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    x_at = x + gl.minimum(m_x, M - 1) * x_stride + k_x

    # The first blocks of weights are on their way before the rows are there.
    w_blocks = ()  # type: tuple[Tensor, ...]
    g_blocks = ()  # type: tuple[Tensor, ...]
    x_blocks = ()  # type: tuple[Tensor, ...]
    for i in gl.static_range(AHEAD):
        w_blocks = w_blocks + (_columns(w_at, k, i, K, BLOCK, "evict_first"),)
        if norm is not None:
            g_blocks = g_blocks + (_columns(norm + k_x, k_x, i, K, BLOCK, ""),)
    wait(PDL)
    for i in gl.static_range(AHEAD):
        x_blocks = x_blocks + (_columns(x_at, k_x, i, K, BLOCK, ""),)
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(0, OUT)))[None, :]
    n_out = first + gl.arange(0, BN, gl.SliceLayout(1, gl.SliceLayout(0, OUT)))[:, None]
    inside = (m < M) & (n_out < N)
    if residual is not None:
        at = residual + m * residual_stride + n_out
        added = gl.load(at, mask=inside, other=0.0).to(gl.float32)

    chains = ()  # type: tuple[Tensor, ...]
    for _ in gl.static_range(CHAINS):
        chains = chains + (gl.zeros([WARPS, LINES, BM], gl.float32, SUMS),)
    if norm is not None:
        squares = gl.zeros([WARPS, BM], gl.float32, gl.SliceLayout(1, RIGHT))
    for i in gl.static_range(STEPS):
        w_block = w_blocks[0]
        x_block = x_blocks[0]
        w_blocks = w_blocks[1:]
        x_blocks = x_blocks[1:]
        if i + AHEAD < STEPS:
            w_blocks = w_blocks + (_columns(w_at, k, i + AHEAD, K, BLOCK, "evict_first"),)
            x_blocks = x_blocks + (_columns(x_at, k_x, i + AHEAD, K, BLOCK, ""),)
        if norm is not None:
            wide = x_block.to(gl.float32)
            squares += gl.sum(wide * wide, 1)
            x_block = (wide * g_blocks[0].to(gl.float32)).to(w_block.dtype)
            g_blocks = g_blocks[1:]
            if i + AHEAD < STEPS:
                g_blocks = g_blocks + (_columns(norm + k_x, k_x, i + AHEAD, K, BLOCK, ""),)
        chains = chains[1:] + (mma_v2(w_block, x_block, chains[0]),)
    acc = chains[0]
    for i in gl.static_range(1, CHAINS):
        acc += chains[i]

    # One pass through shared memory, outputs side by side.
    PLACES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0])
    parts = gl.allocate_shared_memory(gl.float32, [WARPS, LINES, BM], PLACES)
    parts.store(acc)
    if norm is not None:
        lengths = gl.allocate_shared_memory(
            gl.float32, [WARPS, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
        lengths.store(squares)
        total = gl.sum(lengths.load(gl.SliceLayout(1, OUT)), 0)
        scale = gl.rsqrt(total / K + eps)
        # The same threads hold the same rows, seen without N.
        scale = gl.convert_layout(scale, gl.SliceLayout(0, gl.SliceLayout(0, OUT)), True)[None, :]
    result = gl.sum(parts.slice(0, BN, 1).load(OUT), 0)
    if GATED:
        result_u = gl.sum(parts.slice(BN, BN, 1).load(OUT), 0)
    if norm is not None:
        result *= scale
        if GATED:
            result_u *= scale
    if bias is not None:
        result += gl.load(bias + n_out, mask=n_out < N, other=0.0).to(gl.float32)
        if GATED:
            result_u += gl.load(bias + N + n_out, mask=n_out < N, other=0.0).to(gl.float32)
    if GATED:
        result = gate_up(result, result_u, ACT, limit)
    elif ACT is not None:
        result = activate(result, ACT)
    if residual is not None:
        result += added
    gl.store(y + m * N + n_out, result.to(y.dtype.element_ty), mask=inside)


def skinny(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    gated: bool = False,
    limit: float = 7.0,
    residual: Tensor | None = None,
    lines: int = 16,
    block_k: int = 128,
    num_warps: int = 8,
    ahead: int = 1,
) -> Tensor:
    """x: [M, K], rows of any stride; weight: [N, K], with `gated` [2N, K] → [M, N] in x's dtype."""
    rows, columns = x.shape
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    assert rows <= MAX_ROWS and weight.shape[1] == columns and weight.is_contiguous()
    assert norm is None or x.dtype == torch.bfloat16
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    block_n = lines // 2 if gated else lines
    skinny_kernel[(triton.cdiv(size, block_n),)](
        x,
        weight,
        y,
        bias,
        residual,
        norm,
        rows,
        size,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        limit,
        K=columns,
        BM=max(MIN_BM, power_of_2(rows)),
        LINES=lines,
        BK=block_k,
        AHEAD=min(ahead, triton.cdiv(columns, block_k * num_warps)),
        GATED=gated,
        ACT=act,
        num_warps=num_warps,
        **dependent(x),
    )
    return y


def variant(
    block_m: int,
    columns: int,
    *,
    lines: int = 16,
    block_k: int = 128,
    num_warps: int = 8,
    ahead: int = 1,
    norm: bool = False,
    residual: bool = False,
    bias: bool = False,
    gated: bool = False,
    dtype: str = "*bf16",
) -> Variant:
    """Of the kernel, for one number of rows and one K."""
    given = {"x": True, "w": True, "y": True, "bias": bias, "residual": residual, "norm": norm}
    return Variant(
        f"skinny {block_m} rows, K {columns}, {lines} x {num_warps} · {block_k}, {ahead} ahead"
        + "".join(f", {name}" for name, there in given.items() if there and len(name) > 1)
        + (", gated" if gated else ""),
        skinny_kernel,
        {
            **{name: dtype if there else None for name, there in given.items()},
            **dict.fromkeys(("M", "N", "x_stride", "residual_stride"), "i32"),
            **dict.fromkeys(("eps", "limit"), "fp32"),
        },
        {
            "K": columns,
            "BM": block_m,
            "LINES": lines,
            "BK": block_k,
            "AHEAD": ahead,
            "GATED": gated,
            "ACT": "silu" if gated else None,
            "PDL": True,
        },
        num_warps=num_warps,
        unaligned=("M",),
        sass=("LDG.E.EF.128", "HMMA"),
        capability=90,
        gluon=True,
    )


AOT = [
    variant(8, 1024, num_warps=4, ahead=2, norm=True),
    variant(8, 1024, lines=32, num_warps=4, ahead=2, norm=True, gated=True),
    variant(8, 2048, lines=32, ahead=2, residual=True),
    variant(8, 2048, lines=32, ahead=2, norm=True, gated=True),
    variant(8, 2048, lines=32, ahead=2, norm=True, bias=True),
    variant(8, 3072, ahead=3, residual=True),
    variant(8, 4096),
    variant(8, 4096, block_k=64, gated=True),
    variant(8, 4096, block_k=64, ahead=2, residual=True),
    variant(8, 14336, block_k=64, ahead=3, residual=True),
    variant(8, 2560, block_k=64, ahead=1, bias=True),
    variant(8, 1000, num_warps=4, ahead=2, norm=True, bias=True),
    variant(16, 1024, num_warps=4, norm=True, gated=True),
    variant(16, 3072, ahead=2, residual=True),
    variant(16, 4096, num_warps=4, ahead=2),
    variant(16, 4096, lines=32, block_k=64, ahead=2, residual=True),
    variant(32, 1024, num_warps=4, norm=True, gated=True),
    variant(32, 2048, residual=True),
]
AOT.append(older(variant(8, 2048, ahead=2, residual=True)))
