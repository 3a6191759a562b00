"""/metrics: vLLM's names, true figures, valid text format."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pagedserve.api.metrics import FIRST_TOKEN, Buckets, Metrics
from pagedserve.engine.channel import Stats
from tests.api.serving import Server


def test_buckets_count_what_falls_at_or_below_each_bound() -> None:
    buckets = Buckets([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 7.0):
        buckets.add(value)
    assert buckets.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert buckets.sum == 10.0


def test_the_text_parses_and_has_the_names_that_dashboards_know() -> None:
    metrics = Metrics('a "quoted" name')
    metrics.stats = Stats(3, 4, 10, 5, 1, 100, 50, 9)
    metrics.ended(7, 5, "stop")
    metrics.first_token.add(0.05)
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    short = {name.removeprefix("pagedserve:") for name in families}
    assert short >= {
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("num_preemptions", "prefix_cache_queries", "prefix_cache_hits"),
        *("prompt_tokens", "generation_tokens", "request_success"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens"),
    }
    first = families["pagedserve:time_to_first_token_seconds"]
    assert len(first.samples) == len(FIRST_TOKEN) + 3
    assert families["pagedserve:kv_cache_usage_perc"].samples[0].value == 0.5
    assert families["pagedserve:kv_cache_usage_perc"].samples[0].labels["model_name"] == (
        'a "quoted" name'
    )
    assert metrics.render() == metrics.render()


def test_requests_are_counted_once_by_how_they_ended(server: Server) -> None:
    def counts() -> list[float]:
        return [
            *(server.metric("request_success_total", finished_reason=r) for r in REASONS),
            server.metric("prompt_tokens_total"),
            server.metric("generation_tokens_total"),
        ]

    before = counts()
    post = server.http.post
    post("/v1/completions", json={"prompt": "hi", "max_tokens": 3})
    post("/v1/completions", json={"prompt": "hi", "max_tokens": 9, "stop": "i"})  # after <s>hi
    post("/v1/completions", json={"prompt": "hi", "max_tokens": 9, "seed": 6662})  # after two
    rise = [after - now for after, now in zip(counts(), before, strict=True)]
    assert rise == [1, 1, 0, 1, 9, 3 + 3 + 2]


REASONS = ("stop", "length", "abort", "error")
