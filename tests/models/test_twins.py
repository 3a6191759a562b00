"""Families that are another one under other names: that one's tensors, renamed, give its logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedserve.device import pick
from pagedserve.models.loading import load_model
from tests.checkpoints import save, tiny_model
from tests.models.families import CASES
from tests.models.paged import PagedRun
from tests.models.test_parity import MAX_ERROR, truth

Tensors = dict[str, torch.Tensor]
Renaming = Callable[[Tensors], Tensors]
PROMPT = torch.randint(3, 250, (53,), generator=torch.Generator().manual_seed(3)).tolist()


def check(
    family: str, twin: dict[str, Any], ours: dict[str, Any], renamed: Renaming, directory: Path
) -> None:
    """`ours`: config.json over what transformers writes of `family` with `twin`."""
    reference = tiny_model(family, **twin)
    save(reference, directory)
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(renamed(tensors), file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **ours}))
    model = load_model(directory, device=pick("cpu"))
    got = PagedRun(model, block_size=5).prefill_and_decode([PROMPT], 24)[0]
    want = truth(reference, PROMPT)
    assert (got - want).abs().max() / want.abs().max() <= MAX_ERROR


def test_mimo_is_qwen2_with_layers_beside_it(tmp_path: Path) -> None:
    def renamed(tensors: Tensors) -> Tensors:
        extra = {
            "model.mtp_layers.0.input_proj.weight": torch.rand(64, 128),
            "model.mtp_layers.0.self_attn.q_proj.weight": torch.rand(64, 64),
        }
        return {**tensors, **extra}

    ours = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo"}
    check("qwen2", {}, {**ours, "num_nextn_predict_layers": 1}, renamed, tmp_path)


LING2 = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "moe_shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_shared_experts": 1,
    "score_function": "sigmoid",
    "use_bias": False,
}
RENAMED = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias",
}


def as_ling(tensors: Tensors) -> Tensors:
    """GLM 4.5's tensors under Ling 2's names, q, k and v one below the other."""
    found: Tensors = {"model.layers.3.attention.dense.weight": torch.rand(64, 64)}  # of the next
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.)self_attn\.([qkv])_proj\.(weight|bias)", name):
            layer, which, part = match.groups()
            if which == "q":
                parts = [tensors[f"{layer}self_attn.{each}_proj.{part}"] for each in "qkv"]
                found[f"{layer}attention.query_key_value.{part}"] = torch.cat(parts)
            continue
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("share", ({"partial_rotary_factor": 0.5}, {"rotary_dim": 8}))
def test_ling_2_is_glm_under_other_names(
    share: dict[str, Any], biased: bool, tmp_path: Path
) -> None:
    twin = {**CASES["glm4_moe"].config, "attention_bias": biased}
    rotation = {"rope_parameters": None, "rope_theta": 10000.0}
    check(
        "glm4_moe", twin, {**LING2, **rotation, **share, "use_qkv_bias": biased}, as_ling, tmp_path
    )
