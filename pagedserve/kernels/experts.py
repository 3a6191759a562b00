"""The feed-forwards of a mixture of experts, each token through the few that it chose.

T tokens · E experts · k chosen · S an expert's size · C hidden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
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
class Routing:
    """How a router's logits become choices and weights; fields mean what those of `spec.Moe` do.

    correction: [E] float32, added for the choice alone.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "softmax of chosen", "sparsemixer"] = "softmax"
    renorm: bool = True
    renorm_eps: float = 0.0
    groups: tuple[int, int] = (1, 1)
    group_score: Literal["best two", "best"] = "best two"
    scale: float = 1.0
    jitter: float = 0.0
    correction: Tensor | None = None


@runtime_checkable
class RoutedExperts(Experts, Protocol):
    """Experts that take the router's logits, for a device where each step between is a launch."""

    def mixture(
        self,
        x: Tensor,
        logits: Tensor,
        routing: Routing,
        *,
        on_input: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x [T, C], logits [T, E] → residual + Σ weight · expert(x): [T, C]."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """up: [E, 2 · S, C], gate first; down: [E, C, S]; biases: [E, 2 · S], [E, C] or None.

    `activate`: [n, 2 · S] → [n, S], what `act` and `limit` name.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor]
    act: str
    limit: float = 7.0


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
