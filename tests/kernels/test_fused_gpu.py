"""Products and the ops around them on a GPU, in bfloat16 and float16, alone and in a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pagedserve.kernels import dispatch, gpu, launch, tuning
from pagedserve.kernels.activation import GATED
from pagedserve.kernels.dispatch import Choice, Gemv, Library, Product, Skinny, SplitK
from pagedserve.kernels.gpu_matrix import GpuMatrix
from pagedserve.kernels.matrix import RmsWeight
from pagedserve.kernels.norm import add_rms_norm
from pagedserve.kernels.split_k import Scratch
from tests.kernels.fused import (
    EPS,
    Heads,
    Place,
    assert_close,
    check_angles,
    check_embed,
    check_gate,
    check_heads,
    check_norms,
    check_rotary,
    product_inputs,
    product_meaning,
    settle,
)

pytestmark = pytest.mark.gpu

BFLOAT = Place(torch.device("cuda", 0), torch.bfloat16)
HALF = Place(torch.device("cuda", 0), torch.float16)


def table(found: dict[str, Choice] | None = None) -> dispatch.Table:
    return dispatch.Table(launch.processors(0), launch.capability(0), found or {})


def check_product(
    place: Place,
    rows: int,
    size: int,
    columns: int,
    choice: Choice | None = None,
    **around_it: object,
) -> None:
    fused = {"norm": False, "bias": False, "gated": None, "residual": False} | around_it
    x, weight, around = product_inputs(place, rows, size, columns, **fused)  # type: ignore[arg-type]
    product = Product(launch.power_of_2(rows), size, columns, fused["gated"] is not None)
    scratch = Scratch.on(place.device)
    scratch.part.fill_(float("nan"))
    matrix = GpuMatrix(weight, scratch, table({product.key: choice} if choice else None))
    settle(place)
    wanted = product_meaning(x, weight, around)  # before: the residual may be written over
    got = matrix.fused(x, **around)
    if isinstance(matrix.choose(rows, fused["gated"] is not None), Library):
        # Rounded thrice: what the norm gives, the product, and what comes behind it.
        assert_close(got, wanted, times=2)
    else:
        assert_close(got, wanted)
    assert not scratch.count.any()


@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 8, 17, 32, 33, 64, 65, 200))
@pytest.mark.parametrize(("size", "columns"), ((4096, 1024), (1000, 3072), (127, 72)))
def test_a_product_by_the_rules(rows: int, size: int, columns: int) -> None:
    check_product(BFLOAT, rows, size, columns)
    check_product(BFLOAT, rows, size, columns, norm=True, bias=True, residual=True)
    check_product(BFLOAT, rows, size, columns, norm=True, gated="silu")


@pytest.mark.parametrize("rows", (1, 4, 16))
def test_a_product_in_half_precision(rows: int) -> None:
    check_product(HALF, rows, 640, 1024, norm=True, bias=True, gated="gelu_tanh")


@pytest.mark.parametrize("choice", (Gemv(1, 1024, 4), Gemv(4, 512, 2), Gemv(2, 2048, 4)), ids=str)
def test_blocks_of_a_gemv(choice: Choice) -> None:
    check_product(BFLOAT, 1, 1023, 4104, choice, norm=True, gated="silu", residual=True)


@pytest.mark.parametrize("rows", (1, 7, 8, 13, 32))
@pytest.mark.parametrize(
    "choice",
    (Skinny(), Skinny(16, 128, 4, 2), Skinny(32, 64, 4, 3), Skinny(16, 64, 16, 1)),
    ids=str,
)
def test_lines_of_a_skinny_product(choice: Choice, rows: int) -> None:
    check_product(BFLOAT, rows, 1023, 4104, choice, norm=True, gated="silu", residual=True)
    check_product(BFLOAT, rows, 200, 3072, choice, norm=True, bias=True, residual=True)
    check_product(HALF, rows, 77, 1000, choice, bias=True, residual=True)


@pytest.mark.parametrize("rows", (5, 16, 31, 64))
@pytest.mark.parametrize(
    "choice",
    (
        SplitK(1, num_stages=4),
        SplitK(3, early=True, num_stages=3),
        SplitK(2, 32, num_stages=3),
        SplitK(16, num_stages=3),
    ),
    ids=str,
)
def test_shares_of_a_product(choice: Choice, rows: int) -> None:
    check_product(BFLOAT, rows, 200, 4104, choice, bias=True, residual=True)
    check_product(BFLOAT, rows, 1024, 2048, choice, gated="silu")


def test_tuning_finds_a_kernel_and_keeps_it(tmp_path: Path) -> None:
    products = [Product(1, 256, 512), Product(16, 256, 512, True)]
    found = tuning.measure(products, BFLOAT.device, tmp_path)
    kept = gpu.GpuKernels.on(BFLOAT.device, tmp_path).table
    assert kept.findings == found.findings and set(found.findings) == {p.key for p in products}


def test_the_same_product_has_the_same_bits() -> None:
    x, weight, around = product_inputs(
        BFLOAT, 16, 512, 4096, norm=False, bias=False, gated=None, residual=False
    )
    found: dict[str, Choice] = {Product(16, 512, 4096).key: SplitK(7)}
    matrix = GpuMatrix(weight, Scratch.on(BFLOAT.device), table(found))
    first = matrix.fused(x, **around)
    for _ in range(50):
        assert torch.equal(matrix.fused(x, **around), first)


def test_a_chain_in_a_graph_is_what_it_is_without_dependent_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kernel starts before the one that feeds it is done: a missing wait would show."""
    hidden, size = 1024, 3072
    scratch = Scratch.on(BFLOAT.device)
    layers = [
        [
            GpuMatrix(BFLOAT.random(*shape, scale=0.03), scratch, table())
            for shape in ((hidden, hidden), (2 * size, hidden), (hidden, size))
        ]
        for _ in range(6)
    ]
    norm = RmsWeight(BFLOAT.random(hidden), EPS)

    def chain(x: Tensor) -> Tensor:
        for out, up, down in layers:
            x = out.fused(x, norm=norm, residual=x)
            y, x = add_rms_norm(x, x, norm.weight, EPS)
            x = down.fused(up.fused(y, gated="silu"), residual=x)
        return x

    for rows in (1, 4, 16):
        x = BFLOAT.random(rows, hidden)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "capability", lambda index: 80)
            wanted = chain(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        chain(x)
        with torch.cuda.graph(graph):
            got = chain(x)
        for _ in range(200):
            got.fill_(float("nan"))
            graph.replay()
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("rows", (1, 3, 500))
@pytest.mark.parametrize("size", (128, 1000, 4096, 12288))
def test_norms(rows: int, size: int) -> None:
    check_norms(BFLOAT, rows, size)
    check_norms(Place(BFLOAT.device, torch.float32), rows, size)


@pytest.mark.parametrize("act", GATED)
def test_gates(act: str) -> None:
    check_gate(BFLOAT, act, 3, 1500)
    check_gate(HALF, act, 300, 2048)


@pytest.mark.parametrize(("tokens", "size"), ((1, 1024), (300, 4096), (7, 1001)))
def test_embedding(tokens: int, size: int) -> None:
    check_embed(BFLOAT, tokens, size)


@pytest.mark.parametrize(("tokens", "rotated"), ((1, 128), (8, 32), (700, 64)))
def test_angles(tokens: int, rotated: int) -> None:
    check_angles(BFLOAT, tokens, rotated, 1.0)
    check_angles(Place(BFLOAT.device, torch.float32), tokens, rotated, 0.7)


@pytest.mark.parametrize(("dim", "rotated"), ((128, 128), (80, 32), (64, 64)))
def test_rotary(dim: int, rotated: int) -> None:
    check_rotary(BFLOAT, 40, dim, rotated)


@pytest.mark.parametrize("tokens", (1, 33, 700))
@pytest.mark.parametrize(
    "case",
    (
        Heads(32, 8, 128, 128),
        Heads(16, 8, 128, 128, norm=True),
        Heads(28, 4, 128, 64, norm=True, norm_after=True),
        Heads(10, 10, 80, 32),
        Heads(71, 1, 64, 64),
        Heads(8, 4, 256, 256, norm=True),
        Heads(8, 2, 96, 0, norm=True),
    ),
    ids=str,
)
def test_heads_are_normed_turned_and_cached(case: Heads, tokens: int) -> None:
    check_heads(BFLOAT, case, tokens, torch.int64)
    check_heads(HALF, case, tokens, torch.int32)
