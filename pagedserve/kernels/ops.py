"""The ops between the matrices that a device may have a better form of than plain torch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ops(Protocol):
    """What each means is said in `reference`, which is the plain form itself."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def embed(self, input_ids: Tensor, table: Tensor) -> Tensor: ...

    def angles(
        self, positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def silu_and_mul(self, x: Tensor) -> Tensor: ...

    def gelu_tanh_and_mul(self, x: Tensor) -> Tensor: ...

    def gelu_tanh(self, x: Tensor) -> Tensor: ...


class HeadOps(Protocol):
    """What is done to the heads of q, k and v in one kernel, see `qk_rope_kv`."""

    def qk_rope_kv(
        self,
        qkv: Tensor,
        kv: Tensor,
        slot_mapping: Tensor,
        *,
        heads: int,
        angles: tuple[Tensor, Tensor] | None = None,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        norm_after: bool = False,
    ) -> Tensor: ...
