"""Between the qkv matrix and attention, in one kernel: norm of heads, rotation, cache write.

    qkv row   │ q heads (H) │ k heads (K) │ v heads (K) │        each head_dim numbers
                    │             │             │
              norm, rotate   norm, rotate       │
                    ▼             ▼             ▼
                  q out      kv[block, 0]  kv[block, 1]          at the token's slot

Norm: RMS over each head by a weight of that head's, before or after the rotation. Rotation: the
first R numbers of a head, halves, as `reference.rotary`. A slot below 0 is a padding token: its key
and value are not written. Meaning: `reference.qk_rope_kv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait

HEADS = 4  # of one program
MANY = ((1024, 16), (256, 8))  # from so many tokens on: the GPU is full anyway


@triton.jit
def qk_rope_kv_kernel(
    qkv,
    cos,
    sin,
    weight,
    q_out,
    kv,
    slots,
    eps,
    q_heads,
    kv_heads,
    block_size,
    row_stride,
    angle_stride,
    block_stride,
    part_stride,
    token_stride,
    head_stride,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, blocks of heads). NORM: 0 none, 1 before the rotation, 2 after it."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    turned = (head < q_heads + kv_heads) & (d < R)
    inside = (head < q_heads + 2 * kv_heads) & (d < D)
    other = tl.where(d < R // 2, d + R // 2, d - R // 2)
    if NORM:
        normed = (head < q_heads + kv_heads) & (d < D)
        w = tl.load(weight + head * D + d, mask=normed, other=1.0).to(tl.float32)
    if NORM == 1 and R > 0:
        w_other = tl.load(weight + head * D + other, mask=turned, other=0.0).to(tl.float32)
    wait(PDL)
    source = qkv + token * row_stride + head * D
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    value = x
    if NORM == 1:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= scale * w
    if R > 0:
        x_other = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
        if NORM == 1:
            x_other *= scale * w_other
        # One angle for all heads, loaded in the heads' own layout.
        angle = token * angle_stride + d + head * 0
        c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
        x = x * c + x_other * s
    if NORM == 2:
        x *= tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * w
    is_query = inside & (head < q_heads)
    q_row = q_out + token * (q_heads * D)
    tl.store(q_row + head * D + d, x.to(q_out.dtype.element_ty), mask=is_query)
    slot = tl.load(slots + token).to(tl.int64)
    cached = inside & (head >= q_heads) & (slot >= 0)
    block = slot // block_size
    at = kv + block * block_stride + (slot - block * block_size) * token_stride
    is_value = head >= q_heads + kv_heads
    index = head - q_heads - tl.where(is_value, kv_heads, 0)
    at += tl.where(is_value, part_stride, 0) + index * head_stride
    written = tl.where(is_value, value, x)
    tl.store(at + d, written.to(kv.dtype.element_ty), mask=cached)


def qk_rope_kv(
    qkv: Tensor,
    kv: Tensor,
    slot_mapping: Tensor,
    *,
    heads: int,
    angles: tuple[Tensor, Tensor] | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_after: bool = False,
    each: int | None = None,
) -> Tensor:
    """Writes keys and values where `slot_mapping` says; returns the queries [T, H, D], contiguous.

    qkv: [T, (H + 2K) · D], rows of any stride; kv: [num_blocks, 2, block_size, K, D], any strides
    but the last; slot_mapping: [T] int32 or int64; angles: cos and sin, [T, 1, R] each; norm:
    weight [H + K, D], q's rows, then k's; `norm_after` the rotation; `each`: heads of a program.
    """
    tokens, width = qkv.shape
    kv_heads, dim = kv.shape[3:]
    assert width == (heads + 2 * kv_heads) * dim, (width, heads, kv_heads, dim)
    assert qkv.stride(1) == 1 and kv.stride(4) == 1
    assert norm is None or (norm.shape == (heads + kv_heads, dim) and norm.is_contiguous())
    cos, sin = angles if angles is not None else (None, None)
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    if cos is not None and sin is not None:
        assert cos.stride(-1) == 1 and cos.stride() == sin.stride() and cos.shape[-1] <= dim
    if each is None:
        each = next((many for least, many in MANY if tokens >= least), HEADS)
    if tokens:
        qk_rope_kv_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, each))](
            qkv,
            cos,
            sin,
            norm,
            q,
            kv,
            slot_mapping,
            eps,
            heads,
            kv_heads,
            kv.shape[2],
            qkv.stride(0),
            0 if cos is None else cos.stride(0),
            *kv.stride()[:4],
            D=dim,
            R=0 if cos is None else cos.shape[-1],
            BLOCK_D=power_of_2(dim),
            HEADS=each,
            NORM=0 if norm is None else 2 if norm_after else 1,
            num_warps=4,
            **dependent(qkv),
        )
    return q


def variant(
    dim: int, rotated: int, norm: int, kv: str = "*bf16", slots: str = "*i64", each: int = HEADS
) -> Variant:
    """Of the kernel, for one head."""
    angles = dict.fromkeys(("cos", "sin"), "*bf16" if rotated else None)
    data = dict.fromkeys(("qkv", "q_out"), "*bf16")
    counts = dict.fromkeys(("q_heads", "kv_heads", "block_size"), "i32")
    strides = ("row_stride", "angle_stride", "part_stride", "token_stride", "head_stride")
    return Variant(
        f"qk_rope_kv {each} heads of {dim} rotate {rotated}, norm {norm}, cache {kv[1:]}",
        qk_rope_kv_kernel,
        {
            **angles,
            **data,
            **counts,
            **dict.fromkeys(strides, "i32"),
            "weight": "*bf16" if norm else None,
            "kv": kv,
            "slots": slots,
            "eps": "fp32",
            "block_stride": "i64",
        },
        {
            "D": dim,
            "R": rotated,
            "BLOCK_D": power_of_2(dim),
            "HEADS": each,
            "NORM": norm,
            "PDL": True,
        },
        unaligned=("q_heads", "kv_heads"),
        capability=90,
    )


AOT = [
    variant(128, 128, 0),
    variant(128, 128, 1),
    variant(128, 128, 1, each=16),
    variant(256, 256, 1, each=16),
    variant(128, 128, 2, slots="*i32"),
    variant(80, 32, 0),
    variant(64, 0, 1),
    variant(256, 128, 1),
    variant(128, 128, 1, kv="*fp8e4nv"),
]
AOT.append(older(variant(128, 128, 1)))
