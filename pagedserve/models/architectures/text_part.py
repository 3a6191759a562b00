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
from pagedserve.models.architectures.qwen3 import qwen3
from pagedserve.models.architectures.registry import Builder, Config, arch
from pagedserve.models.architectures.values import check_values
from pagedserve.spec import Attn, DecoderSpec

# Two ages of names: language_model.model.layers.… and model.language_model.layers.…
RENAMES = (
    (r"^(model\.)?language_model\.(model\.)?", "model."),
    (r"^model\.lm_head\.", "lm_head."),
)
IMAGES = (r"^(model\.)?(vision_tower\.|visual\.|multi_modal_projector\.|image_newline$)",)


@arch("Gemma3ForConditionalGeneration")
def gemma3_text(c: Config) -> DecoderSpec:
    return text_part(c, {"gemma3_text": gemma3})


@arch("Mistral3ForConditionalGeneration")
def mistral3_text(c: Config) -> DecoderSpec:
    return text_part(c, {"mistral": mistral, "ministral3": ministral3})


@arch("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
def llava_text(c: Config) -> DecoderSpec:
    return text_part(c, {"llama": llama, "mistral": mistral, "qwen2": qwen2})


@arch("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
def qwen2_vl_text(c: Config) -> DecoderSpec:
    if "text_config" not in c:  # so the first files have it
        return without_images(along_text(qwen2(c)), c)
    kinds = ("qwen2_vl_text", "qwen2_5_vl_text")
    return text_part(c, dict.fromkeys(kinds, lambda text: along_text(qwen2(text))))


@arch("Qwen3VLForConditionalGeneration")
def qwen3_vl_text(c: Config) -> DecoderSpec:
    return text_part(c, {"qwen3_vl_text": lambda text: along_text(qwen3(text))})


def along_text(spec: DecoderSpec) -> DecoderSpec:
    """Where only images have a height and a width, the rotation by three positions is the plain."""
    layers = []
    for layer in spec.layers:
        attn = layer.attn
        assert isinstance(attn, Attn) and attn.rope is not None
        if attn.rope.scaling.get("rope_type") in ("mrope", "default"):
            attn = replace(attn, rope=replace(attn.rope, scaling={}))
        layers.append(replace(layer, attn=attn))
    return replace(spec, layers=tuple(layers))


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
    return without_images(families[kind](text), c)


def without_images(spec: DecoderSpec, c: Config) -> DecoderSpec:
    """`spec` by the names of the whole checkpoint, whose config is `c`."""
    return replace(
        spec,
        renames=RENAMES,
        ignored=(*spec.ignored, *IMAGES),
        tied_head=spec.tied_head or bool(c.get("tie_word_embeddings")),
    )
