"""Attention: project, normalise heads, rotate, attend over the paged cache, project back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.kernels.ops import Ops
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import HeadNormalize
from pagedserve.layers.rotary import Angles
from pagedserve.spec import Attn


@dataclass(frozen=True, slots=True)
class Attention:
    """qkv: [(H + 2K) · D, C], q heads, then k heads, then v heads; out: [C, H · D].

    `head_norm`: over each head of q and k, where the model has it.
    """

    spec: Attn
    qkv: Linear
    out: Linear
    ops: Ops
    head_norm: HeadNormalize | None = None

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        *,
        angles: Angles | None,
        kv: Tensor,
        backend: AttentionBackend,
        plan: Plan,
    ) -> Tensor:
        """x, residual: [T, C] → residual + attention of x. Writes this step's keys and values."""
        spec, tokens = self.spec, x.shape[0]
        h, k = spec.heads, spec.kv_heads
        heads = self.qkv(x).view(tokens, h + 2 * k, spec.head_dim)
        qk, v = heads.split_with_sizes((h + k, k), 1)
        if self.head_norm is not None:
            qk = self.head_norm(qk)
        if angles is not None:
            qk = self.ops.rotary(qk, angles.cos, angles.sin)
        q, keys = qk.split_with_sizes((h, k), 1)
        out = backend.forward(q, keys, v, kv, plan, spec)
        return self.out.add(out.view(tokens, -1), residual)
