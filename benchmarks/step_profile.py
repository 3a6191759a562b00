"""Where a decode step's time goes on a GPU: each kernel's share, and the host's.

    python benchmarks/step_profile.py --shape qwen3-0.6b --batch 1 8 32 --context 640

Runs the worker alone (no scheduler, no HTTP), random weights. Prints, for each batch, one JSON line
(wall and GPU microseconds a step, host microseconds of `launch`) and a table of kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from pagedserve.config import Config
from pagedserve.request import SamplingParams
from pagedserve.step import BlockId, Join, Slot, Step
from pagedserve.worker.start import Worker, start

SHAPES = Path(__file__).parent / "shapes"
STEPS = 30
SHOWN = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--prompt", type=int, help="profile steps of one prompt of so many tokens")
    args = parser.parse_args()
    config = Config.from_options(
        {"model": str(SHAPES / args.shape), "load_format": "dummy", "max_num_seqs": 256}
    )
    worker = start(config, lambda phase, detail: None)
    with torch.inference_mode():
        for batch in [1] if args.prompt else args.batch:
            profile(worker, batch, args.context, args.prompt)


def profile(worker: Worker, batch: int, context: int, prompt: int | None) -> None:
    """Time `STEPS` equal steps, then profile a few more."""
    blocks = -(-(prompt or context + 4 * STEPS) // 16)
    params = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
    slots = [Slot(i) for i in range(batch)]
    tokens = [7] * (prompt or context)
    joins = [Join(slot, tokens, len(tokens), params, 0) for slot in slots]
    grown = [(slot, i, BlockId(slot * blocks + i)) for slot in slots for i in range(blocks)]
    table = [list(column) for column in zip(*grown, strict=True)]
    first = Step(0, joins, slots, [0] * batch, [1] * batch, [True] * batch, *table)
    worker.launch(first).result()

    def step(n: int) -> Step:
        start, count = (0, prompt) if prompt else (context + n, 1)
        return Step(n, [], slots, [start] * batch, [count] * batch, [True] * batch, [], [], [])

    for n in range(3):
        worker.launch(step(n)).result()
    walls, hosts = [], []
    pending = worker.launch(step(3))
    for n in range(4, STEPS):
        began = time.perf_counter()
        following = worker.launch(step(n))
        hosts.append(time.perf_counter() - began)
        pending.result()
        pending = following
        walls.append(time.perf_counter() - began)
    pending.result()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for n in range(STEPS, STEPS + 4):
            worker.launch(step(n)).result()
    spent: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name].append(event.device_time)
    total = sum(map(sum, spent.values())) / 4
    facts = {
        "benchmark": "step profile",
        "batch": batch,
        "context": prompt or context,
        "wall_us": round(1e6 * statistics.median(walls)),
        "kernels_us": round(total),
        "launch_us": round(1e6 * statistics.median(hosts)),
        "gpu": torch.cuda.get_device_name(),
    }
    print(json.dumps(facts), flush=True)
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        each = sum(times) / len(times)
        print(f"  {sum(times) / 4:8.1f} us  {len(times) / 4:6.1f} x {each:7.2f}  {name[:90]}")


if __name__ == "__main__":
    main()
