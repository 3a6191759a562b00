"""Where an engine's start goes: the slowest imports, and the slowest calls from there to readiness.

    python benchmarks/start_profile.py --shape llama-3.1-8b

Two processes, one after the other: one imports what the engine process imports, timed by the
interpreter; the next starts a worker with random weights under a profiler, which makes calls that
take microseconds look slower than they are. Seconds with all that is called from there, then alone.
Kernels that were never compiled on this machine are compiled, and shown with the seconds that the
interpreter and the compiler took, beside others that are compiled at the same time; a second run
finds them on disk. Flags of `pagedserve serve` are given as --options, a JSON object.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _checkpoint import shape_directory

from pagedserve.commands.bench import machine

SHOWN = 40
IMPORTED = "pagedserve.executor.local"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--shown", type=int, default=SHOWN)
    args = parser.parse_args()
    for name, whole, alone in imports()[: args.shown]:
        print(f"{whole:7.3f} {alone:7.3f}  import {name}")
    directory = shape_directory(args.shape)
    kernels = watch_compiler()
    profile, phases = profiled({"model": str(directory), "load_format": "dummy", **args.options})
    for name, interpreter, compiler in sorted(kernels, key=lambda each: -sum(each[1:])):
        print(f"{interpreter:7.3f} {compiler:7.3f}  compile {name}")
    for place, whole, alone, calls in slowest(profile)[: args.shown]:
        print(f"{whole:7.3f} {alone:7.3f}  {place}  ({calls} calls)")
    line = {
        "benchmark": "start_profile",
        "model": args.shape,
        "phases_s": phases,
        "kernels_compiled": len(kernels),
        "gpu": machine.gpu_name(),
        **machine.versions(),
    }
    print(json.dumps(line))


def imports() -> list[tuple[str, float, float]]:
    """(module, seconds with what it imports, seconds alone) of a fresh interpreter."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {IMPORTED}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    found = []
    for line in done.stderr.splitlines():
        alone, whole, name = line.removeprefix("import time:").split("|")
        if alone.strip().isdigit():
            found.append((name.strip(), int(whole) / 1e6, int(alone) / 1e6))
    return sorted(found, key=lambda each: -each[1])


def watch_compiler() -> list[tuple[str, float, float]]:
    """(kernel, seconds to its first form, seconds from there) of each that is compiled from now."""
    found: list[tuple[str, float, float]] = []
    try:
        import triton
    except ImportError:
        return found

    def note(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            stages = sum(micros for _, micros in times.lowering_stages)
            found.append((src.name, times.ir_initialization / 1e6, stages / 1e6))

    triton.knobs.compilation.listener = note
    return found


def profiled(options: dict[str, object]) -> tuple[cProfile.Profile, dict[str, float]]:
    """The calls of a worker's start, and how long each phase of it lasted."""
    begun: list[tuple[str, float]] = []

    def note(phase: str, detail: str) -> None:
        if not begun or begun[-1][0] != phase:
            begun.append((phase, time.perf_counter()))

    note("import torch", "")
    from pagedserve.config import Config
    from pagedserve.worker.start import start

    profile = cProfile.Profile()
    profile.enable()
    start(Config.from_options(options), note)
    profile.disable()
    note("ready", "")
    lasted = {
        name: round(end - began, 3)
        for (name, began), (_, end) in zip(begun, begun[1:], strict=False)
    }
    return profile, lasted


def slowest(profile: cProfile.Profile) -> list[tuple[str, float, float, int]]:
    """(place, seconds with what it calls, seconds alone, calls), slowest first."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = [
        (f"{Path(file).name}:{line} {name}", whole, alone, calls)
        for (file, line, name), (_, calls, alone, whole, _) in stats.items()
    ]
    return sorted(found, key=lambda each: -each[1])


if __name__ == "__main__":
    main()
