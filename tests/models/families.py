"""Every native family as a tiny random checkpoint, and who says what its logits should be.

A case is a transformers model type with what makes its tiny config. Lengths are odd, heads grouped,
windows short, so that a wrong order, a missing head or a window off by one moves the logits.
"""

from __future__ import annotations

from tests.models.case import Case
from tests.models.families_dense import CASES_DENSE
from tests.models.families_gpt import CASES_GPT
from tests.models.families_moe import CASES_MOE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES_BASE: dict[str, Case] = {
    "llama": Case("llama"),
    "llama tied": Case("llama", {"tie_word_embeddings": True}),
    "llama with rope llama3": Case("llama", {"rope_parameters": LLAMA3}),
    "mistral": Case("mistral", {"sliding_window": 11}),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3", {"head_dim": 24}),
    "gpt2": Case("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gemma": Case("gemma", {"head_dim": 16}),
    "gemma2": Case("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gemma3": Case("gemma3_text", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}),
}
CASES: dict[str, Case] = {**CASES_BASE, **CASES_DENSE, **CASES_GPT, **CASES_MOE}
