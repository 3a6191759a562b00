"""Attention: project, normalise heads, rotate, attend over the paged cache, project back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedserve.kernels.ops import HeadOps, Ops
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import HeadNorm, Normalize
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
    k's heads together, [T, H + K, D]. `slopes`, `sinks`: [H] float32. `fused`: who does it all in
    one kernel, where that can.
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
    fused: HeadOps | None = None

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + attention of norm(x). Writes this step's keys and
        values."""
        qkv = self.qkv(x, norm)
        if self.fused is not None and forward.backend.takes_written:
            q, keys, v = self.to_cache(qkv, forward), None, None
        else:
            q, keys, v = self.heads(qkv, forward)
        out = forward.backend.forward(
            q,
            keys,
            v,
            forward.kv[self.cache],
            forward.plan,
            self.spec,
            slopes=self.slopes,
            sinks=self.sinks,
        ).view(x.shape[0], -1)
        if self.out_norm is not None:
            out = self.out_norm(out)
        return self.out.add(out, residual)

    def to_cache(self, qkv: Tensor, forward: Forward) -> Tensor:
        """All that happens to heads in one kernel, keys and values into the cache → q."""
        assert self.fused is not None
        angles = None if self.rotary is None else forward.angles[self.rotary]
        norm = self.norm_qk if isinstance(self.norm_qk, HeadNorm) else None
        return self.fused.qk_rope_kv(
            qkv,
            forward.kv[self.cache],
            forward.slot_mapping,
            heads=self.spec.heads,
            angles=None if angles is None else (angles.cos, angles.sin),
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.norm.eps,
            norm_after=self.spec.norm_after_rope,
        )

    def heads(self, qkv: Tensor, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """The same step by step → q [T, H, D], k and v [T, K, D]."""
        spec, h, k = self.spec, self.spec.heads, self.spec.kv_heads
        heads = qkv.view(qkv.shape[0], h + 2 * k, spec.head_dim)
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
        return q, keys, v


def alibi_slopes(heads: int, span: float) -> Tensor:
    """ALiBi's slopes (Press et al. 2022): [heads] float32, the steepest first.

    2^(-span · i / heads) for a power of two; for any other number those of the power below, then as
    many as are missing of every second one of the power above.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-span * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-span * i / (2 * power)) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
