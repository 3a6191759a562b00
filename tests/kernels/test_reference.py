"""The meanings of the ops, against their formulas written out with plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pagedserve.kernels import reference as ops


def test_rms_norm_is_its_formula() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    for row, got in zip(x.tolist(), ops.rms_norm(x, weight, 0.5).tolist(), strict=True):
        root = math.sqrt(sum(v * v for v in row) / 8 + 0.5)
        assert got == pytest.approx(
            [v / root * w for v, w in zip(row, weight.tolist(), strict=True)]
        )


@pytest.mark.parametrize("eps", (1e-6, 0.5))
def test_rms_norm_by_length_is_rms_norm(eps: float) -> None:
    x, weight = (
        torch.randn(5, 64) * torch.tensor([[1e-4], [1.0], [1e3], [0.0], [1e-30]]),
        torch.randn(64),
    )
    got = ops.rms_norm_by_length(x, weight * 8, torch.tensor(math.sqrt(64 * eps)))
    torch.testing.assert_close(got, ops.rms_norm(x, weight, eps), rtol=2e-6, atol=1e-7)


def test_layer_norm_is_its_formula() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    centred = x - x.mean(-1, keepdim=True)
    wanted = centred / (centred.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, 0.1), wanted + bias)
    torch.testing.assert_close(ops.layer_norm(x, weight, None, 0.1), wanted)


def turned(x: Tensor, angles: list[list[float]], dim: int) -> Tensor:
    """Rotate pair (i, i + dim / 2) of every head of token t by angles[t][i]."""
    out = x.clone()
    for t, token in enumerate(angles):
        for i, angle in enumerate(token):
            a, b = x[t, :, i], x[t, :, i + dim // 2]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("dim", (8, 4))
def test_rotary_turns_pairs_and_leaves_the_rest(dim: int) -> None:
    x, angle = torch.randn(3, 2, 8), torch.rand(3, dim // 2) * 6
    cos = torch.cat((angle.cos(), angle.cos()), -1)[:, None]
    sin = torch.cat((-angle.sin(), angle.sin()), -1)[:, None]
    torch.testing.assert_close(ops.rotary(x, cos, sin), turned(x, angle.tolist(), dim))


def test_activations_are_their_formulas() -> None:
    x = torch.randn(4, 10)
    gate, up = x[:, :5], x[:, 5:]
    torch.testing.assert_close(ops.silu_and_mul(x), gate / (1 + (-gate).exp()) * up)
    gelu = 0.5 * gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    torch.testing.assert_close(ops.gelu_tanh(gate), gelu)
    torch.testing.assert_close(ops.gelu_tanh_and_mul(x), gelu * up)


def test_what_was_written_is_what_is_attended() -> None:
    """One query over a context in two blocks out of order, the rest of the cache NaN."""
    cache = torch.full((4, 3, 2, 4, 2, 8), math.nan)
    kv = cache[:, 1]
    k, v, q = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.randn(1, 4, 8)
    slots = torch.tensor([12, 13, 14, 15, 4, 5])
    ops.kv_write(kv, slots, k, v)
    assert cache[:, 0].isnan().all() and cache[:, 2].isnan().all()
    got = ops.paged_attention(q, kv, torch.tensor([[3, 1, 0]]), [6], [1], scale=0.4, window=5)
    for head in range(4):
        scores = torch.stack([q[0, head] @ k[p, head // 2] for p in range(1, 6)]) * 0.4
        wanted = scores.softmax(0) @ v[1:, head // 2]
        torch.testing.assert_close(got[0, head], wanted)


def attended(
    q: Tensor, k: Tensor, v: Tensor, position: int, *, scale: float, features: dict[str, Any]
) -> list[list[float]]:
    """One query's result, [heads, numbers of a value], from the formula and plain numbers.

    q: [heads, D]; k, v: [context, kv_heads, D].
    """
    window, chunk = features.get("window"), features.get("chunk")
    out = []
    for head in range(len(q)):
        shared = head * k.shape[1] // len(q)
        weights = {}
        for key in range(position + 1):
            if window and key <= position - window or chunk and key // chunk != position // chunk:
                continue
            score = float(q[head].double() @ k[key, shared].double()) * scale
            if cap := features.get("softcap"):
                score = cap * math.tanh(score / cap)
            if "slopes" in features:
                score -= float(features["slopes"][head]) * (position - key)
            weights[key] = math.exp(score)
        total = sum(weights.values())
        if "sinks" in features:
            total += math.exp(float(features["sinks"][head]))
        numbers = range(v.shape[2])
        out.append(
            [
                sum(w * float(v[key, shared, j]) for key, w in weights.items()) / total
                for j in numbers
            ]
        )
    return out


ALL: dict[str, Any] = {
    "window": 6,
    "chunk": 5,
    "softcap": 1.5,
    "slopes": torch.tensor([0.5, 0.25, 0.1, 1.0]),
    "sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("names", [(), *((name,) for name in ALL), tuple(ALL)])
@pytest.mark.parametrize(("kv_heads", "values_in_keys"), [(4, None), (2, None), (1, None), (1, 3)])
def test_attention_is_its_formula(
    kv_heads: int, values_in_keys: int | None, names: tuple[str, ...]
) -> None:
    """Two rows, one of one token, in blocks out of order; what was not written is NaN."""
    features = {name: ALL[name] for name in names}
    lens, counts, size = [9, 13], [1, 4], 8
    kv = torch.full((10, 1 if values_in_keys else 2, 3, kv_heads, size), math.nan)
    tables = torch.randperm(10).view(2, 5)
    q = torch.randn(5, 4, size)
    wanted, token = [], 0
    for table, length, count in zip(tables, lens, counts, strict=True):
        k, v = torch.randn(2, length, kv_heads, size)
        place = torch.arange(length)
        slots = table[place // 3] * 3 + place % 3
        ops.kv_write(kv, slots, k, None if values_in_keys else v)
        if values_in_keys:
            v = k[..., :values_in_keys]
        for i in range(count):
            position = length - count + i
            wanted.append(attended(q[token], k, v, position, scale=0.4, features=features))
            token += 1
    got = ops.paged_attention(
        q, kv, tables, lens, counts, scale=0.4, values_in_keys=values_in_keys, **features
    )
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
