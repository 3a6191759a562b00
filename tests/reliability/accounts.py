"""What a server must come to once everybody has left: nothing held, everything counted."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import LiveServer
from tests.e2e.test_server import eventually

REASONS = ("stop", "length", "abort", "error")
HELD = ("num_requests_running", "num_requests_waiting", "live_sequences", "queue_requests")
HELD += ("queue_tokens", "open_requests", "kv_cache_usage_perc")


def figures(server: LiveServer) -> dict[str, float]:
    """/metrics by name, and the label that is not the model's."""
    status, text = server.get("/metrics")
    assert status == 200, text
    return {
        " ".join(
            [sample.name.removeprefix("pagedserve:")]
            + [value for name, value in sample.labels.items() if name != "model_name"]
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def check_nothing_is_left(server: LiveServer, seconds: float = 30) -> dict[str, float]:
    """Every block is free and every sequence that was let in has ended in one way; the figures."""

    def quiet() -> bool:
        found = figures(server)
        return not any(found[name] for name in HELD) and found["kv_blocks_free"] > 0

    eventually(quiet, seconds)
    found = figures(server)
    assert found["kv_blocks_free"] == found["kv_blocks"]
    ended = sum(found[f"request_success_total {reason}"] for reason in REASONS)
    assert found["admitted_sequences_total"] == ended
    return found


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
