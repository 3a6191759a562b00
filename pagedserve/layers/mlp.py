"""Feed-forward: up, activation, down. gate and up are one matrix, gate first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference
from pagedserve.kernels.ops import Ops
from pagedserve.layers.linear import Linear
from pagedserve.spec import Mlp


def activation(spec: Mlp, ops: Ops) -> Callable[[Tensor], Tensor]:
    """What `spec` names."""
    known: dict[tuple[str, bool], Callable[[Tensor], Tensor]] = {  # (act, gated)
        ("silu", False): F.silu,
        ("silu", True): ops.silu_and_mul,
        ("gelu_tanh", False): reference.gelu_tanh,
        ("gelu_tanh", True): reference.gelu_tanh_and_mul,
    }
    return known[spec.act, spec.gated]


@dataclass(frozen=True, slots=True)
class FeedForward:
    """up: [2 · size, C] where gated, else [size, C]; down: [C, size]."""

    up: Linear
    down: Linear
    activate: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, spec: Mlp, up: Linear, down: Linear, ops: Ops) -> FeedForward:
        """With the activation that `spec` names."""
        return cls(up, down, activation(spec, ops))

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual: [T, C] → residual + feed-forward of x."""
        return self.down.add(self.activate(self.up(x)), residual)
