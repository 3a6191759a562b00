"""Checkpoints that also read images answer text as transformers does, whatever age their names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of
from pagedserve.models.loading import load_model
from tests.checkpoints import COMMON, save
from tests.models.paged import PagedRun

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.2,
}
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}
QWEN_VISION = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "deepstack_visual_indexes": [],
}
WINDOWS = {"sliding_window": 8, "num_hidden_layers": 7}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {"model_type": "gemma3_text", **WINDOWS}, VISION),
    "mistral3": ("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", **VISION}),
    "llava": ("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **VISION}),
    "llava next": (
        "llava_next",
        {"model_type": "mistral", "sliding_window": 9},
        {"model_type": "clip_vision_model", **VISION},
    ),
    "qwen2 vl": ("qwen2_vl", {"model_type": "qwen2_vl_text", **MROPE}, QWEN_VISION),
    "qwen2.5 vl": ("qwen2_5_vl", {"model_type": "qwen2_5_vl_text", **MROPE}, QWEN_VISION),
    "qwen3 vl": ("qwen3_vl", {"model_type": "qwen3_vl_text", **MROPE}, QWEN_VISION),
    "mistral3 of ministral3": (
        "mistral3",
        {"model_type": "ministral3", "rope_parameters": YARN},
        {"model_type": "pixtral", **VISION},
    ),
}


def checkpoint(name: str, directory: Path, **whole: Any) -> Any:
    """A tiny random one in `directory`, and transformers' model of it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    family, text, vision = CASES[name]
    text = {**COMMON, "head_dim": 16, **text}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.06)
    model = model.eval().float()
    save(model, directory)
    return model


def error_against(model: Any, directory: Path) -> float:
    """Of our logits of a random prompt, in chunks, against transformers'."""
    tokens = torch.randint(3, 256, (61,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        want = model(tokens[None]).logits[0]
    run = PagedRun(load_model(directory, device=pick("cpu")), block_size=5)
    (got,) = run.prefill_and_decode([tokens.tolist()], 24)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_text_gets_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    assert error_against(checkpoint(name, tmp_path), tmp_path) <= 1e-5


def test_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    model = checkpoint("mistral3", tmp_path, tie_word_embeddings=False)
    assert error_against(model, tmp_path) <= 1e-5


def test_the_later_names_are_read_too(tmp_path: Path) -> None:
    model = checkpoint("mistral3", tmp_path, tie_word_embeddings=False)
    file = tmp_path / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.startswith("language_model.model."):
            name = name.replace("language_model.model.", "model.language_model.")
        elif name.startswith("language_model."):
            name = name.removeprefix("language_model.")
        else:
            name = f"model.{name}"
        tensors[name] = tensor
    assert "lm_head.weight" in tensors and "model.language_model.norm.weight" in tensors
    save_file(tensors, file)
    assert error_against(model, tmp_path) <= 1e-5


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    checkpoint("mistral3", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = tensors["language_model.model.norm.weight"]
    save_file({**tensors, "model.language_model.norm.weight": norm.clone()}, file)
    with pytest.raises(StartupError, match="model.norm.weight twice"):
        load_model(tmp_path, device=pick("cpu"))


def test_a_text_part_that_is_the_whole_config_is_read_too(tmp_path: Path) -> None:
    """Qwen 2.5 VL as published."""
    model = checkpoint("qwen2.5 vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    for key in ("rope_parameters", "layer_types", "model_type", "architectures"):
        text.pop(key, None)
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat = {**text, **config, "rope_theta": 10000.0, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    file = tmp_path / "model.safetensors"
    tensors = {
        re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name).replace(
            "model.visual.", "visual."
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.startswith("visual.") for name in tensors) and "model.norm.weight" in tensors
    save_file(tensors, file)
    assert error_against(model, tmp_path) <= 1e-5


def test_files_of_the_first_age_say_the_same() -> None:
    """Gemma 3 as published: little is said, and rope_scaling is of full layers only."""
    old = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    spec = spec_of(config_json.complete({**whole, "text_config": old}))
    first, sixth = spec.layers[0].attn, spec.layers[5].attn
    assert (first.window, first.rope.theta, first.rope.scaling) == (1024, 10000.0, {})
    assert (sixth.window, sixth.rope.theta) == (None, 1000000.0)
    assert sixth.rope.scaling["factor"] == 8.0
    assert spec.hidden_size == 2560 and first.heads == 8 and first.head_dim == 256


def test_a_text_part_of_another_family_is_refused() -> None:
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {"model_type": "mamba"},
    }
    with pytest.raises(StartupError, match="model_type 'mamba'; supported: mistral, ministral3"):
        spec_of(config_json.complete(config))


def test_end_tokens_of_the_text_part_count_where_the_whole_names_none() -> None:
    text = {"model_type": "mistral", "eos_token_id": 7}
    assert config_json.complete({"text_config": text})["eos_token_id"] == 7
    assert config_json.complete({"text_config": text, "eos_token_id": 9})["eos_token_id"] == 9
