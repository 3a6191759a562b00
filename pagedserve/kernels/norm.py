"""RMSNorm and LayerNorm over rows, with the residual stream's sum in front, in one pass.

    total = x + residual                      where there is a residual; rounded to x's dtype
    rms     out = total / sqrt(mean(total²) + eps) · weight
    layer   out = (total - mean) / sqrt(var + eps) · weight + bias

In float32 inside. A program takes ROWS rows and holds them in registers. Meaning: `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, rows_of, wait

MAX_SIZE = 32768  # registers of a program


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    rows,
    size,
    eps,
    x_stride,
    residual_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYER: tl.constexpr,
    PDL: tl.constexpr,
):
    """out, total: [rows, size] contiguous."""
    launch_dependents(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < size
    if weight is not None:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    inside = inside & (row < rows)
    v = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + row * residual_stride + column
        v += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        v = v.to(total.dtype.element_ty)
        tl.store(total + row * size + column, v, mask=inside)
        v = v.to(tl.float32)
    if LAYER:
        v = tl.where(inside, v - (tl.sum(v, 1) / size)[:, None], 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 1) / size + eps)[:, None]
    if weight is not None:
        v *= w
    if bias is not None:
        v += b
    tl.store(out + row * size + column, v.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`reference.rms_norm`. x: [..., C], weight: [C] or None."""
    return normalise(x, None, weight, None, eps, layer=False)[0]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.layer_norm`. x: [..., C], weight, bias: [C] or None."""
    return normalise(x, None, weight, bias, eps, layer=True)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`: the norm of x + residual, and x + residual. Both [T, C]."""
    return normalise(x, residual, weight, None, eps, layer=False)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same with LayerNorm."""
    return normalise(x, residual, weight, bias, eps, layer=True)


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    layer: bool,
) -> tuple[Tensor, Tensor]:
    """The norm, and what was normalised."""
    shape, size = x.shape, x.shape[-1]
    assert size <= MAX_SIZE, f"a norm over {size} numbers; at most {MAX_SIZE}"
    flat = rows_of(x)
    rows = flat.shape[0]
    # Rows keep their places, whatever the strides of x were.
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = x
    stride = 0
    if residual is not None:
        assert residual.shape == shape and residual.dtype == x.dtype
        total = torch.empty(shape, dtype=x.dtype, device=x.device)
        residual = rows_of(residual)
        stride = residual.stride(0)
    if rows == 0:
        return out, total
    block = power_of_2(size)
    each = max(1, 512 // block) if rows > 64 else 1
    norm_kernel[(triton.cdiv(rows, each),)](
        flat,
        residual,
        weight,
        bias,
        out,
        None if residual is None else total,
        rows,
        size,
        eps,
        flat.stride(0),
        stride,
        ROWS=each,
        BLOCK=block,
        LAYER=layer,
        num_warps=min(max(each * block // 512, 1), 16),
        **dependent(x),
    )
    return out, total


def variant(label: str, size: int, *, residual: bool, layer: bool, dtype: str = "*bf16") -> Variant:
    """Of `norm_kernel` for one size."""
    block = power_of_2(size)
    types = dict.fromkeys(("x", "weight", "out"), dtype)
    sums = dict.fromkeys(("residual", "total"), dtype if residual else None)
    ints = dict.fromkeys(("rows", "size", "x_stride", "residual_stride"), "i32")
    return Variant(
        f"{label} {size}",
        norm_kernel,
        {**types, **sums, **ints, "bias": dtype if layer else None, "eps": "fp32"},
        {"ROWS": 1, "BLOCK": block, "LAYER": layer, "PDL": True},
        num_warps=min(max(block // 512, 1), 16),
        unaligned=("rows",) if size % 16 == 0 else ("rows", "size", "x_stride", "residual_stride"),
        capability=90,
    )


AOT = [
    variant("rms_norm", 4096, residual=False, layer=False),
    variant("rms_norm", 1000, residual=False, layer=False, dtype="*fp32"),
    variant("add_rms_norm", 4096, residual=True, layer=False),
    variant("add_rms_norm", 8192, residual=True, layer=False),
    variant("layer_norm", 2048, residual=False, layer=True),
    variant("layer_norm", 16384, residual=False, layer=True),
]
AOT.append(older(variant("add_rms_norm", 4096, residual=True, layer=False)))
