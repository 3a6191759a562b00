"""Random draws keyed by (seed, position, token): what a sample is, in plain torch.

A token is drawn by exponential races (Gumbel-max in another form): with independent E ~ Exp(1),
argmax(p / E) is distributed as p. E comes from a counter-based hash of the request's seed, the
position of the token to draw and the token id, so a draw depends on nothing else: not on the batch,
not on the step, not on how often the sequence was preempted. Integer arithmetic wraps the same on
every device.

Hash: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), keyed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed(value: int) -> int:
    """A 64-bit constant as torch's int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


GAMMA = signed(0x9E3779B97F4A7C15)
FIRST = signed(0xBF58476D1CE4E5B9)
SECOND = signed(0x94D049BB133111EB)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64."""
    x = (x ^ shift_right(x, 30)) * FIRST
    x = (x ^ shift_right(x, 27)) * SECOND
    return x ^ shift_right(x, 31)


def exponentials(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Exp(1) variates [n, vocab_size] fp32 for seeds and positions [n] int64.

    23 bits, centred: u = (k + ½) / 2²³ is exact in fp32 and never 0 or 1, so E lies in
    (5.9e-8, 16.7) and a token of no weight cannot win by a rounded zero.
    """
    key = mix(mix(seeds + GAMMA) + positions * GAMMA)
    tokens = torch.arange(vocab_size, device=seeds.device) * GAMMA
    bits = shift_right(mix(key[:, None] + tokens), 41)
    u = (bits.to(torch.float32) + 0.5) * 2.0**-23
    return u.neg_().log1p_().neg_()


def race(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token a row from softmax(logits): [n, vocab] fp32, -inf allowed → [n] int64."""
    noise = exponentials(seeds, positions, logits.shape[-1])
    return (logits - noise.log_()).argmax(-1)
