"""A matrix on a GPU, multiplied by the kernel that is fastest for the rows at hand.

What stands before and behind the product is asked for with it, and goes into the kernel where that
has a place for it. `fused` means the same in every form: what `matrix.PlainMatrix.fused` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import activation, norm
from pagedserve.kernels.dispatch import SHORT, Choice, Gemv, Library, Product, Skinny, SplitK, Table
from pagedserve.kernels.gemv import gemv
from pagedserve.kernels.launch import power_of_2
from pagedserve.kernels.matrix import RmsWeight
from pagedserve.kernels.skinny import skinny
from pagedserve.kernels.split_k import MAX_ROWS, Scratch, split_k

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class GpuMatrix:
    """weight: [out, in] contiguous, bfloat16 or float16. `scratch` belongs to the device's stream.

    `chosen`: what `table` said, by rows and whether gated; asked once for each.
    """

    weight: Tensor
    scratch: Scratch
    table: Table
    chosen: dict[tuple[int, bool], Choice] = field(default_factory=dict)

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.fused(x, bias=bias)

    def add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        return self.fused(x, bias=bias, residual=residual)

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
        """See `matrix.FusedMatrix.fused`."""
        choice = self.choose(x.shape[0], gated is not None)
        if isinstance(choice, Gemv):
            return gemv(
                x,
                self.weight,
                bias=bias,
                norm=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
                act=gated,
                gated=gated is not None,
                limit=limit,
                residual=residual,
                block_n=choice.block_n,
                block_k=choice.block_k,
                num_warps=choice.num_warps,
            )
        if isinstance(choice, Skinny):
            if x.dtype != torch.bfloat16 or x.shape[1] > SHORT:
                # Inside the norm's weights and squares take the registers of weights on their way.
                x, norm = normed(x, norm), None
            return skinny(
                x,
                self.weight,
                bias=bias,
                norm=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
                act=gated,
                gated=gated is not None,
                limit=limit,
                residual=residual,
                lines=choice.lines,
                block_k=choice.block_k,
                num_warps=choice.num_warps,
                ahead=choice.ahead,
            )
        x = normed(x, norm)
        if isinstance(choice, SplitK):
            return split_k(
                x,
                self.weight,
                self.scratch,
                bias=bias,
                act=gated,
                gated=gated is not None,
                limit=limit,
                residual=residual,
                parts=choice.parts,
                block_n=choice.block_n,
                block_k=choice.block_k,
                num_warps=choice.num_warps,
                num_stages=choice.num_stages,
                early=choice.early,
            )
        return library(x, self.weight, bias, gated, limit, residual)

    def choose(self, rows: int, gated: bool) -> Choice:
        """For so many rows."""
        if rows > MAX_ROWS or rows == 0:
            return Library()
        bucket = power_of_2(rows)
        choice = self.chosen.get((bucket, gated))
        if choice is None:
            out, columns = self.weight.shape
            product = Product(bucket, out // 2 if gated else out, columns, gated)
            choice = self.chosen[bucket, gated] = self.table.choose(product)
        return choice

    def tensors(self) -> list[Tensor]:
        return [self.weight]


def fits(weight: Tensor) -> bool:
    """Whether our kernels read this weight. In float32 torch's product is the exact one."""
    return weight.is_cuda and weight.dtype in HALVES and weight.is_contiguous()


def normed(x: Tensor, weight: RmsWeight | None) -> Tensor:
    """By a kernel of its own."""
    return x if weight is None else norm.rms_norm(x, weight.weight, weight.eps)


def library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gated: str | None,
    limit: float,
    residual: Tensor | None,
) -> Tensor:
    """By torch's product, and kernels for the rest. `residual` is written over."""
    apart = residual is not None and residual.data_ptr() != x.data_ptr()
    if gated is None and residual is not None and apart and bias is None:
        # Out of place torch copies the residual first, 2 % of a step of 256 sequences.
        return residual.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    if gated is not None:
        y = activation.act_and_mul(y, gated, limit)
    return y if residual is None else residual.add_(y)
