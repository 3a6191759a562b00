"""References with ALiBi, and what else their families have; the biases are bloom's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.pytorch_utils import Conv1D

from tests.models.references import REFERENCES, Reference
from tests.models.references.drawing import Weights
from tests.models.references.operations import alibi_slopes
from tests.models.references.twins import (
    LENGTH,
    assert_equal,
    drawn,
    llama_fields,
    logits,
    renamed,
    tokens,
    twin,
)


def test_slopes_of_any_number_of_heads_are_blooms() -> None:
    for heads in range(1, 130):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        assert torch.allclose(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-5, atol=0)


def baichuan_as_llama(reference: Reference) -> Weights:
    tensors = {}
    for name, tensor in renamed(drawn(reference), {}).items():
        if "W_pack" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("W_pack", f"{part}_proj")] = rows
        else:
            tensors[name] = tensor
    if "baichuan2" in reference.name:
        tensors["lm_head.weight"] = nn.functional.normalize(tensors["lm_head.weight"])
    return tensors


@pytest.mark.parametrize("name", ["baichuan-7b", "baichuan2-7b"])
def test_rotary_baichuan_is_llama_with_packed_projections(name: str) -> None:
    reference = REFERENCES[name]
    model = twin("llama", llama_fields(reference.config), baichuan_as_llama(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


@pytest.mark.parametrize(
    "name",
    [
        "baichuan-13b",
        "baichuan-13b with 4 heads",
        "baichuan-13b with 12 heads",
        "baichuan2-13b",
    ],
)
def test_baichuan_13b_is_llama_that_stands_still_with_blooms_alibi(name: str) -> None:
    """With all positions 0 nothing rotates; bloom's biases come in through the mask."""
    reference = REFERENCES[name]
    model = twin("llama", llama_fields(reference.config), baichuan_as_llama(reference))
    heads, ids = reference.config["num_attention_heads"], tokens(reference)
    bias = build_alibi_tensor(torch.ones(1, LENGTH), heads, torch.float32).view(1, heads, 1, LENGTH)
    future = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    still = torch.zeros(1, LENGTH, dtype=torch.long)
    theirs = logits(model, ids, attention_mask=future + bias, position_ids=still)
    assert_equal(reference.logits(ids), theirs)


class ConvSwiglu(nn.Module):
    """The MLP that GPT-2 lacks, from GPT-2's own Conv1D."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.c_fc, self.c_fc2 = Conv1D(ffn, hidden), Conv1D(ffn, hidden)
        self.c_proj = Conv1D(hidden, ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x) * nn.functional.silu(self.c_fc2(x)))


@pytest.mark.parametrize(
    ("name", "embeddings", "logits_factor", "by_width"),
    [
        ("jais-13b", 14.6, 0.111, True),
        ("jais-family", 9.17, 1.1 * 0.125, True),
        ("jais without muP", 1.0, 1.0, False),
    ],
)
def test_jais_is_gpt2_with_blooms_alibi_and_a_gated_mlp(
    name: str, embeddings: float, logits_factor: float, by_width: bool
) -> None:
    reference = REFERENCES[name]
    config = reference.config
    hidden, heads = config["n_embd"], config["n_head"]
    same = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")
    model = twin("gpt2", {**{key: config[key] for key in same}, "tie_word_embeddings": False})
    for layer in model.transformer.h:
        layer.mlp = ConvSwiglu(hidden, config["n_inner"])
    tensors = drawn(reference)
    slopes = tensors.pop("transformer.relative_pe.slopes")
    bias = build_alibi_tensor(torch.ones(1, LENGTH), heads, torch.float32).view(1, heads, 1, LENGTH)
    assert torch.allclose(slopes[:, 0], bias[0, :, 0, 1])
    table = tensors["transformer.wte.weight"]
    tensors["lm_head.weight"] = table * logits_factor
    tensors["transformer.wte.weight"] = table * embeddings
    tensors["transformer.wpe.weight"] = torch.zeros(config["n_positions"], hidden)
    if by_width:  # a query smaller by the root of the width
        for key in [key for key in tensors if "c_attn" in key]:
            shrunk = torch.ones(3 * hidden)
            shrunk[:hidden] = (hidden // heads) ** -0.5
            tensors[key] = tensors[key] * shrunk
    model.load_state_dict(tensors)
    ids = tokens(reference)
    future = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    assert_equal(reference.logits(ids), logits(model, ids, attention_mask=future + bias))


@pytest.mark.parametrize("name", ["RW falcon-7b", "RW falcon-40b", "RW falcon-rw"])
def test_refined_web_is_falcon(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    fields = {
        key: config[key]
        for key in ("alibi", "bias", "hidden_size", "layer_norm_epsilon", "parallel_attn")
    }
    fields |= {
        "multi_query": config.get("multi_query", False),
        "new_decoder_architecture": "n_head_kv" in config,
        "num_attention_heads": config["n_head"],
        "num_hidden_layers": config["n_layer"],
        "num_kv_heads": config.get("n_head_kv", config["n_head"]),
        "tie_word_embeddings": True,
        "vocab_size": config["vocab_size"],
    }
    tensors = drawn(reference)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    model = twin("falcon", fields, tensors, attention="sdpa")  # eager adds ALiBi twice
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


@pytest.mark.parametrize("name", ["mpt-7b", "mpt-7b-storywriter"])
def test_mpt_is_transformers_own(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    same = ("d_model", "n_heads", "n_layers", "expansion_ratio", "max_seq_len", "vocab_size")
    bound = config["attn_config"]["clip_qkv"]
    fields = {**{key: config[key] for key in same}, "attn_config": {"clip_qkv": bound}}
    tensors = drawn(reference)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    model = twin("mpt", fields, tensors)
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))
