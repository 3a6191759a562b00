"""What a linear layer needs of its matrix, and the plain one.

    x ── RMSNorm? ── · Wᵀ + bias? ── act(gate) · up? ── + residual? ── y

A `FusedMatrix` takes all of it in one call, for a device where each step between is a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference, reference_fused


class Matrix(Protocol):
    """A weight [out, in] in some form that its own kernel reads."""

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, in] → x · weightᵀ + bias: [T, out]."""
        ...

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + x · weightᵀ + bias. residual: [T, out]."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything it holds, to be counted."""
        ...


@dataclass(frozen=True, slots=True)
class RmsWeight:
    """An RMSNorm in front of a product. weight: [in], what is added to it already in it."""

    weight: Tensor
    eps: float


@runtime_checkable
class FusedMatrix(Matrix, Protocol):
    """A matrix that also takes what stands before and behind its product."""

    def fused(
        self,
        x: Tensor,
        *,
        norm: RmsWeight | None = None,
        bias: Tensor | None = None,
        gated: str | None = None,
        limit: float = 7.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """residual + gate(rms_norm(x) · weightᵀ + bias), each part where it is given; `residual`
        may be written over.

        x: [T, in]; `gated` names an activation: the weight's rows are gate's, then up's, and the
        result is act(gate) · up, half as wide; `limit` is of "clamped_silu".
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """The weight itself, multiplied by torch."""

    weight: Tensor

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if bias is None:
            return torch.addmm(residual, x, self.weight.t())
        return F.linear(x, self.weight, bias).add_(residual)

    def fused(
        self,
        x: Tensor,
        *,
        norm: RmsWeight | None = None,
        bias: Tensor | None = None,
        gated: str | None = None,
        limit: float = 7.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See `FusedMatrix.fused`."""
        if norm is not None:
            x = reference.rms_norm(x, norm.weight, norm.eps)
        y = F.linear(x, self.weight, bias)
        if gated is not None:
            y = reference_fused.act_and_mul(y, gated, limit)
        return y if residual is None else y.add_(residual)

    def tensors(self) -> list[Tensor]:
        return [self.weight]
