"""KV cache waste: the share of allocated token slots that hold no token, paged against contiguous.

Drives the real scheduler and block pool with a device that takes no time, over 256 requests whose
prompt and output lengths are uniform in [100, 1024]. After every step it counts, over all running
sequences, the token slots of their blocks and the tokens in them. Beside it stand two contiguous
reservations of the same running sequences: the model's whole context for each, and (which no server
can know in advance) exactly each one's final length.

    python benchmarks/kv_waste.py [--block-size 16] [--blocks 8192] [--requests 256] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import platform
import random

from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.scheduler import Scheduler
from pagedserve.request import Request, SamplingParams
from pagedserve.step import StepOutput
from pagedserve.version import __version__

CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=8192)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scheduler = Scheduler(
        BlockPool(args.blocks),
        block_size=args.block_size,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
    )
    for request in workload(args.requests, args.seed):
        scheduler.add(request)
    counts = dict.fromkeys(("held", "allocated", "context", "final"), 0)
    steps = 0
    while (step := scheduler.schedule()) is not None:
        scheduler.commit(step, StepOutput([1] * sum(step.samples)))
        steps += 1
        for sequence in scheduler.running:
            counts["held"] += sequence.num_computed
            counts["allocated"] += len(sequence.blocks) * args.block_size
            counts["context"] += CONTEXT
            counts["final"] += sequence.max_length
    assert scheduler.idle and scheduler.pool.num_used == 0
    waste = {
        name: round(100 * (1 - counts["held"] / counts[name]), 3)
        for name in ("allocated", "context", "final")
    }
    print(
        json.dumps(
            {
                "benchmark": "kv_waste",
                "paged_waste_percent": waste["allocated"],
                "contiguous_context_waste_percent": waste["context"],
                "contiguous_final_length_waste_percent": waste["final"],
                "context": CONTEXT,
                **vars(args),
                "steps": steps,
                "preemptions": scheduler.num_preemptions,
                "pagedserve": __version__,
                "python": platform.python_version(),
            }
        )
    )


def workload(count: int, seed: int) -> list[Request]:
    """`count` requests of random token ids; lengths uniform in [100, 1024]."""
    r = random.Random(seed)
    requests = []
    for id in range(1, count + 1):
        prompt = [r.randint(0, 10_000) for _ in range(r.randint(100, 1024))]
        params = SamplingParams(max_tokens=r.randint(100, 1024), ignore_eos=True)
        requests.append(Request(id, prompt, params, seed=0, arrival=float(id)))
    return requests


if __name__ == "__main__":
    main()
