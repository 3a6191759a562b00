"""Cases for fuzzing: something valid that hypothesis chose, bent at random, and counted.

    base, seed ── hypothesis ──▶ EACH cases, bent by random.Random(seed) ──▶ check ──▶ outcome

Hypothesis alone makes a few hundred cases a second; so each of its examples stands for many. What
fails is told as base and seed, and not shrunk: a smaller seed is no simpler case.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

EACH = 50  # cases an example
NUMBERS = [0, 1, -1, 2, 127, 128, 2**31, 2**32 - 1, 2**63, -(2**63), 2**64, 10**40, 10**400]
NUMBERS += [0.5, -0.0, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "x",
    "0",
    "-1",
    "\x00",
    "\ud800",
    "ü" * 300,
    "9" * 5000,
    "\u202e",
    "😀",
    "null",
    "a\nb",
]
SHAPES: list[Any] = [None, True, False, [], {}, [[]], {"": None}, [0] * 40, [None], {"x": {}}]
HOSTILE = NUMBERS + TEXTS + SHAPES
DEEP = [b"[" * 3000, b'{"a":' * 3000, b"[" * 200_000]  # past every parser's stack
BITS = [b"\x00", b"\xff", b"\xc3", b"\r\n", b"\n", b'"', b"\\u", b"{", b"]", b",", b"1e999", b" "]


def bent(value: Any, r: random.Random, bends: int) -> Any:
    """A copy of a JSON value that differs in at most `bends` places."""
    for _ in range(bends):
        value = bent_once(value, r)
    return value


def bent_once(value: Any, r: random.Random) -> Any:
    """A copy with one member replaced, taken out, doubled, moved or bent itself."""
    if not isinstance(value, (dict, list)) or not value or r.random() < 0.15:
        return bent_leaf(value, r)
    if isinstance(value, dict):
        return bent_object(value, r)
    copy = list(value)
    at, kind = r.randrange(len(copy)), r.random()
    if kind < 0.15:
        del copy[at]
    elif kind < 0.3:
        copy.insert(at, r.choice([copy[at], r.choice(HOSTILE)]))
    elif kind < 0.35:
        copy *= r.choice([2, 3, 40])
    else:
        copy[at] = bent_once(copy[at], r)
    return copy


def bent_object(value: dict[str, Any], r: random.Random) -> dict[str, Any]:
    copy = dict(value)
    key, kind = r.choice(list(copy)), r.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.25:
        copy[r.choice(TEXTS)] = copy[key]
    elif kind < 0.35:
        copy[key] = copy[r.choice(list(copy))]
    else:
        copy[key] = bent_once(copy[key], r)
    return copy


def bent_leaf(value: Any, r: random.Random) -> Any:
    """A near value, or one that has nothing to do with it."""
    if r.random() < 0.5:
        if type(value) is int:
            return value + r.choice([-1, 1, 7, 1000, -value, -2 * value])
        if type(value) is float:
            return value * r.choice([-1, 0.5, 2, 1e9])
        if isinstance(value, str) and value:
            return r.choice([value[1:], value * 2, value + r.choice(TEXTS), value.upper()])
    return r.choice(HOSTILE)


def bent_bytes(data: bytes, r: random.Random, bends: int) -> bytes:
    """A copy with bytes changed, taken out, repeated or put in at `bends` places."""
    copy = bytearray(data)
    for _ in range(bends):
        at = r.randrange(len(copy) + 1)
        kind = r.random()
        if kind < 0.35 and at < len(copy):
            copy[at] ^= 1 << r.randrange(8)
        elif kind < 0.5:
            del copy[at : at + r.choice([1, 2, 8, 1000])]
        elif kind < 0.6:
            copy[at:at] = copy[at : at + r.choice([1, 4, 32])]
        elif kind < 0.7:
            copy[at:at] = r.randbytes(r.choice([1, 2, 4, 8]))
        elif kind < 0.72:
            copy[at:at] = r.choice(DEEP)
        else:
            copy[at:at] = r.choice(BITS)
    return bytes(copy)


def json_bytes(value: Any) -> bytes:
    """As Python's clients write it: NaN, and half surrogate pairs, included."""
    return json.dumps(value).encode()


def fuzz(
    name: str,
    cases: int,
    base: st.SearchStrategy[T],
    check: Callable[[T, random.Random], str],
) -> Counter[str]:
    """Check at least `cases` cases; how often each outcome came. `check` bends, and returns one.

    What a fuzz of a million cases looked at is printed. The longest case's time is told and not
    judged: what hangs runs into the test's own time limit.
    """
    outcomes: Counter[str] = Counter()
    slowest = 0.0

    @settings(
        max_examples=-(-cases // EACH),
        derandomize=cases < 1_000_000,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(base, st.integers(0, 2**64 - 1))
    def run(value: T, seed: int) -> None:
        nonlocal slowest
        r = random.Random(seed)
        for _ in range(EACH):
            began = time.perf_counter()
            outcomes[check(value, r)] += 1
            slowest = max(slowest, time.perf_counter() - began)

    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    found = {"fuzz": name, "cases": outcomes.total(), "seconds": round(seconds, 1)}
    print(
        json.dumps(found | {"slowest_ms": round(1e3 * slowest, 1), "outcomes": outcomes}),
        file=sys.stderr,
    )
    assert outcomes.total() >= cases
    return outcomes
