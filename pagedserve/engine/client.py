"""The API process's side of the engine: starts it, submits requests, hands every token to its sink.

The room knows processes and messages; it knows no HTTP, no text and no torch. The same client
serves the asyncio server (which watches `fileno()` and calls `poll()`) and the offline `LLM` (which
calls `poll(timeout)` in a loop). It belongs to one thread, and to the process that made it: a fork
of that process shares the socket, and must neither read nor write it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pagedserve.engine.channel import (
    Abort,
    AnyMessage,
    Channel,
    ChannelClosed,
    Configure,
    Control,
    Dead,
    Failed,
    Finish,
    Outputs,
    Progress,
    Ready,
    Stats,
    Submit,
)
from pagedserve.errors import PagedServeError, UnavailableError
from pagedserve.request import Request
from pagedserve.step import TokenLogprobs


class Sink(Protocol):
    """Where the engine's answers to one request go. Called from `poll`, in order.

    A request ends with exactly one of: a `token` call with `finish` set, a `failed` call, or the
    caller's own `abort`, after which the sink is never called again.
    """

    def started(self, cached_tokens: int) -> None:
        """The request left the queue; so many prompt tokens were in the prefix cache."""

    def prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        """Log-probabilities of the next prompt tokens (the first token has none)."""

    def token(self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        """The next token, and on the last one why it ended."""

    def failed(self, error: PagedServeError) -> None:
        """The request cannot go on."""


class EngineClient:
    """A running (or starting, or dead) engine process."""

    def __init__(self, module: str = "pagedserve.engine.process") -> None:
        """Start `python -m module FD PARENT`; tests give a toy engine's module."""
        self.phase = "starting"
        self.phases: list[Progress] = []
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.cause_of_death: str | None = None
        self.last_token_at = time.monotonic()
        # Called when the socket did not take everything; then `flush` once it is writable.
        self.on_unsent: Callable[[], None] = lambda: None
        self.on_progress: Callable[[Progress | Ready], None] = lambda message: None
        self._sinks: dict[int, Sink] = {}
        self._next_id = 0
        self._owner = os.getpid()
        self._channel, theirs = Channel.pair()
        # A session of its own: Ctrl-C in the terminal reaches the API process only, which drains.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), str(lasting_parent())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return self._channel.fileno()

    @property
    def unsent(self) -> bool:
        """True while messages wait for the socket."""
        return self.cause_of_death is None and self._channel.pending

    def flush(self) -> None:
        """Push out what waits, without blocking."""
        if self.cause_of_death is not None:
            return
        try:
            self._channel.flush()
        except ChannelClosed:
            self._died(self._exit_cause())

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    @property
    def num_live(self) -> int:
        """Requests submitted and not ended."""
        return len(self._sinks)

    def configure(self, options: dict[str, Any]) -> None:
        """Send the flat configuration; the engine loads the model and reports `ready`."""
        self._send(Configure(options))

    def submit(self, requests: list[Request], sinks: Sequence[Sink]) -> None:
        """Submit requests; every answer to `requests[i]` goes to `sinks[i]`.

        Raises UnavailableError when the engine is not ready or is dead.
        """
        self.check_available()
        # Before they are sent: if the engine turns out to be dead, the sinks are told.
        for request, sink in zip(requests, sinks, strict=True):
            self._sinks[request.id] = sink
        try:
            self._send(Submit(requests))
        except BaseException:  # nothing was sent, so nothing would ever end them
            for request in requests:
                self._sinks.pop(request.id, None)
            raise

    def next_id(self) -> int:
        """A request id not used before."""
        self._next_id += 1
        return self._next_id

    def abort(self, ids: list[int]) -> None:
        """Forget these requests, here at once and in the engine within a step. Idempotent.

        In a fork nothing happens: what it left behind is not its own.
        """
        if not self._owned:
            return
        known = [id for id in ids if self._sinks.pop(id, None) is not None]
        if known and self.cause_of_death is None:
            self._send(Abort(known))

    def control(self, name: str) -> None:
        """Send an order that is no request (see `channel.Control`)."""
        self._send(Control(name))

    def check_available(self) -> None:
        """Raise UnavailableError with the phase or the cause of death unless the engine serves."""
        self._check_owner()
        if self.cause_of_death is not None:
            raise UnavailableError(f"the engine is dead: {self.cause_of_death}", code="engine_dead")
        if self.ready is None:
            raise UnavailableError(f"the model is loading: {self.phase}", code="loading")

    def poll(self, timeout: float | None = 0.0) -> None:
        """Take in what the engine sent and call the sinks; wait up to `timeout` s for something.

        Raises UnavailableError in a fork: what it read would be lost to its parent.
        """
        self._check_owner()
        if self.cause_of_death is not None:
            return
        try:
            for message in self._channel.receive(timeout):
                self._take(message)
        except ChannelClosed:
            self._died(self._exit_cause())

    def close(self, timeout: float = 5.0) -> None:
        """Stop the engine: politely, then after `timeout` seconds for certain.

        In a fork only its own copy of the socket is closed: finalizers run there too, and the
        engine is its parent's.
        """
        if not self._owned:
            self._channel.close()
            return
        if self.cause_of_death is None:
            self._send(Control("shutdown"))
        self._channel.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self.cause_of_death is None:
            self.cause_of_death = "shut down"

    @property
    def _owned(self) -> bool:
        return os.getpid() == self._owner

    def _check_owner(self) -> None:
        if not self._owned:
            raise UnavailableError(
                f"this engine belongs to process {self._owner}, from which process {os.getpid()} "
                "was forked; start another engine here, or fork before the engine is started",
                code="forked",
            )

    def _send(self, message: Any) -> None:
        self._check_owner()
        try:
            self._channel.send(message)
        except ChannelClosed:
            self._died(self._exit_cause())
        else:
            if self._channel.pending:
                self.on_unsent()

    def _take(self, message: AnyMessage) -> None:
        match message:
            case Outputs():
                self._deliver(message)
            case Stats():
                self.stats = message
            case Failed():
                sink = self._sinks.pop(message.id, None)
                if sink is not None:
                    sink.failed(PagedServeError(message.message, code="request_failed"))
            case Progress():
                self.phase = message.phase
                self.phases.append(message)
                self.on_progress(message)
            case Ready():
                self.ready, self.phase = message, "ready"
                self.on_progress(message)
            case Dead():
                self._died(message.cause)
            case _:
                raise AssertionError(f"the engine sent a {type(message).__name__}")

    def _deliver(self, outputs: Outputs) -> None:
        sinks = self._sinks
        for id, cached in outputs.started:
            if id in sinks:
                sinks[id].started(cached)
        for id, entries in outputs.prompt_logprobs:
            if id in sinks:
                sinks[id].prompt_logprobs(entries)
        finished = {finish.id: finish for finish in outputs.finished}
        logprobs = outputs.logprobs or [None] * len(outputs.ids)
        for id, token_id, entry in zip(outputs.ids, outputs.token_ids, logprobs, strict=True):
            finish = finished.get(id)
            sink = sinks.get(id) if finish is None else sinks.pop(id, None)
            if sink is not None:
                sink.token(token_id, entry, finish)
        self.last_token_at = time.monotonic()

    def _exit_cause(self) -> str:
        try:
            code = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "the engine closed its channel"
        if code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process exited with status {code}"

    def _died(self, cause: str) -> None:
        if self.cause_of_death is not None:
            return  # the first cause is the true one
        self.cause_of_death = cause
        self.phase = "dead"
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.failed(UnavailableError(f"the engine died: {cause}", code="engine_dead"))


def lasting_parent() -> int:
    """This process's id, where an engine started now may be tied to its life; else 0.

    Linux ties a child to the *thread* that forked it. Only the main one (whose id is the process's)
    is sure to last as long as the process: an `LLM` made in a thread of a pool outlives the thread.
    """
    return os.getpid() if threading.get_native_id() == os.getpid() else 0
