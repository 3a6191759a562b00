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
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import workload

from pagedserve.api import checkpoint
from pagedserve.commands.bench import machine
from pagedserve.commands.bench.figures import Outcome
from pagedserve.commands.bench.offline import answer, engine, settled, tell
from pagedserve.commands.bench.roofline import ITEM_BYTES, Roofline, chip_named, read_spec
from pagedserve.config import Config, add_flags
from pagedserve.engine.client import EngineClient

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
    config = Config.from_options(options)
    began = time.perf_counter()
    with engine(config, checkpoint.load(config.model, tell)) as client:
        ready = settled(client)
        facts = {
            "shape": args.shape,
            "ready_s": round(time.perf_counter() - began, 2),
            "gpu": ready.device,
            **machine.versions(),
            "flags": " ".join(rest),
            "num_blocks": ready.num_blocks,
            "seed": config.model.seed,
        }
        spec, chip = read_spec(SHAPES / args.shape), chip_named(ready.device)
        roof = Roofline(spec, chip, ITEM_BYTES[ready.dtype]) if spec and chip else None
        for name, repetition in itertools.product(args.workloads, range(args.repetitions)):
            found = measure(client, name, repetition)
            peer = PEER.get((args.shape, name))
            if peer is not None:
                value = found["value"]
                found["times_vllm"] = round(value / peer if name == "A" else peer / value, 3)
            if roof is not None:
                fraction = roofline_fraction(roof, name, found["value"], ready.max_num_seqs)
                found["roofline_fraction"] = round(fraction, 3)
            print(json.dumps({"benchmark": name, "run": repetition, **found, **facts}), flush=True)


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
        (one,) = run(client, [(workload.prefill(number, 3 * repetition + extra), 1)])
        spans.append(one.at[0] - one.began)
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


def run(client: EngineClient, work: list[tuple[list[int], int]]) -> list[Outcome]:
    """All at once, to the end."""
    outcomes = answer(client, work)
    for one in outcomes:
        if one.error:
            sys.exit(one.error)
    return outcomes


if __name__ == "__main__":
    main()
