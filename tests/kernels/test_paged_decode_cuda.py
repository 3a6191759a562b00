"""Decode of a few rows in CUDA C++, by the formula: features, lengths, clusters, order of launches.

Caches are NaN wherever nothing was written. Needs a GPU of capability 9.0, and nvcc or a library
that it made; what it refuses is tested without.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pagedserve.attention.triton import Processors, TritonAttention, shape_of
from pagedserve.device import pick
from pagedserve.kernels import extension, kv_write, paged_decode_cuda
from pagedserve.kernels.paged_decode import Shape
from pagedserve.kernels.paged_decode_cuda import Native, Tuning
from pagedserve.spec import Attn
from tests.kernels.native import COMMON, LIMITS, SMALL, built, check, rows_of
from tests.kernels.paged import Paged, batch_of, paged

FEATURES = {
    "four heads a key": COMMON,
    "two heads a key": replace(COMMON, heads=16),
    "own keys": replace(COMMON, heads=8),
    "three heads a key": replace(COMMON, heads=24),
    "seven heads a key": replace(COMMON, heads=28, kv_heads=4),
    "window": replace(COMMON, window=300),
    "a window of one token": replace(COMMON, window=1),
    "chunk": replace(COMMON, chunk=256),
    "sinks": replace(COMMON, sinks=True),
    "softcap": replace(COMMON, softcap=5.0),
    "biases": replace(COMMON, alibi=8.0),
    "steep scores": replace(COMMON, scale=5.0),
    "heads of 64": SMALL,
    "heads of 64, own keys": replace(SMALL, heads=2),
    "heads of 64, everything": replace(
        SMALL, window=700, chunk=512, sinks=True, softcap=9.0, alibi=8.0
    ),
}
LENGTHS = [1000, 1, 4097, 33, 16, 700, 17, 2048]
TUNINGS = [
    Tuning(cluster, stages) for cluster, stages in itertools.product((1, 2, 4, 8, 16), (1, 2))
]


@pytest.fixture(scope="module")
def native() -> Native:
    """The kernels, built if they are not yet."""
    return built()


def decode(
    native: Native, case: Paged, tuning: Tuning | None = None, *, first: bool = True
) -> Tensor:
    """By the kernel."""
    shape, out = (
        shape_of(case.attn, case.kv.shape[2], case.kv.dtype),
        torch.full_like(case.q, torch.nan).contiguous(),
    )
    given = shape, case.q, case.kv, case.block_tables, case.seq_lens
    assert paged_decode_cuda.refusal(*given) is None
    paged_decode_cuda.paged_decode_cuda(
        native,
        case.q,
        case.kv,
        out,
        case.block_tables,
        case.seq_lens,
        shape,
        tuning or paged_decode_cuda.tune(shape, len(case.lens), 132),
        scale=case.attn.scale,
        softcap=case.attn.softcap,
        slopes=case.slopes,
        sinks=case.sinks,
        first=first,
    )
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_right_to_its_rounding(
    native: Native, feature: str, dtype: torch.dtype, first: bool
) -> None:
    case = rows_of(LENGTHS, FEATURES[feature], dtype=dtype)
    check(decode(native, case, first=first), case)


@pytest.mark.gpu
@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_any_cluster_gives_the_same(native: Native, tuning: Tuning) -> None:
    for attn in (COMMON, replace(SMALL, window=200)):
        case = rows_of(LENGTHS, attn)
        check(decode(native, case, tuning), case)
        check(decode(native, case, tuning, first=False), case)


@pytest.mark.gpu
def test_a_small_batch_for_the_sanitizer(native: Native) -> None:
    """Both orders of launches; under compute-sanitizer the other tests would take minutes."""
    case = rows_of([900, 40, 1], replace(COMMON, sinks=True))
    for first in (True, False):
        check(decode(native, case, first=first), case)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", (16, 32, 64, 256))
def test_any_block_size_gives_the_same(native: Native, block_size: int) -> None:
    case = rows_of(LENGTHS, block_size=block_size)
    for first in (True, False):
        check(decode(native, case, first=first), case)


@pytest.mark.gpu
def test_every_length_around_a_tile_is_right(native: Native) -> None:
    for start in range(1, 90, 8):
        case = rows_of(list(range(start, start + 8)), SMALL, seed=start)
        check(decode(native, case, first=start % 16 == 1), case)


@pytest.mark.gpu
def test_a_warp_goes_through_its_table_more_than_once(native: Native) -> None:
    case = rows_of([70001, 33000], replace(COMMON, kv_heads=1, heads=4))
    for tuning in (Tuning(1, 2), Tuning(2, 1), Tuning(16, 2)):
        check(decode(native, case, tuning, first=False), case)
    windowed = rows_of([70001, 33000], replace(COMMON, kv_heads=1, heads=4, window=20000))
    check(decode(native, windowed, Tuning(1, 2), first=False), windowed)


@pytest.mark.gpu
def test_a_run_repeats_itself_bit_by_bit(native: Native) -> None:
    case = rows_of(LENGTHS)
    wanted = decode(native, case)
    for turn in range(20):
        assert torch.equal(decode(native, case, first=turn % 2 == 0), wanted)


@pytest.mark.gpu
def test_a_layer_sees_the_token_that_the_kernel_in_front_of_it_writes(native: Native) -> None:
    """All in one graph of dependent launches; before each replay the new tokens are NaN again."""
    layers = [rows_of([513, 1024, 16, 1], seed=layer, written=False) for layer in range(8)]
    fresh = [case.kv.clone() for case in layers]

    def step() -> list[Tensor]:
        outs = []
        for number, case in enumerate(layers):
            kv_write.kv_write(case.kv, case.slot_mapping, case.k, case.v)
            outs.append(decode(native, case, first=number == 0))
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
    first = rows_of([300, 40, 1000])
    decode(native, first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [decode(native, first), decode(native, first, first=False)]
    for seed, lengths in enumerate(([2, 31, 12], [640, 480, 16], [1, 1, 1])):
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
def test_the_backend_decodes_few_rows_by_it_and_says_when_a_step_begins(
    native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TritonAttention(pick("cuda"), native=native)
    seen: list[bool] = []
    launch = paged_decode_cuda.paged_decode_cuda

    def spy(*arguments: Any, first: bool, **options: Any) -> None:
        seen.append(first)
        launch(*arguments, first=first, **options)

    monkeypatch.setattr(paged_decode_cuda, "paged_decode_cuda", spy)
    for lengths, wanted in (([500, 70], [True, False]), ([20] * 9, [])):
        case = rows_of(lengths)
        plan = backend.plan(batch_of(case))
        seen.clear()
        for _ in range(2):
            check(backend.forward(case.q, None, None, case.kv, plan, case.attn), case)
        assert seen == wanted


def test_what_it_cannot_do_is_said() -> None:
    shape = Shape(kv_heads=2, group=4, width=64)
    q = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    kv = torch.zeros(3, 2, 16, 2, 64, dtype=torch.bfloat16)
    tables, lens = torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, dtype=torch.int32)

    def reason(shape: Shape = shape, q: Tensor = q, kv: Tensor = kv, lens: Tensor = lens) -> str:
        return paged_decode_cuda.refusal(shape, q, kv, tables, lens) or ""

    assert reason() == ""
    assert "9 rows are more than 8" in reason(lens=torch.ones(9, dtype=torch.int32))
    assert "64 or 128" in reason(replace(shape, width=96))
    assert "64 or 128" in reason(replace(shape, width=128, rest=64, latent=True))
    assert "9 query heads share a key" in reason(replace(shape, group=9))
    assert "blocks of 8 tokens" in reason(replace(shape, page=8))
    assert "blocks of 48 tokens" in reason(replace(shape, page=48))
    assert "torch.float32" in reason(q=q.float(), kv=kv.float())
    assert "torch.float16" in reason(q=q.half())
    assert "lengths of torch.int64" in reason(lens=lens.long())
    odd = torch.zeros(2 * 513, dtype=torch.bfloat16).view(2, 513)[:, :512].view(2, 8, 64)
    assert "not aligned" in reason(q=odd)


def test_it_gets_steps_of_few_rows_that_compute_one_token_each() -> None:
    cpu = SimpleNamespace(name="cpu", torch=torch.device("cpu"), is_gpu=False)
    backend = TritonAttention(cpu, Processors(132, paged_decode_cuda.CAPABILITY))
    assert backend.native is None

    def shape(case: Paged) -> Shape:
        return shape_of(case.attn, case.kv.shape[2], case.kv.dtype)

    def fits(rows: list[tuple[int, int]], attn: Attn = SMALL) -> bool:
        options = {"block_size": 16, "dtype": torch.bfloat16, "index": torch.int32}
        case = paged(attn, rows, **options)
        given = case.q, case.kv, backend.plan(batch_of(case)), shape(case), attn, None
        return backend._choose_decode(*given) == backend._decode_few

    assert not fits([(5, 1)])
    backend.native = object()  # type: ignore[assignment]
    assert fits([(5, 1)]) and fits([(n, 1) for n in range(1, 9)])
    assert not fits([(n, 1) for n in range(1, 10)])
    assert not fits([(5, 1), (7, 2)])
    assert not fits([(5, 1)], replace(SMALL, head_dim=96))


@pytest.mark.parametrize(
    ("rows", "kv_heads", "cluster"), [(1, 8, 16), (2, 8, 16), (4, 8, 16), (8, 8, 8), (8, 32, 2)]
)
def test_a_cluster_is_as_large_as_the_gpu_has_place_for(
    rows: int, kv_heads: int, cluster: int
) -> None:
    assert paged_decode_cuda.tune(Shape(kv_heads, 4, 128), rows, 132).cluster == cluster


def test_nvcc_makes_a_library_of_it(tmp_path: Path) -> None:
    """Where there is no GPU it loads, and says that."""
    try:
        path = extension.shared_library(extension.CUDA, [tmp_path])
    except extension.NoCompiler as reason:
        pytest.skip(str(reason))
    if torch.cuda.is_available():
        assert isinstance(Native(str(path)), Native)
    else:
        with pytest.raises(OSError, match="cudaError(InsufficientDriver|NoDevice)"):
            Native(str(path))
