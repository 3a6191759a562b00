"""ChatGLM 2 and 3, and GLM-4 of the remote-code age (THUDM 2023 and 2024).

A Megatron-like block: packed `query_key_value` with `multi_query_group_num` key-value heads,
interleaved rotation of the first half of each head, packed SwiGLU, RMSNorm. `rope_ratio` multiplies
the rotary base of 10000. Config keys are those of THUDM/chatglm2-6b, chatglm3-6b, chatglm3-6b-32k
and glm-4-9b-chat; the further switches (`rmsnorm`, `post_layer_norm`, `add_bias_linear`,
`multi_query_attention`, `apply_residual_connection_post_layernorm`) act as in their published code.
`apply_query_key_layer_scaling` divides and multiplies by the same number and has no effect.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tests.models.references.drawing import Draw, Weights, inverse_frequencies
from tests.models.references.operations import (
    angles,
    attend,
    layer_norm,
    linear,
    rms_norm,
    rotate_pairs,
)

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 88,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": 256,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
GLM4: dict[str, Any] = {
    **CONFIG,
    "_name_or_path": "THUDM/glm-4-9b-chat",
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "layernorm_epsilon": 1.5625e-07,
    "num_hidden_layers": 3,
    "rope_ratio": 500,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "eos_token_id": [2, 3, 4],
    "pad_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm2": CONFIG,
    "chatglm3": {
        **CONFIG,
        "_name_or_path": "THUDM/chatglm3-6b",
        "transformers_version": "4.30.2",
        "pad_token_id": 0,
    },
    "chatglm3-32k": {**CONFIG, "_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50},
    "glm-4": GLM4,
    "glm-4 for generation": {**GLM4, "architectures": ["ChatGLMForConditionalGeneration"]},
    "chatglm with wide heads": {**CONFIG, "kv_channels": 24},
    "chatglm with LayerNorm": {**CONFIG, "rmsnorm": False},
    "chatglm with all biases": {**CONFIG, "add_bias_linear": True},
    "chatglm without biases": {**CONFIG, "add_qkv_bias": False},
    "chatglm without grouped heads": {**CONFIG, "multi_query_attention": False},
    "chatglm without a last norm": {**CONFIG, "post_layer_norm": False},
    "chatglm with normed residuals": {**CONFIG, "apply_residual_connection_post_layernorm": True},
}


def kv_heads(config: dict[str, Any]) -> int:
    grouped = config["multi_query_attention"]
    return config["multi_query_group_num"] if grouped else config["num_attention_heads"]


def weights(config: dict[str, Any], seed: int) -> Weights:
    """Names and shapes as published, with the one rotary buffer."""
    draw, hidden, ffn = Draw(seed), config["hidden_size"], config["ffn_hidden_size"]
    mixed = config["kv_channels"] * config["num_attention_heads"]
    packed = mixed + 2 * config["kv_channels"] * kv_heads(config)
    vocab, root = config["padded_vocab_size"], "transformer.encoder"
    tensors: Weights = {
        "transformer.embedding.word_embeddings.weight": draw.table(vocab, hidden),
        "transformer.rotary_pos_emb.inv_freq": inverse_frequencies(config["kv_channels"] // 2),
    }

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = draw.scale(hidden)
        if not config["rmsnorm"]:
            tensors[f"{name}.bias"] = draw.bias(hidden)

    def projection(name: str, out_features: int, in_features: int, *, bias: bool) -> None:
        tensors[f"{name}.weight"] = draw.matrix(out_features, in_features)
        if bias:
            tensors[f"{name}.bias"] = draw.bias(out_features)

    biases = config["add_bias_linear"]
    for i in range(config["num_layers"]):
        layer = f"{root}.layers.{i}"
        norm(f"{layer}.input_layernorm")
        qkv_bias = biases or config["add_qkv_bias"]
        projection(f"{layer}.self_attention.query_key_value", packed, hidden, bias=qkv_bias)
        projection(f"{layer}.self_attention.dense", hidden, mixed, bias=biases)
        norm(f"{layer}.post_attention_layernorm")
        projection(f"{layer}.mlp.dense_h_to_4h", 2 * ffn, hidden, bias=biases)
        projection(f"{layer}.mlp.dense_4h_to_h", hidden, ffn, bias=biases)
    if config["post_layer_norm"]:
        norm(f"{root}.final_layernorm")
    tensors["transformer.output_layer.weight"] = draw.matrix(vocab, hidden)
    return tensors


def unpack(packed: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k [T, K, D], v [T, K, D].

    Grouped heads lie q, k, v one after the other; without groups each head has its own q, k, v.
    """
    dim, count = config["kv_channels"], config["num_attention_heads"]
    if not config["multi_query_attention"]:
        q, k, v = packed.unflatten(-1, (count, 3, dim)).unbind(2)
        return q, k, v
    groups = config["multi_query_group_num"]
    q, k, v = packed.unflatten(-1, (count + 2 * groups, dim)).split([count, groups, groups], dim=1)
    return q, k, v


def forward(config: dict[str, Any], weights: Weights, input_ids: list[int]) -> Tensor:
    """Logits [T, vocab]; GLM report (Team GLM 2024), section 2, and the published configs."""
    eps, root = config["layernorm_epsilon"], "transformer.encoder"
    angle = angles(
        len(input_ids), config["kv_channels"] // 2, 10000.0 * config.get("rope_ratio", 1)
    )

    def norm(name: str, x: Tensor) -> Tensor:
        return (rms_norm if config["rmsnorm"] else layer_norm)(weights, name, x, eps)

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = unpack(linear(weights, f"{name}.query_key_value", x), config)
        mixed = attend(rotate_pairs(q, angle), rotate_pairs(k, angle), v)
        return linear(weights, f"{name}.dense", mixed)

    def mlp(name: str, x: Tensor) -> Tensor:
        gate, up = linear(weights, f"{name}.dense_h_to_4h", x).chunk(2, dim=-1)
        return linear(weights, f"{name}.dense_4h_to_h", F.silu(gate) * up)

    x = weights["transformer.embedding.word_embeddings.weight"][input_ids]
    for i in range(config["num_layers"]):
        layer = f"{root}.layers.{i}"
        for norm_name, part_name, part in (
            ("input_layernorm", "self_attention", attention),
            ("post_attention_layernorm", "mlp", mlp),
        ):
            normed = norm(f"{layer}.{norm_name}", x)
            residual = normed if config["apply_residual_connection_post_layernorm"] else x
            x = residual + part(f"{layer}.{part_name}", normed)
    if config["post_layer_norm"]:
        x = norm(f"{root}.final_layernorm", x)
    return linear(weights, "transformer.output_layer", x)
