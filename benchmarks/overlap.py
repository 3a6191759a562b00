"""Does attention of decode rows run beside matrix products, on two streams of one graph?

    python benchmarks/overlap.py

What nano-batches would gain at most: µs of a Llama-8B layer's products for T tokens, of decode
attention for R rows, of both one after the other, and of both at once, as CUDA graphs. One JSON
line with a row for each size.
"""

from __future__ import annotations

import json

import torch
from _attention import COMMON, make
from _graphs import microseconds

from pagedserve.attention.triton import Processors
from pagedserve.commands.bench import machine
from pagedserve.kernels import paged_decode

MATRICES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SIZES = ((256, 128, 640), (1024, 128, 640), (2048, 256, 640), (4096, 256, 1024))


def main() -> None:
    found = [measure(*size) for size in SIZES]
    print(json.dumps({"benchmark": "overlap", "us": found, **machine.versions()}))


def measure(tokens: int, rows: int, context: int) -> dict[str, float]:
    """Times of one size."""
    case = make(COMMON, [(1, context)] * rows)
    processors = Processors.of(torch.device("cuda"))
    tuning = paged_decode.tune(COMMON, processors.count, processors.capability)
    plan = paged_decode.plan_decode(
        COMMON, tuning, case.block_tables, case.seq_lens, case.query_start_loc
    )
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for n, k in MATRICES]
    inputs = [torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda") for _, k in MATRICES]
    outputs = [torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda") for n, _ in MATRICES]
    side = torch.cuda.Stream()

    def products() -> None:
        for x, w, out in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, w.T, out=out)

    def attention() -> None:
        paged_decode.paged_decode(case.q, case.layers[0], case.out, plan, scale=0.1)

    def in_turn() -> None:
        attention()
        products()

    def together() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            attention()
        products()
        torch.cuda.current_stream().wait_stream(side)

    ways = {"products": products, "attention": attention, "in_turn": in_turn, "together": together}
    times = {name: round(microseconds([way] * 8), 1) for name, way in ways.items()}
    return {"tokens": tokens, "rows": rows, "context": context, **times}


if __name__ == "__main__":
    main()
