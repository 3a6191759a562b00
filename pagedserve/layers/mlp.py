"""Feed-forward: up, activation, down. gate and up are one matrix, gate first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference
from pagedserve.kernels.ops import Ops
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import Normalize
from pagedserve.spec import Act

Activation = Callable[[Tensor], Tensor]
XIELU_BETA, XIELU_EPS = 0.5, -1e-6  # the paper's, which checkpoints repeat

PLAIN: dict[Act, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": reference.gelu_tanh,
    "quick_gelu": reference.quick_gelu,
    "relu": F.relu,
    "relu2": reference.relu2,
}


def activation(act: Act, gated: bool, ops: Ops) -> Activation:
    """[T, size], or [T, 2 · size] with the gate first where `gated` → [T, size]."""
    if not gated:
        return ops.gelu_tanh if act == "gelu_tanh" else PLAIN[act]
    known: dict[Act, Activation] = {
        "silu": ops.silu_and_mul,
        "gelu_tanh": ops.gelu_tanh_and_mul,
    }
    return known.get(act) or Gated(PLAIN[act])


@dataclass(frozen=True, slots=True)
class Gated:
    """act(gate) · up."""

    act: Activation

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return self.act(gate) * up


@dataclass(frozen=True, slots=True)
class ClampedSilu:
    """gate · sigmoid(1.702 · gate) · (up + 1), both clamped, the gate from above only (gpt-oss)."""

    limit: float

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return reference.quick_gelu(gate) * (up + 1)


@dataclass(frozen=True, slots=True)
class Xielu:
    """xIELU (Huang & Schlag 2024) with its learned slopes. positive, negative: scalars, softplus'd.

    x > 0: positive · x² + x / 2; else (expm1(x) - x) · negative + x / 2.
    """

    positive: Tensor
    negative: Tensor

    @classmethod
    def of(cls, alpha_p: Tensor, alpha_n: Tensor) -> Xielu:
        """The numbers as a checkpoint holds them."""
        return cls(F.softplus(alpha_p), XIELU_BETA + F.softplus(alpha_n))

    def __call__(self, x: Tensor) -> Tensor:
        above = self.positive * x * x + XIELU_BETA * x
        below = (torch.expm1(x.clamp(max=XIELU_EPS)) - x) * self.negative + XIELU_BETA * x
        return torch.where(x > 0, above, below)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """up: [2 · size, C] where gated, else [size, C]; down: [C, size].

    `gate`: the activation's name where the product may do it, see `Linear.gated`.
    """

    up: Linear
    down: Linear
    activate: Activation
    inner_norm: Normalize | None = None
    gate: Act | None = None

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + feed-forward of norm(x)."""
        if self.gate is not None and self.up.fused is not None:
            x = self.up.gated(x, norm, self.gate)
        else:
            x = self.activate(self.up(x, norm))
        if self.inner_norm is not None:
            x = self.inner_norm(x)
        return self.down.add(x, residual)
