"""Where workload A's seconds go: every step's kind, the time between results, and the host's share.

    python benchmarks/step_times.py --shape llama-3.1-8b [--last 1]

The engine's own loop, scheduler and worker in this process, without the API process and its
messages. One table row for each kind of step (one token a row, or mixed; by rows or tokens), with
the steps' total and median, the least time by `bench/roofline.py`, and medians of what the host
spends on `schedule`, `launch`, `commit`, and waiting for the device. Waiting near 0 is a step that
the host held up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workload

from pagedserve.commands.bench.roofline import ITEM_BYTES, Roofline, chip_named, read_spec
from pagedserve.config import Config
from pagedserve.engine.block_pool import BlockPool
from pagedserve.engine.channel import Submit
from pagedserve.engine.loop import Engine
from pagedserve.engine.scheduler import Committed, Scheduler
from pagedserve.executor.local import LocalExecutor
from pagedserve.request import Request, SamplingParams
from pagedserve.step import EngineInfo, Step, StepOutput

SHAPES = Path(__file__).parent / "shapes"
ROW_CLASSES = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 512)
TOKEN_CLASSES = (64, 256, 1024, 2048, 4096, 6144, 8191, 8192, 1 << 30)


@dataclass(slots=True)
class Timed:
    """One step: rows, tokens, cached tokens read, and seconds."""

    rows: int
    tokens: int
    context: int
    schedule: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    commit: float = 0.0
    ended: float = 0.0


@dataclass
class Silent:
    """A channel of which nobody reads the other end: takes `requests` in once."""

    requests: list[Any]
    pending: bool = False
    left: int = 0

    def receive(self, timeout: float | None) -> list[Any]:
        found, self.requests = self.requests, []
        return found

    def send(self, message: Any) -> None:
        pass


@dataclass
class Watched:
    """An executor and a scheduler whose verbs are timed; what the loop sees of both."""

    executor: LocalExecutor
    scheduler: Scheduler
    steps: dict[int, Timed] = field(default_factory=dict)

    def launch(self, step: Step) -> Any:
        began = time.perf_counter()
        ticket = self.executor.launch(step)
        self.steps[step.id].launch = time.perf_counter() - began
        return step.id, ticket

    def result(self, ticket: Any) -> StepOutput:
        number, inner = ticket
        began = time.perf_counter()
        output = self.executor.result(inner)
        timed = self.steps[number]
        timed.ended = time.perf_counter()
        timed.wait = timed.ended - began
        return output

    def schedule(self) -> Step | None:
        began = time.perf_counter()
        step = self.scheduler.schedule()
        if step is not None:
            context = sum(step.starts) + len(step.starts)
            timed = Timed(len(step.slots), step.num_tokens, context)
            timed.schedule = time.perf_counter() - began
            self.steps[step.id] = timed
        return step

    def commit(self, step: Step, output: StepOutput) -> Committed:
        began = time.perf_counter()
        committed = self.scheduler.commit(step, output)
        self.steps[step.id].commit = time.perf_counter() - began
        return committed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    options = {"model": str(SHAPES / args.shape), "load_format": "dummy"}
    config = Config.from_options(options)
    executor = LocalExecutor(config, lambda phase, detail: None)
    info = executor.start()
    for repetition in range(args.repetitions):
        began = time.perf_counter()
        steps = serve(config, executor, info)
        seconds = time.perf_counter() - began
        count = sum(length for _, length in workload.offline())
        facts = {"benchmark": "step times", "shape": args.shape, "run": repetition}
        facts |= {"seconds": round(seconds, 3), "tokens_per_s": round(count / seconds)}
        print(json.dumps(facts | {"gpu": info.device}), flush=True)
    report(steps, began, roofline(args.shape, info))


def serve(config: Config, executor: LocalExecutor, info: EngineInfo) -> list[Timed]:
    """Workload A to its end; its steps in order."""
    scheduler = Scheduler(
        BlockPool(info.num_blocks),
        block_size=config.cache.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
    )
    requests = [
        Request(id, prompt, parameters(length), 0, 0, float(id))
        for id, (prompt, length) in enumerate(workload.offline())
    ]
    watched = Watched(executor, scheduler)
    channel = Silent([Submit(requests)])
    engine = Engine(watched, watched, channel, depth=2)  # type: ignore[arg-type]
    receive = engine.receive

    def until_done(*, block: bool) -> None:
        receive(block=False)
        if scheduler.idle:
            engine.stopping = True

    engine.receive = until_done  # type: ignore[method-assign]
    engine.run()
    return [watched.steps[number] for number in sorted(watched.steps)]


def parameters(length: int) -> SamplingParams:
    """Greedy, so many tokens."""
    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)


def roofline(shape: str, info: EngineInfo) -> Roofline | None:
    """Of this model on this GPU, where its figures are known."""
    spec, chip = read_spec(SHAPES / shape), chip_named(info.device)
    return Roofline(spec, chip, ITEM_BYTES[info.dtype]) if spec and chip else None


def report(steps: list[Timed], began: float, roof: Roofline | None) -> None:
    """The table."""
    groups: dict[str, list[tuple[Timed, float]]] = defaultdict(list)
    last = began
    for step in steps:
        if step.tokens == step.rows:
            kind = f"rows   <= {next(c for c in ROW_CLASSES if step.rows <= c):5}"
        else:
            kind = f"tokens <= {next(c for c in TOKEN_CLASSES if step.tokens <= c):5}"
        groups[kind].append((step, step.ended - last))
        last = step.ended
    print("kind              steps  total ms  median    floor   schedule  launch  commit  wait us")
    for kind, found in sorted(groups.items()):
        spans = [span for _, span in found]
        floor = statistics.median(least(roof, step) for step, _ in found) if roof else 0.0
        host = [
            1e6 * statistics.median(getattr(step, name) for step, _ in found)
            for name in ("schedule", "launch", "commit", "wait")
        ]
        print(
            f"{kind}  {len(found):5}  {1e3 * sum(spans):8.1f}"
            f"  {1e3 * statistics.median(spans):6.2f}"
            f"  {1e3 * floor:6.2f}   " + "  ".join(f"{value:7.0f}" for value in host)
        )


def least(roof: Roofline, step: Timed) -> float:
    """Seconds that the step takes at least."""
    linear = roof._linear_seconds(step.tokens, step.rows)
    moved = step.rows * roof.kv_numbers(step.context / step.rows)
    return linear + roof._to_move(moved + step.tokens * roof._traffic)


if __name__ == "__main__":
    main()
