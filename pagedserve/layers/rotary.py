"""Rotary embedding: the angles of a step's tokens, computed once and used by every layer.

There is no table over all positions: the angles of one step cost a few microseconds, a table over a
131072-token context costs start-up time and a hundred megabytes.

Some scalings depend on how long a context gets. A key stays rotated as it was written, so they are
decided once, by the longest context that is served.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.errors import StartupError
from pagedserve.kernels.ops import Ops
from pagedserve.spec import QueryScale, Rope


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin of one step's tokens, [T, 1, R] each; see `kernels.reference.rotary`."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """Frequencies of one Rope, for contexts of up to `context` tokens. `ops`: of the device.

    Raises StartupError for a scaling type it does not know.
    """

    def __init__(self, rope: Rope, ops: Ops, device: torch.device, context: int):
        self.ops = ops
        kind = rope.scaling.get("rope_type", "default")
        if kind not in SCALINGS:
            raise StartupError(
                f"config.json: rope type {kind!r} is not supported; supported: "
                f"{', '.join(SCALINGS)}"
            )
        frequencies, self.factor = SCALINGS[kind](rope, context)
        self.frequencies = (-frequencies if rope.backwards else frequencies).to(device)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """positions: [T] int64. The angles are computed in float32, then cast to `dtype`."""
        return Angles(*self.ops.angles(positions, self.frequencies, self.factor, dtype))


def query_scale(scale: QueryScale, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors [T, 1, 1] for positions [T]; see `QueryScale`."""
    if scale.kind == "log_steps":
        steps = torch.floor((positions + scale.shift).float() / scale.length)
        factors = 1 + scale.beta * torch.log1p(steps)
    else:
        factors = torch.log(positions.float() + 1) / math.log(scale.length)
        factors = factors.clamp_(min=1.0)
    return factors.to(dtype)[:, None, None]


def exponents(rope: Rope) -> Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim


def plain(rope: Rope) -> Tensor:
    """theta^(-2i / dim)."""
    return 1.0 / rope.theta ** exponents(rope)


def unscaled(rope: Rope, context: int) -> tuple[Tensor, float]:
    """The plain ones."""
    return plain(rope), 1.0


def linear(rope: Rope, context: int) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023): every position divided by `factor`."""
    return plain(rope) / float(rope.scaling["factor"]), 1.0


def dynamic(rope: Rope, context: int) -> tuple[Tensor, float]:
    """NTK-aware scaling of theta by how far `context` exceeds the trained length."""
    factor = float(rope.scaling["factor"])
    times = max(1.0, context / rope.scaling["original_max_position_embeddings"])
    theta = rope.theta * (factor * times - (factor - 1)) ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta ** exponents(rope), 1.0


def doubling(rope: Rope, context: int) -> tuple[Tensor, float]:
    """The same in powers of two: theta grows by 2^(⌈log2(times)⌉ + 1) - 1."""
    times = context / rope.scaling["original_max_position_embeddings"]
    alpha = max(2.0 ** math.ceil(math.log2(times) + 1) - 1, 1.0)
    theta = rope.theta * alpha ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta ** exponents(rope), 1.0


def yarn(rope: Rope, context: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): fast dimensions stay, slow ones are interpolated, a ramp between."""
    s = rope.scaling
    factor, trained = float(s["factor"]), s["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """Which makes so many turns over the trained length."""
        return rope.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(s.get("beta_fast") or 32), dimension(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dim // 2).float() - low) / (high - low)).clamp(0, 1)
    frequencies = plain(rope)
    return frequencies / factor * ramp + frequencies * (1 - ramp), yarn_factor(rope)


def yarn_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by, so that attention stays as sharp."""
    s = rope.scaling
    factor = float(s["factor"])
    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return sharpness(factor, s["mscale"]) / sharpness(factor, s["mscale_all_dim"])
    return sharpness(factor)


def sharpness(factor: float, by: float = 1.0) -> float:
    """YaRN's 0.1 · ln(factor) + 1, for factors above 1."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(rope: Rope, context: int) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024): a factor a dimension; others for contexts beyond the trained."""
    s = rope.scaling
    trained = s["original_max_position_embeddings"]
    chosen = s["long_factor"] if context > trained else s["short_factor"]
    frequencies = plain(rope) / torch.tensor(chosen, dtype=torch.float32)
    times = s["factor"]
    sharp = s.get("attention_factor")
    if sharp is None:
        sharp = math.sqrt(1 + math.log(times) / math.log(trained)) if times > 1 else 1.0
    return frequencies, float(sharp)


def llama3(rope: Rope, context: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones stay, those between blend."""
    s, frequencies = rope.scaling, plain(rope)
    turns = frequencies * float(s["original_max_position_embeddings"]) / (2 * math.pi)
    low, high = float(s["low_freq_factor"]), float(s["high_freq_factor"])
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / float(s["factor"]) + kept * frequencies, 1.0


SCALINGS: dict[str, Callable[[Rope, int], tuple[Tensor, float]]] = {
    "default": unscaled,
    "linear": linear,
    "dynamic": dynamic,
    "doubling": doubling,
    "yarn": yarn,
    "longrope": longrope,
    "llama3": llama3,
}
