"""Sampling on a GPU: the same tokens as by sorting, on every path; a broken row fails alone."""

from __future__ import annotations

import pytest
import torch

from pagedserve.kernels import sample, sample_gpu
from pagedserve.kernels.sample_gpu import Needs, SamplerRows, SamplerScratch
from tests.kernels.sampling import check_logprobs, check_sampling, rows_for

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("vocab", (50, 1000, 32000, 128256, 151936, 262144))
@pytest.mark.parametrize("spread", (0.1, 1.0, 6.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_tokens_of_a_sort(vocab: int, spread: float, dtype: torch.dtype) -> None:
    """Sums of probabilities differ in their last bits, so one draw near an edge may."""
    differ = [
        check_sampling(GPU, vocab, spread=spread, dtype=dtype, processed=processed, masked=masked)
        for processed, masked in ((False, False), (True, False), (True, True))
    ]
    assert sum(differ) <= 1


def test_a_draw_is_that_of_the_keyed_race() -> None:
    n, vocab = 40, 5000
    rows = SamplerRows.on(torch.zeros((n, 4), dtype=torch.int64, device=GPU), biases=1, bans=1)
    rows.numbers[:, 0] = 1.0
    rows.seeds.random_(-(2**63), 2**63 - 1)
    logits = torch.randn(n, vocab, device=GPU)
    slots, positions = torch.arange(n, device=GPU), torch.randint(0, 1 << 20, (n,), device=GPU)
    scratch = SamplerScratch.on(GPU, n, vocab)
    got, _ = sample_gpu.sample(logits, slots, positions, rows, scratch, Needs(True, False, False))
    wanted = sample.race(logits.cpu(), rows.seeds.cpu(), positions.cpu())
    assert torch.equal(got.cpu(), wanted)


def test_a_row_that_is_not_finite_is_reported_and_the_others_are_drawn() -> None:
    vocab = 9000
    rows = rows_for(vocab, GPU, processed=False)
    logits = torch.randn(10, vocab, device=GPU)
    slots, positions = torch.arange(10, device=GPU), torch.full((10,), 5, device=GPU)
    scratch = SamplerScratch.on(GPU, 10, vocab)
    fine, _ = sample_gpu.sample(logits, slots, positions, rows, scratch, Needs())
    logits[1, 4000], logits[4, 10], logits[7] = torch.nan, torch.inf, -torch.inf
    got, finite = sample_gpu.sample(logits, slots, positions, rows, scratch, Needs())
    assert finite.tolist() == [i not in (1, 4, 7) for i in range(10)]
    assert torch.equal(got[finite], fine[finite])
    assert ((got >= 0) & (got < vocab)).all()


@pytest.mark.parametrize("vocab", (130, 9000, 151936))
@pytest.mark.parametrize("kind", ("spread", "rounded", "flat", "few"))
def test_logprobs(vocab: int, kind: str) -> None:
    check_logprobs(GPU, vocab, kind)
