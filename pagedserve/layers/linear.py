"""A matrix with an optional bias. `weight` may be several of a checkpoint's matrices, stacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x · weightᵀ + bias. weight: [out, in]; bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in] → [T, out]."""
        return F.linear(x, self.weight, self.bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + y, one op where there is no bias. x: [T, in], residual: [T, out]."""
        if self.bias is None:
            return torch.addmm(residual, x, self.weight.t())
        return self(x).add_(residual)
