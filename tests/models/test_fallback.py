"""The fallback: classes of transformers over our paged cache equal themselves, or are refused.

`try_fallback` tries every class, by hand, and writes the catalogue; here are some of each kind.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedserve import LLM, SamplingParams
from pagedserve.config import DEMO_MODEL
from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models.architectures import supported
from pagedserve.models.fallback import Fallback, check, load
from pagedserve.models.fallback.attention import Mask, NotExpressible, read_mask
from pagedserve.models.loading import LoadedModel, load_model
from tests.checkpoints import save, tiny_checkpoint
from tests.models.paged import PagedRun
from tests.models.test_parity import NEW_TOKENS, greedy
from tests.models.try_fallback import FIXES, LENGTHS, random_model, random_sequences, reference

MAX_ERROR = 1e-4
# No native families, each for something of its own: layers that slide and layers that share keys,
# values narrower than keys, experts, sinks, a config in a config.
NOT_NATIVE = (
    "afmoe",
    "solar_open",
    "bert",
    "gemma4_text",
    "axk1",
    "mimo_v2_flash",
    "phi4_multimodal",
    "emu3",
)
FORCED = ("llama", "gemma2", "gpt_oss", "youtu")  # the last one's loader clears a row


def loaded(directory: Path, **options: Any) -> LoadedModel:
    return load_model(directory, device=pick("cpu"), model_impl="transformers", **options)


@pytest.mark.parametrize("family", [*NOT_NATIVE, *FORCED])
def test_logits_over_the_paged_cache_equal_the_class_s_own(family: str, tmp_path: Path) -> None:
    own = random_model(family, FIXES.get(family, ({},))[0])
    save(own, tmp_path)
    model = loaded(tmp_path)
    assert isinstance(model.decoder, Fallback)
    sequences = random_sequences(own)
    run = PagedRun(model, block_size=5)
    got = run.prefill_and_decode(sequences, 24, decode_from=[n - 9 for n in LENGTHS])
    for logits, tokens in zip(got, sequences, strict=True):
        want = reference(own, tokens)
        assert logits.dtype == torch.float32
        assert (logits - want).abs().max() / want.abs().max() <= MAX_ERROR


def config_alone(family: str, directory: Path, **changes: Any) -> Path:
    """A directory with a config.json and no weights."""
    tiny = random_model(family, {**FIXES.get(family, ({},))[0], **changes}).config
    tiny.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("mamba", "MambaForCausalLM", "the class does not let attention be replaced"),
        ("bloom", "BloomForCausalLM", "the class does not let attention be replaced"),
        ("lfm2", "Lfm2ForCausalLM", "only 1 of its 4 layers call .* there is Lfm2ShortConv"),
        ("diffllama", "DiffLlamaForCausalLM", "it calls the attention function 8 times for 4"),
        ("doge", "DogeForCausalLM", "it makes an attention mask of its own"),
        ("nemotron", "NemotronForCausalLM", "it does not hand its keyword arguments down"),
        ("electra", "ElectraForCausalLM", "its attention is not causal"),
    ],
)
def test_a_class_that_cannot_is_refused_before_its_weights_are_read(
    family: str, name: str, reason: str, tmp_path: Path
) -> None:
    config_alone(family, tmp_path, **({"is_decoder": False} if family == "electra" else {}))
    way_out = "leave the flag out" if name in supported() else "pagedserve models"
    with pytest.raises(StartupError, match=f"{name} is not supported.*{reason}.*{way_out}"):
        loaded(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["zaya", "roberta"])
def test_what_attention_alone_does_not_show_is_refused_by_comparison(
    family: str, dtype: str, tmp_path: Path
) -> None:
    # A convolution over tokens; positions that the class counts from two.
    save(random_model(family, FIXES[family][0]), tmp_path)
    with pytest.raises(StartupError, match="over the paged cache its logits differ from its own"):
        loaded(tmp_path, dtype=dtype)


@pytest.mark.parametrize(
    "bent", [{"scale": 0.4}, {"window": 4}, {"softcap": 1.0}, {"sinks": True}, {"chunk": 6}]
)
def test_attention_that_is_bent_a_little_is_refused(
    bent: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint("qwen2", tmp_path)
    trace = load.trace

    def bending(*call: Any) -> Any:
        traced = trace(*call)
        first, *rest = traced.layers
        return dataclasses.replace(traced, layers=(dataclasses.replace(first, **bent), *rest))

    monkeypatch.setattr(load, "trace_shapes", lambda *call: None)
    monkeypatch.setattr(load, "trace", bending)
    with pytest.raises(StartupError, match="over the paged cache"):
        loaded(tmp_path)


def test_an_unknown_class_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["FooForCausalLM"]}))
    message = "FooForCausalLM is not supported: .*no causal language model of this name"
    for model_impl in ("auto", "transformers"):
        with pytest.raises(StartupError, match=message):
            load_model(tmp_path, device=pick("cpu"), model_impl=model_impl)


def test_auto_takes_the_native_family_where_there_is_one(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path)
    assert not isinstance(load_model(tmp_path, device=pick("cpu")).decoder, Fallback)
    assert isinstance(loaded(tmp_path).decoder, Fallback)


def test_every_tensor_of_the_checkpoint_is_accounted_for(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
        loaded(tmp_path)
    tensors |= {
        "model.layers.1.mlp.up_proj.weight": gone,
        "model.layers.1.extra.weight": gone.clone(),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"holds 1 tensors .*layers\.1\.extra"):
        loaded(tmp_path)
    tensors.pop("model.layers.1.extra.weight")
    tensors["model.layers.1.mlp.up_proj.weight"] = gone[:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"holds 1 tensors of other shapes .*up_proj"):
        loaded(tmp_path)


def test_dummy_weights_need_a_config_only_and_come_from_the_seed(tmp_path: Path) -> None:
    config_alone("afmoe", tmp_path)
    models = [loaded(tmp_path, load_format="dummy", seed=seed).decoder for seed in (1, 1, 2)]
    weights = [list(model.model.parameters()) for model in models if isinstance(model, Fallback)]
    first, again, other = weights
    assert all(float(each.abs().max()) <= 1e-3 for each in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert models[0].weight_bytes() >= sum(each.nbytes for each in first)


def test_in_sixteen_bits_it_passes_its_own_comparison(tmp_path: Path) -> None:
    own = random_model("afmoe", {})
    save(own, tmp_path)
    model = loaded(tmp_path, dtype="bfloat16")
    (tokens, _) = random_sequences(own)
    run = PagedRun(model, block_size=16, kv_dtype=torch.bfloat16)
    (got,) = run.prefill_and_decode([tokens], 24, decode_from=[30])
    want = reference(own, tokens)
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert got.dtype == torch.float32
    assert error.median() < 0.1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_depends_on_the_batch_ends_where_it_would(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    tiny_checkpoint("llama", tmp_path, rope_parameters=rope, max_position_embeddings=256)
    assert loaded(tmp_path).max_model_len == 64
    with pytest.raises(StartupError, match="max_model_len is 100, but the model's positions end"):
        loaded(tmp_path, context=100)


def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query


@pytest.mark.parametrize(
    ("local_size", "mask_function", "mask"),
    [
        (None, causal, Mask()),
        (7, causal, Mask()),
        (7, lambda b, h, q, k: (k <= q) & (k > q - 7), Mask(window=7)),
        (7, lambda b, h, q, k: (k <= q) & (q // 7 == k // 7), Mask(chunk=7)),
    ],
    ids=["causal", "causal all the same", "window", "chunk"],
)
def test_masks_are_read_by_what_they_hide(
    local_size: int | None, mask_function: Any, mask: Mask
) -> None:
    assert read_mask(mask_function=mask_function, local_size=local_size, dtype=None) == mask


@pytest.mark.parametrize(
    ("mask_function", "problem"),
    [
        (lambda b, h, q, k: q >= 0, "not causal"),
        (lambda b, h, q, k: (k <= q) | (k < 4), "neither causal"),
        (lambda b, h, q, k: (k <= q) & (k > q - 8), "neither causal"),  # a window off by one
        (lambda b, h, q, k: torch.ones(3)[q] > 0, "more than positions"),
    ],
)
def test_other_masks_are_problems(mask_function: Any, problem: str) -> None:
    mask = read_mask(mask_function=mask_function, local_size=7)
    assert mask.problem is not None and problem in mask.problem


def test_a_model_that_changes_its_mask_is_found_out() -> None:
    assert Mask()[:, :, :, :] == Mask()
    for change in (lambda m: m[:, :, -1:], lambda m: m.shape, lambda m: m.to(torch.bool)):
        with pytest.raises(NotExpressible, match="mask of its own"):
            change(Mask())


def test_the_comparison_takes_all_tokens_in_steps_of_every_kind() -> None:
    for length, counts in zip(check.LENGTHS, zip(*check.STEPS, strict=True), strict=True):
        assert sum(counts) == length
    kinds = {tuple(sorted(min(count, 2) for count in step)) for step in check.STEPS}
    assert kinds >= {(2, 2), (1, 1), (0, 1), (0, 2)}  # chunks, single tokens, both alone


def test_the_engine_writes_what_transformers_does() -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    prompts = [list(range(5, 40)), [700, 3, 12]]
    with LLM(DEMO_MODEL, model_impl="transformers") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], params)
        assert "model code: transformers' own, with our attention and cache" in llm.notes
    for prompt, output in zip(prompts, outputs, strict=True):
        assert prompt + list(output.outputs[0].token_ids) == greedy(own, prompt)
