"""What the catalogue says: how natives are tested, and what came of every class in the fallback.

    python -m tests.models.try_fallback                  try all, and write all; some minutes
    python -m tests.models.try_fallback --native         write what the tests of natives are
    python -m tests.models.try_fallback MODEL_TYPE ...   try these, and print only

Each class is built from a tiny random config, written as a checkpoint, loaded with
`--model-impl transformers`, and run over the paged cache: two sequences, in chunks, then token by
token. Its logits are compared with its own, by its eager attention and in one piece. The results go
to pagedserve/models/catalog.json.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models import catalog
from pagedserve.models.loading import load_model
from tests.checkpoints import COMMON, save
from tests.models.families import CASES
from tests.models.paged import PagedRun
from tests.models.references import REFERENCES
from tests.models.test_text_part import CASES as TEXT_PARTS

MAX_ERROR = 1e-4
MAX_SECONDS = 120
LENGTHS = (37, 61)

# Values for keys that a config has, whatever its type; sizes are unlike each other where they can.
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "rotary_dim": 8,
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "num_layers": 4,
    "num_heads": 4,
    "n_layers": 4,
    "n_heads": 4,
    "ffn_dim": 96,
    "dff": 96,
    "word_embed_proj_dim": 64,
    "attention_heads": 4,
    "max_seq_len": 512,
}
# Of a part of a model that text alone never reaches.
SMALL_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 256,
}
# What a type's defaults do not give, what real checkpoints have, or what our small values break.
# Several: the type is tried with each.
FIXES: dict[str, tuple[dict[str, Any], ...]] = {
    "axk1": ({"head_dim": 8},),
    "longcat_flash": ({"head_dim": 8, "num_layers": 2, "num_hidden_layers": 4},),
    "youtu": ({"head_dim": 8, "pad_token_id": None},),
    "cohere_compass_text": ({"rope_parameters": {FULL: ROPE}, "layer_types": [FULL] * 4},),
    "moshi": ({"num_key_value_heads": 4},),
    "bert": ({"is_decoder": True}, {}),
    "bert-generation": ({"is_decoder": True}, {}),
    "camembert": ({"is_decoder": True}, {}),
    "data2vec-text": ({"is_decoder": True}, {}),
    "electra": ({"is_decoder": True}, {}),
    "ernie": ({"is_decoder": True}, {}),
    "roberta": ({"is_decoder": True}, {}),
    "roberta-prelayernorm": ({"is_decoder": True}, {}),
    "roc_bert": ({"is_decoder": True}, {}),
    "xlm-roberta": ({"is_decoder": True}, {}),
    "xlm-roberta-xl": ({"is_decoder": True}, {}),
    "xmod": ({"is_decoder": True, "default_language": "en_XX"},),
    "lfm2": ({"layer_types": ["conv", "conv", FULL, "conv"]},),
    "lfm2_moe": ({"layer_types": ["conv", FULL, "conv", FULL], "num_dense_layers": 1},),
    "granitemoehybrid": (
        {"layer_types": [FULL] * 4, "num_local_experts": 0},
        {"layer_types": [LINEAR, FULL] * 2, "mamba_n_heads": 4, "mamba_d_head": 32},
    ),
    "minimax_m3_vl_text": ({"layer_types": [FULL, "minimax_m3_sparse"] * 2},),
    "zaya": ({"num_experts_per_tok": 1},),
    "gemma3n_text": (
        {
            **SHARED_KV,
            "intermediate_size": 96,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
        },
    ),
    "gemma4_text": ({**SHARED_KV, "global_head_dim": 32},),
    "gemma4_unified_text": ({"global_head_dim": 32, "layer_types": [SLIDING, FULL] * 2},),
    "recurrent_gemma": ({"max_position_embeddings": 512},),
    "phi4_multimodal": ({"vision_config": SMALL_VISION, "audio_config": {"num_blocks": 1}},),
}

# Not in the parity suite, but compared with transformers' own in tests of their own.
ELSEWHERE = (
    "BailingMoeV2ForCausalLM",  # test_twins
    "MiMoForCausalLM",
    "IQuestCoderForCausalLM",  # the case "iquestcoder", whose class is Llama's in transformers
)
# Types of which no tiny model runs alone, and why.
UNBUILDABLE = {
    "gemma3n": "its images need timm and pillow; Gemma3nForCausalLM is its text",
    "gemma4_assistant": "a draft model, which reads another model's keys and hidden states",
    "gemma4_unified_assistant": "a draft model, which reads another model's keys and hidden states",
}


def main(arguments: list[str]) -> None:
    """See the module."""
    from transformers import __version__

    if arguments == ["--native"]:
        write(native=natives())
    elif arguments:
        try_all(arguments)
    else:
        write(fallback=try_all([]), native=natives(), transformers=__version__)


def try_all(wanted: list[str]) -> dict[str, dict[str, str]]:
    """Class → result and detail, of the given types or of all."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    found: dict[str, dict[str, str]] = {}
    for family, name in NAMES.items():
        if wanted and family not in wanted:
            continue
        result, text = attempt(family, name)
        print(f"{family:26} {name:34} {result:8} {text}", flush=True)
        before = found.get(name)
        if before is None or before["result"] != "equal":
            found[name] = {"result": result, "detail": text}
    return dict(sorted(found.items()))


def natives() -> dict[str, dict[str, Any]]:
    """Class → who says what its logits should be, and with how many configs it is asked."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES,
    )

    oracles = [(name, "transformers") for name in ELSEWHERE]
    oracles += [(WITH_IMAGES[family], "transformers") for family, *_ in TEXT_PARTS.values()]
    oracles += [(NAMES[case.family], "transformers") for case in CASES.values()]
    for reference_ in REFERENCES.values():
        oracles.append((reference_.config["architectures"][0], "independent reference"))
    return {
        name: {"oracle": oracle, "configs": count}
        for (name, oracle), count in sorted(Counter(oracles).items())
    }


def write(**parts: Any) -> None:
    """Replace these parts of the catalogue."""
    table = json.loads(catalog.FILE.read_text(encoding="utf-8")) if catalog.FILE.exists() else {}
    text = json.dumps({**table, **parts}, indent=1, ensure_ascii=False, sort_keys=True)
    catalog.FILE.write_text(text + "\n", encoding="utf-8")


def attempt(family: str, name: str) -> tuple[str, str]:
    """("equal", error), ("refused", reason), ("unequal", error) or ("unbuilt", reason)."""
    import transformers

    if family in UNBUILDABLE:
        return "unbuilt", UNBUILDABLE[family]
    kind = getattr(transformers, name)
    if not kind._supports_attention_backend:
        return "refused", "the class does not let attention be replaced"
    tries = [attempt_one(family, fix) for fix in FIXES.get(family, ({},))]
    if any(result == "unequal" for result, _ in tries):
        return next(each for each in tries if each[0] == "unequal")
    best = next((each for each in tries if each[0] == "equal"), tries[0])
    others = [f"with another config refused: {text}" for result, text in tries if result != best[0]]
    return best[0], "; ".join([best[1], *others])


def attempt_one(family: str, fix: dict[str, Any]) -> tuple[str, str]:
    """The same, with one config."""
    with tempfile.TemporaryDirectory() as folder, timeout(MAX_SECONDS):
        try:
            model = random_model(family, fix)
            save(model, Path(folder))
        except Exception as error:
            return "unbuilt", one_line(error)
        try:
            loaded = load_model(Path(folder), device=pick("cpu"), model_impl="transformers")
        except StartupError as error:
            return "refused", reason(error)
        try:
            sequences = random_sequences(model)
            want = [reference(model, tokens) for tokens in sequences]
        except Exception as error:
            return "unbuilt", one_line(error)
        run = PagedRun(loaded, block_size=5)
        got = run.prefill_and_decode(sequences, 24, decode_from=[n - 9 for n in LENGTHS])
    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))
    return ("equal" if error <= MAX_ERROR else "unequal"), f"{error:.0e}"


def random_model(family: str, fix: dict[str, Any]) -> Any:
    """A tiny model in float32, all its parameters random."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, fix)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.06)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.06)
    model.config.architectures = [type(model).__name__]
    return model


def tiny_config(family: str, fix: dict[str, Any]) -> Any:
    """That of the parity suite where there is one, else the defaults of a type, made small."""
    from transformers import AutoConfig

    case = next((case for case in CASES.values() if case.family == family), None)
    if case is not None:
        return AutoConfig.for_model(family, **{**COMMON, **copy.deepcopy(case.config)})
    try:
        defaults = AutoConfig.for_model(family).to_dict()
    except Exception:  # a type whose defaults alone are no config
        defaults = dict.fromkeys(SMALL)
    return AutoConfig.for_model(family, **{**small(defaults), **copy.deepcopy(fix)})


def small(defaults: dict[str, Any], sizes: dict[str, Any] = SMALL) -> dict[str, Any]:
    """What of `defaults` has to change."""
    changed = {key: value for key, value in sizes.items() if key in defaults}
    if defaults.get("num_key_value_heads") == defaults.get("num_attention_heads"):
        changed.pop("num_key_value_heads", None)
        if defaults.get("num_key_value_heads") is not None:
            changed["num_key_value_heads"] = changed.get("num_attention_heads")
    if defaults.get("sliding_window", 0) is None:
        changed.pop("sliding_window", None)
    layers = defaults.get("num_hidden_layers")
    for key, value in defaults.items():
        if key == "per_layer_config":  # of layers that there are no more
            continue
        if isinstance(value, list) and value and len(value) == layers:
            kinds = list(dict.fromkeys(map(str, value)))
            order = [next(v for v in value if str(v) == kind) for kind in kinds]
            changed[key] = [order[i % len(order)] for i in range(changed["num_hidden_layers"])]
        if isinstance(value, dict) and key.endswith("text_config"):
            inner = {k: v for k, v in value.items() if k != "per_layer_config"}
            changed[key] = {**inner, **small(value)}
        elif isinstance(value, dict) and key.endswith("_config"):
            changed[key] = {**value, **small(value, SMALL_VISION)}
    return changed


def random_sequences(model: Any) -> list[list[int]]:
    choice = torch.Generator().manual_seed(7)
    vocab = model.config.get_text_config().vocab_size
    return [torch.randint(3, vocab, (n,), generator=choice).tolist() for n in LENGTHS]


def reference(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].float()
    assert logits.isfinite().all(), "its logits are not finite"
    return logits


def reason(error: StartupError) -> str:
    """The reason alone, of a refusal of ours, without the numbers of a tiny config."""
    text = error.message.partition(" cannot run here, as ")[2] or error.message
    text = text.partition(". `pagedserve models`")[0]
    text = re.sub(r"only \d+ of its \d+ layers call", "not all of its layers call", text)
    text = re.sub(r"function \d+ times for \d+ layers", "function more than once a layer", text)
    text = re.sub(r"\d+ queries over \d+ keys of its own", "it attends to keys of its own", text)
    text = text.partition(". There is a native family")[0]
    return text.partition(" by ")[0]


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@contextlib.contextmanager
def timeout(seconds: int) -> Iterator[None]:
    def stop(*signal: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main(sys.argv[1:])
