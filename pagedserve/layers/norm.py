"""RMSNorm and LayerNorm with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference as ops


@dataclass(frozen=True, slots=True)
class Normalize:
    """Normalise the last dimension. weight: [C]; bias: [C] or None (LayerNorm only)."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., C] → the same shape."""
        if self.kind == "rms":
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class HeadNormalize:
    """RMSNorm over each head of q and k in one call. weight: [H + K, D], q's rows, then k's."""

    eps: float
    weight: Tensor

    def __call__(self, qk: Tensor) -> Tensor:
        """qk: [T, H + K, D], the last dimension contiguous → the same shape."""
        return F.rms_norm(qk, qk.shape[-1:], None, self.eps).mul_(self.weight)
