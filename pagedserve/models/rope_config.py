"""A config.json's rotary embedding in one form, whatever transformers wrote it.

flat      {"rope_type", "rope_theta", …}                for all layers
nested    {kind of layer: {"rope_type", …}, …}          where each kind has its own
"""

from __future__ import annotations

from typing import Any

from pagedserve.errors import StartupError

DEFAULT_THETA = 10000.0
OLDER_NAMES = {"su": "longrope"}
THETA = ("rope_theta", "rotary_emb_base")
SHARE = ("partial_rotary_factor", "rotary_pct", "rope_pct")
TRAINED = "original_max_position_embeddings"


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Of any version, with `rope_type` and `rope_theta` filled in; as transformers 5 reads them.

    Where a file has both, `rope_scaling` wins, also over the `rope_theta` of the other; `rope_type`
    wins over its older name `type`. Raises StartupError for what is neither flat nor nested.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(name) or {}
    if not isinstance(given, dict):
        raise StartupError(f"config.json: {name} must be an object")
    kinds = [key for key, value in given.items() if isinstance(value, dict)]
    if not kinds:
        return filled(given, config)
    if len(kinds) != len([value for value in given.values() if value is not None]):
        raise StartupError(f"config.json: {name} must be one object for all layers or one a kind")
    return {kind: filled(given[kind], config) for kind in kinds}


def filled(given: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """One flat object with what the rest of the file says of it."""
    found = dict(given)
    older = found.pop("type", None)
    kind = found.get("rope_type") or older or "default"
    if not isinstance(kind, str):
        raise StartupError(f"config.json: rope type {kind!r} is not supported")
    found["rope_type"] = OLDER_NAMES.get(kind, kind)
    default = config.get("default_theta") or DEFAULT_THETA
    found.setdefault("rope_theta", first(config, THETA) or default)
    share = first(config, SHARE)
    if share is not None:
        found.setdefault("partial_rotary_factor", share)
    if found["rope_type"] == "default":
        return found
    if found["rope_type"] == "longrope" and config.get(TRAINED) is not None:
        found[TRAINED] = config[TRAINED]  # Phi 3 has it beside the object, where it wins
    elif "max_position_embeddings" in config:
        found.setdefault(TRAINED, config["max_position_embeddings"])
    if found.get("factor") is None and found["rope_type"] in ("yarn", "longrope"):
        longest, trained = config.get("max_position_embeddings"), found.get(TRAINED)
        if longest and trained:
            found["factor"] = longest / trained
    return found


def first(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of `keys` that has one: what a thing is called, the newest first."""
    return next((config[key] for key in keys if config.get(key) is not None), None)
