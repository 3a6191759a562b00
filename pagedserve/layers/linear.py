"""A matrix with an optional bias. The matrix may be several of a checkpoint's, stacked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pagedserve.device import Device
from pagedserve.kernels.matrix import FusedMatrix, Matrix
from pagedserve.layers.forward import Forward
from pagedserve.layers.norm import Normalize, in_product, normed


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x · matrixᵀ + bias. bias: [out] or None.

    `fused`: the matrix again, where it takes what stands before and behind its product.
    """

    matrix: Matrix
    bias: Tensor | None = None
    fused: FusedMatrix | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, device: Device) -> Linear:
        """weight: [out, in], in the form that `device` multiplies fastest by."""
        matrix = device.matrix(weight)
        return cls(matrix, bias, matrix if isinstance(matrix, FusedMatrix) else None)

    def __call__(self, x: Tensor, norm: Normalize | None = None) -> Tensor:
        """x: [T, in] → [T, out] of norm(x)."""
        if self.fused is not None and (weight := in_product(norm)) is not None:
            return self.fused.fused(x, norm=weight, bias=self.bias)
        return self.matrix.apply(normed(norm, x), self.bias)

    def gated(self, x: Tensor, norm: Normalize | None, act: str) -> Tensor:
        """act(gate) · up of norm(x), half as wide; only where there is `fused`."""
        assert self.fused is not None
        weight = in_product(norm)
        if weight is None:
            x = normed(norm, x)
        return self.fused.fused(x, norm=weight, bias=self.bias, gated=act)

    def add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """residual + y, or y alone. x: [T, in], residual: [T, out]."""
        if residual is None:
            return self.matrix.apply(x, self.bias)
        return self.matrix.add(x, self.bias, residual)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A matrix in the place of attention or of feed-forward."""

    linear: Linear

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + the product with norm(x)."""
        return self.linear.add(normed(norm, x), residual)
