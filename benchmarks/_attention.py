"""Attention kernels: decode by bytes of keys and values, prefill by floating-point operations.

Shapes are an 8B model's (32 query heads, 8 of keys, 128 numbers) and one with heads of 64 and
windows. Layers are strided views of one cache, as in the server, and every launch of a timed graph
takes another layer, as far as there are any.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from _graphs import microseconds, read_terabytes_per_second, show
from torch import Tensor

from pagedserve.attention.triton import Processors
from pagedserve.kernels import (
    kv_write,
    paged_decode,
    paged_decode_bulk,
    paged_decode_cuda,
    paged_prefill,
    paged_prefill_wgmma,
)
from pagedserve.kernels.paged_decode import Shape

COMMON = Shape(kv_heads=8, group=4, width=128)
SMALL = Shape(kv_heads=8, group=8, width=64)
LATENT = Shape(kv_heads=1, group=16, width=512, rest=64, latent=True)
LATENT_128 = replace(LATENT, group=128)
HALF = Shape(kv_heads=8, group=2, width=128)
DECODE_SHAPES = {
    "8×4 heads of 128": COMMON,
    "8×2 heads of 128": HALF,
    "8×8 heads of 64": SMALL,
    "16 heads on latents": LATENT,
    "128 heads on latents": LATENT_128,
}
CACHE_BYTES = 6 << 30
NUM_LAUNCHES = 32

DECODE = {  # name → context of each row
    "1×128": [128],
    "1×1k": [1024],
    "1×8k": [8192],
    "1×32k": [32768],
    "8×1k": [1024] * 8,
    "8×4k": [4096] * 8,
    "32k + 7×128": [32768] + [128] * 7,
    "32×1k": [1024] * 32,
    "32×4k": [4096] * 32,
    "128×640": [640] * 128,
    "256×640…690": [640 + row % 51 for row in range(256)],
    "256×512": [512] * 256,
    "256×1k": [1024] * 256,
    "256×2k": [2048] * 256,
    "64k + 31×4k": [65536] + [4096] * 31,
    "128 of 100…3k": [100 + 23 * row for row in range(128)],
}
PREFILL = {  # name → (tokens, context) of each row
    "16×512": [(512, 512)] * 16,
    "4×2k": [(2048, 2048)] * 4,
    "1×1k": [(1024, 1024)],
    "1×4k": [(4096, 4096)],
    "1×8k": [(8192, 8192)],
    "2k on 16k": [(2048, 18432)],
    "1×32k": [(32768, 32768)],
    "mixed 100…1.5k": [(100 + 90 * row,) * 2 for row in range(16)],
}
# Of the CUDA kernel: cluster, warps, tiles at a time, turns ahead, tiles asked of L2.
FEW_ROWS_SWEEP = [
    (cluster, 4, tiles, depth, 0)
    for cluster in (4, 8, 16)
    for tiles, depth in ((1, 0), (2, 0), (1, 2), (2, 2))
]
# tile, programs a processor, tokens of a bin at least, warps, stages
DECODE_SWEEP = {
    COMMON: [
        (64, 2, 128, 4, 5),
        (64, 2, 64, 4, 5),
        (128, 2, 128, 4, 3),
        (64, 1, 128, 4, 7),
        (32, 3, 64, 4, 7),
        (32, 2, 64, 4, 7),
        (32, 4, 64, 2, 5),
        (64, 2, 64, 2, 5),
    ],
    LATENT: [(32, 1, 128, 4, 3), (16, 3, 64, 4, 3), (64, 1, 128, 8, 3), (32, 2, 64, 4, 2)],
    LATENT_128: [(16, 1, 64, 8, 2), (32, 1, 64, 8, 3)],
}
# queries · heads, keys, programs a processor, warps, stages
PREFILL_SWEEP = [(128, 64, 1, 8, 3), (128, 128, 1, 8, 2)]


@dataclass(slots=True)
class Case:
    """Rows over a cache of many layers."""

    shape: Shape
    q: Tensor
    out: Tensor
    layers: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor


def make(shape: Shape, rows: list[tuple[int, int]]) -> Case:
    """rows: (tokens, context). Blocks are shuffled."""
    size, parts = shape.width + shape.rest, 1 if shape.latent else 2
    needed = [-(-context // shape.page) for _, context in rows]
    block = parts * shape.page * shape.kv_heads * size
    num_layers = max(1, min(NUM_LAUNCHES, CACHE_BYTES // (2 * block * sum(needed))))
    cache = torch.empty((sum(needed), num_layers * block), dtype=torch.bfloat16, device="cuda")
    cache.normal_()
    views = cache.unflatten(1, (num_layers, parts, shape.page, shape.kv_heads, size))
    order = torch.randperm(sum(needed)).tolist()
    tables = torch.zeros((len(rows), max(needed)), dtype=torch.int32)
    for row, (start, count) in enumerate(
        zip(itertools.accumulate([0, *needed]), needed, strict=False)
    ):
        tables[row, :count] = torch.tensor(order[start : start + count], dtype=torch.int32)
    tokens, heads = sum(count for count, _ in rows), shape.kv_heads * shape.group
    q = torch.randn((tokens, heads, size), dtype=torch.bfloat16, device="cuda")
    starts = [0, *itertools.accumulate(count for count, _ in rows)]
    lens = [context for _, context in rows]
    return Case(
        shape,
        q,
        q.new_empty((tokens, heads, shape.width)),
        [views[:, layer] for layer in range(num_layers)],
        tables.cuda(),
        torch.tensor(lens, dtype=torch.int32, device="cuda"),
        torch.tensor(starts, dtype=torch.int32, device="cuda"),
    )


def decode_time(case: Case, tuning: paged_decode.Tuning) -> float:
    """Microseconds a layer; planning is not in it."""
    plan = paged_decode.plan_decode(
        case.shape, tuning, case.block_tables, case.seq_lens, case.query_start_loc
    )

    def launch(layer: Tensor) -> None:
        paged_decode.paged_decode(
            case.q,
            layer,
            case.out,
            plan,
            scale=case.q.shape[2] ** -0.5,
        )

    layers = itertools.islice(itertools.cycle(case.layers), NUM_LAUNCHES)
    return microseconds([lambda kv=kv: launch(kv) for kv in layers])


def few_rows_time(
    case: Case,
    native: paged_decode_cuda.Native,
    tuning: paged_decode_cuda.Tuning,
) -> float:
    """The same by CUDA C++, as in a step: the first layer after all before it, the others early."""

    def launch(layer: Tensor, first: bool) -> None:
        paged_decode_cuda.paged_decode_cuda(
            native,
            case.q,
            layer,
            case.out,
            case.block_tables,
            case.seq_lens,
            case.shape,
            tuning,
            scale=case.q.shape[2] ** -0.5,
            first=first,
        )

    layers = enumerate(itertools.islice(itertools.cycle(case.layers), NUM_LAUNCHES))
    return microseconds([lambda kv=kv, first=not i: launch(kv, first) for i, kv in layers])


def few_rows(case: Case, processors: Processors, sweep: bool) -> dict[str, float]:
    """Microseconds by CUDA C++, where it is built and fits."""
    native = paged_decode_cuda.load()
    given = case.shape, case.q, case.layers[0], case.block_tables, case.seq_lens
    if native is None or paged_decode_cuda.refusal(*given):
        return {}
    chosen = paged_decode_cuda.tune(case.shape, len(case.seq_lens), processors.count)
    tunings = {"CUDA": chosen}
    for cluster, warps, tiles, depth, ahead in FEW_ROWS_SWEEP if sweep else []:
        name = f"CUDA c{cluster} w{warps} t{tiles} d{depth}" + (f" +{ahead}" if ahead else "")
        tunings[name] = paged_decode_cuda.Tuning(cluster, warps, tiles, depth, ahead)
    return {how: few_rows_time(case, native, tuning) for how, tuning in tunings.items()}


def many_rows_time(
    case: Case, native: paged_decode_cuda.Native, tuning: paged_decode_bulk.Tuning
) -> float:
    """As `few_rows_time`; planning is not in it."""
    plan = paged_decode_bulk.plan_bulk(
        native, case.shape, tuning, case.block_tables, case.seq_lens, case.query_start_loc
    )
    maps = paged_decode_bulk.CacheMaps(native)

    def launch(layer: Tensor, first: bool) -> None:
        paged_decode_bulk.paged_decode_bulk(
            native,
            case.q,
            layer,
            case.out,
            plan,
            maps,
            scale=case.q.shape[2] ** -0.5,
            first=first,
        )

    layers = enumerate(itertools.islice(itertools.cycle(case.layers), NUM_LAUNCHES))
    return microseconds([lambda kv=kv, first=not i: launch(kv, first) for i, kv in layers])


def many_rows(case: Case, processors: Processors, sweep: bool) -> dict[str, float]:
    """Microseconds by CUDA C++ for many rows, where it is built and fits."""
    native = paged_decode_cuda.load()
    given = case.shape, case.q, case.layers[0], case.block_tables, case.seq_lens
    if native is None or paged_decode_bulk.refusal(*given, case.query_start_loc):
        return {}
    chosen = paged_decode_bulk.tune(native, case.shape, processors.count)
    tunings = {"CUDA": chosen}
    for stages in range(2, chosen.stages) if sweep else []:
        tunings[f"CUDA s{stages}"] = replace(chosen, stages=stages)
    return {how: many_rows_time(case, native, tuning) for how, tuning in tunings.items()}


def decode_bytes(case: Case) -> int:
    """Keys and values that all rows see, each read once; window and chunk left out."""
    parts = 1 if case.shape.latent else 2
    width = parts * case.shape.kv_heads * (case.shape.width + case.shape.rest)
    return int(case.seq_lens.sum()) * width * 2


def decode(processors: Processors, peak: float, quick: bool, sweep: bool) -> list[dict[str, Any]]:
    found = []
    show(f"decode, µs (TB/s; share of the {peak:.2f} TB/s that a sum reads at)")
    for label, shape in DECODE_SHAPES.items():
        cases = dict(list(DECODE.items())[:1]) if quick else DECODE
        for name, lens in cases.items():
            case = make(shape, [(1, n) for n in lens])
            chosen = paged_decode.tune(shape, processors.count, processors.capability, len(lens))
            tunings = {"chosen": chosen}
            for tile, each, tokens, warps, stages in DECODE_SWEEP.get(shape, []) if sweep else []:
                tunings[f"{tile} ×{each} ≥{tokens} w{warps} s{stages}"] = replace(
                    chosen,
                    tile=tile,
                    bins=max(1, processors.count * each // shape.lanes),
                    min_tiles=tokens // tile,
                    num_warps=warps,
                    num_stages=stages,
                )
            size, texts = decode_bytes(case), []
            times = {how: decode_time(case, tuning) for how, tuning in tunings.items()}
            times |= few_rows(case, processors, sweep) | many_rows(case, processors, sweep)
            for how, time in times.items():
                rate = size / time / 1e6
                found.append(
                    {"shape": label, "case": name, "how": how, "us": time, "tb_per_s": rate}
                )
                texts.append(f"{how}: {time:.1f} ({rate:.2f}; {rate / peak:.0%})")
            show(f"  {label} {name:14} " + " · ".join(texts))
    return found


def prefill_operations(shape: Shape, rows: list[tuple[int, int]]) -> float:
    """Of both products, over the keys that queries see."""
    pairs = 0.0
    for count, context in rows:
        if shape.window:
            pairs += sum(min(p + 1, shape.window) for p in range(context - count, context))
        else:
            pairs += count * (context - count) + count * (count + 1) / 2
    heads = shape.kv_heads * shape.group
    return pairs * heads * 2 * (2 * shape.width + shape.rest)


def prefill_time(case: Case, processors: Processors, tuning: paged_prefill.Tuning | None) -> float:
    """Microseconds a layer, by Triton's kernel with `tuning`, by Gluon's without."""
    shape, tokens = case.shape, case.q.shape[0]
    descriptors = paged_prefill_wgmma.CacheDescriptors()
    scale = case.q.shape[2] ** -0.5
    size = (
        paged_prefill.tokens_of(shape, tuning)
        if tuning is not None
        else paged_prefill_wgmma.TILE_TOKENS
    )
    plan = paged_prefill.plan_prefill(
        size, tokens, case.seq_lens, case.query_start_loc, window=shape.window
    )

    def launch(kv: Tensor) -> None:
        if tuning is not None:
            paged_prefill.paged_prefill(
                case.q, kv, case.out, case.block_tables, plan, shape, tuning, scale=scale
            )
        else:
            paged_prefill_wgmma.paged_prefill_wgmma(
                case.q,
                kv,
                case.out,
                case.block_tables,
                plan,
                shape,
                descriptors,
                scale=scale,
                programs=processors.count,
            )

    layers = itertools.islice(itertools.cycle(case.layers), 8)
    return microseconds([lambda kv=kv: launch(kv) for kv in layers])


def dense_time(shape: Shape, rows: list[tuple[int, int]]) -> float | None:
    """torch's own attention (cuDNN's) on rows of equal length, for comparison."""
    count, context = rows[0]
    if len(set(rows)) > 1 or count != context or shape.window:
        return None
    q, k, v = (
        torch.randn((len(rows), heads, count, shape.width), dtype=torch.bfloat16, device="cuda")
        for heads in (shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads)
    )
    attend = functools.partial(
        F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        try:
            return microseconds([attend] * 8)
        except RuntimeError as error:
            show(f"  cuDNN refuses: {error}")
            return None


def prefill(processors: Processors, quick: bool, sweep: bool) -> list[dict[str, Any]]:
    found = []
    show("prefill, TFLOP/s")
    shapes = {
        "8×4 heads of 128": COMMON,
        "8×4 heads of 128, blocks of 64": replace(COMMON, page=64),
        "8×8 heads of 64": SMALL,
        "8×8 heads of 64, window of 128": replace(SMALL, window=128),
    }
    for label, shape in shapes.items():
        cases = dict(list(PREFILL.items())[:1]) if quick else PREFILL
        for name, rows in cases.items():
            case = make(shape, rows)
            ways: dict[str, Any] = {
                "Triton": paged_prefill.tune(shape, processors.count, processors.capability)
            }
            if (
                paged_prefill_wgmma.refusal(shape, case.q, case.layers[0], processors.capability)
                is None
            ):
                ways["Gluon"] = None
            if sweep and shape == COMMON:
                for m, n, each, warps, stages in PREFILL_SWEEP:
                    ways[f"Triton {m}×{n} ×{each} w{warps} s{stages}"] = paged_prefill.Tuning(
                        m, n, processors.count * each, warps, stages
                    )
            work = prefill_operations(shape, rows)
            times = {how: prefill_time(case, processors, tuning) for how, tuning in ways.items()}
            dense = dense_time(shape, rows) if shape in (COMMON, SMALL) else None
            if dense is not None:
                times["cuDNN, dense"] = dense
            texts = []
            for how, time in times.items():
                rate = work / time / 1e6
                found.append(
                    {"shape": label, "case": name, "how": how, "us": time, "tflop_per_s": rate}
                )
                texts.append(f"{how}: {rate:.0f} ({time:.0f} µs)")
            show(f"  {label} {name:14} " + " · ".join(texts))
    return found


def small(processors: Processors) -> dict[str, float]:
    """What a step pays once (plans) or per layer beside attention (writing), µs."""
    found = {}
    for rows in (1, 256):
        case = make(COMMON, [(1, 512)] * rows)
        tuning = paged_decode.tune(COMMON, processors.count, processors.capability, rows)
        found[f"plan_decode, {rows} rows"] = microseconds(
            [
                lambda case=case, tuning=tuning: paged_decode.plan_decode(
                    COMMON, tuning, case.block_tables, case.seq_lens, case.query_start_loc
                )
            ]
            * 8
        )
    for tokens, rows in ((8192, 16), (8192, 1), (300, 250)):
        each = tokens // rows
        case = make(COMMON, [(each, each)] * rows)
        found[f"plan_prefill, {rows} rows, {tokens} tokens"] = microseconds(
            [
                lambda case=case, tokens=tokens: paged_prefill.plan_prefill(
                    128, tokens, case.seq_lens, case.query_start_loc
                )
            ]
            * 8
        )
    for tokens in (1, 256, 8192):
        case = make(COMMON, [(tokens, tokens)])
        slots = torch.randperm(math.ceil(tokens / 16) * 16, device="cuda")[:tokens]
        k = torch.randn((tokens, 8, 128), dtype=torch.bfloat16, device="cuda")
        found[f"kv_write, {tokens} tokens"] = microseconds(
            [
                lambda kv=kv, slots=slots, k=k: kv_write.kv_write(kv, slots, k, k)
                for kv in itertools.islice(itertools.cycle(case.layers), NUM_LAUNCHES)
            ]
        )
        found[f"clear_tails, 1 row of {tokens} tokens"] = microseconds(
            [
                lambda kv=kv, case=case: kv_write.clear_tails(
                    kv, case.block_tables, case.seq_lens, case.query_start_loc
                )
                for kv in itertools.islice(itertools.cycle(case.layers), NUM_LAUNCHES)
            ]
        )
    for name, time in found.items():
        show(f"  {name}: {time:.1f} µs")
    return found


def run(*, quick: bool, sweep: bool) -> dict[str, Any]:
    """All tables."""
    processors = Processors.of(torch.device("cuda"))
    peak = read_terabytes_per_second()
    return {
        "read_tb_per_s": peak,
        "small_us": small(processors),
        "decode": decode(processors, peak, quick, sweep),
        "prefill": prefill(processors, quick, sweep),
    }
