"""Products with a matrix for 1 to 512 rows: ours against torch's, alone and as a step's chain.

Shapes are Llama-3.1-8B's and Qwen3-0.6B's linear layers. Every launch of a timed graph takes
another copy of the weights, together several times the L2 cache. `floor` is the time that the
weights take at the read rate of this GPU, or the operations at 790 TFLOP/s, whichever is longer.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _graphs import microseconds, read_terabytes_per_second, show
from torch import Tensor

from pagedserve.kernels import activation, dispatch, gpu_matrix, launch, norm, qk_rope_kv
from pagedserve.kernels.dispatch import Choice, Gemv, Library, Product, Skinny, SplitK
from pagedserve.kernels.matrix import PlainMatrix, RmsWeight
from pagedserve.kernels.split_k import Scratch
from pagedserve.kernels.tuning import candidates

CACHE_BYTES = 300 << 20
FLOPS = 790e12


@dataclass(frozen=True)
class Shape:
    """A layer's matrix and what is fused around it."""

    name: str
    size: int  # outputs; a gated matrix has twice as many rows
    columns: int
    norm: bool = False
    gated: bool = False
    residual: bool = False

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.size * self.columns * (4 if self.gated else 2)


MODELS = {
    "8b": [
        Shape("qkv", 6144, 4096, norm=True),
        Shape("o", 4096, 4096, residual=True),
        Shape("gate_up", 14336, 4096, norm=True, gated=True),
        Shape("down", 4096, 14336, residual=True),
        Shape("head", 128256, 4096, norm=True),
    ],
    "0.6b": [
        Shape("qkv", 4096, 1024, norm=True),
        Shape("o", 1024, 2048, residual=True),
        Shape("gate_up", 3072, 1024, norm=True, gated=True),
        Shape("down", 1024, 3072, residual=True),
        Shape("head", 151936, 1024, norm=True),
    ],
}
LAYERS = {"8b": 32, "0.6b": 28}
HEADS = {"8b": (32, 8, 128), "0.6b": (16, 8, 128)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def table(device: torch.device) -> dispatch.Table:
    """Rules only."""
    index = device.index or 0
    return dispatch.Table(launch.processors(index), launch.capability(index))


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """bf16 on the GPU."""
    return torch.randn(*shape, device="cuda").mul_(scale).bfloat16()


def matrix(shape: Shape, scratch: Scratch, known: dispatch.Table) -> gpu_matrix.GpuMatrix:
    """With random weights."""
    rows = shape.size * (2 if shape.gated else 1)
    return gpu_matrix.GpuMatrix(random(rows, shape.columns, scale=0.02), scratch, known)


def around(shape: Shape, rows: int) -> dict[str, Any]:
    """What is fused, as arguments of `fused`."""
    return {
        "norm": RmsWeight(random(shape.columns), 1e-6) if shape.norm else None,
        "gated": "silu" if shape.gated else None,
        "residual": random(rows, shape.size) if shape.residual else None,
    }


def compile_one(job: tuple[Shape, int, Choice]) -> None:
    """In a process of its own: the compiled kernel is left in Triton's cache on disk."""
    shape, rows, choice = job
    small = Shape(shape.name, 64, shape.columns, shape.norm, shape.gated, shape.residual)
    device = torch.device("cuda", 0)
    known = table(device)
    bucket = launch.power_of_2(rows)
    known.findings[Product(bucket, 64, shape.columns, shape.gated).key] = choice
    matrix(small, Scratch.on(device), known).fused(
        random(rows, shape.columns), **around(small, rows)
    )
    torch.cuda.synchronize()


def compile_all(jobs: list[tuple[Shape, int, Choice]]) -> None:
    """On as many cores as there are."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 14), mp_context=spawn) as pool:
        list(pool.map(compile_one, jobs, chunksize=1))


def torch_only(weight: Tensor, x: Tensor, fused: dict[str, Any]) -> Tensor:
    """The product alone, by torch: what cuBLAS takes, with nothing around it."""
    if fused["residual"] is not None:
        return torch.addmm(fused["residual"], x, weight.t())
    return F.linear(x, weight)


def run(*, quick: bool, sweep: bool) -> dict[str, Any]:
    """Each matrix, then whole steps."""
    device = torch.device("cuda", 0)
    rate = read_terabytes_per_second()
    show(f"read rate {rate:.2f} TB/s")
    scratch, known = Scratch.on(device), table(device)
    rows_list = (1, 8) if quick else ROWS
    jobs = [
        (shape, rows, choice)
        for shapes in MODELS.values()
        for shape in shapes
        for rows in rows_list
        for choice in choices(shape, rows, known, sweep)
        if not isinstance(choice, Library)
    ]
    distinct = {}
    for shape, rows, choice in jobs:
        size_free = (shape.columns, shape.norm, shape.gated, shape.residual, rows)
        if isinstance(choice, SplitK):
            size_free = (shape.gated, shape.residual, max(rows, 16), choice.parts > 1)
            choice_key: Any = replace(choice, parts=0)
        elif isinstance(choice, Skinny):
            size_free = (*size_free[:-1], max(rows, 8))
            choice_key = choice
        else:
            choice_key = choice
        distinct.setdefault((size_free, choice_key), (shape, rows, choice))
    compile_all(list(distinct.values()))
    found: dict[str, Any] = {"read_tb_per_s": round(rate, 3)}
    for model, shapes in MODELS.items():
        for shape in shapes:
            for rows in rows_list:
                key = f"{model} {shape.name} {rows}"
                found[key] = one(shape, rows, scratch, known, rate, sweep)
                show(f"{key:20s} {found[key]}")
    found["steps"] = steps(scratch, known, quick)
    return found


def choices(shape: Shape, rows: int, known: dispatch.Table, sweep: bool) -> list[Choice]:
    """Those of the rules, or all that could win."""
    product = Product(launch.power_of_2(rows), shape.size, shape.columns, shape.gated)
    chosen = known.choose(product)
    return [chosen, *(c for c in candidates(product, known) if c != chosen)] if sweep else [chosen]


def one(
    shape: Shape, rows: int, scratch: Scratch, known: dispatch.Table, rate: float, sweep: bool
) -> dict[str, Any]:
    """Microseconds by kernel, the first ours by the rules."""
    copies = max(2, min(64, CACHE_BYTES // shape.weights))
    many = [matrix(shape, scratch, known) for _ in range(copies)]
    x, fused = random(rows, shape.columns), around(shape, rows)
    floor = max(shape.weights / rate / 1e6, shape.weights * rows / FLOPS * 1e6)
    plain = microseconds([lambda m=m: torch_only(m.weight, x, fused) for m in many])
    composed = microseconds([lambda m=m: PlainMatrix(m.weight).fused(x, **fused) for m in many])
    result: dict[str, Any] = {"floor": round(floor, 2), "torch": round(plain, 2)}
    result["torch with all around it"] = round(composed, 2)
    times = {}
    product = Product(launch.power_of_2(rows), shape.size, shape.columns, shape.gated)
    for choice in choices(shape, rows, known, sweep):
        forced = dispatch.Table(known.processors, known.capability, {product.key: choice})
        ours = [gpu_matrix.GpuMatrix(m.weight, scratch, forced) for m in many]
        time = microseconds([lambda m=m: m.fused(x, **fused) for m in ours])
        times[label(choice)] = round(time, 2)
    first = next(iter(times))
    result["ours"] = {first: times[first]}
    best = min(times, key=lambda name: times[name])
    if best != first:
        result["best"] = {best: times[best]}
    if sweep:
        result["all"] = times
    return result


def label(choice: Choice) -> str:
    """Short."""
    if isinstance(choice, Gemv):
        return f"gemv {choice.block_n}x{choice.block_k}/{choice.num_warps}"
    if isinstance(choice, Skinny):
        return f"skinny {choice.lines}x{choice.num_warps}·{choice.block_k}+{choice.ahead}"
    if isinstance(choice, SplitK):
        return (
            f"split {choice.parts} {choice.block_n}x{choice.block_k}"
            f"/{choice.num_warps}s{choice.num_stages}{' early' if choice.early else ''}"
        )
    return "library"


def steps(scratch: Scratch, known: dispatch.Table, quick: bool) -> dict[str, Any]:
    """All of a step but attention, ms: ours in five kernels a layer, torch's in nine."""
    found = {}
    for model in ("0.6b",) if quick else MODELS:
        heads, kv_heads, dim = HEADS[model]
        *layer, head = MODELS[model]
        layers = [[matrix(shape, scratch, known) for shape in layer] for _ in range(LAYERS[model])]
        last = matrix(head, scratch, known)
        weight = RmsWeight(random(layer[0].columns), 1e-6)
        kv = torch.zeros(64, 2, 16, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
        for rows in (1, 8, 32, 128):
            x = random(rows, layer[0].columns)
            angle = torch.randn(rows, 1, dim // 2, device="cuda")
            cos = torch.cat((angle.cos(), angle.cos()), -1).bfloat16()
            sin = torch.cat((-angle.sin(), angle.sin()), -1).bfloat16()
            slots = torch.randperm(1024, device="cuda")[:rows]

            step = (layers, last, weight, x, kv, (cos, sin), slots, heads)
            found[f"{model} {rows}"] = {
                "ours": round(microseconds([partial(ours, *step)]) / 1e3, 3),
                "early": round(microseconds([partial(ours, *early(step))]) / 1e3, 3),
                "cuBLAS": round(microseconds([partial(theirs, *step)]) / 1e3, 3),
            }
            show(f"step {model} {rows}: {found[f'{model} {rows}']} ms")
        del layers, last, step
        torch.cuda.empty_cache()
    return found


def early(step: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with split_k's first weights read before the wait."""
    layers, last, *rest = step

    def changed(m: gpu_matrix.GpuMatrix) -> gpu_matrix.GpuMatrix:
        choices = {
            key: replace(choice, early=True) if isinstance(choice, SplitK) else choice
            for key, choice in m.chosen.items()
        }
        return gpu_matrix.GpuMatrix(m.weight, m.scratch, m.table, choices)

    return ([[changed(m) for m in layer] for layer in layers], changed(last), *rest)


def ours(layers: Any, last: Any, weight: RmsWeight, x: Tensor, *rest: Any) -> Tensor:
    """Five kernels a layer where the rows are few."""
    kv, angles, slots, heads = rest
    for qkv, out, up, down in layers:
        q = qk_rope_kv.qk_rope_kv(qkv.fused(x, norm=weight), kv, slots, heads=heads, angles=angles)
        x = out.fused(q.view(len(x), -1), residual=x)
        x = down.fused(up.fused(x, norm=weight, gated="silu"), residual=x)
    return last.fused(x, norm=weight)


def theirs(layers: Any, last: Any, weight: RmsWeight, x: Tensor, *rest: Any) -> Tensor:
    """cuBLAS for the products, our kernels for what is between."""
    kv, angles, slots, heads = rest
    for qkv, out, up, down in layers:
        y = F.linear(norm.rms_norm(x, weight.weight, 1e-6), qkv.weight)
        q = qk_rope_kv.qk_rope_kv(y, kv, slots, heads=heads, angles=angles)
        x = torch.addmm(x, q.view(len(x), -1), out.weight.t())
        y = F.linear(norm.rms_norm(x, weight.weight, 1e-6), up.weight)
        x = torch.addmm(x, activation.act_and_mul(y, "silu"), down.weight.t())
    return F.linear(norm.rms_norm(x, weight.weight, 1e-6), last.weight)
