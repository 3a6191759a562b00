"""Every request that has not ended, with what it has written: enough to go on in another engine.

    add ─▶ unsent ─due─▶ sent ─▶ running ─▶ ended (finish, failure, abort)
             ▲                      │
             └──── engine died ─────┘   resubmitted with the tokens received so far

One of them may be what kills the engine. A request that was running when an engine died has a crash
on its account, which its next token clears: whoever goes on is innocent. With two it is a suspect.
Suspects go first into the next engine, one at a time, the worst first, and everybody else waits
until each has written a token. One that has three, the last of them alone in the engine, is failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from pagedserve.engine.channel import Finish
from pagedserve.errors import PagedServeError
from pagedserve.request import Request
from pagedserve.step import TokenLogprobs

MAX_CRASHES = 3  # in a row, without a token between, the last one alone: the request is failed
SUSPECT_CRASHES = MAX_CRASHES - 1


class Sink(Protocol):
    """Where the engine's answers to one request go. Called from `poll` and `tick`, in order.

    A request ends with exactly one of: a `token` call with `finish` set, a `failed` call, or the
    caller's own `abort`, after which the sink is never called again. Of an engine that dies and the
    one that takes its place the sink learns nothing: nothing comes twice.
    """

    def started(self, cached_tokens: int) -> None:
        """The request left the queue; so many prompt tokens were in the prefix cache."""

    def prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        """Log-probabilities of the next prompt tokens (the first token has none)."""

    def token(self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        """The next token, and on the last one why it ended."""

    def failed(self, error: PagedServeError) -> None:
        """The request cannot go on."""


@dataclass(slots=True)
class Entry:
    """A request, where its answers go, and how far it is."""

    request: Request
    sink: Sink
    written: list[int] = field(default_factory=list)
    num_scored: int = 0  # prompt log-probabilities received
    started: bool = False  # the sink was told
    sent: bool = False  # to the present engine
    running: bool = False  # the present engine has computed for it, or was about to
    crashes: int = 0

    def resumed(self) -> Request:
        """The request as it is sent now."""
        if not self.written and not self.num_scored:
            return self.request
        return msgspec.structs.replace(
            self.request, written=list(self.written), num_scored=self.num_scored
        )


class Unfinished:
    """The entries by request id, in order of arrival."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._suspects: set[int] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, requests: list[Request], sinks: Sequence[Sink]) -> None:
        """Remember new requests; they are not sent yet."""
        for request, sink in zip(requests, sinks, strict=True):
            self._entries[request.id] = Entry(request, sink)

    def get(self, id: int) -> Entry | None:
        """The entry of an unfinished request."""
        return self._entries.get(id)

    def pop(self, id: int) -> Entry | None:
        """Forget a request that ended; None if it had ended before."""
        self._suspects.discard(id)
        return self._entries.pop(id, None)

    def clear(self) -> list[Entry]:
        """Forget all; they are the caller's to end."""
        entries, self._entries = self._entries, {}
        self._suspects.clear()
        return list(entries.values())

    def started(self, entry: Entry) -> bool:
        """The engine begins to compute for it; True the first time in the request's life."""
        entry.running = True
        first, entry.started = not entry.started, True
        return first

    def wrote(self, entry: Entry, token_id: int) -> None:
        """It got its next token, which clears it of earlier crashes."""
        entry.written.append(token_id)
        if entry.crashes:
            entry.crashes = 0
            self._suspects.discard(entry.request.id)

    @property
    def on_trial(self) -> bool:
        """True while suspects are tried one by one and everybody else waits."""
        return bool(self._suspects)

    def due(self, among: list[Request] | None = None) -> list[Request]:
        """What to send now, marked as sent: of `among`, or of all that are unsent."""
        if self._suspects:
            suspects = [self._entries[id] for id in self._suspects]
            chosen = [min(suspects, key=lambda entry: (-entry.crashes, entry.request.id))]
            if any(entry.sent for entry in suspects):
                chosen = []
        elif among is not None:
            chosen = [self._entries[request.id] for request in among]
        else:
            chosen = [entry for entry in self._entries.values() if not entry.sent]
        for entry in chosen:
            entry.sent = True
        return [entry.resumed() for entry in chosen]

    def engine_died(self) -> list[Entry]:
        """Nothing is sent any more. The one, if any, that must not be sent again, forgotten."""
        running = [entry for entry in self._entries.values() if entry.running]
        for entry in running:
            entry.crashes += 1
            if entry.crashes >= SUSPECT_CRASHES:
                self._suspects.add(entry.request.id)
        for entry in self._entries.values():
            entry.sent = entry.running = False
        if len(running) == 1 and running[0].crashes >= MAX_CRASHES:
            self.pop(running[0].request.id)
            return running
        return []
