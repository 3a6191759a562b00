"""Tensors as real checkpoints hold them: buffers beside the weights, names without their prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models.loading import load_model
from tests.checkpoints import tiny_checkpoint
from tests.models.families import CASES
from tests.models.paged import PagedRun

Tensors = dict[str, torch.Tensor]
MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool)
LITTLE = torch.tensor(-1e9)
FREQUENCIES = torch.rand(8)
BUFFERS: dict[str, Tensors] = {
    "gpt_bigcode": {"transformer.h.1.attn.bias": MASK},
    "gpt_neo": {
        "transformer.h.0.attn.attention.bias": MASK,
        "transformer.h.0.attn.attention.masked_bias": LITTLE,
    },
    "gptj": {"transformer.h.2.attn.bias": MASK, "transformer.h.2.attn.masked_bias": LITTLE},
    "codegen": {"transformer.h.0.attn.causal_mask": MASK},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": MASK,
        "gpt_neox.layers.0.attention.masked_bias": LITTLE,
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": FREQUENCIES,
    },
    "falcon 7b": {"transformer.h.0.self_attention.rotary_emb.inv_freq": FREQUENCIES},
    "falcon 40b": {"transformer.h.0.self_attention.maybe_rotary.inv_freq": FREQUENCIES},
    "xglm": {"model.embed_positions.weights": torch.rand(514, 64)},
    "openai-gpt": {"transformer.h.0.attn.bias": MASK},
}
# Of a base model, saved before it had a head, or by the first of its libraries.
PREFIXES = {
    "bloom": "transformer.",
    "openai-gpt": "transformer.",
    "falcon 7b": "transformer.",
    "mpt": "transformer.",
    "opt": "model.",
    "xglm": "model.",
    "biogpt": "biogpt.",
}


def written(name: str, directory: Path) -> tuple[Path, Tensors]:
    case = CASES[name]
    tiny_checkpoint(case.family, directory, **case.config)
    file = directory / "model.safetensors"
    return file, {key: tensor.clone() for key, tensor in load_file(file).items()}


def logits(directory: Path) -> torch.Tensor:
    model = load_model(directory, device=pick("cpu"))
    return PagedRun(model, block_size=4).prefill_and_decode([[5, 9, 7, 200, 31]], 5)[0]


def rewrite(file: Path, tensors: Tensors) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_left_out(name: str, tmp_path: Path) -> None:
    file, tensors = written(name, tmp_path)
    wanted = logits(tmp_path)
    rewrite(file, {**tensors, **BUFFERS[name]})
    assert torch.equal(logits(tmp_path), wanted)


@pytest.mark.parametrize("name", BUFFERS)
def test_a_parameter_beside_them_is_not_taken_for_one(name: str, tmp_path: Path) -> None:
    file, tensors = written(name, tmp_path)
    other = {f"{next(iter(BUFFERS[name]))}_of_something": torch.rand(3)}
    rewrite(file, {**tensors, **other})
    with pytest.raises(StartupError, match="does not use"):
        load_model(tmp_path, device=pick("cpu"))


@pytest.mark.parametrize("name", ["deepseek v3", "glm4_moe", "glm4_moe_lite"])
def test_a_layer_behind_the_last_that_predicts_several_tokens_is_left_out(
    name: str, tmp_path: Path
) -> None:
    file, tensors = written(name, tmp_path)
    wanted = logits(tmp_path)
    for layer in (3, 4):
        rewrite(file, {**tensors, f"model.layers.{layer}.eh_proj.weight": torch.rand(64, 128)})
        if layer == 3:
            assert torch.equal(logits(tmp_path), wanted)
    with pytest.raises(StartupError, match=r"does not use: model\.layers\.4\.eh_proj"):
        load_model(tmp_path, device=pick("cpu"))


@pytest.mark.parametrize("name", PREFIXES)
def test_names_without_their_prefix_are_found(name: str, tmp_path: Path) -> None:
    file, tensors = written(name, tmp_path)
    wanted: Any = logits(tmp_path)
    bare = {key.removeprefix(PREFIXES[name]): tensor for key, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    rewrite(file, bare)
    assert torch.equal(logits(tmp_path), wanted)


def test_a_second_copy_of_a_tied_head_may_be_there(tmp_path: Path) -> None:
    file, tensors = written("falcon 7b", tmp_path)
    wanted = logits(tmp_path)
    table = tensors["transformer.word_embeddings.weight"]
    rewrite(file, {**tensors, "lm_head.weight": table.clone()})
    assert torch.equal(logits(tmp_path), wanted)
