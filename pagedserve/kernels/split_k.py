"""Up to 64 rows times a matrix on tensor cores, K shared out: y = f(x · Wᵀ).

    x [M, K] ── · Wᵀ [N, K] ── + bias? ── act(gate) · up? ── + residual? ── y [M, N]

The operands are swapped, so that the weights' N fills the 64 rows that wgmma wants and the few rows
of x are its columns. A program computes BN outputs over one of SK shares of K. With more than one
share each leaves its float32 sums in `part`, and the last program of a column block to arrive adds
them up in a fixed order: the result does not depend on who was last. It puts the counter back to
zero, so the scratch is ready for the next product in the stream.

Any N and K. Rounded once, behind all that is fused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.activation import activate, gate_up
from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait

MAX_ROWS = 64
MAX_PROGRAMS = 1024  # of a product that is split
MAX_TILE = 64 * 64 * 2  # sums of one program
MIN_BM = 16


@triton.jit(do_not_specialize=["M", "SK"])
def split_k_kernel(
    x,
    w,
    y,
    bias,
    residual,
    part,
    count,
    M,
    N,
    K,
    SK,
    x_stride,
    residual_stride,
    limit,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of N, SK). y: [M, N] contiguous; M ≤ BM."""
    launch_dependents(PDL)
    block = tl.program_id(0)
    share = tl.program_id(1)
    n = block * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    steps = tl.cdiv(K, BK)
    begin = share * steps // SK
    end = (share + 1) * steps // SK
    # Rows past the end are read as the last one and not written.
    w_at = w + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    u_at = w_at + N.to(tl.int64) * K
    x_at = x + tl.minimum(m, M - 1)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    if GATED:
        acc_u = tl.zeros([BN, BM], tl.float32)
    if EARLY:
        # The first block of weights is on its way before the rows are there.
        w_block = tl.load(w_at + begin * BK, mask=k[None, :] < K - begin * BK, other=0.0)
        if GATED:
            u_block = tl.load(u_at + begin * BK, mask=k[None, :] < K - begin * BK, other=0.0)
    wait(PDL)
    if EARLY:
        x_block = tl.load(x_at + begin * BK, mask=k[:, None] < K - begin * BK, other=0.0)
        acc = tl.dot(w_block, x_block, acc)
        if GATED:
            acc_u = tl.dot(u_block, x_block, acc_u)
        begin += 1
    for i in range(begin, end):
        if EVEN_K:
            w_block = tl.load(w_at + i * BK)
            x_block = tl.load(x_at + i * BK)
        else:
            left = K - i * BK
            w_block = tl.load(w_at + i * BK, mask=k[None, :] < left, other=0.0)
            x_block = tl.load(x_at + i * BK, mask=k[:, None] < left, other=0.0)
        acc = tl.dot(w_block, x_block, acc)
        if GATED:
            if EVEN_K:
                u_block = tl.load(u_at + i * BK)
            else:
                u_block = tl.load(u_at + i * BK, mask=k[None, :] < K - i * BK, other=0.0)
            acc_u = tl.dot(u_block, x_block, acc_u)
    if SPLIT:
        SIZE: tl.constexpr = BN * BM * (2 if GATED else 1)
        mine = tl.arange(0, BN)[:, None] * BM + m[None, :]
        part += block * SK * SIZE
        tl.store(part + share * SIZE + mine, acc)
        if GATED:
            tl.store(part + share * SIZE + BN * BM + mine, acc_u)
        tl.debug_barrier()
        arrived = tl.atomic_add(count + block, 1, sem="acq_rel")
        if arrived != SK - 1:
            return
        tl.store(count + block, 0)
        acc = tl.zeros([BN, BM], tl.float32)
        if GATED:
            acc_u = tl.zeros([BN, BM], tl.float32)
        for j in range(SK):
            acc += tl.load(part + j * SIZE + mine, cache_modifier=".cg")
            if GATED:
                acc_u += tl.load(part + j * SIZE + BN * BM + mine, cache_modifier=".cg")
    in_n = (n < N)[:, None]
    if bias is not None:
        acc += tl.load(bias + n[:, None], mask=in_n, other=0.0).to(tl.float32)
        if GATED:
            acc_u += tl.load(bias + N + n[:, None], mask=in_n, other=0.0).to(tl.float32)
    if GATED:
        acc = gate_up(acc, acc_u, ACT, limit)
    elif ACT is not None:
        acc = activate(acc, ACT)
    inside = in_n & (m < M)[None, :]
    if residual is not None:
        at = residual + m[None, :] * residual_stride + n[:, None]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m[None, :] * N + n[:, None], acc.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Sums between the programs of one product; products of one stream share it."""

    part: Tensor  # [MAX_PROGRAMS · MAX_TILE] float32
    count: Tensor  # [MAX_PROGRAMS] int32, zero between products

    @classmethod
    def on(cls, device: torch.device) -> Scratch:
        """32 MiB on `device`."""
        return cls(
            torch.empty(MAX_PROGRAMS * MAX_TILE, dtype=torch.float32, device=device),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        )


def split_k(
    x: Tensor,
    weight: Tensor,
    scratch: Scratch,
    *,
    bias: Tensor | None = None,
    act: str | None = None,
    gated: bool = False,
    limit: float = 7.0,
    residual: Tensor | None = None,
    parts: int = 1,
    block_n: int = 64,
    block_k: int = 128,
    num_warps: int = 4,
    num_stages: int = 5,
    early: bool = False,
) -> Tensor:
    """x: [M, K], rows of any stride; weight: [N, K], with `gated` [2N, K] → [M, N] in x's dtype."""
    rows, columns = x.shape
    size = weight.shape[0] // 2 if gated else weight.shape[0]
    assert rows <= MAX_ROWS and weight.shape[1] == columns and weight.is_contiguous()
    block_m = max(MIN_BM, power_of_2(rows))
    blocks = triton.cdiv(size, block_n)
    assert parts == 1 or blocks * parts <= MAX_PROGRAMS
    assert block_n * block_m * (2 if gated else 1) <= MAX_TILE
    y = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    split_k_kernel[(blocks, parts)](
        x,
        weight,
        y,
        bias,
        residual,
        scratch.part,
        scratch.count,
        rows,
        size,
        columns,
        parts,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        limit,
        BM=block_m,
        BN=block_n,
        BK=block_k,
        EVEN_K=columns % block_k == 0,
        SPLIT=parts > 1,
        GATED=gated,
        ACT=act,
        EARLY=early,
        num_warps=num_warps,
        num_stages=num_stages,
        **dependent(x),
    )
    return y


def variant(
    block_m: int,
    *,
    block_n: int = 64,
    block_k: int = 128,
    num_stages: int = 5,
    gated: bool = False,
    split: bool = True,
    even: bool = True,
    bias: bool = False,
    residual: bool = False,
    early: bool = False,
) -> Variant:
    """Of the kernel, for one number of rows."""
    given = {"x": True, "w": True, "y": True, "bias": bias, "residual": residual}
    ints = ("M", "N", "K", "SK", "x_stride", "residual_stride")
    return Variant(
        f"split_k {block_m} rows, block {block_n} x {block_k}, {num_stages} stages"
        + "".join(f", {name}" for name in ("bias", "residual") if given[name])
        + "".join(
            f", {name}"
            for name, on in (
                ("gated", gated),
                ("split", split),
                ("odd", not even),
                ("early", early),
            )
            if on
        ),
        split_k_kernel,
        {
            **{name: "*bf16" if there else None for name, there in given.items()},
            **dict.fromkeys(ints, "i32"),
            "part": "*fp32",
            "count": "*i32",
            "limit": "fp32",
        },
        {
            "BM": block_m,
            "BN": block_n,
            "BK": block_k,
            "EVEN_K": even,
            "SPLIT": split,
            "GATED": gated,
            "ACT": "silu" if gated else None,
            "EARLY": early,
            "PDL": True,
        },
        num_stages=num_stages,
        unaligned=("M", "SK"),
        sass=("HGMMA" if block_n >= 64 else "HMMA", "LDGSTS"),
        capability=90,
    )


AOT = [
    variant(16),
    variant(16, residual=True),
    variant(16, early=True),
    variant(16, gated=True, split=False, num_stages=4, early=True),
    variant(64, early=True),
    variant(16, split=False),
    variant(16, gated=True, split=False, num_stages=4),
    variant(16, gated=True, num_stages=4),
    variant(32, residual=True),
    variant(32, gated=True, split=False, num_stages=4),
    variant(64, residual=True, num_stages=4),
    variant(64, gated=True, split=False, num_stages=3),
    variant(16, even=False, bias=True),
    variant(16, block_n=32),
    variant(64, block_n=32, gated=True, num_stages=4),
    variant(64, block_n=128, split=False, num_stages=3),
]
AOT += [older(variant(16, num_stages=3)), older(variant(64, gated=True, num_stages=2))]
