"""A step's rotary angles, cosines and sines of all its tokens, once for every layer.

    angle = position · frequency      cos = factor · cos(angle)      sin = ∓ factor · sin(angle)

In float32, rounded once. One kernel where torch takes nine: at one row they are 2 % of a small
model's step. Meaning: `reference.angles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait

NUMBERS = 1024  # angles of one program


@triton.jit(do_not_specialize=["tokens"])
def angles_kernel(
    positions,
    frequencies,
    cos,
    sin,
    tokens,
    factor,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks of tokens). cos, sin: [tokens, 2 · HALF] contiguous."""
    launch_dependents(PDL)
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = tl.arange(0, BLOCK)[None, :]
    frequency = tl.load(frequencies + d, mask=d < HALF, other=0.0)
    wait(PDL)
    position = tl.load(positions + t, mask=t < tokens, other=0).to(tl.float32)
    angle = position[:, None] * frequency
    c = tl.cos(angle) * factor
    s = tl.sin(angle) * factor
    at = t[:, None] * (2 * HALF) + d
    inside = (t < tokens)[:, None] & (d < HALF)
    kind = cos.dtype.element_ty
    tl.store(cos + at, c.to(kind), mask=inside)
    tl.store(cos + at + HALF, c.to(kind), mask=inside)
    tl.store(sin + at, (-s).to(kind), mask=inside)
    tl.store(sin + at + HALF, s.to(kind), mask=inside)


def angles(
    positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """positions: [T] int64; frequencies: [R / 2] float32 → cos, sin: [T, 1, R] of `dtype`."""
    tokens, half = positions.shape[0], frequencies.shape[0]
    assert positions.stride() == (1,) and frequencies.dtype == torch.float32
    cos, sin = (
        torch.empty((tokens, 1, 2 * half), dtype=dtype, device=positions.device) for _ in range(2)
    )
    if tokens:
        block = power_of_2(half)
        each = max(1, min(NUMBERS // block, power_of_2(tokens)))
        angles_kernel[(triton.cdiv(tokens, each),)](
            positions,
            frequencies,
            cos,
            sin,
            tokens,
            factor,
            HALF=half,
            BLOCK=block,
            TOKENS=each,
            num_warps=4,
            **dependent(positions),
        )
    return cos, sin


AOT = [
    Variant(
        f"angles, {half} of {tokens} tokens",
        angles_kernel,
        {
            "positions": "*i64",
            "frequencies": "*fp32",
            **dict.fromkeys(("cos", "sin"), "*bf16"),
            "tokens": "i32",
            "factor": "fp32",
        },
        {"HALF": half, "BLOCK": power_of_2(half), "TOKENS": tokens, "PDL": True},
        unaligned=("tokens",),
        capability=90,
        stack=32,  # nothing spilled: where a sine's exact reduction of very large angles works
    )
    for half, tokens in ((64, 1), (64, 16), (40, 8))
]
AOT.append(older(AOT[0]))
