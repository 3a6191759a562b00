"""More streams than the KV cache has room for, and an engine that is killed in the middle.

    python benchmarks/overload.py                                 # 512 streams for about 5 minutes
    python benchmarks/overload.py --seconds 120 --blocks 4096

512 streams at a time on a model with random weights, whose cache holds the tokens of few of them:
sequences are preempted and come back. When half of the requests have ended, the engine gets
SIGKILL. Workload D (1,024 tokens in, 256 out, greedy), each stream checked for its number of
tokens. A round of as many requests as there are streams goes before and says how many make
`--seconds`. Prints one JSON line; the exit status is 1 if a request failed, anything ran out of
memory, or the engine was not restarted exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import workload
from _checkpoint import shape_directory
from serve import COMPARED_SHAPE, Served, send, started

from pagedserve.commands.bench import machine
from pagedserve.commands.bench.clients import PROCESSES, Target
from pagedserve.commands.bench.figures import summary
from pagedserve.commands.bench.online import first_model
from pagedserve.errors import PagedServeError

LOOK_SECONDS = 0.2
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|cannot allocate|MemoryError", re.I)


def main() -> int:
    args = parse_args()
    flags = (
        f"--num-gpu-blocks-override {args.blocks} --max-num-seqs {args.streams} "
        f"--max-queued-requests {4 * args.streams} {args.serve}"
    )
    try:
        with started(flags, shape_directory(args.shape)) as served:
            found = run(served, args)
    except PagedServeError as error:
        print(f"overload.py: {error.message}", file=sys.stderr)
        return 1
    facts = {"shape": args.shape, "flags": flags, "gpu": machine.gpu_name(), **machine.versions()}
    print(json.dumps({**found, **facts}), flush=True)
    return 1 if found["failed"] or found["out_of_memory"] or found["restarts"] != 1 else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="about so long")
    parser.add_argument("--streams", type=int, default=512, help="at a time")
    parser.add_argument("--blocks", type=int, default=8192, help="of the KV cache, 16 tokens each")
    parser.add_argument("--shape", default=COMPARED_SHAPE, help="of benchmarks/shapes, or a DIR")
    parser.add_argument("--serve", default="", metavar="FLAGS", help="more flags of the server")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="of the client")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a stream may take")
    return parser.parse_args()


def run(served: Served, args: argparse.Namespace) -> dict[str, Any]:
    """The round before, which is timed, and then the load with a death in it."""
    target = Target(served.url, timeout=args.timeout)
    model = first_model(target)
    began = time.monotonic()
    warm = summary(ask(target, model, args, seed=0, count=args.streams))
    took = time.monotonic() - began
    count = max(args.streams, round(args.streams * args.seconds / took))
    print(f"{took:.0f} s a round of {args.streams}; now {count}", file=sys.stderr)
    watch = Watch(served, args.streams + count // 2)
    watch.start()
    outcomes = ask(target, model, args, seed=1, count=count)
    watch.over.set()
    watch.join()
    errors = [each.error for each in outcomes if each.error]
    served.log.seek(0)
    log = served.log.read().decode(errors="replace")
    return {
        "benchmark": "overload",
        "streams": args.streams,
        "blocks": args.blocks,
        **summary(outcomes),
        "failed_before": warm["failed"],
        "first_error": errors[0] if errors else None,
        "killed_after_s": watch.killed_after,
        "restarts": metric(served.url, "engine_restarts_total"),
        "cause": re.findall(r"engine died: ([^;]*)", log),
        "preemptions": watch.preemptions,
        "out_of_memory": len(OUT_OF_MEMORY.findall(log)),
        "tracebacks": log.count("Traceback"),
    }


def ask(
    target: Target, model: str, args: argparse.Namespace, *, seed: int, count: int
) -> list[Any]:
    """`count` requests, `--streams` of them at a time."""
    asks = workload.online(700 + seed, count)
    return send(target, model, asks, concurrency=args.streams, processes=args.processes)


class Watch(threading.Thread):
    """Kills the engine once `num_ended` requests have ended, and counts over its death."""

    def __init__(self, served: Served, num_ended: int):
        super().__init__()
        self.over = threading.Event()
        self.killed_after: float | None = None
        self.preemptions = 0.0
        self._served = served
        self._num_ended = num_ended

    def run(self) -> None:
        began, last = time.monotonic(), 0.0
        while not self.over.wait(LOOK_SECONDS):
            url = self._served.url
            now = metric(url, "num_preemptions_total")
            if now < last:  # another engine
                self.preemptions += last
            last = now
            ended = metric(url, "admitted_sequences_total") - metric(url, "live_sequences")
            if self.killed_after is None and ended >= self._num_ended:
                os.kill(engine_of(self._served.process.pid), signal.SIGKILL)
                self.killed_after = round(time.monotonic() - began, 1)
        self.preemptions += last


def engine_of(server: int) -> int:
    """The process id of the engine of a server: of its children the one that is no helper."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    for child in map(int, children):
        if b"engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise PagedServeError("the server has no engine process")


def metric(url: str, name: str) -> float:
    """A figure of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.search(rf"^pagedserve:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
    if found is None:
        raise PagedServeError(f"/metrics has no {name}")
    return float(found[1])


if __name__ == "__main__":
    sys.exit(main())
