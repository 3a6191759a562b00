"""The benchmark script against a toy server: right answers meet the bars, wrong ones do not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bars import BARS_SEED, Case, draw_cases

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "demo_bars.py"
Answer = Callable[[str], str]


class ToyServer(BaseHTTPRequestHandler):
    answer: Answer

    def do_GET(self) -> None:
        self._send({"data": [{"id": "toy"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0
        self._send({"choices": [{"text": type(self).answer(body["prompt"])}]})

    def _send(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # the default of 5 resets connections of a busy client


@pytest.fixture
def run_against() -> Iterator[Callable[[Answer], tuple[int, dict[str, Any]]]]:
    servers: list[Server] = []

    def run(answer: Answer) -> tuple[int, dict[str, Any]]:
        toy = type("Toy", (ToyServer,), {"answer": staticmethod(answer)})
        servers.append(Server(("127.0.0.1", 0), toy))
        threading.Thread(target=servers[-1].serve_forever).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}"
        command = [sys.executable, str(SCRIPT), "--url", url, "--cases", "20"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not done.stderr
        return done.returncode, json.loads(done.stdout)

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def right_answer(case: Case) -> str:
    assert case.is_exact(case.model_answer)
    return case.model_answer


def test_right_answers_meet_every_bar(run_against: Callable[..., Any]) -> None:
    answers = {case.prompt: right_answer(case) for case in draw_cases(20, seed=BARS_SEED)}
    status, line = run_against(answers.__getitem__)
    assert status == 0
    assert {name: result["percent"] for name, result in line["bars"].items()} == {
        "sums": 100.0,
        "json": 100.0,
        "tools": 100.0,
    }


def test_wrong_answers_miss_every_bar(run_against: Callable[..., Any]) -> None:
    status, line = run_against(lambda prompt: "I do not know.")
    assert status == 1
    assert not any(result["met"] for result in line["bars"].values())
