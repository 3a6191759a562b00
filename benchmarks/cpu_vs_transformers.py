"""The server against `transformers.generate`, on one CPU, on the demo model, in one run.

Both sides get the same token-id prompts, greedy, end-of-text ignored, fp32, each with its own
default number of threads, and take turns so that neither gets the machine's better minutes. The
server is measured through HTTP, transformers in process.

    1 request       requests follow each other, on both sides
    16 concurrent   48 requests of mixed length, 16 under way at a time. `generate` has two ways to
                    serve them: one after the other ("in turn"), or in left-padded batches of 16,
                    each as long as its longest ("batched"); only tokens asked for count

Tokens per second are output tokens over wall time; medians over rounds.

    python benchmarks/cpu_vs_transformers.py [--model DIR] [--rounds 3] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers

from pagedserve.config import DEMO_MODEL
from pagedserve.version import __version__

SETTLE_SECONDS = 5  # before each measure: a virtual machine slows down after heavy load
Job = tuple[list[int], int]  # prompt token ids, tokens to write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reference = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference.eval()
    reference.generation_config.eos_token_id = None
    speeds: dict[str, list[float]] = {}
    with Server(args.model) as server:
        measures = {
            "pagedserve_1": (12, lambda jobs: server.run(jobs, 1)),
            "transformers_1": (12, lambda jobs: generate(reference, jobs, 1)),
            "pagedserve_16": (48, lambda jobs: server.run(jobs, 16)),
            "transformers_16_batched": (48, lambda jobs: generate(reference, jobs, 16)),
            "transformers_16_in_turn": (48, lambda jobs: generate(reference, jobs, 1)),
        }
        for turn in range(args.rounds + 1):  # the first round, a short one, warms up
            for name, (count, run) in measures.items():
                r = random.Random(args.seed * 1000 + turn)
                jobs = make_jobs(r, count if turn else 3, reference.config.vocab_size)
                time.sleep(SETTLE_SECONDS)
                started = time.perf_counter()
                run(jobs)
                if turn:
                    speed = sum(wanted for _, wanted in jobs) / (time.perf_counter() - started)
                    speeds.setdefault(name, []).append(round(speed, 1))
    ours = {c: statistics.median(speeds[f"pagedserve_{c}"]) for c in (1, 16)}
    ratios = {
        "ratio_at_1": ours[1] / statistics.median(speeds["transformers_1"]),
        "ratio_at_16_over_batched": ours[16] / statistics.median(speeds["transformers_16_batched"]),
        "ratio_at_16_over_in_turn": ours[16] / statistics.median(speeds["transformers_16_in_turn"]),
    }
    print(
        json.dumps(
            {
                "benchmark": "cpu_vs_transformers",
                **{name: round(ratio, 2) for name, ratio in ratios.items()},
                "tokens_per_s": speeds,
                "cores": os.cpu_count(),
                "load_at_end": os.getloadavg()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "pagedserve": __version__,
                "python": platform.python_version(),
                "seed": args.seed,
            }
        )
    )


def make_jobs(r: random.Random, count: int, vocab: int) -> list[Job]:
    """Prompts of 16 to 256 random tokens that want 16 to 224 more."""
    return [
        ([r.randrange(10, vocab) for _ in range(r.randint(16, 256))], r.randint(16, 224))
        for _ in range(count)
    ]


def generate(model: Any, jobs: list[Job], size: int) -> None:
    """`transformers.generate` over jobs in left-padded batches of `size`."""
    for at in range(0, len(jobs), size):
        batch = jobs[at : at + size]
        longest = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch])
        wanted = max(count for _, count in batch)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=wanted, do_sample=False, pad_token_id=0
            )
        assert out.shape[1] == longest + wanted


class Server:
    """`pagedserve serve` in a process of its own."""

    def __init__(self, model: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "pagedserve", "serve", model, "--device", "cpu"]
        port = self.url.rsplit(":", 1)[1]
        self.process = subprocess.Popen(
            [*command, "--port", port, "--served-model-name", "m"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Server:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/readyz", timeout=5)
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise SystemExit("the server did not become ready")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def run(self, jobs: list[Job], concurrency: int) -> None:
        """Send the jobs, `concurrency` at a time; every one must bring all its tokens."""
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(self.complete, jobs))

    def complete(self, job: Job) -> None:
        prompt, count = job
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] == count, answer


if __name__ == "__main__":
    main()
