"""References whose family is Qwen 2 or Qwen 2 MoE under other names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.models.references import REFERENCES, Reference
from tests.models.references.drawing import Weights, inverse_frequencies
from tests.models.references.twins import (
    assert_equal,
    drawn,
    llama_fields,
    loaded,
    logits,
    renamed,
    tokens,
    twin,
)

QWEN_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.": "model.layers.",
    "transformer.ln_f": "model.norm",
    ".ln_1": ".input_layernorm",
    ".ln_2": ".post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def qwen_as_llama(reference: Reference) -> Weights:
    tensors: Weights = {}
    for name, tensor in renamed(drawn(reference), QWEN_NAMES).items():
        if "c_attn" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            tensors[name] = tensor
    return tensors


def qwen_fields(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    theirs = {
        **config,
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config["rotary_emb_base"],
    }
    return llama_fields(theirs, **more)


@pytest.mark.parametrize("name", ["qwen", "qwen-72b"])
def test_qwen_within_its_length_is_qwen2(name: str) -> None:
    reference = REFERENCES[name]
    model = twin("qwen2", qwen_fields(reference.config), qwen_as_llama(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_qwen_with_biases_is_llama_with_biases() -> None:
    reference = REFERENCES["qwen with biases"]
    fields = qwen_fields(reference.config, attention_bias=True, mlp_bias=True)
    model = twin("llama", fields, qwen_as_llama(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_qwen_partly_rotary_is_llama_partly_still() -> None:
    """Frequencies 0 leave the rest of a head alone, once dims are paired as llama pairs them."""
    reference = REFERENCES["qwen partly rotary"]
    model = twin("qwen2", qwen_fields(reference.config), reorder_partial(qwen_as_llama(reference)))
    model.model.rotary_emb.inv_freq = torch.cat([inverse_frequencies(8), torch.zeros(4)])
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def reorder_partial(tensors: Weights, dim: int = 16) -> Weights:
    """Qwen rotates dims 0..3 with 4..7, llama with 8..11: swap the inner quarters."""
    order = [*range(0, 4), *range(8, 12), *range(4, 8), *range(12, 16)]
    return {
        name: tensor.unflatten(0, (-1, dim))[:, order].flatten(0, 1)
        if ".q_proj" in name or ".k_proj" in name
        else tensor
        for name, tensor in tensors.items()
    }


def log_n_attention(
    module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention after a factor for every query past position 16."""
    place = torch.arange(1, query.shape[2] + 1).float()
    factor = (place.log() / math.log(16)).clamp(min=1.0)
    return sdpa_attention_forward(module, query * factor[:, None], *args, **kwargs)


AttentionInterface.register("log_n", log_n_attention)


@pytest.mark.parametrize(
    ("name", "length", "alpha", "attention"),
    [
        ("qwen past its length, log-n", 41, 1, "log_n"),
        ("qwen past its length, ntk", 16, 1, "eager"),
        ("qwen past its length, ntk", 17, 3, "eager"),
        ("qwen past its length, ntk", 32, 3, "eager"),
        ("qwen past its length, ntk", 41, 7, "eager"),
        ("qwen past its length, ntk", 70, 15, "eager"),
        ("qwen past its length", 41, 7, "log_n"),
    ],
)
def test_qwen_past_its_length_stretches_base_and_query(
    name: str, length: int, alpha: int, attention: str
) -> None:
    reference = REFERENCES[name]
    fields = qwen_fields({**reference.config, "rotary_emb_base": 10000.0 * alpha ** (16 / 14)})
    model = twin("qwen2", fields, qwen_as_llama(reference), attention=attention)
    ids = tokens(reference, length)
    future = torch.full((1, 1, length, length), -torch.inf).triu(1)
    assert_equal(reference.logits(ids), logits(model, ids, attention_mask=future))


def test_qwen_keeps_the_base_of_its_prompt_while_it_decodes() -> None:
    reference = REFERENCES["qwen past its length, ntk"]
    ids, tensors = tokens(reference), drawn(reference)
    kept = reference.forward(reference.config, tensors, ids, prompt_length=16)  # type: ignore[call-arg]
    plain = {**reference.config, "use_dynamic_ntk": False}
    assert_equal(kept, reference.forward(plain, tensors, ids))


def as_qwen2_moe(tensors: Weights, sparse: list[int], hidden: int) -> Weights:
    """Shared experts are gated there: a gate of zeros halves them, so they are doubled first.

    Where there are none, some of width 8 add nothing.
    """
    out = {}
    for key, tensor in tensors.items():
        key = key.replace("shared_experts", "shared_expert")
        out[key] = tensor * 2 if "shared_expert.down_proj" in key else tensor
    for layer in sparse:
        mlp = f"model.layers.{layer}.mlp"
        out[f"{mlp}.shared_expert_gate.weight"] = torch.zeros(1, hidden)
        for part, shape in {"gate": (8, hidden), "up": (8, hidden), "down": (hidden, 8)}.items():
            out.setdefault(f"{mlp}.shared_expert.{part}_proj.weight", torch.zeros(shape))
    return out


@pytest.mark.parametrize("name", [name for name in REFERENCES if "deepseek-moe" in name])
def test_deepseek_moe_is_qwen2_moe_with_shared_experts_ungated(name: str, tmp_path: Path) -> None:
    reference = REFERENCES[name]
    config = reference.config
    sparse = [2] if config["moe_layer_freq"] == 2 else [1, 2, 3]
    fields = llama_fields(
        config,
        mlp_only_layers=[layer for layer in range(4) if layer not in sparse],
        moe_intermediate_size=24,
        norm_topk_prob=config["norm_topk_prob"],
        num_experts=7,
        num_experts_per_tok=3,
        qkv_bias=False,
        shared_expert_intermediate_size=48 if config["n_shared_experts"] else 8,
    )
    tensors = as_qwen2_moe(drawn(reference), sparse, config["hidden_size"])
    model = loaded("qwen2_moe", fields, tensors, tmp_path)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


BAILING_NAMES = {
    "model.word_embeddings": "model.embed_tokens",
    "attention.dense": "self_attn.o_proj",
}


@pytest.mark.parametrize("name", [name for name in REFERENCES if "bailing-moe" in name])
def test_bailing_moe_is_qwen2_moe_with_shared_experts_ungated(name: str, tmp_path: Path) -> None:
    reference = REFERENCES[name]
    config = reference.config
    tensors: Weights = {}
    for key, tensor in renamed(drawn(reference), BAILING_NAMES).items():
        if "query_key_value" in key:
            for part, rows in zip("qkv", tensor.split([64, 32, 32]), strict=True):
                new = key.replace("attention.query_key_value", f"self_attn.{part}_proj")
                tensors[new] = rows
        else:
            tensors[key] = tensor
    if config["norm_head"]:
        tensors["lm_head.weight"] = nn.functional.normalize(tensors["lm_head.weight"], dim=0)
    dense = list(range(config["first_k_dense_replace"]))
    fields = llama_fields(
        config,
        mlp_only_layers=dense,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        num_experts=7,
        num_experts_per_tok=3,
        qkv_bias=config["use_qkv_bias"],
        shared_expert_intermediate_size=48,
    )
    sparse = [layer for layer in range(3) if layer not in dense]
    tensors = as_qwen2_moe(tensors, sparse, config["hidden_size"])
    model = loaded("qwen2_moe", fields, tensors, tmp_path)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))
