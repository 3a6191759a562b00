"""Steps that break off: everybody else goes on with the same tokens, and nothing is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pagedserve.config import Config
from pagedserve.engine import isolation
from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.client import EngineClient
from pagedserve.engine.isolation import Budget, Isolation, halves_of
from pagedserve.engine.loop import Engine
from pagedserve.engine.scheduler import Scheduler
from pagedserve.engine.watch import TICK_SECONDS, Recovery
from pagedserve.errors import StepError
from pagedserve.request import Request, SamplingParams
from pagedserve.step import BlockId, Join, Slot, Step, StepOutput
from tests.engine.test_client import Sink
from tests.engine.test_loop import check_nothing_leaked
from tests.engine.toy import EOS, VOCAB, Load, Script, ToyGpu, alone

Breaks = Callable[[Step, "BrokenGpu"], StepError | None]
POISON = VOCAB + 5  # a token that no prompt has unless a test puts it there


class BrokenGpu(ToyGpu):
    """Steps break off where `breaks` says so: at their launch, half done, or at their result, when
    they and those behind them are done."""

    def __init__(self, load: Load, breaks: Breaks, *, at_result: float = 0.0):
        super().__init__(load.num_slots, load.block_size)
        self.breaks = breaks
        self.choice = random.Random(load.seed)
        self.at_result = at_result
        self.num_broken = 0

    def launch(self, step: Step) -> StepOutput | StepError:
        error = self.breaks(step, self)
        if error is None:
            return super().launch(step)
        self.num_broken += 1
        if self.choice.random() < self.at_result:
            super().launch(step)
            return error
        rows = [row for row in range(len(step.slots)) if self.choice.random() < 0.5]
        super().launch(step.of_rows(rows))  # it got so far
        raise error

    def result(self, ticket: StepOutput | StepError) -> StepOutput:
        if isinstance(ticket, StepError):
            raise ticket
        return ticket

    def draw(self, slot: int, length: int) -> int:
        tokens = self.tokens[slot]
        del tokens[length:]  # what the same row drew before
        return super().draw(slot, length)


def run(
    load: Load, script: Script, gpu: BrokenGpu, depth: int, budget: int = 1 << 30
) -> tuple[Engine, Scheduler]:
    scheduler = Scheduler(
        BlockPool(load.num_blocks),
        block_size=load.block_size,
        max_num_seqs=load.num_slots,
        max_num_batched_tokens=load.budget,
        eos_token_ids=frozenset({EOS}),
    )
    engine = Engine(scheduler, gpu, script, depth=depth)  # type: ignore[arg-type]
    engine.run()
    return engine, scheduler


def now_and_then(share: float, *, memory: bool = False) -> Breaks:
    """A step that breaks off for no reason of its own."""
    return lambda step, gpu: (
        StepError("a chance", memory=memory) if gpu.choice.random() < share else None
    )


def poisoned(step: Step, gpu: BrokenGpu) -> StepError | None:
    """A step breaks off when it computes the poison of one of its rows."""
    joined = {join.slot: join.token_ids for join in step.joins}
    for slot, start, count in zip(step.slots, step.starts, step.counts, strict=True):
        if POISON in joined.get(slot, gpu.tokens[slot])[start : start + count]:
            return StepError("poison")
    return None


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error budget that does not end."""
    monkeypatch.setattr(isolation, "MAX_FAILURES", 1 << 30)


@pytest.mark.parametrize("at_result", (0.0, 0.5))
@pytest.mark.parametrize("depth", (1, 2, 3))
def test_steps_that_break_off_now_and_then_change_no_token(
    depth: int, at_result: float, patient: None
) -> None:
    broken = condemned = 0
    for seed in range(60):
        load = Load(seed)
        gpu = BrokenGpu(load, now_and_then(0.05), at_result=at_result)
        script = load.script()
        engine, scheduler = run(load, script, gpu, depth)
        for request in load.requests():
            got = script.written.get(request.id, [])
            if request.id in script.failed:
                assert got == alone(request)[: len(got)]
                condemned += "a chance" in script.failed[request.id]
            elif request.id in script.aborted:
                assert got == alone(request)[: len(got)]
            else:
                assert got == alone(request)
                wanted = request.params.prompt_logprobs == 0
                scores = request.prompt_token_ids[1:] if wanted else []
                assert script.scores.get(request.id, []) == scores
        check_nothing_leaked(scheduler, load)
        broken += gpu.num_broken
        assert script.stats is not None
        assert script.stats.broken_steps == engine.isolation.budget.num_failures <= gpu.num_broken
    assert broken > 100
    assert condemned <= 2, "one row alone, three times in a row, by chance"


@pytest.mark.parametrize("depth", (1, 2, 3))
def test_who_breaks_its_step_fails_alone_with_the_cause(depth: int, patient: None) -> None:
    failed = 0
    for seed in range(60):
        load, choice = Load(seed, abort_share=0.0), random.Random(seed)
        script = load.script()
        bad = set()
        for requests in script.submits.values():
            for request in requests:
                if not bad and choice.random() < 0.4:  # two alone in a step end the engine
                    at = choice.randrange(len(request.prompt_token_ids))
                    request.prompt_token_ids[at] = POISON
                    bad.add(request.id)
        gpu = BrokenGpu(load, poisoned, at_result=0.3)
        _, scheduler = run(load, script, gpu, depth)
        for request in load.requests():
            if request.id in bad:
                assert request.id not in script.finished
                assert (
                    "poison" in script.failed[request.id]
                    or "KV blocks" in script.failed[request.id]
                )
                assert not script.written.get(request.id)
                failed += 1
            elif request.id not in script.failed:
                assert script.written[request.id] == alone(request)
            else:
                assert "KV blocks" in script.failed[request.id]
        check_nothing_leaked(scheduler, load)
    assert failed > 30


@pytest.mark.parametrize("depth", (1, 2))
def test_a_device_with_less_memory_than_planned_computes_all_the_same(
    depth: int, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "LEAST_TOKENS", 1)

    def short(step: Step, gpu: BrokenGpu) -> StepError | None:
        return StepError("no memory", memory=True) if step.num_tokens > 3 else None

    for seed in range(30):
        load = Load(seed, abort_share=0.0)
        script = load.script()
        gpu = BrokenGpu(load, short)
        _, scheduler = run(load, script, gpu, depth)
        for request in load.requests():
            if request.id not in script.failed:
                assert script.written[request.id] == alone(request)
            else:
                assert "KV blocks" in script.failed[request.id]
        check_nothing_leaked(scheduler, load)


def test_too_many_broken_steps_end_the_engine() -> None:
    load = Load(3, abort_share=0.0)

    def first_attempt(step: Step, gpu: BrokenGpu) -> StepError | None:
        seen = getattr(gpu, "seen", set())
        gpu.seen = seen | {step.id}  # type: ignore[attr-defined]
        return None if step.id in seen else StepError("every time")

    gpu = BrokenGpu(load, first_attempt)
    with pytest.raises(StepError, match=r"11 of the last 1000 steps broke off.*: every time"):
        run(load, load.script(), gpu, 2)
    assert gpu.num_broken == isolation.MAX_FAILURES + 1


def test_the_budget_looks_back_a_thousand_steps() -> None:
    budget, error = Budget(), StepError("x")
    spacing = isolation.WINDOW_STEPS // isolation.MAX_FAILURES
    for at in range(0, 100 * spacing, spacing):
        budget.charge(empty(at), error)
    assert budget.num_failures == 100
    with pytest.raises(StepError, match="11 of the last 1000"):
        budget.charge(empty(99 * spacing + 1), error)


def test_what_no_row_can_do_is_not_a_row_s_fault() -> None:
    load = Load(3)
    gpu = BrokenGpu(load, lambda step, gpu: StepError("no kernel"))
    for rows, text in ((2, "no row of a step"), (6, "more than 4 rows")):
        with pytest.raises(StepError, match=f"{text}.*no kernel"):
            Isolation(gpu).again(of(rows), list(range(rows)))  # type: ignore[arg-type]
    alone_in_it = Isolation(gpu).again(of(1), [0])  # type: ignore[arg-type]
    assert alone_in_it.failed == {Slot(0): "it cannot be computed: no kernel"}


def test_halves_of_a_step_are_the_step() -> None:
    step = of(5)
    some, others = halves_of(step, StepError("x")) or ()
    for column in ("joins", "slots", "starts", "counts", "samples", "grown_slots", "grown_index"):
        assert getattr(some, column) + getattr(others, column) == getattr(step, column)
    assert halves_of(of(1), StepError("x", memory=True)) is None
    long = Step(3, of(1).joins, [Slot(0)], [10], [65], [True], [Slot(0)], [0], [BlockId(0)])
    assert halves_of(long, StepError("x")) is None
    first, then = halves_of(long, StepError("x", memory=True)) or ()
    assert (first.starts, first.counts, first.samples) == ([10], [32], [False])
    assert (then.starts, then.counts, then.samples) == ([42], [33], [True])
    assert first.joins == long.joins and first.grown_blocks == long.grown_blocks
    assert not then.joins and not then.grown_blocks


def empty(id: int) -> Step:
    return Step(id, [], [], [], [], [], [], [], [])


def of(rows: int) -> Step:
    """Rows of one token, each of which joins with a block of its own."""
    slots = [Slot(i) for i in range(rows)]
    params = SamplingParams(max_tokens=4)
    joins = [Join(slot, [1], 1, params, seed=0) for slot in slots]
    ones, blocks = [1] * rows, [BlockId(i) for i in range(rows)]
    return Step(0, joins, slots, [0] * rows, ones, [True] * rows, slots, [0] * rows, blocks)


def test_a_request_fails_with_its_log_probabilities_left_as_they_were() -> None:
    """A row left out has no token that could be taken for one."""
    load = Load(0, num_slots=3)
    request = Request(1, [1, 2, 3], SamplingParams(max_tokens=3), 0)
    script = Script({1: [request], 2: [Request(2, [POISON], SamplingParams(max_tokens=3), 0)]}, {})
    gpu = BrokenGpu(load, poisoned)
    run(load, script, gpu, 2)
    assert script.written == {1: alone(request)} and list(script.failed) == [2]


def test_an_engine_at_the_end_of_its_budget_is_replaced_and_everybody_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over real processes, the demo model and its sampling."""
    monkeypatch.setenv("BROKEN_ENGINE_LIVES", str(tmp_path / "lives"))
    client = EngineClient("tests.engine.broken_engine", Recovery(max_restarts=3))
    try:
        client.configure(Config.from_options({"device": "cpu"}).to_builtins())
        lives = []
        for _ in range(2):
            sinks = [Sink() for _ in range(4)]
            wait_for(client, lambda: client.ready is not None)
            client.submit([a_request(client, seed) for seed in range(4)], sinks)
            wait_for(client, lambda sinks=sinks: all("finish" in sink.calls for sink in sinks))
            lives.append([sink.tokens for sink in sinks])
        assert client.num_restarts == 1
        assert "11 of the last 1000 steps broke off" in str(client.last_death)
        assert client.stats is not None and client.stats.broken_steps == 0
        assert lives[0] == lives[1] and all(len(tokens) == 30 for tokens in lives[0])
    finally:
        client.close(0.0)


def a_request(client: EngineClient, seed: int) -> Request:
    params = SamplingParams(max_tokens=30, temperature=0.9, ignore_eos=True)
    return Request(client.next_id(), [5 + seed, 6, 7], params, seed)


def wait_for(client: EngineClient, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and client.cause_of_death is None
        client.poll(TICK_SECONDS / 2)
        client.tick()
