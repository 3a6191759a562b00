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
from pagedserve.engine.isolation import Isolation
from pagedserve.engine.scheduler import Committed, Scheduler
from pagedserve.errors import StepError
from pagedserve.executor.base import Executor, Ticket
from pagedserve.step import Step, StepOutput

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
        self.pending: deque[tuple[Step, Ticket]] = deque()  # launched, in their order
        self.isolation = Isolation(executor, self.send_stats)
        self._stats_at = 0.0

    def run(self) -> None:
        """Serve until a shutdown order. Raises ChannelClosed when the API process is gone."""
        pending = self.pending
        self.send_stats()
        while not self.stopping:
            self.receive(block=not pending and self.scheduler.idle)
            while len(pending) >= self.depth:
                self.commit_oldest()
            step = self.scheduler.schedule()
            assert step or pending or self.scheduler.idle, "work is waiting and nothing can run"
            older = len(pending)
            if step:
                self.tell_started()
                self.launch(step)
            if pending and older and (not step or older >= self.depth - 1):
                self.commit_oldest()

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

    def launch(self, step: Step) -> None:
        """Start a step. One that breaks off at once is computed here, behind those before it."""
        try:
            self.pending.append((step, self.executor.launch(step)))
        except StepError as error:
            while self.pending:
                self.commit_oldest()
            self.compute_again([step], error)

    def commit_oldest(self) -> None:
        """Wait for the oldest step's result and pass on what it means.

        If it broke off, those behind it may have computed with what it never drew.
        """
        step, ticket = self.pending[0]
        try:
            output = self.executor.result(ticket)
        except StepError as error:
            steps = [each for each, _ in self.pending]
            self.pending.clear()
            self.compute_again(steps, error)
        else:
            self.pending.popleft()
            self.commit(step, output)

    def compute_again(self, steps: list[Step], error: StepError) -> None:
        """Compute and commit steps, the first of which broke off; none is in flight."""
        self.isolation.budget.charge(steps[0], error)
        for step in steps:
            self.commit(step, self.isolation.again(step, self.scheduler.rows_wanted()))

    def commit(self, step: Step, output: StepOutput) -> None:
        """Pass on what a step's result means."""
        committed = self.scheduler.commit(step, output)
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
                broken_steps=self.isolation.budget.num_failures,
            )
        )
