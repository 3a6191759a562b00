"""Layers against the formulas that they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pagedserve.device import pick
from pagedserve.kernels import reference as ops
from pagedserve.layers.embedding import Embedding
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.mlp import FeedForward, activation
from pagedserve.layers.norm import HeadNorm, normalize
from pagedserve.spec import Norm

CPU = pick("cpu")
OPS = CPU.ops(torch.float32)


def test_norms_are_chosen_by_kind_and_dtype() -> None:
    x, weight, bias = torch.randn(3, 16), torch.randn(16), torch.randn(16)
    rms, layer = Norm(eps=1e-5), Norm("layer", 1e-5)
    torch.testing.assert_close(normalize(rms, weight, None, OPS)(x), ops.rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(
        normalize(layer, weight, bias, OPS)(x), ops.layer_norm(x, weight, bias, 1e-5)
    )
    half_ops = CPU.ops(torch.bfloat16)
    half = normalize(rms, weight.bfloat16(), None, half_ops)(x.bfloat16())
    assert torch.equal(half, ops.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5))


def test_heads_are_normalised_with_their_own_weights() -> None:
    q, k = torch.randn(5), torch.randn(5)
    weight = torch.stack((q, q, k))
    heads = torch.randn(4, 4, 5)
    got = HeadNorm(Norm(eps=1e-6), weight, None)(heads[:, :3])
    for head, w in enumerate((q, q, k)):
        torch.testing.assert_close(got[:, head], ops.rms_norm(heads[:, head], w, 1e-6))


def test_feed_forward_gates_and_adds_the_residual() -> None:
    gate, up, down = torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    forward = Forward((), None, None, (), (), torch.empty(0))  # of no interest to it
    gated = FeedForward(
        Linear.of(torch.cat((gate, up)), None, CPU),
        Linear.of(down, None, CPU),
        activation("silu", True, OPS),
    )
    wanted = (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t() + residual
    torch.testing.assert_close(gated(x, residual, forward), wanted, rtol=1e-4, atol=1e-4)
    plain = FeedForward(
        Linear.of(up, None, CPU), Linear.of(down, None, CPU), activation("gelu_tanh", False, OPS)
    )
    wanted = F.gelu(x @ up.t(), approximate="tanh") @ down.t() + residual
    torch.testing.assert_close(plain(x, residual, forward), wanted, rtol=1e-4, atol=1e-4)


def test_learned_positions_are_added_to_a_copy() -> None:
    table, positions = torch.randn(9, 4), torch.randn(6, 4)
    kept = table.clone()
    ids, at = torch.tensor([3, 3, 8]), torch.tensor([0, 5, 1])
    torch.testing.assert_close(
        Embedding(table, positions=positions)(ids, at), table[ids] + positions[at]
    )
    assert torch.equal(Embedding(table)(ids, at), table[ids])
    assert torch.equal(table, kept)
