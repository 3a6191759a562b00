"""config.json and generation_config.json, in one form whatever transformers wrote them.

Version 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; version 5 `rope_parameters`, `dtype`.
What is read here always has `rope_parameters` with `rope_type` and `rope_theta`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pagedserve.errors import StartupError

DEFAULT_ROPE_THETA = 10000.0
DTYPES = ("float32", "bfloat16", "float16")


def read(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises StartupError where there is none that can be served."""
    config = read_json(directory / "config.json")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unnamed")
        raise StartupError(f"{directory}: quantised checkpoints ({method}) are not supported")
    config["rope_parameters"] = rope_parameters(config)
    return config


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Of any version, with `rope_type` and `rope_theta` filled in."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.pop("type", None) or found.get("rope_type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_ROPE_THETA)
    if "partial_rotary_factor" in config:
        found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return found


def dtype_name(config: dict[str, Any]) -> str | None:
    """The checkpoint's dtype, one of `DTYPES`; None where config.json names none of them."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in DTYPES else None


def eos_token_ids(directory: Path, config: dict[str, Any]) -> list[int]:
    """Tokens that end an answer: those of generation_config.json, else of config.json."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    found = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        return []
    return [int(token) for token in found] if isinstance(found, list) else [int(found)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises StartupError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return value
