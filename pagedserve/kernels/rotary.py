"""Rotary embedding of heads, alone: where norm and cache write cannot be in the same kernel.

Meaning: `reference.rotary`. `qk_rope_kv` is the fused form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait

HEADS = 8  # of one program


@triton.jit
def rotary_kernel(
    x,
    cos,
    sin,
    out,
    heads,
    token_stride,
    head_stride,
    angle_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, blocks of heads). out: [T, heads, D] contiguous."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < heads) & (d < D)
    turned = inside & (d < R)
    other = tl.where(d < R // 2, d + R // 2, d - R // 2)
    source = x + token * token_stride + head * head_stride
    angle = token * angle_stride + d + head * 0
    wait(PDL)
    v = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    v_other = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
    v = v * c + v_other * s
    tl.store(out + (token * heads + head) * D + d, v.to(out.dtype.element_ty), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, D], any strides but the last; cos, sin: [T, 1, R] → a new [T, heads, D]."""
    tokens, heads, dim = x.shape
    rotated = cos.shape[-1]
    assert x.stride(2) == 1 and cos.stride() == sin.stride() and cos.stride(2) == 1
    out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    if tokens and heads:
        rotary_kernel[(tokens, triton.cdiv(heads, HEADS))](
            x,
            cos,
            sin,
            out,
            heads,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            D=dim,
            R=rotated,
            BLOCK_D=power_of_2(dim),
            HEADS=HEADS,
            num_warps=4,
            **dependent(x),
        )
    return out


AOT = [
    Variant(
        f"rotary {dim} of which {rotated}",
        rotary_kernel,
        {
            **dict.fromkeys(("x", "cos", "sin", "out"), "*bf16"),
            **dict.fromkeys(("heads", "token_stride", "head_stride", "angle_stride"), "i32"),
        },
        {"D": dim, "R": rotated, "BLOCK_D": power_of_2(dim), "HEADS": HEADS, "PDL": True},
        unaligned=("heads",),
        capability=90,
    )
    for dim, rotated in ((128, 128), (80, 32))
]
AOT.append(older(AOT[0]))
