"""`pagedserve tune`: which products of a model are measured; it says what it needs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pagedserve.cli import main
from pagedserve.commands.tune import gates_of
from pagedserve.kernels.dispatch import Product
from pagedserve.kernels.tuning import products
from pagedserve.spec import DecoderSpec, Layer, Mlp, Moe, Norm

SPEC = DecoderSpec(
    hidden_size=64,
    vocab_size=100,
    max_positions=128,
    layers=(Layer(None, Mlp(96)), Layer(None, Mlp(48, act="gelu", gated=False))),
    norm=Norm(),
    names={},
)


def test_a_gate_is_a_gated_feed_forward_s_first_matrix() -> None:
    assert gates_of(SimpleNamespace(spec=SPEC)) == {(192, 64)}  # type: ignore[arg-type]


def test_shared_experts_have_a_gate_and_an_activation_without_kernel_has_none() -> None:
    layers = (
        Layer(None, Moe(4, 2, 8, shared=Mlp(32))),
        Layer(None, Moe(4, 2, 8)),
        Layer(None, Mlp(16, act="xielu")),
    )
    spec = replace(SPEC, layers=layers)
    assert gates_of(SimpleNamespace(spec=spec)) == {(64, 64)}  # type: ignore[arg-type]


def test_every_matrix_is_measured_at_every_number_of_rows() -> None:
    found = products({(192, 64), (64, 96)}, {(192, 64)}, (1, 8))
    assert found == [
        Product(1, 64, 96),
        Product(8, 64, 96),
        Product(1, 96, 64, True),
        Product(8, 96, 64, True),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "anything"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
