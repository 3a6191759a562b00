"""Workload D over HTTP: prompts, lengths and arrivals of the figures that are compared with.

On one GPU, the whole table of an 8B model with random weights, its server started here:

    python benchmarks/serve.py --serve "--gpu-memory-utilization 0.9"

Some rows, of a server that runs already:

    python benchmarks/serve.py --url http://127.0.0.1:8000 closed rate

closed    512 requests, 256 under way at a time: output tokens/s
rate      384 requests, 16 a second on average: TTFT, TPOT, ITL
one       16 requests, one after the other: TTFT, TPOT
prefix    256 requests that begin with the same 2,048 tokens, not seen before: output tokens/s

1,024 tokens in and 256 out; in `prefix` 128 more in and 64 out. Requests are streamed
/v1/completions with token ids, greedy, ignore_eos, each on a connection of its own, sent by four
processes. 64 requests go before, unmeasured. One JSON line a row; `times_vllm` is above 1 where
ours is better. The exit status is 1 if a request failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import workload
from _checkpoint import shape_directory, write_checkpoint

from pagedserve.commands.bench import machine
from pagedserve.commands.bench.client import Job
from pagedserve.commands.bench.clients import PROCESSES, Target, drive
from pagedserve.commands.bench.figures import summary
from pagedserve.commands.bench.online import completion_body, first_model
from pagedserve.commands.bench.roofline import ITEM_BYTES, Roofline, chip_named, read_spec
from pagedserve.commands.bench.startup import free_port, stop, watch
from pagedserve.commands.bench.work import Ask
from pagedserve.errors import PagedServeError

WARM_UP, WARM_UP_SEED = 64, 900
START_SECONDS = 600.0


@dataclass(frozen=True)
class Row:
    """A line of the table. `vllm`: 0.26 on one H200, Llama-3.1-8B in bf16 (docs/performance.md)."""

    requests: int
    concurrency: int
    rate: float
    shared: bool
    vllm: dict[str, float]


ROWS = {
    "closed": Row(512, 256, 0, False, {"output_tokens_per_s": 6052}),
    "rate": Row(
        384,
        256,
        16,
        False,
        {"ttft_ms.mean": 59.5, "ttft_ms.p99": 116, "tpot_ms.mean": 9.81, "itl_ms.p99": 36.0},
    ),
    "one": Row(16, 1, 0, False, {"ttft_ms.mean": 31.6, "tpot_ms.mean": 4.87}),
    "prefix": Row(256, 256, 0, True, {"output_tokens_per_s": 7021}),
}
COMPARED_SHAPE = "llama-3.1-8b"


def main() -> int:
    args = parse_args()
    shape = shape_directory(args.shape)
    try:
        with server(args.serve, shape) if args.serve is not None else at(args.url) as url:
            target = Target(url, timeout=args.timeout)
            model = args.model or first_model(target)
            warm = workload.online(WARM_UP_SEED, min(WARM_UP, args.requests or WARM_UP))
            send(target, model, warm, concurrency=WARM_UP)
            results = [run(target, model, name, args) for name in args.rows or ROWS]
    except PagedServeError as error:
        print(f"serve.py: {error.message}", file=sys.stderr)
        return 1
    gpu = machine.gpu_name()
    facts = {"gpu": gpu, "shape": args.shape, "seed": args.seed, "flags": args.serve}
    for found in results:
        if args.shape == COMPARED_SHAPE and args.requests is None:
            found["times_vllm"] = times_vllm(found, ROWS[found["row"]].vllm)
        found["roofline_fraction"] = roofline_fraction(found, shape, gpu)
        print(json.dumps({**found, **facts, **machine.versions()}), flush=True)
    return 1 if any(found["failed"] for found in results) else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; none: all")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--serve", metavar="FLAGS", help="start a server with these flags")
    parser.add_argument("--shape", default=COMPARED_SHAPE, help="of benchmarks/shapes, or a DIR")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--requests", type=int, help="so many a row (not comparable)")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return args


@contextlib.contextmanager
def at(url: str) -> Iterator[str]:
    """A server that runs already."""
    yield url


@dataclass(frozen=True)
class Served:
    """A server that was started here."""

    url: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@contextlib.contextmanager
def server(flags: str, shape: Path) -> Iterator[str]:
    """A server of `shape` with random weights, while the block runs."""
    with started(flags, shape) as served:
        yield served.url


@contextlib.contextmanager
def started(flags: str, shape: Path) -> Iterator[Served]:
    """The same, for who wants more of it than its URL."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as log:
        directory, port = write_checkpoint(shape, Path(place)), free_port()
        command = [sys.executable, "-m", "pagedserve", "serve", str(directory)]
        command += ["--load-format", "dummy", "--port", str(port), *shlex.split(flags)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            start = watch(process, url, log, START_SECONDS, began)
            if start.error:
                raise PagedServeError(start.error)
            print(f"ready after {start.ready_s:.1f} s", file=sys.stderr)
            yield Served(url, process, log)
        finally:
            stop(process)


def run(target: Target, model: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row. Every row has prompts of its own: none may find another's in the prefix cache."""
    row = ROWS[name]
    seed = 100 * args.seed + list(ROWS).index(name)
    count = args.requests or row.requests
    asks = workload.shared_prefix(seed, count) if row.shared else workload.online(seed, count)
    outcomes = send(
        target,
        model,
        asks,
        concurrency=row.concurrency,
        times=workload.arrivals(seed, count, row.rate),
        processes=args.processes,
    )
    found = {"benchmark": "D", "row": name, "requests": count, **summary(outcomes)}
    print(f"{name}: {found['output_tokens_per_s']} output tokens/s", file=sys.stderr)
    return found


def send(
    target: Target,
    model: str,
    asks: list[tuple[list[int], int]],
    *,
    concurrency: int,
    times: list[float] | None = None,
    processes: int = PROCESSES,
) -> list[Any]:
    """Requests and their outcomes."""
    jobs = [
        Job(at, completion_body(model, Ask(prompt, length)), length)
        for (prompt, length), at in zip(asks, times or [0.0] * len(asks), strict=True)
    ]
    return drive(target, jobs, concurrency=concurrency, processes=processes)


def times_vllm(found: dict[str, Any], peer: dict[str, float]) -> dict[str, float | None]:
    """How many times better ours is, by figure; None where there is none of ours."""
    ratios: dict[str, float | None] = {}
    for path, theirs in peer.items():
        name, _, part = path.partition(".")
        ours = found[name] and (found[name][part] if part else found[name])
        better = (ours / theirs if name.endswith("_per_s") else theirs / ours) if ours else None
        ratios[path] = None if better is None else round(better, 3)
    return ratios


def roofline_fraction(found: dict[str, Any], shape: Path, gpu: str | None) -> float | None:
    """Least time over measured time, where a least time is defined: in `closed` and `one`."""
    spec, chip = read_spec(shape), chip_named(gpu)
    if spec is None or chip is None or found["failed"]:
        return None
    roof = Roofline(spec, chip, ITEM_BYTES["bfloat16"])
    lengths = [(len(prompt), length) for prompt, length in workload.online(0, 1)]
    if found["row"] == "closed":
        floor = roof.work_seconds(lengths * found["requests"], ROWS["closed"].concurrency)
        return round(floor / found["duration_s"], 3)
    if found["row"] == "one":
        ((prompt, length),) = lengths
        step = roof.decode_seconds(1, prompt + length / 2)
        return round(1e3 * step / found["tpot_ms"]["mean"], 3)
    return None


if __name__ == "__main__":
    sys.exit(main())
