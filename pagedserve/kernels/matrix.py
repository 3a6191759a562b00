"""What a linear layer needs of its matrix, and the plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


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
class PlainMatrix:
    """The weight itself, multiplied by torch."""

    weight: Tensor

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if bias is None:
            return torch.addmm(residual, x, self.weight.t())
        return F.linear(x, self.weight, bias).add_(residual)

    def tensors(self) -> list[Tensor]:
        return [self.weight]
