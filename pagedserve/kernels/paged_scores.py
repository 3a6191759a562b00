"""What the paged attention kernels share: which keys a query sees, and its scores in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e30)  # a score that is none; finite, so that differences are no NaN


@triton.jit
def first_seen(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First position that a query at `position` sees; 0 for WINDOW or CHUNK is none."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0)
    if CHUNK > 0:
        first = tl.maximum(position // CHUNK * CHUNK, first)
    return first


@triton.jit
def in_base_2(s, scale, softcap, CAP: tl.constexpr):
    """Products → scores · log2 e, so that exp2 makes weights of them.

    scale: the model's, without CAP times log2 e; softcap: c in c · tanh(score / c) (only with CAP).
    """
    if CAP:
        # tanh x = 1 - 2 / (1 + e^2x), which is right at both infinities.
        e = tl.exp2(s * (scale * 2 * LOG2E / softcap))
        return softcap * LOG2E * (1 - 2 / (1 + e))
    return s * scale


@triton.jit
def with_sink(m, total, sink):
    """Softmax over one score more, which has no value: (factor of the sums so far, new total).

    m, total: maximum and sum of exp2 so far; sink: its score, in nats.
    """
    sink = sink * LOG2E
    top = tl.maximum(m, sink)
    factor = tl.exp2(m - top)
    return factor, total * factor + tl.exp2(sink - top)
