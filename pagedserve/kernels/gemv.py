"""One row times a matrix, at the speed of the weights' memory: y = f(x · Wᵀ).

    x [K] ── RMSNorm? ── · Wᵀ [N, K] ── + bias? ── act(gate) · up? ── + residual? ── y [N]

A program owns BN outputs (with GATED twice as many rows of W: gate's, then up's, N apart) and reads
their weights once, BK columns at a time, straight into registers; no tensor cores, no shared
memory. The norm is one factor, so it is applied to the sums; only its weight meets x. A second row
would cost as much arithmetic again: from there on `skinny` is faster.

In float32 inside, rounded once. Any N and K: rows past N are read as the last one and not written,
columns past K are masked. K is part of the compiled kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.activation import activate, gate_up
from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, wait

UNROLLED = 8  # blocks of K; a longer row is a loop


@triton.jit
def weights_at(w, k, K: tl.constexpr, MASKED: tl.constexpr):
    """A block of weights, each read once in a step."""
    if MASKED:
        return tl.load(w + k, mask=k < K, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(w + k, eviction_policy="evict_first")


@triton.jit
def inputs_at(x, k, K: tl.constexpr, MASKED: tl.constexpr):
    """The same columns of x in float32."""
    if MASKED:
        return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    else:
        return tl.load(x + k).to(tl.float32)


@triton.jit
def gemv_kernel(
    x,
    w,
    y,
    bias,
    residual,
    norm,
    N,
    eps,
    limit,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of N)."""
    launch_dependents(PDL)
    first = tl.program_id(0) * BN
    n = tl.minimum(first + tl.arange(0, BN), N - 1)[:, None]
    k = tl.arange(0, BK)[None, :]
    w += n.to(tl.int64) * K
    u = w + N.to(tl.int64) * K
    FULL: tl.constexpr = K // BK
    TAIL: tl.constexpr = K % BK != 0
    SHORT: tl.constexpr = FULL == 0

    # The first block of weights is on its way before the row is there.
    w_block = weights_at(w, k, K, SHORT).to(tl.float32)
    if GATED:
        u_block = weights_at(u, k, K, SHORT).to(tl.float32)
    if norm is not None:
        g_block = inputs_at(norm, k, K, SHORT)
    wait(PDL)
    x_block = inputs_at(x, k, K, SHORT)
    squares = x_block * x_block
    if norm is not None:
        x_block *= g_block
    acc = w_block * x_block
    if GATED:
        acc_u = u_block * x_block
    if UNROLL:
        for i in tl.static_range(1, FULL):
            w_block = weights_at(w, i * BK + k, K, False).to(tl.float32)
            x_block = inputs_at(x, i * BK + k, K, False)
            if norm is not None:
                squares += x_block * x_block
                x_block *= inputs_at(norm, i * BK + k, K, False)
            acc += w_block * x_block
            if GATED:
                acc_u += weights_at(u, i * BK + k, K, False).to(tl.float32) * x_block
    else:
        for i in tl.range(1, FULL):
            w_block = weights_at(w, i * BK + k, K, False).to(tl.float32)
            x_block = inputs_at(x, i * BK + k, K, False)
            if norm is not None:
                squares += x_block * x_block
                x_block *= inputs_at(norm, i * BK + k, K, False)
            acc += w_block * x_block
            if GATED:
                acc_u += weights_at(u, i * BK + k, K, False).to(tl.float32) * x_block
    if TAIL and not SHORT:
        w_block = weights_at(w, FULL * BK + k, K, True).to(tl.float32)
        x_block = inputs_at(x, FULL * BK + k, K, True)
        if norm is not None:
            squares += x_block * x_block
            x_block *= inputs_at(norm, FULL * BK + k, K, True)
        acc += w_block * x_block
        if GATED:
            acc_u += weights_at(u, FULL * BK + k, K, True).to(tl.float32) * x_block

    result = tl.sum(acc, 1)
    if GATED:
        result_u = tl.sum(acc_u, 1)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)
        result *= scale
        if GATED:
            result_u *= scale
    n = first + tl.arange(0, BN)
    inside = n < N
    if bias is not None:
        result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            result_u += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        result = gate_up(result, result_u, ACT, limit)
    elif ACT is not None:
        result = activate(result, ACT)
    if residual is not None:
        result += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n, result.to(y.dtype.element_ty), mask=inside)


def gemv(
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
    block_n: int = 2,
    block_k: int = 2048,
    num_warps: int = 4,
) -> Tensor:
    """x: [1, K]; weight: [N, K], with `gated` [2N, K] → [1, N] in x's dtype."""
    rows, columns = x.shape
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    assert rows == 1 and weight.shape[1] == columns and weight.is_contiguous()
    assert residual is None or residual.stride(1) == 1
    y = torch.empty((1, size), dtype=x.dtype, device=x.device)
    gemv_kernel[(triton.cdiv(size, block_n),)](
        x if x.stride(1) == 1 else x.contiguous(),
        weight,
        y,
        bias,
        residual,
        norm,
        size,
        eps,
        limit,
        K=columns,
        BN=block_n,
        BK=block_k,
        GATED=gated,
        ACT=act,
        UNROLL=columns // block_k <= UNROLLED,
        num_warps=num_warps,
        **dependent(x),
    )
    return y


def variant(
    columns: int,
    block_n: int,
    block_k: int,
    *,
    norm: bool = False,
    residual: bool = False,
    bias: bool = False,
    gated: bool = False,
    num_warps: int = 4,
    dtype: str = "*bf16",
) -> Variant:
    """Of the kernel, for one K."""
    given = {"x": True, "w": True, "y": True, "bias": bias, "residual": residual, "norm": norm}
    odd = columns % 16 != 0
    wide = "LDG.E.EF.128" if columns % 8 == 0 and columns >= block_k else "LDG.E"
    return Variant(
        f"gemv K {columns}, block {block_n} x {block_k}"
        + "".join(f", {name}" for name, there in given.items() if there and len(name) > 1)
        + (", gated" if gated else ""),
        gemv_kernel,
        {
            **{name: dtype if there else None for name, there in given.items()},
            "N": "i32",
            **dict.fromkeys(("eps", "limit"), "fp32"),
        },
        {
            "K": columns,
            "BN": block_n,
            "BK": block_k,
            "GATED": gated,
            "ACT": "silu" if gated else None,
            "UNROLL": columns // block_k <= UNROLLED,
            "PDL": True,
        },
        num_warps=num_warps,
        unaligned=("N",) if odd else (),
        sass=(wide,),
        capability=90,
    )


AOT = [
    variant(4096, 2, 4096, norm=True),
    variant(4096, 1, 4096, norm=True, gated=True),
    variant(14336, 1, 4096, residual=True),
    variant(1024, 4, 1024, norm=True, bias=True),
    variant(29568, 1, 4096, residual=True),
    variant(1000, 2, 1024, norm=True),
    variant(999, 2, 512, residual=True, num_warps=2),
]
AOT.append(older(variant(4096, 2, 2048, norm=True)))
