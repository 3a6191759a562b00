"""The text part of checkpoints that also read images: a config and names within the whole's.

What reads images is left out; a prompt is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pagedserve.errors import StartupError
from pagedserve.models.architectures.gemma import gemma3
from pagedserve.models.architectures.llama import llama
from pagedserve.models.architectures.ministral import ministral3
from pagedserve.models.architectures.mistral import mistral
from pagedserve.models.architectures.qwen2 import qwen2
from pagedserve.models.architectures.registry import Builder, Config, arch
from pagedserve.models.architectures.values import check_values
from pagedserve.spec import DecoderSpec

# Two ages of names: language_model.model.layers.… and model.language_model.layers.…
RENAMES = (
    (r"^(model\.)?language_model\.(model\.)?", "model."),
    (r"^model\.lm_head\.", "lm_head."),
)
IMAGES = (r"^(model\.)?(vision_tower\.|multi_modal_projector\.|image_newline$)",)


@arch("Gemma3ForConditionalGeneration")
def gemma3_text(c: Config) -> DecoderSpec:
    return text_part(c, {"gemma3_text": gemma3})


@arch("Mistral3ForConditionalGeneration")
def mistral3_text(c: Config) -> DecoderSpec:
    return text_part(c, {"mistral": mistral, "ministral3": ministral3})


@arch("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
def llava_text(c: Config) -> DecoderSpec:
    return text_part(c, {"llama": llama, "mistral": mistral, "qwen2": qwen2})


def text_part(c: Config, families: Mapping[str, Builder]) -> DecoderSpec:
    """By the `model_type` of its own config. Raises StartupError for one that is not known."""
    text = c["text_config"]
    if not isinstance(text, dict):
        raise StartupError("config.json: text_config must be an object")
    kind = text.get("model_type", "")
    if kind not in families:
        raise StartupError(
            f"config.json: text_config has model_type {kind!r}; supported: {', '.join(families)}"
        )
    check_values(text, "config.json: text_config")
    spec = families[kind](text)
    return replace(
        spec,
        renames=RENAMES,
        ignored=(*spec.ignored, *IMAGES),
        tied_head=spec.tied_head or bool(c.get("tie_word_embeddings")),
    )
