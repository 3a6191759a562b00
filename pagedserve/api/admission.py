"""Who is let in: bounds on what waits, quotas of API keys, and the counts of what became of it all.

    HTTP request ──enter──▶ open ──admit──▶ waiting ──started──▶ computed ──ended──▶ counted
                     │               │
                     └── 429 quota   └── 429 queue full          leave: the HTTP request is over

The room counts and refuses; it holds no request and knows no text. It belongs to the event loop's
thread. A sequence *waits* from `admit` until the engine reports that it computes it; one that is
preempted later does not wait again: it was promised its answer.

At every moment, in sequences: admitted = live + finished + aborted + failed; in HTTP requests: what
was refused is counted by reason and touches nothing else.

One bound serves all keys, but no key can take all of the queue: half of it is kept for the keys in
shares by weight, and is theirs alone while they use less. With g the share that is kept for a key:

    total + sum over keys of max(0, g - used by the key)  <=  bound

holds before and after every `admit`, so a key within its share is never refused for the others'
sake. Of what is computed nothing is kept: a key may have all of it while no other asks.
"""

from __future__ import annotations

import enum
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pagedserve.api.deadlines import Deadlines
from pagedserve.config import ServerConfig
from pagedserve.engine.channel import Ready
from pagedserve.errors import BusyError, RequestError

MIN_QUEUED_REQUESTS = 1024  # one HTTP request of the largest size always finds room when idle
MIN_QUEUED_TOKENS = 1 << 20
QUEUED_PER_SLOT = 8
QUEUED_CACHES = 4
BODIES = 64  # of the largest size that are in memory at a time, and not taken or refused yet
MAX_RETRY_SECONDS = 60  # a longer estimate is a guess about load that nobody can see
UNKNOWN_RETRY_SECONDS = 2  # before anything was measured
RATE_SECONDS = 10.0  # over which rates are averaged
KEPT_SHARE = 0.5  # of the bounds, for keys that use less than their share
REJECT_REASONS = ("queue_requests", "queue_tokens", "queue_bytes", "rate", "concurrency")
EXPIRE_REASONS = ("queue", "ttft", "total")

Clock = Callable[[], float]


class Scope(enum.Flag):
    """What an API key opens; every route wants one of these (`app.ROUTES`)."""

    USE = enum.auto()  # ask for answers
    METRICS = enum.auto()  # read the figures, which name all holders of keys
    ADMIN = enum.auto()  # change the state of the server


EVERYTHING = Scope.USE | Scope.METRICS | Scope.ADMIN


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever shares an API key's name. `id` is what the engine knows of it.

    `scope`: what its keys open. `weight`: its share against the others'. `requests_per_minute` and
    `max_open` (requests and streams at a time): 0 is no limit. `best_priority`: the lowest number
    that its requests may give as their priority, and what they have without one; None is any, and
    0 without one.
    """

    id: int = 0
    name: str = "default"
    weight: float = 1.0
    requests_per_minute: int = 0
    max_open: int = 0
    best_priority: int | None = None
    scope: Scope = Scope.USE

    def priority(self, given: int | None) -> int:
        """The priority of a request that gives one, or none. Raises RequestError."""
        best = self.best_priority
        if given is None:
            return best or 0
        if best is not None and given < best:
            raise RequestError(
                f"priority must be at least {best} for this API key, got {given}; lower goes "
                "first, before the requests of other keys too",
                param="priority",
            )
        return given


ANYBODY = Tenant(scope=EVERYTHING)  # where no key is needed; and who has the operator's own


@dataclass(frozen=True, slots=True)
class Visit:
    """One HTTP request that was let in: whose, and until when."""

    tenant: Tenant = ANYBODY
    deadlines: Deadlines = Deadlines()


class Rate:
    """How much happens a second, the last RATE_SECONDS counting most."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._began = self._at = clock()
        self._sum = 0.0  # decays by e in RATE_SECONDS

    def add(self, amount: float) -> None:
        """`amount` happened now."""
        self._decay()
        self._sum += amount

    def per_second(self) -> float:
        """The rate; of a shorter time while less than RATE_SECONDS were seen."""
        self._decay()
        seen = 1.0 - math.exp(-(self._at - self._began) / RATE_SECONDS)
        return self._sum / (RATE_SECONDS * seen) if seen > 0 else 0.0

    def _decay(self) -> None:
        now = self._clock()
        self._sum *= math.exp((self._at - now) / RATE_SECONDS)
        self._at = now


@dataclass(slots=True)
class Account:
    """What one tenant has open, may still do, and has used. `allowance`: requests of a minute."""

    closing: Rate
    allowance: float
    refilled_at: float
    num_open: int = 0  # HTTP requests
    num_live: int = 0  # sequences
    waiting_tokens: int = 0  # of prompts
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(slots=True)
class Counts:
    """Sequences, but for `rejected` at the door, where it counts HTTP requests."""

    admitted: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # by FinishReason
    rejected: Counter[str] = field(default_factory=Counter)  # HTTP requests, by reason
    expired: Counter[str] = field(default_factory=Counter)  # HTTP requests, by deadline


class Admission:
    """The bounds, the quotas and the counts of one server."""

    def __init__(self, config: ServerConfig, clock: Clock = time.monotonic):
        self.tenants: Callable[[], Iterable[Tenant]] = tuple  # who has a share kept
        self._config = config
        self._clock = clock
        self._ending = Rate(clock)  # sequences that ended
        self._starting = Rate(clock)  # prompt tokens that left the queue
        self._accounts: dict[str, Account] = {}
        self.counts = Counts()
        self.num_live = 0  # sequences
        self.num_waiting = 0  # sequences
        self.waiting_tokens = 0  # of prompts
        self.body_bytes = 0  # of requests that are neither taken nor refused yet
        self.max_queued = self.max_live = MIN_QUEUED_REQUESTS
        self.max_waiting_tokens = MIN_QUEUED_TOKENS

    def settle(self, ready: Ready) -> None:
        """Take the bounds that depend on the engine from its report."""
        queued, tokens = self._config.max_queued_requests, self._config.max_queued_tokens
        if queued is None:
            queued = max(QUEUED_PER_SLOT * ready.max_num_seqs, MIN_QUEUED_REQUESTS)
        if tokens is None:
            cache = ready.num_blocks * ready.block_size
            tokens = max(QUEUED_CACHES * cache, MIN_QUEUED_TOKENS)
        self.max_queued, self.max_live = queued, ready.max_num_seqs + queued
        self.max_waiting_tokens = tokens

    @property
    def accounts(self) -> dict[str, Account]:
        """Every tenant that has been here, by name."""
        return self._accounts

    # ── an HTTP request ──────────────────────────────────────────────────────────────────────────

    def enter(self, tenant: Tenant) -> None:
        """Count a request that came in; `leave` must follow. Raises BusyError past a quota."""
        account = self._account(tenant)
        limit = tenant.max_open or self._config.max_requests_per_key
        if limit and account.num_open >= limit:
            raise self._refused(
                "concurrency",
                f"this API key has {account.num_open} requests open and may have {limit}; wait "
                "for one of them to end",
                self._seconds(1, account.closing.per_second()),
            )
        if tenant.requests_per_minute:
            self._spend(tenant, account)
        account.num_open += 1

    def leave(self, tenant: Tenant) -> None:
        """A request that entered is over."""
        account = self._account(tenant)
        assert account.num_open > 0, "left without having entered"
        account.num_open -= 1
        account.closing.add(1)

    def hold_body(self, num_bytes: int) -> None:
        """Bytes of a body came in; `release_body` must follow. Raises BusyError past the bound."""
        most = BODIES * self._config.max_body_bytes
        if self.body_bytes + num_bytes > most:
            raise self._refused(
                "queue_bytes",
                f"{self.body_bytes} bytes of requests are being read, of {most} that may be; try "
                "again later",
                UNKNOWN_RETRY_SECONDS,
            )
        self.body_bytes += num_bytes

    def release_body(self, num_bytes: int) -> None:
        """What a request brought is taken, or refused, or its client has gone."""
        assert self.body_bytes >= num_bytes, "more bytes left than came"
        self.body_bytes -= num_bytes

    def _spend(self, tenant: Tenant, account: Account) -> None:
        """Take one from the minute's requests: a bucket that refills all the time."""
        now, limit = self._clock(), tenant.requests_per_minute
        refilled = account.allowance + (now - account.refilled_at) * limit / 60.0
        account.allowance, account.refilled_at = min(refilled, float(limit)), now
        if account.allowance < 1.0:
            raise self._refused(
                "rate",
                f"this API key may send {limit} requests a minute",
                max(1, math.ceil((1.0 - account.allowance) * 60.0 / limit)),
            )
        account.allowance -= 1.0

    # ── its sequences ────────────────────────────────────────────────────────────────────────────

    def check_room(self, tenant: Tenant) -> None:
        """Raise BusyError where not even one sequence more is taken: before it is tokenised."""
        self._check(tenant, 1, 0)

    def check_time(self, visit: Visit) -> None:
        """Raise DeadlineError for a visit that is late before anything was computed for it."""
        now, deadlines = time.monotonic(), visit.deadlines
        if now >= deadlines.next(computed=False, written=False):
            reason, error = deadlines.expired(now, computed=False, written=False)
            self.counts.expired[reason] += 1
            raise error

    def admit(self, tenant: Tenant, prompt_lengths: list[int]) -> None:
        """Let in a sequence of each of `prompt_lengths` (tokens), or raise BusyError for all.

        Raises RequestError where there would be no room for them even if nothing else were live.
        """
        num_sequences, num_tokens = len(prompt_lengths), sum(prompt_lengths)
        if num_sequences > self.max_live:
            raise RequestError(
                f"prompts times n is {num_sequences}; this server takes {self.max_live} sequences "
                "at a time. Send fewer in one request.",
                param="n",
            )
        self._check(tenant, num_sequences, num_tokens)
        self.counts.admitted += num_sequences
        self.num_live += num_sequences
        self.num_waiting += num_sequences
        self.waiting_tokens += num_tokens
        account = self._account(tenant)
        account.num_live += num_sequences
        account.waiting_tokens += num_tokens

    def started(self, tenant: Tenant, num_prompt: int) -> None:
        """A sequence left the queue: the engine computes it."""
        self._unqueue(tenant, num_prompt)
        self._starting.add(num_prompt)

    def ended(
        self, tenant: Tenant, reason: str, *, num_prompt: int, num_generated: int, waited: bool
    ) -> None:
        """A sequence is over; `waited`: it never left the queue."""
        account = self._account(tenant)
        if waited:
            self._unqueue(tenant, num_prompt)
        else:
            account.prompt_tokens += num_prompt
            account.generation_tokens += num_generated
        assert account.num_live > 0, "more sequences ended than were admitted"
        account.num_live -= 1
        self.num_live -= 1
        self._ending.add(1)
        self.counts.ended[reason] += 1

    def _unqueue(self, tenant: Tenant, num_prompt: int) -> None:
        account = self._account(tenant)
        assert self.num_waiting > 0 and account.waiting_tokens >= num_prompt, "nothing waits"
        self.num_waiting -= 1
        self.waiting_tokens -= num_prompt
        account.waiting_tokens -= num_prompt

    def _check(self, tenant: Tenant, num_sequences: int, num_tokens: int) -> None:
        """Raise BusyError where the queue has no room for so much of `tenant`."""
        excess = self._excess(
            tenant, num_sequences, self.max_live, self.max_queued, lambda each: each.num_live
        )
        if excess > 0:
            raise self._refused(
                "queue_requests",
                f"the queue is full: {self.num_live} sequences are live of {self.max_live} that "
                f"may be, and this request has {num_sequences} more; try again later",
                self._seconds(min(excess, self.num_live), self._ending.per_second()),
            )
        most = self.max_waiting_tokens
        excess = self._excess(tenant, num_tokens, most, most, lambda each: each.waiting_tokens)
        if excess > 0:
            raise self._refused(
                "queue_tokens",
                f"the queue is full: {self.waiting_tokens} prompt tokens wait of "
                f"{self.max_waiting_tokens} that may, and this request has {num_tokens} more; try "
                "again later",
                self._seconds(min(excess, self.waiting_tokens), self._starting.per_second()),
            )

    def _excess(
        self,
        tenant: Tenant,
        amount: int,
        bound: int,
        queue: int,
        used: Callable[[Account], int],
    ) -> float:
        """By how much `amount` more of `tenant` passes `bound`; 0 or less: there is room.

        `queue`: the part of the bound of which shares are kept.
        """
        own, all_used = used(self._account(tenant)), sum(map(used, self._accounts.values()))
        if not all_used:
            return 0.0  # before nobody a request of any size is taken: else it could never be
        tenants = list(self.tenants())
        if len(tenants) < 2:
            return all_used + amount - bound
        unit = KEPT_SHARE * queue / sum(each.weight for each in tenants)
        if own + amount <= unit * tenant.weight:
            return 0.0
        kept = sum(
            max(0.0, unit * each.weight - used(self._account(each)))
            for each in tenants
            if each.name != tenant.name
        )
        return all_used + amount + kept - bound

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────

    def _account(self, tenant: Tenant) -> Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            allowance = float(tenant.requests_per_minute)
            account = Account(Rate(self._clock), allowance, self._clock())
            self._accounts[tenant.name] = account
        return account

    def _refused(self, reason: str, message: str, retry_after: int) -> BusyError:
        self.counts.rejected[reason] += 1
        code = "queue_full" if reason.startswith("queue") else "rate_limit_exceeded"
        return BusyError(message, retry_after=retry_after, code=code)

    @staticmethod
    def _seconds(amount: float, per_second: float) -> int:
        """How long `amount` takes, in whole seconds that a client may be told."""
        if per_second <= 0:
            return UNKNOWN_RETRY_SECONDS
        # A rate that has decayed to nearly nothing makes it infinite.
        return math.ceil(min(max(amount / per_second, 1.0), MAX_RETRY_SECONDS))
