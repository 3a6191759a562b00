"""Log-probabilities as JSON, encoded a slice at a time.

A large answer holds millions of them, seconds of work: between slices the event loop has its turn,
so that other answers go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec

from pagedserve.step import TokenLogprobs
from pagedserve.text.deltas import Delta
from pagedserve.text.detokenizer import detokenizer
from pagedserve.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity
SLICE_TOKENS = 128  # with 20 likeliest tokens each, a few milliseconds

encode = msgspec.json.encode


class Column:
    """A JSON array that is encoded as it grows."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def extend(self, values: list[Any]) -> None:
        """Append `values`."""
        if values:
            self._parts.append(encode(values)[1:-1])

    def json(self) -> msgspec.Raw:
        """The array."""
        return msgspec.Raw(b"[" + b",".join(self._parts) + b"]")


class Table:
    """Log-probabilities as completions show them: four columns. A prompt's first token has none."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._columns = {
            name: Column() for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        }

    async def add(
        self,
        ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        offsets: Iterable[int],
    ) -> None:
        """Append a row for each of `ids`; `entries` and `offsets` are parallel to them."""
        assert len(ids) == len(entries), "a token without its log-probabilities"
        rest = iter(offsets)
        async for part in slices(len(ids)):
            self._add(ids[part], entries[part], list(islice(rest, part.stop - part.start)))

    def _add(
        self,
        ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        offsets: list[int],
    ) -> None:
        show = self._tokenizer.token_string
        shown = [
            (None, None) if entry is None else text_token(self._tokenizer, id, entry)
            for id, entry in zip(ids, entries, strict=True)
        ]
        columns = self._columns
        columns["text_offset"].extend(offsets)
        columns["token_logprobs"].extend([own for own, _ in shown])
        columns["tokens"].extend([show(id) for id in ids])
        columns["top_logprobs"].extend([tops for _, tops in shown])

    def json(self) -> dict[str, msgspec.Raw]:
        """The table, ready to be encoded."""
        return {name: column.json() for name, column in self._columns.items()}


async def slices(length: int) -> AsyncIterator[slice]:
    """Slices that cover `length` tokens; between two of them the event loop has its turn."""
    for start in range(0, length, SLICE_TOKENS):
        if start:
            await asyncio.sleep(0)
        yield slice(start, min(start + SLICE_TOKENS, length))


async def chat_logprobs(tokenizer: Tokenizer, delta: Delta) -> dict[str, Any]:
    """The log-probabilities of a Delta's tokens as chat shows them, ready to be encoded."""
    content = Column()
    async for part in slices(len(delta.token_ids)):
        pairs = zip(delta.token_ids[part], delta.logprobs[part], strict=True)
        content.extend([chat_token(tokenizer, id, entry) for id, entry in pairs])
    return {"content": content.json(), "refusal": None}


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[int]:
    """For every prompt token, the characters of the prompt's text before it."""
    stream, length = detokenizer(tokenizer), 0
    for id in ids:
        yield length
        length += len(stream.push(id))


def text_token(
    tokenizer: Tokenizer, id: int, entry: TokenLogprobs
) -> tuple[float, dict[str, float]]:
    """A token's log-probability, and by their text those of the likeliest tokens and its own."""
    own = max(entry.logprob, LOWEST_LOGPROB)
    tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
    by_text = {tokenizer.token_string(top): max(value, LOWEST_LOGPROB) for top, value in tops}
    by_text.setdefault(tokenizer.token_string(id), own)
    return own, by_text


def chat_token(tokenizer: Tokenizer, id: int, entry: TokenLogprobs) -> dict[str, Any]:
    """A token's log-probability and the likeliest tokens', as chat shows them."""
    tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return one_token(tokenizer, id, entry.logprob) | {
        "top_logprobs": [one_token(tokenizer, top, value) for top, value in tops]
    }


def one_token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    """A token with its text, its bytes and its log-probability."""
    return {
        "token": tokenizer.token_string(id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(id)),
    }
