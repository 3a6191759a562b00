"""Rows of the embedding's table, one a token, by a kernel that starts while the one before ends.

Meaning: `reference.embed`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, wait

BLOCK = 1024  # columns of one program


@triton.jit
def embed_kernel(ids, table, out, size, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, blocks of columns). table: [rows, size], out: [T, size] contiguous."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wait(PDL)
    row = tl.load(ids + token).to(tl.int64)
    found = tl.load(table + row * row_stride + column, mask=inside)
    tl.store(out + token * size + column, found, mask=inside)


def embed(input_ids: Tensor, table: Tensor) -> Tensor:
    """input_ids: [T] int64, each a row of `table` [rows, C] → [T, C]."""
    tokens, size = input_ids.shape[0], table.shape[1]
    assert input_ids.stride() == (1,) and table.stride(1) == 1
    out = torch.empty((tokens, size), dtype=table.dtype, device=table.device)
    if tokens:
        embed_kernel[(tokens, triton.cdiv(size, BLOCK))](
            input_ids,
            table,
            out,
            size,
            table.stride(0),
            BLOCK=BLOCK,
            num_warps=4,
            **dependent(table),
        )
    return out


AOT = [
    Variant(
        "embed",
        embed_kernel,
        {
            "ids": "*i64",
            **dict.fromkeys(("table", "out"), "*bf16"),
            "size": "i32",
            "row_stride": "i32",
        },
        {"BLOCK": BLOCK, "PDL": True},
        sass=("LDG.E.128", "STG.E.128"),
        capability=90,
    )
]
AOT.append(older(AOT[0]))
