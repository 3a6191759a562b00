"""config.json and generation_config.json, in one form whatever transformers wrote them.

Version 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; version 5 `rope_parameters`, `dtype`.
What is read here always has `rope_parameters` with `rope_type` and `rope_theta`. The room knows no
architecture: which other values there must be is `architectures.values`' to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagedserve.errors import StartupError, shorten
from pagedserve.models.defaults import with_defaults
from pagedserve.models.rope_config import rope_parameters

DEQUANTISED = ("mxfp4",)
DTYPES = ("float32", "bfloat16", "float16")


def read(directory: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model's config.json with `overrides` merged in (see `merged`).

    Raises StartupError where there is none that can be served.
    """
    return complete(plain(directory, overrides))


def plain(directory: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same as it stands in the file, without what `complete` makes of it."""
    config = merged(read_json(directory / "config.json"), overrides or {})
    check_quantisation(config, directory)
    return config


def check_quantisation(config: Mapping[str, Any], directory: Path) -> None:
    """Raise StartupError for a scheme that is not dequantised when a checkpoint loads."""
    found = config.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method", "unnamed") if isinstance(found, dict) else "unnamed"
    if method not in DEQUANTISED:
        raise StartupError(
            f"{directory}: quantised checkpoints ({method}) are not supported; supported: "
            f"{', '.join(DEQUANTISED)} (held in the model's own precision once loaded)"
        )


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """With what the file leaves out, and its rotary embedding in the one form.

    Models of more than text have a config within the config; its end tokens are the whole's.
    """
    config = with_defaults(config)
    config["rope_parameters"] = rope_parameters(config)
    if isinstance(config.get("text_config"), dict):
        text = config["text_config"] = complete(config["text_config"])
        if config.get("eos_token_id") is None and "eos_token_id" in text:
            config["eos_token_id"] = text["eos_token_id"]
    return config


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overrides` over it: objects are merged key by key, all else is replaced."""
    result = dict(config)
    for key, value in overrides.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merged(before, value)
        result[key] = value
    return result


def changes(config: Mapping[str, Any], overrides: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What `merged` changes, one line of text a value: `rope_scaling.factor 2.0 → 4.0`."""
    lines = []
    for key, value in overrides.items():
        before = config.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            lines += changes(before, value, f"{prefix}{key}.")
        elif key in config:
            lines.append(f"{prefix}{key} {shown(before)} → {shown(value)}")
        else:
            lines.append(f"{prefix}{key} {shown(value)} (not in config.json)")
    return lines


def dtype_name(config: dict[str, Any]) -> str | None:
    """The checkpoint's dtype, one of `DTYPES`; None where config.json names none of them."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in DTYPES else None


def shown(value: Any) -> str:
    """A value of a file as it stands there, cut."""
    return shorten(json.dumps(value), 64)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises StartupError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return value
