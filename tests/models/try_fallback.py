"""Try every causal LM of transformers through the fallback, and write down what came of it.

    python -m tests.models.try_fallback [MODEL_TYPE ...]

Each class is built from a tiny random config, written as a checkpoint, loaded with
`--model-impl transformers`, and run over the paged cache: two sequences, in chunks, then token by
token. Its logits are compared with its own, by its eager attention and in one piece. The results go
to pagedserve/models/tried.json; given types are only printed. Takes some minutes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pagedserve.device import pick
from pagedserve.errors import StartupError
from pagedserve.models.loading import load_model
from tests.checkpoints import save
from tests.models.paged import PagedRun

RESULTS = Path(__file__).parents[2] / "pagedserve" / "models" / "tried.json"
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
SMALL_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
# What a type's defaults do not give, or what our small values break.
FIXES: dict[str, dict[str, Any]] = {}


def main(wanted: list[str]) -> None:
    """Try all, or those that are given."""
    from transformers import __version__
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
    if not wanted:
        table = {"transformers": __version__, "classes": dict(sorted(found.items()))}
        RESULTS.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def attempt(family: str, name: str) -> tuple[str, str]:
    """("equal", error), ("refused", reason), ("unequal", error) or ("unbuilt", reason)."""
    import transformers

    kind = getattr(transformers, name)
    if not kind._supports_attention_backend:
        return "refused", "the class does not let attention be replaced"
    with tempfile.TemporaryDirectory() as folder, timeout(MAX_SECONDS):
        try:
            model = random_model(family, name)
            sequences = random_sequences(model)
            want = [reference(model, tokens) for tokens in sequences]
            save(model, Path(folder))
        except Exception as error:
            return "unbuilt", one_line(error)
        try:
            loaded = load_model(Path(folder), device=pick("cpu"), model_impl="transformers")
        except StartupError as error:
            return "refused", reason(error)
        run = PagedRun(loaded, block_size=5)
        got = run.prefill_and_decode(sequences, 24, decode_from=[n - 9 for n in LENGTHS])
    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))
    return ("equal" if error <= MAX_ERROR else "unequal"), f"{error:.0e}"


def random_model(family: str, name: str) -> Any:
    """A tiny model in float32, all its parameters random."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.06)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.06)
    model.config.architectures = [type(model).__name__]
    return model


def tiny_config(family: str) -> Any:
    """The defaults of a type, made small."""
    from transformers import AutoConfig

    try:
        defaults = AutoConfig.for_model(family).to_dict()
    except Exception:  # a type whose defaults alone are no config
        defaults = dict.fromkeys(SMALL)
    return AutoConfig.for_model(
        family, **{**small(defaults), **copy.deepcopy(FIXES.get(family, {}))}
    )


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
        if isinstance(value, list) and value and len(value) == layers:
            kinds = list(dict.fromkeys(map(str, value)))
            order = [next(v for v in value if str(v) == kind) for kind in kinds]
            changed[key] = [order[i % len(order)] for i in range(changed["num_hidden_layers"])]
        if isinstance(value, dict) and key.endswith("text_config"):
            changed[key] = {**value, **small(value)}
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
    """The reason alone, of a refusal of ours."""
    text = error.message.partition(" cannot run here, as ")[2] or error.message
    return text.partition(". `pagedserve models`")[0]


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
