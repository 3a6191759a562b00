"""Options of dense families that no tiny checkpoint of transformers shows: read, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of
from pagedserve.spec import DecoderSpec


def read(architecture: str, model_type: str, **config: Any) -> DecoderSpec:
    head = {"architectures": [architecture], "model_type": model_type}
    return spec_of(config_json.complete({**head, **config}))


def windows(spec: DecoderSpec) -> list[int | None]:
    return [layer.attn.window for layer in spec.layers]


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("Gemma3ForCausalLM", "gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    ("Gemma2ForCausalLM", "gemma2", {"layer_types": ["linear_attention"] * 26}, "layer_types has"),
    (
        "Gemma2ForCausalLM",
        "gemma2",
        {"layer_types": ["full_attention"] * 3},
        "names 3 layers of 26",
    ),
    ("IQuestCoderForCausalLM", "iquestcoder", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("Apertus1p5TextForCausalLM", "apertus1p5_text", {"output_vocab_size": 99}, "output_vocab"),
    ("ApertusForCausalLM", "apertus", {"post_norm": True}, "post_norm True"),
    ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", {"use_cla": True}, "use_cla True"),
    ("LlamaForCausalLM", "llama", {"hidden_act": "sigmoid"}, "activation 'sigmoid'"),
    ("StableLmForCausalLM", "stablelm", {"use_qkv_bias": "yes"}, "use_qkv_bias must be true or"),
    ("CohereForCausalLM", "cohere", {"logit_scale": None}, "cannot be read"),
]


@pytest.mark.parametrize(("architecture", "model_type", "config", "message"), REFUSED)
def test_an_option_that_would_change_the_answers_is_refused(
    architecture: str, model_type: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        read(architecture, model_type, **config)


def test_windows_of_files_that_name_a_pattern_or_nothing() -> None:
    said = read("Gemma3ForCausalLM", "gemma3_text", sliding_window_pattern=3, num_hidden_layers=6)
    assert windows(said) == [4096, 4096, None] * 2
    assert windows(read("Gemma2ForCausalLM", "gemma2", num_hidden_layers=4)) == [4096, None] * 2
    exaone = read(
        "Exaone4ForCausalLM", "exaone4", sliding_window_pattern="LLLG", num_hidden_layers=8
    )
    assert windows(exaone) == [4096, 4096, 4096, None] * 2
    assert [layer.attn.rope is None for layer in exaone.layers] == [False, False, False, True] * 2
    plain = read("Exaone4ForCausalLM", "exaone4", sliding_window=None, num_hidden_layers=4)
    assert windows(plain) == [None] * 4 and all(layer.attn.rope for layer in plain.layers)
    cohere = read("Cohere2ForCausalLM", "cohere2", sliding_window_pattern=2, num_hidden_layers=4)
    assert windows(cohere) == [4096, None] * 2


def test_the_first_gemmas_mean_the_approximation_when_they_say_gelu() -> None:
    assert read("GemmaForCausalLM", "gemma", hidden_act="gelu").layers[0].ffn.act == "gelu_tanh"
    exact = read("GemmaForCausalLM", "gemma", hidden_act="gelu", hidden_activation="silu")
    assert exact.layers[0].ffn.act == "silu"


def test_internlm3_has_biases_by_its_own_names() -> None:
    for keys, roles in (
        ({"qkv_bias": True}, {"q", "k", "v"}),
        ({"bias": True}, {"out", "gate", "up", "down"}),
        ({}, set()),
    ):
        assert read("InternLM3ForCausalLM", "internlm3", **keys).biases == roles


def test_layers_without_rotation_alone_have_windows_where_smollm3_says_so() -> None:
    spec = read("SmolLM3ForCausalLM", "smollm3", use_sliding_window=True, sliding_window=64)
    for i, layer in enumerate(spec.layers):
        assert (layer.attn.rope is None) == (i % 4 == 3)
        assert layer.attn.window == (64 if i % 4 == 3 else None)
