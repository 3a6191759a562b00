"""What every op means, in plain torch: the CPU path runs these, kernels are tested against them.

T tokens · R rows · H query heads · K key/value heads · D head_dim · C hidden · L context tokens
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019).

    A weight of another dtype than x: computed in float32, rounded once.
    """
    if weight.dtype != x.dtype:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_by_length(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """The same in float32, from x's length: x / hypot(|x|, floor) · weight.

    weight: the norm's own · sqrt(C); floor: scalar, sqrt(C · eps). Half as many ops as `rms_norm`
    takes on a CPU, which at one token is half the time.
    """
    return x.div(torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), floor)).mul_(weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dimension."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def embed(input_ids: Tensor, table: Tensor) -> Tensor:
    """input_ids: [T] int64; table: [rows, C] → its rows [T, C]."""
    return F.embedding(input_ids, table)


def angles(
    positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency, times `factor`, as `rotary` wants them.

    positions: [T] int64; frequencies: [R / 2] float32 → [T, 1, R] each. In float32, then `dtype`.
    """
    angle = torch.outer(positions.float(), frequencies)
    cos, sin = angle.cos(), angle.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return (
        torch.cat((cos, cos), -1).unsqueeze(1).to(dtype),
        torch.cat((-sin, sin), -1).unsqueeze(1).to(dtype),
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head by its token's angles (NeoX halves).

    x: [T, heads, D]; cos, sin: [T, 1, R], R ≤ D even, both halves of R alike, except that the first
    half of `sin` is negated: (a, b) → (a · cos - b · sin, b · cos + a · sin). Returns a new tensor.
    """
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotary(x[..., :dim], cos, sin), x[..., dim:]), -1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


def silu_and_mul(x: Tensor) -> Tensor:
    """x: [T, 2 · size], gate then up → [T, size]: silu(gate) · up."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """x: [T, 2 · size], gate then up → [T, size]: gelu_tanh(gate) · up."""
    gate, up = x.chunk(2, -1)
    return gelu_tanh(gate).mul_(up)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), "gelu_new" in checkpoints."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 · x), an approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021)."""
    return F.relu(x).square()


def kv_write(kv: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Write the keys and values of T tokens where their slots say.

    kv: [num_blocks, 2, block_size, K, D], any stride between blocks; slot_mapping: [T] int64,
    block · block_size + offset; k, v: [T, K, D]. Without v: kv [num_blocks, 1, block_size, K, D].
    """
    assert kv.shape[1] == (1 if v is None else 2), kv.shape
    block_size = kv.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv[blocks, 0, offsets] = k.to(kv.dtype)
    if v is not None:
        kv[blocks, 1, offsets] = v.to(kv.dtype)


def paged_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    seq_lens: list[int],
    counts: list[int],
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    values_in_keys: int | None = None,
) -> Tensor:
    """Causal attention of each row's last `count` tokens over its whole context.

    q: [T, H, D], rows one after the other; kv: [num_blocks, 2, block_size, K, D], already written;
    block_tables: [R, max_blocks]; seq_lens: context with this step's tokens. Softmax in float32.
    Returns [T, H, D] in q's dtype.

        score(p, key) = cap(q · k · scale) - slope · (p - key)      softmax over keys ≤ p

    window          tokens that a query sees, itself included
    chunk           the query at p sees keys from p - p % chunk on
    softcap         cap(s) = softcap · tanh(s / softcap) (Gemma 2, 2024)
    slopes          [H], ALiBi (Press et al. 2022)
    sinks           [H], one more score of each head that takes part in the softmax and has no value
    values_in_keys  a token's value is the first so many numbers, V, of its key; kv is
                    [num_blocks, 1, block_size, K, D], the result [T, H, V]
    """
    outputs = []
    for row, (length, queries) in enumerate(zip(seq_lens, q.split(counts), strict=True)):
        blocks = block_tables[row, : -(-length // kv.shape[2])].long()
        parts = [kv[blocks, part].flatten(0, 1)[:length].float() for part in range(kv.shape[1])]
        k, v = (parts[0], parts[0][..., :values_in_keys]) if values_in_keys else parts
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        position = torch.arange(length - len(queries), length, device=q.device)[:, None]
        distance = position - torch.arange(length, device=q.device)
        hidden = (distance < 0) | (distance >= (window or length))
        hidden |= distance > position % (chunk or length)
        scores = torch.einsum("qhd,khd->hqk", queries.float(), k) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if slopes is not None:
            scores -= slopes.float()[:, None, None] * distance
        scores.masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat(
                (scores, sinks.float()[:, None, None].expand(-1, len(queries), 1)), -1
            )
        weights = scores.softmax(-1)[..., :length]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype))
    return torch.cat(outputs)
