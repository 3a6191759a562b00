"""The torch backend against plain loops over tokens, in a cache whose unused memory is NaN."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from pagedserve.attention import Batch, choose
from pagedserve.attention import torch_plan as planning
from pagedserve.attention.torch import TorchAttention
from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.spec import Attn, DecoderSpec, Layer, Norm

LAYERS, LAYER = 3, 1
ATTN = Attn(heads=6, kv_heads=2, head_dim=8, scale=0.3)


class Case:
    """Random rows (context, count) over a shuffled cache; `wanted` is computed by loops."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        attn: Attn = ATTN,
        *,
        block_size: int = 5,
        kv_dtype: torch.dtype = torch.float32,
    ):
        self.attn, self.block_size = attn, block_size
        rows = sorted(rows, key=lambda row: row[1] > 1)
        self.lens, self.counts = [n for n, _ in rows], [c for _, c in rows]
        needed = [-(-n // block_size) for n in self.lens]
        blocks = list(range(sum(needed) + 3))
        random.Random(3).shuffle(blocks)
        self.unused = blocks.pop()
        self.tables = [[blocks.pop() for _ in range(n)] for n in needed]
        shape = (sum(needed) + 3, LAYERS, 2, block_size, attn.kv_heads, attn.head_dim)
        self.cache = torch.full(shape, math.nan, dtype=kv_dtype)
        size = (sum(self.lens), attn.kv_heads, attn.head_dim)
        self.k = torch.randn(size).to(kv_dtype).split(self.lens)
        self.v = torch.randn(size).to(kv_dtype).split(self.lens)
        self.q = torch.randn(sum(self.counts), attn.heads, attn.head_dim)
        self.slots = [
            [table[p // block_size] * block_size + p % block_size for p in range(n)]
            for table, n in zip(self.tables, self.lens, strict=True)
        ]
        for row, count in enumerate(self.counts):
            for position in range(self.lens[row] - count):
                self.put(row, position)

    def put(self, row: int, position: int) -> None:
        block, offset = divmod(self.slots[row][position], self.block_size)
        self.cache[block, LAYER, 0, offset] = self.k[row][position]
        self.cache[block, LAYER, 1, offset] = self.v[row][position]

    def batch(self) -> Batch:
        width = max(len(table) for table in self.tables)
        spans = [range(n - c, n) for n, c in zip(self.lens, self.counts, strict=True)]
        slots = [s[p] for s, span in zip(self.slots, spans, strict=True) for p in span]
        positions = [p for span in spans for p in span]
        return Batch(
            input_ids=torch.zeros(len(positions), dtype=torch.int64),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(
                [(table + [self.unused] * width)[:width] for table in self.tables]
            ),
            seq_lens=torch.tensor(self.lens),
            query_start_loc=torch.tensor([0, *itertools.accumulate(self.counts)]),
            counts=self.counts,
            lens=self.lens,
            num_decodes=sum(count == 1 for count in self.counts),
            block_size=self.block_size,
        )

    def run(self) -> Tensor:
        new = [
            (k[n - c :], v[n - c :])
            for k, v, n, c in zip(self.k, self.v, self.lens, self.counts, strict=True)
        ]
        k, v = (torch.cat(parts).float() for parts in zip(*new, strict=True))
        backend, batch = TorchAttention(pick("cpu")), self.batch()
        return backend.forward(self.q, k, v, self.cache[:, LAYER], backend.plan(batch), self.attn)

    def wanted(self) -> Tensor:
        rows = [
            (row, position)
            for row, (n, c) in enumerate(zip(self.lens, self.counts, strict=True))
            for position in range(n - c, n)
        ]
        return torch.stack([self.one(*where, q) for where, q in zip(rows, self.q, strict=True)])

    def one(self, row: int, position: int, q: Tensor) -> Tensor:
        """One query: head by head, key by key."""
        out = []
        first = max(0, position + 1 - self.attn.window) if self.attn.window else 0
        for head in range(self.attn.heads):
            kv_head = head // (self.attn.heads // self.attn.kv_heads)
            seen = range(first, position + 1)
            scores = [
                float(q[head] @ self.k[row][p, kv_head].float()) * self.attn.scale for p in seen
            ]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            values = [self.v[row][p, kv_head].float() for p in seen]
            total = sum(w * v for w, v in zip(weights, values, strict=True))
            out.append(total / sum(weights))
        return torch.stack(out)


MIXES = {
    "one token alone": [(1, 1)],
    "decodes of one length": [(13, 1), (13, 1)],
    "decodes of different lengths": [(7, 1), (23, 1), (1, 1), (16, 1)],
    "a fresh prompt": [(17, 17)],
    "a chunk": [(31, 6)],
    "everything": [(9, 1), (30, 1), (12, 12), (33, 5), (21, 2), (4, 4)],
}
WINDOWS = (None, 1, 4, 11, 100)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mix", MIXES)
def test_it_attends_like_plain_loops(mix: str, window: int | None) -> None:
    attn = Attn(heads=6, kv_heads=2, head_dim=8, scale=0.3, window=window)
    case = Case(MIXES[mix], attn)
    torch.testing.assert_close(case.run(), case.wanted(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", (1, 2, 16))
def test_any_block_size_gives_the_same(block_size: int) -> None:
    case = Case(MIXES["everything"], block_size=block_size)
    torch.testing.assert_close(case.run(), case.wanted(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_heads", (1, 3, 6))
def test_any_grouping_of_heads_gives_the_same(kv_heads: int) -> None:
    case = Case(MIXES["everything"], Attn(heads=6, kv_heads=kv_heads, head_dim=8, scale=0.3))
    torch.testing.assert_close(case.run(), case.wanted(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", (None, 6))
def test_small_groups_and_slices_give_the_same(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "GROUP_COST_TOKENS", 5)
    monkeypatch.setattr(planning, "MAX_GROUP_BYTES", 20 * 2 * 2 * 8 * 4)
    monkeypatch.setattr(planning, "MAX_MASK_ELEMENTS", 50)
    monkeypatch.setattr(planning, "MIN_SLICE", 3)
    rows = [(5, 1), (31, 1), (6, 1), (30, 1), (8, 1), (19, 19), (40, 10), (3, 2)]
    case = Case(rows, Attn(heads=6, kv_heads=2, head_dim=8, scale=0.3, window=window))
    torch.testing.assert_close(case.run(), case.wanted(), rtol=1e-5, atol=1e-6)


def test_a_cache_in_sixteen_bits_is_read_as_stored() -> None:
    case = Case(MIXES["everything"], kv_dtype=torch.bfloat16)
    torch.testing.assert_close(case.run(), case.wanted(), rtol=1e-5, atol=1e-6)


def test_it_writes_this_step_into_its_slots_and_nothing_else() -> None:
    case = Case(MIXES["everything"])
    before = case.cache.clone()
    case.run()
    expected = case.cache.clone()
    case.cache = before
    for row, (n, c) in enumerate(zip(case.lens, case.counts, strict=True)):
        for position in range(n - c, n):
            case.put(row, position)
    torch.testing.assert_close(case.cache, expected, equal_nan=True, rtol=0, atol=0)


def test_a_row_that_is_not_a_number_harms_only_itself() -> None:
    case = Case([(9, 1), (23, 1), (14, 6)])
    case.k[1][4] = math.nan
    case.put(1, 4)
    got, wanted = case.run(), case.wanted()
    assert got[1].isnan().any()
    rest = [0, *range(2, len(got))]
    torch.testing.assert_close(got[rest], wanted[rest], rtol=1e-5, atol=1e-6)


def test_a_plan_serves_layers_with_different_windows() -> None:
    case = Case(MIXES["everything"])
    backend, batch = TorchAttention(pick("cpu")), case.batch()
    first = case.run()
    plan = backend.plan(batch)
    new = [k[n - c :] for k, n, c in zip(case.k, case.lens, case.counts, strict=True)]
    values = [v[n - c :] for v, n, c in zip(case.v, case.lens, case.counts, strict=True)]
    for window in (4, None):
        case.attn = Attn(heads=6, kv_heads=2, head_dim=8, scale=0.3, window=window)
        got = backend.forward(
            case.q, torch.cat(new), torch.cat(values), case.cache[:, LAYER], plan, case.attn
        )
        torch.testing.assert_close(got, case.wanted(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, first)


def test_what_is_not_supported_is_said() -> None:
    backend = TorchAttention(pick("cpu"))
    assert backend.supports(ATTN, torch.float32, 16) is None
    assert "divide" in str(backend.supports(Attn(6, 4, 8, 1.0), torch.float32, 16))
    assert "int8" in str(backend.supports(ATTN, torch.int8, 16))


def test_choosing_names_the_reason_where_no_backend_fits() -> None:
    layer = Layer(Attn(heads=6, kv_heads=4, head_dim=8, scale=1.0), None)
    spec = DecoderSpec(64, 32, 64, (layer,), Norm(), {})
    with pytest.raises(StartupError, match="torch: 6 query heads do not divide"):
        choose(pick("cpu"), spec, torch.float32, 16)
