"""What the skinny product computes, its kernel run as Python; on a GPU: test_fused_gpu.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pagedserve.kernels import launch, skinny
from pagedserve.kernels.activation import GATED
from tests.kernels import gluon_in_torch
from tests.kernels.fused import (
    EPS,
    Place,
    assert_close,
    product_inputs,
    product_meaning,
)

HERE = Place(torch.device("cpu"), torch.float32)
LINES = 16


def product(
    x: Tensor,
    weight: Tensor,
    around: dict[str, object],
    *,
    block_k: int = 16,
    num_warps: int = 2,
    ahead: int = 2,
) -> Tensor:
    """`skinny.skinny` without a GPU."""
    gated = around["gated"] is not None
    rows, columns = x.shape
    size = len(weight) // 2 if gated else len(weight)
    y = torch.full((rows, size), float("nan"))
    norm, residual = around["norm"], around["residual"]
    programs = -(-size // (LINES // 2 if gated else LINES))
    gluon_in_torch.launch(skinny, "skinny_kernel", programs, num_warps)(
        x,
        weight,
        y,
        around["bias"],
        residual,
        None if norm is None else norm.weight,
        rows,
        size,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        EPS,
        7.0,
        K=columns,
        BM=max(skinny.MIN_BM, launch.power_of_2(rows)),
        LINES=LINES,
        BK=block_k,
        AHEAD=ahead,
        GATED=gated,
        ACT=around["gated"],
        PDL=False,
    )
    return y


FUSED = list(itertools.product((False, True), (False, True), (None, "silu"), (False, True)))


@pytest.mark.parametrize("rows", (1, 3, 8, 17, 32))
@pytest.mark.parametrize(("size", "columns"), ((5, 40), (16, 64), (41, 200)))
def test_a_product_with_all_that_stands_around_it(rows: int, size: int, columns: int) -> None:
    for norm, bias, gated, residual in FUSED:
        x, weight, around = product_inputs(
            HERE, rows, size, columns, norm=norm, bias=bias, gated=gated, residual=residual
        )
        assert_close(product(x, weight, around), product_meaning(x, weight, around))


@pytest.mark.parametrize("act", GATED)
def test_every_gate(act: str) -> None:
    x, weight, around = product_inputs(
        HERE, 2, 9, 48, norm=True, bias=True, gated=act, residual=False
    )
    assert_close(product(x, weight, around), product_meaning(x, weight, around | {"limit": 7.0}))


@pytest.mark.parametrize("ahead", (1, 3, 5))
def test_blocks_come_in_turn_however_many_are_ahead(ahead: int) -> None:
    x, weight, around = product_inputs(
        HERE, 4, 20, 152, norm=True, bias=False, gated=None, residual=True
    )
    wanted = product_meaning(x, weight, around)
    assert_close(product(x, weight, around, num_warps=1, block_k=32, ahead=ahead), wanted)
