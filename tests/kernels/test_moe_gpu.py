"""Mixture of experts on a GPU: every size of block, few tokens and many."""

from __future__ import annotations

from dataclasses import replace

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

pytestmark = pytest.mark.gpu

BFLOAT = Place(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice rounded: what lies between the two products is bfloat16."""
    monkeypatch.setattr("tests.kernels.fused.TOLERANCE", {torch.bfloat16: 8e-3})


@pytest.mark.parametrize("tokens", (1, 200))
@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str, tokens: int) -> None:
    spec = ROUTINGS[name]
    check_routing(spec, tokens, BFLOAT.device)
    check_routing(
        replace(spec, experts=spec.experts * 16, top_k=spec.top_k * 2), tokens, BFLOAT.device
    )


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_row_that_is_not_finite_chooses_experts_that_exist(name: str) -> None:
    check_lost_rows(ROUTINGS[name], BFLOAT.device)


@pytest.mark.parametrize("tokens", (1, 3, 20, 100, 300, 2000))
def test_experts(tokens: int) -> None:
    check_experts(BFLOAT, Sizes(tokens, 32, 4, 256, 512))
    check_experts(BFLOAT, Sizes(tokens, 20, 3, 200, 328), act="clamped_silu", bias=True)
    check_experts(BFLOAT, Sizes(tokens, 16, 1, 128, 256), on_input=True)


def test_a_mixture_in_a_graph_serves_any_choice() -> None:
    place = BFLOAT
    up, down = place.random(16, 512, 256, scale=0.06), place.random(16, 256, 256, scale=0.06)
    ours, how = moe.GpuExperts.of(up, down), moe.Routing(2)
    x, logits = place.random(64, 256), torch.randn(64, 16, device=place.device)
    wanted = ours.mixture(x, logits, how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours.mixture(x, logits, how)
    graph.replay()
    assert torch.equal(got, wanted)
    for _ in range(20):
        logits.normal_()
        logits[:, ::3] = -10.0
        wanted = ours.mixture(x, logits, how)
        graph.replay()
        assert torch.equal(got, wanted)
