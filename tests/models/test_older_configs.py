"""config.json files as they were first published, in keys that transformers no longer writes.

transformers reads them, too: what it makes of a file must give the same spec.
"""

from __future__ import annotations

from typing import Any

import pytest

from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of
from pagedserve.spec import Attn, DecoderSpec
from tests.models.references import REFERENCES
from tests.models.test_defaults import normalised

NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
FALCON: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "bias": False,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
OPT: dict[str, Any] = {
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "do_layer_norm_before": True,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-70m": NEOX,
    "of a base of its own": {**NEOX, "rotary_emb_base": 25000, "rotary_pct": 1.0},
    "that says nothing of the rotation": {
        key: value for key, value in NEOX.items() if not key.startswith("rotary")
    },
    "tiiuae/falcon-7b": FALCON,
    "tiiuae/falcon-40b": {
        **FALCON,
        "hidden_size": 8192,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
    },
    "bigscience/bloom-560m": {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_softmax_in_fp32": True,
        "layer_norm_epsilon": 1e-05,
        "model_type": "bloom",
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "skip_bias_add": True,
        "vocab_size": 250880,
    },
    "EleutherAI/gpt-neo-125m": {
        "activation_function": "gelu_new",
        "architectures": ["GPTNeoForCausalLM"],
        "attention_layers": ["global", "local"] * 6,
        "attention_types": [[["global", "local"], 6]],
        "hidden_size": 768,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neo",
        "num_heads": 12,
        "num_layers": 12,
        "vocab_size": 50257,
        "window_size": 256,
    },
    "EleutherAI/gpt-j-6b": {
        "activation_function": "gelu_new",
        "architectures": ["GPTJForCausalLM"],
        "layer_norm_epsilon": 1e-05,
        "model_type": "gptj",
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_layer": 28,
        "n_positions": 2048,
        "rotary": True,
        "rotary_dim": 64,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "vocab_size": 50400,
    },
    "bigcode/starcoder": {
        "activation_function": "gelu",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "n_embd": 6144,
        "n_head": 48,
        "n_inner": 24576,
        "n_layer": 40,
        "n_positions": 8192,
        "scale_attn_weights": True,
        "vocab_size": 49152,
    },
    "facebook/opt-125m": OPT,
    "facebook/opt-350m": {
        **OPT,
        "do_layer_norm_before": False,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "word_embed_proj_dim": 512,
    },
    "mosaicml/mpt-7b": {
        **REFERENCES["mpt-7b"].config,
        "architectures": ["MptForCausalLM"],
    },
}


def read(config: dict[str, Any]) -> DecoderSpec:
    return spec_of(config_json.complete(dict(config)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_transformers_does(name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    published = PUBLISHED[name]
    theirs = CONFIG_MAPPING[published["model_type"]].from_dict(dict(published))
    assert read(published) == spec_of(normalised(theirs))


@pytest.mark.parametrize(
    "name, option",
    (
        ("RW falcon-7b", {"apply_residual_connection_post_layernorm": True}),
        ("chatglm2", {"pre_seq_len": 128}),
        ("chatglm2", {"quantization_bit": 4}),
        ("telechat2", {"logn": True}),
        ("telechat2", {"embed_layernorm": True}),
        ("telechat2", {"training_seqlen": 1024}),
        ("jais-13b", {"alibi_scaling": {"factor": 2}}),
        ("bailing-moe", {"multi_gate": True}),
        ("minicpm-2b", {"sparse_config": {"kernel_size": 32}}),
        ("deepseek-moe", {"scoring_func": "sigmoid"}),
        ("stablelm-epoch", {"rotary_scaling_factor": 2.0}),
        ("mpt-7b", {"norm_type": "rmsnorm"}),
        ("mpt-7b", {"attn_config": {"prefix_lm": True}}),
        ("mpt-7b", {"attn_config": {"rope": True}}),
        ("mpt-7b", {"attn_config": {"qk_ln": True, "clip_qkv": 6}}),
        ("mpt-7b", {"attn_config": {"attn_type": "other"}}),
    ),
)
def test_options_that_would_change_the_answers_are_refused_by_name(
    name: str, option: dict[str, Any]
) -> None:
    read(REFERENCES[name].config)
    key, value = next(iter(option.items()))
    inner = next(iter(value)) if key == "attn_config" else key
    with pytest.raises(StartupError, match=f"{inner} .*not supported"):
        read({**REFERENCES[name].config, **option})


def test_blocks_of_a_search_refuse_windows_and_sinks_by_name() -> None:
    config = REFERENCES["nemotron-nas"].config
    blocks = [{**block, "attention": {**block["attention"]}} for block in config["block_configs"]]
    blocks[-1]["attention"]["window_length"] = 64
    with pytest.raises(StartupError, match="window_length 64 is not supported"):
        read({**config, "block_configs": blocks})


@pytest.mark.parametrize(
    "kind, kv_heads", (("multiquery_attention", 1), ("grouped_query_attention", 3))
)
def test_heads_are_shared_as_the_kind_of_attention_says(kind: str, kv_heads: int) -> None:
    options = {"attn_type": kind, "kv_n_heads": 3}
    spec = read({**REFERENCES["mpt-7b"].config, "attn_config": options})
    assert [attn.kv_heads for attn in spec.cached()] == [kv_heads] * 3
    assert all(isinstance(layer.attn, Attn) for layer in spec.layers)


def test_a_rotary_base_in_an_object_of_its_own_is_read() -> None:
    config = {**REFERENCES["internlm-7b"].config, "rotary": {"base": 500000, "type": "dynamic"}}
    assert {attn.rope.theta for attn in read(config).cached() if attn.rope} == {500000}


def test_a_context_past_the_trained_one_is_allowed_where_the_family_has_a_method() -> None:
    config = {**REFERENCES["qwen"].config, "seq_length": 128}
    plain = {**config, "use_dynamic_ntk": False, "use_logn_attn": False}
    assert (read(config).max_positions, read(config).stretched_positions) == (128, 512)
    assert (read(plain).max_positions, read(plain).stretched_positions) == (128, None)
