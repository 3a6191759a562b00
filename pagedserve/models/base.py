"""The seam between the worker and whatever computes hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.attention.batch import Batch


class Model(Protocol):
    """A model with its weights, all on one device. `dtype`: of the weights and of the cache."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def capturable(self) -> bool:
        """Whether `forward` only enqueues: no shape or choice depends on numbers on the device."""
        ...

    def excerpt(self) -> Self:
        """A model of which every kind of layer is in it once, on the same weights; or itself."""
        ...

    def forward(
        self, batch: Batch, kv_layers: Sequence[Tensor], backend: AttentionBackend, plan: Plan
    ) -> Tensor:
        """Hidden states of all tokens after the final norm: [num_tokens, C].

        kv_layers: each caching layer's view of the cache; this step's keys and values are written
        there.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [n, C], rows of what `forward` returned → [n, vocab] float32."""
        ...

    def head_logits(self, hidden: Tensor) -> Tensor:
        """The same as `logits`, in the model's own dtype where nothing is done to them."""
        ...

    def weight_bytes(self) -> int:
        """Bytes of all weights in the forms they are held in."""
        ...
