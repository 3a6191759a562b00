"""Whose turn it is: shares of tokens, deadlines, ageing, and room for a tenant that has none."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.loop import Engine
from pagedserve.engine.scheduler import Scheduler
from pagedserve.engine.sequence import Sequence, Status
from pagedserve.engine.waiting import AGEING_TURNS, OUTPUT_COST, PROMPT_COST, Waiting
from pagedserve.request import Request, SamplingParams
from pagedserve.step import StepOutput
from tests.engine.test_scheduler import advance, scheduler
from tests.engine.toy import Script, ToyGpu, alone


def request(
    id: int, tenant: int = 0, *, length: int = 6, max_tokens: int = 8, seed: int = 0, **fields
) -> Request:
    prompt = [1 + (id * 7 + at) % 90 for at in range(length)]
    fields.setdefault("arrival", float(id))
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(id, prompt, params, seed, tenant=tenant, **fields)


def order_of(s: Scheduler) -> list[int]:
    """The ids in the order in which they are begun, run to the end with 9 drawn everywhere."""
    begun = []
    while not s.idle:
        step = s.schedule()
        assert step is not None
        begun += [id for id, _ in s.take_started()]
        s.commit(step, StepOutput([9] * sum(step.samples)))
    return begun


def test_a_tenant_that_floods_waits_for_one_that_does_not() -> None:
    s = scheduler(slots=1, blocks=64)
    for id in range(1, 21):
        s.add(request(id, tenant=1))
    for id in range(21, 24):
        s.add(request(id, tenant=2))
    begun = order_of(s)
    assert begun[:6] == [1, 21, 2, 22, 3, 23]
    assert begun[6:] == list(range(4, 21))


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_with_work_get_tokens_by_their_weights(weight: float) -> None:
    """One sends long sequences, the other as many short ones."""
    r = random.Random(int(weight))
    pool = BlockPool(256, caching=False)  # what is cached would be free
    s = Scheduler(pool, block_size=4, max_num_seqs=4, max_num_batched_tokens=64)
    cost, num_begun = Counter[int](), Counter[int]()
    sizes: dict[int, tuple[int, int, int]] = {}
    for id in range(1, 2401):
        tenant = 1 + id % 2
        long = tenant == 1
        length, written = r.randint(4, 40 if long else 8), r.randint(1, 30 if long else 6)
        sizes[id] = tenant, length, written
        s.add(
            request(
                id,
                tenant,
                length=length,
                max_tokens=written,
                weight=weight if tenant == 2 else 1.0,
            )
        )
    for id in order_of(s):
        tenant, length, written = sizes[id]
        cost[tenant] += PROMPT_COST * length + OUTPUT_COST * written
        num_begun[tenant] += 1
        if num_begun[2] == 1200:  # all that it has
            break
    assert num_begun[1] < 1200 and cost[1] > 4000
    # What four slots hold at most: the paper's bound, which no length of time widens.
    assert abs(cost[2] / weight - cost[1]) <= 4 * (PROMPT_COST * 40 + OUTPUT_COST * 30)


def test_who_sent_nothing_has_saved_nothing_up() -> None:
    s = scheduler(slots=1, blocks=64)
    for id in range(1, 41):
        s.add(request(id, tenant=1))
    for _ in range(100):
        advance(s)
    s.take_started()
    for id in range(101, 111):
        s.add(request(id, tenant=2))
    begun = order_of(s)
    late = [id for id in begun[:12] if id > 100]
    assert 5 <= len(late) <= 7  # by turns, and not all ten first


def test_the_earliest_deadline_goes_first_within_a_priority() -> None:
    s = scheduler(slots=1, blocks=64)
    s.add(request(1, arrival=1.0))
    s.add(request(2, arrival=2.0, deadline=50.0))
    s.add(request(3, arrival=3.0, deadline=9.0))
    s.add(request(4, arrival=4.0, deadline=5.0, priority=1))
    s.add(request(5, arrival=5.0, deadline=1000.0, priority=0))  # due as if it had none
    assert order_of(s) == [3, 2, 1, 5, 4]


@pytest.mark.parametrize("tenants", [1, 3])
def test_nobody_starves_behind_better_priorities(tenants: int) -> None:
    s = scheduler(slots=1, blocks=64)
    s.add(request(1, tenant=tenants - 1, priority=9, max_tokens=1))
    begun: list[int] = []
    for id in range(2, 3 * AGEING_TURNS):  # always another one of a better priority
        s.add(request(id, tenant=id % tenants, max_tokens=1))
        s.add(request(1000 + id, tenant=id % tenants, max_tokens=1))
        step = s.schedule()
        assert step is not None
        begun += [i for i, _ in s.take_started()]
        s.commit(step, StepOutput([9] * sum(step.samples)))
    assert begun.index(1) == AGEING_TURNS - 1


def test_a_tenant_with_nothing_running_takes_a_slot_of_the_largest() -> None:
    s = scheduler(slots=4, blocks=256, budget=64)
    for id in range(1, 9):
        s.add(request(id, tenant=1, max_tokens=100))
    advance(s)
    s.add(request(20, tenant=2, max_tokens=3))
    step, _ = advance(s)
    assert {sequence.id for sequence in s.running} == {1, 2, 3, 20} and s.num_preemptions == 1
    s.add(request(21, tenant=2, max_tokens=3))  # it has one running: it waits its turn
    advance(s)
    assert s.num_preemptions == 1
    s.take_started()
    assert order_of(s)[0] == 21


def test_a_last_running_sequence_and_a_better_priority_are_left_alone() -> None:
    s = scheduler(slots=2, blocks=64)
    s.add(request(1, tenant=1, max_tokens=20))
    s.add(request(2, tenant=2, max_tokens=20))
    advance(s)
    s.add(request(3, tenant=3))
    advance(s)
    assert s.num_preemptions == 0
    s = scheduler(slots=2, blocks=64)
    for id in (1, 2):
        s.add(request(id, tenant=1, max_tokens=20, priority=0))
    advance(s)
    s.add(request(3, tenant=3, priority=1))
    advance(s)
    assert s.num_preemptions == 0


def test_blocks_are_claimed_like_slots() -> None:
    s = scheduler(slots=8, blocks=12, size=4, budget=64)
    for id in (1, 2, 3):
        s.add(request(id, tenant=1, length=8, max_tokens=8))
    advance(s)
    s.add(request(9, tenant=2, length=12, max_tokens=2))
    for _ in range(4):
        advance(s)
    assert 9 in order_of(s) or s.idle
    assert s.num_preemptions >= 1 and s.pool.num_free == 12


def flood(*, crowd: int) -> tuple[Script, int]:
    """A crowd's requests at once, and one of another tenant some turns later; its id."""
    submits = {1: [request(id, 1, max_tokens=30, seed=id) for id in range(1, crowd + 1)]}
    submits[8] = [request(500, 2, max_tokens=5)]
    return Script(submits, {}), 500


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("crowd", [0, 8, 60])
def test_a_flood_delays_anothers_first_token_by_no_more_than_a_few_steps(
    depth: int, crowd: int
) -> None:
    script, late = flood(crowd=crowd)
    pool = BlockPool(96)
    s = Scheduler(pool, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    first: dict[int, int] = {}

    class Watched(Script):
        def send(self, message: object) -> None:
            super().send(message)
            for id in self.written:
                first.setdefault(id, self.turn)

    watched = Watched(script.submits, {})
    expected = {each.id: alone(each) for batch in script.submits.values() for each in batch}
    Engine(s, ToyGpu(8, 4), watched, depth=depth).run()  # type: ignore[arg-type]
    assert first[late] - 8 <= 4
    assert watched.written == expected  # whoever gave way wrote the same
    assert pool.num_free == 96


@pytest.mark.parametrize("seed", range(12))
def test_random_loads_of_many_tenants_end_with_every_text_and_block(seed: int) -> None:
    r = random.Random(seed)
    submits: dict[int, list[Request]] = {}
    aborts = {}
    for id in range(1, 40):
        made = request(
            id,
            r.randrange(4),
            length=r.randint(1, 20),
            max_tokens=r.randint(1, 20),
            seed=id,
            priority=r.choice([0, 0, 3]),
            weight=r.choice([0.5, 1.0, 4.0]),
            deadline=r.choice([float("inf"), float(r.randint(1, 99))]),
        )
        submits.setdefault(r.randint(1, 30), []).append(made)
        if r.random() < 0.2:
            aborts[id] = r.randint(0, 5)
    every = {each.id: each for batch in submits.values() for each in batch}
    script = Script(submits, aborts)
    s = Scheduler(BlockPool(24), block_size=4, max_num_seqs=5, max_num_batched_tokens=16)
    Engine(s, ToyGpu(5, 4), script, depth=1 + seed % 2).run()  # type: ignore[arg-type]
    assert s.idle and s.pool.num_free == 24 and len(s._free_slots) == 5
    for id, wanted in every.items():
        written, whole = script.written.get(id, []), alone(wanted)
        assert written == whole if id not in script.aborted else whole[: len(written)] == written
    assert all(line.num_running == 0 for line in s._waiting._lines.values())


def test_lines_of_tenants_that_left_do_not_pile_up() -> None:
    s = scheduler(slots=4, blocks=64)
    for id in range(1, 300):
        s.add(request(id, tenant=id, max_tokens=1))
        advance(s)
    assert len(s._waiting._lines) < 10


def test_tokens_from_the_cache_are_not_charged() -> None:
    s = scheduler(slots=1, blocks=64)
    prompt = list(range(1, 17))
    for id in (1, 2):
        s.add(Request(id, prompt, SamplingParams(max_tokens=1), 0, tenant=3))
        advance(s)
    line = s._waiting._lines[3]
    assert line.used == PROMPT_COST * (16 + 4) + OUTPUT_COST * 2


def test_a_sequence_that_is_set_aside_comes_back_to_its_place_and_its_tenant_to_its_level() -> None:
    r = random.Random(3)
    for _ in range(50):
        here, there = Waiting(), Waiting()
        for at in range(1, r.randint(3, 90)):
            sequence = Sequence(request(at, r.randint(0, 3), priority=r.randint(0, 1)), frozenset())
            here.push(sequence)
            there.push(sequence)
        while (head := there.head()) is not None:
            aside = []
            for _ in range(r.randint(0, 4)):
                if (other := here.head()) is not None:
                    here.set_aside(other)
                    aside.append(other)
            assert len({id(each) for each in aside}) == len(aside)
            here.put_back(aside)
            assert here.head() is head
            for waiting in (here, there):
                waiting.take(head)
                waiting.charge_prompt(head, 0)
            head.status = Status.FINISHED
            for waiting in (here, there):
                waiting.left(head)
