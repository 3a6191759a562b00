"""The demo model's own answers, by transformers in fp32, and a live server."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagedserve.config import DEMO_MODEL

NUM_PROMPTS = 64
NEW_TOKENS = 24


def prompts() -> list[list[int]]:
    """64 prompts of 1 to about 300 tokens: chat turns, stories, sums, and plain noise."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")
    r = random.Random(7)
    openings = [
        "Once upon a time there was a",
        "<|im_start|>user\nWhat is {} + {}?<|im_end|>\n<|im_start|>assistant\n",
        "{} + {} = ",
        "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n",
    ]
    made = []
    for number in range(NUM_PROMPTS):
        a, b = r.randrange(100), r.randrange(100)
        ids = tokenizer.encode(openings[number % 4].format(a, b)).ids
        if number % 8 == 7:  # a long conversation before the last turn
            ids = (ids * 40)[-r.randint(100, 300) :]
        if number % 8 == 3:
            ids = [r.randrange(3, 2048) for _ in range(r.randint(1, 120))]
        made.append(ids)
    return made


@pytest.fixture(scope="session")
def reference() -> list[list[int]]:
    """What transformers.generate writes greedily behind each prompt, in fp32, one at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model.eval()
    answers = []
    with torch.inference_mode():
        for ids in prompts():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            answers.append(out[0, len(ids) :].tolist())
    return answers


class LiveServer:
    """`pagedserve serve` in a process of its own, on a free port."""

    def __init__(self, log: Path, *flags: str):
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pagedserve", "serve", "--port", "0", *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.url = self._wait(r"listening on (http://\S+)")

    def ready(self) -> LiveServer:
        self._wait(r"is served at")
        return self

    def text(self) -> str:
        return self.log.read_text()

    def _wait(self, pattern: str) -> str:
        for _ in range(1200):
            found = re.search(pattern, self.text())
            if found:
                return found.group(1) if found.groups() else found.group()
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in the log:\n{self.text()}")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(
            rf"^pagedserve:{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics")[1], re.M
        )
        assert found, name
        return float(found.group(1))

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (pid,) = map(int, children.split())
        return pid

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of the demo model that tests share and do not harm."""
    live = LiveServer(tmp_path_factory.mktemp("server") / "log").ready()
    yield live
    live.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server that the test may kill."""
    live = LiveServer(tmp_path / "log").ready()
    yield live
    live.stop()
