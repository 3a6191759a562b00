"""Token ids to the vectors that the first block gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pagedserve.kernels import reference
from pagedserve.kernels.ops import Ops
from pagedserve.layers.linear import Linear
from pagedserve.layers.norm import Normalize


@dataclass(frozen=True, slots=True)
class Embedding:
    """table: [vocab, E]; positions: [rows, C], row p + `offset` for position p.

    `scale` multiplies the table's rows, in the model's own precision, as it was trained: 16 bits
    round the factor too, when the model is put together. `widen`: [C, E], where E is not the
    hidden size. `ops`: of the device.
    """

    table: Tensor
    scale: float = 1.0
    widen: Linear | None = None
    positions: Tensor | None = None
    offset: int = 0
    norm: Normalize | None = None
    ops: Ops = reference

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids, positions: [T] int64 → [T, C]."""
        x = self.ops.embed(input_ids, self.table)
        if self.scale != 1.0:
            x = x * self.scale
        if self.widen is not None:
            x = self.widen(x)
        if self.positions is not None:
            x = x + F.embedding(positions + self.offset, self.positions)
        return x if self.norm is None else self.norm(x)


def sines(rows: int, size: int) -> Tensor:
    """Sinusoidal positions (Vaswani et al. 2017), sines first, then cosines: [rows, size] float32.

    As fairseq lays them out: wavelengths from 2π to 10000 · 2π over size / 2 - 1 steps.
    """
    half = size // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(rows).float()[:, None] * frequencies
    return F.pad(torch.cat((angles.sin(), angles.cos()), 1), (0, size % 2))
