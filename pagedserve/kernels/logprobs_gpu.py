"""Log-probabilities of chosen and of the likeliest tokens on a GPU, without a softmax in memory.

    tiles   (row, tile)   maximum, Σ exp, how many beat the chosen token, maxima of groups
    join    (row)         logit - log Σ exp, rank, and the top k: bounded by the k-th largest group
                          maximum as in `sample_gpu`, ranked pair by pair, written in order

Meaning: `worker.sampler.logprob_columns`; equal logits are in the order of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait
from pagedserve.kernels.sample_gpu import (
    CANDIDATES,
    GATHERED,
    GROUP,
    PAIRS,
    SCAN,
    SCANS,
    TILE,
    before,
    gather,
    kth_largest,
    ordered,
    reached,
    search,
    unordered,
)

MAX_TOP = 32


@triton.jit(do_not_specialize=["tiles"])
def tiles_kernel(
    logits,
    token_ids,
    wanted,
    tile_max,
    tile_sum,
    tile_above,
    group_max,
    vocab,
    tiles,
    row_stride,
    group_stride,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, tiles)."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    wait(PDL)
    if tl.load(wanted + row) >= 0:
        source = logits + row * row_stride
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(source + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        chosen = tl.load(source + tl.load(token_ids + row)).to(tl.float32)
        highest = tl.max(x, 0)
        shift = tl.where(highest > float("-inf"), highest, 0.0)
        out = row * tiles + tile
        tl.store(tile_max + out, highest)
        tl.store(tile_sum + out, tl.sum(tl.exp(x - shift), 0))
        tl.store(tile_above + out, tl.sum((x > chosen).to(tl.int32), 0))
        groups = tl.max(tl.reshape(x, [TILE // GROUP, GROUP]), 1)
        at = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        tl.store(group_max + row * group_stride + at, groups)


@triton.jit(do_not_specialize=["tiles", "groups"])
def join_kernel(
    logits,
    token_ids,
    wanted,
    tile_max,
    tile_sum,
    tile_above,
    group_max,
    group_list,
    candidate_value,
    candidate_token,
    logprobs,
    ranks,
    top_ids,
    top_logprobs,
    vocab,
    tiles,
    groups,
    row_stride,
    group_stride,
    top_stride,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GATHERED: tl.constexpr,
    PAIRS: tl.constexpr,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows)."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    wait(PDL)
    k = tl.load(wanted + row)
    if k >= 0:
        source = logits + row * row_stride
        t = tl.arange(0, TILES)
        at = row * tiles + t
        maxima = tl.load(tile_max + at, mask=t < tiles, other=float("-inf"))
        sums = tl.load(tile_sum + at, mask=t < tiles, other=0.0)
        above = tl.load(tile_above + at, mask=t < tiles, other=0)
        highest = tl.max(maxima, 0)
        shares = tl.where(maxima > float("-inf"), tl.exp(maxima - highest) * sums, 0.0)
        total = highest + tl.log(tl.sum(shares, 0))
        chosen = tl.load(source + tl.load(token_ids + row)).to(tl.float32)
        tl.store(logprobs + row, chosen - total)
        tl.store(ranks + row, tl.sum(above, 0) + 1)
        k = tl.minimum(k, vocab)
        if k > 0:
            values = candidate_value + row * CANDIDATES
            tokens = candidate_token + row * CANDIDATES
            g = tl.arange(0, GROUPS)
            of_groups = tl.load(
                group_max + row * group_stride + g, mask=g < groups, other=float("-inf")
            )
            alive = of_groups > float("-inf")
            bound = tl.zeros([], tl.float32) + float("-inf")
            if k <= tl.sum(alive.to(tl.int32), 0):
                bound = unordered(kth_largest(ordered(of_groups), alive, k).to(tl.int32))
            found = gather(
                source,
                vocab,
                1.0,
                bound,
                of_groups,
                alive,
                group_list + row * group_stride,
                values,
                tokens,
                GROUPS,
                GROUP,
                CANDIDATES,
                GATHERED,
            )
            if (found > CANDIDATES) | (found < k):
                found = gather_by_search(
                    source, vocab, highest, k, values, tokens, SCANS, SCAN, CANDIDATES
                )
            tl.debug_barrier()
            c = tl.arange(0, CANDIDATES)
            v = tl.load(values + c, mask=c < found, other=float("-inf"))
            rank = tl.zeros([CANDIDATES], tl.int32)
            for first in range(0, found, PAIRS):
                j = first + tl.arange(0, PAIRS)
                other = tl.load(values + j, mask=j < found, other=float("-inf"))
                here = before(other, j, v, c) & (j < found)[:, None]
                rank += tl.sum(here.to(tl.int32), 0)
            best = (c < found) & (rank < k)
            ids = tl.load(tokens + c, mask=best, other=0)
            tl.store(top_ids + row * top_stride + rank, ids, mask=best)
            tl.store(top_logprobs + row * top_stride + rank, v - total, mask=best)


@triton.jit
def gather_by_search(
    source,
    vocab,
    highest,
    k,
    values,
    tokens,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The k likeliest tokens, those of -inf among them, by an exact threshold. Their number."""
    none = tl.zeros([], tl.float32) + float("-inf")
    low = tl.zeros([], tl.int64) - 0x7F800000  # key of the lowest finite number
    high = ordered(highest).to(tl.int64) + 1
    low = search(source, vocab, 1.0, none, highest, k, low, high, False, SCANS, SCAN)
    at_least, more, _more = reached(
        source, vocab, 1.0, none, highest, low, low + 1, low + 1, False, SCANS, SCAN
    )
    # Where fewer than k are finite, the others are -inf: their key is below `low`.
    threshold = tl.where(at_least >= k, low, -0x7F800001).to(tl.int32)
    ties_kept = tl.where(at_least >= k, k - more, k - at_least)
    found = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for start in range(0, vocab, SCAN):
        token = start + tl.arange(0, SCAN)
        x = tl.load(source + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        key = tl.where(token < vocab, ordered(x), -0x80000000)
        equal = (key == threshold).to(tl.int32)
        order = ties + tl.cumsum(equal, 0) - equal
        keep = ((key > threshold) | ((equal > 0) & (order < ties_kept))).to(tl.int32)
        to = found + tl.cumsum(keep, 0) - keep
        tl.store(values + to, x, mask=(keep > 0) & (to < CANDIDATES))
        tl.store(tokens + to, token, mask=(keep > 0) & (to < CANDIDATES))
        found += tl.sum(keep, 0)
        ties += tl.sum(equal, 0)
    return found


@dataclass(frozen=True, slots=True)
class LogprobScratch:
    """Between the two kernels, for so many rows at most."""

    tile_floats: Tensor  # [2, rows · tiles] maximum, sum
    tile_above: Tensor  # [rows · tiles] int32
    group_max: Tensor  # [rows, groups] fp32
    group_list: Tensor  # [rows, groups] int32
    candidate_values: Tensor  # [rows, CANDIDATES] fp32
    candidate_tokens: Tensor  # [rows, CANDIDATES] int32

    @classmethod
    def on(cls, device: torch.device, rows: int, vocab: int) -> LogprobScratch:
        """About vocab / 16 + 8192 bytes a row."""
        tiles = -(-vocab // TILE)
        groups = tiles * (TILE // GROUP)
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return cls(
            torch.empty((2, rows * tiles), **floats),
            torch.empty(rows * tiles, **ints),
            torch.empty((rows, groups), **floats),
            torch.empty((rows, groups), **ints),
            torch.empty((rows, CANDIDATES), **floats),
            torch.empty((rows, CANDIDATES), **ints),
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each row: its token's logprob [n] fp32 and rank [n] int32, and of the likeliest tokens the
    ids [n, most] int32 and logprobs [n, most] fp32, likeliest first."""

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def logprobs(
    logits: Tensor, token_ids: Tensor, wanted: Tensor, out: Scores, scratch: LogprobScratch
) -> None:
    """Fill `out`.

    logits: [n, vocab] bf16, fp16 or fp32; token_ids: [n] int64; wanted: [n] int32, how many of the
    likeliest, at most `most`; -1 where nothing is wanted. What is not wanted stays as it was.
    """
    n, vocab = logits.shape
    assert logits.stride(1) == 1 and out.top_ids.shape == out.top_logprobs.shape
    assert out.top_ids.shape[0] == n <= scratch.group_max.shape[0]
    assert out.top_ids.shape[1] <= MAX_TOP and out.top_ids.stride() == out.top_logprobs.stride()
    tiles = triton.cdiv(vocab, TILE)
    groups = tiles * (TILE // GROUP)
    if n == 0:
        return
    tiles_kernel[(n, tiles)](
        logits,
        token_ids,
        wanted,
        scratch.tile_floats[0],
        scratch.tile_floats[1],
        scratch.tile_above,
        scratch.group_max,
        vocab,
        tiles,
        logits.stride(0),
        scratch.group_max.stride(0),
        TILE=TILE,
        GROUP=GROUP,
        num_warps=8,
        **dependent(logits),
    )
    join_kernel[(n,)](
        logits,
        token_ids,
        wanted,
        scratch.tile_floats[0],
        scratch.tile_floats[1],
        scratch.tile_above,
        scratch.group_max,
        scratch.group_list,
        scratch.candidate_values,
        scratch.candidate_tokens,
        out.logprobs,
        out.ranks,
        out.top_ids,
        out.top_logprobs,
        vocab,
        tiles,
        groups,
        logits.stride(0),
        scratch.group_max.stride(0),
        out.top_ids.stride(0),
        TILES=power_of_2(tiles),
        GROUPS=power_of_2(groups),
        GROUP=GROUP,
        CANDIDATES=CANDIDATES,
        GATHERED=GATHERED,
        PAIRS=PAIRS,
        SCANS=SCANS,
        SCAN=SCAN,
        num_warps=8,
        **dependent(logits),
    )


SCALARS = dict.fromkeys(("vocab", "tiles", "row_stride", "group_stride"), "i32")
BETWEEN = {
    "token_ids": "*i64",
    "wanted": "*i32",
    "tile_max": "*fp32",
    "tile_sum": "*fp32",
    "tile_above": "*i32",
    "group_max": "*fp32",
}
GROUPS_OF = -(-151936 // TILE) * (TILE // GROUP)
AOT = [
    Variant(
        "logprobs tiles",
        tiles_kernel,
        {**BETWEEN, **SCALARS, "logits": "*bf16"},
        {"TILE": TILE, "GROUP": GROUP, "PDL": True},
        num_warps=8,
        unaligned=("tiles",),
        capability=90,
    ),
    Variant(
        "logprobs join",
        join_kernel,
        {
            **BETWEEN,
            **SCALARS,
            "logits": "*bf16",
            "group_list": "*i32",
            "candidate_value": "*fp32",
            "candidate_token": "*i32",
            "logprobs": "*fp32",
            "ranks": "*i32",
            "top_ids": "*i32",
            "top_logprobs": "*fp32",
            "groups": "i32",
            "top_stride": "i32",
        },
        {
            "TILES": power_of_2(-(-151936 // TILE)),
            "GROUPS": power_of_2(GROUPS_OF),
            "GROUP": GROUP,
            "CANDIDATES": CANDIDATES,
            "GATHERED": GATHERED,
            "PAIRS": PAIRS,
            "SCANS": SCANS,
            "SCAN": SCAN,
            "PDL": True,
        },
        num_warps=8,
        unaligned=("tiles", "groups", "top_stride"),
        capability=90,
    ),
]
AOT += [older(one) for one in AOT]
