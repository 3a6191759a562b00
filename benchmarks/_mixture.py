"""Mixture of experts, Qwen3-30B-A3B's layer: routing to sum, by tokens, against grouped products.

`floor`: the weights of the experts that were chosen, read once, or the operations at 790 TFLOP/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _graphs import microseconds, read_terabytes_per_second, show
from torch import Tensor

from pagedserve.kernels import activation, moe
from pagedserve.kernels.experts import ExpertWeights

EXPERTS, TOP_K, SIZE, HIDDEN = 128, 8, 768, 2048
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 2048, 8192)
COPIES = 3
FLOPS = 790e12
SHAPES = [  # rows, columns, k, warps, stages, near
    moe.Blocks(128, 128, 64, 8, 4, 4),
    moe.Blocks(128, 128, 64, 8, 4, 64),
    moe.Blocks(128, 128, 64, 8, 3, 16),
    moe.Blocks(128, 64, 64, 4, 4, 16),
    moe.Blocks(64, 128, 64, 4, 4, 16),
    moe.Blocks(64, 128, 64, 8, 4, 16),
    moe.Blocks(64, 64, 64, 4, 4, 16),
]


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """Tokens sorted by expert, two grouped products (bfloat16 on Hopper): the host never waits."""

    stacked: ExpertWeights

    def apply(self, x: Tensor, weights: Tensor, experts: Tensor, *, on_input: bool) -> Tensor:
        stacked, k = self.stacked, experts.shape[1]
        chosen, order = experts.flatten().sort()
        ends = torch.searchsorted(
            chosen, torch.arange(1, stacked.up.shape[0] + 1, device=x.device), out_int32=True
        )
        token = order // k
        weight = weights.flatten()[order, None].to(x.dtype)
        taken = x[token] * weight if on_input else x[token]
        inner = F.grouped_mm(taken, stacked.up.transpose(1, 2), offs=ends)
        if stacked.up_bias is not None:
            inner = inner + stacked.up_bias[chosen]
        out = F.grouped_mm(stacked.activate(inner), stacked.down.transpose(1, 2), offs=ends)
        if stacked.down_bias is not None:
            out = out + stacked.down_bias[chosen]
        if not on_input:
            out = out * weight
        # Back in the tokens' own order, so that the sum has one order whatever the batch.
        back = torch.empty_like(out).index_copy_(0, order, out)
        return back.view(x.shape[0], k, -1).sum(1)


def run(*, quick: bool, sweep: bool) -> dict[str, Any]:
    """Microseconds of a layer's experts."""
    rate = read_terabytes_per_second()
    found: dict[str, Any] = {"read_tb_per_s": round(rate, 3)}

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device="cuda").mul_(scale).bfloat16()

    ups = [random(EXPERTS, 2 * SIZE, HIDDEN, scale=0.02) for _ in range(COPIES)]
    downs = [random(EXPERTS, HIDDEN, SIZE, scale=0.02) for _ in range(COPIES)]
    layers = [moe.GpuExperts.of(up, down) for up, down in zip(ups, downs, strict=True)]
    grouped = [
        GroupedExperts(ExpertWeights(up, down, None, None, activation.silu_and_mul, "silu"))
        for up, down in zip(ups, downs, strict=True)
    ]
    routing = moe.Routing(TOP_K)
    for tokens in TOKENS[:2] if quick else TOKENS:
        x, residual = random(tokens, HIDDEN), random(tokens, HIDDEN)
        logits = torch.randn(tokens, EXPERTS, device="cuda")
        weights, chosen = moe.route(logits, routing)
        read = len(chosen.unique()) * SIZE * HIDDEN * 3 * 2 + tokens * HIDDEN * 2 * 3
        operations = tokens * TOP_K * SIZE * HIDDEN * 3 * 2
        floor = max(read / rate / 1e6, operations / FLOPS * 1e6)
        entry: dict[str, Any] = {"floor": round(floor, 1)}
        kept = moe.by_itself
        ways = {"ours": kept}
        if tokens * TOP_K <= 256 and sweep:
            ways = {"grouped": lambda *_: False, "alone": lambda *_: True}
        for name, way in ways.items():
            moe.by_itself = way
            time = microseconds(
                [partial(e.mixture, x, logits, routing, residual=residual) for e in layers]
            )
            moe.by_itself = kept
            entry[name] = round(time, 1)
        if sweep and tokens >= 1024:
            kept_blocks, times = moe.blocks_for, {}
            for shape in SHAPES:
                moe.blocks_for = lambda each, gated, small=False, shape=shape: shape
                launches = [
                    partial(e.mixture, x, logits, routing, residual=residual) for e in layers
                ]
                times[str(shape)] = round(microseconds(launches), 1)
                moe.blocks_for = kept_blocks
            show(f"mixture {tokens:5d} {times}")
            entry["sweep"] = times
        ids = chosen.long()
        entry["torch"] = round(
            microseconds([partial(g.apply, x, weights, ids, on_input=False) for g in grouped]), 1
        )
        entry["route"] = round(microseconds([partial(moe.route, logits, routing)] * 10), 1)
        found[str(tokens)] = entry
        show(f"mixture {tokens:5d} {entry}")
    return found
