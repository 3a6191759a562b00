"""Sampling in Triton's interpreter: the same tokens as by sorting, every path small enough."""

from __future__ import annotations

import pytest
import torch

from pagedserve.kernels import logprobs_gpu, sample, sample_gpu
from pagedserve.kernels.sample_gpu import SamplerRows, SamplerScratch
from tests.kernels.sampling import check_logprobs, check_sampling

# The interpreter is numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
SMALL = {"TILE": 64, "GROUP": 8, "CANDIDATES": 32, "GATHERED": 2, "PAIRS": 4}
SCANNED = {"SCAN": 32, "SCANS": 4}
SMALLER = {"MOST_GROUPS": 16, "FEW_GROUPS": 2, "NUCLEUS_GROUPS": 8, "SEEN": 16, "SPARSE": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few dozen tokens are many tiles and groups, and more candidates than there is room for."""
    for name, value in (SMALL | SCANNED).items():
        monkeypatch.setattr(sample_gpu, name, value)
        monkeypatch.setattr(logprobs_gpu, name, value)
    for name, value in SMALLER.items():
        monkeypatch.setattr(sample_gpu, name, value)


@pytest.mark.parametrize(("vocab", "spread"), ((7, 3.0), (64, 0.1), (130, 0.1), (130, 3.0)))
def test_the_tokens_of_a_sort(vocab: int, spread: float) -> None:
    assert check_sampling(CPU, vocab, spread=spread, dtype=torch.float32, processed=False) == 0


def test_ties_go_to_the_lower_token() -> None:
    assert check_sampling(CPU, 200, spread=1.0, dtype=torch.bfloat16, processed=False) == 0


def test_the_highest_is_drawn_from_where_min_p_leaves_nothing_else() -> None:
    """Of more equal logits than are gathered: products with 1 / temperature lie below quotients."""
    rows = SamplerRows.on(torch.zeros(2, 9, dtype=torch.int64), biases=1, bans=1)
    scratch = SamplerScratch.on(CPU, 2, 130)
    places = torch.tensor([5, 6])
    for temperature, logit in ((0.3, -3.3), (1.1, 0.1), (0.7, 1.7), (1.3, 5.7)):
        rows.numbers[:, :3] = torch.tensor([temperature, 1.0, 1.0])
        logits = torch.full((2, 130), logit)
        needs = sample_gpu.Needs(processed=False)
        drawn, _ = sample_gpu.sample(logits, torch.tensor([0, 1]), places, rows, scratch, needs)
        wanted = sample.race(logits / temperature, rows.seeds[:2], places)
        assert drawn.tolist() == wanted.tolist()


@pytest.mark.parametrize("masked", (False, True))
def test_penalties_masks_biases_and_bans(masked: bool) -> None:
    how = {"spread": 2.0, "dtype": torch.float32, "processed": True, "masked": masked}
    assert check_sampling(CPU, 150, **how) == 0


@pytest.mark.parametrize("kind", ("spread", "rounded", "flat", "few"))
def test_logprobs(kind: str) -> None:
    check_logprobs(CPU, 130, kind)


def test_logprobs_of_fewer_tokens_than_are_wanted() -> None:
    check_logprobs(CPU, 7, "spread")
