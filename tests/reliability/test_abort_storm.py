"""Thousands of requests cut at random moments, in every state there is: nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import LiveServer
from tests.e2e.test_server import eventually
from tests.reliability.accounts import check_nothing_is_left, descriptors
from tests.reliability.clients import CUTS, Ask, cut_short, patient, random_ask

AT_A_TIME = 48
# Few slots and a cache too small for them: what is cut waits, is computed, or was preempted.
FLAGS = ("--max-num-seqs", "12", "--num-gpu-blocks-override", "120", "--max-queued-requests", "400")
# Alone these twelve outgrow the cache: some of them are preempted, whatever else comes.
TWELVE = Ask({"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "n": 12, "stream": True})
KNOWN = {"prompt": "Once upon a time there was a", "max_tokens": 40, "temperature": 0}


def answer(server: LiveServer) -> tuple[str, float]:
    """The text of a known request, and the seconds to it."""
    began = time.perf_counter()
    got = httpx.post(f"{server.url}/v1/completions", json=KNOWN, timeout=60)
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["text"], time.perf_counter() - began


async def storm(url: str, count: int, r: random.Random) -> Counter[str]:
    """`count` requests, most of them cut; how each went."""
    outcomes: Counter[str] = Counter()
    slots = asyncio.Semaphore(AT_A_TIME)

    async def one(seed: int) -> None:
        own = random.Random(seed)
        async with slots:
            client = patient if own.random() < 0.1 else cut_short
            outcomes[await client(url, random_ask(own), own)] += 1

    first = asyncio.create_task(patient(url, TWELVE, r))
    await asyncio.gather(*(one(r.randrange(1 << 60)) for _ in range(count)))
    outcomes[await first] += 1
    return outcomes


@pytest.mark.parametrize("count", [400, pytest.param(5_000, marks=pytest.mark.marathon)])
def test_requests_cut_in_every_state_leave_nothing_behind(count: int, tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "log", *FLAGS).ready()
    try:
        answer(live)
        text, before = answer(live)
        open_before = descriptors(live.process.pid)
        engine = live.engine_pid()
        outcomes = asyncio.run(storm(live.url, count, random.Random(count)))
        found = check_nothing_is_left(live)
        again, after = answer(live)
        assert again == text
        assert live.engine_pid() == engine, "the engine did not live through it"
        eventually(lambda: descriptors(live.process.pid) <= open_before)
        assert found["num_preemptions_total"] and found["request_success_total abort"] > count / 10
        assert found["request_success_total error"] == 0
        assert live.interrupt() == 0
    finally:
        live.stop()
    assert "Traceback" not in live.text()
    assert {cut.__name__ for cut in CUTS} <= outcomes.keys() and outcomes["answered"]
    facts = {"storm": count, "outcomes": outcomes, "ms_before": before, "ms_after": after}
    print(json.dumps(facts), file=sys.stderr)
