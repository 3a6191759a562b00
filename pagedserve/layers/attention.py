"""Attention: project, normalise heads, rotate, attend over the paged cache, project back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedserve.kernels.ops import Ops
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import Normalize
from pagedserve.spec import Attn


class QkNorm(Protocol):
    """Normalises the heads of q and k together."""

    def __call__(self, qk: Tensor) -> Tensor:
        """qk: [T, H + K, D] → the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class Attention:
    """qkv: [(H + 2K) · D, C], q heads, then k heads, then v heads; out: [C, H · D].

    `cache`, `rotary`, `query_scale`: its places in the lists of `Forward`. `norm_qk`: of q's and
    k's heads together, [T, H + K, D]. `slopes`, `sinks`: [H] float32.
    """

    spec: Attn
    qkv: Linear
    out: Linear
    ops: Ops
    cache: int
    rotary: int | None = None
    query_scale: int | None = None
    norm_qk: QkNorm | None = None
    out_norm: Normalize | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None

    def __call__(self, x: Tensor, residual: Tensor | None, forward: Forward) -> Tensor:
        """x, residual: [T, C] → residual + attention of x. Writes this step's keys and values."""
        spec, tokens = self.spec, x.shape[0]
        h, k = spec.heads, spec.kv_heads
        heads = self.qkv(x).view(tokens, h + 2 * k, spec.head_dim)
        qk, v = heads.split_with_sizes((h + k, k), 1)
        if self.norm_qk is not None and not spec.norm_after_rope:
            qk = self.norm_qk(qk)
        if spec.clip is not None:
            qk, v = qk.clamp(-spec.clip, spec.clip), v.clamp(-spec.clip, spec.clip)
        if self.rotary is not None:
            angles = forward.angles[self.rotary]
            qk = self.ops.rotary(qk, angles.cos, angles.sin)
        if self.norm_qk is not None and spec.norm_after_rope:
            qk = self.norm_qk(qk)
        q, keys = qk.split_with_sizes((h, k), 1)
        if self.query_scale is not None:
            q = q * forward.query_scales[self.query_scale]
        out = forward.backend.forward(
            q,
            keys,
            v,
            forward.kv[self.cache],
            forward.plan,
            spec,
            slopes=self.slopes,
            sinks=self.sinks,
        ).view(tokens, -1)
        if self.out_norm is not None:
            out = self.out_norm(out)
        return self.out.add(out, residual)


def alibi_slopes(heads: int, span: float) -> Tensor:
    """ALiBi's slopes (Press et al. 2022): [heads] float32, the steepest first.

    2^(-span · i / heads) for a power of two; for any other number those of the power below, then as
    many as are missing of every second one of the power above.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-span * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-span * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
