"""The demo model under an engine that is killed and stopped: every text as if nothing had happened.

The same requests are asked of a server that nobody harms and of one whose engine is killed when a
random number of chunks has arrived. None may fail, and all must say the same, token by token.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import LiveServer
from tests.e2e.test_server import eventually, nothing_held

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"temperature": 0.7, "repetition_penalty": 1.2, "min_tokens": 40, "ignore_eos": False},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 0, "logprobs": 0, "echo": True},
    {"temperature": 1.0, "stop": [" and", "ther"], "min_tokens": 30},
    {"temperature": 1.1, "n": 2},
    {"temperature": 0.6, "logit_bias": {"5": -100, "300": 2.5}},
]
OPENINGS = [
    "Once upon a time there was a",
    "12 + 34 = ",
    "The fox went to the river and",
    "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n",
]


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Completions of every kind, three of four streamed, most of them long."""
    r = random.Random(seed)
    return [
        {
            "prompt": r.choice(OPENINGS) + " fox" * r.choice([0, 3, 60]),
            "seed": r.randrange(1 << 40),
            "max_tokens": r.randint(120, 320),
            "ignore_eos": True,
            "stream": number % 4 != 3,
        }
        | KINDS[number % len(KINDS)]
        for number in range(count)
    ]


@dataclass
class Said:
    """What an answer says, by choice."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    finishes: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[float | None]] = field(default_factory=lambda: defaultdict(list))

    def take(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        self.texts[index] += choice["text"]
        if choice["finish_reason"] is not None:
            assert index not in self.finishes, "it ended twice"
            self.finishes[index] = choice["finish_reason"]
        if choice["logprobs"] is not None:
            self.tokens[index] += choice["logprobs"]["tokens"]
            self.logprobs[index] += choice["logprobs"]["token_logprobs"]


class Chunks:
    """How many chunks have arrived, over all streams."""

    def __init__(self) -> None:
        self.count = 0
        self._grew = threading.Condition()

    def add(self) -> None:
        with self._grew:
            self.count += 1
            self._grew.notify_all()

    def wait_for(self, count: int) -> None:
        with self._grew:
            assert self._grew.wait_for(lambda: self.count >= count, 120), "the streams stand still"


def ask(url: str, body: dict[str, Any], chunks: Chunks) -> Said:
    """Send one request; what was said. Raises where it failed."""
    said = Said()
    with httpx.Client(base_url=url, timeout=120) as http:
        if not body["stream"]:
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            for choice in answer.json()["choices"]:
                said.take(choice)
            return said
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = list(counted(answer.iter_lines(), chunks))
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            said.take(choice)
    return said


def counted(lines: Iterator[str], chunks: Chunks) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: "):
            chunks.add()
            yield line.removeprefix("data: ")


def ask_all(url: str, bodies: list[dict[str, Any]], chunks: Chunks) -> list[Said]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: ask(url, body, chunks), bodies))


@contextmanager
def harming(
    server: LiveServer, chunks: Chunks, moments: list[int], orders: list[int]
) -> Iterator[None]:
    """Send the engine `orders[i]` once `moments[i]` chunks have arrived."""
    failed: list[BaseException] = []

    def harm() -> None:
        try:
            engine = 0
            for moment, order in zip(moments, orders, strict=True):
                chunks.wait_for(moment)
                engine = next_engine(server, engine)
                os.kill(engine, order)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=harm)
    thread.start()
    yield
    thread.join()
    assert not failed, failed


def next_engine(server: LiveServer, last: int) -> int:
    """The process id of an engine that is not the one harmed last."""
    for _ in range(600):
        try:
            pid = server.engine_pid()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (ValueError, OSError):  # between two engines
            pid = last
        # After its exec: until then the API process waits for it, and it must not be stopped.
        if pid != last and b"engine.process" in command:
            return pid
        time.sleep(0.05)
    raise AssertionError(f"no other engine:\n{server.text()}")


@pytest.mark.parametrize(
    ("count", "kills", "stops"),
    [(20, 3, 1), pytest.param(64, 10, 3, marks=pytest.mark.marathon)],
)
def test_no_request_fails_and_every_text_is_the_same(
    count: int, kills: int, stops: int, server: LiveServer, tmp_path: Path
) -> None:
    bodies, quiet, chunks = requests(count, seed=count), Chunks(), Chunks()
    undisturbed = ask_all(server.url, bodies, quiet)
    r = random.Random(count)
    moments = sorted(r.randint(1, quiet.count * 8 // 10) for _ in range(kills + stops))
    orders = [signal.SIGKILL] * kills + [signal.SIGSTOP] * stops
    r.shuffle(orders)
    flags = ("--engine-stall-timeout", "2", "--max-engine-restarts", str(kills + stops))
    live = LiveServer(tmp_path / "log", *flags).ready()
    try:
        with harming(live, chunks, moments, orders):
            survived = ask_all(live.url, bodies, chunks)
        restarts = live.metric("engine_restarts_total")
        errors = live.metric('request_success_total{[^}]*finished_reason="error"[^}]*}')
        assert live.get("/livez")[0] == 200
        eventually(lambda: nothing_held(live))
        assert live.interrupt() == 0
    finally:
        live.stop()
    assert restarts >= kills + stops and errors == 0
    assert "Traceback" not in live.text()
    for body, expected, got in zip(bodies, undisturbed, survived, strict=True):
        assert got.texts == expected.texts, body
        assert (got.finishes, got.tokens) == (expected.finishes, expected.tokens), body
        for index, values in expected.logprobs.items():
            assert got.logprobs[index] == pytest.approx(values, abs=1e-3), body
