"""Mixture of experts: a router chooses, the chosen feed-forwards answer, weights add them up.

T tokens · E experts · k chosen · S an expert's size · C hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels.experts import Experts
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.mlp import FeedForward
from pagedserve.layers.norm import Normalize, normed
from pagedserve.spec import Moe


@dataclass(frozen=True, slots=True)
class Router:
    """weight: [E, C], bias: [E] or None, both float32; correction: [E] float32, see `Moe.bias`."""

    spec: Moe
    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [T, C] → weights [T, k] float32 and experts [T, k] int64."""
        return route(self.spec, F.linear(x.float(), self.weight, self.bias), self.correction)


def route(spec: Moe, logits: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits: [T, E] float32 → weights [T, k] and experts [T, k], as `spec` says."""
    if spec.score == "sparsemixer":
        return sparse_mixer(logits, spec.top_k, spec.jitter)
    if spec.score == "softmax of chosen":
        chosen = logits.topk(spec.top_k, -1)
        return chosen.values.softmax(-1) * spec.scale, chosen.indices
    scores = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)
    choice = scores if correction is None else scores + correction
    if spec.groups[0] > 1:
        choice = kept_groups(choice, spec)
    experts = choice.topk(spec.top_k, -1).indices
    weights = scores.gather(1, experts)
    if spec.renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.renorm_eps)
    return weights * spec.scale, experts


def kept_groups(choice: Tensor, spec: Moe) -> Tensor:
    """choice: [T, E] with -inf outside the best groups (DeepSeek-V2, V3)."""
    groups, kept = spec.groups
    grouped = choice.view(choice.shape[0], groups, -1)
    if spec.group_score == "best two":
        best = grouped.topk(2, -1).values.sum(-1)
    else:
        best = grouped.amax(-1)
    keep = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(kept, -1).indices, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(1)


def sparse_mixer(logits: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """SparseMixer's rounds: each takes the best expert left, weighted among those close to it."""
    weights, experts, left = [], [], logits
    for _ in range(top_k):
        best, index = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index))
        experts.append(index)
        left = left.scatter(-1, index, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """`shared`: of every token, times sigmoid(shared_router · x) where that is there."""

    router: Router
    experts: Experts
    shared: FeedForward | None
    shared_router: Linear | None

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + what the experts say to norm(x)."""
        x = normed(norm, x)
        weights, experts = self.router(x)
        y = self.experts.apply(x, weights, experts, on_input=self.router.spec.on_input)
        if self.shared is not None:
            both = None if self.shared_router is not None else y
            shared = self.shared(x, both, forward)
            if self.shared_router is not None:
                shared = y + shared * self.shared_router(x).sigmoid()
            y = shared
        return y if residual is None else residual + y
