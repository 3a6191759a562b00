"""The KV cache tensor: its shape, and a size that no machine has."""

from __future__ import annotations

import pytest
import torch

from pagedserve.errors import StartupError
from pagedserve.spec import Attn, DecoderSpec, Layer, Mlp, Norm
from pagedserve.worker import kv_cache

LAYER = Layer(Attn(heads=4, kv_heads=2, head_dim=8, scale=1.0), Mlp(8))
SPEC = DecoderSpec(
    hidden_size=32, vocab_size=8, max_positions=8, layers=(LAYER,) * 3, norm=Norm(), names={}
)
CPU = torch.device("cpu")


def test_each_layer_sees_its_blocks_of_one_tensor_of_zeros() -> None:
    layers = kv_cache.allocate(SPEC, 5, 16, torch.float32, CPU)
    assert [tuple(layer.shape) for layer in layers] == [(5, 2, 16, 2, 8)] * 3
    assert not any(layer.any() for layer in layers)
    assert len({layer.untyped_storage().data_ptr() for layer in layers}) == 1


@pytest.mark.parametrize(
    ("num_blocks", "device"),
    [(10**10, CPU), (10**15, CPU), (10**30, CPU), (10**30, torch.device("meta"))],
)
def test_more_memory_than_there_is_says_how_much_was_asked_for(
    num_blocks: int, device: torch.device
) -> None:
    with pytest.raises(StartupError, match=rf"{num_blocks} blocks, [0-9.e+]+ GiB on {device}"):
        kv_cache.allocate(SPEC, num_blocks, 16, torch.float32, device)
