"""Finds the fastest kernel for a product by trying, and keeps what it found on disk.

    measure(products) ── candidates of each, timed as graph replays over rotating weights ──▶ Table

Takes a few seconds a matrix, most of them compiling. What it finds holds for one GPU and one
version of Triton; `dispatch.by_rule` is what everybody else uses.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pagedserve.kernels import dispatch, gpu, launch
from pagedserve.kernels.dispatch import Choice, Gemv, Library, Product, Skinny, SplitK, Table
from pagedserve.kernels.gpu_matrix import GpuMatrix
from pagedserve.kernels.split_k import MAX_PROGRAMS, MAX_ROWS, Scratch

log = logging.getLogger("pagedserve")

ROTATED_BYTES = 256 << 20  # several times the L2 cache
MAX_COPIES = 64
REPLAYS = 7
FEW_OUTPUTS = 8192
SLACK = 0.98  # a finding that is hardly faster than the rule's choice is noise


def candidates(product: Product, table: Table) -> list[Choice]:
    """All that could be the fastest for it."""
    rows, columns = product.rows, product.columns
    if columns % 8 or rows > MAX_ROWS:
        return [Library()]
    found: list[Choice] = [Library()]
    if rows <= dispatch.GEMV_ROWS:
        lines = 2 if product.gated else 1
        for block_k in (512, 1024, 2048, 4096):
            for block_n in (1, 2, 4):
                sums = lines * block_n * block_k // (32 * min(4, block_k // 256))
                if block_k <= columns and 16 <= sums <= 64:
                    found.append(Gemv(block_n, block_k, min(4, block_k // 256)))
    if rows in dispatch.SKINNY_WEIGHTS:
        found += around(dispatch.skinny_blocks(product))
    if rows >= 2:
        blocks = -(-product.size // dispatch.BLOCK_N)
        rule = dispatch.split_blocks(product, table.processors, table.capability)
        for parts in sorted({1, max(1, rule.parts // 2), rule.parts, min(2 * rule.parts, 16)}):
            if blocks * parts <= MAX_PROGRAMS or parts == 1:
                for stages in range(max(2, rule.num_stages - 1), rule.num_stages + 2):
                    found.append(replace(rule, parts=parts, num_stages=stages))
        if table.capability >= 90:
            found.append(replace(rule, early=True))
        if product.size <= FEW_OUTPUTS:
            # Half as many outputs a program, for matrices that leave multiprocessors idle.
            narrow = replace(rule, block_n=dispatch.BLOCK_N // 2)
            found += [replace(narrow, parts=n) for n in sorted({1, rule.parts})]
    room = dispatch.SHARED_BYTES.get(table.capability, min(dispatch.SHARED_BYTES.values()))
    return [
        choice
        for choice in found
        if not isinstance(choice, SplitK) or dispatch.shared_bytes(product, choice) <= room
    ]


def around(rule: Skinny) -> list[Choice]:
    """`rule`, and what differs from it in one thing."""
    ahead = rule.ahead * rule.block_k // 64
    return [
        rule,
        replace(rule, lines=48 - rule.lines),
        replace(
            rule, block_k=192 - rule.block_k, ahead=ahead if rule.block_k > 64 else -(-ahead // 2)
        ),
        replace(rule, num_warps=12 - rule.num_warps),
        replace(rule, ahead=rule.ahead + 1),
        *([replace(rule, ahead=rule.ahead - 1)] if rule.ahead > 1 else []),
    ]


def products(
    shapes: Iterable[tuple[int, int]], gates: Iterable[tuple[int, int]], rows: Iterable[int]
) -> list[Product]:
    """Of matrices (out, in), those in `gates` as gate and up, for each number of rows."""
    gated = set(gates)
    return [
        Product(n, out // 2 if (out, columns) in gated else out, columns, (out, columns) in gated)
        for out, columns in sorted(shapes)
        for n in rows
    ]


def measure(
    products: Iterable[Product],
    device: torch.device,
    cache: Path,
    on_finding: Callable[[str], None] = log.info,
) -> Table:
    """Try all candidates for each, in bfloat16; save and return what won."""
    index = device.index or 0
    identity = gpu.identity(device)
    path = cache / gpu.TABLE
    table = Table(
        launch.processors(index), launch.capability(index), dispatch.findings(path, identity)
    )
    scratch = Scratch.on(device)
    for product in dict.fromkeys(products):
        rule = dispatch.by_rule(product, table.processors, table.capability)
        times = {
            choice: timed(product, choice, scratch, table)
            for choice in [rule, *(c for c in candidates(product, table) if c != rule)]
        }
        best = min(times, key=lambda choice: times[choice])
        if times[best] > SLACK * times[rule]:
            best = rule
        table.findings[product.key] = best
        on_finding(f"{product.key}: {best}, {times[best]:.1f} µs (rule {times[rule]:.1f})")
    dispatch.save(table, path, identity)
    return table


def timed(product: Product, choice: Choice, scratch: Scratch, table: Table) -> float:
    """Microseconds of one product, infinite where the GPU cannot run it."""
    size = product.size * (2 if product.gated else 1)
    copies = max(2, min(MAX_COPIES, ROTATED_BYTES // (size * product.columns * 2)))
    forced = Table(table.processors, table.capability, {product.key: choice})
    device = scratch.part.device
    x = torch.randn((product.rows, product.columns), device=device).bfloat16()
    matrices = [
        GpuMatrix(random_weight(size, product.columns, device), scratch, forced)
        for _ in range(copies)
    ]
    gated = "silu" if product.gated else None
    # Launches that read weights early must find them written.
    torch.cuda.synchronize(device)
    try:
        return replayed([lambda m=m: m.fused(x, gated=gated) for m in matrices])  # type: ignore[misc]
    except Exception as reason:  # whatever a compiler or a driver raises, the others still count
        log.warning("%s with %s: %s", product.key, choice, reason)
        return float("inf")


def random_weight(size: int, columns: int, device: torch.device) -> Tensor:
    """Not zeros: those take less power, and are faster."""
    return torch.randn((size, columns), device=device).mul_(0.02).bfloat16()


def replayed(launches: list[Callable[[], object]]) -> float:
    """Median microseconds of one, all in a graph."""
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in launches:
            one()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return statistics.median(times)
