"""Paged caches at random, and what attention over them is, in float32 and plain torch.

Unused memory of a cache is NaN, as is every slot that no token was written to.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve.attention.batch import Batch
from pagedserve.spec import Attn


@dataclass(slots=True)
class Paged:
    """Rows (context, tokens to compute) over one layer of a cache."""

    attn: Attn
    q: Tensor
    k: Tensor
    v: Tensor | None
    kv: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor
    lens: list[int]
    counts: list[int]
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def num_decodes(self) -> int:
        return self.counts.count(1)


def paged(
    attn: Attn,
    rows: list[tuple[int, int]],
    *,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    index: torch.dtype = torch.int64,
    layers: int = 3,
    written: bool = True,
    ordered: bool = True,
    seed: int = 0,
) -> Paged:
    """A shuffled cache of `layers` layers, of which the middle one is seen.

    ordered: rows of one token first. written: this step's keys and values are in it already. q, k
    and v are views of one tensor, as they come from a projection.
    """
    if ordered:
        rows = sorted(rows, key=lambda row: row[1] != 1)
    lens, counts = [n for n, _ in rows], [c for _, c in rows]
    make = torch.Generator(device=device).manual_seed(seed)
    needed = [-(-n // block_size) for n in lens]
    blocks = list(range(sum(needed) + 3))
    random.Random(seed).shuffle(blocks)
    width, parts = max(1, *needed), 1 if attn.values_in_keys else 2
    tables = [[blocks.pop() for _ in range(n)] for n in needed]
    tables = [(table + [blocks[0]] * width)[:width] for table in tables]
    block_tables = torch.tensor(tables, dtype=index, device=device)
    shape = (sum(needed) + 3, layers, parts, block_size, attn.kv_heads, attn.head_dim)
    kv = torch.full(shape, torch.nan, dtype=dtype, device=device)[:, layers // 2]
    starts = [0, *itertools.accumulate(counts)]
    tokens, new = starts[-1], []
    slots: list[Tensor] = []
    for row, (length, count) in enumerate(rows):
        position = torch.arange(length, device=device)
        at = block_tables[row, position // block_size].long() * block_size + position % block_size
        values = torch.randn(
            (length, parts, attn.kv_heads, attn.head_dim), generator=make, device=device
        ).to(dtype)
        old = length if written else length - count
        for part in range(parts):
            kv[at[:old] // block_size, part, at[:old] % block_size] = values[:old, part]
        slots.append(at[length - count :])
        new.append(values[length - count :])
    fresh = torch.cat(new)
    heads = attn.heads + parts * attn.kv_heads
    packed = torch.randn((tokens, heads, attn.head_dim), generator=make, device=device).to(dtype)
    packed[:, attn.heads :] = fresh.flatten(1, 2)
    q, k, *v = packed.split([attn.heads] + [attn.kv_heads] * parts, 1)
    return Paged(
        attn,
        q,
        k,
        v[0] if v else None,
        kv,
        block_tables,
        torch.tensor(lens, dtype=index, device=device),
        torch.tensor(starts, dtype=index, device=device),
        torch.cat(slots).to(index),
        lens,
        counts,
        torch.rand(attn.heads, generator=make, device=device) if attn.alibi else None,
        torch.randn(attn.heads, generator=make, device=device) if attn.sinks else None,
    )


def batch_of(case: Paged) -> Batch:
    """The step that computes the case; its tokens and positions are of no interest."""
    tokens = case.q.shape[0]
    zeros = torch.zeros(tokens, dtype=torch.int64, device=case.q.device)
    return Batch(
        input_ids=zeros,
        positions=zeros,
        slot_mapping=case.slot_mapping,
        block_tables=case.block_tables,
        seq_lens=case.seq_lens,
        query_start_loc=case.query_start_loc,
        counts=case.counts,
        lens=case.lens,
        num_decodes=case.num_decodes,
        block_size=case.kv.shape[2],
    )


def attend(case: Paged) -> Tensor:
    """Attention of every row by the formula: [T, H, width] float32. The cache must be written."""
    attn, kv = case.attn, case.kv
    outs = []
    for row, (length, count) in enumerate(zip(case.lens, case.counts, strict=True)):
        table = case.block_tables[row, : -(-length // kv.shape[2])].long()
        k = kv[table, 0].flatten(0, 1)[:length].float()
        if attn.values_in_keys:
            v = k[..., : attn.values_in_keys]
        else:
            v = kv[table, 1].flatten(0, 1)[:length].float()
        begin = sum(case.counts[:row])
        q = case.q[begin : begin + count].float()
        group = attn.heads // attn.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * attn.scale
        if attn.softcap:
            scores = attn.softcap * torch.tanh(scores / attn.softcap)
        keys = torch.arange(length, device=kv.device)
        own = keys[length - count :, None]
        if case.slopes is not None:
            scores = scores - case.slopes[:, None, None] * (own - keys)
        hidden = keys > own
        if attn.window:
            hidden = hidden | (keys <= own - attn.window)
        if attn.chunk:
            hidden = hidden | (keys // attn.chunk != own // attn.chunk)
        scores = scores.masked_fill(hidden, -torch.inf)
        if case.sinks is not None:
            sink = case.sinks[:, None, None].expand(-1, count, 1)
            weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outs)


def error(got: Tensor, wanted: Tensor) -> float:
    """‖got - wanted‖ / ‖wanted‖; NaN where anything is."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())
