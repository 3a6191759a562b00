"""An abort in every state that the engine knows of: once, at once, and nobody else notices."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.scheduler import Scheduler
from pagedserve.engine.sequence import Sequence, Status
from pagedserve.request import Request
from pagedserve.step import Step, StepOutput
from tests.engine.test_loop import check_nothing_leaked
from tests.engine.toy import EOS, Load, ToyGpu, alone

State = Callable[[Sequence], bool]

STATES: dict[str, State] = {
    "queued": lambda s: s.status is Status.WAITING and not s.started,
    "prefill chunk, between steps": lambda s: in_prefill(s) and s.launched == 0,
    "prefill chunk, in a step": lambda s: in_prefill(s) and s.launched > 0,
    "decode": lambda s: s.status is Status.RUNNING and len(s.tokens) > s.num_prompt,
    "preempted": lambda s: s.status is Status.WAITING and s.started and s.launched == 0,
    "preempted, its step still out": lambda s: s.status is Status.WAITING and s.launched > 0,
    "finishing, its last token not seen": lambda s: (
        s.status is Status.RUNNING and s.num_inflight > 0 and s.length >= s.max_length
    ),
}


def in_prefill(sequence: Sequence) -> bool:
    return sequence.status is Status.RUNNING and 0 < sequence.num_computed < sequence.num_prompt


class Machine:
    """The loop by hand: what it does between two looks is one launch or one commit."""

    def __init__(self, load: Load, requests: list[Request], depth: int):
        self.load, self.depth = load, depth
        self.scheduler = Scheduler(
            BlockPool(load.num_blocks),
            block_size=load.block_size,
            max_num_seqs=load.num_slots,
            max_num_batched_tokens=load.budget,
            eos_token_ids=frozenset({EOS}),
        )
        self.gpu = ToyGpu(load.num_slots, load.block_size)
        self.out: deque[tuple[Step, StepOutput]] = deque()
        self.written: dict[int, list[int]] = {}
        self.finished: set[int] = set()
        self.sequences: dict[int, Sequence] = {}
        for request in requests:
            self.scheduler.add(request)
            self.sequences[request.id] = self.scheduler._by_id[request.id]

    def turn(self) -> None:
        step = None if len(self.out) >= self.depth else self.scheduler.schedule()
        if step is not None:
            self.out.append((step, self.gpu.launch(step)))
        else:
            self.commit()

    def commit(self) -> None:
        committed = self.scheduler.commit(*self.out.popleft())
        for id, token in zip(committed.ids, committed.token_ids, strict=True):
            self.written.setdefault(id, []).append(token)
        self.finished |= {id for id, _, _ in committed.finished}


def victim_in(machine: Machine, state: State) -> Sequence | None:
    """Run until a sequence is in `state`; None where it all ended before."""
    while not machine.scheduler.idle:
        for id in list(machine.scheduler._by_id):
            if state(machine.sequences[id]):
                return machine.sequences[id]
        machine.turn()
    return None


# A step is out at every look but the synchronous loop's.
BETWEEN, BESIDE = "prefill chunk, between steps", "preempted, its step still out"
REACHED = [
    (state, depth)
    for state in STATES
    for depth in (1, 2, 3)
    if not (state == BETWEEN and depth > 1) and not (state == BESIDE and depth == 1)
]


@pytest.mark.parametrize(("state", "depth"), REACHED)
def test_an_abort_frees_what_a_sequence_has_and_leaves_the_others_alone(
    state: str, depth: int
) -> None:
    r, reached = random.Random(), 0
    for _ in range(60):
        load = Load(r.randrange(10**9), num_blocks=r.randint(12, 16), budget=r.randint(3, 9))
        requests = load.requests()
        fitting = [
            each
            for each in requests
            if len(each.prompt_token_ids) + (each.params.max_tokens or 0)
            <= load.num_blocks * load.block_size
        ]
        machine = Machine(load, fitting, depth)
        if (victim := victim_in(machine, STATES[state])) is None:
            continue
        reached += 1
        had = list(machine.written.get(victim.id, []))
        steps_out = len(machine.out)
        machine.scheduler.abort(victim.id)
        machine.scheduler.abort(victim.id)  # a second one finds nothing
        assert victim.status is Status.ABORTED and victim.id not in machine.scheduler._by_id
        for _ in range(steps_out):  # what was launched before may still touch it; nothing after
            machine.commit()
        assert victim.blocks == [] and victim.slot is None and victim.launched == 0
        while not machine.scheduler.idle or machine.out:
            machine.turn()
        assert machine.written.get(victim.id, []) == had and victim.id not in machine.finished
        for request in fitting:
            if request.id != victim.id:
                assert machine.written[request.id] == alone(request)
                assert request.id in machine.finished
        check_nothing_leaked(machine.scheduler, load)
    assert reached >= 5, f"only {reached} of 60 loads came to the state"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_abort_after_the_end_is_nothing(depth: int) -> None:
    load = Load(random.Random().randrange(10**9))
    machine = Machine(load, load.requests(), depth)
    while not machine.scheduler.idle or machine.out:
        machine.turn()
        for id in machine.finished:
            machine.scheduler.abort(id)
    for request in load.requests():
        assert machine.written[request.id] == alone(request)
    check_nothing_leaked(machine.scheduler, load)
