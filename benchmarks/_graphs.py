"""What kernel benchmarks share: a time that is the GPU's own, and tables."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import torch


def microseconds(launches: Sequence[Callable[[], object]], *, replays: int = 7) -> float:
    """Median time of one launch: all of them in one CUDA graph, replayed.

    Give launches over different memory, several times the GPU's cache in all, where data would not
    be in the cache in use either.
    """
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return statistics.median(times)


def read_terabytes_per_second() -> float:
    """The fastest that this GPU reads memory: a sum over 4 GiB."""
    data = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    out = torch.empty((), dtype=torch.float32, device="cuda")
    time = microseconds([lambda: torch.sum(data, dim=0, out=out)] * 3)
    return data.nbytes / time / 1e6


def show(text: str) -> None:
    """A line of a table."""
    print(text, file=sys.stderr, flush=True)
