"""Says whether a value fits a JSON schema, for the keywords that the generators use and no more."""

from __future__ import annotations

import json
from typing import Any

KEYWORDS = frozenset(
    ("type", "properties", "required", "enum", "items", "minimum", "maximum")
    + ("additionalProperties", "description", "title")
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """True when `value` is an instance of `schema`; raises ValueError on an unknown keyword."""
    if unknown := schema.keys() - KEYWORDS:
        raise ValueError(f"this checker does not know the keywords {sorted(unknown)}")
    return (
        _has_type(value, schema.get("type"))
        and ("enum" not in schema or value in schema["enum"])
        and _in_range(value, schema)
        and _fits_members(value, schema)
    )


def parse_and_fit(text: str, schema: dict[str, Any]) -> bool:
    """True when `text` is one JSON value that fits `schema`."""
    try:
        return fits(json.loads(text), schema)
    except json.JSONDecodeError:
        return False


def _has_type(value: Any, name: str | None) -> bool:
    if name is None:
        return True
    if name in ("integer", "number") and isinstance(value, bool):
        return False
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    return isinstance(value, kinds[name])


def _in_range(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return schema.get("minimum", value) <= value <= schema.get("maximum", value)


def _fits_members(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {})) for item in value)
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties", {})
    if schema.get("additionalProperties") is False and value.keys() - properties.keys():
        return False
    return all(key in value for key in schema.get("required", ())) and all(
        fits(member, properties.get(key, {})) for key, member in value.items()
    )
