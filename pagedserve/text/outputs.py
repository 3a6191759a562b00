"""Finished answers in the shapes that vLLM's users know; what the offline `LLM` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagedserve.request import SamplingParams
from pagedserve.step import TokenLogprobs
from pagedserve.text.deltas import Delta
from pagedserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability at a position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None


PositionTable = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One of a prompt's completions."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionTable] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """True when nothing follows."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionTable | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True


def completion(
    index: int, deltas: list[Delta], params: SamplingParams, tokenizer: Tokenizer | None
) -> CompletionOutput:
    """All Deltas of a sequence as one completion."""
    output = CompletionOutput(
        index,
        text="".join(delta.text for delta in deltas),
        token_ids=[id for delta in deltas for id in delta.token_ids],
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )
    if params.logprobs is not None:
        entries = [entry for delta in deltas for entry in delta.logprobs]
        output.cumulative_logprob = sum(entry.logprob for entry in entries)
        output.logprobs = tables(output.token_ids, entries, tokenizer)
    return output


def tables(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> list[PositionTable]:
    """For each token, the log-probabilities at its position by token id, its own first."""
    show = tokenizer.token_string if tokenizer else lambda id: None
    found = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        table = {token_id: Logprob(entry.logprob, entry.rank, show(token_id))}
        tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
        for rank, (id, logprob) in enumerate(tops, start=1):
            table.setdefault(id, Logprob(logprob, rank, show(id)))
        found.append(table)
    return found
