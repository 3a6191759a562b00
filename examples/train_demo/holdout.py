"""Decides what the training text may never contain; it knows no text, only keys and a hash."""

from __future__ import annotations

import random
import zlib

HELD_OUT_PERCENT = 18
MAX_OPERAND = 99


def is_held_out(*parts: object) -> bool:
    """True for a fixed 18 % of keys, the same in every run and on every machine."""
    key = "\x1f".join(str(part) for part in parts).encode()
    # crc32 is linear; the multiplication spreads neighbouring keys (Fibonacci hashing).
    return (zlib.crc32(key) * 2654435761 % 2**32) * 100 >> 32 < HELD_OUT_PERCENT


def is_held_out_sum(a: int, b: int) -> bool:
    """True when `a + b` and `b + a` belong to the bars.

    Sums of two digits are the addition table itself, which the worked steps need, so they are
    never held out; nor are sums with an operand above 99, which no bar measures.
    """
    low, high = sorted((a, b))
    return 10 <= high <= MAX_OPERAND and is_held_out("sum", low, high)


def held_out_sums() -> list[tuple[int, int]]:
    """Every ordered pair of operands that the training text never adds."""
    operands = range(MAX_OPERAND + 1)
    return [(a, b) for a in operands for b in operands if is_held_out_sum(a, b)]


def draw_sum(rng: random.Random, *, max_operand: int = MAX_OPERAND) -> tuple[int, int]:
    """A pair of operands that training may add."""
    while True:
        a, b = rng.randint(0, max_operand), rng.randint(0, max_operand)
        if not is_held_out_sum(a, b):
            return a, b
