"""The JSON files of a checkpoint's text side, and how they write a token.

tokenizer_config.json     settings, named special tokens, `added_tokens_decoder` (by id)
special_tokens_map.json   named special tokens, in older checkpoints
added_tokens.json         ids of added tokens, in older checkpoints
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken

from pagedserve.errors import StartupError

NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
MORE_SPECIALS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file. Raises StartupError."""
    if not path.is_file():
        return {}
    try:
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """What all three files say, in the shape of tokenizer_config.json. Raises StartupError."""
    config = read_json(directory / "special_tokens_map.json")
    config.update(read_json(directory / "tokenizer_config.json"))
    ids = read_json(directory / "added_tokens.json")
    if ids and "added_tokens_decoder" not in config:
        special = set(named_specials(config).values()) | set(more_specials(config))
        config["added_tokens_decoder"] = {
            str(id): {"content": text, "normalized": False, "special": text in special}
            for text, id in ids.items()
        }
    return config


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is true or false; null, which libraries write, leaves it at its default."""
    value = config.get(name)
    return default if value is None else bool(value)


def token_text(value: Any) -> str | None:
    """The text of a token as configs write it: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_specials(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, by name."""
    named = {name: token_text(config.get(name)) for name in NAMED_SPECIALS}
    return {name: text for name, text in named.items() if text is not None}


def more_specials(config: Mapping[str, Any]) -> list[str]:
    """The special tokens that have no name, or one of their own."""
    found: list[str] = []
    for key in MORE_SPECIALS:
        listed = config.get(key) or []
        values = listed.values() if isinstance(listed, Mapping) else listed
        found += [text for text in map(token_text, values) if text is not None]
    return found


def added_tokens(config: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    """`added_tokens_decoder` in the order of the ids."""
    listed = config.get("added_tokens_decoder") or {}
    for id, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        content = token_text(fields)
        if content is not None:
            given = fields if isinstance(fields, Mapping) else {}
            chosen = {flag: bool(given[flag]) for flag in FLAGS if flag in given}
            yield int(id), AddedToken(content, **chosen)
