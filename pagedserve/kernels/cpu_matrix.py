"""Products of a few rows with a float32 matrix on a CPU, at the speed of its memory.

torch hands these to MKL with the plain weight [out, in], and MKL reads it several times slower than
memory delivers. Two forms that do better, measured on an AMD EPYC with weights that no core holds
in its own cache, times as fast as `F.linear`:

    rows            1          2          3          16         512
    packed          1.0-2.5    1.6-3      2.5-5.5    1.5-3.6    1.0-1.2
    sliced          1.3-4      1.5-6      -          -          -

packed: oneDNN's own blocked layout, by the ops that torch.compile emits. sliced: the plain weight
cut into slices of output rows that MKL takes as a batch of small products. So a matrix is packed,
and kept plain besides where it is small enough for the second copy not to matter.

The meaning of both is `PlainMatrix`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PACKED_FOR_ROWS = 16  # oneDNN picks its layout for a number of rows; this one serves any but 1
SLICES = 32
MAX_SLICED_ROWS = 2
MAX_SLICED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight [out, in] in oneDNN's layout, which only oneDNN reads."""

    packed: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> PackedMatrix:
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS))

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return y

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        fused = torch.ops.mkldnn._linear_pointwise.binary
        y: Tensor = fused(x, residual, self.packed, bias, "add")
        return y

    def tensors(self) -> list[Tensor]:
        return [self.packed]


@dataclass(frozen=True, slots=True)
class SlicedMatrix:
    """Packed for many rows, plain for one or two. slices: [SLICES, out / SLICES, in], a view."""

    many: PackedMatrix
    weight: Tensor
    slices: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> SlicedMatrix:
        return cls(PackedMatrix.of(weight), weight, weight.unflatten(0, (SLICES, -1)))

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.shape
        if rows > MAX_SLICED_ROWS:
            return self.many.apply(x, bias)
        x = x.t().expand(SLICES, columns, rows)
        if bias is None:
            y = torch.bmm(self.slices, x)
        else:
            y = torch.baddbmm(bias.view(SLICES, -1, 1), self.slices, x)
        return rows_first(y, rows)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        rows, columns = x.shape
        if rows > MAX_SLICED_ROWS:
            return self.many.add(x, bias, residual)
        if bias is not None:
            residual = residual + bias
        start = residual.t().unflatten(0, (SLICES, -1))
        y = torch.baddbmm(start, self.slices, x.t().expand(SLICES, columns, rows))
        return rows_first(y, rows)

    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.many.tensors()]


def rows_first(y: Tensor, rows: int) -> Tensor:
    """y: [SLICES, out / SLICES, rows] → [rows, out] with the strides of a fresh tensor.

    A single row turned by `t()` alone would count as contiguous with strides (1, 1), and the next
    product would take MKL's slow path for it, four times as long.
    """
    return y.view(1, -1) if rows == 1 else y.view(-1, rows).t().contiguous()


def fits(weight: Tensor) -> bool:
    """Whether `weight` can be packed here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def pack(weight: Tensor) -> PackedMatrix | SlicedMatrix:
    """The fastest form of a weight that `fits`; the weight itself is copied, or kept beside."""
    if weight.shape[0] % SLICES == 0 and weight.nbytes <= MAX_SLICED_BYTES:
        return SlicedMatrix.of(weight)
    return PackedMatrix.of(weight)
