"""RMSNorm and LayerNorm with their weights, over a vector or over heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference
from pagedserve.kernels.matrix import RmsWeight
from pagedserve.kernels.ops import Ops
from pagedserve.spec import Norm


class Normalize(Protocol):
    """Normalises the last dimension."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., C] → the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """weight: [C]."""

    eps: float
    weight: Tensor
    ops: Ops

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Float32RmsNorm:
    """RmsNorm by `reference.rms_norm_by_length`, with what that needs computed once."""

    weight: Tensor
    floor: Tensor

    @classmethod
    def of(cls, eps: float, weight: Tensor) -> Float32RmsNorm:
        """weight: [C] float32, as a checkpoint holds it."""
        size = weight.shape[-1]
        floor = torch.tensor(math.sqrt(size * eps), device=weight.device)
        return cls(weight * math.sqrt(size), floor)

    def __call__(self, x: Tensor) -> Tensor:
        return reference.rms_norm_by_length(x, self.weight, self.floor)


@dataclass(frozen=True, slots=True)
class WideRmsNorm:
    """RmsNorm whose weight is float32 whatever x is: [C].

    What is added to a stored weight would be rounded away in 16 bits.
    """

    eps: float
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class BareNorm:
    """No weight at all."""

    norm: Norm

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], None, None, self.norm.eps)
        return F.rms_norm(x, x.shape[-1:], None, self.norm.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """weight: [C], float32 where something was added to it; bias: [C] or None."""

    eps: float
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:
            bias = None if self.bias is None else self.bias.float()
            return reference.layer_norm(x.float(), self.weight, bias, self.eps).to(x.dtype)
        return reference.layer_norm(x, self.weight, self.bias, self.eps)


def normed(norm: Normalize | None, x: Tensor) -> Tensor:
    """norm(x), or x."""
    return x if norm is None else norm(x)


def in_product(norm: Normalize | None) -> RmsWeight | None:
    """What a product needs to know to do `norm` itself; None for a norm that it cannot do."""
    if isinstance(norm, RmsNorm | WideRmsNorm):
        return RmsWeight(norm.weight, norm.eps)
    return None


def normalize(norm: Norm, weight: Tensor, bias: Tensor | None, ops: Ops) -> Normalize:
    """What `norm` says, with its weights; `norm.offset` is in `weight` already."""
    if norm.kind == "layer":
        return LayerNorm(norm.eps, weight, bias)
    assert bias is None, "an RMSNorm has no bias"
    if ops is reference and weight.dtype == torch.float32 and not norm.offset:
        return Float32RmsNorm.of(norm.eps, weight)
    return WideRmsNorm(norm.eps, weight) if norm.offset else RmsNorm(norm.eps, weight, ops)


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Each head of q and k by itself, in one call. weight, bias: [H + K, D], q's rows, then k's.

    Both None for a norm without weights.
    """

    norm: Norm
    weight: Tensor | None
    bias: Tensor | None

    def __call__(self, qk: Tensor) -> Tensor:
        """qk: [T, H + K, D], the last dimension contiguous → the same shape."""
        size = qk.shape[-1:]
        if self.norm.kind == "layer":
            y = F.layer_norm(qk, size, None, None, self.norm.eps)
        else:
            y = F.rms_norm(qk, size, None, self.norm.eps)
        if self.weight is not None:
            # float32 where something was added to the stored weight; the product is rounded once.
            y = (
                y.mul_(self.weight)
                if self.weight.dtype == y.dtype
                else (y * self.weight).to(y.dtype)
            )
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class AllHeadsNorm:
    """All heads of q at once, and all of k. q: of H · D numbers; k: of K · D."""

    heads: int
    q: Normalize
    k: Normalize

    def __call__(self, qk: Tensor) -> Tensor:
        """qk: [T, H + K, D] → the same shape."""
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        both = ((self.q, q), (self.k, k))
        return torch.cat([norm(t.flatten(1).contiguous()).view(t.shape) for norm, t in both], 1)
