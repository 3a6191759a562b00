"""Who computes what in the next step.

There is no prefill phase and no decode phase: every running sequence has some tokens to compute,
one token budget is shared out among them in order of importance (priority, then what is due first),
and what is left admits waiting ones, whose turn `waiting.py` decides. A long prompt is computed in
pieces because the budget ends, not because a rule says so. When blocks run out the least important
running sequence is preempted: it gives back its blocks and is recomputed later, from its prompt and
what it has written.

        add ──▶ waiting ──admit──▶ running ──commit──▶ finished
                   ▲                  │
                   └──── preempt ─────┘            abort: from anywhere

A launched step may still read and write the blocks of a sequence that has ended or was preempted,
so blocks and slot are given back only when no launched step touches the sequence any more.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.coming import Coming
from pagedserve.engine.sequence import Sequence, Status
from pagedserve.engine.waiting import Waiting
from pagedserve.request import FinishReason, Request
from pagedserve.step import BlockId, Join, Slot, Step, StepOutput, TokenLogprobs

MAX_HELD = 32  # requests that are passed over in a step: each is looked up in the cache again


@dataclass(slots=True)
class Committed:
    """What a committed step means for the requests; columns like `channel.Outputs`."""

    ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finished: list[tuple[int, FinishReason, int | None]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ids or self.prompt_logprobs or self.failed)


class Scheduler:
    """Owns every sequence and the block pool. `schedule` and `commit` alternate in the loop."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ):
        self.pool = pool
        self.block_size = block_size
        self.token_budget = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.running: list[Sequence] = []  # most important first
        self._waiting = Waiting()
        self._by_id: dict[int, Sequence] = {}
        self._free_slots = [Slot(slot) for slot in reversed(range(max_num_seqs))]
        self._launched: deque[list[Sequence]] = deque()  # rows of each launched step
        self._coming = Coming(block_size)
        self._started: list[tuple[int, int]] = []
        self._releasing = 0  # blocks that come free when launched steps are committed
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens
        self.num_prefix_hits = 0  # tokens

    # ── requests in ──────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for one that could never run."""
        sequence = Sequence(request, self.eos_token_ids)
        needed, total = self._blocks_for(sequence.max_length), self.pool.num_blocks
        if needed > total:
            raise ValueError(
                f"needs {needed} KV blocks for {sequence.max_length} tokens, the cache has {total}"
            )
        if request.id in self._by_id:
            raise ValueError(f"request id {request.id} is in use")
        self._by_id[request.id] = sequence
        self._waiting.push(sequence)

    def abort(self, id: int) -> None:
        """End a request at once, whatever its state; unknown and ended ids are ignored."""
        sequence = self._by_id.get(id)
        if sequence is not None:
            self._end(sequence, Status.ABORTED)

    @property
    def idle(self) -> bool:
        """True when there is nothing to schedule."""
        return not self._by_id

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first tokens, or to come back."""
        return len(self._by_id) - len(self.running)

    # ── a step out ───────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Step | None:
        """The next step, or None when no row can compute now."""
        step = Step(self.num_steps, [], [], [], [], [], [], [], [])
        rows: list[Sequence] = []
        if self._waiting.shared and (self._free_slots or self._waiting.stranded):
            self._waiting.settle(self.running)
            self._claim_room()
        budget = self._schedule_running(step, rows, self.token_budget)
        if len(rows) < self.token_budget - budget and self.pool.caching:
            for sequence, start, count in zip(rows, step.starts, step.counts, strict=True):
                self._coming.fill(sequence, start, start + count)
        self._admit(step, rows, budget)
        if not rows:
            return None
        self._coming.launched()
        self.num_steps += 1
        self._launched.append(rows)
        return step

    def _schedule_running(self, step: Step, rows: list[Sequence], budget: int) -> int:
        # The one loop that every standing sequence passes in every step: counters only, and names
        # bound outside, because at 256 rows each attribute costs ten microseconds a step.
        running, at = self.running, 0
        add_row, add_slot, add_start = rows.append, step.slots.append, step.starts.append
        add_count, add_samples = step.counts.append, step.samples.append
        while at < len(running) and budget > 0:
            sequence = running[at]
            length, start = len(sequence.tokens) + sequence.num_inflight, sequence.num_computed
            count = length - start
            # Nothing to do when its last token is on the way and has not been seen.
            if count <= 0 or length >= sequence.max_length:
                at += 1
                continue
            if count > budget:
                count = budget
            end = start + count
            if end > sequence.room and not self._make_room(sequence, end, step):
                if sequence.status is Status.RUNNING:
                    at += 1  # blocks come free when launched steps are committed
                continue
            samples = end == length
            add_row(sequence)
            add_slot(sequence.slot)  # type: ignore[arg-type]  # a running sequence has one
            add_start(start)
            add_count(count)
            add_samples(samples)
            sequence.num_computed = end
            sequence.num_inflight += samples
            sequence.launched += 1
            budget -= count
            at += 1
        return budget

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Give `sequence` blocks for `num_tokens`, preempting the less important, or it itself.

        False when it must wait: its victims are still in a launched step, or it was the victim.
        """
        missing = self._blocks_for(num_tokens) - len(sequence.blocks)
        while self.pool.num_free < missing:
            if self.pool.num_free + self._releasing >= missing:
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self._grow(sequence, missing, step)
        return True

    def _admit(self, step: Step, rows: list[Sequence], budget: int) -> None:
        held: list[Sequence] = []  # wait for what is coming; others go before, with what is left
        reserved = 0  # blocks for those: whoever passes them takes nothing that they need
        while budget > 0 and len(self._free_slots) > len(held) < MAX_HELD:
            if (sequence := self._next_waiting()) is None:
                break
            hits = self._find_prefix(sequence)
            missing = self._blocks_for(sequence.length) - len(hits)
            if not self._has_room(hits, missing + reserved):
                break
            if self._coming.holds(sequence, len(hits)):
                self._waiting.set_aside(sequence)
                held.append(sequence)
                reserved += missing + self._num_free(hits)
                continue
            self._waiting.take(sequence)
            self._start(sequence, hits, step)
            self._grow(sequence, missing, step)
            start = sequence.num_computed
            budget = self._first_row(step, rows, sequence, budget)
            if self.pool.caching:
                self._coming.fill(sequence, start, sequence.num_computed)
        self._waiting.put_back(held)

    def _has_room(self, hits: list[BlockId], missing: int) -> bool:
        """True where a sequence that finds `hits` and needs `missing` blocks may be admitted.

        Room for all that is known of it, and for every running one to grow once: a sequence
        admitted into the last block would be the next one preempted.
        """
        return self.pool.num_free - self._num_free(hits) >= missing + len(self.running)

    def _num_free(self, hits: list[BlockId]) -> int:
        return sum(map(self.pool.is_free, hits))

    def _claim_room(self) -> None:
        """Preempt one of the tenant with most running where a tenant with none has its turn.

        So its first token waits for no other tenant's long answers. A tenant's last running
        sequence, and one of a better priority, is left alone.
        """
        sequence = self._next_waiting()
        if sequence is None or self._waiting.num_running(sequence.request.tenant):
            return
        tenant, num_running = self._waiting.largest()
        if num_running < 2 or self._releasing:  # what launched steps hold comes free by itself
            return
        hits = self._find_prefix(sequence)
        missing = self._blocks_for(sequence.length) - len(hits)
        if self._free_slots and self._has_room(hits, missing):
            return
        victim = next(each for each in reversed(self.running) if each.request.tenant == tenant)
        if victim.request.priority >= sequence.request.priority:
            self._preempt(victim)

    @staticmethod
    def _first_row(step: Step, rows: list[Sequence], sequence: Sequence, budget: int) -> int:
        """A row for a sequence that was just started; what is left of the budget."""
        assert sequence.slot is not None
        start, length = sequence.num_computed, sequence.length
        count = min(length - start, budget)
        samples = start + count == length
        rows.append(sequence)
        step.slots.append(sequence.slot)
        step.starts.append(start)
        step.counts.append(count)
        step.samples.append(samples)
        sequence.num_computed = start + count
        sequence.num_inflight += samples
        sequence.launched += 1
        return budget - count

    def _next_waiting(self) -> Sequence | None:
        sequence = self._waiting.head()
        if sequence is None or sequence.launched:
            return None  # a preempted one whose last step is still out: it keeps its turn
        return sequence

    def _find_prefix(self, sequence: Sequence) -> list[BlockId]:
        if not sequence.reuse:
            return []
        # At least one token is computed, for its logits.
        num_blocks = (len(sequence.tokens) - 1) // self.block_size
        sequence.extend_hashes(num_blocks, self.block_size)
        return self.pool.lookup(sequence.hashes[:num_blocks])

    def _start(self, sequence: Sequence, hits: list[BlockId], step: Step) -> None:
        for block in hits:
            self.pool.share(block)
        sequence.slot = slot = self._free_slots.pop()
        sequence.status = Status.RUNNING
        sequence.num_computed = len(hits) * self.block_size
        sequence.num_published = len(hits)
        insort(self.running, sequence)
        step.joins.append(
            Join(
                slot,
                list(sequence.tokens),
                sequence.num_prompt,
                sequence.request.params,
                sequence.request.seed,
            )
        )
        self._extend_table(sequence, hits, step)
        if not sequence.started:
            sequence.started = True
            self._started.append((sequence.id, sequence.num_computed))
            self._waiting.charge_prompt(sequence, sequence.num_computed)
            self.num_prefix_queries += len(sequence.tokens)
            self.num_prefix_hits += sequence.num_computed

    def _grow(self, sequence: Sequence, missing: int, step: Step) -> None:
        self._extend_table(sequence, [self.pool.take() for _ in range(missing)], step)

    def _extend_table(self, sequence: Sequence, blocks: list[BlockId], step: Step) -> None:
        assert sequence.slot is not None
        first = len(sequence.blocks)
        sequence.blocks += blocks
        sequence.room = len(sequence.blocks) * self.block_size
        step.grown_slots.extend([sequence.slot] * len(blocks))
        step.grown_index.extend(range(first, first + len(blocks)))
        step.grown_blocks.extend(blocks)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take_started(self) -> list[tuple[int, int]]:
        """(id, tokens found in the prefix cache) of requests that got their first slot since the
        last call."""
        started, self._started = self._started, []
        return started

    def rows_wanted(self) -> list[int]:
        """Rows of the oldest launched step whose results still matter; the others' sequences were
        aborted or preempted, or have failed."""
        rows = self._launched[0]
        return [at for at, each in enumerate(rows) if each.status is Status.RUNNING]

    # ── a step's result in ───────────────────────────────────────────────────────────────────────

    def commit(self, step: Step, output: StepOutput) -> Committed:
        """Take in what `step` sampled; steps are committed in the order they were scheduled."""
        rows = self._launched.popleft()
        self._coming.committed()
        committed = Committed()
        block_size, ids, token_ids = self.block_size, committed.ids, committed.token_ids
        sampled, logprobs = iter(output.token_ids), iter(output.logprobs)
        rare = bool(output.logprobs or output.prompt_logprobs or output.failed)
        for sequence, start, count, samples in zip(
            rows, step.starts, step.counts, step.samples, strict=True
        ):
            sequence.launched -= 1
            token = entry = None
            if samples:
                sequence.num_inflight -= 1
                token, entry = next(sampled), next(logprobs, None)
            if sequence.status is not Status.RUNNING:
                # Aborted or preempted while the step was out. A preempted one draws the same token
                # again when it comes back: draws are keyed by seed and position.
                self._give_back(sequence)
                continue
            if rare and not self._commit_rare(sequence, output, start, token, entry, committed):
                continue
            if start + count >= (sequence.num_published + 1) * block_size:
                self._publish(sequence, start + count)
            if token is not None:
                tokens = sequence.tokens
                tokens.append(token)
                ids.append(sequence.id)
                token_ids.append(token)
                if token in sequence.stop_ids or len(tokens) >= sequence.max_length:
                    self._finish(sequence, committed)
        return committed

    def _commit_rare(
        self,
        sequence: Sequence,
        output: StepOutput,
        start: int,
        token: int | None,
        entry: TokenLogprobs | None,
        committed: Committed,
    ) -> bool:
        """What few steps bring: failures, log-probabilities. False when the sequence failed."""
        if sequence.slot in output.failed:
            committed.failed.append((sequence.id, output.failed[sequence.slot]))
            self._end(sequence, Status.FINISHED)
            return False
        if sequence.slot in output.prompt_logprobs:
            # What a preempted sequence computes again was sent before.
            again = max(0, sequence.num_scored - start)
            entries = output.prompt_logprobs[sequence.slot][again:]
            sequence.num_scored += len(entries)
            if entries:
                committed.prompt_logprobs.append((sequence.id, entries))
        if output.logprobs and token is not None:
            committed.logprobs.append(entry)
        return True

    def _finish(self, sequence: Sequence, committed: Committed) -> None:
        """End a sequence with its last token."""
        token = sequence.tokens[-1]
        if token in sequence.stop_ids:
            committed.finished.append((sequence.id, FinishReason.STOP, token))
        else:
            committed.finished.append((sequence.id, FinishReason.LENGTH, None))
        self._end(sequence, Status.FINISHED)

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        """Let others find the blocks that became full."""
        full = num_computed // self.block_size
        sequence.extend_hashes(full, self.block_size)
        for index in range(sequence.num_published, full):
            self.pool.publish(sequence.blocks[index], sequence.hashes[index])
        sequence.num_published = full

    # ── out of running ───────────────────────────────────────────────────────────────────────────

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._leave(sequence)
        sequence.status = Status.WAITING
        self._waiting.push(sequence)

    def _end(self, sequence: Sequence, status: Status) -> None:
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
            sequence.status = status
        else:
            sequence.status = status
            self._waiting.forget(sequence)
        del self._by_id[sequence.id]

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._waiting.left(sequence)
        if sequence.launched:
            self._releasing += len(sequence.blocks)
        else:
            self._let_go(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Let go of a sequence that left while launched, once its last step is committed."""
        if sequence.launched == 0:
            self._releasing -= len(sequence.blocks)
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.room = 0
        sequence.num_computed = 0
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        sequence.slot = None
