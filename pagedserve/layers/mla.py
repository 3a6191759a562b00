"""Multi-head latent attention, on the latents themselves.

A head's score is q · (W_k c) = (W_kᵀ q) · c for a token's latent c, and its result W_v times the
weighted sum of latents. So the cache holds latents only, and all heads attend to one key of
`latent_dim` + rotated numbers whose values are its beginning (DeepSeek-V2, section 2.1.2).

T tokens · H heads · N nope_dim · R rotated · L latent_dim · V value_dim · C hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.kernels.ops import Ops
from pagedserve.layers.forward import Forward
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import Normalize, normed
from pagedserve.spec import Attn, Mla


@dataclass(frozen=True, slots=True)
class Query:
    """One matrix, or two with a norm between them. up: [H · (N + R), C or rank]."""

    down: Linear | None
    norm: Normalize | None
    up: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, C] → [T, H · (N + R)]."""
        if self.down is not None and self.norm is not None:
            x = self.norm(self.down(x))
        return self.up(x)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """kv: [L + R, C]; key_up: [H, N, L]; value_up: [H, L, V]; out: [C, H · V]."""

    spec: Mla
    cached: Attn
    query: Query
    kv: Linear
    kv_norm: Normalize
    key_up: Tensor
    value_up: Tensor
    out: Linear
    ops: Ops
    cache: int
    rotary: int
    query_scale: int | None = None

    def __call__(
        self, x: Tensor, residual: Tensor | None, forward: Forward, norm: Normalize | None = None
    ) -> Tensor:
        """x, residual: [T, C] → residual + attention of norm(x). Writes this step's latents."""
        x = normed(norm, x)
        spec, tokens = self.spec, x.shape[0]
        rotated = spec.rope.dim
        angles = forward.angles[self.rotary]
        q = self.query(x).view(tokens, spec.heads, spec.nope_dim + rotated)
        plain, turned = q.split_with_sizes((spec.nope_dim, rotated), -1)
        latent, key = self.kv(x).split_with_sizes((spec.latent_dim, rotated), -1)
        key = self.ops.rotary(key.contiguous().unsqueeze(1), angles.cos, angles.sin)
        keys = torch.cat((self.kv_norm(latent.contiguous()).unsqueeze(1), key), -1)
        absorbed = torch.bmm(plain.transpose(0, 1), self.key_up).transpose(0, 1)
        turned = self.ops.rotary(turned.contiguous(), angles.cos, angles.sin)
        q = torch.cat((absorbed, turned), -1)
        if self.query_scale is not None:
            q = q * forward.query_scales[self.query_scale]
        mixed = forward.backend.forward(
            q, keys, None, forward.kv[self.cache], forward.plan, self.cached
        )
        out = torch.bmm(mixed.transpose(0, 1), self.value_up).transpose(0, 1)
        return self.out.add(out.reshape(tokens, -1), residual)
