"""The feed-forwards of a mixture of experts, each token through the few that it chose.

T tokens · E experts · k chosen · S an expert's size · C hidden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels.matrix import Matrix


class Experts(Protocol):
    """All of a layer's experts in the form that its device likes best."""

    def apply(self, x: Tensor, weights: Tensor, experts: Tensor, *, on_input: bool) -> Tensor:
        """x: [T, C]; weights: [T, k] float32; experts: [T, k] int64 → [T, C].

        The sum over a token's experts of weight · expert(x); if `on_input`, of expert(weight · x).
        """
        ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """up: [E, 2 · S, C], gate first; down: [E, C, S]; biases: [E, 2 · S], [E, C] or None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor]  # [n, 2 · S] → [n, S]


@dataclass(frozen=True, slots=True)
class LoopedExperts:
    """One expert after the other, its tokens picked out: for a device that need not be waited for.

    The meaning of all other forms.
    """

    up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]
    up_bias: Tensor | None
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, weights: ExpertWeights, matrix: Callable[[Tensor], Matrix]) -> LoopedExperts:
        """`matrix`: the device's form of a weight."""
        up, down = (tuple(matrix(w) for w in each) for each in (weights.up, weights.down))
        return cls(up, down, weights.up_bias, weights.down_bias, weights.activate)

    def apply(self, x: Tensor, weights: Tensor, experts: Tensor, *, on_input: bool) -> Tensor:
        y = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            token, place = (experts == expert).nonzero(as_tuple=True)
            weight = weights[token, place, None].to(x.dtype)
            up_bias = None if self.up_bias is None else self.up_bias[expert]
            down_bias = None if self.down_bias is None else self.down_bias[expert]
            taken = x[token] * weight if on_input else x[token]
            inner = self.activate(self.up[expert].apply(taken, up_bias))
            out = self.down[expert].apply(inner, down_bias)
            y.index_add_(0, token, out if on_input else out * weight)
        return y


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """Tokens sorted by expert, two grouped products (bfloat16 on Hopper): the host never waits."""

    stacked: ExpertWeights

    @staticmethod
    def fits(weights: ExpertWeights) -> bool:
        """Whether torch's grouped product takes them: bfloat16, rows of whole 16 bytes."""
        sizes = (*weights.up.shape[1:], *weights.down.shape[1:])
        return weights.up.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)

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
