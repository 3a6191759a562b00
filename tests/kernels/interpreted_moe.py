"""Mixture of experts in Triton's interpreter: all routings, alone and in buckets."""

from __future__ import annotations

import pytest
import torch

from pagedserve.kernels import moe
from tests.kernels.fused import Place
from tests.kernels.mixtures import (
    ROUTINGS,
    Sizes,
    check_experts,
    check_lost_rows,
    check_routing,
)

# The interpreter is numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HERE = Place(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str) -> None:
    check_routing(ROUTINGS[name], 4, HERE.device)


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_row_that_is_not_finite_chooses_experts_that_exist(name: str) -> None:
    check_lost_rows(ROUTINGS[name], HERE.device)


@pytest.mark.parametrize("alone", (True, False))
def test_experts(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "by_itself", lambda tokens, top_k, experts: alone)
    monkeypatch.setattr(moe, "blocks_for", lambda *_: moe.Blocks(2, 8, 16, 1, 2, 2))
    check_experts(HERE, Sizes(4, 5, 2, 9, 20))
    check_experts(HERE, Sizes(3, 4, 3, 8, 16), act="clamped_silu", bias=True, on_input=True)
