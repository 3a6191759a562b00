"""The second witness of a reference: a transformers model that has the same maths.

Where a family is another one under other names, its tensors are renamed, unpacked or folded by the
tests and loaded into that model. Nothing here knows the package under test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.references import Reference
from tests.models.references.drawing import Weights

LENGTH = 41


TOLERANCE = 1e-5


def tokens(reference: Reference, length: int = LENGTH) -> list[int]:
    choice = torch.Generator().manual_seed(length)
    return torch.randint(3, reference.vocab_size, (length,), generator=choice).tolist()


def drawn(reference: Reference) -> Weights:
    return reference.weights(reference.config, 0)


def twin(
    family: str,
    fields: dict[str, Any],
    tensors: Weights | None = None,
    *,
    attention: str = "eager",
) -> Any:
    """A transformers model in float32; without `tensors` the caller still fills it."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **fields), attn_implementation=attention
    )
    if tensors is not None:
        model.load_state_dict(tensors)
    return model.float().eval()


def loaded(family: str, fields: dict[str, Any], tensors: Weights, directory: Path) -> Any:
    """As `twin`, by way of files: transformers keeps experts in another shape than checkpoints."""
    AutoConfig.for_model(family, **fields).save_pretrained(directory)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


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
