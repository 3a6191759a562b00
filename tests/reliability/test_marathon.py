"""Everything at once, for long: more load than a server can carry, an engine that keeps dying.

Open-loop arrivals of every kind of client: patient, slow, cut short, with deadlines, with bad
requests. Meanwhile the engine is killed or stopped, canaries with known answers must not sing
another song, and memory and file descriptors are watched. At the end everything is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import LiveServer
from tests.e2e.test_server import eventually
from tests.reliability.accounts import check_nothing_is_left, descriptors, resident_bytes
from tests.reliability.clients import Ask, bad_ask, cut_short, patient, random_ask, slow
from tests.reliability.test_recovery import next_engine

FLAGS = (
    *("--max-num-seqs", "16", "--num-gpu-blocks-override", "200", "--max-queued-requests", "64"),
    *("--engine-stall-timeout", "2", "--max-engine-restarts", "1000", "--queue-timeout", "20"),
)
REQUESTS_A_SECOND = 30.0
MAX_CLIENTS = 150  # sockets of ours; whoever comes beyond that is counted and not sent
CANARIES = ["12 + 34 = ", "Once upon a time there was a", "The fox went to the river and", "a"]
SAMPLE_SECONDS = 0.5
MOST_GROWTH = 32 << 20  # bytes from one half of the run to the other: caches that fill, arenas


@dataclass
class Run:
    """What a marathon has seen so far."""

    url: str
    until: float
    r: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    sung: int = 0
    harms: Counter[str] = field(default_factory=Counter)
    server_bytes: list[int] = field(default_factory=list)
    server_files: list[int] = field(default_factory=list)
    engine_bytes: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until


async def load(run: Run) -> None:
    """Clients come at random moments, whatever became of those before."""
    clients: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as group:
        while not run.over:
            await asyncio.sleep(run.r.expovariate(REQUESTS_A_SECOND))
            if len(clients) >= MAX_CLIENTS:
                run.outcomes["not sent"] += 1
                continue
            task = group.create_task(visit(run, random.Random(run.r.randrange(1 << 60))))
            clients.add(task)
            task.add_done_callback(clients.discard)


async def visit(run: Run, r: random.Random) -> None:
    """One client."""
    kind = r.random()
    client: Callable[[str, Ask, random.Random], Awaitable[str]]
    client = cut_short if kind < 0.3 else slow if kind < 0.4 else patient
    ask = bad_ask(r) if kind > 0.93 else random_ask(r)
    run.outcomes[await client(run.url, ask, r)] += 1


async def sing(run: Run, songs: dict[str, str]) -> None:
    """Ask again and again what is known; a full queue may send us away, nothing else may happen."""
    async with httpx.AsyncClient(base_url=run.url, timeout=120) as http:
        while not run.over:
            for prompt, song in songs.items():
                answer = await http.post("/v1/completions", json=canary(prompt))
                if answer.status_code in (429, 504):
                    run.outcomes["canary not let in"] += 1
                    await asyncio.sleep(0.2)
                    continue
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == song, "a canary sings another song"
                run.sung += 1


def canary(prompt: str) -> dict[str, object]:
    """Before others, so that it is heard under any load."""
    return {
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 48,
        "ignore_eos": True,
        "priority": -1,
    }


async def harm(run: Run, live: LiveServer, pause: tuple[float, float]) -> None:
    """Kill or stop one engine after the other, each some seconds into its life."""
    engine = 0
    while True:
        await asyncio.sleep(run.r.uniform(*pause))
        if run.over:
            return
        engine = await asyncio.to_thread(next_engine, live, engine)
        order = run.r.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        os.kill(engine, order)
        run.harms[order.name] += 1


async def watch(run: Run, live: LiveServer) -> None:
    """Memory and files of both processes."""
    while not run.over:
        await asyncio.sleep(SAMPLE_SECONDS)
        run.server_bytes.append(resident_bytes(live.process.pid))
        run.server_files.append(descriptors(live.process.pid))
        with contextlib.suppress(ValueError, OSError):  # between two engines
            run.engine_bytes.append(resident_bytes(live.engine_pid()))


def growth(samples: list[int]) -> float:
    """From the second quarter to the last, between their medians: the first is warming up."""
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


async def everything(run: Run, live: LiveServer, songs: dict[str, str], pause: float) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(load(run))
        group.create_task(sing(run, songs))
        group.create_task(watch(run, live))
        group.create_task(harm(run, live, (pause, 3 * pause)))


def songs_of(live: LiveServer) -> dict[str, str]:
    songs = {}
    for prompt in CANARIES:
        answer = httpx.post(f"{live.url}/v1/completions", json=canary(prompt), timeout=60)
        assert answer.status_code == 200, answer.text
        songs[prompt] = answer.json()["choices"][0]["text"]
    return songs


@pytest.mark.parametrize(
    ("seconds", "pause"), [(25, 4.0), pytest.param(1800, 15.0, marks=pytest.mark.marathon)]
)
def test_a_server_under_everything_at_once_stays_whole(
    seconds: float, pause: float, tmp_path: Path
) -> None:
    live = LiveServer(tmp_path / "log", *FLAGS).ready()
    try:
        songs = songs_of(live)
        files_before = descriptors(live.process.pid)
        run = Run(live.url, time.monotonic() + seconds, random.Random(int(seconds)))
        asyncio.run(everything(run, live, songs, pause))
        found = check_nothing_is_left(live, 60)
        assert songs_of(live) == songs
        eventually(lambda: descriptors(live.process.pid) <= files_before)
        assert live.get("/livez")[0] == live.get("/readyz")[0] == 200
        assert live.interrupt() == 0
    finally:
        live.stop()
    facts = {
        "marathon_s": seconds,
        "outcomes": run.outcomes,
        "canaries": run.sung,
        "harms": run.harms,
        "restarts": found["engine_restarts_total"],
        "admitted": found["admitted_sequences_total"],
        "server_mib": [round(each / 2**20) for each in (run.server_bytes[0], run.server_bytes[-1])],
        "server_growth_mib": round(growth(run.server_bytes) / 2**20, 1),
        "engine_growth_mib": round(growth(run.engine_bytes) / 2**20, 1),
        "server_files_growth": growth(run.server_files),
    }
    print(json.dumps(facts), file=sys.stderr)
    assert "Traceback" not in live.text()
    assert found["engine_restarts_total"] == run.harms.total() > 0
    assert found["request_success_total error"] == found["requests_quarantined_total"] == 0
    assert run.sung > seconds / 20 and run.outcomes["answered"] > seconds / 4
    assert run.outcomes["429"], "it was never more than the server can carry"
    assert growth(run.server_bytes) < MOST_GROWTH and growth(run.engine_bytes) < MOST_GROWTH
    assert growth(run.server_files) < MAX_CLIENTS // 2
