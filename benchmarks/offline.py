"""The engine without HTTP on workloads A, B and C, random weights: one JSON line a figure.

    python benchmarks/offline.py A B1 B8 B32 B256 C1024 C8192 --shape llama-3.1-8b

A        output tokens a second, 256 requests of mixed length
B<n>     milliseconds between the tokens of one sequence in a batch of n (median)
C<n>     milliseconds from submitting a prompt of n tokens to its only token (median)

Shapes are the config.json files in benchmarks/shapes. Every workload runs twice; the first is a
warm-up that is reported too. Flags of `pagedserve serve` go behind `--`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import workload

from pagedserve.commands.bench.roofline import ITEM_BYTES, Roofline, chip_named, read_spec
from pagedserve.config import Config, add_flags
from pagedserve.engine.channel import Finish
from pagedserve.engine.client import EngineClient
from pagedserve.request import Request, SamplingParams
from pagedserve.step import TokenLogprobs
from pagedserve.version import __version__

SHAPES = Path(__file__).parent / "shapes"
PEER = {  # vLLM 0.26 on one H200, benchmarks/RESULTS.md says how
    ("llama-3.1-8b", "A"): 9740, ("qwen3-0.6b", "A"): 23600, ("qwen3-30b-a3b", "A"): 5900,
    ("llama-3.1-8b", "B1"): 4.92, ("llama-3.1-8b", "B8"): 5.13, ("llama-3.1-8b", "B32"): 5.90,
    ("llama-3.1-8b", "B128"): 8.94, ("llama-3.1-8b", "B256"): 14.4,
    ("qwen3-0.6b", "B1"): 1.62, ("qwen3-0.6b", "B8"): 1.66, ("qwen3-0.6b", "B32"): 2.63,
    ("qwen3-0.6b", "B128"): 4.35, ("qwen3-0.6b", "B256"): 7.1,
    ("qwen3-30b-a3b", "B1"): 4.14, ("qwen3-30b-a3b", "B8"): 9.1, ("qwen3-30b-a3b", "B32"): 15.4,
    ("qwen3-30b-a3b", "B256"): 23.7,
    ("llama-3.1-8b", "C1024"): 28.6, ("llama-3.1-8b", "C8192"): 220,
    ("llama-3.1-8b", "C32768"): 1210,
}  # fmt: skip


class Times:
    """When each token of a sequence came."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.ended = False

    def started(self, cached_tokens: int) -> None:
        pass

    def prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        pass

    def token(self, token_id: int, logprobs: TokenLogprobs | None, finish: Finish | None) -> None:
        self.at.append(time.perf_counter())
        self.ended = finish is not None

    def failed(self, error: Exception) -> None:
        raise error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="+", metavar="A|B<n>|C<n>")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--repetitions", type=int, default=2)
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    flags = argparse.ArgumentParser()
    add_flags(flags, groups=("model", "cache", "scheduler"))
    options = {"load_format": "dummy", "skip_tokenizer_init": True} | vars(flags.parse_args(rest))
    options["model"] = str(SHAPES / args.shape)
    began = time.perf_counter()
    client = start(options)
    facts = {"shape": args.shape, "ready_s": round(time.perf_counter() - began, 2), **machine()}
    facts["flags"] = " ".join(rest)
    assert client.ready is not None
    facts["num_blocks"] = client.ready.num_blocks
    facts["seed"] = options.get("seed", 0)
    spec, chip = read_spec(SHAPES / args.shape), chip_named(client.ready.device)
    roof = Roofline(spec, chip, ITEM_BYTES[client.ready.dtype]) if spec and chip else None
    for name in args.workloads:
        for repetition in range(args.repetitions):
            found = measure(client, name, repetition)
            peer = PEER.get((args.shape, name))
            if peer is not None:
                value = found["value"]
                found["times_vllm"] = round(value / peer if name == "A" else peer / value, 3)
            if roof is not None:
                fraction = roofline_fraction(roof, name, found["value"], client.ready.max_num_seqs)
                found["roofline_fraction"] = round(fraction, 3)
            print(json.dumps({"benchmark": name, "run": repetition, **found, **facts}), flush=True)
    client.close(10.0)


def start(options: dict[str, Any]) -> EngineClient:
    client = EngineClient()
    client.configure(Config.from_options(options).to_builtins())
    while client.ready is None:
        client.poll(None)
        if client.cause_of_death is not None:
            sys.exit(client.cause_of_death)
    return client


def measure(client: EngineClient, name: str, repetition: int) -> dict[str, Any]:
    """One figure."""
    client.control("reset_prefix_cache")
    if name == "A":
        work = workload.offline()
        began = time.perf_counter()
        run(client, work)
        count = sum(length for _, length in work)
        return {"value": round(count / (time.perf_counter() - began), 1), "unit": "output tokens/s"}
    number = int(name[1:])
    if name[0] == "B":
        work = [(prompt, 256) for prompt in workload.decode(number, repetition)]
        times = run(client, work)
        # From the token on where the last sequence has its first: all of them decode.
        first = max(each.at[0] for each in times)
        gaps = [b - a for a, b in zip(times[0].at, times[0].at[1:], strict=False) if a > first]
        return {"value": round(1e3 * statistics.median(gaps), 3), "unit": "ms between tokens"}
    spans = []
    for extra in range(3):
        began = time.perf_counter()
        (one,) = run(client, [(workload.prefill(number, 3 * repetition + extra), 1)])
        spans.append(one.at[0] - began)
    return {"value": round(1e3 * statistics.median(spans), 2), "unit": "ms to the token"}


def roofline_fraction(roof: Roofline, name: str, value: float, max_rows: int) -> float:
    """Least time over measured time of the workload that gave `value` (docs/performance.md)."""
    if name == "A":
        lengths = [(len(prompt), length) for prompt, length in workload.offline()]
        count = sum(length for _, length in lengths)
        return roof.work_seconds(lengths, max_rows) * value / count
    number = int(name[1:])
    if name[0] == "B":
        return 1e3 * roof.decode_seconds(number, 512 + 256 / 2) / value
    return 1e3 * roof.prefill_seconds(number) / value


def run(client: EngineClient, work: list[tuple[list[int], int]]) -> list[Times]:
    """All at once, to the end."""
    now = time.monotonic()
    requests = []
    for prompt, length in work:
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        requests.append(Request(client.next_id(), prompt, params, 0, 0, now))
    sinks = [Times() for _ in requests]
    client.submit(requests, sinks)
    left = list(sinks)
    while left:
        client.poll(None)
        if client.cause_of_death is not None:
            sys.exit(client.cause_of_death)
        left = [sink for sink in left if not sink.ended]
    return sinks


def machine() -> dict[str, str]:
    """Where this runs. In another process: this one must not touch the GPU."""
    code = (
        "import json, torch, importlib.util as u;"
        "g = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu';"
        "t = __import__('triton').__version__ if u.find_spec('triton') else None;"
        "print(json.dumps({'gpu': g, 'torch': torch.__version__, 'triton': t}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {
        **json.loads(found.stdout),
        "python": platform.python_version(),
        "pagedserve": __version__,
    }


if __name__ == "__main__":
    main()
