"""Logits through the paged, chunked, batched path equal transformers' in float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedserve.device import pick
from pagedserve.kernels import cpu
from pagedserve.models.loading import load_model
from tests.checkpoints import tiny_checkpoint, tiny_model
from tests.models.paged import PagedRun

LENGTHS = (1, 7, 33, 50, 96)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped heads": ("llama", {"num_key_value_heads": 4}),
    "llama with rope llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama with rope linear": ("llama", {"rope_parameters": LINEAR}),
    "llama with its own head_dim": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "mistral with window 1": ("mistral", {"sliding_window": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with some windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2 with an idle window": ("qwen2", {"use_sliding_window": False, "sliding_window": 9}),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}


def sequences(vocab: int = 256) -> list[list[int]]:
    choice = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, (n,), generator=choice).tolist() for n in LENGTHS]


def truth(model: Any, tokens: list[int]) -> torch.Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # transformers' own
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.fixture(params=("our kernels", "torch"))
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way that the CPU has: the C++ kernels, where they can be compiled, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "load", lambda: None)
    elif cpu.load() is None:
        pytest.skip("no C++ kernels here")


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    loaded = load_model(tiny_checkpoint(family, tmp_path, **overrides), device=pick("cpu"))
    reference = tiny_model(family, **overrides)
    wanted = [truth(reference, tokens) for tokens in sequences()]
    for block_size, longest_chunk, seed in ((16, 40, 0), (5, 7, 1), (1, 96, 2)):
        run = PagedRun(loaded, block_size, seed=seed)
        for got, want in zip(
            run.prefill_and_decode(sequences(), longest_chunk), wanted, strict=True
        ):
            assert got.dtype == torch.float32
            assert (got - want).abs().max() / want.abs().max() <= 1e-5


@pytest.mark.parametrize("family, kept", [("llama", [0]), ("mixtral", [0]), ("gemma2", [0, 1])])
def test_an_excerpt_has_every_kind_of_layer_once(
    family: str, kept: list[int], tmp_path: Path
) -> None:
    directory = tiny_checkpoint(family, tmp_path, num_hidden_layers=4)
    decoder = load_model(directory, device=pick("cpu")).decoder
    excerpt = decoder.excerpt()
    assert len(decoder.blocks) == 4
    places = [id(block) for block in decoder.blocks]
    assert [places.index(id(block)) for block in excerpt.blocks] == kept
    assert excerpt.embedding is decoder.embedding and excerpt.head is decoder.head
