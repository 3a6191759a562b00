"""Mixture of experts: a router chooses, the chosen feed-forwards answer, weights add them up.

T tokens · E experts · k chosen · S an expert's size · C hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels.experts import Experts, RoutedExperts, Routing
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.mlp import FeedForward
from pagedserve.layers.norm import Normalize, normed
from pagedserve.spec import Moe


@dataclass(frozen=True, slots=True)
class Router:
    """weight: [E, C], bias: [E] or None, both float32."""

    routing: Routing
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, spec: Moe, weight: Tensor, bias: Tensor | None, correction: Tensor | None
    ) -> Router:
        """What `spec` says of it."""
        routing = Routing(
            top_k=spec.top_k,
            score=spec.score,
            renorm=spec.renorm,
            renorm_eps=spec.renorm_eps,
            groups=spec.groups,
            group_score=spec.group_score,
            scale=spec.scale,
            jitter=spec.jitter,
            correction=correction,
        )
        return cls(routing, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → logits [T, E] float32."""
        return F.linear(x.float(), self.weight, self.bias)


def route(spec: Routing, logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [T, E] float32 → weights [T, k] and experts [T, k], as `spec` says."""
    correction = spec.correction
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


def kept_groups(choice: Tensor, spec: Routing) -> Tensor:
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
    on_input: bool = False

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + what the experts say to norm(x)."""
        x = normed(norm, x)
        y = self.routed(x, residual)
        if self.shared is None:
            return y
        if self.shared_router is None:
            return self.shared(x, y, forward)
        return y + self.shared(x, None, forward) * self.shared_router(x).sigmoid()

    def routed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """residual + what the chosen ones say."""
        logits, routing = self.router(x), self.router.routing
        if isinstance(self.experts, RoutedExperts):
            return self.experts.mixture(
                x, logits, routing, on_input=self.on_input, residual=residual
            )
        weights, experts = route(routing, logits)
        y = self.experts.apply(x, weights, experts, on_input=self.on_input)
        return y if residual is None else residual + y
