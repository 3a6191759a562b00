"""Bounds, quotas, shares and counts of the door, without a server."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pagedserve.api.admission import (
    ANYBODY,
    KEPT_SHARE,
    MAX_RETRY_SECONDS,
    UNKNOWN_RETRY_SECONDS,
    Admission,
    Rate,
    Tenant,
)
from pagedserve.config import ServerConfig
from pagedserve.engine.channel import Ready
from pagedserve.errors import BusyError, RequestError

READY = Ready(600, 2048, 100, 16, 4, [2], "cpu", "float32", 0.1)


class Clock:
    """Time that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None, **options: int) -> Admission:
    made = Admission(ServerConfig(**options), clock or Clock())
    made.settle(READY)
    return made


def end(a: Admission, tenant: Tenant, num_prompt: int, *, waited: bool = False) -> None:
    a.ended(tenant, "length", num_prompt=num_prompt, num_generated=3, waited=waited)


def test_the_bounds_follow_the_engine_unless_they_are_given() -> None:
    usual = admission()
    assert (usual.max_live, usual.max_waiting_tokens) == (4 + 1024, 1 << 20)
    big = Admission(ServerConfig())
    big.settle(Ready(600, 2048, 100_000, 16, 256, [2], "cpu", "float32", 0.1))
    assert (big.max_live, big.max_waiting_tokens) == (256 + 8 * 256, 4 * 1_600_000)
    given = admission(max_queued_requests=0, max_queued_tokens=7)
    assert (given.max_live, given.max_waiting_tokens) == (4, 7)


def test_a_full_queue_refuses_and_an_end_makes_room() -> None:
    a = admission(max_queued_requests=2)
    for _ in range(6):
        a.admit(ANYBODY, [10])
    with pytest.raises(BusyError, match="6 sequences are live of 6") as refused:
        a.admit(ANYBODY, [10])
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    with pytest.raises(BusyError):
        a.check_room(ANYBODY)
    a.started(ANYBODY, 10)  # it is still live
    with pytest.raises(BusyError):
        a.check_room(ANYBODY)
    end(a, ANYBODY, 10)
    a.admit(ANYBODY, [10])
    assert a.counts.rejected == {"queue_requests": 3}


def test_n_counts_as_n_and_all_of_a_request_is_let_in_or_none() -> None:
    a = admission(max_queued_requests=2)
    a.admit(ANYBODY, [5] * 4)
    with pytest.raises(BusyError, match="3 more"):
        a.admit(ANYBODY, [5] * 3)
    assert (a.num_live, a.waiting_tokens) == (4, 20)
    a.admit(ANYBODY, [5] * 2)


def test_a_request_that_could_never_be_let_in_is_the_clients_mistake() -> None:
    a = admission(max_queued_requests=2)
    with pytest.raises(RequestError, match="takes 6 sequences at a time") as refused:
        a.admit(ANYBODY, [1] * 7)
    assert refused.value.status == 400
    assert a.counts.rejected == {} and a.num_live == 0


def test_prompt_tokens_are_bounded_but_one_request_alone_may_have_more() -> None:
    a = admission(max_queued_tokens=100)
    a.admit(ANYBODY, [500])
    with pytest.raises(BusyError, match="500 prompt tokens wait of 100") as refused:
        a.admit(ANYBODY, [1])
    assert refused.value.retry_after == UNKNOWN_RETRY_SECONDS
    a.started(ANYBODY, 500)  # what is computed waits no more
    a.admit(ANYBODY, [99])
    a.admit(ANYBODY, [1])
    with pytest.raises(BusyError):
        a.admit(ANYBODY, [1])
    assert a.counts.rejected == {"queue_tokens": 2}


def test_retry_after_is_what_must_leave_by_the_measured_rate() -> None:
    clock = Clock()
    a = admission(clock, max_queued_tokens=1000)
    for _ in range(200):  # 50 tokens a second
        clock.now += 1.0
        a.admit(ANYBODY, [50])
        a.started(ANYBODY, 50)
        end(a, ANYBODY, 50)
    a.admit(ANYBODY, [900])
    with pytest.raises(BusyError) as refused:
        a.admit(ANYBODY, [600])  # 500 must leave: 10 s
    assert refused.value.retry_after in (10, 11)
    clock.now += 3600
    with pytest.raises(BusyError) as refused:
        a.admit(ANYBODY, [600])
    assert refused.value.retry_after == MAX_RETRY_SECONDS


def test_a_rate_is_true_from_the_start_and_forgets() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second() == 0.0
    for _ in range(50):
        clock.now += 0.1
        rate.add(2)
    assert rate.per_second() == pytest.approx(20, rel=0.05)
    clock.now += 100
    assert rate.per_second() < 0.01


def test_requests_a_minute_refill_steadily() -> None:
    clock = Clock()
    a = admission(clock)
    tenant = Tenant(1, "a", requests_per_minute=6)
    for _ in range(6):
        a.enter(tenant)
    with pytest.raises(BusyError, match="6 requests a minute") as refused:
        a.enter(tenant)
    assert (refused.value.retry_after, refused.value.code) == (10, "rate_limit_exceeded")
    clock.now += 9.0
    with pytest.raises(BusyError) as refused:
        a.enter(tenant)
    assert refused.value.retry_after == 1
    clock.now += 1.0
    a.enter(tenant)
    a.enter(Tenant(2, "b"))
    assert a.counts.rejected == {"rate": 2}


def test_requests_open_at_once_are_bounded_by_the_key_or_by_the_flag() -> None:
    a = admission(max_requests_per_key=2)
    few, usual = Tenant(1, "few", max_open=1), Tenant(2, "usual")
    a.enter(few)
    with pytest.raises(BusyError, match="1 requests open and may have 1"):
        a.enter(few)
    a.enter(usual)
    a.enter(usual)
    with pytest.raises(BusyError):
        a.enter(usual)
    a.leave(usual)
    a.enter(usual)
    assert a.counts.rejected == {"concurrency": 2}


def test_a_flood_of_one_key_leaves_the_others_share_of_the_queue() -> None:
    a = admission(max_queued_requests=128)  # 132 live, 16 kept for a weight of 1
    flood, heavy, light = Tenant(1, "flood"), Tenant(2, "heavy", 2.0), Tenant(3, "light")
    a.tenants = lambda: (flood, heavy, light)

    def fill(tenant: Tenant) -> int:
        before = a.num_live
        while True:
            try:
                a.admit(tenant, [1])
            except BusyError:
                return a.num_live - before

    assert (fill(flood), fill(light), fill(heavy)) == (84, 16, 32)


def test_a_key_within_its_share_is_not_refused_for_anothers_long_prompt() -> None:
    a = admission(max_queued_tokens=100)
    long, other = Tenant(1, "long"), Tenant(2, "other")
    a.tenants = lambda: (long, other)
    a.admit(long, [5000])
    a.admit(other, [25])
    with pytest.raises(BusyError):
        a.admit(other, [1])


TENANTS = [Tenant(1, "a"), Tenant(2, "b", 3.0), Tenant(3, "c", 0.5)]


class Books(RuleBasedStateMachine):
    """Any order of asking, starting and ending keeps the books balanced and the bounds held."""

    waiting = Bundle("waiting")
    computed = Bundle("computed")

    def __init__(self) -> None:
        super().__init__()
        self.a = admission(max_queued_requests=16, max_queued_tokens=300)
        self.a.tenants = lambda: TENANTS
        self.asked = self.live = self.refused = self.ended = 0
        self.tokens = 0

    @rule(target=waiting, tenant=st.sampled_from(TENANTS), size=st.integers(1, 60))
    def ask(self, tenant: Tenant, size: int) -> tuple[Tenant, int] | None:
        self.asked += 1
        own = self.a.accounts.get(tenant.name)
        share = KEPT_SHARE * tenant.weight / sum(each.weight for each in TENANTS)
        within = (
            own is not None
            and own.num_live + 1 <= share * self.a.max_queued
            and own.waiting_tokens + size <= share * self.a.max_waiting_tokens
        )
        try:
            self.a.admit(tenant, [size])
        except BusyError as error:
            assert not within, "refused within its share"
            assert 1 <= error.retry_after <= MAX_RETRY_SECONDS
            self.refused += 1
            return None
        self.live += 1
        self.tokens += size
        return tenant, size

    @rule(target=computed, which=consumes(waiting))
    def start(self, which: tuple[Tenant, int] | None) -> tuple[Tenant, int] | None:
        if which is not None:
            self.a.started(*which)
            self.tokens -= which[1]
        return which

    @rule(which=consumes(waiting), reason=st.sampled_from(["abort", "error"]))
    def give_up(self, which: tuple[Tenant, int] | None, reason: str) -> None:
        if which is not None:
            self.a.ended(which[0], reason, num_prompt=which[1], num_generated=0, waited=True)
            self.tokens -= which[1]
            self.live, self.ended = self.live - 1, self.ended + 1

    @rule(which=consumes(computed), reason=st.sampled_from(["stop", "length", "abort", "error"]))
    def finish(self, which: tuple[Tenant, int] | None, reason: str) -> None:
        if which is not None:
            self.a.ended(which[0], reason, num_prompt=which[1], num_generated=2, waited=False)
            self.live, self.ended = self.live - 1, self.ended + 1

    @invariant()
    def balanced(self) -> None:
        a, counts = self.a, self.a.counts
        assert self.asked == counts.admitted + sum(counts.rejected.values())
        assert counts.admitted == a.num_live + sum(counts.ended.values())
        assert (a.num_live, a.waiting_tokens) == (self.live, self.tokens)
        assert sum(counts.ended.values()) == self.ended
        assert a.num_live == sum(account.num_live for account in a.accounts.values())
        assert a.waiting_tokens == sum(each.waiting_tokens for each in a.accounts.values())
        assert 0 <= a.num_waiting <= a.num_live <= a.max_live


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestBooks = Books.TestCase
