"""Angles against transformers' own rotary embeddings, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pagedserve.errors import StartupError
from pagedserve.kernels import reference
from pagedserve.layers.rotary import Rotary
from pagedserve.spec import Rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "scaling", ({"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3)
)
def test_angles_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    positions = torch.tensor([0, 1, 17, 5000, 100_003])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    plain = scaling["rope_type"] == "default"
    rope = Rope(theta=500000.0, dim=64, scaling={} if plain else scaling)
    angles = Rotary(rope, reference, torch.device("cpu"), 131072).angles(positions, torch.float32)
    half = torch.cat((-torch.ones(32), torch.ones(32)))
    torch.testing.assert_close(angles.cos[:, 0], cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles.sin[:, 0] * half, sin[0], rtol=0, atol=1e-6)


def test_an_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(StartupError, match="'ntk'.*default, linear"):
        Rotary(Rope(1e4, 8, {"rope_type": "ntk"}), reference, torch.device("cpu"), 8)
