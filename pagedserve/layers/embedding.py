"""Token ids to vectors, with learned positions where the model has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """table: [vocab, C]; position_table: [positions, C] or None."""

    table: Tensor
    position_table: Tensor | None = None

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids, positions: [T] int64 → [T, C]."""
        x = F.embedding(input_ids, self.table)
        if self.position_table is not None:
            x += F.embedding(positions, self.position_table)
        return x
