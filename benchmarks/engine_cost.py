"""The engine's own CPU time: microseconds to schedule and commit one decode step.

A device that takes no time, and batches of standing decode rows: what is left is Python.

    python benchmarks/engine_cost.py [--steps 2000]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.scheduler import Scheduler
from pagedserve.request import Request, SamplingParams
from pagedserve.step import StepOutput
from pagedserve.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    cost = {batch: measure(batch, args.steps) for batch in (1, 32, 256)}
    print(
        json.dumps(
            {
                "benchmark": "engine_cost",
                "median_us": {
                    batch: dict(zip(("schedule", "commit"), c, strict=True))
                    for batch, c in cost.items()
                },
                "bars_us": {"1": 100, "32": 150, "256": 300},
                "pagedserve": __version__,
                "python": platform.python_version(),
            }
        )
    )


def measure(batch: int, steps: int) -> tuple[float, float]:
    """Medians of schedule and of commit, in microseconds."""
    scheduler = Scheduler(
        BlockPool(batch * (steps + 64) // 16 + batch * 16),
        block_size=16,
        max_num_seqs=batch,
        max_num_batched_tokens=batch * 200,
    )
    for id in range(batch):
        prompt = [(id * 7 + at) % 100 for at in range(100 + id % 16)]
        scheduler.add(Request(id, prompt, SamplingParams(max_tokens=steps + 8), 0, 0, float(id)))
    tokens = StepOutput([5] * batch)
    scheduling, committing = [], []
    for _ in range(steps):
        began = time.perf_counter()
        step = scheduler.schedule()
        between = time.perf_counter()
        assert step is not None
        scheduler.commit(step, tokens)
        scheduling.append(between - began)
        committing.append(time.perf_counter() - between)
    return tuple(round(1e6 * statistics.median(times), 1) for times in (scheduling, committing))


if __name__ == "__main__":
    main()
