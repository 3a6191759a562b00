"""One HTTP request's sequences on their way: Deltas as they come, and an end exactly once.

    engine tokens ─▶ LiveSequence (TextStream) ─▶ Answer's waiting Deltas ─▶ a stream or a response

Tokens become Deltas when they arrive, not when a client reads: a stop string must stop the engine
even if the reader has stalled. What waits for a slow reader is bounded by `max_tokens`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import Receive

from pagedserve.api.admission import Admission, Visit
from pagedserve.api.metrics import Metrics
from pagedserve.engine.channel import Finish
from pagedserve.engine.client import EngineClient
from pagedserve.errors import PagedServeError
from pagedserve.request import FinishReason, Request
from pagedserve.step import TokenLogprobs
from pagedserve.text.deltas import Delta, TextStream

log = logging.getLogger("pagedserve")


class ClientGone(Exception):
    """The client closed the connection: nobody waits for this answer any more."""


class LiveSequence:
    """The engine client's sink of one sequence; `index` is its place in the answer."""

    def __init__(self, answer: Answer, index: int, request: Request, stream: TextStream):
        self.index = index
        self.id = request.id
        self.num_prompt = len(request.prompt_token_ids)
        self.stream = stream
        self.cached_tokens = 0
        self.prompt_entries: list[TokenLogprobs] = []
        self.ended = False
        self.waits = True  # until the engine computes it for the first time
        self._answer = answer
        self._last = request.arrival

    def started(self, cached_tokens: int) -> None:
        if not self.waits:  # a restarted engine begins again what it had begun
            return
        self.waits = False
        self.cached_tokens = cached_tokens
        self._answer.computed = True
        self._answer.admission.started(self._answer.visit.tenant, self.num_prompt)

    def prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        self.prompt_entries += entries

    def token(self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        reason, stop_token = (finish.reason, finish.stop_token) if finish else (None, None)
        try:
            delta = self.stream.push(token_id, logprobs, reason, stop_token)
        except Exception:  # this request's trouble must not become the others'
            log.exception("request %d failed while its text was made", self.id)
            self._answer.client.abort([self.id])
            self.failed(PagedServeError("the answer's text could not be made"))
            return
        self._measure()
        if delta.finish_reason is not None:
            if finish is None:  # a stop string ended it: the engine does not know yet
                self._answer.client.abort([self.id])
            self._end(delta.finish_reason)
        self._answer.put(self.index, delta)

    def failed(self, error: PagedServeError) -> None:
        if self.ended:  # a dead engine fails all of an answer's sequences; the first ended them all
            return
        self._end(FinishReason.ERROR)
        self._answer.fail(error)

    def aborted(self) -> None:
        """The answer was given up before this sequence ended."""
        self._end(FinishReason.ABORT)

    def _measure(self) -> None:
        now = time.monotonic()
        gaps = self._answer.metrics
        if self.stream.num_tokens == 1:
            self._answer.written = True
            gaps.first_token.add(now - self._last)
        else:
            gaps.inter_token.add(now - self._last)
        self._last = now

    def _end(self, reason: str) -> None:
        assert not self.ended, "a sequence ends once"
        self.ended = True
        self._answer.metrics.ended(self.num_prompt, self.stream.num_tokens, reason)
        self._answer.admission.ended(
            self._answer.visit.tenant,
            reason,
            num_prompt=self.num_prompt,
            num_generated=self.stream.num_tokens,
            waited=self.waits,
        )


class Answer:
    """What one HTTP request gets. Made by `Service.submit`; its reader calls `close` at the end.

    `computed`: the engine has begun with one of the sequences; `written`: one has a token.
    """

    def __init__(
        self,
        client: EngineClient,
        metrics: Metrics,
        on_close: Callable[[Answer], None],
        admission: Admission,
        visit: Visit,
    ):
        self.client = client
        self.metrics = metrics
        self.admission = admission
        self.visit = visit
        self.computed = False
        self.written = False
        self.sequences: list[LiveSequence] = []
        self.arrival = time.monotonic()
        self._on_close = on_close
        self._waiting: list[tuple[int, Delta]] = []
        self._error: Exception | None = None
        self._num_open = 0
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    def add(self, request: Request, stream: TextStream) -> LiveSequence:
        """A sink for `request`, the next of this answer's sequences."""
        sequence = LiveSequence(self, len(self.sequences), request, stream)
        self.sequences.append(sequence)
        self._num_open += 1
        return sequence

    @property
    def exhausted(self) -> bool:
        """True when every sequence ended and every Delta was taken."""
        return self._num_open == 0 and not self._waiting and self._error is None

    def put(self, index: int, delta: Delta) -> None:
        """Queue a Delta for the reader."""
        self._waiting.append((index, delta))
        if delta.finish_reason is not None:
            self._num_open -= 1
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the answer with `error` and abort what still runs for it. The first error counts."""
        if self._error is None:
            self._error = error
            self._abort_live()
            self._wake()

    async def next(self, timeout: float | None = None) -> list[tuple[int, Delta]]:
        """All (sequence index, Delta) that wait; empty after `timeout` seconds of silence.

        Raises what the answer failed with, once the Deltas before it are taken.
        """
        if not self._waiting and self._error is None:
            await self._wait(timeout)
        if self._waiting:
            taken, self._waiting = self._waiting, []
            return taken
        self.check()
        return []

    async def collect(self) -> list[list[Delta]]:
        """All Deltas of all sequences, by sequence. Raises what the answer failed with."""
        collected: list[list[Delta]] = [[] for _ in self.sequences]
        while not self.exhausted:
            for index, delta in await self.next():
                collected[index].append(delta)
        return collected

    def check(self) -> None:
        """Raise what the answer failed with, if it did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Nobody reads any more: abort what still runs. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._abort_live()
        self.metrics.request_latency.add(time.monotonic() - self.arrival)
        self._on_close(self)

    def keep_time(self) -> None:
        """From now on the answer fails when a deadline of its visit passes before it is whole."""
        until = self.visit.deadlines.next(computed=self.computed, written=self.written)
        if until < math.inf:
            wait = max(0.0, until - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait, self._on_time)

    def _on_time(self) -> None:
        # What the engine has written is the client's, however slowly it reads.
        if self._error is not None or self._num_open == 0:
            return
        deadlines, now = self.visit.deadlines, time.monotonic()
        if now < deadlines.next(computed=self.computed, written=self.written):
            self.keep_time()  # the deadline that has passed was met; the next one
            return
        reason, error = deadlines.expired(now, computed=self.computed, written=self.written)
        self.admission.counts.expired[reason] += 1
        self.fail(error)

    def _abort_live(self) -> None:
        live = [sequence for sequence in self.sequences if not sequence.ended]
        self.client.abort([sequence.id for sequence in live])
        for sequence in live:
            sequence.aborted()

    async def _wait(self, timeout: float | None) -> None:
        # A bare future and timer: asyncio.wait_for would make a task for every token.
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@contextlib.asynccontextmanager
async def reading(answer: Answer, receive: Receive) -> AsyncIterator[Any]:
    """While inside, a disconnect fails `answer` with ClientGone; on leaving the answer is closed.

    `receive` must be past the request's body. Plain handlers need this as much as streams:
    nothing else tells them that the client has left.
    """
    watcher = asyncio.create_task(fail_on_disconnect(answer, receive))
    try:
        yield answer
    finally:
        watcher.cancel()
        answer.close()


async def fail_on_disconnect(answer: Answer, receive: Receive) -> None:
    """Wait for the disconnect."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.fail(ClientGone())


def joined(deltas: list[Delta]) -> Delta:
    """One Delta that says all that `deltas` say."""
    whole = Delta("".join(delta.text for delta in deltas), [], [], [])
    for delta in deltas:
        whole.token_ids += delta.token_ids
        whole.logprobs += delta.logprobs
        whole.offsets += delta.offsets
    if deltas:
        whole.finish_reason, whole.stop_reason = deltas[-1].finish_reason, deltas[-1].stop_reason
    return whole
