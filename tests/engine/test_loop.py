"""The engine under random loads: same tokens at any depth, nothing lost, nothing leaked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedserve.engine import coming
from pagedserve.engine.coming import Coming
from pagedserve.engine.scheduler import Scheduler
from pagedserve.engine.sequence import Sequence
from tests.engine.toy import Load, Script, alone


def check_tokens(load: Load, script: Script) -> None:
    """Every request wrote what it writes alone, to its end unless it was aborted or refused."""
    for request in load.requests():
        expected, got = alone(request), script.written.get(request.id, [])
        if request.id in script.failed:
            assert not got
        elif request.id in script.aborted:
            assert got == expected[: len(got)]
        else:
            assert got == expected
            scores = request.prompt_token_ids[1:] if request.params.prompt_logprobs == 0 else []
            assert script.scores.get(request.id, []) == scores
            ended = "length" if len(got) == request.params.max_tokens else "stop"
            if got[-1] in {7, *request.params.stop_token_ids} and not (
                request.params.ignore_eos and got[-1] == 7
            ):
                ended = "stop"
            assert script.finished[request.id] == ended


def check_nothing_leaked(scheduler: Scheduler, load: Load) -> None:
    assert scheduler.pool.num_free == scheduler.pool.num_blocks == load.num_blocks
    assert all(scheduler.pool.is_free(block) for block in range(load.num_blocks))
    assert sorted(scheduler._free_slots) == list(range(load.num_slots))
    assert scheduler.idle and not scheduler.running and scheduler._releasing == 0
    assert not scheduler._coming


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_loads_give_the_tokens_of_a_sequential_run_and_leak_nothing(depth: int) -> None:
    preemptions = hits = mixed = 0
    for seed in range(300):
        load = Load(seed)
        script, scheduler, gpu = load.run(depth)
        check_tokens(load, script)
        check_nothing_leaked(scheduler, load)
        assert gpu.max_tokens_in_a_step <= load.budget
        preemptions += scheduler.num_preemptions
        hits += scheduler.num_prefix_hits
        mixed += gpu.num_mixed_steps
    assert preemptions > 50 and hits > 1000 and mixed > 500, "the loads do not reach every path"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_requests_that_wait_for_a_beginning_get_the_same_tokens(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loads, with beginnings worth waiting for: aborts and preemptions fall among them."""
    monkeypatch.setattr(coming, "HELD_TOKENS", 4)
    num_held, holds = [0], Coming.holds

    def counted(self: Coming, sequence: Sequence, num_hits: int) -> bool:
        held = holds(self, sequence, num_hits)
        num_held[0] += held
        return held

    monkeypatch.setattr(Coming, "holds", counted)
    for seed in range(300):
        load = Load(seed, budget=40, num_slots=12)
        script, scheduler, _ = load.run(depth)
        check_tokens(load, script)
        check_nothing_leaked(scheduler, load)
    assert num_held[0] > 20, "the loads do not reach the path"


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(8, 60),
    block_size=st.integers(1, 7),
    budget=st.integers(1, 40),
    num_slots=st.integers(1, 12),
    abort_share=st.sampled_from([0.0, 0.2, 0.9]),
    depth=st.integers(1, 3),
    caching=st.booleans(),
)
def test_any_machine_gives_the_same_tokens_and_leaks_nothing(
    seed: int,
    num_blocks: int,
    block_size: int,
    budget: int,
    num_slots: int,
    abort_share: float,
    depth: int,
    caching: bool,
) -> None:
    load = Load(seed, num_blocks, block_size, budget, num_slots, abort_share)
    script, scheduler, _ = load.run(depth, caching=caching)
    check_tokens(load, script)
    check_nothing_leaked(scheduler, load)
    if not caching:
        assert scheduler.num_prefix_hits == 0


def test_a_request_that_can_never_fit_fails_alone() -> None:
    load = Load(5, num_blocks=4, block_size=2)
    script, scheduler, _ = load.run(2)
    assert script.failed and all("KV blocks" in text for text in script.failed.values())
    check_tokens(load, script)
    check_nothing_leaked(scheduler, load)


def test_stats_end_at_zero() -> None:
    script, _, _ = Load(3).run(2)
    assert script.stats is not None
    assert (script.stats.running, script.stats.waiting, script.stats.blocks_used) == (0, 0, 0)
