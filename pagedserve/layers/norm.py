"""RMSNorm and LayerNorm with their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference
from pagedserve.kernels.ops import Ops
from pagedserve.spec import Norm


class Normalize(Protocol):
    """Normalises the last dimension."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., C] → the same shape."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything it holds, to be counted."""
        ...


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """weight: [C]."""

    eps: float
    weight: Tensor
    ops: Ops

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def tensors(self) -> list[Tensor]:
        return [self.weight]


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

    def tensors(self) -> list[Tensor]:
        return [self.weight]


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """weight: [C]; bias: [C] or None."""

    eps: float
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return reference.layer_norm(x, self.weight, self.bias, self.eps)

    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def normalize(norm: Norm, weight: Tensor, bias: Tensor | None, ops: Ops) -> Normalize:
    """What `norm` says, with its weights."""
    if norm.kind == "layer":
        return LayerNorm(norm.eps, weight, bias)
    assert bias is None, "an RMSNorm has no bias"
    if ops is reference and weight.dtype == torch.float32:
        return Float32RmsNorm.of(norm.eps, weight)
    return RmsNorm(norm.eps, weight, ops)


@dataclass(frozen=True, slots=True)
class HeadNormalize:
    """RMSNorm over each head of q and k in one call. weight: [H + K, D], q's rows, then k's."""

    eps: float
    weight: Tensor

    def __call__(self, qk: Tensor) -> Tensor:
        """qk: [T, H + K, D], the last dimension contiguous → the same shape."""
        return F.rms_norm(qk, qk.shape[-1:], None, self.eps).mul_(self.weight)
