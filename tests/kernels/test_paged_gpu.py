"""Paged attention on a GPU, by the formula: every kernel and feature, in a cache of NaN.

Rows compute one token or several, on contexts of any length; what is expected is float32 by torch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pagedserve.spec import Attn
from tests.kernels.paged import Paged, attend, batch_of, error, paged

pytestmark = pytest.mark.gpu

ROWS = [
    (1000, 1),
    (4097, 1),
    (1, 1),
    (33, 1),
    (700, 1),
    (600, 600),
    (2000, 333),
    (130, 128),
    (77, 2),
    (512, 512),
]
COMMON = Attn(heads=32, kv_heads=8, head_dim=128, scale=128**-0.5)
SMALL = Attn(heads=64, kv_heads=8, head_dim=64, scale=0.125)
FEATURES = {
    "heads of 128": COMMON,
    "heads of 128, window": replace(COMMON, window=300),
    "heads of 128, sinks": replace(COMMON, sinks=True),
    "heads of 128, chunk": replace(COMMON, chunk=256),
    "heads of 128, steep scores": replace(COMMON, scale=5.0),
    "heads of 64": SMALL,
    "heads of 64, window, sinks": replace(SMALL, window=128, sinks=True),
    "heads of 64, own keys": Attn(heads=12, kv_heads=12, head_dim=64, scale=0.125),
    "heads of 32": Attn(heads=8, kv_heads=2, head_dim=32, scale=0.2),
    "heads of 80, biases": Attn(heads=32, kv_heads=32, head_dim=80, scale=0.11, alibi=8.0),
    "heads of 96": Attn(heads=24, kv_heads=8, head_dim=96, scale=0.1),
    "heads of 112": Attn(heads=28, kv_heads=4, head_dim=112, scale=0.1),
    "heads of 256, softcap, window": Attn(8, 4, 256, 0.06, softcap=20.0, window=700),
    "one key for 71 heads of 64": Attn(heads=71, kv_heads=1, head_dim=64, scale=0.125),
    "five heads a key": Attn(heads=40, kv_heads=8, head_dim=128, scale=0.09),
    "latents, 16 heads": Attn(16, 1, 576, 0.07, values_in_keys=512),
    "latents, 128 heads": Attn(128, 1, 576, 0.07, values_in_keys=512),
    "small latents": Attn(10, 1, 40, 0.2, values_in_keys=32),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_bfloat16_is_right_to_its_rounding(feature: str) -> None:
    check(FEATURES[feature], torch.bfloat16)


@pytest.mark.parametrize("block_size", (8, 32, 64, 128, 256, 7))
def test_any_block_size_gives_the_same(block_size: int) -> None:
    check(COMMON, torch.bfloat16, block_size=block_size)


@pytest.mark.parametrize("feature", ("heads of 128", "heads of 64, window, sinks", "heads of 96"))
def test_float16_is_right_to_its_rounding(feature: str) -> None:
    check(FEATURES[feature], torch.float16)


@pytest.mark.parametrize(
    "feature", ("heads of 128", "heads of 32", "heads of 96", "heads of 64, window, sinks")
)
def test_float32_is_right_to_its_rounding(feature: str) -> None:
    check(FEATURES[feature], torch.float32)


@pytest.mark.parametrize("feature", ("heads of 128", "heads of 96", "latents, 16 heads"))
def test_a_small_mixed_batch_for_the_sanitizer(feature: str) -> None:
    """Every kernel once: compute-sanitizer takes minutes for what the others do in seconds."""
    check(FEATURES[feature], torch.bfloat16, [(40, 1), (900, 1), (130, 128), (33, 5)])


@pytest.mark.parametrize("kv_heads", (1, 2, 8))
def test_many_short_rows_and_one_long_one(kv_heads: int) -> None:
    attn = Attn(heads=8, kv_heads=kv_heads, head_dim=128, scale=0.1)
    rows = [(20000, 1), *((n, 1) for n in range(1, 250, 7)), (9000, 40), (5, 3)]
    check(attn, torch.bfloat16, rows)


def test_rows_may_come_in_any_order_and_compute_nothing() -> None:
    rows = [(512, 512), (1000, 1), (0, 0), (64, 1), (700, 333), (0, 0), (5, 1), (0, 0)]
    case = paged(COMMON, rows, block_size=16, written=False, ordered=False, **BFLOAT16)
    assert error(forward(case), attend(case)) < LIMITS[torch.bfloat16]


def test_scores_far_below_zero_leave_no_hole() -> None:
    case = paged(replace(COMMON, scale=4.0), ROWS, block_size=16, **BFLOAT16)
    case.kv[:, 0] = -case.kv[:, 0].abs()
    case.q.copy_(case.q.abs())
    assert error(forward(case, write=False), attend(case)) < 0.01


@pytest.mark.parametrize("feature", ("heads of 128, window", "heads of 64, window, sinks"))
def test_windows_are_right_where_bulk_copies_are(feature: str) -> None:
    """Past `refusal`, which keeps this kernel's windows out of service."""
    from pagedserve.attention.triton import Processors, shape_of
    from pagedserve.kernels import kv_write, paged_prefill, paged_prefill_wgmma

    processors = Processors.of(torch.device("cuda"))
    if processors.capability != (9, 0):
        pytest.skip("needs a GPU of capability 9.0")
    case = paged(FEATURES[feature], ROWS, block_size=16, **BFLOAT16)
    shape = shape_of(case.attn, case.kv.shape[2], case.kv.dtype)
    plan = paged_prefill.plan_prefill(
        paged_prefill_wgmma.TILE_TOKENS,
        case.q.shape[0],
        case.seq_lens,
        case.query_start_loc,
        window=shape.window,
    )
    kv_write.clear_tails(case.kv, case.block_tables, case.seq_lens, case.query_start_loc)
    out = torch.full(case.q.shape, torch.nan, **BFLOAT16)
    paged_prefill_wgmma.paged_prefill_wgmma(
        case.q,
        case.kv,
        out,
        case.block_tables,
        plan,
        shape,
        paged_prefill_wgmma.CacheDescriptors(),
        scale=case.attn.scale,
        sinks=case.sinks,
        programs=processors.count,
    )
    assert error(out[case.num_decodes :], attend(case)[case.num_decodes :]) < 6e-3


def test_a_run_repeats_itself_bit_by_bit() -> None:
    case = paged(COMMON, ROWS, block_size=16, **BFLOAT16)
    first = forward(case, write=False)
    for _ in range(20):
        assert torch.equal(forward(case, write=False), first)


@pytest.mark.parametrize("feature", ("heads of 128", "heads of 256, softcap, window"))
def test_a_captured_graph_serves_other_rows_of_any_length(feature: str) -> None:
    attn = FEATURES[feature]
    first = paged(attn, [(300, 1), (40, 1), (70, 35), (9, 5)], block_size=16, **BFLOAT16)
    forward(first, write=False)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(first, write=False)
    other = paged(attn, [(2, 1), (31, 1), (12, 1), (47, 39)], block_size=16, seed=1, **BFLOAT16)
    blocks, width = other.kv.shape[0], other.block_tables.shape[1]
    assert blocks <= first.kv.shape[0] and width <= first.block_tables.shape[1]
    first.kv[:blocks].copy_(other.kv)
    first.block_tables[:, :width].copy_(other.block_tables)
    for name in ("q", "seq_lens", "query_start_loc"):
        getattr(first, name).copy_(getattr(other, name))
    graph.replay()
    assert error(out, attend(other)) < 0.01


BFLOAT16 = {"dtype": torch.bfloat16, "device": "cuda"}
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3, torch.float32: 3e-6}


def check(
    attn: Attn,
    dtype: torch.dtype,
    rows: list[tuple[int, int]] = ROWS,
    *,
    block_size: int = 16,
) -> None:
    """Write, attend, compare; the cache is NaN wherever nothing was written."""
    case = paged(attn, rows, block_size=block_size, dtype=dtype, device="cuda", written=False)
    out = forward(case)
    wanted = attend(case)
    assert out.dtype == dtype and error(out, wanted) < LIMITS[dtype]
    worst = (out.float() - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2))
    assert worst.max() < 8 * LIMITS[dtype], "a whole token is wrong"


def forward(case: Paged, *, write: bool = True) -> Tensor:
    """By the backend that a GPU gets."""
    from pagedserve.attention.triton import TritonAttention
    from pagedserve.device import pick

    backend = TritonAttention(pick("cuda"))
    assert backend.supports(case.attn, case.kv.dtype, case.kv.shape[2]) is None
    return backend.forward(
        case.q,
        case.k if write else None,
        case.v,
        case.kv,
        backend.plan(batch_of(case)),
        case.attn,
        slopes=case.slopes,
        sinks=case.sinks,
    )
