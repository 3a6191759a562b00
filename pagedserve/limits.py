"""How large a request may be: one table of counts, each with its default and its highest value.

The server checks a request against its own `Limits` (`--limits`) before anything is allocated for
it; `request.SamplingParams` holds to `CEILING`, which is what the engine has room for, for every
dialect and for the offline `LLM` alike. docs/api.md shows this table, and a test compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pagedserve.errors import StartupError, shorten


def limit(default: int, highest: int, meaning: str, *, lowest: int = 1) -> Any:
    """A field of `Limits`. Where `highest` is the default, the engine has tables of that size."""
    return field(
        default=default, metadata={"lowest": lowest, "highest": highest, "meaning": meaning}
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The most that one request may have of everything that is counted."""

    n: int = limit(128, 1024, "`n`, choices of a prompt")
    prompts: int = limit(1024, 1 << 16, "prompts in one completions request")
    sequences: int = limit(1024, 1 << 16, "prompts × `n`")
    prompt_tokens: int = limit(1 << 24, 1 << 32, "tokens of all prompts × `n`")
    answer_tokens: int = limit(
        1 << 24,
        1 << 32,
        "`max_tokens` × `n` × prompts; a default `max_tokens` is less where needed",
    )
    logprobs: int = limit(20, 20, "`logprobs`, `top_logprobs`", lowest=0)
    logprob_entries: int = limit(
        4_000_000,
        1 << 30,
        "log-probabilities in one answer, of its prompts and of its tokens each: "
        "tokens × `n` × (`logprobs` + 1)",
    )
    stop_strings: int = limit(16, 1024, "strings in `stop`", lowest=0)
    stop_chars: int = limit(256, 1 << 16, "characters in a string of `stop`")
    stop_token_ids: int = limit(128, 128, "entries of `stop_token_ids`", lowest=0)
    bias_entries: int = limit(1024, 1024, "entries of `logit_bias`", lowest=0)
    messages: int = limit(10_000, 1_000_000, "messages in a conversation")
    message_parts: int = limit(10_000, 1_000_000, "parts in a message")
    json_depth: int = limit(64, 200, "objects and arrays inside each other in a body")
    json_containers: int = limit(100_000, 10_000_000, "objects and arrays in a body")
    head_bytes: int = limit(
        64 << 10, 16 << 20, "bytes of request line and headers together", lowest=1024
    )

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Limits:
        """The defaults with what is `given`. Raises StartupError naming what cannot be."""
        fields = {each.name: each for each in dataclasses.fields(cls)}
        for name, value in (given or {}).items():
            if name not in fields:
                raise StartupError(
                    f"--limits: there is no limit {shorten(repr(name), 64)}; there are "
                    f"{', '.join(fields)}",
                    param="limits",
                )
            low, high = fields[name].metadata["lowest"], fields[name].metadata["highest"]
            if type(value) is not int or not low <= value <= high:
                raise StartupError(
                    f"--limits: {name} must be an integer between {low} and {high}, got "
                    f"{shorten(repr(value), 64)}",
                    param="limits",
                )
        return cls(**(given or {}))


CEILING = Limits(**{each.name: each.metadata["highest"] for each in dataclasses.fields(Limits)})
