"""From the moments at which tokens came to figures: TTFT, TPOT, ITL and tokens a second.

    TTFT   from sending the request to its first token
    TPOT   from the first token to the last, over the number of tokens between: one a request
    ITL    between two pieces of an answer that came one after the other: many a request
    E2E    from sending the request to its last token

Milliseconds everywhere. A request that failed is counted and is in no other figure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from pagedserve.commands.console import say

LATENCIES = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = (50.0, 90.0, 99.0)
ERRORS_SHOWN = 5


class Outcome(msgspec.Struct, array_like=True):
    """One request as its client saw it. Times are of the machine's monotonic clock, in seconds.

    `at` has a time for every piece of the answer. `num_prompt` and `num_tokens` are the server's
    own count, -1 where it gave none. `error` is empty where the answer is whole.
    """

    began: float
    at: list[float] = []
    num_prompt: int = -1
    num_tokens: int = -1
    status: int = 0
    error: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the answer; its pieces where the server does not say."""
        return self.num_tokens if self.num_tokens >= 0 else len(self.at)


def summary(
    outcomes: Sequence[Outcome], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """All figures of a run; those that need a whole answer are None where there is none."""
    good = [each for each in outcomes if not each.error]
    errors = Counter(each.error for each in outcomes if each.error)
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(errors.most_common(ERRORS_SHOWN)),
    }
    if any(each.num_tokens < 0 for each in good):
        found["tokens_counted_by"] = "pieces: the server sends no usage"
    first = min((each.began for each in outcomes), default=0.0)
    seconds = max((each.at[-1] for each in good), default=first) - first
    output = sum(each.tokens for each in good)
    prompt = sum(max(each.num_prompt, 0) for each in good)
    found |= {"duration_s": round(seconds, 6), "input_tokens": prompt, "output_tokens": output}
    for name, count in (
        ("requests_per_s", len(good)),
        ("output_tokens_per_s", output),
        ("total_tokens_per_s", prompt + output),
    ):
        found[name] = round(count / seconds, 3) if seconds > 0 else None
    for name, spans in latencies(good).items():
        found[f"{name}_ms"] = spread(spans, percentiles)
    return found


def latencies(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Seconds, by the names of `LATENCIES`."""
    return {
        "ttft": [each.at[0] - each.began for each in outcomes],
        "tpot": [(o.at[-1] - o.at[0]) / (o.tokens - 1) for o in outcomes if o.tokens > 1],
        "itl": [b - a for o in outcomes for a, b in zip(o.at, o.at[1:], strict=False)],
        "e2e": [each.at[-1] - each.began for each in outcomes],
    }


def spread(
    seconds: Sequence[float], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {f"p{part:g}": percentile(ordered, part) for part in percentiles}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value below which `part` per cent of `ordered` lie, between neighbours linearly."""
    place = (len(ordered) - 1) * part / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def show(line: dict[str, Any], *, as_json: bool) -> None:
    """One JSON line, or a table."""
    for row in [json.dumps(line)] if as_json else table(line):
        say(row)


def table(figures: dict[str, Any]) -> list[str]:
    """Figures as lines for people: a name and a value, or a row of milliseconds."""
    lines = []
    for name, value in figures.items():
        match value:
            case None:
                lines.append(f"{name:24} -")
            case dict() if name == "errors":
                lines += [f"{'':24} {count} × {text}" for text, count in value.items()]
            case dict():
                cells = (f"{key} {shown(each)}" for key, each in value.items())
                lines.append(f"{name:24} {' · '.join(cells)}")
            case _:
                lines.append(f"{name:24} {shown(value)}")
    return lines


def shown(value: Any) -> str:
    """A number in the digits that mean something."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
