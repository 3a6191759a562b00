"""Architectures: each family is one function from config.json to a spec, found by class name."""

from __future__ import annotations

from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.architectures import gpt2, llama, mistral, qwen2, qwen3
from pagedserve.models.architectures.registry import ARCHITECTURES
from pagedserve.models.architectures.values import check_values
from pagedserve.spec import DecoderSpec

__all__ = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "spec_of", "supported"]


def supported() -> list[str]:
    """Class names that can be served, sorted."""
    return sorted(ARCHITECTURES)


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    """The spec of a config.json as `config_json.read` returns it.

    Raises StartupError for an architecture that is not known, a key that is not there, and a value
    of the wrong type or that the family's function refuses.
    """
    name = architecture(config)
    build = ARCHITECTURES.get(name)
    if build is None:
        raise StartupError(
            f"architecture {name} is not supported; supported: {', '.join(supported())}"
        )
    check_values(config, f"config.json of {name}")
    try:
        return build(config)
    except KeyError as missing:
        raise StartupError(f"config.json of {name} lacks {missing}") from missing
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise StartupError(f"config.json of {name} cannot be read: {error}") from error


def architecture(config: dict[str, Any]) -> str:
    """The first of `architectures`, the model's class."""
    names = config.get("architectures") or ["(none given)"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise StartupError("config.json: architectures must be a list of class names")
    return names[0]
