"""The few operations that the references are made of, each as its paper writes it.

One sequence, float32, no cache. T: tokens, H: query heads, K: key-value heads, D: head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Weights

Attention = Callable[[str, Tensor], Tensor]
Norm = Callable[[str, Tensor], Tensor]
Expert = Callable[[int, Tensor], Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias where the checkpoint has one."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * g."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]


def layer_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Ba et al. 2016, with the biased variance, and a bias where the checkpoint has one."""
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    x = x * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def swiglu(weights: Weights, x: Tensor, *, gate: str, up: str, down: str) -> Tensor:
    """Shazeer 2020: W_down (silu(W_gate x) * W_up x)."""
    return linear(weights, down, F.silu(linear(weights, gate, x)) * linear(weights, up, x))


def heads(x: Tensor, dim: int) -> Tensor:
    """[T, H * D] -> [T, H, D]."""
    return x.unflatten(-1, (-1, dim))


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention (Vaswani et al. 2017) with shared key-value heads (Ainslie et al. 2023).

    q: [T, H, D], k and v: [T, K, D], bias: [H, T, T] added to the scaled scores -> [T, H * D].
    """
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum(
        "hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v
    ).flatten(1)


def angles(tokens: int, dim: int, base: float) -> Tensor:
    """Su et al. 2021: position * base^(-2i / dim), [T, dim / 2]."""
    return positions_times(tokens, base ** -(torch.arange(0, dim, 2).float() / dim))


def positions_times(tokens: int, frequencies: Tensor) -> Tensor:
    """[T] x [dim / 2] -> [T, dim / 2]."""
    return torch.outer(torch.arange(tokens).float(), frequencies)


def dynamic_base(base: float, dim: int, *, factor: float, tokens: int, trained: int) -> float:
    """Dynamic NTK: the base grows once a sequence is longer than what was trained for."""
    if tokens <= trained:
        return base
    return base * (factor * tokens / trained - (factor - 1)) ** (dim / (dim - 2))


def llama3_frequencies(dim: int, base: float, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, between them a blend."""
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for i in range(0, dim, 2):
        frequency = base ** -(i / dim)
        turns = trained * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - kept) * frequency / scaling["factor"] + kept * frequency)
    return torch.tensor(scaled)


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate dim i with dim i + n of the first 2n dims of x [T, H, D]; angle: [T, n]."""
    n = angle.shape[-1]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate dim 2i with dim 2i + 1 of the first 2n dims of x [T, H, D]; angle: [T, n]."""
    n = angle.shape[-1]
    even, odd, rest = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2], x[..., 2 * n :]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def alibi_slopes(count: int) -> list[float]:
    """Press et al. 2022: 2^(-8/n), 2^(-16/n), … for n heads where n is a power of two.

    For any other count their code takes the slopes of the next smaller power of two, then every
    second slope of the next larger one until there are enough.
    """
    power = 2 ** math.floor(math.log2(count))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    extra = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + extra[: count - power]


def alibi(count: int, tokens: int) -> Tensor:
    """-slope * distance to the key, [H, T, T]."""
    position = torch.arange(tokens).float()
    return torch.tensor(alibi_slopes(count))[:, None, None] * (
        position[None, :] - position[:, None]
    )


def prenorm_decoder(
    weights: Weights, input_ids: list[int], layers: int, *, norm: Norm, attention: Attention
) -> Tensor:
    """Pre-norm layers with a gated MLP under llama's names -> hidden states [T, hidden].

    `norm` and `attention` get the name of their module and its input.
    """
    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(layers):
        layer = f"model.layers.{i}"
        x = x + attention(f"{layer}.self_attn", norm(f"{layer}.input_layernorm", x))
        mlp = f"{layer}.mlp"
        x = x + swiglu(
            weights,
            norm(f"{layer}.post_attention_layernorm", x),
            gate=f"{mlp}.gate_proj",
            up=f"{mlp}.up_proj",
            down=f"{mlp}.down_proj",
        )
    return norm("model.norm", x)


def rotary_attention(weights: Weights, dim: int, angle: Tensor, name: str, x: Tensor) -> Tensor:
    """`q_proj`, `k_proj`, `v_proj`, rotation of halves, attention and `o_proj` of module `name`."""
    q, k, v = (heads(linear(weights, f"{name}.{part}_proj", x), dim) for part in "qkv")
    mixed = attend(rotate_halves(q, angle), rotate_halves(k, angle), v)
    return linear(weights, f"{name}.o_proj", mixed)


def mixture(x: Tensor, chances: Tensor, top: int, expert: Expert, *, renormalise: bool) -> Tensor:
    """Sum over the `top` likeliest experts of each token, weighted by their chances.

    x: [T, hidden], chances: [T, experts] after the softmax over all. `renormalise`: the chances of
    the chosen are first made to sum to one. `expert(number, token)` maps one [hidden] to another.
    """
    rows = []
    for token, all_chances in zip(x, chances, strict=True):
        best, chosen = all_chances.topk(top)
        if renormalise:
            best = best / best.sum()
        pairs = zip(best, chosen.tolist(), strict=True)
        rows.append(
            torch.stack([chance * expert(number, token) for chance, number in pairs]).sum(0)
        )
    return torch.stack(rows)
