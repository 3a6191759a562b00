"""The seeded workloads that other engines were measured on, token for token. Standard library only.

Token ids lie in [0, 10000]; every request is greedy and ignores end tokens.

    A   256 requests, prompt and output each uniform in [100, 1024]
    B   a batch of distinct 512-token prompts, 256 output tokens
    C   one prompt, one output token
    D   online: 1024 in, 256 out; or 2048 shared + 128 own in, 64 out; Poisson arrivals
"""

from __future__ import annotations

from random import Random

HIGHEST_TOKEN = 10000

Prompt = list[int]


def tokens(choice: Random, count: int) -> Prompt:
    return [choice.randint(0, HIGHEST_TOKEN) for _ in range(count)]


def offline() -> list[tuple[Prompt, int]]:
    """A: prompts and their output lengths."""
    choice = Random(0)
    prompts = [tokens(choice, choice.randint(100, 1024)) for _ in range(256)]
    return [(prompt, choice.randint(100, 1024)) for prompt in prompts]


def decode(batch: int, repetition: int = 0) -> list[Prompt]:
    """B."""
    choice = Random(1000 + batch + 100000 * repetition)
    return [tokens(choice, 512) for _ in range(batch)]


def prefill(length: int, repetition: int = 0) -> Prompt:
    """C."""
    return tokens(Random(2000 + length + 7 * repetition), length)


def online(seed: int, count: int = 512) -> list[tuple[Prompt, int]]:
    """D, all prompts different."""
    choice = Random(30000 + seed)
    return [(tokens(choice, 1024), 256) for _ in range(count)]


def shared_prefix(seed: int, count: int = 256) -> list[tuple[Prompt, int]]:
    """D, all prompts beginning alike."""
    beginning = tokens(Random(40000 + seed), 2048)
    choice = Random(50000 + seed)
    return [(beginning + tokens(choice, 128), 64) for _ in range(count)]


def arrivals(seed: int, count: int, rate: float) -> list[float]:
    """Seconds at which requests arrive, `rate` a second on average; all at once for rate 0."""
    choice, now, times = Random(60000 + seed), 0.0, []
    for _ in range(count):
        times.append(now)
        if rate > 0:
            now += choice.expovariate(rate)
    return times
