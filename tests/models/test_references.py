"""The references against a second witness: a transformers model that has the same maths.

Where a family is another one under other names, its tensors are renamed, unpacked or folded here
and loaded into that model. Nothing here knows the package under test.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.models.references import REFERENCES, Reference, greedy, write
from tests.models.references.drawing import Weights, inverse_frequencies

LENGTH = 41
TOLERANCE = 1e-5


def tokens(reference: Reference, length: int = LENGTH) -> list[int]:
    choice = torch.Generator().manual_seed(length)
    return torch.randint(3, reference.vocab_size, (length,), generator=choice).tolist()


def twin(family: str, fields: dict[str, Any], tensors: Weights | None = None) -> Any:
    """A transformers model in float32; without `tensors` the caller still fills it."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **fields), attn_implementation="eager"
    )
    if tensors is not None:
        model.load_state_dict(tensors)
    return model.float().eval()


def logits(model: Any, input_ids: list[int], **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([input_ids]), use_cache=False, **inputs).logits[0]


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def llama_fields(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The keys that llama has too, with one way to write rope."""
    same = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "vocab_size",
    )
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    return {**{k: config[k] for k in same if k in config}, "rope_parameters": rope, **more}


def renamed(tensors: Weights, names: dict[str, str]) -> Weights:
    """Every part of a name that `names` knows is replaced; rotary buffers are left out."""
    out = {}
    for name, tensor in tensors.items():
        if not name.endswith("inv_freq"):
            for old, new in names.items():
                name = name.replace(old, new)
            out[name] = tensor
    return out


def drawn(reference: Reference) -> Weights:
    return reference.weights(reference.config, 0)


# Families that are llama, renamed or unpacked.


@pytest.mark.parametrize("name", ["aquila", "aquila2-34b", "internlm-7b", "internlm-20b"])
def test_it_is_llama(name: str) -> None:
    reference = REFERENCES[name]
    fields = llama_fields(reference.config, attention_bias=reference.config.get("bias", False))
    model = twin("llama", fields, renamed(drawn(reference), {}))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


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


def test_slopes_of_any_number_of_heads_are_blooms() -> None:
    from tests.models.references.operations import alibi_slopes

    for heads in range(1, 130):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        assert torch.allclose(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-5, atol=0)


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


# Qwen 1 is Qwen 2 with the gate under another name.

QWEN_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h.": "model.layers.",
    "transformer.ln_f": "model.norm",
    ".ln_1": ".input_layernorm",
    ".ln_2": ".post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def qwen_as_llama(reference: Reference) -> Weights:
    tensors: Weights = {}
    for name, tensor in renamed(drawn(reference), QWEN_NAMES).items():
        if "c_attn" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            tensors[name] = tensor
    return tensors


def qwen_fields(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    theirs = {
        **config,
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": config["rotary_emb_base"],
    }
    return llama_fields(theirs, **more)


@pytest.mark.parametrize("name", ["qwen", "qwen-72b"])
def test_qwen_within_its_length_is_qwen2(name: str) -> None:
    reference = REFERENCES[name]
    model = twin("qwen2", qwen_fields(reference.config), qwen_as_llama(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_qwen_with_biases_is_llama_with_biases() -> None:
    reference = REFERENCES["qwen with biases"]
    fields = qwen_fields(reference.config, attention_bias=True, mlp_bias=True)
    model = twin("llama", fields, qwen_as_llama(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def test_qwen_partly_rotary_is_llama_partly_still() -> None:
    """Frequencies 0 leave the rest of a head alone, once dims are paired as llama pairs them."""
    reference = REFERENCES["qwen partly rotary"]
    model = twin("qwen2", qwen_fields(reference.config), reorder_partial(qwen_as_llama(reference)))
    model.model.rotary_emb.inv_freq = torch.cat([inverse_frequencies(8), torch.zeros(4)])
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


def reorder_partial(tensors: Weights, dim: int = 16) -> Weights:
    """Qwen rotates dims 0..3 with 4..7, llama with 8..11: swap the inner quarters."""
    order = [*range(0, 4), *range(8, 12), *range(4, 8), *range(12, 16)]
    return {
        name: tensor.unflatten(0, (-1, dim))[:, order].flatten(0, 1)
        if ".q_proj" in name or ".k_proj" in name
        else tensor
        for name, tensor in tensors.items()
    }


def log_n_attention(
    module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention after a factor for every query past position 16."""
    place = torch.arange(1, query.shape[2] + 1).float()
    factor = (place.log() / math.log(16)).clamp(min=1.0)
    return sdpa_attention_forward(module, query * factor[:, None], *args, **kwargs)


AttentionInterface.register("log_n", log_n_attention)


@pytest.mark.parametrize(
    ("name", "length", "alpha", "attention"),
    [
        ("qwen past its length, log-n", 41, 1, "log_n"),
        ("qwen past its length, ntk", 16, 1, "eager"),
        ("qwen past its length, ntk", 17, 3, "eager"),
        ("qwen past its length, ntk", 32, 3, "eager"),
        ("qwen past its length, ntk", 41, 7, "eager"),
        ("qwen past its length, ntk", 70, 15, "eager"),
        ("qwen past its length", 41, 7, "log_n"),
    ],
)
def test_qwen_past_its_length_stretches_base_and_query(
    name: str, length: int, alpha: int, attention: str
) -> None:
    reference = REFERENCES[name]
    fields = qwen_fields({**reference.config, "rotary_emb_base": 10000.0 * alpha ** (16 / 14)})
    model = twin("qwen2", fields, qwen_as_llama(reference))
    model.set_attn_implementation(attention)
    ids = tokens(reference, length)
    future = torch.full((1, 1, length, length), -torch.inf).triu(1)
    assert_equal(reference.logits(ids), logits(model, ids, attention_mask=future))


def test_qwen_keeps_the_base_of_its_prompt_while_it_decodes() -> None:
    reference = REFERENCES["qwen past its length, ntk"]
    ids, tensors = tokens(reference), drawn(reference)
    kept = reference.forward(reference.config, tensors, ids, prompt_length=16)  # type: ignore[call-arg]
    plain = {**reference.config, "use_dynamic_ntk": False}
    assert_equal(kept, reference.forward(plain, tensors, ids))


# ChatGLM is transformers' Glm, with modules exchanged for the switches that Glm lacks.

GLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def chatglm_as_glm(reference: Reference) -> Weights:
    config = reference.config
    dim, heads = config["kv_channels"], config["num_attention_heads"]
    tensors: Weights = {}
    for name, tensor in renamed(drawn(reference), GLM_NAMES).items():
        if "query_key_value" not in name:
            tensors[name] = tensor
            continue
        if config["multi_query_attention"]:
            groups = config["multi_query_group_num"]
            parts = tensor.split([heads * dim, groups * dim, groups * dim])
        else:
            blocks = tensor.split(dim)
            parts = tuple(torch.cat(blocks[i::3]) for i in range(3))
        for part, rows in zip("qkv", parts, strict=True):
            tensors[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
    return tensors


def exchange_glm_modules(model: Any, config: dict[str, Any]) -> None:
    """Biases everywhere, LayerNorm for RMSNorm, no last norm: each where the config asks for it."""
    if config["add_bias_linear"]:
        for layer in model.model.layers:
            for owner, name in (
                (layer.self_attn, "o_proj"),
                (layer.mlp, "gate_up_proj"),
                (layer.mlp, "down_proj"),
            ):
                old = getattr(owner, name)
                setattr(owner, name, nn.Linear(old.in_features, old.out_features))
    if not config["rmsnorm"]:
        for owner in (model.model, *model.model.layers):
            for name, _ in list(owner.named_children()):
                if "norm" in name:
                    norm = nn.LayerNorm(config["hidden_size"], eps=config["layernorm_epsilon"])
                    setattr(owner, name, norm)
    if not config["post_layer_norm"]:
        model.model.norm = nn.Identity()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in REFERENCES
        if ("chatglm" in name or "glm-4" in name) and "normed residuals" not in name
    ],
)
def test_chatglm_is_glm(name: str) -> None:
    reference = REFERENCES[name]
    config = reference.config
    grouped = config["multi_query_attention"]
    heads = config["num_attention_heads"]
    fields = {
        "attention_bias": config["add_qkv_bias"] or config["add_bias_linear"],
        "head_dim": config["kv_channels"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_hidden_layers": config["num_layers"],
        "num_key_value_heads": config["multi_query_group_num"] if grouped else heads,
        "pad_token_id": 0,
        "rms_norm_eps": config["layernorm_epsilon"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * config.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        "vocab_size": config["padded_vocab_size"],
    }
    model = twin("glm", fields)
    exchange_glm_modules(model, config)
    model.load_state_dict(chatglm_as_glm(reference))
    ids = tokens(reference)
    assert_equal(reference.logits(ids), logits(model, ids))


# DeciLM and Nemotron-NAS are llama whose layers are not alike.


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
    from tests.models.references.nemotron_nas import width

    sizes = {5.25: 28672, 2.625: 14336, 1.3125: 7168, 1.0: 5632, 0.5: 2816}
    assert {m: width({"hidden_size": 8192}, {"ffn_mult": m}) for m in sizes} == sizes


# What holds of every reference.


@pytest.mark.parametrize("name", REFERENCES)
def test_every_tensor_of_a_checkpoint_but_buffers_moves_the_logits(name: str) -> None:
    reference = REFERENCES[name]
    tensors, ids = drawn(reference), tokens(reference, 12)
    plain = reference.forward(reference.config, tensors, ids)
    for key, tensor in tensors.items():
        bent = {**tensors, key: tensor * 1.5 + 0.1}
        moved = (reference.forward(reference.config, bent, ids) - plain).abs().max()
        assert moved > 1e-3 or key.endswith("inv_freq"), key


@pytest.mark.parametrize("name", REFERENCES)
def test_a_later_token_never_moves_an_earlier_logit(name: str) -> None:
    reference = REFERENCES[name]
    tensors, ids = drawn(reference), tokens(reference, 13)
    whole = reference.forward(reference.config, tensors, ids)
    assert torch.allclose(
        reference.forward(reference.config, tensors, ids[:7]), whole[:7], atol=1e-4
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_a_written_checkpoint_is_the_reference(name: str, tmp_path: Path) -> None:
    reference = REFERENCES[name]
    directory = write(reference, tmp_path / "model", seed=3)
    assert json.loads((directory / "config.json").read_text()) == reference.config
    read = load_file(directory / "model.safetensors")
    ours = reference.weights(reference.config, 3)
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[key], ours[key]) for key in ours)
    assert all(tensor.dtype == torch.float32 for tensor in read.values())
    other = drawn(reference)
    fixed = [key for key in ours if torch.equal(ours[key], other[key])]
    assert all(key.endswith("inv_freq") for key in fixed)


@pytest.mark.parametrize("name", REFERENCES)
def test_greedy_takes_the_likeliest_token_of_each_step(name: str) -> None:
    reference = REFERENCES[name]
    prompt = tokens(reference, 5)
    new = greedy(reference, prompt, 6)
    best = reference.logits(prompt + new).argmax(-1).tolist()
    assert new == best[4:10]
