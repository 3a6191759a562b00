"""What is sent again after an engine's death, and who is found to have killed it."""

from __future__ import annotations

import random

import pytest

from pagedserve.engine.channel import ChannelClosed, Outputs
from pagedserve.engine.unfinished import MAX_CRASHES, Unfinished
from pagedserve.request import Request, SamplingParams
from tests.engine.test_loop import check_nothing_leaked, check_tokens
from tests.engine.toy import Load, Script


class Sink:
    """Ignores everything: the ledger does not look at sinks."""


def ledger(*ids: int) -> Unfinished:
    unfinished = Unfinished()
    requests = [Request(id, [5, 6], SamplingParams(max_tokens=9), 0) for id in ids]
    unfinished.add(requests, [Sink()] * len(ids))  # type: ignore[list-item]
    return unfinished


def start(unfinished: Unfinished, *ids: int) -> None:
    for id in ids:
        entry = unfinished.get(id)
        assert entry is not None
        unfinished.started(entry)


def write(unfinished: Unfinished, id: int, token: int = 7) -> None:
    entry = unfinished.get(id)
    assert entry is not None
    unfinished.wrote(entry, token)


def test_a_request_goes_on_with_what_it_has_written() -> None:
    unfinished = ledger(1, 2)
    sent = unfinished.due()
    assert [request.written for request in sent] == [[], []]
    start(unfinished, 1, 2)
    write(unfinished, 1, 30)
    write(unfinished, 1, 31)
    assert unfinished.due() == []  # all are sent
    assert unfinished.engine_died() == []
    first, second = unfinished.due()
    assert (first.written, first.prompt_token_ids, first.params) == (
        [30, 31],
        [5, 6],
        sent[0].params,
    )
    assert second == sent[1]


def test_the_third_crash_in_a_row_is_the_last() -> None:
    unfinished = ledger(1)
    for _ in range(MAX_CRASHES - 1):
        assert len(unfinished.due()) == 1
        start(unfinished, 1)
        assert unfinished.engine_died() == []
    unfinished.due()
    start(unfinished, 1)
    (guilty,) = unfinished.engine_died()
    assert guilty.request.id == 1 and len(unfinished) == 0 and not unfinished.on_trial


def test_a_request_that_goes_on_or_that_waits_is_never_suspected() -> None:
    unfinished = ledger(1, 2)
    for _ in range(10):
        assert len(unfinished.due()) == 2
        start(unfinished, 1)  # 2 stays in the engine's queue
        write(unfinished, 1)
        assert unfinished.engine_died() == []
        assert not unfinished.on_trial


def test_suspects_are_tried_one_at_a_time_while_the_others_wait() -> None:
    unfinished = ledger(1, 2, 3)
    for _ in range(2):
        unfinished.due()
        start(unfinished, 1, 2)
        unfinished.engine_died()
    assert [request.id for request in unfinished.due()] == [1]
    assert unfinished.due() == []
    start(unfinished, 1)
    write(unfinished, 1)
    assert [request.id for request in unfinished.due()] == [2]
    unfinished.pop(2)  # aborted
    assert [request.id for request in unfinished.due()] == [3]


def test_what_comes_during_a_trial_waits_for_its_end() -> None:
    unfinished = ledger(1)
    for _ in range(2):
        unfinished.due()
        start(unfinished, 1)
        unfinished.engine_died()
    unfinished.due()
    late = Request(2, [5], SamplingParams(), 0)
    unfinished.add([late], [Sink()])  # type: ignore[list-item]
    assert unfinished.due([late]) == []
    write(unfinished, 1)
    assert unfinished.due() == [late]


@pytest.mark.parametrize("seed", range(30))
def test_those_that_kill_engines_are_found_and_all_others_end_well(seed: int) -> None:
    """An engine of few rows, some requests that kill it at a position of their own."""
    r = random.Random(seed)
    ids = list(range(1, r.randint(3, 40)))
    fatal = {id: r.randint(0, 8) for id in ids if r.random() < 0.15}
    unfinished, slots = ledger(*ids), r.randint(1, 12)
    failed: list[int] = []
    ended: list[int] = []
    lives = 0
    while len(unfinished):
        lives += 1
        assert lives < 500
        queue = [request.id for request in unfinished.due()]
        while queue:
            running = queue[:slots]
            start(unfinished, *running)
            entries = {id: unfinished.get(id) for id in running}
            if any(len(entry.written) == fatal.get(id) for id, entry in entries.items()):
                break
            for id, entry in entries.items():
                unfinished.wrote(entry, 7)
                if len(entry.written) == 9:
                    unfinished.pop(id)
                    queue.remove(id)
                    ended.append(id)
            queue += [request.id for request in unfinished.due()]
            if r.random() < 0.02:  # and somebody kills it from outside
                break
        failed += [entry.request.id for entry in unfinished.engine_died()]
    assert sorted(failed) == sorted(fatal)
    assert sorted(ended) == sorted(set(ids) - set(fatal))


class Dying(Script):
    """An API process whose engine is killed at one turn of its loop."""

    dies_at = 0

    def receive(self, timeout: float | None) -> list[object]:
        if self.turn == self.dies_at:
            raise ChannelClosed
        return super().receive(timeout)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_tokens_are_those_of_an_engine_that_never_died(depth: int) -> None:
    resumed_in_the_middle = scored = 0
    for seed in range(150):
        load, r = Load(seed, abort_share=0.0), random.Random(seed)
        script = load.script()
        everything = [request for batch in script.submits.values() for request in batch]
        known: dict[str, dict[int, object]] = {}
        for life in range(4):
            dying = Dying({}, {}, **known)  # type: ignore[arg-type]
            dying.dies_at = 10**9 if life == 3 else r.randint(2, 25)
            unfinished = Unfinished()
            live = [q for q in everything if q.id not in {**dying.finished, **dying.failed}]
            unfinished.add(live, [Sink()] * len(live))  # type: ignore[list-item]
            for request in live:
                entry = unfinished.get(request.id)
                assert entry is not None
                entry.written = list(dying.written.get(request.id, []))
                entry.num_scored = len(dying.scores.get(request.id, []))
                resumed_in_the_middle += bool(entry.written)
                scored += entry.num_scored > 0
            if live:
                dying.submits[1] = unfinished.due()
            scheduler, _ = load.turn(dying, depth)
            known = {
                name: getattr(dying, name) for name in ("written", "finished", "failed", "scores")
            }
        check_tokens(load, dying)
        check_nothing_leaked(scheduler, load)
    assert resumed_in_the_middle > 100 and scored > 20, "the deaths come at no good moment"


def test_whose_turn_comes_is_told_before_the_step_that_may_kill() -> None:
    """What the engine has launched when it dies, it has named."""

    class Watching(Script):
        named: list[int] = []

        def send(self, message: object) -> None:
            if isinstance(message, Outputs):
                self.named += [id for id, _ in message.started]
                assert set(message.ids) <= set(self.named)
            super().send(message)

    load = Load(11, abort_share=0.0)
    script = load.script()
    watching = Watching(script.submits, {})
    load.turn(watching, 2)
    assert sorted(watching.named) == sorted(set(watching.named))
    assert set(watching.named) == set(watching.written)
