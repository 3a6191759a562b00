"""Mixtures of experts to try, and the plain forms that say what they mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.kernels import moe, reference_fused
from pagedserve.kernels.experts import LoopedExperts, Routing
from pagedserve.kernels.matrix import PlainMatrix
from pagedserve.layers.moe import route
from pagedserve.spec import Moe
from tests.kernels.fused import Place, assert_close, settle

LIMIT = 0.7
ROUTINGS = {
    "softmax": Moe(8, 3, 5),
    "softmax, not renormed": Moe(10, 3, 5, renorm=False, groups=(5, 2), group_score="best"),
    "sigmoid, groups, corrected": Moe(
        12, 4, 5, score="sigmoid", groups=(4, 2), bias=True, scale=2.5, renorm_eps=1e-20
    ),
    "softmax of chosen": Moe(6, 2, 5, score="softmax of chosen"),
    "sparsemixer": Moe(7, 2, 5, score="sparsemixer", jitter=0.1, renorm=False),
    "one of five": Moe(5, 1, 5, score="sigmoid", renorm=False),
}


def routing(spec: Moe, correction: Tensor | None) -> Routing:
    """`spec` as the kernels take it."""
    return Routing(
        spec.top_k,
        spec.score,
        spec.renorm,
        spec.renorm_eps,
        spec.groups,
        spec.group_score,
        spec.scale,
        spec.jitter,
        correction,
    )


def check_routing(spec: Moe, tokens: int, device: torch.device) -> None:
    """Same experts, same weights; the order of a token's choices is free."""
    correction = torch.randn(spec.experts, device=device) * 0.3 if spec.bias else None
    logits = torch.randn(tokens, spec.experts, device=device)
    how = routing(spec, correction)
    weights, chosen = moe.route(logits, how)
    wanted_weights, wanted = route(how, logits)
    order, wanted_order = chosen.argsort(-1), wanted.argsort(-1)
    assert torch.equal(chosen.gather(1, order).long(), wanted.gather(1, wanted_order))
    assert torch.allclose(
        weights.gather(1, order), wanted_weights.gather(1, wanted_order), rtol=1e-4, atol=1e-6
    )


@dataclass(frozen=True)
class Sizes:
    """Tokens, experts, chosen, an expert's size, hidden."""

    tokens: int
    experts: int
    top_k: int
    size: int
    hidden: int


def check_experts(
    place: Place, sizes: Sizes, *, act: str = "silu", bias: bool = False, on_input: bool = False
) -> None:
    """`apply` and `mixture`, with a residual, each choice alone and in buckets."""
    e, s, c = sizes.experts, sizes.size, sizes.hidden
    up, down = place.random(e, 2 * s, c, scale=c**-0.5), place.random(e, c, s, scale=s**-0.5)
    up_bias = place.random(e, 2 * s) if bias else None
    down_bias = place.random(e, c) if bias else None
    ours = moe.GpuExperts.of(up, down, up_bias, down_bias, act=act, limit=LIMIT)
    plain = LoopedExperts(
        tuple(PlainMatrix(w) for w in up.float()),
        tuple(PlainMatrix(w) for w in down.float()),
        None if up_bias is None else up_bias.float(),
        None if down_bias is None else down_bias.float(),
        lambda x: reference_fused.act_and_mul(x, act, LIMIT),
    )
    x, residual = place.strided(sizes.tokens, c), place.strided(sizes.tokens, c)
    logits = torch.randn(sizes.tokens, e, device=place.device)
    logits[:, e // 2] = -torch.inf  # an expert that nobody chooses
    how = Routing(sizes.top_k)
    weights, chosen = moe.route(logits, how)
    settle(place)
    wanted = plain.apply(x.float(), weights, chosen.long(), on_input=on_input)
    for _ in range(2):  # the second finds the buckets as the first left them
        assert_close(ours.apply(x, weights, chosen.long(), on_input=on_input), wanted)
        got = ours.mixture(x, logits, how, on_input=on_input, residual=residual)
        assert_close(got, wanted + residual.float())
        assert not ours.counts.any()


def check_lost_rows(spec: Moe, device: torch.device) -> None:
    """A row that is not finite chooses experts that exist, each once; the others do not notice."""
    correction = torch.randn(spec.experts, device=device) * 0.3 if spec.bias else None
    how = routing(spec, correction)
    logits = torch.randn(6, spec.experts, device=device)
    weights, chosen = moe.route(logits, how)
    lost = logits.clone()
    lost[1], lost[2], lost[3] = torch.nan, torch.inf, -torch.inf
    lost[4, spec.experts // 2] = torch.inf
    got_weights, got = moe.route(lost, how)
    assert bool(((got >= 0) & (got < spec.experts)).all())
    assert all(len(set(row)) == spec.top_k for row in got.tolist())
    for row in (0, 5):
        assert torch.equal(got[row], chosen[row]) and torch.equal(got_weights[row], weights[row])
