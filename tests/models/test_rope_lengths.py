"""Scalings that look at a context's length: equal to transformers' for the length they serve.

Which frequencies a key has is decided once, by the longest context that is served, and not anew
for every sequence; so a reference must be of just that length.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models import config_json
from pagedserve.models.architectures import spec_of
from pagedserve.models.loading import load_model
from tests.checkpoints import save, tiny_model
from tests.models.families_dense import DYNAMIC, LONGROPE, TRAINED
from tests.models.paged import PagedRun

TRAINED_LENGTH = 32


def error_of(
    family: str, directory: Path, length: int, context: int | None, **config: Any
) -> float:
    """Of our logits of `length` tokens, in chunks, against one forward of transformers."""
    reference = tiny_model(family, **config)
    save(reference, directory)
    tokens = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        want = reference(tokens[None]).logits[0]
    run = PagedRun(load_model(directory, device=pick("cpu"), context=context), block_size=5)
    (got,) = run.prefill_and_decode([tokens.tolist()], 24)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("length", (33, 59, 80))
def test_dynamic_scaling_is_that_of_the_longest_context(length: int, tmp_path: Path) -> None:
    config = {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED_LENGTH}
    assert error_of("llama", tmp_path, length, length, **config) <= 1e-5


def test_dynamic_scaling_leaves_contexts_within_the_trained_length(tmp_path: Path) -> None:
    config = {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED_LENGTH}
    assert error_of("llama", tmp_path, 29, None, **config) <= 1e-5


def test_dynamic_scaling_reaches_as_far_as_its_factor(tmp_path: Path) -> None:
    config = {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED_LENGTH}
    save(tiny_model("llama", **config), tmp_path)
    with pytest.raises(StartupError, match="max_model_len is 81, but .* end at 80"):
        load_model(tmp_path, device=pick("cpu"), context=81)


@pytest.mark.parametrize(("context", "length"), ((TRAINED_LENGTH, 31), (33, 33), (512, 200)))
def test_longrope_takes_its_long_factors_beyond_the_trained_length(
    context: int, length: int, tmp_path: Path
) -> None:
    config = {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": TRAINED_LENGTH,
    }
    assert error_of("phi3", tmp_path, length, context, **config) <= 1e-5


def test_longrope_under_its_first_names_is_the_same() -> None:
    sizes = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 64}
    sizes |= {"num_attention_heads": 4, "original_max_position_embeddings": 64}
    factors = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    specs = [
        spec_of(config_json.complete({**sizes, "rope_scaling": {"type": name, **factors}}))
        for name in ("longrope", "su", "yarn")
    ]
    ropes = [spec.layers[0].attn.rope for spec in specs]
    assert {rope.scaling["rope_type"] for rope in ropes} == {"longrope"}
    assert {rope.scaling["original_max_position_embeddings"] for rope in ropes} == {64}
    # 4096 is what the family was made for, if the file does not say.
    assert {rope.scaling["factor"] for rope in ropes} == {4096 / 64}


def test_another_scaling_of_that_family_is_refused() -> None:
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": DYNAMIC}
    with pytest.raises(StartupError, match="rope type 'dynamic' is not one of"):
        spec_of(config_json.complete(config))


def test_a_scaling_in_the_older_form_is_of_full_layers_only() -> None:
    config = {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "rope_theta": 500000,
        "rope_scaling": {**TRAINED, "rope_type": "yarn", "factor": 8.0, "rope_theta": 500000},
    }
    spec = spec_of(config_json.complete(config))
    kinds = [layer.attn.window for layer in spec.layers]
    assert kinds == ([4096, 4096, 4096, None] * 8)
    assert spec.layers[0].attn.rope.scaling == {}
    assert spec.layers[3].attn.rope.scaling["factor"] == 8.0
    assert dataclasses.replace(spec.layers[3].attn.rope, scaling={}) == spec.layers[0].attn.rope


def test_a_fixed_alpha_is_a_larger_theta() -> None:
    config = {
        "model_type": "hunyuan_v1_dense",
        "architectures": ["HunYuanDenseV1ForCausalLM"],
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    }
    spec = spec_of(config_json.complete(config))
    rope = spec.layers[0].attn.rope
    assert rope.scaling == {} and spec.stretched_positions is None
    assert math.isclose(rope.theta, 10000.0 * 1000.0 ** (128 / 126))
