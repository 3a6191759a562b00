"""A mixture of experts on a GPU: routing, products with the experts that were chosen, weighted sum.

    route      (token)            scores, choice, weights; each choice into its expert's bucket
    grouped    (block, columns)   tokens of one bucket · that expert's matrix; gate · up behind
    expert     (choice, columns)  the same for a few tokens, each choice by itself, no buckets
    combine    (token, columns)   Σ weight · what the chosen experts said, + residual

Nothing is sorted and nothing is read back: a choice takes the next place in its expert's bucket,
where the order does not matter because no result depends on a token's neighbours. Grids are bounds
that hold for any choice; programs without work end at once, and experts without tokens are not
read. `combine` adds up in the order of the choices and leaves the buckets empty for the next layer.

T tokens · E experts · k chosen · S an expert's size · C hidden. Meaning: `layers.moe.route` and
`experts.LoopedExperts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.activation import GATED, gate_up
from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.capability import has_small_memory
from pagedserve.kernels.experts import Routing
from pagedserve.kernels.gemv import UNROLLED, inputs_at, weights_at
from pagedserve.kernels.launch import capability, dependent, launch_dependents, power_of_2, wait

MAX_EXPERTS = 1024
COLUMNS = 1024  # of one program of `combine`


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits,
    correction,
    weights,
    chosen,
    counts,
    buckets,
    tokens,
    logits_stride,
    renorm_eps,
    scale,
    jitter,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    BEST_TWO: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORM: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T). Experts are GROUPS · SIZE; counts, buckets: None where they are not wanted."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_BLOCK)[:, None]
    member = tl.arange(0, SIZE_BLOCK)[None, :]
    real = (group < GROUPS) & (member < SIZE)
    expert = tl.where(real, group * SIZE + member, 0x7FFFFFFF)
    if correction is not None:
        added = tl.load(correction + expert, mask=real, other=0.0)
    wait(PDL)
    x = tl.load(logits + token * logits_stride + expert, mask=real, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    if SCORE == "softmax":
        scores = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    elif SCORE == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        scores = x
    choice = scores
    if correction is not None:
        choice += added
    # Of a row that is not finite, padding or a lost sequence, nothing compares: without this it
    # would choose experts that do not exist. Its weights stay NaN, which tells the sampler.
    choice = tl.where(choice == choice, choice, float("-inf"))
    left = real
    if GROUPS > 1:
        members = tl.where(real, choice, float("-inf"))
        best = tl.max(members, 1)
        if BEST_TWO:
            first = tl.min(tl.where(members == best[:, None], expert, 0x7FFFFFFF), 1)
            best += tl.max(tl.where(expert == first[:, None], float("-inf"), members), 1)
        row = tl.arange(0, GROUPS_BLOCK)
        open_groups = row < GROUPS
        kept = row < 0
        for _ in tl.static_range(KEPT):
            top = tl.max(tl.where(open_groups, best, float("-inf")), 0)
            index = tl.min(tl.where(open_groups & (best >= top), row, GROUPS), 0)
            kept = kept | (row == index)
            open_groups = open_groups & (row != index)
        left = left & kept[:, None]
    i = tl.arange(0, K_BLOCK)
    weight = tl.zeros([K_BLOCK], tl.float32)
    ids = tl.zeros([K_BLOCK], tl.int32)
    for j in tl.static_range(K):
        remaining = tl.where(left, choice, float("-inf"))
        top = tl.max(tl.max(remaining, 1), 0)
        index = tl.where(left & (choice >= top), expert, 0x7FFFFFFF)
        index = tl.min(tl.min(index, 1), 0)
        if SCORE == "sparsemixer":
            near = (top - x) / tl.maximum(tl.abs(x), top) <= 2 * jitter
            close = tl.where(left & near, tl.exp(x - top), 0.0)
            here = 1.0 / tl.sum(tl.sum(close, 1), 0)
        else:
            here = tl.sum(tl.sum(tl.where(expert == index, scores, 0.0), 1), 0)
        weight = tl.where(i == j, here, weight)
        ids = tl.where(i == j, index, ids)
        left = left & (expert != index)
    inside = i < K
    if SCORE == "softmax of chosen":
        highest = tl.max(tl.where(inside, weight, float("-inf")), 0)
        weight = tl.where(inside, tl.exp(weight - highest), 0.0)
        weight = weight / tl.sum(weight, 0)
    elif RENORM:
        weight = weight / (tl.sum(tl.where(inside, weight, 0.0), 0) + renorm_eps)
    tl.store(weights + token * K + i, weight * scale, mask=inside)
    tl.store(chosen + token * K + i, ids, mask=inside)
    if buckets is not None:
        place = tl.atomic_add(counts + ids, 1, mask=inside, sem="relaxed")
        at = buckets + ids.to(tl.int64) * tokens + place
        tl.store(at, (token * K + i).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["choices", "tokens"])
def bucket_kernel(chosen, counts, buckets, choices, tokens, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (blocks of choices): choices that were made elsewhere, into their buckets."""
    launch_dependents(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < choices
    wait(PDL)
    expert = tl.load(chosen + i, mask=inside, other=0).to(tl.int64)
    place = tl.atomic_add(counts + expert, 1, mask=inside, sem="relaxed")
    tl.store(buckets + expert * tokens + place, i, mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def grouped_kernel(
    x,
    w,
    y,
    bias,
    scales,
    counts,
    buckets,
    tokens,
    blocks,
    N,
    K,
    experts,
    x_stride,
    limit,
    PER_ROW: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    NEAR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (blocks · columns). Row `choice` of y is from row `choice // PER_ROW` of x.

    blocks: a bound on Σ ⌈tokens of an expert / BM⌉. NEAR blocks go through all columns together,
    so that their rows of x and their experts' weights are still in the L2 cache.
    """
    launch_dependents(PDL)
    pid = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    together = NEAR * columns
    first = pid // together * NEAR
    near = tl.minimum(blocks - first, NEAR)
    block = first + pid % together % near
    column = pid % together // near
    wait(PDL)
    e = tl.arange(0, EXPERTS_BLOCK)
    count = tl.load(counts + e, mask=e < experts, other=0)
    of_each = (count + BM - 1) // BM
    ends = tl.cumsum(of_each, 0)
    expert = tl.sum((ends <= block).to(tl.int32), 0)
    if expert >= experts:
        return
    is_it = e == expert
    before = tl.sum(tl.where(is_it, ends - of_each, 0), 0)
    filled = tl.sum(tl.where(is_it, count, 0), 0)
    place = (block - before) * BM + tl.arange(0, BM)
    bucket = buckets + expert.to(tl.int64) * tokens
    there = place < filled
    choice = tl.load(bucket + tl.minimum(place, filled - 1)).to(tl.int64)

    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    lines = expert.to(tl.int64) * N * (2 if GATED else 1)
    w_at = w + (lines + tl.minimum(n, N - 1))[:, None] * K + k[None, :]
    u_at = w_at + N.to(tl.int64) * K
    x_at = x + (choice // PER_ROW)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    if GATED:
        acc_u = tl.zeros([BN, BM], tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            w_block = tl.load(w_at + i * BK)
            x_block = tl.load(x_at + i * BK)
        else:
            left = K - i * BK
            w_block = tl.load(w_at + i * BK, mask=k[None, :] < left, other=0.0)
            x_block = tl.load(x_at + i * BK, mask=k[:, None] < left, other=0.0)
        acc = tl.dot(w_block, x_block, acc)
        if GATED:
            if EVEN_K:
                u_block = tl.load(u_at + i * BK)
            else:
                u_block = tl.load(u_at + i * BK, mask=k[None, :] < K - i * BK, other=0.0)
            acc_u = tl.dot(u_block, x_block, acc_u)
    if scales is not None:
        scale = tl.load(scales + choice)[None, :]
        acc *= scale
        if GATED:
            acc_u *= scale
    in_n = (n < N)[:, None]
    if bias is not None:
        acc += tl.load(bias + (lines + n)[:, None], mask=in_n, other=0.0).to(tl.float32)
        if GATED:
            at = bias + (lines + N + n)[:, None]
            acc_u += tl.load(at, mask=in_n, other=0.0).to(tl.float32)
    if GATED:
        acc = gate_up(acc, acc_u, ACT, limit)
    at = y + choice[None, :] * N + n[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=in_n & there[None, :])


@triton.jit
def expert_kernel(
    x,
    w,
    y,
    bias,
    scales,
    chosen,
    N,
    x_stride,
    limit,
    K: tl.constexpr,
    PER_ROW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (columns, choices): one row by one expert's matrix, as `gemv` does it."""
    launch_dependents(PDL)
    first = tl.program_id(0) * BN
    choice = tl.program_id(1).to(tl.int64)
    n = tl.minimum(first + tl.arange(0, BN), N - 1)[:, None]
    k = tl.arange(0, BK)[None, :]
    wait(PDL)
    lines = tl.load(chosen + choice).to(tl.int64) * N * (2 if GATED else 1)
    w += (lines + n) * K
    u = w + N.to(tl.int64) * K
    x += choice // PER_ROW * x_stride
    FULL: tl.constexpr = K // BK
    acc = tl.zeros([BN, BK], tl.float32)
    if GATED:
        acc_u = tl.zeros([BN, BK], tl.float32)
    if UNROLL:
        for i in tl.static_range(FULL):
            x_block = inputs_at(x, i * BK + k, K, False)
            acc += weights_at(w, i * BK + k, K, False).to(tl.float32) * x_block
            if GATED:
                acc_u += weights_at(u, i * BK + k, K, False).to(tl.float32) * x_block
    else:
        for i in tl.range(FULL):
            x_block = inputs_at(x, i * BK + k, K, False)
            acc += weights_at(w, i * BK + k, K, False).to(tl.float32) * x_block
            if GATED:
                acc_u += weights_at(u, i * BK + k, K, False).to(tl.float32) * x_block
    if K % BK != 0:
        x_block = inputs_at(x, FULL * BK + k, K, True)
        acc += weights_at(w, FULL * BK + k, K, True).to(tl.float32) * x_block
        if GATED:
            acc_u += weights_at(u, FULL * BK + k, K, True).to(tl.float32) * x_block
    result = tl.sum(acc, 1)
    if GATED:
        result_u = tl.sum(acc_u, 1)
    n = first + tl.arange(0, BN)
    if scales is not None:
        scale = tl.load(scales + choice)
        result *= scale
        if GATED:
            result_u *= scale
    if bias is not None:
        result += tl.load(bias + lines + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            result_u += tl.load(bias + lines + N + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        result = gate_up(result, result_u, ACT, limit)
    tl.store(y + choice * N + n, result.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def combine_kernel(
    outs,
    weights,
    residual,
    y,
    counts,
    size,
    experts,
    residual_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, blocks of C). weights: None where they were on the input; counts: to be emptied."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < size
    wait(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(K):
        choice = token * K + i
        out = tl.load(outs + choice * size + c, mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            out *= tl.load(weights + choice)
        total += out
    if residual is not None:
        at = residual + token * residual_stride + c
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * size + c, total.to(y.dtype.element_ty), mask=inside)
    if counts is not None:  # noqa: SIM102
        if (token == 0) & (tl.program_id(1) == 0):
            e = tl.arange(0, EXPERTS_BLOCK)
            tl.store(counts + e, tl.zeros([EXPERTS_BLOCK], tl.int32), mask=e < experts)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Of one grouped product."""

    rows: int
    columns: int
    k: int
    num_warps: int
    num_stages: int
    near: int


def by_itself(tokens: int, top_k: int, experts: int) -> bool:
    """Whether each choice reads its expert for itself: few enough that hardly two share one."""
    return tokens == 1 or tokens * top_k <= min(32, experts // 4)


def blocks_for(tokens_each: float, gated: bool, small: bool = False) -> Blocks:
    """By how many tokens an expert has on average. small: `has_small_memory`."""
    if tokens_each <= 12:
        return Blocks(16, 64, 128, 4, 3 if gated else 4, 1)
    if tokens_each <= 32:
        if gated:
            return Blocks(32, 64, 64, 4, 4 if small else 5, 1)
        return Blocks(32, 128, 64, 8, 4, 1)
    if gated and small:  # wider ones fit no more than two stages, or spill
        return Blocks(64, 64, 64, 4, 3, 16)
    if tokens_each <= 96:
        return Blocks(64, 128, 64, 4, 4, 16)
    return Blocks(128, 128, 64, 8, 4, 16)


def route(
    logits: Tensor,
    routing: Routing,
    counts: Tensor | None = None,
    buckets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits: [T, E] → weights [T, k] float32 and experts [T, k] int32; choices into the buckets.

    counts: [E] int32, zero; buckets: [E, T] int32.
    """
    tokens, experts = logits.shape
    groups, kept = routing.groups
    assert experts % groups == 0 and experts <= MAX_EXPERTS and logits.stride(1) == 1
    assert routing.top_k <= experts // groups * kept
    k = routing.top_k
    weights = torch.empty((tokens, k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((tokens, k), dtype=torch.int32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            routing.correction,
            weights,
            chosen,
            counts,
            buckets,
            tokens,
            logits.stride(0),
            routing.renorm_eps,
            routing.scale,
            routing.jitter,
            GROUPS=groups,
            SIZE=experts // groups,
            KEPT=kept,
            BEST_TWO=routing.group_score == "best two",
            K=k,
            SCORE=routing.score,
            RENORM=routing.renorm,
            GROUPS_BLOCK=power_of_2(groups),
            SIZE_BLOCK=power_of_2(experts // groups),
            K_BLOCK=power_of_2(k),
            num_warps=1 if experts <= 256 else 4,
            **dependent(logits),
        )
    return weights, chosen


@dataclass(frozen=True, slots=True)
class GpuExperts:
    """`experts.Experts` by these kernels.

    up: [E, 2 · S, C], gate first; down: [E, C, S]; biases: [E, 2 · S], [E, C] or None; act: of
    `activation.GATED`; counts: [E] int32, zero between layers, which may share it in one stream.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    act: str
    limit: float
    counts: Tensor

    @classmethod
    def of(
        cls,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        act: str = "silu",
        limit: float = 7.0,
        counts: Tensor | None = None,
    ) -> GpuExperts:
        """With counts of its own where none are given."""
        assert up.is_contiguous() and down.is_contiguous() and act in GATED
        assert up.shape[0] == down.shape[0] and up.shape[1] == 2 * down.shape[2]
        if counts is None:
            counts = torch.zeros(up.shape[0], dtype=torch.int32, device=up.device)
        return cls(up, down, up_bias, down_bias, act, limit, counts)

    def apply(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        *,
        on_input: bool,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x: [T, C]; weights: [T, k] float32; experts: [T, k] int32 or int64 → [T, C]."""
        tokens, k = experts.shape
        if by_itself(tokens, k, self.up.shape[0]):
            return self.alone(x, weights, experts, on_input, residual)
        buckets = self.buckets(tokens)
        experts = experts.contiguous()
        bucket_kernel[(triton.cdiv(experts.numel(), 256),)](
            experts,
            self.counts,
            buckets,
            experts.numel(),
            tokens,
            BLOCK=256,
            num_warps=4,
            **dependent(x),
        )
        return self.together(x, weights, buckets, on_input, residual)

    def mixture(
        self,
        x: Tensor,
        logits: Tensor,
        routing: Routing,
        *,
        on_input: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Routing included: x [T, C], logits [T, E] → residual + Σ weight · expert(x): [T, C]."""
        tokens = x.shape[0]
        if by_itself(tokens, routing.top_k, self.up.shape[0]):
            weights, chosen = route(logits, routing)
            return self.alone(x, weights, chosen, on_input, residual)
        buckets = self.buckets(tokens)
        weights, _ = route(logits, routing, self.counts, buckets)
        return self.together(x, weights, buckets, on_input, residual)

    def buckets(self, tokens: int) -> Tensor:
        """Room for every token in every expert."""
        size = (self.up.shape[0], tokens)
        return torch.empty(size, dtype=torch.int32, device=self.up.device)

    def together(
        self,
        x: Tensor,
        weights: Tensor,
        buckets: Tensor,
        on_input: bool,
        residual: Tensor | None,
    ) -> Tensor:
        """By buckets."""
        k, scales = weights.shape[1], weights if on_input else None
        inner = self.grouped(x, self.up, self.up_bias, scales, buckets, k, gated=True, per_row=k)
        out = self.grouped(
            inner, self.down, self.down_bias, None, buckets, k, gated=False, per_row=1
        )
        return self.combine(out, weights, on_input, residual, self.counts)

    def grouped(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        scales: Tensor | None,
        buckets: Tensor,
        k: int,
        *,
        gated: bool,
        per_row: int,
    ) -> Tensor:
        """[choices, N], N half as wide as w where `gated`."""
        experts, tokens = buckets.shape
        size, columns = w.shape[1] // 2 if gated else w.shape[1], w.shape[2]
        choices = tokens * k
        small = x.is_cuda and has_small_memory(capability(x.device.index))
        shape = blocks_for(choices / experts, gated, small)
        most = min(experts, choices) + choices // shape.rows
        y = torch.empty((choices, size), dtype=x.dtype, device=x.device)
        x = x if x.stride(1) == 1 else x.contiguous()
        grouped_kernel[(most * triton.cdiv(size, shape.columns),)](
            x,
            w,
            y,
            bias,
            scales,
            self.counts,
            buckets,
            tokens,
            most,
            size,
            columns,
            experts,
            x.stride(0),
            self.limit,
            PER_ROW=per_row,
            EXPERTS_BLOCK=power_of_2(experts),
            BM=shape.rows,
            BN=shape.columns,
            BK=shape.k,
            EVEN_K=columns % shape.k == 0,
            GATED=gated,
            ACT=self.act,
            NEAR=shape.near,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            **dependent(x),
        )
        return y

    def alone(
        self,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        on_input: bool,
        residual: Tensor | None,
    ) -> Tensor:
        """Each choice by itself."""
        k, scales = weights.shape[1], weights if on_input else None
        chosen = chosen.contiguous()
        inner = self.one_by_one(x, self.up, self.up_bias, scales, chosen, gated=True, per_row=k)
        out = self.one_by_one(
            inner, self.down, self.down_bias, None, chosen, gated=False, per_row=1
        )
        return self.combine(out, weights, on_input, residual, None)

    def one_by_one(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        scales: Tensor | None,
        chosen: Tensor,
        *,
        gated: bool,
        per_row: int,
    ) -> Tensor:
        """[choices, N], N half as wide as w where `gated`."""
        size, columns = w.shape[1] // 2 if gated else w.shape[1], w.shape[2]
        choices = chosen.numel()
        y = torch.empty((choices, size), dtype=x.dtype, device=x.device)
        if choices == 0:
            return y
        x = x if x.stride(1) == 1 else x.contiguous()
        block_k = 2048 if columns >= 2048 else 1024 if columns >= 1024 else 512
        block_n = 2 if gated else 4
        expert_kernel[(triton.cdiv(size, block_n), choices)](
            x,
            w,
            y,
            bias,
            scales,
            chosen,
            size,
            x.stride(0),
            self.limit,
            K=columns,
            PER_ROW=per_row,
            BN=block_n,
            BK=block_k,
            GATED=gated,
            ACT=self.act,
            UNROLL=columns // block_k <= UNROLLED,
            num_warps=min(4, block_k // 256),
            **dependent(x),
        )
        return y

    def combine(
        self,
        out: Tensor,
        weights: Tensor,
        on_input: bool,
        residual: Tensor | None,
        counts: Tensor | None,
    ) -> Tensor:
        """[T, C]; puts `counts` back to zero."""
        tokens, k = weights.shape
        size = out.shape[1]
        y = torch.empty((tokens, size), dtype=out.dtype, device=out.device)
        if residual is not None and residual.stride(1) != 1:
            residual = residual.contiguous()
        if tokens:
            experts = self.up.shape[0]
            combine_kernel[(tokens, triton.cdiv(size, COLUMNS))](
                out,
                None if on_input else weights,
                residual,
                y,
                counts,
                size,
                experts,
                0 if residual is None else residual.stride(0),
                K=k,
                BLOCK=COLUMNS,
                EXPERTS_BLOCK=power_of_2(experts),
                num_warps=4,
                **dependent(out),
            )
        return y


def route_variant(experts: int, routing: Routing, *, corrected: bool = False) -> Variant:
    """Of `route_kernel`."""
    groups, kept = routing.groups
    return Variant(
        f"route {experts} experts, {routing.score}, {groups} groups",
        route_kernel,
        {
            "logits": "*fp32",
            "correction": "*fp32" if corrected else None,
            "weights": "*fp32",
            "chosen": "*i32",
            "counts": "*i32",
            "buckets": "*i32",
            **dict.fromkeys(("tokens", "logits_stride"), "i32"),
            **dict.fromkeys(("renorm_eps", "scale", "jitter"), "fp32"),
        },
        {
            "GROUPS": groups,
            "SIZE": experts // groups,
            "KEPT": kept,
            "BEST_TWO": routing.group_score == "best two",
            "K": routing.top_k,
            "SCORE": routing.score,
            "RENORM": routing.renorm,
            "GROUPS_BLOCK": power_of_2(groups),
            "SIZE_BLOCK": power_of_2(experts // groups),
            "K_BLOCK": power_of_2(routing.top_k),
            "PDL": True,
        },
        num_warps=1 if experts <= 256 else 4,
        unaligned=("tokens",),
        capability=90,
    )


def grouped_variant(
    tokens_each: int,
    *,
    gated: bool,
    bias: bool = False,
    even: bool = True,
    experts: int = 128,
    small: bool = False,
) -> Variant:
    """Of `grouped_kernel`."""
    shape = blocks_for(tokens_each, gated, small)
    ints = ("tokens", "blocks", "N", "K", "experts", "x_stride")
    return Variant(
        f"grouped {shape.rows} rows{', gated' if gated else ''}{', bias' if bias else ''}"
        + (", little memory" if small else "")
        + ("" if even else ", odd"),
        grouped_kernel,
        {
            **dict.fromkeys(("x", "w", "y"), "*bf16"),
            "bias": "*bf16" if bias else None,
            "scales": None,
            "counts": "*i32",
            "buckets": "*i32",
            **dict.fromkeys(ints, "i32"),
            "limit": "fp32",
        },
        {
            "PER_ROW": 8 if gated else 1,
            "EXPERTS_BLOCK": power_of_2(experts),
            "BM": shape.rows,
            "BN": shape.columns,
            "BK": shape.k,
            "EVEN_K": even,
            "GATED": gated,
            "ACT": "silu",
            "NEAR": shape.near,
            "PDL": True,
        },
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        unaligned=("tokens", "blocks", "experts"),
        sass=("HGMMA", "LDGSTS"),
        capability=90,
    )


def expert_variant(columns: int, block_n: int, block_k: int, *, gated: bool) -> Variant:
    """Of `expert_kernel`."""
    return Variant(
        f"expert K {columns}{', gated' if gated else ''}",
        expert_kernel,
        {
            **dict.fromkeys(("x", "w", "y"), "*bf16"),
            "bias": None,
            "scales": None,
            "chosen": "*i32",
            **dict.fromkeys(("N", "x_stride"), "i32"),
            "limit": "fp32",
        },
        {
            "K": columns,
            "PER_ROW": 8 if gated else 1,
            "BN": block_n,
            "BK": block_k,
            "GATED": gated,
            "ACT": "silu",
            "UNROLL": columns // block_k <= UNROLLED,
            "PDL": True,
        },
        num_warps=min(4, block_k // 256),
        sass=("LDG.E.EF.128",),
        capability=90,
    )


AOT = [
    route_variant(128, Routing(8)),
    route_variant(256, Routing(8, "sigmoid", groups=(8, 4)), corrected=True),
    route_variant(160, Routing(6, "softmax", False, groups=(8, 3), group_score="best")),
    route_variant(32, Routing(4, "softmax of chosen")),
    route_variant(16, Routing(2, "sparsemixer", jitter=0.01)),
    route_variant(512, Routing(10)),
    *(grouped_variant(n, gated=gated) for n in (8, 32, 64, 500) for gated in (True, False)),
    grouped_variant(8, gated=True, bias=True, even=False),
    expert_variant(2048, 2, 2048, gated=True),
    expert_variant(768, 4, 512, gated=False),
    Variant(
        "bucket",
        bucket_kernel,
        {
            "chosen": "*i64",
            "counts": "*i32",
            "buckets": "*i32",
            "choices": "i32",
            "tokens": "i32",
        },
        {"BLOCK": 256, "PDL": True},
        unaligned=("choices", "tokens"),
        capability=90,
    ),
    Variant(
        "combine",
        combine_kernel,
        {
            **dict.fromkeys(("outs", "residual", "y"), "*bf16"),
            "weights": "*fp32",
            "counts": "*i32",
            **dict.fromkeys(("size", "experts", "residual_stride"), "i32"),
        },
        {"K": 8, "BLOCK": COLUMNS, "EXPERTS_BLOCK": 128, "PDL": True},
        capability=90,
    ),
]
AOT += [older(AOT[0]), older(grouped_variant(8, gated=False)), older(AOT[-1])]
AOT += [older(grouped_variant(n, gated=True, small=True)) for n in (8, 32, 64)]
