"""Architectures: each family is one function from config.json to a spec, found by class name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from pagedserve.errors import StartupError
from pagedserve.models.architectures.registry import ARCHITECTURES
from pagedserve.models.architectures.values import check_values
from pagedserve.models.config_json import shown
from pagedserve.models.soundness import check_spec
from pagedserve.spec import DecoderSpec

for each in pkgutil.iter_modules(__path__):  # a family registers itself; no list to forget it in
    importlib.import_module(f"{__name__}.{each.name}")


def supported() -> list[str]:
    """Class names that can be served, sorted."""
    return sorted(ARCHITECTURES)


def is_native(config: dict[str, Any], model_impl: str = "auto") -> bool:
    """Whether a family of ours computes it, by what `--model-impl` says."""
    if model_impl == "auto":
        return architecture(config) in ARCHITECTURES
    return model_impl == "native"


def spec_of(
    config: dict[str, Any], wrap: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> DecoderSpec:
    """The spec of a config.json as `config_json.read` returns it.

    `wrap` makes what the family's function gets, for who wants to know what it reads.

    Raises StartupError for an architecture that is not known, a key that is not there, a value of
    the wrong type or that the family's function refuses, and values that do not fit together.
    """
    name = architecture(config)
    family = ARCHITECTURES.get(name)
    if family is None:
        raise StartupError(
            f"architecture {name} is not supported; supported: {', '.join(supported())}"
        )
    where = f"config.json of {name}"
    check_values(config, where, family.may_be_null)
    try:
        spec = family.build(wrap(config))
    except KeyError as missing:
        raise StartupError(f"{where} lacks {missing}") from missing
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise StartupError(f"{where} cannot be read: {error}") from error
    check_spec(spec, where)
    return spec


def architecture(config: dict[str, Any]) -> str:
    """The first of `architectures`, the model's class."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise StartupError(
            "config.json: architectures must be a list of class names, the model's own first, got "
            f"{shown(names)}"
        )
    return names[0]
