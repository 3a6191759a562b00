"""Any history of the scheduler and its block pool against brute-force models of both.

Hypothesis writes the histories: requests come, alone and several of one prompt, steps are launched
and committed, requests are aborted, sequences preempted, the prefix cache forgotten, the engine
killed and another one started. After every event each block, slot and sequence is accounted for by
looking at all of them, what a block is said to hold is looked up in the toy GPU's memory, and every
token is compared with what its request writes alone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pagedserve.engine.block_pool import BlockPool, chain_hash, root_hash
from pagedserve.engine.scheduler import Committed, Scheduler
from pagedserve.engine.unfinished import MAX_CRASHES, SUSPECT_CRASHES, Unfinished
from pagedserve.request import Request, SamplingParams, choice_seed
from pagedserve.step import Step, StepOutput
from tests.engine.test_block_pool import NaivePool
from tests.engine.toy import EOS, VOCAB, ToyGpu, alone

PROMPTS = random.Random(5)
BEGINNINGS = [[PROMPTS.randrange(VOCAB) for _ in range(12)] for _ in range(2)]
SIZES = st.integers(0, 40)


class Sink:
    """Ignores everything: the machine reads what the scheduler commits."""


class Engines(RuleBasedStateMachine):
    """One scheduler after the other over a toy GPU, and what each must come to."""

    @initialize(
        num_blocks=st.integers(6, 30),
        block_size=st.integers(1, 5),
        budget=st.integers(1, 24),
        num_slots=st.integers(1, 6),
        depth=st.integers(1, 3),
        caching=st.booleans(),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        budget: int,
        num_slots: int,
        depth: int,
        caching: bool,
    ) -> None:
        self.num_blocks, self.block_size, self.budget = num_blocks, block_size, budget
        self.num_slots, self.depth, self.caching = num_slots, depth, caching
        self.unfinished = Unfinished()
        self.requests: dict[int, Request] = {}  # all that ever came
        self.written: dict[int, list[int]] = {}
        self.scores: dict[int, list[float]] = {}
        self.live: set[int] = set()  # in the present scheduler
        self.ended: set[int] = set()
        self.crashes: Counter[int] = Counter()
        self.prefixes: dict[bytes, list[int]] = {}  # chain hash → the tokens it stands for
        self.start()

    def start(self) -> None:
        """Another engine, with nothing in it."""
        self.scheduler = Scheduler(
            BlockPool(self.num_blocks, caching=self.caching),
            block_size=self.block_size,
            max_num_seqs=self.num_slots,
            max_num_batched_tokens=self.budget,
            eos_token_ids=frozenset({EOS}),
        )
        self.gpu = ToyGpu(self.num_slots, self.block_size)
        self.pending: deque[tuple[Step, StepOutput]] = deque()
        self.begun: set[int] = set()  # what the engine has said it computes
        self.live.clear()

    # ── what may happen ──────────────────────────────────────────────────────────────────────────

    @rule(
        copies=st.integers(1, 4),
        beginning=st.sampled_from([[], *BEGINNINGS]),
        rest=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 16),
        scored=st.booleans(),
        ignore_eos=st.booleans(),
        seed=st.integers(0, 5),
        priority=st.sampled_from([0, 0, -1, 3]),
        tenant=st.integers(0, 2),
        weight=st.sampled_from([0.5, 1.0, 4.0]),
        due=st.sampled_from([float("inf"), 1.0]),
    )
    def submit(
        self,
        copies: int,
        beginning: list[int],
        rest: list[int],
        max_tokens: int,
        scored: bool,
        ignore_eos: bool,
        seed: int,
        **place: Any,
    ) -> None:
        """`copies` choices of one prompt, which meet in the prefix cache."""
        due = place.pop("due")
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=0 if scored else None
        )
        for index in range(copies):
            id = len(self.requests) + 1
            request = Request(
                id, beginning + rest, params, choice_seed(seed, index), arrival=float(id),
                deadline=due + id, **place,
            )  # fmt: skip
            self.requests[id] = request
            self.written[id], self.scores[id] = [], []
            self.learn(request.prompt_token_ids + alone(request))
            self.unfinished.add([request], [Sink()])  # type: ignore[list-item]
        self.send()

    @rule()
    def step(self) -> None:
        """Launch a step, as the loop does: no more of them at once than the depth."""
        while len(self.pending) >= self.depth:
            self.commit()
        step = self.scheduler.schedule()
        started = self.scheduler.take_started()
        for id, cached in started:
            entry = self.unfinished.get(id)
            assert entry is not None and cached < len(self.requests[id].prompt_token_ids) + len(
                self.written[id]
            )
            self.unfinished.started(entry)
            self.begun.add(id)
        if step is None:
            assert self.pending or self.scheduler.idle, "work waits and nothing can run"
            if self.pending:
                self.commit()
            return
        rows = set(step.slots)
        assert len(rows) == len(step.slots) <= self.num_slots
        assert 0 < step.num_tokens <= self.budget and min(step.counts) > 0
        self.pending.append((step, self.gpu.launch(step)))

    @precondition(lambda self: self.pending)
    @rule()
    def commit(self) -> None:
        """The oldest step's result comes back."""
        step, output = self.pending.popleft()
        self.take(self.scheduler.commit(step, self.gpu.result(output)))

    @precondition(lambda self: self.requests)
    @rule(which=SIZES)
    def abort(self, which: int) -> None:
        """Any request that ever came, twice: also one that has ended."""
        id = 1 + which % len(self.requests)
        self.scheduler.abort(id)
        self.scheduler.abort(id)
        self.unfinished.pop(id)
        self.live.discard(id)
        self.ended.add(id)
        self.crashes.pop(id, None)
        self.send()

    @precondition(lambda self: self.scheduler.running)
    @rule(which=SIZES)
    def preempt(self, which: int) -> None:
        """Any running sequence, not only the one whose turn it would be."""
        running = self.scheduler.running
        self.scheduler._preempt(running[which % len(running)])

    @rule()
    def forget_cache(self) -> None:
        self.scheduler.pool.reset_cache()

    @rule()
    def kill(self) -> None:
        """The engine dies with what it has launched; the next one gets what has not ended."""
        running = [id for id in self.begun if id not in self.ended]
        self.crashes.update(running)
        guilty = running if len(running) == 1 and self.crashes[running[0]] >= MAX_CRASHES else []
        assert [entry.request.id for entry in self.unfinished.engine_died()] == guilty
        self.ended.update(guilty)
        self.start()
        self.send()

    # ── what comes of it ─────────────────────────────────────────────────────────────────────────

    def send(self) -> None:
        """Give the engine what the ledger says is due: all of it, unless suspects are tried."""
        open_ids = self.requests.keys() - self.ended
        suspects = {id for id in open_ids if self.crashes[id] >= SUSPECT_CRASHES}
        due = self.unfinished.due()
        if suspects:
            assert {request.id for request in due} <= suspects
            assert len(due) <= 1
        else:
            assert {request.id for request in due} == open_ids - self.live
        for request in due:
            assert request.written == self.written[request.id]
            assert request.num_scored == len(self.scores[request.id])
            if self.blocks_for(request) > self.num_blocks:
                with pytest.raises(ValueError, match="KV blocks"):
                    self.scheduler.add(request)
                self.unfinished.pop(request.id)
                self.ended.add(request.id)
            else:
                self.scheduler.add(request)
                self.live.add(request.id)

    def learn(self, tokens: list[int]) -> None:
        """The hashes under which blocks of these tokens may be found."""
        found = root_hash("")
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            found = chain_hash(found, tokens[end - self.block_size : end])
            self.prefixes[found] = tokens[:end]

    def blocks_for(self, request: Request) -> int:
        assert request.params.max_tokens is not None
        return -(-(len(request.prompt_token_ids) + request.params.max_tokens) // self.block_size)

    def take(self, committed: Committed) -> None:
        """Every token is the next of what its request writes alone; it ends where that ends."""
        assert not committed.failed
        for id, entries in committed.prompt_logprobs:
            assert id in self.live
            entry = self.unfinished.get(id)
            assert entry is not None
            entry.num_scored += len(entries)
            self.scores[id] += [each.logprob for each in entries]
            known = self.requests[id].prompt_token_ids[1:]
            assert self.scores[id] == known[: len(self.scores[id])]
        finished = {id for id, _, _ in committed.finished}
        assert len(finished) == len(committed.finished)
        assert finished <= set(committed.ids)
        for id, token in zip(committed.ids, committed.token_ids, strict=True):
            assert id in self.live, "a token of a request that is not there"
            expected = alone(self.requests[id])
            self.written[id].append(token)
            assert self.written[id] == expected[: len(self.written[id])]
            assert (id in finished) == (len(self.written[id]) == len(expected))
            entry = self.unfinished.get(id)
            assert entry is not None
            self.unfinished.wrote(entry, token)
            self.crashes.pop(id, None)
        for id in finished:
            request = self.requests[id]
            if request.params.prompt_logprobs is not None:
                assert self.scores[id] == request.prompt_token_ids[1:]
            self.unfinished.pop(id)
            self.live.discard(id)
            self.ended.add(id)
        self.send()

    # ── what holds at every moment ───────────────────────────────────────────────────────────────

    def holders(self) -> list[Any]:
        """The sequences that hold something: running ones, and those a launched step touches."""
        found = {id(each): each for each in self.scheduler.running}
        found |= {id(each): each for rows in self.scheduler._launched for each in rows}
        return [each for each in found.values() if each.slot is not None]

    @invariant()
    def every_block_is_held_by_those_who_count_it_or_free(self) -> None:
        pool = self.scheduler.pool
        held = Counter(block for each in self.holders() for block in each.blocks)
        assert pool._refs == [held[block] for block in range(self.num_blocks)]
        assert set(pool._free) == set(range(self.num_blocks)) - held.keys()
        assert pool.num_free + pool.num_used == self.num_blocks
        leaving = [each for each in self.holders() if each not in self.scheduler.running]
        assert self.scheduler._releasing == sum(len(each.blocks) for each in leaving)

    @invariant()
    def every_slot_has_one_owner_or_is_free(self) -> None:
        slots = [each.slot for each in self.holders()] + self.scheduler._free_slots
        assert sorted(slots) == list(range(self.num_slots))

    @invariant()
    def nobody_is_lost_and_nobody_is_there_twice(self) -> None:
        scheduler = self.scheduler
        assert scheduler._by_id.keys() == self.live
        assert len(scheduler.running) + scheduler.num_waiting == len(self.live)
        assert scheduler.running == sorted(scheduler.running)
        assert {each.id for each in scheduler.running} <= self.live
        assert scheduler.idle == (not self.live)

    @invariant()
    def a_cached_block_holds_the_tokens_that_it_is_found_by(self) -> None:
        pool, size = self.scheduler.pool, self.block_size
        published = {block: found for block, found in enumerate(pool._hash) if found is not None}
        assert {found: block for block, found in published.items()} == pool._by_hash
        assert self.caching or not published
        for block, prefix_hash in published.items():
            tokens = self.prefixes[prefix_hash]
            first = len(tokens) - size
            for at in range(size):
                assert self.gpu.cache[block, at] == (tokens[first + at], first + at)

    def teardown(self) -> None:
        """Without another event, everything is written to its end, and nothing is left."""
        if not hasattr(self, "scheduler"):
            return
        total = sum(len(each.prompt_token_ids) + 16 for each in self.requests.values())
        for _ in range(20 * total + 20):
            if self.scheduler.idle and not self.pending:
                break
            self.step()
        while self.pending:
            self.commit()
        assert self.ended == set(self.requests) and len(self.unfinished) == 0
        assert self.scheduler.pool.num_free == self.num_blocks
        assert sorted(self.scheduler._free_slots) == list(range(self.num_slots))


class Pools(RuleBasedStateMachine):
    """The block pool beside the naive one."""

    @initialize(num_blocks=st.integers(1, 12))
    def build(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pool, self.naive = BlockPool(num_blocks), NaivePool(num_blocks)
        self.held: list[list[int]] = []

    @precondition(lambda self: self.pool.num_free)
    @rule(chain=st.integers(0, 2), index=st.integers(0, 3), publish=st.booleans())
    def take(self, chain: int, index: int, publish: bool) -> None:
        block = self.pool.take()
        assert block == self.naive.take()
        if publish:
            self.pool.publish(block, bytes([chain, index]))
            self.naive.publish(block, bytes([chain, index]))
        self.held.append([block])

    @rule(chain=st.integers(0, 2), length=st.integers(1, 4))
    def find_and_share(self, chain: int, length: int) -> None:
        hashes = [bytes([chain, index]) for index in range(length)]
        found = self.pool.lookup(hashes)
        assert found == self.naive.lookup(hashes)
        assume(found)
        for block in found:
            self.pool.share(block)
            self.naive.share(block)
        self.held.append(list(found))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 20))
    def release(self, which: int) -> None:
        blocks = self.held.pop(which % len(self.held))
        self.pool.release(blocks)
        self.naive.release(blocks)

    @rule()
    def reset(self) -> None:
        self.pool.reset_cache()
        self.naive.content.clear()

    @invariant()
    def both_say_the_same(self) -> None:
        assert list(self.pool._free) == self.naive.free
        assert self.pool.num_used == sum(count > 0 for count in self.naive.refs.values())
        for block in range(self.num_blocks):
            assert self.pool.is_free(block) == (self.naive.refs[block] == 0)


@pytest.mark.parametrize("machine", [Engines, Pools])
@pytest.mark.parametrize(
    ("histories", "events"), [(250, 40), pytest.param(10_000, 80, marks=pytest.mark.marathon)]
)
def test_any_history_comes_to_what_brute_force_says(
    histories: int, events: int, machine: type[RuleBasedStateMachine]
) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=events,
            suppress_health_check=list(HealthCheck),
        ),
    )
