"""References whose family is llama, renamed, unpacked, folded or with layers exchanged."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.models.references import REFERENCES, Reference
from tests.models.references.drawing import Weights
from tests.models.references.nemotron_nas import width
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


@pytest.mark.parametrize(
    "name", ["LLaMA", "aquila", "aquila2-34b", "internlm-7b", "internlm-20b", "xverse"]
)
def test_it_is_llama(name: str) -> None:
    reference = REFERENCES[name]
    fields = llama_fields(reference.config, attention_bias=reference.config.get("bias", False))
    model = twin("llama", fields, renamed(drawn(reference), {}))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


@pytest.mark.parametrize("name", ["internlm3", "internlm3 with biases"])
@pytest.mark.parametrize("trained", [512, 16])
def test_internlm3_is_transformers_own(name: str, trained: int) -> None:
    reference = REFERENCES[name]
    config = {**reference.config, "max_position_embeddings": trained}
    fields = llama_fields(config, head_dim=24, qkv_bias=config["qkv_bias"], bias=config["bias"])
    fields["rope_parameters"].update(rope_type="dynamic", factor=6.0)
    model = twin("internlm3", fields, renamed(drawn(reference), {}))
    ids = tokens(reference)
    assert_equal(reference.forward(config, drawn(reference), ids), logits(model, ids))


INTERNLM2_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output.": "lm_head.",
}


def internlm2_as_llama(reference: Reference) -> Weights:
    config = reference.config
    groups = config["num_key_value_heads"]
    dim = config["hidden_size"] // config["num_attention_heads"]
    tensors: Weights = {}
    for name, tensor in renamed(drawn(reference), INTERNLM2_NAMES).items():
        if "wqkv" not in name:
            tensors[name] = tensor
            continue
        rows = [group.split(dim) for group in tensor.chunk(groups)]
        parts = {
            "q": [block for group in rows for block in group[:-2]],
            "k": [group[-2] for group in rows],
            "v": [group[-1] for group in rows],
        }
        for part, blocks in parts.items():
            tensors[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = torch.cat(blocks)
    return tensors


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("internlm2", 512),
        ("internlm2 with biases", 512),
        ("internlm2.5-chat", 512),
        ("internlm2.5-chat", 16),
    ],
)
def test_internlm2_is_llama_with_grouped_packing(name: str, trained: int) -> None:
    reference = REFERENCES[name]
    config = {**reference.config, "max_position_embeddings": trained}
    fields = llama_fields(config, attention_bias=config["bias"])
    if config["rope_scaling"]:
        fields["rope_parameters"].update(rope_type="dynamic", factor=2.0)
    model = twin("llama", fields, internlm2_as_llama(reference))
    ids = tokens(reference)
    assert_equal(reference.forward(config, drawn(reference), ids), logits(model, ids))


TELECHAT2_NAMES = {
    "transformer.word_embeddings": "model.embed_tokens",
    "transformer.h.": "model.layers.",
    "transformer.ln_f": "model.norm",
    "self_attention.query": "self_attn.q_proj",
    "self_attention.dense": "self_attn.o_proj",
}


@pytest.mark.parametrize("name", ["telechat2", "telechat2 with grouped heads"])
def test_telechat2_is_llama_with_keys_and_values_by_head(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    tensors: Weights = {}
    for key, tensor in renamed(drawn(reference), TELECHAT2_NAMES).items():
        if "key_value" in key:
            blocks = tensor.split(16)
            for part, rows in (("k", blocks[::2]), ("v", blocks[1::2])):
                new = key.replace("self_attention.key_value", f"self_attn.{part}_proj")
                tensors[new] = torch.cat(rows)
        else:
            tensors[key] = tensor
    for key in [key for key in tensors if key.endswith("_proj.weight")]:  # biases it has not: 0
        tensors.setdefault(key.replace("weight", "bias"), torch.zeros(len(tensors[key])))
    theirs = {
        **config,
        "intermediate_size": config["ffn_hidden_size"],
        "num_attention_heads": config["n_head"],
        "num_hidden_layers": config["n_layer"],
        "rms_norm_eps": config["layer_norm_epsilon"],
    }
    model = twin("llama", llama_fields(theirs, attention_bias=True, mlp_bias=True), tensors)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


EXAONE_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.": "model.layers.",
    "transformer.ln_f": "model.norm",
    ".ln_1": ".input_layernorm",
    ".ln_2": ".post_attention_layernorm",
    "attn.attention.out_proj": "self_attn.o_proj",
    "attn.attention": "self_attn",
    "mlp.c_fc_0": "mlp.gate_proj",
    "mlp.c_fc_1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


@pytest.mark.parametrize("name", ["exaone-3.0", "exaone-3.5"])
def test_exaone_is_llama_under_other_names(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    renames = {"num_hidden_layers": config["num_layers"], "rms_norm_eps": 1e-5}
    fields = llama_fields({**config, **renames})
    fields["rope_parameters"].update(config["rope_scaling"] or {})
    model = twin("llama", fields, renamed(drawn(reference), EXAONE_NAMES))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_solar_is_llama_whose_layers_are_hooked() -> None:
    """The published indices: keep before layers 1 and 3 (and 2), blend before 2 and 5 (and 4)."""
    reference = REFERENCES["solar"]
    model = twin("llama", llama_fields(reference.config), drawn(reference))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    def blend(source: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (0.8 * seen[source] + 0.2 * args[0], *args[1:])

    layers = model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(keep)
    for number, source in ((2, 1), (4, 2), (5, 3)):
        layers[number].register_forward_pre_hook(partial(blend, source))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def minicpm_folded(reference: Reference) -> Weights:
    """The three factors moved into the embedding, into what closes each part, into the head."""
    config, tensors = reference.config, drawn(reference)
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    folded = {
        key: tensor * depth
        if key.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
        else tensor
        for key, tensor in tensors.items()
    }
    folded["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * config["scale_emb"]
    folded["lm_head.weight"] = head * config["dim_model_base"] / config["hidden_size"]
    return folded


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm-1b"])
def test_minicpm_is_llama_with_factors_folded_in(name: str) -> None:
    reference = REFERENCES[name]
    fields = llama_fields({**reference.config, "tie_word_embeddings": False})
    model = twin("llama", fields, minicpm_folded(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_minicpm_moe_is_mixtral_with_factors_folded_in(tmp_path: Path) -> None:
    reference = REFERENCES["minicpm-moe"]
    config = reference.config
    fields = llama_fields(
        {**config, "tie_word_embeddings": False},
        num_local_experts=config["num_experts"],
        num_experts_per_tok=config["num_experts_per_tok"],
        sliding_window=None,
    )
    tensors = renamed(minicpm_folded(reference), {".mlp.": ".block_sparse_moe."})
    model = loaded("mixtral", fields, tensors, tmp_path)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


class Projection(nn.Module):
    """A single matrix in place of an attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


class Nothing(nn.Module):
    """Adds nothing to the residual, as an attention (which returns a pair) or as an MLP."""

    def forward(self, x: Any = None, *, hidden_states: Any = None, **_: Any) -> Any:
        return (
            torch.zeros_like(x) if hidden_states is None else (torch.zeros_like(hidden_states), 0)
        )


def put_layers(model: Any, changes: list[dict[str, Any]]) -> None:
    """Exchange every layer for one whose config has those changes."""
    for i, change in enumerate(changes):
        config = copy.deepcopy(model.config)
        config.update(change)
        model.model.layers[i] = LlamaDecoderLayer(config, layer_idx=i).eval()


@pytest.mark.parametrize("name", ["decilm", "decilm with equal layers"])
def test_decilm_is_llama_with_kv_heads_by_layer(name: str) -> None:
    reference = REFERENCES[name]
    kv_heads = reference.config["num_key_value_heads_per_layer"]
    model = twin("llama", llama_fields(reference.config, num_key_value_heads=kv_heads[0]))
    put_layers(model, [{"num_key_value_heads": count} for count in kv_heads])
    model.load_state_dict(drawn(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


@pytest.mark.parametrize("name", ["nemotron-nas", "nemotron-nas with equal layers"])
def test_nemotron_nas_is_llama_with_layers_cut(name: str) -> None:
    reference = REFERENCES[name]
    config, hidden = reference.config, reference.config["hidden_size"]
    rope = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    fields = llama_fields({**config, "intermediate_size": 8, "num_key_value_heads": 1})
    model = twin("llama", {**fields, "rope_parameters": rope})
    tensors = drawn(reference)
    widths = {2.625: 256, 1.3125: 256, 5.25: 256, 0.5: 256}
    blocks = config["block_configs"]
    put_layers(
        model,
        [
            {
                "num_key_value_heads": 4 // (block["attention"]["n_heads_in_group"] or 4),
                "intermediate_size": widths.get(block["ffn"]["ffn_mult"], 8),
            }
            for block in blocks
        ],
    )
    for layer, block in zip(model.model.layers, blocks, strict=True):
        if block["attention"]["replace_with_linear"]:
            layer.self_attn = Projection(hidden)
        if block["ffn"]["replace_with_linear"]:
            layer.mlp = nn.Sequential()
            layer.mlp.add_module("linear_mlp", nn.Linear(hidden, hidden, bias=False))
        if block["attention"]["no_op"]:
            layer.self_attn, layer.input_layernorm = Nothing(), nn.Identity()
        if block["ffn"]["no_op"]:
            layer.mlp, layer.post_attention_layernorm = Nothing(), nn.Identity()
    model.load_state_dict(tensors)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_the_width_of_a_nemotron_mlp_is_that_of_the_published_checkpoint() -> None:
    """Llama-3_3-Nemotron-Super-49B-v1 has hidden 8192: a multiplier of 5.25 is llama 70B's MLP."""
    sizes = {5.25: 28672, 2.625: 14336, 1.3125: 7168, 1.0: 5632, 0.5: 2816}
    assert {m: width({"hidden_size": 8192}, {"ffn_mult": m}) for m in sizes} == sizes
