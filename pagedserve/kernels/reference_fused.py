"""What the fused kernels mean, in plain torch, beside `reference`.

T tokens · H query heads · K key/value heads · D head_dim · C hidden
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 · x) (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": reference.gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
}


def act_and_mul(x: Tensor, act: str, limit: float = 7.0) -> Tensor:
    """x: [..., 2 · size], gate then up → act(gate) · up.

    "clamped_silu": gate · sigmoid(1.702 · gate) · (up + 1), gate at most `limit`, up within it.
    """
    gate, up = x.chunk(2, -1)
    if act == "clamped_silu":
        return quick_gelu(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + 1)
    return ACTIVATIONS[act](gate) * up


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual. [T, C] both."""
    total = x + residual
    return reference.rms_norm(total, weight, eps), total


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
) -> Tensor:
    """Norm and rotation of q and k, keys and values into the cache; returns q [T, H, D].

    qkv: [T, (H + 2K) · D]; kv: [num_blocks, 2, block_size, K, D]; slot_mapping: [T], below 0 for a
    token that is not written; angles: see `reference.rotary`; norm: weight [H + K, D].
    """
    kv_heads, dim = kv.shape[3:]
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
    qk, v = rows.split_with_sizes((heads + kv_heads, kv_heads), 1)

    def normed(x: Tensor) -> Tensor:
        return x if norm is None else F.rms_norm(x, (dim,), None, eps) * norm

    if not norm_after:
        qk = normed(qk)
    if angles is not None:
        qk = reference.rotary(qk, *angles)
    if norm_after:
        qk = normed(qk)
    q, k = qk.split_with_sizes((heads, kv_heads), 1)
    real = slot_mapping >= 0
    reference.kv_write(kv, slot_mapping[real].long(), k[real], v[real])
    return q.contiguous()
