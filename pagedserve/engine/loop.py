"""The one loop: launch step n+1, then commit step n, so that the CPU works while the device does.

`depth` is the number of steps out at once: 1 is synchronous, 2 overlaps. The two differ in timing
only; the scheduler's counters make every decision the same way at any depth.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from pagedserve.engine.channel import (
    Abort,
    Channel,
    Control,
    Failed,
    Finish,
    Outputs,
    Stats,
    Submit,
)
from pagedserve.engine.scheduler import Committed, Scheduler
from pagedserve.executor.base import Executor, Ticket
from pagedserve.step import Step

STATS_INTERVAL = 0.2  # seconds between Stats messages while tokens flow
BEAT_SECONDS = 1.0  # between those of an engine with nothing to do


class Engine:
    """Scheduler, executor and channel, turned by one thread."""

    def __init__(self, scheduler: Scheduler, executor: Executor, channel: Channel, *, depth: int):
        self.scheduler = scheduler
        self.executor = executor
        self.channel = channel
        self.depth = depth
        self.stopping = False
        self._stats_at = 0.0

    def run(self) -> None:
        """Serve until a shutdown order. Raises ChannelClosed when the API process is gone."""
        pending: deque[tuple[Step, Ticket]] = deque()
        self.send_stats()
        while not self.stopping:
            self.receive(block=not pending and self.scheduler.idle)
            while len(pending) >= self.depth:
                self.commit(*pending.popleft())
            step = self.scheduler.schedule()
            assert step or pending or self.scheduler.idle, "work is waiting and nothing can run"
            if step:
                self.tell_started()
                ticket = self.executor.launch(step)
            if pending and (not step or len(pending) >= self.depth - 1):
                self.commit(*pending.popleft())
            if step:
                pending.append((step, ticket))

    def receive(self, *, block: bool) -> None:
        """Take in what the API process sent; wait for something when there is nothing to do.

        Stats are also the sign of life that the API process watches for. No thread but this one
        gives it: it stops when the loop does.
        """
        if block and not self.channel.pending:  # nobody may read for hours
            self.send_stats()
        for message in self.channel.receive(BEAT_SECONDS if block else 0.0):
            self.take(message)

    def take(self, message: Any) -> None:
        """Act on one message."""
        match message:
            case Submit(requests=requests):
                for request in requests:
                    try:
                        self.scheduler.add(request)
                    except ValueError as error:
                        self.channel.send(Failed(request.id, str(error)))
            case Abort(ids=ids):
                for id in ids:
                    self.scheduler.abort(id)
            case Control(name="reset_prefix_cache"):
                self.scheduler.pool.reset_cache()
            case Control(name="shutdown"):
                self.stopping = True
            case _:
                raise AssertionError(f"the API process sent {message!r:.200}")

    def tell_started(self) -> None:
        """Say whose turn has come before it is computed: what kills the engine is known by it."""
        if started := self.scheduler.take_started():
            self.channel.send(Outputs([], [], started=started))

    def commit(self, step: Step, ticket: Ticket) -> None:
        """Wait for a step's result and pass on what it means."""
        committed = self.scheduler.commit(step, self.executor.result(ticket))
        if committed:
            self.send(committed)
        if time.monotonic() - self._stats_at > STATS_INTERVAL:
            self.send_stats()

    def send(self, committed: Committed) -> None:
        """One columnar message for everything a step produced."""
        for id, message in committed.failed:
            self.channel.send(Failed(id, message))
        self.channel.send(
            Outputs(
                ids=committed.ids,
                token_ids=committed.token_ids,
                finished=[Finish(id, reason, token) for id, reason, token in committed.finished],
                logprobs=committed.logprobs,
                prompt_logprobs=committed.prompt_logprobs,
            )
        )

    def send_stats(self) -> None:
        """Gauges and totals as they stand now."""
        self._stats_at = time.monotonic()
        scheduler, pool = self.scheduler, self.scheduler.pool
        self.channel.send(
            Stats(
                running=len(scheduler.running),
                waiting=scheduler.num_waiting,
                blocks_total=pool.num_blocks,
                blocks_used=pool.num_used,
                preemptions=scheduler.num_preemptions,
                prefix_queries=scheduler.num_prefix_queries,
                prefix_hits=scheduler.num_prefix_hits,
                steps=scheduler.num_steps,
            )
        )
