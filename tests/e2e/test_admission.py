"""The door before the demo model: a flood of one key, deadlines in every state, a small cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import LiveServer

PATH = "/v1/completions"
CROWD = 24
LONG = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "12 + 34 = ", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of two keys with room for four sequences at a time."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "keys").write_text("flood:f\nlight:l\nscrape:m scope=metrics\n")
    flags = ("--api-key-file", str(folder / "keys"), "--max-num-seqs", "4")
    live = LiveServer(folder / "log", *flags).ready()
    yield live
    live.stop()


def client(server: LiveServer, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=server.url, timeout=120, headers={"Authorization": f"Bearer {key}"}
    )


def figures(server: LiveServer) -> dict[str, float]:
    """The figures of /metrics, by name and the label that is not the model's."""
    with client(server, "m") as http:
        text = http.get("/metrics").text
    return {
        " ".join([sample.name.removeprefix("pagedserve:"), *labels_of(sample.labels)]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels_of(labels: dict[str, str]) -> list[str]:
    return [value for name, value in labels.items() if name != "model_name"]


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def until_admitted(server: LiveServer, count: float) -> None:
    """Wait until so many sequences were let in since the start."""
    while figures(server)["admitted_sequences_total"] < count:
        pass


def test_a_flood_of_one_key_is_overtaken_by_another_and_says_the_same(shared: LiveServer) -> None:
    """Order of service by counts: how much of the flood is served before each short answer."""
    with client(shared, "f") as flood, client(shared, "l") as light:
        alone = text_of(flood.post(PATH, json=LONG)), text_of(light.post(PATH, json=SHORT))
        before = figures(shared)["admitted_sequences_total"]
        with ThreadPoolExecutor(CROWD) as pool:
            crowd = [pool.submit(flood.post, PATH, json=LONG) for _ in range(CROWD)]
            until_admitted(shared, before + CROWD)
            ahead = []
            for _ in range(3):
                done = sum(each.done() for each in crowd)
                assert text_of(light.post(PATH, json=SHORT)) == alone[1]
                ahead.append(sum(each.done() for each in crowd) - done)
            # First come, first served would be twenty; one that ends by chance is no harm.
            assert max(ahead) <= 8, ahead
            assert not all(each.done() for each in crowd)
            assert {text_of(each.result()) for each in crowd} == {alone[0]}
    found = figures(shared)
    assert found["live_sequences"] == found["queue_tokens"] == 0
    assert found["key_generation_tokens_total flood"] == (CROWD + 1) * LONG["max_tokens"]


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which ended as it should."""
    parts = answer.text.removesuffix("\n\n").split("\n\n")
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def test_a_deadline_ends_a_request_wherever_it_is_and_frees_what_it_had(
    shared: LiveServer,
) -> None:
    late = {"X-Request-Timeout": "0.15"}
    before = figures(shared)
    with client(shared, "f") as http, ThreadPoolExecutor(8) as pool:
        answer = http.post(PATH, json=LONG | {"max_tokens": 900}, headers=late)  # while it decodes
        assert answer.status_code == 408
        stream = events(
            http.post(PATH, json=LONG | {"max_tokens": 900, "stream": True}, headers=late)
        )
        assert stream[-1]["error"]["code"] == "request_timeout"
        assert len(stream) > 1  # what was written in time
        prefill = {"prompt": ["fox " * 450] * 60, "max_tokens": 1}  # seconds of prefill
        assert http.post(PATH, json=prefill, headers=late).status_code == 408
        begun = figures(shared)["admitted_sequences_total"]
        busy = [pool.submit(http.post, PATH, json=LONG | {"max_tokens": 400}) for _ in range(8)]
        until_admitted(shared, begun + 8)
        queued = {"X-Request-Timeout": "0.01"}
        assert http.post(PATH, json=LONG, headers=queued).status_code == 408
        assert all(each.result().status_code == 200 for each in busy)
    after = figures(shared)
    expired = "expired_requests_total total"
    assert after[expired] == before[expired] + 4
    while figures(shared)["num_requests_running"]:
        pass
    after = figures(shared)
    assert after["kv_cache_usage_perc"] == after["live_sequences"] == after["queue_requests"] == 0
    ended = [after[f"request_success_total {reason}"] for reason in REASONS]
    assert after["admitted_sequences_total"] == sum(ended)


REASONS = ("stop", "length", "abort", "error")


def test_what_the_cache_can_never_hold_is_refused_at_once(tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "log", "--num-gpu-blocks-override", "8").ready()
    try:
        with httpx.Client(base_url=live.url, timeout=30) as http:
            refused = http.post(PATH, json={"prompt": "fox " * 200, "max_tokens": 1})
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "context_length_exceeded"
            assert live.metric("admitted_sequences_total") == 0
            fits = http.post(PATH, json={"prompt": "fox", "max_tokens": 100})
            assert fits.status_code == 200
    finally:
        live.stop()
