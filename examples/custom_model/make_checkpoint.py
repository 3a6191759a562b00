"""Write a small Tern checkpoint of random numbers: config.json, safetensors, the demo's tokenizer.

    python examples/custom_model/make_checkpoint.py build/tern

A real one comes out of a training run; what matters here are the names and shapes of its tensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pagedserve.config import DEMO_MODEL

CONFIG = {
    "architectures": ["TernForCausalLM"],
    "model_type": "tern",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 9,
    "global_every": 2,
    "logit_softcap": 12.0,
    "eos_token_id": 2,
    "dtype": "float32",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    c, d = CONFIG["hidden_size"], CONFIG["head_dim"]
    heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    found = {
        "tern.embed.weight": (CONFIG["vocab_size"], c),
        "tern.norm.weight": (c,),
        "lm_head.weight": (CONFIG["vocab_size"], c),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        block = {
            "norm": (c,),
            "attn.q": (heads * d, c),
            "attn.k": (kv_heads * d, c),
            "attn.v": (kv_heads * d, c),
            "attn.q_norm": (d,),
            "attn.k_norm": (d,),
            "attn.out": (c, heads * d),
            "ffn.up": (CONFIG["intermediate_size"], c),
            "ffn.down": (c, CONFIG["intermediate_size"]),
        }
        found |= {f"tern.blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    return found


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random numbers for all of them; norms around one."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draw) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        + (len(shape) == 1)
        for name, shape in shapes().items()
    }


def write(directory: Path) -> None:
    """The checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(tensors(), directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(DEMO_MODEL) / name, directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(f"next: pagedserve serve {sys.argv[1]} --architecture-file examples/custom_model/tern.py")
