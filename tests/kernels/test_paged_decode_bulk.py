"""Decode of many rows in CUDA C++, by the formula: features, lengths, how rows are cut, order of
launches.

Caches are NaN wherever nothing was written. Needs a GPU of capability 9.0, and nvcc or a library
that it made; what it refuses is tested without.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pagedserve.attention.triton import TritonAttention, shape_of
from pagedserve.device import pick
from pagedserve.kernels import kv_write, paged_decode_bulk
from pagedserve.kernels.paged_decode import Shape
from pagedserve.kernels.paged_decode_bulk import CacheMaps, Tuning
from pagedserve.kernels.paged_decode_cuda import Native
from tests.kernels.native import COMMON, LIMITS, SMALL, built, check, rows_and_counts, rows_of
from tests.kernels.paged import Paged, attend, batch_of, error

FEATURES = {
    "four heads a key": COMMON,
    "two heads a key": replace(COMMON, heads=16),
    "own keys": replace(COMMON, heads=8),
    "three heads a key": replace(COMMON, heads=24),
    "eight heads a key": replace(COMMON, heads=64),
    "seven heads a key, four keys": replace(COMMON, heads=28, kv_heads=4),
    "six heads a key, two keys": replace(COMMON, heads=12, kv_heads=2),
    "eight heads, one key": replace(COMMON, heads=8, kv_heads=1),
    "sixteen keys": replace(COMMON, heads=16, kv_heads=16),
    "twelve keys": replace(COMMON, heads=24, kv_heads=12),
    "five keys": replace(COMMON, heads=10, kv_heads=5),
    "window": replace(COMMON, window=300),
    "a window of one token": replace(COMMON, window=1),
    "chunk": replace(COMMON, chunk=256),
    "sinks": replace(COMMON, sinks=True),
    "steep scores": replace(COMMON, scale=5.0),
    "heads of 64": SMALL,
    "heads of 64, own keys": replace(SMALL, heads=2),
    "heads of 64, eight keys": replace(SMALL, heads=64, kv_heads=8),
    "heads of 64, sixteen keys": replace(SMALL, kv_heads=16),
    "heads of 64, everything": replace(SMALL, window=700, chunk=512, sinks=True),
}
LENGTHS = [1000, 1, 4097, 33, 16, 700, 17, 2048, 15, 5, 64, 999]


@pytest.fixture(scope="module")
def native() -> Native:
    """The kernels, built if they are not yet."""
    return built()


def plan_of(
    native: Native, case: Paged, tuning: Tuning | None = None
) -> paged_decode_bulk.BulkPlan:
    """As the backend makes it."""
    shape = shape_of(case.attn, case.kv.shape[2], case.kv.dtype)
    given = case.block_tables, case.seq_lens, case.query_start_loc
    refused = paged_decode_bulk.refusal(shape, case.q, case.kv, *given)
    assert refused is None or len(case.lens) < paged_decode_bulk.MIN_ROWS, refused
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = tuning or paged_decode_bulk.tune(native, shape, processors)
    return paged_decode_bulk.plan_bulk(native, shape, chosen, *given)


def launch(
    native: Native, case: Paged, plan: paged_decode_bulk.BulkPlan, *, first: bool = True
) -> Tensor:
    """By the kernel; what it leaves alone is NaN."""
    out = torch.full_like(case.q, torch.nan).contiguous()
    paged_decode_bulk.paged_decode_bulk(
        native,
        case.q,
        case.kv,
        out,
        plan,
        CacheMaps(native),
        scale=case.attn.scale,
        sinks=case.sinks,
        first=first,
    )
    return out


def decode(native: Native, case: Paged, tuning: Tuning | None = None) -> Tensor:
    """Planned and computed."""
    return launch(native, case, plan_of(native, case, tuning))


@pytest.mark.gpu
def test_a_small_batch_for_the_sanitizer(native: Native) -> None:
    """Both orders of launches; under compute-sanitizer the other tests would take minutes."""
    case = rows_of([40, 1, 90, 16, 17, 33, 64, 5, 700], replace(COMMON, sinks=True))
    plan = plan_of(native, case)
    for first in (True, False):
        check(launch(native, case, plan, first=first), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_right_to_its_rounding(
    native: Native, feature: str, dtype: torch.dtype
) -> None:
    case = rows_of(LENGTHS, FEATURES[feature], dtype=dtype)
    plan = plan_of(native, case)
    for first in (True, False):
        check(launch(native, case, plan, first=first), case)


@pytest.mark.gpu
@pytest.mark.parametrize("bins", (1, 2, 3, 7, 16, 40, 132))
def test_rows_may_be_cut_anywhere(native: Native, bins: int) -> None:
    for attn in (COMMON, replace(SMALL, window=200, sinks=True)):
        case = rows_of(LENGTHS, attn)
        for stages in (2, 3, 6):
            check(decode(native, case, Tuning(bins, stages)), case)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", (32, 24, 8))
def test_a_row_of_many_bins_is_merged_by_all_of_them(native: Native, heads: int) -> None:
    attn = replace(COMMON, heads=heads, sinks=True)
    for lengths in ([30000, *[50] * 9], [*[50] * 9, 9000, 3, 12000], [*[1] * 8, 4000]):
        case = rows_of(lengths, attn)
        check(decode(native, case), case)


@pytest.mark.gpu
def test_hundreds_of_rows(native: Native) -> None:
    pick_length = random.Random(0)
    for rows in (9, 64, 257, 512):
        case = rows_of([pick_length.randint(1, 300) for _ in range(rows)], seed=rows)
        check(decode(native, case), case)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", (16, 32, 64, 256))
def test_any_block_size_gives_the_same(native: Native, block_size: int) -> None:
    case = rows_of(LENGTHS, block_size=block_size)
    check(decode(native, case), case)


@pytest.mark.gpu
def test_every_length_around_a_tile_is_right(native: Native) -> None:
    case = rows_of(list(range(1, 100)), SMALL)
    check(decode(native, case), case)


@pytest.mark.gpu
def test_rows_of_several_tokens_are_left_alone(native: Native) -> None:
    rows = [(300, 1), (40, 7), (1, 1), (64, 64), (900, 1), (500, 2), *[(70, 1)] * 6]
    case = rows_and_counts(rows, ordered=False)
    out, wanted = decode(native, case), attend(case)
    starts = case.query_start_loc.tolist()
    for begin, end in zip(starts, starts[1:], strict=False):
        if end - begin == 1:
            assert error(out[begin], wanted[begin]) < LIMITS[out.dtype]
        else:
            assert out[begin:end].isnan().all()


@pytest.mark.gpu
def test_a_row_without_context_is_zeros(native: Native) -> None:
    case = rows_of([1] * 12)
    case.seq_lens[3:6] = 0
    out = decode(native, case)
    assert out[3:6].eq(0).all() and not out.isnan().any()


@pytest.mark.gpu
def test_a_run_repeats_itself_bit_by_bit(native: Native) -> None:
    case = rows_of([*LENGTHS, 20000])
    plan = plan_of(native, case)
    wanted = launch(native, case, plan)
    for turn in range(20):
        assert torch.equal(launch(native, case, plan, first=turn % 2 == 0), wanted)


@pytest.mark.gpu
def test_a_layer_sees_the_token_that_the_kernel_in_front_of_it_writes(native: Native) -> None:
    """All in one graph of dependent launches; before each replay the new tokens are NaN again."""
    lengths = [513, 1024, 16, 1, 300, 17, 48, 2000, 5, 64]
    layers = [rows_of(lengths, written=False) for _ in range(6)]
    for number, case in enumerate(layers):
        for numbers in (case.kv, case.k, case.v):
            assert numbers is not None
            numbers.mul_(1 + number / 8)
    fresh = [case.kv.clone() for case in layers]

    def step() -> list[Tensor]:
        plan, outs = plan_of(native, layers[0]), []
        for number, case in enumerate(layers):
            kv_write.kv_write(case.kv, case.slot_mapping, case.k, case.v)
            outs.append(launch(native, case, plan, first=number == 0))
        return outs

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for _ in range(5):
        for case, kv in zip(layers, fresh, strict=True):
            case.kv.copy_(kv)
        graph.replay()
        for case, out in zip(layers, outs, strict=True):
            check(out, case)


@pytest.mark.gpu
def test_a_captured_graph_serves_rows_of_any_length(native: Native) -> None:
    first = rows_of([300, 40, 1000, *[20] * 7])
    decode(native, first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = plan_of(native, first)
        outs = [launch(native, first, plan), launch(native, first, plan, first=False)]
    for seed, lengths in enumerate(([2, 31, 12, *[9] * 7], [640, 480, 16, *[16] * 7], [1] * 10)):
        other = rows_of(lengths, seed=seed + 1)
        blocks, width = other.kv.shape[0], other.block_tables.shape[1]
        first.kv.fill_(torch.nan)
        first.kv[:blocks].copy_(other.kv)
        first.block_tables[:, :width].copy_(other.block_tables)
        first.q.copy_(other.q)
        first.seq_lens.copy_(other.seq_lens)
        graph.replay()
        for out in outs:
            check(out, other)


@pytest.mark.gpu
def test_the_backend_decodes_many_rows_by_it_beside_prompts_too(
    native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TritonAttention(pick("cuda"), native=native)
    seen: list[bool] = []
    ours = paged_decode_bulk.paged_decode_bulk

    def spy(*arguments: Any, first: bool, **options: Any) -> None:
        seen.append(first)
        ours(*arguments, first=first, **options)

    monkeypatch.setattr(paged_decode_bulk, "paged_decode_bulk", spy)
    many, some = [(60 + 7 * row, 1) for row in range(20)], [(500, 1), (70, 1)]
    prompts = [(100, 100), (300, 40)]
    biased = replace(COMMON, softcap=5.0)
    for rows, attn, wanted in (
        (many, COMMON, [True, False]),
        (many + prompts, COMMON, [True, False]),
        (some, COMMON, []),
        (many, biased, []),
    ):
        case = rows_and_counts(rows, attn)
        plan = backend.plan(batch_of(case))
        seen.clear()
        for _ in range(2):
            out = backend.forward(case.q, None, None, case.kv, plan, case.attn)
            check(out, case)
        assert seen == wanted


def test_what_it_cannot_do_is_said() -> None:
    shape = Shape(kv_heads=2, group=4, width=64)
    rows = paged_decode_bulk.MIN_ROWS
    q = torch.zeros(rows, 8, 64, dtype=torch.bfloat16)
    kv = torch.zeros(3, 2, 16, 2, 64, dtype=torch.bfloat16)
    tables, lens = torch.zeros(rows, 5, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    starts = torch.arange(rows + 1, dtype=torch.int32)

    def reason(
        shape: Shape = shape,
        q: Tensor = q,
        kv: Tensor = kv,
        lens: Tensor = lens,
        starts: Tensor = starts,
        **options: Any,
    ) -> str:
        given = shape, q, kv, tables, lens, starts
        return paged_decode_bulk.refusal(*given, **options) or ""

    assert reason() == ""
    assert f"{rows - 1} rows are less than {rows}" in reason(lens=lens[1:])
    assert "softcap" in reason(softcap=3.0)
    assert "biases" in reason(slopes=torch.zeros(8))
    assert "64 or 128" in reason(replace(shape, width=96))
    assert "64 or 128" in reason(replace(shape, width=128, rest=64, latent=True))
    assert "9 query heads share a key" in reason(replace(shape, group=9))
    assert "blocks of 8 tokens" in reason(replace(shape, page=8))
    assert "blocks of 48 tokens" in reason(replace(shape, page=48))
    assert "torch.float32" in reason(q=q.float(), kv=kv.float())
    assert "torch.float16" in reason(q=q.half())
    assert "torch.int64 are not int32" in reason(starts=starts.long())
    odd = torch.zeros(rows, 513, dtype=torch.bfloat16)[:, :512].view(rows, 8, 64)
    assert "queries are not aligned" in reason(q=odd)
    shifted = torch.zeros(3 * 4096 + 4, dtype=torch.bfloat16)[4:].view(3, 2, 16, 2, 64)
    assert "keys are not aligned" in reason(kv=shifted)


class Room:
    """A GPU on which `fit` blocks of threads fit, or an error."""

    def __init__(self, fit: int) -> None:
        self.fit = fit

    def bulk_fit(self, width: int, half: int, heads: int, stages: int) -> int:
        return self.fit

    def name_of(self, error: int) -> str:
        return {101: "cudaErrorInvalidDevice"}[error]


@pytest.mark.parametrize(
    ("kv_heads", "width", "fit", "bins", "stages"),
    [
        (8, 128, 1, 132, 6),
        (8, 64, 2, 264, 6),
        (4, 128, 2, 264, 6),
        (2, 128, 3, 396, 6),  # there is no room for the fourth
        (16, 128, 1, 66, 6),
        (12, 128, 1, 66, 8),
        (5, 128, 1, 132, 9),
    ],
)
def test_as_many_blocks_of_threads_as_fit_share_the_ring(
    kv_heads: int, width: int, fit: int, bins: int, stages: int
) -> None:
    native = cast(Native, Room(fit))
    assert paged_decode_bulk.tune(native, Shape(kv_heads, 1, width), 132) == Tuning(bins, stages)


def test_no_room_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not fit: cudaErrorInvalidDevice"):
        paged_decode_bulk.tune(cast(Native, Room(-101)), Shape(8, 4, 128), 132)
