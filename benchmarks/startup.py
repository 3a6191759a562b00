"""Start-up: seconds from `pagedserve serve` to the first HTTP answer, and to readiness.

Each run starts a fresh server and polls it. The first run, which warms the page cache and compiles
kernels where that was never done, is reported apart.

    python benchmarks/startup.py [--runs 5] [--model DIR]

On a GPU, an 8B model with random weights, first with no compiled kernel in any cache (the files of
torch and of the interpreter may still be in the page cache), then with those of that start:

    python benchmarks/startup.py --runs 3 --shape llama-3.1-8b --fresh

Flags of `pagedserve serve` go behind `--`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from _checkpoint import shape_directory, write_checkpoint

from pagedserve.commands.bench import machine
from pagedserve.commands.bench.startup import figures, said, start
from pagedserve.config import DEMO_MODEL

CACHES = ("PAGEDSERVE_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
BARS = {"first_answer_s": 2, "ready_s": 8}


def main() -> int:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--shape", help="of benchmarks/shapes, with random weights, instead")
    parser.add_argument("--fresh", action="store_true", help="begin with empty kernel caches")
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as place:
        serve = [args.model, *flags]
        if args.shape is not None:
            directory = Path(place) / "model"
            directory.mkdir()
            model = write_checkpoint(shape_directory(args.shape), directory)
            serve = [str(model), "--load-format", "dummy", *flags]
        env = None
        if args.fresh:
            env = {**os.environ, **{name: f"{place}/{name}" for name in CACHES}}
        starts = []
        for number in range(args.runs + 1):
            starts.append(start(serve, args.timeout, env))
            print(f"start {number}: {said(starts[-1])}", file=sys.stderr)
    line = {
        "benchmark": "startup",
        "model": args.shape or args.model,
        "fresh": args.fresh,
        "flags": " ".join(flags),
        **figures(starts),
        "bars": BARS if args.model == DEMO_MODEL and args.shape is None else None,
        "gpu": machine.gpu_name(),
        "seed": 0,
        **machine.versions(),
    }
    print(json.dumps(line))
    return 1 if line["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
