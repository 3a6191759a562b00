"""Tiny random checkpoints of every family, written by transformers as real ones are.

All parameters are random, norms and biases too, so that a weight that is forgotten or misplaced
changes the logits.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": 11},
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 24},
    "gpt2": GPT2,
    "gpt_neo": {**COMMON, "num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]},
}


def config_of(family: str, **overrides: Any) -> Any:
    """A transformers config, tiny, with its class name in it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, COMMON), **overrides})
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    return config


def tiny_model(
    family: str, *, seed: int = 0, attention: str = "eager", **config_overrides: Any
) -> Any:
    """A transformers model in float32, in eval mode, its parameters random by `seed`.

    `attention`: which of transformers' implementations.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(family, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model = model.eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.06)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):  # a parameter that no gradient trains
                    buffer.copy_(torch.randn(buffer.shape) * 0.06)
    return model


def save(model: Any, directory: Path, max_shard_size: str = "5GB") -> None:
    """Write a transformers model as a checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and the hub library warn of their own code
        model.save_pretrained(directory, max_shard_size=max_shard_size)


def tiny_checkpoint(
    family: str,
    directory: Path,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write `tiny_model` into `directory`, and a byte-level tokenizer.json if asked; returns it."""
    model = tiny_model(family, seed=seed, **config_overrides)
    save(model, directory, max_shard_size)
    if tokenizer:
        write_tokenizer(directory, model.config.vocab_size)
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Byte-level tokens without merges: ids 0, 1, 2 are <pad>, <s>, </s>; then as many as fit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((special + letters)[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
