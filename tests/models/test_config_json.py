"""config.json of either age gives the same spec; what is not known in it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedserve.device import Cpu, pick
from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of, supported
from pagedserve.models.loading import load_model, pick_dtype
from pagedserve.spec import DecoderSpec

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


def test_a_rope_type_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": "longrope", "factor": 4.0}})
    with pytest.raises(StartupError, match="'longrope' is not supported.*linear, llama3"):
        load_model(tmp_path, device=pick("cpu"), load_format="dummy")


def test_an_architecture_that_is_not_known_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="MambaForCausalLM") as refused:
        spec(tmp_path, architectures=["MambaForCausalLM"])
    assert all(name in str(refused.value) for name in supported())
    with pytest.raises(StartupError, match="none given"):
        spec(tmp_path, architectures=...)


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="lacks 'hidden_size'"):
        spec(tmp_path, hidden_size=...)


def test_an_activation_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="'mish'"):
        spec(tmp_path, hidden_act="mish")


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="quantised.*gptq"):
        spec(tmp_path, quantization_config={"quant_method": "gptq"})


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


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert config_json.eos_token_ids(tmp_path, {}) == []
    assert config_json.eos_token_ids(tmp_path, {"eos_token_id": 2}) == [2]
    assert config_json.eos_token_ids(tmp_path, {"eos_token_id": [2, 3]}) == [2, 3]
    write(tmp_path, {"temperature": 1.0}, "generation_config.json")
    assert config_json.eos_token_ids(tmp_path, {"eos_token_id": 2}) == [2]
    write(tmp_path, {"eos_token_id": [7, 8]}, "generation_config.json")
    assert config_json.eos_token_ids(tmp_path, {"eos_token_id": 2}) == [7, 8]


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
