"""The meanings of the ops, against their formulas written out with plain numbers."""

from __future__ import annotations

import math

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
