"""The API process's side of the engine: starts it, submits requests, hands every token to its sink.

    submit ─▶ Unfinished ─▶ engine process ─▶ poll ─▶ sinks
                  ▲               │ dies, or stalls
                  └── tick: start another, send again what has not ended, with what it has written

With a `Recovery` an engine that dies after it was once ready is replaced, and no sink notices;
without one, or when that is given up, every sink is told the cause.

The room knows processes and messages; it knows no HTTP, no text and no torch. The same client
serves the asyncio server (which watches `fileno()` and calls `poll()` and `tick()`) and the offline
`LLM` (which calls `poll(timeout)` in a loop). It belongs to one thread, and to the process that
made it: a fork of that process shares the socket, and must neither read nor write it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from pagedserve.engine.channel import (
    Abort,
    AnyMessage,
    ChannelBroken,
    ChannelClosed,
    Configure,
    Control,
    Dead,
    Failed,
    Message,
    Outputs,
    Progress,
    Ready,
    Stats,
    Submit,
)
from pagedserve.engine.child import EngineProcess
from pagedserve.engine.phases import Phase, phases_of
from pagedserve.engine.unfinished import Entry, Sink, Unfinished
from pagedserve.engine.watch import END_SECONDS, SILENT_SHARE, Recovery, Restarts, Silence
from pagedserve.errors import PagedServeError, UnavailableError
from pagedserve.request import Request


class EngineClient:
    """A running (or starting, or dead) engine process, and after its death the next one.

    `ready` is what the last engine reported that came so far. `cause_of_death` is set once, at the
    end of the last engine; `last_death` at the end of any.
    """

    def __init__(
        self,
        module: str = "pagedserve.engine.process",
        recovery: Recovery = Recovery(),  # noqa: B008  # frozen
    ) -> None:
        """Start `python -m module FD PARENT`; tests give a toy engine's module."""
        self.phase = "starting"
        self.phases: list[Progress] = []
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.cause_of_death: str | None = None
        self.last_death: str | None = None
        self.restarting = False
        self.num_quarantined = 0
        self.last_token_at = time.monotonic()
        # Called when the socket did not take everything; then `flush` once it is writable.
        self.on_unsent: Callable[[], None] = lambda: None
        self.on_progress: Callable[[Progress | Ready], None] = lambda message: None
        # Before an engine's socket is closed, with the cause; and once another engine is started.
        self.on_down: Callable[[str], None] = lambda cause: None
        self.on_up: Callable[[], None] = lambda: None
        self._module = module
        self._recovery = recovery
        self._options: dict[str, Any] | None = None
        self._unfinished = Unfinished()
        self._held = False  # requests wait until suspects were tried
        self._next_id = 0
        self._owner = os.getpid()
        self._restarts = Restarts(recovery)
        self._restart_at = 0.0
        self._start()

    def _start(self) -> None:
        self._up = False  # True from Ready to death
        self._silence = Silence(time.monotonic())
        self._engine = EngineProcess(self._module)

    def fileno(self) -> int:
        """Readable when `poll` has something to do. Another one after `on_up`."""
        return self._engine.channel.fileno()

    @property
    def unsent(self) -> bool:
        """True while messages wait for the socket."""
        return self._speaking and self._engine.channel.pending

    def flush(self) -> None:
        """Push out what waits, without blocking."""
        if not self._speaking:
            return
        # The next `poll` learns of its end, with the last it said; not here, inside of a sink.
        with contextlib.suppress(ChannelClosed):
            self._engine.channel.flush()

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._engine.pid

    @property
    def start_phases(self) -> list[Phase]:
        """What the present engine's start consists of, so far."""
        end = self.ready.seconds if self.ready is not None and self._up else None
        return phases_of(self.phases, end)

    @property
    def num_live(self) -> int:
        """Requests submitted and not ended."""
        return len(self._unfinished)

    @property
    def silent(self) -> bool:
        """True while an engine that serves has given no sign of life for far too long."""
        if not self._up or self.ready is None:
            return False
        return bool(self._silence.stall(SILENT_SHARE * self.ready.stall_seconds, serving=True))

    @property
    def num_restarts(self) -> int:
        """Engines started in the place of dead ones."""
        return self._restarts.total

    @property
    def configured(self) -> bool:
        """True once the engine was told what to load."""
        return self._options is not None

    def configure(self, options: dict[str, Any]) -> None:
        """Send the flat configuration; the engine loads the model and reports `ready`."""
        self._options = options
        self._silence.heard()  # until now it waited for us
        self._send(Configure(options))

    def submit(self, requests: list[Request], sinks: Sequence[Sink]) -> None:
        """Submit requests; every answer to `requests[i]` goes to `sinks[i]`.

        While a dead engine is being replaced they wait for the next one. Raises UnavailableError
        when there was no engine yet, or will be none.
        """
        self.check_available()
        # Before they are sent: if the engine turns out to be dead, the sinks are told.
        self._unfinished.add(requests, sinks)
        try:
            self._send_due(requests)
        except BaseException:  # nothing was sent, so nothing would ever end them
            for request in requests:
                self._unfinished.pop(request.id)
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
        known = [(id, entry) for id in ids if (entry := self._unfinished.pop(id)) is not None]
        if sent := [id for id, entry in known if entry.sent]:
            self._send(Abort(sent))
        if known and self._held:
            self._send_due()

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
        if not self._speaking:
            return
        engine = self._engine
        try:
            for message in engine.receive(timeout):
                self._silence.heard()
                self._take(message)
        except ChannelBroken as error:
            self._died(str(error))
        except ChannelClosed:
            self._died(engine.exit_cause())
        if self._held:
            self._send_due()

    def tick(self) -> None:
        """What time brings: a stalled engine is ended, a dead one replaced. Call it every
        `watch.TICK_SECONDS`."""
        if self.cause_of_death is not None:
            return
        self.poll()  # what came while we were busy counts
        if self.restarting and not self._speaking:
            self._restart_when_due()
        elif self._speaking and self._options is not None:
            self._silence.look(time.monotonic(), stopped=self._engine.stopped)
            if (stall := self._stall()) is not None:
                self._died(stall)

    def close(self, timeout: float = 5.0) -> None:
        """Stop the engine: politely, then after `timeout` seconds for certain.

        In a fork only its own copy of the socket is closed: finalizers run there too, and the
        engine is its parent's.
        """
        if not self._owned:
            self._engine.channel.close()
            return
        if self._speaking:
            self._send(Control("shutdown"))
        self._engine.channel.close()
        self._engine.wait(timeout)
        if self.cause_of_death is None:
            self.cause_of_death = "shut down"

    def _stall(self) -> str | None:
        """Why the engine is to be ended, or None."""
        recovery, ready = self._recovery, self.ready
        # One that never was ready has no deadline of its own; one without a successor may be slow.
        seconds = ready.stall_seconds if ready is not None and recovery.max_restarts else 0.0
        stall = self._silence.stall(seconds, serving=self._up, load_deadline=recovery.load_seconds)
        if stall is None or self._up or not self.phases:
            return stall
        return f"{stall}: {self.phases[-1].phase} {self.phases[-1].detail}".rstrip()

    @property
    def _owned(self) -> bool:
        return os.getpid() == self._owner

    @property
    def _speaking(self) -> bool:
        """True while the present engine's channel is open."""
        return self.cause_of_death is None and self._engine.channel.fileno() >= 0

    def _check_owner(self) -> None:
        if not self._owned:
            raise UnavailableError(
                f"this engine belongs to process {self._owner}, from which process {os.getpid()} "
                "was forked; start another engine here, or fork before the engine is started",
                code="forked",
            )

    def _send(self, message: Message) -> None:
        self._check_owner()
        if not self._speaking:
            return  # the next engine begins without what was said to the last
        with contextlib.suppress(ChannelClosed):  # as in `flush`
            self._engine.send(message)
            if self._engine.channel.pending:
                self.on_unsent()

    def _send_due(self, among: list[Request] | None = None) -> None:
        """Send what is to be sent now; while the engine is not ready, nothing."""
        if self._up and (due := self._unfinished.due(among)):
            self._send(Submit(due))
        self._held = self._unfinished.on_trial

    def _take(self, message: AnyMessage) -> None:
        match message:
            case Outputs():
                self._deliver(message)
            case Stats():
                self.stats = message
            case Failed():
                entry = self._unfinished.pop(message.id)
                if entry is not None:
                    entry.sink.failed(PagedServeError(message.message, code="request_failed"))
            case Progress():
                self.phase = message.phase
                self.phases.append(message)
                self.on_progress(message)
            case Ready():
                self._serve(message)
            case Dead():
                self._died(message.cause)
            case _:
                raise AssertionError(f"the engine sent a {type(message).__name__}")

    def _serve(self, ready: Ready) -> None:
        self.ready, self.phase = ready, "ready"
        self._up, self.restarting = True, False
        self._restarts.ready(time.monotonic())
        self._send_due()
        self.on_progress(ready)

    def _deliver(self, outputs: Outputs) -> None:
        unfinished = self._unfinished
        for id, cached in outputs.started:
            if (entry := unfinished.get(id)) is not None and unfinished.started(entry):
                entry.sink.started(cached)
        for id, entries in outputs.prompt_logprobs:
            if (entry := unfinished.get(id)) is not None:
                entry.num_scored += len(entries)
                entry.sink.prompt_logprobs(entries)
        if not outputs.ids:
            return
        finished = {finish.id: finish for finish in outputs.finished}
        logprobs = outputs.logprobs or [None] * len(outputs.ids)
        for id, token_id, scores in zip(outputs.ids, outputs.token_ids, logprobs, strict=True):
            finish = finished.get(id)
            entry = unfinished.get(id) if finish is None else unfinished.pop(id)
            if entry is not None:
                unfinished.wrote(entry, token_id)
                entry.sink.token(token_id, scores, finish)
        self.last_token_at = time.monotonic()
        self._restarts.progress()

    # ── the end of an engine, and the next one ───────────────────────────────────────────────────

    def _died(self, cause: str) -> None:
        if not self._speaking:
            return  # the first cause is the true one
        self.last_death = cause
        self.stats = None
        self._up = False
        self.phases.clear()
        delay = None if self.ready is None else self._restarts.after_death(time.monotonic())
        if delay is None:
            self._end(self._told_in_a_row(cause))
            return
        self.restarting, self.phase = True, "restarting"
        self._restart_at = time.monotonic() + delay
        self.on_down(cause)
        self._engine.kill()
        for entry in self._unfinished.engine_died():
            self._quarantine(entry, cause)

    def _quarantine(self, entry: Entry, cause: str) -> None:
        self.num_quarantined += 1
        entry.sink.failed(
            PagedServeError(
                f"the engine died {entry.crashes} times in a row while it worked on this request, "
                f"which is not tried again: {cause}",
                code="request_quarantined",
            )
        )

    def _restart_when_due(self) -> None:
        now = time.monotonic()
        # Only once the old one is gone: until then it holds the device's memory.
        if not self._engine.exited:
            if now > self._restart_at + END_SECONDS:
                self._end(f"{self.last_death}, and the process cannot be ended")
        elif now >= self._restart_at:
            try:
                self._start()
            except OSError as error:  # no memory to fork, no file descriptor left
                self._not_started(f"another engine cannot be started: {error}")
                return
            self.on_up()
            assert self._options is not None, "it was ready, so it was configured"
            self._send(Configure(self._options))

    def _not_started(self, cause: str) -> None:
        """As a death, but there is nothing to end."""
        self.last_death, now = cause, time.monotonic()
        delay = self._restarts.after_death(now)
        if delay is None:
            self._end(self._told_in_a_row(cause))
        else:
            self._restart_at = now + delay

    def _told_in_a_row(self, cause: str) -> str:
        in_a_row = self._restarts.in_a_row
        if not in_a_row:
            return cause
        return f"{cause}; it was restarted {in_a_row} times in a row and never wrote a token"

    def _end(self, cause: str) -> None:
        """There will be no other engine."""
        self.cause_of_death = cause
        self.restarting, self.phase = False, "dead"
        for entry in self._unfinished.clear():
            entry.sink.failed(UnavailableError(f"the engine died: {cause}", code="engine_dead"))
