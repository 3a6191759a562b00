"""A matrix with an optional bias. The matrix may be several of a checkpoint's, stacked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pagedserve.device import Device
from pagedserve.kernels.matrix import Matrix
from pagedserve.layers.forward import Forward


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x · matrixᵀ + bias. bias: [out] or None."""

    matrix: Matrix
    bias: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, device: Device) -> Linear:
        """weight: [out, in], in the form that `device` multiplies fastest by."""
        return cls(device.matrix(weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in] → [T, out]."""
        return self.matrix.apply(x, self.bias)

    def add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """residual + y, or y alone. x: [T, in], residual: [T, out]."""
        if residual is None:
            return self.matrix.apply(x, self.bias)
        return self.matrix.add(x, self.bias, residual)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A matrix in the place of attention or of feed-forward."""

    linear: Linear

    def __call__(self, x: Tensor, residual: Tensor | None, forward: Forward) -> Tensor:
        """x, residual: [T, C] → residual + the product."""
        return self.linear.add(x, residual)
