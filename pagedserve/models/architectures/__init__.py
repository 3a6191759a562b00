"""Architectures: each family is one function from config.json to a spec, found by class name."""

from __future__ import annotations

from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.architectures import gpt2, llama, mistral, qwen2, qwen3
from pagedserve.models.architectures.registry import ARCHITECTURES
from pagedserve.spec import DecoderSpec

__all__ = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "spec_of", "supported"]


def supported() -> list[str]:
    """Class names that can be served, sorted."""
    return sorted(ARCHITECTURES)


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    """The spec of a config.json as `config_json.read` returns it.

    Raises StartupError for an architecture that is not known, a key that is not there, and a value
    that the family's function refuses.
    """
    names = config.get("architectures") or ["(none given)"]
    build = ARCHITECTURES.get(names[0])
    if build is None:
        raise StartupError(
            f"architecture {names[0]} is not supported; supported: {', '.join(supported())}"
        )
    try:
        return build(config)
    except KeyError as missing:
        raise StartupError(f"config.json of {names[0]} lacks {missing}") from missing
