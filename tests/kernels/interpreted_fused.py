"""Products and the ops around them, in Triton's interpreter: tiny, odd, strided."""

from __future__ import annotations

import itertools

import pytest
import torch

from pagedserve.kernels.activation import GATED
from pagedserve.kernels.gemv import gemv
from pagedserve.kernels.split_k import Scratch, split_k
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
)

HERE = Place(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("size", (1, 7, 96, 130))
def test_norms(size: int) -> None:
    check_norms(HERE, 3, size)


def test_many_short_rows_are_normalised_several_a_program() -> None:
    check_norms(HERE, 67, 24)


@pytest.mark.parametrize("act", GATED)
def test_gates(act: str) -> None:
    check_gate(HERE, act, 2, 37)


@pytest.mark.parametrize(("tokens", "size"), ((1, 40), (5, 1030)))
def test_embedding(tokens: int, size: int) -> None:
    check_embed(HERE, tokens, size)


@pytest.mark.parametrize(("tokens", "rotated"), ((1, 16), (9, 6), (33, 64)))
def test_angles(tokens: int, rotated: int) -> None:
    check_angles(HERE, tokens, rotated, 1.25)


@pytest.mark.parametrize(("dim", "rotated"), ((16, 16), (10, 6)))
def test_rotary(dim: int, rotated: int) -> None:
    check_rotary(HERE, 9, dim, rotated)


@pytest.mark.parametrize(
    "case",
    (
        Heads(3, 1, 16, 16),
        Heads(4, 2, 10, 6, norm=True),
        Heads(4, 2, 16, 8, norm=True, norm_after=True),
        Heads(2, 2, 8, 0, norm=True),
        Heads(5, 1, 8, 0),
    ),
    ids=str,
)
def test_heads_are_normed_turned_and_cached(case: Heads) -> None:
    check_heads(HERE, case, 6, torch.int64)
    check_heads(HERE, case, 1, torch.int32)


FUSED = list(itertools.product((False, True), (False, True), (None, "silu"), (False, True)))


@pytest.mark.parametrize(("size", "columns"), ((5, 40), (8, 64), (7, 12)))
def test_a_gemv_with_all_that_stands_around_it(size: int, columns: int) -> None:
    for norm, bias, gated, residual in FUSED:
        x, weight, around = product_inputs(
            HERE, 1, size, columns, norm=norm, bias=bias, gated=gated, residual=residual
        )
        wanted = product_meaning(x, weight, around)
        got = gemv(
            x,
            weight,
            bias=around["bias"],
            norm=around["norm"].weight if norm else None,
            eps=EPS,
            act=gated,
            gated=gated is not None,
            residual=around["residual"],
            block_k=16,
            num_warps=1,
        )
        assert_close(got, wanted)


def test_a_long_gemv_is_a_loop() -> None:
    x, weight, around = product_inputs(
        HERE, 1, 3, 165, norm=True, bias=False, gated="gelu_tanh", residual=False
    )
    wanted = product_meaning(x, weight, around)
    norm = around["norm"].weight
    got = gemv(x, weight, norm=norm, eps=EPS, act="gelu_tanh", gated=True, block_k=16, num_warps=1)
    assert_close(got, wanted)


@pytest.mark.parametrize("parts", (1, 2, 3))
@pytest.mark.parametrize(("rows", "size", "columns"), ((5, 7, 100), (17, 8, 96)))
def test_a_product_whose_columns_are_shared_out(
    parts: int, rows: int, size: int, columns: int
) -> None:
    scratch = Scratch.on(HERE.device)
    scratch.part.fill_(float("nan"))
    for _, bias, gated, residual in FUSED[: len(FUSED) // 2]:
        x, weight, around = product_inputs(
            HERE, rows, size, columns, norm=False, bias=bias, gated=gated, residual=residual
        )
        wanted = product_meaning(x, weight, around)
        got = split_k(
            x,
            weight,
            scratch,
            bias=around["bias"],
            act=gated,
            gated=gated is not None,
            residual=around["residual"],
            parts=parts,
            block_n=4,
            block_k=16,
        )
        assert_close(got, wanted)
        assert not scratch.count.any()
