"""References whose family is Glm or StableLM under other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.references import REFERENCES, Reference
from tests.models.references.drawing import Weights
from tests.models.references.twins import (
    assert_equal,
    drawn,
    llama_fields,
    logits,
    renamed,
    tokens,
    twin,
)

GLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def chatglm_as_glm(reference: Reference) -> Weights:
    config = reference.config
    dim, heads = config["kv_channels"], config["num_attention_heads"]
    tensors: Weights = {}
    for name, tensor in renamed(drawn(reference), GLM_NAMES).items():
        if "query_key_value" not in name:
            tensors[name] = tensor
            continue
        if config["multi_query_attention"]:
            groups = config["multi_query_group_num"]
            parts = tensor.split([heads * dim, groups * dim, groups * dim])
        else:
            blocks = tensor.split(dim)
            parts = tuple(torch.cat(blocks[i::3]) for i in range(3))
        for part, rows in zip("qkv", parts, strict=True):
            tensors[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
    return tensors


class OntoItsNorm(nn.Module):
    """What makes x + self(x) the MLP of the normed x plus the normed x itself."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.mlp(normed) + normed - x


def norm_residuals(model: Any) -> None:
    """After loading: both residuals of each layer start from the normed states."""
    for layer in model.model.layers:
        first = layer.input_layernorm

        def norm_first(_: nn.Module, args: tuple[Tensor, ...], norm: nn.Module = first) -> Any:
            return (norm(args[0]), *args[1:])

        layer.register_forward_pre_hook(norm_first)
        layer.input_layernorm = nn.Identity()
        layer.mlp = OntoItsNorm(layer.post_attention_layernorm, layer.mlp)
        layer.post_attention_layernorm = nn.Identity()


def exchange_glm_modules(model: Any, config: dict[str, Any]) -> None:
    """Biases everywhere, LayerNorm for RMSNorm, no last norm: each where the config asks for it."""
    if config["add_bias_linear"]:
        for layer in model.model.layers:
            for owner, name in (
                (layer.self_attn, "o_proj"),
                (layer.mlp, "gate_up_proj"),
                (layer.mlp, "down_proj"),
            ):
                old = getattr(owner, name)
                setattr(owner, name, nn.Linear(old.in_features, old.out_features))
    if not config["rmsnorm"]:
        for owner in (model.model, *model.model.layers):
            for name, _ in list(owner.named_children()):
                if "norm" in name:
                    norm = nn.LayerNorm(config["hidden_size"], eps=config["layernorm_epsilon"])
                    setattr(owner, name, norm)
    if not config["post_layer_norm"]:
        model.model.norm = nn.Identity()


@pytest.mark.parametrize(
    "name", [name for name in REFERENCES if "chatglm" in name or "glm-4" in name]
)
def test_chatglm_is_glm(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    grouped = config["multi_query_attention"]
    heads = config["num_attention_heads"]
    fields = {
        "attention_bias": config["add_qkv_bias"] or config["add_bias_linear"],
        "head_dim": config["kv_channels"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_hidden_layers": config["num_layers"],
        "num_key_value_heads": config["multi_query_group_num"] if grouped else heads,
        "pad_token_id": 0,
        "rms_norm_eps": config["layernorm_epsilon"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * config.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        "vocab_size": config["padded_vocab_size"],
    }
    model = twin("glm", fields)
    exchange_glm_modules(model, config)
    model.load_state_dict(chatglm_as_glm(reference))
    if config["apply_residual_connection_post_layernorm"]:
        norm_residuals(model)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


@pytest.mark.parametrize(
    "name", ["orion", "stablelm-epoch", "stablelm-epoch with q, k and v biases"]
)
def test_it_is_stablelm(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    fields = llama_fields(config, layer_norm_eps=1e-5, use_qkv_bias=config.get("use_qkv_bias"))
    fields["use_qkv_bias"] = config.get("use_qkv_bias", False)
    fields["rope_parameters"]["partial_rotary_factor"] = config.get("rope_pct", 1.0)
    fields.pop("rms_norm_eps", None)
    model = twin("stablelm", fields, drawn(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))
