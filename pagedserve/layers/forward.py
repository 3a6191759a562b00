"""What the layers of one forward share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pagedserve.attention.base import AttentionBackend, Plan
from pagedserve.layers.rotary import Angles


@dataclass(frozen=True, slots=True)
class Forward:
    """Made by the decoder once a step; layers know their places in the lists.

    kv: each caching layer's view of the cache. angles: of each rotary embedding. query_scales: of
    each `QueryScale`, [T, 1, 1]. slot_mapping: [T], where each token's keys and values go.
    """

    kv: Sequence[Tensor]
    backend: AttentionBackend
    plan: Plan
    angles: Sequence[Angles]
    query_scales: Sequence[Tensor]
    slot_mapping: Tensor
