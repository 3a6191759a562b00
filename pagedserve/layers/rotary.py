"""Rotary embedding: the angles of a step's tokens, computed once and used by every layer.

There is no table over all positions: the angles of one step cost a few microseconds, a table over a
131072-token context costs start-up time and a hundred megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.spec import Rope


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin of one step's tokens, [T, 1, R] each; see `kernels.reference.rotary`."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Frequencies of one Rope. Raises StartupError for a scaling type it does not know."""

    def __init__(self, rope: Rope, device: torch.device):
        exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
        kind = rope.scaling.get("rope_type", "default")
        if kind not in SCALINGS:
            raise StartupError(
                f"rope type {kind!r} is not supported; supported: {', '.join(SCALINGS)}"
            )
        self.frequencies = SCALINGS[kind](1.0 / rope.theta**exponents, rope.scaling).to(device)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """positions: [T] int64. The angles are computed in float32, then cast to `dtype`."""
        angle = torch.outer(positions.float(), self.frequencies)
        cos, sin = angle.cos(), angle.sin()
        return Angles(
            torch.cat((cos, cos), -1).unsqueeze(1).to(dtype),
            torch.cat((-sin, sin), -1).unsqueeze(1).to(dtype),
        )


def unscaled(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """The plain ones."""
    return frequencies


def linear(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Position interpolation (Chen et al. 2023): every position divided by `factor`."""
    return frequencies / float(scaling["factor"])


def llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones stay, those between blend."""
    turns = frequencies * float(scaling["original_max_position_embeddings"]) / (2 * math.pi)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / float(scaling["factor"]) + kept * frequencies


SCALINGS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "default": unscaled,
    "linear": linear,
    "llama3": llama3,
}
