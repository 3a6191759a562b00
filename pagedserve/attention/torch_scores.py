"""Attention written out: what may be done to scores between the product and the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.attention.torch_plan import Sight
from pagedserve.spec import Attn

MAX_SCORES = 1 << 23  # float32 numbers that are alive at a time, in a few copies


@dataclass(frozen=True, slots=True)
class Scores:
    """One layer's treatment of its scores. slopes, sinks: [H] float32 or None."""

    attn: Attn
    sight: Sight
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention can do it."""
        return not (
            self.attn.softcap or self.attn.alibi or self.attn.sinks or self.sight.chunk is not None
        )

    def slice(self, count: int, length: int) -> int:
        """Queries at a time."""
        return max(1, min(count, MAX_SCORES // (self.attn.heads * length)))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, ages: Tensor, hidden: Tensor | None
    ) -> Tensor:
        """q: [n, K, G, Q, D] with K · G heads; k: [n, K, L, D]; v: [n, K, L, E] → [n, K, G, Q, E].

        ages: [Q, L] or [n, 1, 1, L], how far each key lies behind the query; hidden: the same
        shape, bool. Softmax in float32.
        """
        n, kv_heads, group, queries, _ = q.shape
        scores = (q.flatten(2, 3) @ k.transpose(2, 3)).float() * self.attn.scale
        scores = scores.view(n, kv_heads, group, queries, -1)
        if self.attn.softcap:
            scores = torch.tanh(scores / self.attn.softcap) * self.attn.softcap
        if ages.dim() == 4:  # of several rows: room for the queries' dimension
            ages = ages.unsqueeze(2)
            hidden = None if hidden is None else hidden.unsqueeze(2)
        if self.slopes is not None:
            scores = scores - self.slopes.view(kv_heads, group, 1, 1) * ages
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.view(kv_heads, group, 1, 1).expand(*scores.shape[:4], 1)
            weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        mixed = weights.to(v.dtype).flatten(2, 3) @ v
        return mixed.view(n, kv_heads, group, queries, -1)
