"""Paged attention's kernels against the formula, in Triton's interpreter (see test_interpreted)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pagedserve.attention.triton import Processors, TritonAttention, shape_of
from pagedserve.kernels import kv_write, paged_decode, paged_prefill, reference
from pagedserve.spec import Attn
from tests.kernels.paged import Paged, attend, batch_of, error, paged

PLAIN = Attn(heads=6, kv_heads=2, head_dim=8, scale=0.4)
FEATURES = {
    "groups": PLAIN,
    "own keys, an odd size": Attn(heads=3, kv_heads=3, head_dim=20, scale=0.3),
    "one key for more heads than a tile has": Attn(heads=35, kv_heads=1, head_dim=16, scale=0.3),
    "window": replace(PLAIN, window=7),
    "chunk": replace(PLAIN, chunk=8),
    "softcap": replace(PLAIN, softcap=2.0),
    "biases in a window": replace(PLAIN, alibi=8.0, window=20),
    "sinks": replace(PLAIN, sinks=True),
    "all at once": replace(PLAIN, alibi=8.0, softcap=3.0, sinks=True, chunk=9, window=5),
    "latents": Attn(heads=20, kv_heads=1, head_dim=28, scale=0.3, values_in_keys=20),
    "latents that are all of a key": Attn(4, 1, 16, 0.3, values_in_keys=16),
}
ROWS = [(37, 1), (1, 1), (64, 1), (41, 20), (18, 18), (33, 2)]


def backend() -> TritonAttention:
    device = SimpleNamespace(is_gpu=True, torch=torch.device("cpu"), name="interpreter")
    return TritonAttention(device, Processors(count=3, capability=(8, 0)))


def forward(case: Paged, *, write: bool = True) -> Tensor:
    attention = backend()
    assert attention.supports(case.attn, case.kv.dtype, case.kv.shape[2]) is None
    plan = attention.plan(batch_of(case))
    for _ in range(2):  # the second layer finds the first one's plan as it was
        out = attention.forward(
            case.q,
            case.k if write else None,
            case.v,
            case.kv,
            plan,
            case.attn,
            slopes=case.slopes,
            sinks=case.sinks,
        )
    return out


@pytest.mark.parametrize("feature", FEATURES)
def test_a_mixed_batch_is_attended_by_the_formula(feature: str) -> None:
    case = paged(FEATURES[feature], ROWS, written=False)
    out = forward(case)
    assert error(out, attend(case)) < 1e-6


@pytest.mark.parametrize("rows", ([(9, 1), (30, 1)], [(9, 9), (30, 5)], [(1, 1)]), ids=str)
def test_rows_of_one_kind_need_none_of_the_other(rows: list[tuple[int, int]]) -> None:
    case = paged(PLAIN, rows, written=False, block_size=5, index=torch.int32)
    assert error(forward(case), attend(case)) < 1e-6


def test_rows_may_come_in_any_order_and_compute_nothing() -> None:
    rows = [(18, 18), (37, 1), (0, 0), (64, 1), (33, 2), (0, 0), (5, 1), (0, 0)]
    case = paged(PLAIN, rows, written=False, ordered=False)
    assert error(forward(case), attend(case)) < 1e-6


def test_what_is_in_the_cache_already_is_not_asked_for() -> None:
    case = paged(PLAIN, ROWS)
    assert error(forward(case, write=False), attend(case)) < 1e-6


@pytest.mark.parametrize(
    ("attn", "dtype", "word"),
    [
        (Attn(6, 4, 8, 1.0), torch.float32, "divide"),
        (PLAIN, torch.float8_e4m3fn, "float8"),
        (Attn(2, 2, 320, 1.0), torch.bfloat16, "320"),
        (Attn(16, 1, 1024, 1.0, values_in_keys=960), torch.bfloat16, "960"),
        (Attn(16, 1, 576, 1.0, values_in_keys=512), torch.float32, "576"),
    ],
)
def test_what_it_cannot_do_is_said(attn: Attn, dtype: torch.dtype, word: str) -> None:
    assert word in (backend().supports(attn, dtype, 16) or "")


def test_old_gpus_are_refused() -> None:
    device = SimpleNamespace(is_gpu=True, torch=torch.device("cpu"), name="old")
    old = TritonAttention(device, Processors(count=30, capability=(7, 5)))
    assert "7.5" in (old.supports(PLAIN, torch.float16, 16) or "")


@pytest.mark.parametrize("bins", (1, 4, 40))
@pytest.mark.parametrize("rows", ([(150, 1)], [(1, 1), (37, 1), (100, 1), (16, 1), (9, 4)]))
def test_any_number_of_bins_gives_the_same(bins: int, rows: list[tuple[int, int]]) -> None:
    case = paged(PLAIN, rows)
    shape = shape_of(PLAIN, case.kv.shape[2], case.kv.dtype)
    tuning = paged_decode.Tuning(16, bins, 1, 4, 2)
    plan = paged_decode.plan_decode(
        shape, tuning, case.block_tables, case.seq_lens, case.query_start_loc
    )
    out = torch.full((case.q.shape[0], 6, 8), torch.nan)
    for _ in range(2):
        paged_decode.paged_decode(
            case.q,
            case.kv,
            out,
            plan,
            scale=PLAIN.scale,
        )
    ones = case.num_decodes
    assert error(out[:ones], attend(case)[:ones]) < 1e-6
    assert out[ones:].isnan().all(), "rows of several tokens are another kernel's"
    assert plan.counters.eq(0).all()


@pytest.mark.parametrize("window", (0, 20))
def test_bins_are_equal_shares_of_all_tiles(window: int) -> None:
    lens, counts, tile, bins = [5, 64, 33, 1, 90, 12, 0], [1, 1, 1, 1, 1, 3, 1], 16, 5
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)])
    shape = paged_decode.Shape(1, 1, 16, window=window)
    tuning = paged_decode.Tuning(tile, bins, 1, 4, 2)
    tables = torch.zeros((len(lens), 6), dtype=torch.int32)
    plan = paged_decode.plan_decode(shape, tuning, tables, torch.tensor(lens), starts)
    first = [max(0, n - window) if window else 0 for n in lens]
    tiles = [
        max(1, -(-n // tile) - low // tile) if c == 1 else 0
        for n, low, c in zip(lens, first, counts, strict=True)
    ]
    before = [sum(tiles[:row]) for row in range(len(tiles) + 1)]
    size = -(-before[-1] // bins)
    assert plan.starts[:-1].tolist() == before
    for at, record in enumerate(plan.bins.tolist()):
        begin, stop = at * size, min((at + 1) * size, before[-1])
        assert record[:3] == [begin, stop, size]
        if begin < stop:
            for tile_, found in ((begin, record[3:6]), (stop - 1, record[6:9])):
                row = sum(end <= tile_ for end in before[1:])
                assert found == [row, before[row], before[row + 1]]


@pytest.mark.parametrize("page", (5, 8, 16, 48))
@pytest.mark.parametrize("sight", ({}, {"window": 20}, {"chunk": 24}), ids=str)
def test_every_tile_says_where_its_keys_lie(page: int, sight: dict[str, int]) -> None:
    lens, counts, tile = [5, 64, 33, 1, 90, 12, 0], [1, 1, 1, 1, 1, 3, 1], 16
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)])
    shape = paged_decode.Shape(1, 1, 16, page=page, **sight)
    tables = torch.randperm(1000)[: len(lens) * 20].reshape(len(lens), 20).int()
    tuning = paged_decode.Tuning(tile, 4, 1, 4, 2)
    plan = paged_decode.plan_decode(shape, tuning, tables, torch.tensor(lens), starts)
    piece = paged_decode.piece_size(shape, tile)
    rows = [row for row, count in enumerate(counts) if count == 1]
    for row in rows:
        length = lens[row]
        first = max(0, length - sight["window"]) if "window" in sight else 0
        if "chunk" in sight and length:
            first = max(first, (length - 1) // sight["chunk"] * sight["chunk"])
        begin, stop = plan.starts[row : row + 2].tolist()
        marks = plan.marks[begin:stop].tolist()
        assert [mark // 2 for mark, _ in marks] == [int(starts[row])] * (stop - begin)
        assert [mark % 2 for mark, _ in marks] == [0] * (stop - begin - 1) + [1]
        seen = []
        for number, pieces in enumerate(plan.pieces[begin:stop].tolist()):
            position = (first // tile + number) * tile
            assert marks[number][1] == length - 1 - position
            for each in pieces:
                place, low, high = each >> 16, each >> 8 & 255, each & 255
                for inner in range(low, high):
                    at = position + inner
                    assert place + inner == int(tables[row, at // page]) * page + at % page
                    seen.append(at)
                position += piece
        assert seen == list(range(first, length))


@pytest.mark.parametrize("parts", (1, 3))
def test_no_row_is_merged_of_more_parts_than_allowed(parts: int) -> None:
    lens = torch.tensor([500, 20])
    tuning = paged_decode.Tuning(16, 12, 1, 4, 2, max_parts=parts)
    tables, starts = torch.zeros((2, 32), dtype=torch.int32), torch.tensor([0, 1, 2])
    plan = paged_decode.plan_decode(paged_decode.Shape(1, 1, 16), tuning, tables, lens, starts)
    assert plan.bins[0, 2] * parts >= -(-500 // 16)


@pytest.mark.parametrize("window", (0, 10))
def test_every_tile_is_listed_the_most_work_first(window: int) -> None:
    lens, counts = [7, 30, 64, 9, 100], [1, 30, 5, 2, 40]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)])
    plan = paged_prefill.plan_prefill(8, sum(counts), torch.tensor(lens), starts, window=window)
    wanted = []
    for row, (n, count) in enumerate(zip(lens, counts, strict=True)):
        for skipped in range(0, count if count > 1 else 0, 8):
            position, tokens = n - count + skipped, min(8, count - skipped)
            first = max(0, position + 1 - window) if window else 0
            wanted.append([row, int(starts[row]) + skipped, tokens, position, n, first])
    got = plan.tiles[: int(plan.count)].tolist()
    assert sorted(tile[:6] for tile in got) == sorted(wanted)
    costs = [tile[3] + tile[2] - tile[5] for tile in got]
    assert costs == sorted(costs, reverse=True)


def test_keys_and_values_are_written_where_their_slots_say() -> None:
    for attn in (Attn(4, 3, 10, 1.0), Attn(4, 1, 12, 1.0, values_in_keys=8)):
        case = paged(attn, [(9, 9), (3, 1), (20, 4)], written=False)
        wanted = case.kv.clone()
        kv_write.kv_write(case.kv, case.slot_mapping, case.k, case.v)
        if case.v is not None:
            reference.kv_write(wanted, case.slot_mapping, case.k, case.v)
        else:
            at = case.slot_mapping
            wanted[at // 4, 0, at % 4] = case.k
        torch.testing.assert_close(case.kv, wanted, rtol=0, atol=0, equal_nan=True)


def test_only_values_after_the_last_token_of_several_are_cleared() -> None:
    case = paged(PLAIN, [(6, 1), (9, 3), (8, 2)])
    wanted = case.kv.clone()
    block = case.block_tables[case.lens.index(9), 2]
    wanted[block, 1, 1:] = 0
    kv_write.clear_tails(case.kv, case.block_tables, case.seq_lens, case.query_start_loc)
    torch.testing.assert_close(case.kv, wanted, rtol=0, atol=0, equal_nan=True)
