"""The server against `transformers.generate`, on one CPU, on the demo model, in one run.

Both sides get the same token-id prompts, greedy, end-of-text ignored, fp32, each with its own
default number of threads, and take turns so that neither gets the machine's better minutes. The
server is measured through HTTP; transformers is called in process. At concurrency 1 requests follow
each other. At 16 the server gets 16 concurrent requests of mixed prompt and output length;
transformers gets the same 16 as one left-padded batch, which is the fastest way it offers, and only
tokens that were asked for count. Tokens per second are output tokens over wall time.

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

import torch
import transformers

from pagedserve.config import DEMO_MODEL
from pagedserve.version import __version__

Job = tuple[list[int], int]  # prompt token ids, tokens to write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reference = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference.eval()
    reference.generation_config.eos_token_id = None
    vocab = reference.config.vocab_size
    speeds: dict[tuple[str, int], list[float]] = {}
    with Server(args.model) as server:
        for turn in range(args.rounds + 1):  # the first round warms both up
            for concurrency in (1, 16):
                jobs = make_jobs(random.Random(args.seed * 1000 + turn), concurrency, vocab)
                for name, run in (
                    ("pagedserve", server.run),
                    ("transformers", reference_runner(reference)),
                ):
                    started = time.perf_counter()
                    run(jobs, concurrency)
                    speed = sum(count for _, count in jobs) / (time.perf_counter() - started)
                    if turn:
                        speeds.setdefault((name, concurrency), []).append(speed)
    median = {key: statistics.median(values) for key, values in speeds.items()}
    ratios = {c: median["pagedserve", c] / median["transformers", c] for c in (1, 16)}
    print(
        json.dumps(
            {
                "benchmark": "cpu_vs_transformers",
                **{
                    f"{name}_tokens_per_s_at_{concurrency}": [round(v, 1) for v in values]
                    for (name, concurrency), values in speeds.items()
                },
                "ratio_at_1": round(ratios[1], 2),
                "ratio_at_16": round(ratios[16], 2),
                "bars": {"ratio_at_1": 4, "ratio_at_16": 8},
                "met": ratios[1] >= 4 and ratios[16] >= 8,
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "pagedserve": __version__,
                "python": platform.python_version(),
                "seed": args.seed,
            }
        )
    )
    return 0 if ratios[1] >= 4 and ratios[16] >= 8 else 1


def make_jobs(r: random.Random, concurrency: int, vocab: int) -> list[Job]:
    """Prompts of 16 to 512 tokens that want 32 to 160 more; three jobs where they run alone."""
    count = 3 if concurrency == 1 else concurrency
    return [
        ([r.randrange(10, vocab) for _ in range(r.randint(16, 512))], r.randint(32, 160))
        for _ in range(count)
    ]


def reference_runner(model):  # type: ignore[no-untyped-def]
    """transformers.generate over jobs: one by one, or as one left-padded batch."""

    def run(jobs: list[Job], concurrency: int) -> None:
        for at in range(0, len(jobs), concurrency):
            batch = jobs[at : at + concurrency]
            longest = max(len(prompt) for prompt, _ in batch)
            ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch])
            wanted = max(count for _, count in batch)
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=wanted,
                    do_sample=False,
                    pad_token_id=0,
                )
            assert out.shape[1] == longest + wanted

    return run


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
    sys.exit(main())
