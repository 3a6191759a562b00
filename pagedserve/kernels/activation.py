"""Activations, alone and gated, as functions for other kernels' epilogues and as a kernel.

    gated: x [T, 2 · size], gate then up → act(gate) · up [T, size]
    clamped_silu: g · sigmoid(1.702 · g) · (u + 1), g = min(gate, limit), u = up within ± limit

In float32 inside, rounded once. Meaning: `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, rows_of, wait

GATED = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "clamped_silu")
BLOCK = 1024


@triton.jit
def activate(x, ACT: tl.constexpr):
    """x: float32. gelu_tanh is x · sigmoid(2u), u the argument of the tanh."""
    if ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == "quick_gelu":
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif ACT == "relu":
        x = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    else:
        tl.static_assert(False, "no such activation")
    return x


@triton.jit
def gate_up(gate, up, ACT: tl.constexpr, limit):
    """gate, up: float32 → act(gate) · up."""
    if ACT == "clamped_silu":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        y = gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        y = activate(gate, ACT) * up
    return y


@triton.jit
def gated_kernel(
    x,
    out,
    size,
    x_stride,
    limit,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, blocks of size)."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wait(PDL)
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + size + column, mask=inside, other=0.0).to(tl.float32)
    y = gate_up(gate, up, ACT, limit)
    tl.store(out + row * size + column, y.to(out.dtype.element_ty), mask=inside)


def act_and_mul(x: Tensor, act: str, limit: float = 7.0) -> Tensor:
    """x: [..., 2 · size], gate then up → [..., size]."""
    assert act in GATED, f"activation {act!r} has no gated kernel; known: {', '.join(GATED)}"
    size = x.shape[-1] // 2
    flat = rows_of(x)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        gated_kernel[(flat.shape[0], triton.cdiv(size, BLOCK))](
            flat,
            out,
            size,
            flat.stride(0),
            limit,
            ACT=act,
            BLOCK=BLOCK,
            num_warps=4,
            **dependent(x),
        )
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """`reference.silu_and_mul`."""
    return act_and_mul(x, "silu")


def gelu_and_mul(x: Tensor) -> Tensor:
    """The same with GELU by the error function."""
    return act_and_mul(x, "gelu")


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """`reference.gelu_tanh_and_mul`."""
    return act_and_mul(x, "gelu_tanh")


AOT = [
    Variant(
        f"{act}_and_mul",
        gated_kernel,
        {"x": "*bf16", "out": "*bf16", "size": "i32", "x_stride": "i32", "limit": "fp32"},
        {"ACT": act, "BLOCK": BLOCK, "PDL": True},
        capability=90,
    )
    for act in GATED
]
AOT.append(older(AOT[0]))
