"""config.json of either age gives the same spec; what is not known in it is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedserve.device import Cpu, pick
from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of, supported
from pagedserve.models.loading import load_model, pick_dtype
from pagedserve.spec import DecoderSpec, Mlp

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def write(directory: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    (directory / name).write_text(json.dumps(config))
    return directory


def spec(directory: Path, **changes: Any) -> DecoderSpec:
    config = {k: v for k, v in {**LLAMA, **changes}.items() if v is not ...}
    return spec_of(config_json.read(write(directory, config)))


def test_both_ways_to_write_rope_are_one(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}  # fmt: skip
    old = spec(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    older = spec(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = spec(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == older == new
    rope = new.layers[0].attn.rope
    assert rope is not None and rope.theta == 5e5 and rope.scaling["factor"] == 8.0


def test_rope_that_says_nothing_is_plain(tmp_path: Path) -> None:
    plain = spec(tmp_path)
    assert plain == spec(tmp_path, rope_scaling=None, rope_theta=10000.0)
    assert plain == spec(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    rope = plain.layers[0].attn.rope
    assert rope is not None and (rope.theta, rope.dim, rope.scaling) == (10000.0, 16, {})


BOTH_NAMES = {"rope_type": "linear", "type": "default", "factor": 2.0}
OLD = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.filterwarnings("ignore")  # transformers warns of keys that have no effect
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": OLD},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": OLD,
            "rope_theta": 7.0,
        },
        {"rope_parameters": {**OLD, "rope_theta": 5e5}, "rope_scaling": None},
        {"rope_parameters": {**OLD, "rope_theta": 5e5}, "rope_scaling": {}, "rope_theta": 7.0},
        {"rope_parameters": OLD, "rope_theta": 7.0},
        {"rope_parameters": None, "rope_scaling": {**OLD, "rope_theta": 9.0}, "rope_theta": 7.0},
        {"rope_scaling": BOTH_NAMES},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
        {"partial_rotary_factor": 0.5, "rope_scaling": OLD},
    ],
)
def test_rope_is_read_as_transformers_reads_it(fields: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    write(tmp_path, {**LLAMA, "model_type": "llama", **fields})
    theirs = dict(AutoConfig.from_pretrained(tmp_path).rope_parameters)
    theirs.pop("type", None)
    ours = config_json.read(tmp_path)["rope_parameters"]
    used = {"rope_type", "rope_theta", "partial_rotary_factor", *LLAMA3}
    if theirs["rope_type"] == "llama3":
        used.add("original_max_position_embeddings")
    assert {k: v for k, v in ours.items() if k in used} == theirs


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["linear", [1], {"full_attention": {"rope_type": "default"}}])
def test_rope_that_is_no_flat_object_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="config.json: rope_(scaling|parameters) must be"):
        spec(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "linear"}, "factor must be a positive number, got null"),
        ({"type": "linear", "factor": "2"}, 'factor must be a positive number, got "2"'),
        ({"type": "linear", "factor": 0}, "factor must be a positive number, got 0"),
        ({**LLAMA3, "low_freq_factor": None}, "low_freq_factor must be"),
        ({"rope_theta": "x"}, "rope_theta must be a positive number"),
        ({"type": ["linear"]}, r"rope type \['linear'\] is not supported"),
    ],
)
def test_a_wrong_number_of_rope_is_named(rope: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=f"config.json.*{message}"):
        spec(tmp_path, rope_scaling=rope)


def test_a_rope_type_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": "ntk", "factor": 4.0}})
    with pytest.raises(StartupError, match="'ntk' is not supported.*linear.*llama3"):
        load_model(tmp_path, device=pick("cpu"), load_format="dummy")


def test_an_older_name_of_an_unknown_rope_type_is_refused_by_it_too(tmp_path: Path) -> None:
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "mrope"}}
    write(tmp_path, {**LLAMA, **both})
    with pytest.raises(StartupError, match="'mrope' is not supported"):
        load_model(tmp_path, device=pick("cpu"), load_format="dummy")


def test_an_architecture_that_is_not_known_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="MambaForCausalLM") as refused:
        spec(tmp_path, architectures=["MambaForCausalLM"])
    assert all(name in str(refused.value) for name in supported())


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="lacks 'hidden_size'"):
        spec(tmp_path, hidden_size=...)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("vocab_size", [256]),
        ("head_dim", {}),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "false"),
        ("sliding_window", "8"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=f"config.json of LlamaForCausalLM: {key} must be"):
        spec(tmp_path, **{key: value})


@pytest.mark.parametrize("fields", [{"layer_types": True}, {"layer_types": 5}])
def test_a_value_that_a_family_cannot_read_is_an_error_of_the_file(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    family = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    with pytest.raises(StartupError, match="config.json of Qwen2ForCausalLM cannot be read"):
        spec(tmp_path, **family, **fields)


DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3 key/value heads"),
        ({"head_dim": 15}, "turns 15 of the 15 numbers of a head"),
        ({"head_dim": 1}, "turns 1 of the 1 numbers of a head"),
        ({"partial_rotary_factor": 1.5}, "turns 24 of the 16 numbers of a head"),
        (
            {
                "architectures": ["DbrxForCausalLM"],
                "model_type": "dbrx",
                "d_model": 64,
                "n_heads": 4,
                "n_layers": 2,
                "max_seq_len": 64,
                "attn_config": {"rope_theta": -1.0},
                "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 96},
            },
            "base of the rotary embedding must be positive, got -1.0",
        ),
        ({"rms_norm_eps": -1e-5}, "epsilon of a norm must not be negative, got -1e-05"),
        ({**MIXTRAL, "sliding_window": 0}, "sliding window must be of at least 1 token, got 0"),
        ({**MIXTRAL, "num_experts_per_tok": 5}, "a token cannot choose 5 of 4 experts"),
        ({**GEMMA, "attn_logit_softcapping": 0}, "soft cap of attention scores must be positive"),
        ({**GEMMA, "final_logit_softcapping": -1.0}, "soft cap of logits must be positive"),
        ({**GEMMA, "query_pre_attn_scalar": -4}, "scale of its Attn must be a number, got"),
        ({**DEEPSEEK, "n_group": "x"}, "groups of its Moe must be integers, got ('x', 2)"),
        ({**DEEPSEEK, "n_group": 0}, "8 experts do not divide into 0 groups"),
        ({**DEEPSEEK, "num_experts_per_tok": True}, "num_experts_per_tok must be a positive int"),
        ({**DEEPSEEK, "n_shared_experts": -1}, "size of its Mlp must be an integer from 1 on"),
        ({**DEEPSEEK, "routed_scaling_factor": None}, "routed_scaling_factor must be a number"),
        ({**DEEPSEEK, "n_group": 3}, "8 experts do not divide into 3 groups"),
        ({**DEEPSEEK, "topk_group": 5}, "5 of 4 groups of experts cannot be kept"),
        ({**DEEPSEEK, "topk_group": 1}, "choose 3 of 2 experts in the 1 groups that are kept"),
        ({**DEEPSEEK, "n_group": 8}, "two best experts, but 8 groups have 1 each"),
    ],
)
def test_values_that_do_not_fit_together_are_an_error_of_the_file(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    name = fields.get("architectures", LLAMA["architectures"])[0]
    with pytest.raises(StartupError, match=f"^config.json of {name}: .*{re.escape(message)}"):
        spec(tmp_path, **fields)


def test_a_choice_of_experts_that_is_not_known_is_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_experts_per_tok": 2,
    }
    with pytest.raises(StartupError, match="topk_method 'noaux_tc' is not supported"):
        spec(tmp_path, **fields, topk_method="noaux_tc")


@pytest.mark.parametrize("name", ("gpt_oss", "qwen2"))
def test_kinds_of_layers_are_checked_in_every_family(name: str, tmp_path: Path) -> None:
    classes = {"gpt_oss": "GptOssForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    fields = {"architectures": [classes[name]], "model_type": name, "use_sliding_window": True}
    with pytest.raises(StartupError, match="layer_types has 'linear_attention'"):
        spec(tmp_path, **fields, layer_types=["linear_attention"] * 4)
    with pytest.raises(StartupError, match="layer_types names 2 layers of 4"):
        spec(tmp_path, **fields, layer_types=["full_attention"] * 2)


def test_two_rounds_choose_two_experts(tmp_path: Path) -> None:
    fields = {"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"}
    with pytest.raises(StartupError, match="num_experts_per_tok must be 2, got 3"):
        spec(tmp_path, **fields, num_experts_per_tok=3)


def test_gelu_means_its_approximation_only_under_the_older_key(tmp_path: Path) -> None:
    def act(**fields: Any) -> str:
        ffn = spec(tmp_path, **{**GEMMA, "hidden_act": ..., **fields}).layers[0].ffn
        assert isinstance(ffn, Mlp)
        return ffn.act

    assert act() == act(hidden_act="gelu", hidden_activation=None) == "gelu_tanh"
    assert act(hidden_activation="gelu") == act(hidden_activation="gelu", hidden_act="relu")
    assert act(hidden_activation="gelu") == "gelu"


def test_layers_by_name_win_over_a_pattern_as_in_transformers(tmp_path: Path) -> None:
    pattern = [[["global", "local"], 2]]
    fields: dict[str, Any] = {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo"}
    fields |= {"num_heads": 4, "num_layers": 4, "window_size": 9, "attention_types": pattern}
    assert windows(spec(tmp_path, **fields)) == [None, 9, None, 9]
    names = ["local", "global", "global", "local"]
    assert windows(spec(tmp_path, **fields, attention_layers=names)) == [9, None, None, 9]


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [5], 5, [], None, ...])
def test_architectures_must_be_names(names: Any, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="architectures must be a list of class names"):
        spec(tmp_path, architectures=names)


def test_an_activation_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="'mish'"):
        spec(tmp_path, hidden_act="mish")


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="quantised.*gptq"):
        spec(tmp_path, quantization_config={"quant_method": "gptq"})


def test_overrides_are_merged_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "kept": [1]})
    overrides = {"rope_scaling": {"factor": 4.0}, "num_hidden_layers": 2, "kept": None, "new": 1}
    config = config_json.read(tmp_path, overrides)
    assert config["rope_parameters"]["factor"] == 4.0
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert (config["kept"], config["new"]) == (None, 1)
    assert len(spec_of(config).layers) == 2
    loaded = load_model(
        tmp_path, device=pick("cpu"), load_format="dummy", hf_overrides={"num_hidden_layers": 1}
    )
    assert len(loaded.spec.layers) == 1
    assert config_json.changes(LLAMA | {"rope_scaling": {"factor": 2.0}}, overrides) == [
        "rope_scaling.factor 2.0 → 4.0",
        "num_hidden_layers 4 → 2",
        "kept null (not in config.json)",
        "new 1 (not in config.json)",
    ]


def test_broken_json_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(StartupError, match=r"config\.json is not valid JSON"):
        config_json.read(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(StartupError, match="must hold a JSON object"):
        config_json.read(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(StartupError, match=r"cannot read .*config\.json"):
        config_json.read(tmp_path)


def windows(found: DecoderSpec) -> list[int | None]:
    return [layer.attn.window for layer in found.layers]


def test_mistral_slides_on_every_layer_unless_it_says_null(tmp_path: Path) -> None:
    names = {"architectures": ["MistralForCausalLM"]}
    assert windows(spec(tmp_path, **names, sliding_window=8)) == [8] * 4
    assert windows(spec(tmp_path, **names, sliding_window=None)) == [None] * 4
    assert windows(spec(tmp_path, **names)) == [4096] * 4


@pytest.mark.parametrize("name", ("Qwen2ForCausalLM", "Qwen3ForCausalLM"))
def test_qwen_slides_only_where_it_says_so(name: str, tmp_path: Path) -> None:
    base = {"architectures": [name], "sliding_window": 8}
    assert windows(spec(tmp_path, **base)) == [None] * 4
    assert windows(spec(tmp_path, **base, use_sliding_window=False, max_window_layers=0)) == (
        [None] * 4
    )
    slides = {**base, "use_sliding_window": True}
    assert windows(spec(tmp_path, **slides, max_window_layers=3)) == [None, None, None, 8]
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(spec(tmp_path, **slides, layer_types=kinds)) == [8, None, None, 8]


class SixteenBits(Cpu):
    """A device that keeps a checkpoint's dtype, as a GPU does."""

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return checkpoint_dtype


def test_auto_dtype_is_the_devices_choice(tmp_path: Path) -> None:
    for key in ("dtype", "torch_dtype"):
        config = config_json.read(write(tmp_path, {**LLAMA, key: "bfloat16"}))
        assert pick_dtype("auto", config, Cpu()) == torch.float32
        assert pick_dtype("auto", config, SixteenBits()) == torch.bfloat16
        assert pick_dtype("float16", config, Cpu()) == torch.float16
    assert pick_dtype("auto", LLAMA, SixteenBits()) == torch.float32
    with pytest.raises(StartupError, match="'int8'"):
        pick_dtype("int8", LLAMA, Cpu())


def test_the_models_own_limit_and_end_are_reported(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "eos_token_id": 2})
    loaded = load_model(tmp_path, device=pick("cpu"), load_format="dummy")
    assert (loaded.max_model_len, loaded.eos_token_ids) == (512, [2])
