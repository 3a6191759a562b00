"""What of the Gluon prefill can be told without a GPU: who takes which item, and what it refuses.

The kernel's own functions for this are plain arithmetic; they run here as Python. Gluon has no
interpreter, so the kernel itself is tested on a GPU only (test_paged_gpu.py).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pagedserve.kernels import paged_prefill_wgmma as wgmma
from pagedserve.kernels.paged_decode import Shape

PROGRAMS = 132
HEADS, GROUP = 32, 4
BATCHES = {  # tokens and context of each row
    "16 of 512": [(512, 512)] * 16,
    "4 of 2k": [(2048, 2048)] * 4,
    "1k": [(1024, 1024)],
    "4k": [(4096, 4096)],
    "8k": [(8192, 8192)],
    "2k on 16k": [(2048, 18432)],
    "32k": [(32768, 32768)],
}


def as_python(program: int) -> SimpleNamespace:
    """`_item`, `_turns` and `_tile` for one program."""
    names: dict[str, Any] = {
        "gl": SimpleNamespace(
            minimum=min,
            maximum=max,
            where=lambda condition, a, b: a if condition else b,
            program_id=lambda axis: program,
        ),
        "FIELDS": 1,
        "ITEMS_TOGETHER": wgmma.ITEMS_TOGETHER.value,
    }
    for name in ("_item", "_turns", "_tile"):
        names[name] = types.FunctionType(getattr(wgmma, name).fn.__code__, names)
    return SimpleNamespace(turns=names["_turns"], tile=names["_tile"])


def taken(tiles: int, heads: int, group: int, programs: int) -> Iterator[list[tuple[int, int]]]:
    """(tile, head) of every item of each program."""
    for program in range(programs):
        own = as_python(program)
        items = tiles * heads
        yield [
            own.tile(0, turn, programs, items, heads, group)
            for turn in range(own.turns(items, programs))
        ]


@pytest.mark.parametrize(
    ("tiles", "heads", "group", "programs"),
    [(1, 32, 4, 132), (64, 32, 4, 132), (300, 32, 4, 132), (700, 40, 8, 108), (37, 12, 1, 7)],
)
def test_every_tile_of_every_head_is_taken_once(
    tiles: int, heads: int, group: int, programs: int
) -> None:
    found = [item for items in taken(tiles, heads, group, programs) for item in items]
    assert sorted(found) == [(tile, head) for tile in range(tiles) for head in range(heads)]


def test_no_tiles_are_no_turns() -> None:
    assert list(taken(0, HEADS, GROUP, PROGRAMS)) == [[]] * PROGRAMS


def test_what_is_asked_for_ahead_is_always_in_the_list() -> None:
    for tiles in (0, 1, 5):
        own = as_python(131)
        for turn in range(4):
            tile, head = own.tile(0, turn, PROGRAMS, tiles * HEADS, HEADS, GROUP)
            assert 0 <= tile <= max(tiles - 1, 0) and 0 <= head < HEADS


@pytest.mark.parametrize("batch", BATCHES)
def test_programs_get_even_shares(batch: str) -> None:
    costs = []
    for count, context in BATCHES[batch]:
        stops = [context - count + min(n, count) for n in range(128, count + 128, 128)]
        costs += [-(-stop // wgmma.BLOCK_N) for stop in stops]
    costs.sort(reverse=True)
    work = [
        sum(costs[tile] for tile, _ in items) for items in taken(len(costs), HEADS, GROUP, PROGRAMS)
    ]
    assert sum(work) / len(work) > 0.95 * max(work)


@pytest.mark.parametrize(
    ("shape", "dtype", "capability"),
    [
        (Shape(8, 4, 128), torch.bfloat16, (8, 0)),
        (Shape(8, 4, 128), torch.bfloat16, (10, 0)),
        (Shape(8, 4, 128), torch.float32, (9, 0)),
        (Shape(8, 4, 96), torch.bfloat16, (9, 0)),
        (Shape(8, 4, 128, page=24), torch.bfloat16, (9, 0)),
        (Shape(8, 4, 128, chunk=64), torch.bfloat16, (9, 0)),
        (Shape(8, 4, 128, window=64), torch.bfloat16, (9, 0)),
    ],
)
def test_what_it_cannot_do_is_refused(
    shape: Shape, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    assert refusal(shape, dtype, capability)


def test_plain_attention_is_not_refused() -> None:
    for width in (64, 128):
        assert refusal(Shape(8, 4, width), torch.bfloat16, (9, 0)) is None


def refusal(shape: Shape, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """For queries and a cache of that shape."""
    q = torch.zeros((3, shape.kv_heads * shape.group, shape.width), dtype=dtype)
    size = (2, 3, 2, shape.page, shape.kv_heads, shape.width)
    return wgmma.refusal(shape, q, torch.zeros(size, dtype=dtype)[:, 1], capability)
