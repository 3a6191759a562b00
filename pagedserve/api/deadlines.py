"""When a request's time is over: what the client asked for and what the server allows.

    X-Request-Timeout ──┐
    --request-timeout ──┴─▶ in all     408 where the client's own time is over, else 504
    --queue-timeout ──────▶ until the first of its sequences is computed
    --ttft-timeout ───────▶ until its first token

Times count from the moment the request's head was read, so that a slow upload and tokenising are in
them. All are `time.monotonic()` seconds; infinity is no limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagedserve.config import ServerConfig
from pagedserve.errors import DeadlineError, RequestError, shorten

HEADER = "X-Request-Timeout"
MAX_SECONDS = 1e6  # far above any answer; a timer must not overflow


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Moments by which a request must be computed, have its first token, and be over.

    `seconds` are the three limits as they were given, for messages; `by_client`: the last one is
    the client's own.
    """

    queue: float = math.inf
    first_token: float = math.inf
    total: float = math.inf
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    by_client: bool = False

    @classmethod
    def of(cls, config: ServerConfig, header: str | None, arrival: float) -> Deadlines:
        """Those of a request that came at `arrival`. Raises RequestError for a bad header."""
        own = None if header is None else read_seconds(header)
        total, by_client = config.request_timeout, False
        if own is not None and (not total or own <= total):
            total, by_client = own, True
        limits = (config.queue_timeout, config.ttft_timeout, total)
        queue, first, whole = (arrival + limit if limit else math.inf for limit in limits)
        return cls(queue, first, whole, seconds=limits, by_client=by_client)

    def next(self, *, computed: bool, written: bool) -> float:
        """The first moment that matters to a request that is, or is not, computed and written."""
        return min(self._moments(computed, written).values())

    def expired(self, now: float, *, computed: bool, written: bool) -> tuple[str, DeadlineError]:
        """The reason, for /metrics, and the error of a request whose next moment has come.

        Where several have come, because somebody looked late, it is the first of them.
        """
        moments = self._moments(computed, written)
        kind = min(moments, key=moments.__getitem__)
        assert moments[kind] <= now, "no deadline has passed"
        return kind, self._error(kind)

    def _moments(self, computed: bool, written: bool) -> dict[str, float]:
        moments = {"total": self.total}
        if not written:
            moments["ttft"] = self.first_token
            if not computed:
                moments["queue"] = self.queue
        return moments

    def _error(self, kind: str) -> DeadlineError:
        queue, first, total = self.seconds
        if kind == "queue":
            text = f"the request waited {queue:g} s, as long as this server lets one wait"
        elif kind == "ttft":
            text = f"there was no first token within the {first:g} s that this server allows"
        elif self.by_client:
            text = f"the request took longer than the {total:g} s of its {HEADER}"
        else:
            text = f"the request took longer than the {total:g} s that this server allows"
        code = {"queue": "queue_timeout", "ttft": "ttft_timeout", "total": "request_timeout"}[kind]
        return DeadlineError(text, code=code, by_client=kind == "total" and self.by_client)


def read_seconds(header: str) -> float:
    """The seconds that X-Request-Timeout says. Raises RequestError unless they are positive."""
    try:
        seconds = float(header) if header.isascii() and len(header) <= 32 else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS:  # NaN compares false
        raise RequestError(
            f"{HEADER} must be a number of seconds above 0 and at most {MAX_SECONDS:g}, such as "
            f"2.5; got {shorten(ascii(header), 48)}",
            param=HEADER,
        )
    return seconds
