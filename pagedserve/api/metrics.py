"""The server's figures, in Prometheus' text format, under the names vLLM gave them.

Recording is an addition to an int or a bucket, because it happens for every token; the library's
own histograms take a lock and a linear search. They are only made to render `/metrics`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pagedserve.api.admission import EXPIRE_REASONS, REJECT_REASONS, Admission
from pagedserve.engine.channel import Stats
from pagedserve.errors import without_places

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

PREFIX = "pagedserve:"
LATENCY = [
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
]
FIRST_TOKEN = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
]
INTER_TOKEN = [
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
]
TOKENS = [float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)]


class Buckets:
    """A histogram: how many values fell at or below each bound, and their sum."""

    def __init__(self, bounds: list[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count `value`."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' form: (upper bound, values up to it)."""
        total, rows = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Metrics:
    """Figures of one served model. `stats` is the engine's last message, None before the first.

    `admission` has those of the door; they are read when `/metrics` is.
    """

    def __init__(self, model_name: str, admission: Admission | None = None):
        self._admission = admission
        self.stats: Stats | None = None
        self.engine_restarts = 0
        self.quarantined = 0
        self.last_death: str | None = None
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.ended_by_reason = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.first_token = Buckets(FIRST_TOKEN)
        self.inter_token = Buckets(INTER_TOKEN)
        self.request_latency = Buckets(LATENCY)
        self.request_prompt_tokens = Buckets(TOKENS)
        self.request_generation_tokens = Buckets(TOKENS)
        self._labels = {"model_name": model_name}
        self._registry: CollectorRegistry | None = None

    def ended(self, num_prompt: int, num_generated: int, reason: str) -> None:
        """Count a sequence that ended, with its tokens."""
        self.prompt_tokens += num_prompt
        self.generation_tokens += num_generated
        self.request_prompt_tokens.add(num_prompt)
        self.request_generation_tokens.add(num_generated)
        self.ended_by_reason[reason] = self.ended_by_reason.get(reason, 0) + 1

    def render(self) -> bytes:
        """The text of `/metrics`."""
        from prometheus_client import CollectorRegistry, generate_latest

        if self._registry is None:
            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The library's families; it calls this."""
        yield from self._engine_families()
        yield self._counter("prompt_tokens", "Prompt tokens of ended requests", self.prompt_tokens)
        yield self._counter(
            "generation_tokens", "Tokens written for ended requests", self.generation_tokens
        )
        yield self._by_label(
            "request_success", "Ended sequences", "finished_reason", self.ended_by_reason
        )
        if self._admission is not None:
            yield from self._admission_families(self._admission)
        yield from self._death_families()
        for name, text, buckets in (
            ("time_to_first_token_seconds", "From arrival to first token", self.first_token),
            ("inter_token_latency_seconds", "Between tokens of a request", self.inter_token),
            ("e2e_request_latency_seconds", "Whole HTTP requests", self.request_latency),
            ("request_prompt_tokens", "Prompt tokens of a request", self.request_prompt_tokens),
            (
                "request_generation_tokens",
                "Tokens written for a request",
                self.request_generation_tokens,
            ),
        ):
            yield self._histogram(name, text, buckets)

    def _engine_families(self) -> Iterator[Metric]:
        """What the engine last reported; before it did, it has done nothing."""
        stats = self.stats or Stats(0, 0, 0, 0, 0, 0, 0, 0)
        used = stats.blocks_used / max(stats.blocks_total, 1)
        yield self._gauge("num_requests_running", "Sequences being computed", stats.running)
        yield self._gauge("num_requests_waiting", "Sequences in the queue", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Used share of the KV blocks; 1 is full", used)
        yield self._gauge("kv_blocks", "Blocks of the KV cache", stats.blocks_total)
        free = stats.blocks_total - stats.blocks_used
        yield self._gauge("kv_blocks_free", "KV blocks that no sequence holds", free)
        yield self._counter("num_preemptions", "Preempted sequences", stats.preemptions)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the cache", stats.prefix_queries
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens found in the cache", stats.prefix_hits
        )
        yield self._counter("engine_steps", "Steps of the engine", stats.steps)
        yield self._counter(
            "engine_broken_steps",
            "Steps that broke off and were computed again",
            stats.broken_steps,
        )

    def _death_families(self) -> Iterator[Metric]:
        """Engines that died, and of what the last one."""
        from prometheus_client.core import GaugeMetricFamily

        yield self._counter(
            "engine_restarts", "Engines started in the place of dead ones", self.engine_restarts
        )
        yield self._counter(
            "requests_quarantined",
            "Sequences failed because the engine died on them again and again",
            self.quarantined,
        )
        family = GaugeMetricFamily(
            PREFIX + "engine_last_death_info",
            "1, with the cause of the engine's last death",
            labels=[*self._labels, "cause"],
        )
        if self.last_death is not None:
            cause = without_places(self.last_death)
            family.add_metric([*self._labels.values(), cause], 1.0)
        yield family

    def _admission_families(self, admission: Admission) -> Iterator[Metric]:
        """What was let in, refused and given up, and what each API key used."""
        counts = admission.counts
        yield self._gauge(
            "queue_requests", "Sequences that no step has computed yet", admission.num_waiting
        )
        yield self._gauge(
            "queue_tokens", "Prompt tokens that wait with them", admission.waiting_tokens
        )
        yield self._gauge("live_sequences", "Sequences admitted, not ended", admission.num_live)
        yield self._gauge(
            "open_requests",
            "HTTP requests under way, those that are still being read among them",
            sum(account.num_open for account in admission.accounts.values()),
        )
        yield self._counter("admitted_sequences", "Sequences let in", counts.admitted)
        yield self._by_label(
            "rejected_requests",
            "HTTP requests refused with 429",
            "reason",
            dict.fromkeys(REJECT_REASONS, 0) | counts.rejected,
        )
        yield self._by_label(
            "expired_requests",
            "HTTP requests given up at a deadline",
            "reason",
            dict.fromkeys(EXPIRE_REASONS, 0) | counts.expired,
        )
        accounts = admission.accounts.items()
        yield self._by_label(
            "key_prompt_tokens",
            "Prompt tokens of an API key's ended sequences that were computed",
            "key",
            {name: account.prompt_tokens for name, account in accounts},
        )
        yield self._by_label(
            "key_generation_tokens",
            "Tokens written for an API key's ended sequences",
            "key",
            {name: account.generation_tokens for name, account in accounts},
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Metric:
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets.cumulative(), buckets.sum)
        return family

    def _by_label(self, name: str, text: str, label: str, counts: Mapping[str, float]) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(PREFIX + name, text, labels=[*self._labels, label])
        for value, count in counts.items():
            family.add_metric([*self._labels.values(), value], count)
        return family
