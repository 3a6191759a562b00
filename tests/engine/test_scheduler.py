"""Single decisions of the scheduler."""

import msgspec
import pytest

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.scheduler import MAX_HELD, Scheduler
from pagedserve.request import FinishReason, Request, SamplingParams
from pagedserve.step import Step, StepOutput, TokenLogprobs


def scheduler(blocks: int = 16, size: int = 4, slots: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(
        BlockPool(blocks),
        block_size=size,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        eos_token_ids=frozenset({0}),
    )


def request(id: int, length: int = 6, *, priority: int = 0, first: int = 1, **params) -> Request:
    params.setdefault("max_tokens", 8)
    prompt = [first + i % 5 for i in range(length)]
    return Request(id, prompt, SamplingParams(**params), 0, priority, float(id))


def advance(s: Scheduler, token: int = 9) -> tuple[Step, list[int]]:
    """One synchronous step in which every sampling row draws `token`."""
    step = s.schedule()
    assert step is not None
    committed = s.commit(step, StepOutput([token] * sum(step.samples)))
    return step, [id for id, _, _ in committed.finished]


def test_a_long_prompt_is_computed_in_pieces_and_samples_once() -> None:
    s = scheduler(budget=4)
    s.add(request(1, length=10))
    steps = [advance(s)[0] for _ in range(4)]
    assert [(step.starts, step.counts, step.samples) for step in steps] == [
        ([0], [4], [False]),
        ([4], [4], [False]),
        ([8], [2], [True]),
        ([10], [1], [True]),
    ]


def test_decodes_go_first_and_a_prompt_takes_what_is_left_of_the_budget() -> None:
    s = scheduler(budget=8)
    s.add(request(1, length=4))
    advance(s)
    s.add(request(2, length=12, first=3))
    step, _ = advance(s)
    assert step.counts == [1, 7]


def test_a_lower_priority_number_is_admitted_first_and_preempted_last() -> None:
    s = scheduler(blocks=6, size=4, slots=3, budget=64)
    s.add(request(1, length=4, priority=5, max_tokens=20))
    s.add(request(2, length=4, priority=1, max_tokens=20, first=2))
    step, _ = advance(s)
    assert [join.token_ids[0] for join in step.joins] == [2, 1]
    while not s.num_preemptions:
        advance(s)
    assert [sequence.id for sequence in s.running] == [2]
    finished = []
    while not s.idle:
        finished += advance(s)[1]
    assert finished == [2, 1] and s.pool.num_free == 6


def test_an_equal_prompt_is_taken_from_the_cache_but_for_its_last_token() -> None:
    s = scheduler()
    s.add(request(1, length=8, max_tokens=1))
    advance(s)
    s.add(request(2, length=8, max_tokens=1))
    step, _ = advance(s)
    assert (step.starts, step.counts) == ([4], [4])  # the second block holds the last token
    assert s.num_prefix_hits == 4


def alike(id: int, shared: int, own: int, **params) -> Request:
    """A request that begins as others do, for `shared` tokens."""
    prompt = [1 + i % 5 for i in range(shared)] + [10 + id + i % 3 for i in range(own)]
    params.setdefault("max_tokens", 8)
    return Request(id, prompt, SamplingParams(**params), 0, 0, float(id))


def test_a_burst_that_begins_alike_waits_for_the_first_to_compute_the_beginning() -> None:
    s = scheduler(blocks=400, budget=2000)
    for id in range(1, 4):
        s.add(alike(id, 400, 20))
    first = s.schedule()
    assert first is not None and first.counts == [420]
    second = s.schedule()  # overlapped: the others' beginning is on its way
    assert second is not None and second.starts == [420]
    s.commit(first, StepOutput([9]))
    third = s.schedule()
    assert third is not None
    assert third.starts == [421, 400, 400] and third.counts == [1, 20, 20]
    s.commit(second, StepOutput([9]))
    s.commit(third, StepOutput([9, 9, 9]))
    assert s.num_prefix_hits == 800


@pytest.mark.parametrize("depth", [1, 2])
def test_who_waits_for_a_beginning_holds_up_nobody_behind_it(depth: int) -> None:
    """Ten pairs: the first of each is computed in one step, though the second of each waits."""
    s = scheduler(blocks=2400, slots=40, budget=5000)
    for pair in range(10):
        prompt = [pair * 7 + i % 5 for i in range(400)]
        for at in range(2):
            id = 2 * pair + at
            s.add(Request(id, [*prompt, 90 + at], SamplingParams(max_tokens=4), 0, 0, float(id)))
    launched = [s.schedule() for _ in range(depth)]
    assert [id for id, _ in s.take_started()] == list(range(0, 20, 2))
    for step in launched:
        assert step is not None
        s.commit(step, StepOutput([9] * sum(step.samples)))
    advance(s)
    assert s.take_started() == [(id, 400) for id in range(1, 20, 2)]  # in their order


@pytest.mark.parametrize(("blocks", "slots"), [(400, 2), (215, 3)], ids=["slots", "blocks"])
def test_who_passes_by_takes_no_room_from_the_one_that_waits(blocks: int, slots: int) -> None:
    s = scheduler(blocks=blocks, slots=slots, budget=2000)
    s.add(alike(1, 400, 20))
    s.add(alike(2, 400, 20))
    s.add(request(3, length=20, first=50))
    advance(s)
    assert [id for id, _ in s.take_started()] == [1]
    advance(s)
    assert (2, 400) in s.take_started()


def test_a_step_looks_at_few_of_those_that_wait_for_a_beginning() -> None:
    s = scheduler(blocks=9000, slots=80, budget=2000)
    for id in range(2 * MAX_HELD):
        s.add(alike(id, 400, 20))
    s.add(request(99, length=20, first=50))
    s.schedule()
    assert [id for id, _ in s.take_started()] == [0]


@pytest.mark.parametrize(
    ("shared", "own"), [(200, 20), (300, 400)], ids=["little", "less than half"]
)
def test_nobody_waits_for_a_small_part_of_a_prompt(shared: int, own: int) -> None:
    s = scheduler(blocks=800, budget=4000)
    for id in range(1, 4):
        s.add(alike(id, shared, own))
    step, _ = advance(s)
    assert step.counts == [shared + own] * 3


def test_who_waits_for_a_beginning_computes_it_where_it_does_not_come() -> None:
    s = scheduler(blocks=400, budget=2000)
    s.add(alike(1, 400, 20))
    s.add(alike(2, 400, 20))
    first = s.schedule()
    assert first is not None
    s.abort(1)
    assert s.schedule() is None
    s.commit(first, StepOutput([9]))
    step, _ = advance(s)
    assert step.starts == [0] and step.counts == [420] and not s.num_prefix_hits


def test_nobody_waits_where_nothing_is_cached() -> None:
    s = scheduler(blocks=400, budget=2000)
    s.pool.caching = False
    s.add(alike(1, 400, 20))
    s.add(alike(2, 400, 20))
    step, _ = advance(s)
    assert step.counts == [420, 420]


def test_an_equal_prompt_of_another_salt_is_computed() -> None:
    s = scheduler()
    for id, salt in enumerate(("0", "1", "1", "0", "")):
        s.add(msgspec.structs.replace(request(id, length=8, max_tokens=1), cache_salt=salt))
        advance(s)
    assert s.take_started() == [(0, 0), (1, 0), (2, 4), (3, 4), (4, 0)]


def test_the_cached_tokens_are_reported_also_when_the_first_chunk_samples_nothing() -> None:
    s = scheduler(budget=8)
    s.add(request(1, length=8, max_tokens=1))
    advance(s)
    s.add(Request(2, [*request(1, length=8).prompt_token_ids, *range(20, 40)], SamplingParams(), 0))
    step = s.schedule()
    assert step is not None and step.samples == [False]
    assert s.take_started() == [(1, 0), (2, 8)]  # before the step is computed
    assert not s.commit(step, StepOutput([])) and s.take_started() == []


def test_aborted_requests_do_not_pile_up_behind_one_that_waits() -> None:
    s = scheduler(slots=1)
    s.add(request(1, max_tokens=50))
    s.add(request(2, priority=-1))
    advance(s)
    for id in range(3, 1000):
        s.add(request(id, first=id))
        s.abort(id)
    assert len(s._waiting) <= 4
    finished = []
    while not s.idle:
        finished += advance(s)[1]
    assert sorted(finished) == [1, 2]


def test_prompt_logprobs_skip_the_cache() -> None:
    s = scheduler()
    s.add(request(1, length=8, max_tokens=1))
    advance(s)
    s.add(request(2, length=8, max_tokens=1, prompt_logprobs=0))
    assert advance(s)[0].starts == [0]


def test_eos_ends_a_sequence_unless_it_is_ignored() -> None:
    for ignore, ended in ((False, [1]), (True, [])):
        s = scheduler()
        s.add(request(1, ignore_eos=ignore))
        assert advance(s, token=0)[1] == ended


def test_a_stop_token_is_reported() -> None:
    s = scheduler()
    s.add(request(1, stop_token_ids=[9]))
    step = s.schedule()
    assert step is not None
    committed = s.commit(step, StepOutput([9]))
    assert committed.finished == [(1, FinishReason.STOP, 9)]


def test_rows_with_bad_logits_fail_alone() -> None:
    s = scheduler()
    s.add(request(1))
    s.add(request(2, first=2))
    step = s.schedule()
    assert step is not None
    committed = s.commit(step, StepOutput([9, 9], failed={step.slots[0]: "no"}))
    assert committed.failed == [(1, "no")] and committed.ids == [2]
    s.abort(2)
    assert s.idle and s.pool.num_used == 0


def test_logprobs_stay_beside_their_tokens_when_a_row_is_dropped() -> None:
    s = scheduler()
    s.add(request(1))
    s.add(request(2, first=2))
    step = s.schedule()
    assert step is not None
    s.abort(1)
    entries = [TokenLogprobs(-1.0, 1, [], []), TokenLogprobs(-2.0, 2, [], [])]
    committed = s.commit(step, StepOutput([8, 9], logprobs=list(entries)))
    assert (committed.ids, committed.token_ids) == ([2], [9])
    assert committed.logprobs == entries[1:]


def test_an_aborted_sequence_keeps_its_blocks_until_its_launched_step_is_committed() -> None:
    s = scheduler()
    s.add(request(1))
    step = s.schedule()
    assert step is not None
    s.abort(1)
    s.abort(1)
    assert s.pool.num_used == 2
    s.commit(step, StepOutput([9]))
    assert s.pool.num_used == 0 and s.idle


def test_a_request_that_cannot_fit_is_refused() -> None:
    s = scheduler(blocks=2)
    with pytest.raises(ValueError, match="needs 4 KV blocks"):
        s.add(request(1, length=6, max_tokens=8))
    assert s.idle


def test_no_more_sequences_than_slots() -> None:
    s = scheduler(slots=2, blocks=64)
    for id in range(1, 5):
        s.add(request(id, length=2, first=id))
    advance(s)
    assert len(s.running) == 2 and s.num_waiting == 2
