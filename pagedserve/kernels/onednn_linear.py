"""Matrix products on a CPU by oneDNN, from weights packed once into its own blocked layout.

torch's own float32 product goes to MKL with plain weights, which for the few rows of a decode step
reads them at a fraction of the memory's speed: on an AMD EPYC 2.0 to 3.5 times slower than this for
1 to 16 rows of matrices that are not in a core's own cache, and no faster for 512.

The meaning is `torch.nn.functional.linear`. The ops are those that torch.compile emits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PACKED_FOR_ROWS = 16  # oneDNN picks the layout for a number of rows; this one serves 1 to 512


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A float32 matrix [out, in] in oneDNN's layout, which only oneDNN can read."""

    packed: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> PackedMatrix:
        """weight: [out, in] float32 on the CPU; it is copied."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS))

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, in] → x · weightᵀ + bias: [T, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + x · weightᵀ + bias, in one op."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, bias, "add")

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def shares(self, tensor: Tensor) -> bool:
        return False


def available(weight: Tensor) -> bool:
    """Whether `weight` can be packed."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )
